"""Sentences of a haystack that have something of a fact, but are none.

Few tokens of a book are digits, and what a memory writes of so few costs next to nothing in training; in two
million tokens they are many, and wash out what they resemble (docs/recall.md).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator

import numpy as np

from titans.data.sentences import SentenceTokens

RARE = 0.01  # of all sentences have such a word, at most


class Decoys:
    """Draws decoys from ``sentences``.

    Args:
        marks: ids of tokens; sentences with one of them are decoys.
        share: of the room for a haystack that decoys may take, at most; drawn evenly from 0 to this.
        mined: sentences that take turns with those (`titans.tasks.mining`).
    """

    def __init__(
        self,
        sentences: SentenceTokens,
        marks: Collection[int],
        share: float,
        mined: SentenceTokens | None = None,
    ) -> None:
        self.sentences, self.share, self.mined = sentences, share, mined
        marked = np.isin(sentences.ids, list(marks))
        self._found = np.unique(np.searchsorted(sentences.starts, np.flatnonzero(marked), "right") - 1)

    def draw(
        self, rng: random.Random, room: int, value: Callable[[], list[int]] | None = None
    ) -> Iterator[list[int]]:
        """Sentences as tokens, each with the space before it.

        value: makes the tokens of something that could be an answer; every other decoy is then a sentence
            drawn from all with this between two of its tokens.
        """
        left = int(self.share * rng.random() * room)
        own = len(self._found) > 0 or self.mined is not None
        while value is not None or own:
            if value is not None and (not own or rng.random() < 0.5):
                ids = _sentence(self.sentences, rng.randrange(len(self.sentences)))
                place = rng.randrange(len(ids)) + 1
                ids[place:place] = value()
            elif self.mined is not None and (not len(self._found) or rng.random() < 0.5):
                ids = _sentence(self.mined, rng.randrange(len(self.mined)))
            else:
                ids = _sentence(self.sentences, int(self._found[rng.randrange(len(self._found))]))
            left -= len(ids)
            if left < 0:
                return
            yield ids


def _sentence(sentences: SentenceTokens, number: int) -> list[int]:
    ids: list[int] = sentences.ids[sentences.starts[number] : sentences.starts[number + 1]].tolist()
    return ids


def digits(sentences: SentenceTokens) -> list[int]:
    """The ids of the ten digits."""
    return [sentences.tokenizer.convert_tokens_to_ids(digit) for digit in "0123456789"]


def rare(sentences: SentenceTokens, ids: Collection[int]) -> list[int]:
    """Those of ``ids`` that are rare in the haystack: names and things, not "the" and "to"."""
    counts = np.bincount(sentences.ids, minlength=max(ids) + 1)
    return [token for token in ids if counts[token] < RARE * len(sentences)]
