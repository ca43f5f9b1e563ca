"""Unigram and bigram models: what a language model must beat to have learnt more than letter statistics."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from titans.data.shards import TokenShards

# Up to here all pairs are counted in a dense table (2,048^2 int64 = 32 MB), beyond as sorted codes.
_DENSE_VOCABULARY = 2048

Int64Array = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.floating[Any]]


class NgramLosses(NamedTuple):
    """Cross-entropies in nats per token."""

    unigram: float
    bigram: float


def ngram_losses(train: TokenShards, validation: TokenShards) -> NgramLosses:
    """Losses on ``validation`` of a unigram and a bigram model that are counted on ``train``.

    Both score the same tokens: all but the first of each document, as a language model does that sees whole
    documents. The unigram is smoothed by adding one; the bigram is interpolated with it after Witten and Bell
    (1991), ``p(b | a) = (n(a, b) + d(a) p(b)) / (n(a) + d(a))`` with d(a) the number of distinct successors.

    Raises:
        ValueError: the splits have different vocabularies, or no document of ``validation`` has two tokens.
    """
    size = train.vocab_size
    if validation.vocab_size != size:
        raise ValueError(
            f"validation: expected a vocabulary of {size} as in train, got {validation.vocab_size}"
        )
    codes, counts = _pair_counts(train, size)
    held_codes, held_counts = _pair_counts(validation, size)
    if not len(held_codes):
        raise ValueError(f"{validation.folder}: no document of {validation.split!r} has two tokens")

    unigram = (np.bincount(codes % size, weights=counts, minlength=size) + 1.0) / (counts.sum() + size)
    seen = np.bincount(codes // size, weights=counts, minlength=size)
    distinct = np.bincount(codes // size, minlength=size)

    before, after = held_codes // size, held_codes % size
    pair = np.zeros(len(held_codes))
    if len(codes):
        at = np.minimum(np.searchsorted(codes, held_codes), len(codes) - 1)
        pair = np.where(codes[at] == held_codes, counts[at], 0)
    known = seen[before] > 0  # after a token that train never saw, the unigram is all there is
    total = np.where(known, seen[before] + distinct[before], 1)
    interpolated = (pair + distinct[before] * unigram[after]) / total
    bigram = np.where(known, interpolated, unigram[after])
    return NgramLosses(_mean_loss(unigram[after], held_counts), _mean_loss(bigram, held_counts))


def _mean_loss(probabilities: FloatArray, counts: Int64Array) -> float:
    return float(-(np.log(probabilities) * counts).sum() / counts.sum())


def _pair_counts(shards: TokenShards, size: int) -> tuple[Int64Array, Int64Array]:
    """Codes ``a * size + b`` of the neighbours (a, b) within documents, ascending, and their counts."""
    dense = np.zeros(size * size, dtype=np.int64) if size <= _DENSE_VOCABULARY else None
    codes, counts = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    last = np.empty(0, dtype=np.int64)  # the token before the block, whose pair would be lost otherwise
    for position, block in shards.blocks():
        tokens = np.concatenate([last, block])
        first = position - len(last)
        follows = np.ones(len(tokens) - 1, dtype=np.bool_)  # token i + 1 belongs to the document of token i
        follows[shards.starts_between(first + 1, first + len(tokens)) - first - 1] = False
        pairs = (tokens[:-1] * size + tokens[1:])[follows]
        last = tokens[-1:]
        if dense is not None:
            dense += np.bincount(pairs, minlength=size * size)
            continue
        new_codes, new_counts = np.unique(pairs, return_counts=True)
        merged, place = np.unique(np.concatenate([codes, new_codes]), return_inverse=True)
        counts = np.bincount(
            place, weights=np.concatenate([counts, new_counts]), minlength=len(merged)
        ).astype(np.int64)
        codes = merged
    if dense is not None:
        codes = np.flatnonzero(dense)
        counts = dense[codes]
    return codes, counts
