"""BABILong as training rows: exactly so many tokens, a story's facts among sentences, its questions answered.

The order is that of `titans.evaluation.babilong`: facts in theirs, between sentences of the haystack, the
question after all of it. bAbI asks a question after every few facts: a row may ask earlier ones of the same
story, too, within the haystack, before the next fact comes, and may tell several stories. Test samples keep
the published form.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from titans.data.sentences import SentenceTokens
from titans.evaluation.babilong import TASKS, BabiStory, BabiTask, read_stories
from titans.evaluation.needle import Draws, NeedleTask
from titans.tasks.decoys import Decoys, rare
from titans.tasks.needles import FACT, SPARE, NeedleRows, Piece, Row

BABILONG: dict[str, BabiTask] = {f"babilong_{name}": task for name, task in TASKS.items()}

# Stories that go on from one another: the facts of each begin with those of the one before.
Chain = list[BabiStory]
# Tokens of a story with its question, its chain, its place there.
Entry = tuple[int, Chain, int]


def chains(stories: Iterable[BabiStory]) -> list[Chain]:
    """The stories of a file (`read_stories`), those that go on from one another together."""
    found: list[Chain] = []
    for story in stories:
        if found and story.facts[: len(found[-1][-1].facts)] == found[-1][-1].facts:
            found[-1].append(story)
        else:
            found.append([story])
    return found


def training_chains(path: Path, names: Iterable[str]) -> dict[str, list[Chain]]:
    """Of each task of `BABILONG` in ``names`` what bAbI has for training (`read_stories`)."""
    return {name: chains(read_stories(path, BABILONG[name], "train")) for name in names}


class BabiRows(NeedleRows):
    """Rows of BABILong tasks, each of a task drawn from those that fit, put together as needle rows are.

    Args:
        sentences: the haystack.
        stories: of each task, by its name.
        keys: stories of a row at most, one told after the other: who was seen in several is where the last
            one says. With one alone, a row of 4,096 tokens would have five answers of a word to learn from.
        questions: of each story at most: the last one after its last fact, others before that.
        decoys: share of the haystack that sentences may take, at most, with rare words of the stories or with
            a part of a fact dropped into them.
        mined: sentences that take turns with the former.
    """

    def __init__(
        self,
        sentences: SentenceTokens,
        stories: Mapping[str, Sequence[Chain]],
        *,
        keys: int,
        questions: int,
        decoys: float = 0.0,
        mined: SentenceTokens | None = None,
    ) -> None:
        super().__init__(sentences, [], keys=keys, questions=questions, dense=0.0, middle=0.0)
        self._facts: dict[str, list[int]] = {}  # some hundred make all stories of a task
        self._stories: dict[NeedleTask, list[Entry]] = {  # the shortest first
            NeedleTask(name=name, haystack="essay"): sorted(
                (
                    (sum(len(self._fact(fact)) for fact in story.facts) + len(self._ask(story).ids), chain, i)
                    for chain in of_task
                    for i, story in enumerate(chain)
                ),
                key=_tokens,
            )
            for name, of_task in stories.items()
        }
        self.tasks = list(self._stories)
        if decoys:
            words = {token for ids in self._facts.values() for token in ids}
            self.decoys = Decoys(sentences, rare(sentences, words), decoys, mined)
        self._shortest = {task: entries[0][0] + SPARE for task, entries in self._stories.items()}

    def row(self, rng: random.Random, length: int) -> Row:
        """As of `NeedleRows`; an answer ends with its full stop, after which it would not be looked at."""
        fitting = {
            task: number
            for task, entries in self._stories.items()
            if (number := bisect_right(entries, length - SPARE, key=_tokens))
        }
        if not fitting:
            raise ValueError(
                f"length: expected at least {self.shortest()} tokens for these tasks, got {length}"
            )
        task = rng.choice(list(fitting))
        told, room = self._tell(rng, self._stories[task], length)
        asked: list[list[BabiStory]] = []
        for chain, place in told:
            asked.append([])
            for story in rng.sample(chain[:place], min(rng.randrange(self.questions), place)):
                tokens = len(self._ask(story).ids)
                if room - tokens >= SPARE:
                    asked[-1].append(story)
                    room -= tokens
        # The last question comes after all of the text, that of an earlier story before the next one.
        for (chain, place), questions in zip(told[:-1], asked[:-1], strict=True):
            questions.append(chain[place])
        chain, place = told[-1]
        pieces = self._scatter(rng, [chain[place].facts for chain, place in told], asked)
        final = [self._ask(chain[place])]
        pieces, room = self._with_decoys(rng, pieces, room, lambda: self._part_of_a_fact(rng))
        return self._assemble(rng, Draws(rng, task), task, length, [], pieces, final, room)

    def _tell(
        self, rng: random.Random, entries: list[Entry], room: int
    ) -> tuple[list[tuple[Chain, int]], int]:
        """Stories that fit into so many tokens together, one at least, as chains and places; what is left.

        Logarithms of their number are drawn evenly: one is as frequent as many.
        """
        told: list[tuple[Chain, int]] = []
        for _ in range(int((self.keys + 1) ** rng.random())):
            number = bisect_right(entries, room - SPARE, key=_tokens)
            if not number:
                break
            tokens, chain, place = entries[rng.randrange(number)]
            told.insert(0, (chain, place))
            room -= tokens
        return told, room

    def _scatter(
        self, rng: random.Random, told: list[tuple[str, ...]], asked: list[list[BabiStory]]
    ) -> list[Piece]:
        """The facts of all stories at depths drawn evenly, each question somewhere before the next fact."""
        depths = sorted(rng.random() for facts in told for _ in facts)
        ends = iter([*depths[1:], 1.0])
        starts = iter(depths)
        pieces: list[Piece] = []
        for facts, questions in zip(told, asked, strict=True):
            for number, fact in enumerate(facts, 1):
                start, end = next(starts), next(ends)
                pieces.append(Piece(start, self._fact(fact), worth=FACT))
                pieces += [
                    self._ask(story, rng.uniform(start, end))
                    for story in questions
                    if len(story.facts) == number
                ]
        return pieces

    def _ask(self, story: BabiStory, depth: float = 1.0) -> Piece:
        question, answer = self.encode("\n" + story.question), self.encode(f" {story.answer}.")
        return Piece(depth, [*question, *answer], len(question), len(question) + len(answer))

    def _fact(self, fact: str) -> list[int]:
        ids = self._facts.get(fact)
        if ids is None:
            ids = self._facts[fact] = self.encode(" " + fact)
        return ids

    def _part_of_a_fact(self, rng: random.Random) -> list[int]:
        """A fact without its first words or its last: nobody "went to the kitchen.", "Mary went to the"."""
        words = rng.choice(list(self._facts)).split()
        border = rng.randrange(1, len(words))
        return self.encode(" " + " ".join(words[border:] if rng.random() < 0.5 else words[:border]))

    def _first(self, ids: Any) -> list[int]:
        """Nothing stands before the text."""
        return super()._first(ids)[len(self._break) :]


def _tokens(entry: Entry) -> int:
    return entry[0]
