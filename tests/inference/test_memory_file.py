"""The file format: every bit of the state comes back, and whatever is wrong with a file is said."""

import json
import struct

import pytest
import safetensors.torch
import torch

from titans.errors import UserError
from titans.inference.memory_file import Header, Reading, Source, locked, read_memory, write_memory

HEADER = Header(
    model="m" * 64,
    model_path="runs/mac",
    tokenizer="t" * 64,
    variant="mac",
    dtype="float32",
    tokens_read=7,
    sources=(Source(name='a "quoted" námé\n', bytes=3, sha256="0" * 64),),
    reading=Reading(names=("a", "-"), options={"format": "auto"}, sources=(), skip=2, piece=16, origin=None),
)


def tensors():
    return {
        "0.memory.weights.0": torch.randn(1, 2, 3, 4),
        "0.frozen.0": torch.randn(3, 2).t(),  # not contiguous
        "0.tail": torch.randn(2, 3).bfloat16(),
        "0.position": torch.tensor([3], dtype=torch.int32),
        "0.counts": torch.tensor(5),
        "0.nothing": torch.empty(1, 0, 4),
        "logits": torch.randn(9, dtype=torch.float64),
    }


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "x.memory"
    write_memory(file, HEADER, tensors())
    return file


def test_what_is_written_is_read(tmp_path):
    written = tensors()
    written["0.same"] = written["0.frozen.0"]  # MAC keeps the same weights twice
    size = write_memory(tmp_path / "x", HEADER, written)
    read = read_memory(tmp_path / "x")
    assert size == (tmp_path / "x").stat().st_size
    assert read.header == HEADER
    assert read.tensors.keys() == written.keys()
    for name, tensor in written.items():
        assert read.tensors[name].dtype == tensor.dtype
        assert torch.equal(read.tensors[name], tensor)
        assert read.tensors[name].is_contiguous()
    assert [file.name for file in tmp_path.iterdir()] == ["x"]


def test_it_is_an_ordinary_safetensors_file(path):
    """Other tools can look into it; nothing in it can run."""
    loaded = safetensors.torch.load_file(path)
    assert set(loaded) == set(tensors())
    with safetensors.safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["titans-memory"])["tokens_read"] == 7


def test_the_same_contents_give_the_same_bytes(tmp_path):
    contents = tensors()
    write_memory(tmp_path / "a", HEADER, contents)
    write_memory(tmp_path / "b", HEADER, dict(reversed(contents.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_flipped_bit_is_found_wherever_it_is(path):
    """In the header's length, the header, the tensors: one bit of every third byte."""
    data = path.read_bytes()
    for place in range(0, len(data), 3):
        flipped = bytearray(data)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        with pytest.raises(UserError, match=r"x\.memory: "):
            read_memory(path)


def test_a_truncated_file_is_found_whatever_its_length(path):
    data = path.read_bytes()
    header_end = 8 + struct.unpack("<Q", data[:8])[0]
    for length in {*range(12), *range(12, len(data), 5), len(data) - 1}:
        path.write_bytes(data[:length])
        with pytest.raises(UserError, match=r"x\.memory: ") as caught:
            read_memory(path)
        if length >= 9:
            assert "cut short" in str(caught.value)
        if length >= header_end:
            assert f"{length} bytes, expected {len(data)}" in str(caught.value)
    path.write_bytes(data + b"\0")
    with pytest.raises(UserError, match="damaged"):
        read_memory(path)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"", "not a memory file: it is empty"),
        (b"text of some length", "not a memory file"),
        (bytes(100), "not a memory file"),
        (b"PK\x03\x04" + bytes(300), "not a memory file"),
        ((5).to_bytes(8, "little") + b"[[[[[" + bytes(9), "not a memory file"),
        ((2).to_bytes(8, "little") + b"{}", "another kind"),
        ((100000).to_bytes(8, "little") + b"[" * 100000, "not a memory file"),
        (
            safetensors.torch.save({"a": torch.zeros(2)}),
            "not a memory file .a safetensors file of another kind",
        ),
    ],
)
def test_other_files_are_refused(tmp_path, contents, message):
    path = tmp_path / "x.memory"
    path.write_bytes(contents)
    with pytest.raises(UserError, match=message):
        read_memory(path)


def test_places_without_a_file_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"absent: no such file"):
        read_memory(tmp_path / "absent")
    with pytest.raises(UserError, match="expected a memory file, got a folder"):
        read_memory(tmp_path)


def test_another_format_version_is_named(path):
    data = path.read_bytes()
    path.write_bytes(data.replace(rb"\"version\": 1", rb"\"version\": 2"))
    with pytest.raises(UserError, match="format version 2, but this version of titans reads 1"):
        read_memory(path)


def test_values_that_are_not_finite_are_neither_written_nor_read(tmp_path, path, monkeypatch):
    before = path.read_bytes()
    for value in (float("nan"), float("inf")):
        broken = tensors()
        broken["logits"][3] = value
        with pytest.raises(UserError, match=r"logits holds .* not finite .*: nothing was written"):
            write_memory(path, HEADER, broken)
        assert path.read_bytes() == before
        with monkeypatch.context() as patch:
            patch.setattr("titans.inference.memory_file._check_finite", lambda *_: None)
            write_memory(tmp_path / "broken", HEADER, broken)
        with pytest.raises(UserError, match="broken: logits holds values that are not finite"):
            read_memory(tmp_path / "broken")


def test_one_writer_at_a_time(tmp_path):
    path = tmp_path / "new" / "x.memory"
    with locked(path):
        with pytest.raises(UserError, match="another process is writing it"), locked(path):
            raise AssertionError("two writers")
        with locked(path.with_name("y.memory")):  # another file is another matter
            pass
    with locked(path):  # free again, and nothing is left behind
        pass
    assert not list(path.parent.iterdir())
