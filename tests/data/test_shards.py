"""Shards: a damaged or foreign folder is named before training starts."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from titans.data.prepare import prepare
from titans.data.shards import TokenShards
from titans.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(20)))
    prepare([tmp_path / "a.jsonl"], tmp_path / "shards", validation_documents=2, shard_size=60)
    return tmp_path / "shards"


def edit_meta(folder: Path, **changes: object) -> None:
    path = folder / "meta.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: cut(f / "train-00001.bin", 30), r"train-00001\.bin: 30 bytes, meta\.json says 120"),
        (lambda f: cut(f / "train-00000.idx", 8), r"train-00000\.idx: 8 bytes, meta\.json says \d\d"),
        (
            lambda f: (f / "train-00000.bin").unlink(),
            r"train-00000\.bin: missing, though meta\.json lists it",
        ),
        (lambda f: cut(f / "meta.json", 100), r"meta\.json: damaged: "),
        (lambda f: (f / "meta.json").write_text("[]"), r"meta\.json: damaged: "),
        (lambda f: edit_meta(f, splits={"train": {}}), r"meta\.json: damaged: 'tokens'"),
        (lambda f: edit_meta(f, surprise=1), r"meta\.json: damaged: .*surprise"),
        (
            lambda f: (f / "meta.json").unlink(),
            r"shards: no meta\.json: not a folder that `titans prepare` made",
        ),
        (lambda f: edit_meta(f, format="other"), r"not a description of token shards"),
        (lambda f: edit_meta(f, version=2), r"format version 2, this titans reads version 1"),
        (lambda f: edit_meta(f, dtype="int7"), r"dtype 'int7', expected one of \['uint16', 'uint32'\]"),
        (lambda f: f.rename(f.with_name("moved")), r"shards: no such folder \(make it with: titans prepare"),
    ],
)
def test_damage_is_named(folder: Path, damage: Callable[[Path], object], message: str):
    assert len(TokenShards(folder)) > 60
    damage(folder)
    with pytest.raises(UserError, match=message):
        TokenShards(folder)


def test_changed_contents_are_found_by_verify(folder: Path):
    shards = TokenShards(folder)
    shards.verify()
    path = folder / "train-00001.bin"
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        UserError, match=r"train-00001\.bin: damaged: sha256 is [0-9a-f]{64}, meta\.json says"
    ):
        TokenShards(folder).verify()


def test_an_unknown_split_proposes_the_nearest(folder: Path):
    with pytest.raises(UserError, match="unknown split 'vall': did you mean 'val'"):
        TokenShards(folder, "vall")


def test_reading_outside_the_stream_is_refused(folder: Path):
    shards = TokenShards(folder)
    for start, stop in ((-1, 2), (3, 2), (0, len(shards) + 1)):
        with pytest.raises(ValueError, match=f"got start={start}, stop={stop}"):
            shards.read(start, stop)
    assert shards.read(5, 5).shape == (0,)


def test_starts_and_blocks_agree_with_the_stream(folder: Path):
    shards = TokenShards(folder)
    stream = np.concatenate([block for _, block in shards.blocks(17)])
    assert stream.tolist() == shards.read(0, len(shards)).tolist()
    assert np.flatnonzero(stream == 256).tolist() == shards.starts.tolist()
    first, second, third = shards.starts[:3]
    assert shards.starts_between(first + 1, third).tolist() == [second]
    assert shards.starts_between(second, third + 1).tolist() == [second, third]


def test_a_worker_gets_the_name_not_the_tokens(folder: Path):
    """Pickled by value, a data loader's worker would copy the whole corpus into its memory."""
    shards = TokenShards(folder, "val")
    data = pickle.dumps(shards)
    assert len(data) < 1000
    again = pickle.loads(data)
    assert again.read(0, len(again)).tolist() == shards.read(0, len(shards)).tolist()
