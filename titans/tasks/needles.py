"""Needle tasks as training rows: exactly so many tokens, put together from tokens, with many questions.

The sentences are those of `titans.evaluation.needle`, and so is the order: instruction, haystack with
needles, question, answer. To have more to learn from, a row may hide several needles, ask for several of
them, and ask for some in the middle of the haystack already, after their needles. Test samples keep the
published form.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from titans.data.bpe import WordEncoder
from titans.data.dataset import IGNORED
from titans.data.sentences import SentenceTokens
from titans.evaluation.needle import NOISE, Draws, NeedleTask, frame, needle_sentence
from titans.tasks.decoys import Decoys

Ids = npt.NDArray[np.int64]
# The first piece after the instruction may take a few tokens more than it does after a sentence.
SPARE = 16


FACT, BOOK = 1, -1


class Row(NamedTuple):
    """``ids`` and ``labels``, int64 [length]; labels are -100 but on the tokens of answers.

    worth: int8 [length], `FACT` on the tokens of facts, `BOOK` on those of the haystack and of decoys,
        0 on instructions, questions and answers.
    """

    ids: Ids
    labels: Ids
    worth: npt.NDArray[np.int8]


@dataclass(frozen=True)
class Piece:
    """Something that stands between two sentences of the haystack, at ``depth`` of it (0 to 1)."""

    depth: float
    ids: list[int]
    first: int = 0  # the answer's tokens are ids[first:last]
    last: int = 0
    worth: int = 0


class NeedleRows:
    """Rows of needle tasks, each of a task drawn from those that fit.

    Args:
        sentences: the haystack for "essay" tasks, and for half of the rows of "noise" tasks, which then
            repeat a line of one to five random sentences instead of the published one.
        keys: hidden in a row at most (a task may need more: as many as it asks for and distracts with).
        questions: asked in a row at most.
        dense: share of a row that needles and questions may take beyond the first ones, at most; drawn evenly
            from 0 to this for each row, so that some look like the published ones.
        middle: share of the questions beyond the first that are asked within the haystack.
        decoys: what stands between the sentences of the haystack beside needles, if anything.
    """

    def __init__(
        self,
        sentences: SentenceTokens,
        tasks: Sequence[NeedleTask],
        *,
        keys: int,
        questions: int,
        dense: float,
        middle: float,
        decoys: Decoys | None = None,
    ):
        self.sentences = sentences
        self.decoys = decoys
        self.encode = WordEncoder(sentences.tokenizer)
        self.tasks, self.keys, self.questions, self.dense, self.middle = tasks, keys, questions, dense, middle
        self._break = self.encode("\n")
        vocabulary = sentences.tokenizer.backend_tokenizer.get_vocab()
        self._starts_word = np.zeros(max(vocabulary.values()) + 1, dtype=bool)
        self._starts_word[[i for token, i in vocabulary.items() if token.startswith(("Ġ", "Ċ"))]] = True
        self._shortest = {task: self._least(task) for task in tasks}

    def shortest(self) -> int:
        """Tokens that the shortest task needs."""
        return min(self._shortest.values())

    def row(self, rng: random.Random, length: int) -> Row:
        """A row of exactly ``length`` tokens."""
        fitting = [task for task in self.tasks if self._shortest[task] <= length]
        if not fitting:
            raise ValueError(
                f"length: expected at least {self.shortest()} tokens for these tasks, got {length}"
            )
        task = rng.choice(fitting)
        instruction = self.encode(frame(task, [""] * task.queries)[0])
        room = -1
        while room < SPARE:  # in a row of the least length, keys of many tokens are drawn again
            draws = Draws(rng, task)
            pieces, final = self._pieces(rng, draws, task, length - len(instruction))
            room = length - len(instruction) - sum(len(piece.ids) for piece in [*pieces, *final])
        pieces, room = self._with_decoys(rng, pieces, room, lambda: self.encode(" " + draws.value()))
        return self._assemble(rng, draws, task, length, instruction, pieces, final, room)

    def _pieces(
        self, rng: random.Random, draws: Draws, task: NeedleTask, budget: int
    ) -> tuple[list[Piece], list[Piece]]:
        """What goes into the haystack, by depth, and what follows it."""
        least = max(task.queries, task.keys)
        # Logarithms of the number are drawn evenly: few keys are as frequent as many.
        most = max(self.keys, least)
        wanted = int(least * ((most + 1) / least) ** rng.random())
        values: dict[str, list[tuple[float, str]]] = {}
        hidden: list[Piece] = []

        def hide() -> list[Piece]:
            key = draws.key()
            values[key] = sorted((rng.random(), draws.value()) for _ in range(task.values))
            return [
                Piece(depth, self._unit(task, needle_sentence(task, key, value)), worth=FACT)
                for depth, value in values[key]
            ]

        for _ in range(least):
            hidden += hide()
        used: set[str] = set()
        final = [self._question(rng, task, values, used)]
        left = budget - sum(len(piece.ids) for piece in [*hidden, *final])
        spare = min(left - SPARE, int(self.dense * rng.random() * budget))
        questions = rng.randint(1, self.questions)
        asked = 1
        while True:
            # By turns a key and a question, until both are enough or the row is as dense as it may be.
            more: list[Piece] = []
            where = hidden
            if len(values) < wanted and (asked >= questions or len(values) <= asked):
                more = hide()
            elif asked < questions:
                question = self._question(rng, task, values, used)
                where = final
                if rng.random() < self.middle:
                    after = question.depth
                    question = Piece(
                        after + (1 - after) * rng.random(), question.ids, question.first, question.last
                    )
                    where = hidden
                more = [question]
                asked += 1
            spare -= sum(len(piece.ids) for piece in more)
            if not more or spare < 0:
                break
            where += more
        return sorted(hidden, key=lambda piece: piece.depth), final

    def _with_decoys(
        self,
        rng: random.Random,
        pieces: list[Piece],
        room: int,
        value: Callable[[], list[int]] | None = None,
    ) -> tuple[list[Piece], int]:
        """Decoys anywhere among the pieces, and the room that is left."""
        if self.decoys is None:
            return pieces, room
        drawn = self.decoys.draw(rng, room - SPARE, value)
        found = [Piece(rng.random(), ids, worth=BOOK) for ids in drawn]
        left = room - sum(len(piece.ids) for piece in found)
        return sorted([*pieces, *found], key=lambda piece: piece.depth), left

    def _question(
        self,
        rng: random.Random,
        task: NeedleTask,
        values: dict[str, list[tuple[float, str]]],
        used: set[str],
    ) -> Piece:
        """A question with its answer; ``depth`` is that of its last needle."""
        fresh = [key for key in values if key not in used]
        asked = rng.sample(fresh if len(fresh) >= task.queries else list(values), task.queries)
        used.update(asked)
        facts = [fact for key in asked for fact in values[key]]
        question = self.encode(frame(task, asked)[1])
        answer = self.encode(" " + ", ".join(value for _, value in facts))
        # The full stop is learned, too: a model that answers must know when it is done.
        ids = [*question, *answer, *self.encode(".")]
        return Piece(max(depth for depth, _ in facts), ids, len(question), len(ids))

    def _assemble(
        self,
        rng: random.Random,
        draws: Draws,
        task: NeedleTask,
        length: int,
        start: list[int],
        pieces: list[Piece],
        final: list[Piece],
        room: int,
    ) -> Row:
        hay, bounds = self._haystack(rng, draws, task, length, room - SPARE)
        parts: list[Any] = [start]
        worth = np.zeros(length, dtype=np.int8)
        answers: list[tuple[int, int]] = []
        at, cursor = len(start), 0

        def add(ids: Any, of_worth: int = BOOK) -> None:
            nonlocal at
            if at == len(start) and task.haystack == "essay":
                ids = self._first(ids)
            parts.append(ids)
            worth[at : at + len(ids)] = of_worth
            at += len(ids)

        def add_piece(piece: Piece) -> None:
            answers.append((at + piece.first, at + piece.last))
            add(piece.ids, piece.worth)

        whole = bounds[-1]
        for piece in pieces:
            place = bounds[bisect_right(bounds, piece.depth * whole) - 1]
            if place > cursor:
                add(hay[cursor:place])
                cursor = place
            add_piece(piece)
        if whole > cursor:
            add(hay[cursor:whole])
        # To the token: the beginning of the next sentences up to the end of a word, then line breaks.
        rest = length - at - sum(len(piece.ids) for piece in final)
        fits = np.flatnonzero(self._starts_word[hay[whole : whole + rest + 1]])
        fragment = int(fits[-1]) if len(fits) else 0
        if fragment:
            add(hay[whole : whole + fragment])
        add(self._break * (rest - fragment))
        for piece in final:
            add_piece(piece)
        ids = np.concatenate(parts, dtype=np.int64, casting="unsafe")
        assert len(ids) == length
        labels = np.full(length, IGNORED, dtype=np.int64)
        for first, last in answers:
            labels[first:last] = ids[first:last]
        return Row(ids, labels, worth)

    def _first(self, ids: Any) -> list[int]:
        """What a sentence with a space before it is after a line break instead."""
        ids = list(ids)
        starts = np.flatnonzero(self._starts_word[ids])
        end = int(starts[1]) if len(starts) > 1 else len(ids)
        word = self.sentences.tokenizer.backend_tokenizer.decode(ids[:end], skip_special_tokens=False)
        return [*self._break, *self.encode(word.removeprefix(" ")), *ids[end:]]

    def _haystack(
        self, rng: random.Random, draws: Draws, task: NeedleTask, length: int, room: int
    ) -> tuple[npt.NDArray[Any], list[int]]:
        """Some more than ``length`` tokens, and the ends of those sentences that fit into ``room``."""
        room = max(room, 0)
        if task.haystack == "essay":
            starts = self.sentences.starts
            last = int(np.searchsorted(starts, starts[-1] - length - 1, "right")) - 1
            first = rng.randrange(max(last, 1))
            begin = starts[first]
            stop = int(np.searchsorted(starts, begin + room, "right"))
            return self.sentences.ids[begin : begin + length + 1], (starts[first:stop] - begin).tolist()
        parts: list[int] = []
        bounds = [0]
        for unit in self._units(rng, draws, task):
            parts += unit
            if len(parts) <= room:
                bounds.append(len(parts))
            if len(parts) > length:
                break
        return np.array(parts), bounds

    def _units(self, rng: random.Random, draws: Draws, task: NeedleTask) -> Iterator[list[int]]:
        if task.haystack == "needle":
            while True:
                yield self._unit(task, needle_sentence(task, draws.distracting_key(), draws.value()))
        line = self._unit(task, NOISE) if rng.random() < 0.5 else self._random_line(rng)
        while True:
            yield line

    def _random_line(self, rng: random.Random) -> list[int]:
        drawn = [rng.randrange(len(self.sentences)) for _ in range(rng.randint(1, 5))]
        starts, ids = self.sentences.starts, self.sentences.ids
        sentences = [ids[starts[i] : starts[i + 1]].tolist() for i in drawn]
        return [*self._first(sentences[0]), *(token for sentence in sentences[1:] for token in sentence)]

    def _unit(self, task: NeedleTask, text: str) -> list[int]:
        return self.encode((" " if task.haystack == "essay" else "\n") + text)

    def _least(self, task: NeedleTask) -> int:
        """Tokens of a row of this task without haystack, at most in 20 draws, and some to spare."""
        rng = random.Random(0)
        lengths = []
        for _ in range(20):
            values: dict[str, list[tuple[float, str]]] = {}
            draws = Draws(rng, task)
            needles = 0
            for _ in range(max(task.keys, task.queries)):
                key = draws.key()
                values[key] = [(0.0, draws.value()) for _ in range(task.values)]
                needles += sum(
                    len(self._unit(task, needle_sentence(task, key, value))) for _, value in values[key]
                )
            question = len(self._question(rng, task, values, set()).ids)
            lengths.append(len(self.encode(frame(task, [""] * task.queries)[0])) + needles + question)
        return max(lengths) + SPARE + 8
