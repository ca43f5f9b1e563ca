"""A haystack as tokens: the sentences of many books, tokenized once, in one small file with its tokenizer.

The file (``.npz``) is all that training and testing on long texts need on another machine: no books.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from titans.data.bpe import wrap
from titans.data.tokenizer import TextEncoder
from titans.errors import UserError
from titans.files import replace_file

# Longer "sentences" are tables and lists; 1 in 5,000 of Project Gutenberg's.
LONGEST_SENTENCE = 1000
_BATCH = 10_000


@dataclass(frozen=True, eq=False)
class SentenceTokens:
    """Sentences in their order, each tokenized with the space before it.

    ids: uint16, all sentences on end. starts: int64 [n + 1], where each begins in ``ids``.
    counts: int64 [n], tokens of each under another tokenizer (see `make`), or empty.
    tokenizer_json: of a tokenizer of `titans.data.bpe`.
    """

    ids: npt.NDArray[np.uint16]
    starts: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    tokenizer_json: str

    def __len__(self) -> int:
        return len(self.starts) - 1

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        return wrap(self.tokenizer_json)

    def texts(self) -> list[str]:
        """The sentences, without the spaces before them."""
        backend = self.tokenizer.backend_tokenizer
        bounds = self.starts.tolist()
        rows = [self.ids[start:stop].tolist() for start, stop in pairwise(bounds)]
        return [text[1:] for text in backend.decode_batch(rows, skip_special_tokens=False)]

    def part(self, first: int, last: int) -> SentenceTokens:
        """Sentences ``first`` to ``last`` - 1."""
        start, stop = self.starts[first], self.starts[last]
        return replace(
            self,
            ids=self.ids[start:stop],
            starts=self.starts[first : last + 1] - start,
            counts=self.counts[first:last],
        )

    def pick(self, numbers: npt.NDArray[np.int64]) -> SentenceTokens:
        """The sentences of these numbers, in this order."""
        lengths = np.diff(self.starts)[numbers]
        starts = np.concatenate([[0], lengths.cumsum()])
        # Token i of what comes stands as far behind its sentence's start as it does here.
        places = np.arange(starts[-1]) + np.repeat(self.starts[numbers] - starts[:-1], lengths)
        counts = self.counts[numbers] if len(self.counts) else self.counts
        return replace(self, ids=self.ids[places], starts=starts, counts=counts)

    def at_least(self, tokens: int) -> SentenceTokens:
        """The same sentences again and again until there are so many tokens."""
        copies = -(-tokens // len(self.ids))
        if copies == 1:
            return self
        offsets = np.arange(copies)[:, None] * len(self.ids)
        starts = np.append((self.starts[:-1] + offsets).ravel(), copies * len(self.ids))
        return replace(
            self, ids=np.tile(self.ids, copies), starts=starts, counts=np.tile(self.counts, copies)
        )

    def save(self, path: str | Path) -> None:
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer,
            ids=self.ids,
            lengths=np.diff(self.starts).astype(np.uint16),
            counts=self.counts.astype(np.uint16),
            tokenizer=np.frombuffer(self.tokenizer_json.encode(), dtype=np.uint8),
        )
        replace_file(Path(path), buffer.getvalue())

    @classmethod
    def load(cls, path: str | Path) -> SentenceTokens:
        """Raises:
        UserError: there is no such file, or it is no haystack.
        """
        try:
            with np.load(path) as stored:
                lengths = stored["lengths"].astype(np.int64)
                return cls(
                    ids=stored["ids"],
                    starts=np.concatenate([[0], lengths.cumsum()]),
                    counts=stored["counts"].astype(np.int64),
                    tokenizer_json=stored["tokenizer"].tobytes().decode(),
                )
        except (OSError, KeyError, ValueError) as error:
            raise UserError(f"{path}: expected a haystack (titans haystack makes one): {error}") from error


def usable(sentences: Iterable[str], without: Collection[str] = ()) -> Iterator[str]:
    """Those that are not too long, and not in ``without`` (a set, where there are many)."""
    return (text for text in sentences if len(text) <= LONGEST_SENTENCE and text not in without)


def make(
    sentences: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: Callable[[str], int] | None = None,
) -> SentenceTokens:
    """Tokenize ``sentences`` (see ``titans.evaluation.haystack.split_sentences``), the usable ones.

    Args:
        tokenizer: of `titans.data.bpe`; its ids must fit in 16 bits.
        count: tokens of a text under another tokenizer, by which lengths are told; stored is
            ``count(". " + sentence)``.

    Raises:
        UserError: no sentence is left.
    """
    encode = TextEncoder(tokenizer)
    rows: list[npt.NDArray[Any]] = []
    counts: list[int] = []
    batch: list[str] = []

    def flush() -> None:
        rows.extend(ids.astype(np.uint16) for ids in encode([" " + sentence for sentence in batch]))
        if count is not None:
            counts.extend(count(". " + sentence) for sentence in batch)
        batch.clear()

    for sentence in usable(sentences):
        batch.append(sentence)
        if len(batch) == _BATCH:
            flush()
    flush()
    if not rows:
        raise UserError("sentences: expected at least one usable one, got none")
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    return SentenceTokens(
        ids=np.concatenate(rows),
        starts=np.concatenate([[0], lengths.cumsum()]),
        counts=np.array(counts, dtype=np.int64),
        tokenizer_json=tokenizer.backend_tokenizer.to_str(),
    )
