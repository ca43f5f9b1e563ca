"""Facts at several depths of prompts of several lengths: as many answers as some time allows."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from titans.tasks.long_text import Hidden, LongText
from titans.tasks.search import Answer, Reader


class Place(NamedTuple):
    """Of a fact: the tokens of its prompt, at least, and the share of the text before it."""

    length: int
    depth: float


Plan = dict[Place, Hidden]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A fact's place, and what each model by its name answered (None: not measured)."""

    length: int
    depth: float
    answers: dict[str, Answer | None]


class Counter(Protocol):
    """Something that is told the tokens just read."""

    def add(self, tokens: int) -> None: ...


def plan(text: LongText, lengths: Sequence[int], depths: Sequence[float], seed: int) -> Plan:
    """A fact for each length and depth: the shortest first, and of each length the cheapest."""
    return {
        Place(length, depth): text.hide(random.Random(f"cell/{seed}/{length}/{depth}"), length, depth)
        for length in sorted(set(lengths))
        for depth in sorted(set(depths), reverse=True)
    }


def survey(
    plan: Plan,
    readers: Mapping[str, Reader],
    rates: Mapping[str, float],
    known: Mapping[Place, Mapping[str, Answer]],
    *,
    seconds: float,
    bar: Callable[[str, int], AbstractContextManager[Counter]],
) -> list[Cell]:
    """The answers, length by length, all models at one before the next, by depth and length in the end.

    Args:
        readers, rates: by the models' names, the rates in tokens/s.
        known: answers that need not be asked for.
        seconds: after which nothing more is begun, nor what would end after it.
        bar: of a title and the tokens to read.
    """
    answers: dict[Place, dict[str, Answer | None]] = {place: {} for place in plan}
    started = time.monotonic()
    for length in sorted({place.length for place in plan}):
        for name, reader in readers.items():
            for place, hidden in plan.items():
                if place.length != length:
                    continue
                answer = known.get(place, {}).get(name)
                cost = reader.cost(hidden)
                if answer is None and cost / rates[name] <= seconds - (time.monotonic() - started):
                    with bar(f"{name}, {length:,} tokens, {place.depth:.0%}", cost) as counter:
                        answer = reader.answer(hidden, counter.add)
                answers[place][name] = answer
    return [Cell(**place._asdict(), answers=answers[place]) for place in sorted(plan)]
