"""BABILong as training rows: exactly so many tokens, a story's facts among sentences, its questions answered.

The order is that of `titans.evaluation.babilong`: facts in theirs, between sentences of the haystack, the
question after all of it. bAbI asks a question after every few facts: a row may ask earlier ones of the same
story, too, within the haystack, before the next fact comes. Test samples keep the published form.
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
from titans.tasks.needles import SPARE, Ids, NeedleRows, Piece

BABILONG: dict[str, BabiTask] = {f"babilong_{name}": task for name, task in TASKS.items()}

# Stories that go on from one another: the facts of each begin with those of the one before.
Chain = list[BabiStory]


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
        questions: asked in a row at most: the last one of a story after the text, others before it.
    """

    def __init__(
        self, sentences: SentenceTokens, stories: Mapping[str, Sequence[Chain]], *, questions: int
    ) -> None:
        super().__init__(sentences, [], keys=1, questions=questions, dense=0.0, middle=0.0)
        self._facts: dict[str, list[int]] = {}  # some hundred make all stories of a task
        # Tokens of a story with its question, its chain, its place there; the shortest first.
        self._stories = {
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
        self._shortest = {task: entries[0][0] + SPARE for task, entries in self._stories.items()}

    def row(self, rng: random.Random, length: int) -> tuple[Ids, Ids]:
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
        tokens, chain, place = self._stories[task][rng.randrange(fitting[task])]
        room = length - tokens
        asked: list[BabiStory] = []
        for story in rng.sample(chain[:place], min(rng.randrange(self.questions), place)):
            tokens = len(self._ask(story).ids)
            if room - tokens >= SPARE:
                asked.append(story)
                room -= tokens
        depths = sorted(rng.random() for _ in chain[place].facts)
        pieces: list[Piece] = []
        for number, (depth, fact) in enumerate(zip(depths, chain[place].facts, strict=True), 1):
            pieces.append(Piece(depth, self._fact(fact)))
            following = depths[number] if number < len(depths) else 1.0
            pieces += [
                self._ask(story, rng.uniform(depth, following))
                for story in asked
                if len(story.facts) == number
            ]
        final = [self._ask(chain[place])]
        return self._assemble(rng, Draws(rng, task), task, length, [], pieces, final, room)

    def _ask(self, story: BabiStory, depth: float = 1.0) -> Piece:
        question, answer = self.encode("\n" + story.question), self.encode(f" {story.answer}.")
        return Piece(depth, [*question, *answer], len(question), len(question) + len(answer))

    def _fact(self, fact: str) -> list[int]:
        ids = self._facts.get(fact)
        if ids is None:
            ids = self._facts[fact] = self.encode(" " + fact)
        return ids

    def _first(self, ids: Any) -> list[int]:
        """Nothing stands before the text."""
        return super()._first(ids)[len(self._break) :]


def _tokens(entry: tuple[int, Chain, int]) -> int:
    return entry[0]
