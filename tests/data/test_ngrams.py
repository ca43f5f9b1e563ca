"""The n-gram baselines against counting by hand, token by token."""

import json
import math
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import titans.data.ngrams
from titans.data.ngrams import ngram_losses
from titans.data.prepare import prepare
from titans.data.shards import ShardWriter, TokenShards


def documents_of(shards: TokenShards) -> list[list[int]]:
    ends = [*shards.starts[1:], len(shards)]
    return [
        shards.read(int(start), int(end)).tolist() for start, end in zip(shards.starts, ends, strict=True)
    ]


def counted_by_hand(train: TokenShards, validation: TokenShards) -> tuple[float, float]:
    pairs = Counter(pair for d in documents_of(train) for pair in pairwise(d))
    after, before = Counter[int](), Counter[int]()
    for (a, b), n in pairs.items():
        after[b] += n
        before[a] += n
    total = sum(after.values())
    unigram_loss = bigram_loss = 0.0
    scored = 0
    for document in documents_of(validation):
        for a, b in pairwise(document):
            unigram = (after[b] + 1) / (total + train.vocab_size)
            distinct = sum(first == a for first, _ in pairs)
            bigram = (pairs[a, b] + distinct * unigram) / (before[a] + distinct) if before[a] else unigram
            unigram_loss -= math.log(unigram)
            bigram_loss -= math.log(bigram)
            scored += 1
    return unigram_loss / scored, bigram_loss / scored


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [json.dumps({"text": f"the {i * i} cats sat on mat {i} {chr(200 + i)}"}) for i in range(30)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    prepare([tmp_path / "a.jsonl"], tmp_path / "out", validation_documents=6, shard_size=97)
    return tmp_path / "out"


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("block", [1 << 22, 13])
def test_losses_are_those_counted_by_hand(
    folder: Path, dense: bool, block: int, monkeypatch: pytest.MonkeyPatch
):
    """Dense or sparse counts, and pairs over the edges of blocks, give the same numbers."""
    if not dense:
        monkeypatch.setattr(titans.data.ngrams, "_DENSE_VOCABULARY", 0)
    blocks = TokenShards.blocks
    monkeypatch.setattr(TokenShards, "blocks", lambda self: blocks(self, block))
    train, validation = TokenShards(folder), TokenShards(folder, "val")
    losses = ngram_losses(train, validation)
    assert losses == pytest.approx(counted_by_hand(train, validation), rel=1e-12)
    assert losses.bigram < losses.unigram < math.log(259)


def test_a_large_vocabulary_is_counted_sparsely(folder: Path, tmp_path: Path):
    """A dense table of 100,000^2 pairs would need 80 GB."""
    description = json.loads((folder / "meta.json").read_text())
    description["vocab_size"] = 100_000
    (folder / "meta.json").write_text(json.dumps(description))
    train, validation = TokenShards(folder), TokenShards(folder, "val")
    assert ngram_losses(train, validation) == pytest.approx(counted_by_hand(train, validation), rel=1e-12)


def test_splits_that_do_not_fit_or_cannot_be_scored(folder: Path, tmp_path: Path):
    other = tmp_path / "other"
    other.mkdir()
    for name in ("train", "val"):
        writer = ShardWriter(other, name, "uint16", 10)
        writer.write(np.array([5, 6, 7]), np.array([0, 1, 2]))
        split = writer.close()
    meta = TokenShards(folder).meta
    type(meta)(**{**meta.__dict__, "splits": {"train": split, "val": split}}).write(other)
    with pytest.raises(ValueError, match="no document of 'val' has two tokens"):
        ngram_losses(TokenShards(folder), TokenShards(other, "val"))
    type(meta)(**{**meta.__dict__, "splits": {"val": split}, "vocab_size": 9}).write(other)
    with pytest.raises(ValueError, match="expected a vocabulary of 259 as in train, got 9"):
        ngram_losses(TokenShards(folder), TokenShards(other, "val"))
