"""Packed batches: windows tile the stream, and no label or attention crosses a document's edge."""

import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from titans.data.dataset import IGNORED, PackedCollator, PackedDataset, Window
from titans.data.prepare import prepare
from titans.data.shards import TokenShards
from titans.errors import UserError


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> TokenShards:
    """Documents of 1 to 40 bytes, in shards that cut documents and windows alike."""
    folder = tmp_path_factory.mktemp("dataset")
    rows = [json.dumps({"text": chr(97 + i % 26) * (1 + 13 * i % 40)}) for i in range(60)]
    (folder / "a.jsonl").write_text("\n".join(rows))
    prepare([folder / "a.jsonl"], folder / "shards", validation_fraction=0, shard_size=101)
    return TokenShards(folder / "shards")


def window(*documents: list[int], continues: bool = False) -> Window:
    """A window made of whole documents; the first may go on from the window before."""
    tokens = torch.tensor([token for document in documents for token in document])
    starts = torch.tensor([0, *(len(document) for document in documents)]).cumsum(0)[1:-1]
    return Window(tokens, starts)


@pytest.mark.parametrize("length", [2, 16, 37, 100, 500])
def test_windows_tile_the_stream(shards: TokenShards, length: int):
    dataset = PackedDataset(shards, length)
    stream = torch.from_numpy(shards.read(0, len(shards)))
    assert len(dataset) == len(shards) // length
    tiles = [dataset[i] for i in range(len(dataset))]
    assert torch.equal(torch.cat([tile.input_ids for tile in tiles]), stream[: len(dataset) * length])
    for tile in tiles:
        starts = torch.nonzero(tile.input_ids[1:] == 256).flatten() + 1
        assert tile.boundaries.tolist() == starts.tolist()
        assert tile.input_ids.dtype == tile.boundaries.dtype == torch.int64


def test_a_window_depends_on_its_index_alone(shards: TokenShards):
    """Exact resumption rests on this: no order of access, no global seed, no worker changes it."""
    dataset, again = PackedDataset(shards, 50, seed=1), PackedDataset(shards, 50, seed=1)
    backwards = [dataset[i] for i in reversed(range(len(dataset)))][::-1]
    torch.manual_seed(123)
    for i in range(len(again)):
        assert torch.equal(again[i].input_ids, backwards[i].input_ids)
        assert torch.equal(again[i].boundaries, backwards[i].boundaries)
    with pytest.raises(IndexError, match=f"window {len(dataset)} of {len(dataset)}"):
        dataset[len(dataset)]
    assert len(list(dataset)) == len(dataset)


def test_the_seed_shifts_the_windows(shards: TokenShards):
    firsts = {PackedDataset(shards, 50, seed=seed).first for seed in range(20)}
    assert len(firsts) > 5
    assert firsts <= set(range(50))
    for seed in range(5):
        whole = PackedDataset(shards, len(shards), seed=seed)
        assert (whole.first, len(whole)) == (0, 1)


def test_lengths_that_cannot_work(shards: TokenShards):
    with pytest.raises(UserError, match="sequence_length: expected at least 2, got 1"):
        PackedDataset(shards, 1)
    message = rf"sequence_length: 999999 is more than the {len(shards)} tokens of the split 'train'"
    with pytest.raises(UserError, match=message):
        PackedDataset(shards, 999_999)


def test_windows_without_boundaries_make_a_dense_batch():
    batch = PackedCollator()([window([1, 2, 3]), window([4, 5, 6])])
    assert batch.keys() == {"input_ids", "labels"}
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert batch["labels"].tolist() == [[IGNORED, 2, 3], [IGNORED, 5, 6]]


def test_boundaries_make_one_packed_row():
    batch = PackedCollator()([window([1, 2], [3], [4, 5]), window([6, 7, 8, 9, 10])])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]]
    assert batch["labels"].tolist() == [[IGNORED, 2, IGNORED, IGNORED, 5, IGNORED, 7, 8, 9, 10]]
    assert batch["cu_seqlens"].tolist() == [0, 2, 3, 5, 10]
    assert batch["cu_seqlens"].dtype == torch.int32
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64


def test_windows_of_unequal_length_are_packed():
    batch = PackedCollator()([window([1, 2, 3]), window([4, 5])])
    assert batch["cu_seqlens"].tolist() == [0, 3, 5]
    assert batch["labels"].tolist() == [[IGNORED, 2, 3, IGNORED, 5]]


@settings(max_examples=40)
@given(
    windows=st.lists(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=5), min_size=1), min_size=1)
)
def test_nothing_crosses_a_fragments_edge(windows: list[list[list[int]]]):
    """The fragments that the model is told of are exactly the documents' runs inside the windows."""
    batch = PackedCollator()([window(*documents) for documents in windows])
    fragments = [document for documents in windows for document in documents]
    if "cu_seqlens" in batch:
        bounds = batch["cu_seqlens"].tolist()
        ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
        edges = list(itertools.pairwise(bounds))
        assert [ids[start:end] for start, end in edges] == fragments
        assert [labels[start:end] for start, end in edges] == [[IGNORED, *part[1:]] for part in fragments]
    else:
        assert batch["input_ids"].tolist() == fragments
        assert batch["labels"].tolist() == [[IGNORED, *part[1:]] for part in fragments]


def test_a_data_loader_gives_the_same_batches_with_workers(shards: TokenShards):
    dataset = PackedDataset(shards, 64)
    loaders = [
        DataLoader(dataset, batch_size=2, collate_fn=PackedCollator(), num_workers=workers)
        for workers in (0, 1)
    ]
    for here, there in zip(*loaders, strict=True):
        assert here.keys() == there.keys()
        assert all(torch.equal(here[key], there[key]) for key in here)
