"""Memory files: the complete state of one stream as safetensors, written whole or not at all.

The format is described in docs/memory_files.md. No pickle: reading a file runs nothing that it holds.
"""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from titans.errors import UserError
from titans.files import replace_file

FORMAT = "titans-memory"
VERSION = 1
_NO_CHECKSUM = "0" * 64


@dataclass(frozen=True, kw_only=True)
class Source:
    """A text that was read: its name, its length and its SHA-256, both of the text in UTF-8."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Where an unfinished `titans memorize` stands, exactly.

    names: the sources as they were given; options: how they are read.
    sources: what was read of them, the last one up to the start of the unit of text in progress.
    skip: tokens of that unit that were read.
    piece: tokens per forward pass: with the same, the rest gives the bits of an uninterrupted run.
    origin: checksum of the memory file that the reading continues; None for a new memory.
    """

    names: tuple[str, ...]
    options: dict[str, Any]
    sources: tuple[Source, ...]
    skip: int
    piece: int
    origin: str | None


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a memory file says about itself. `model_path` is a hint where the model may be found."""

    model: str
    model_path: str
    tokenizer: str
    variant: str
    dtype: str
    tokens_read: int
    sources: tuple[Source, ...]
    reading: Reading | None = None


@dataclass(frozen=True)
class MemoryFile:
    """A memory file's contents, and the checksum that stands for them."""

    header: Header
    tensors: dict[str, Tensor]
    checksum: str


def write_memory(path: Path, header: Header, tensors: Mapping[str, Tensor]) -> int:
    """Write a memory file and return its size in bytes; hold `locked(path)` meanwhile.

    At any moment `path` is the old file or the new one, and the new one has reached the disk when this
    returns.

    Raises:
        UserError: a tensor holds values that are not finite, or the disk does not take the file.
    """
    _check_finite(path, tensors, "nothing was written")
    contents = {  # clones, because a file cannot hold one tensor under two names
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in sorted(tensors.items())
    }
    # One entry: safetensors writes several in any order, and the same contents shall give the same bytes.
    described = json.dumps({"version": VERSION, "checksum": _NO_CHECKSUM, **asdict(header)})
    data = bytearray(safetensors.torch.save(contents, metadata={FORMAT: described}))
    place = _checksum_place(data, _NO_CHECKSUM)
    data[place] = hashlib.sha256(data).hexdigest().encode()
    try:
        replace_file(path, data)
    except OSError as error:
        kept = "the file that was there before is as it was" if path.exists() else "no file was made"
        raise UserError(f"{path}: cannot be written: {error.strerror or error}; {kept}") from error
    return len(data)


def read_memory(path: Path) -> MemoryFile:
    """Read a memory file and check everything that needs no model.

    Raises:
        UserError: there is no such file, or it is something else, of another format version, cut short,
            damaged, or holds values that are not finite.
    """
    if path.is_dir():
        raise UserError(f"{path}: expected a memory file, got a folder")
    if not path.exists():
        raise UserError(f"{path}: no such file")
    data = bytearray(path.read_bytes())
    entry = _metadata(path, data).get(FORMAT)
    if entry is None:
        raise UserError(f"{path}: not a memory file (a safetensors file of another kind)")
    try:
        described = json.loads(entry)
        version, checksum = described.pop("version"), described.pop("checksum")
        if version != VERSION:
            raise UserError(f"{path}: format version {version}, but this version of titans reads {VERSION}")
        place = _checksum_place(data, checksum)
        data[place] = _NO_CHECKSUM.encode()
        if len(checksum) != len(_NO_CHECKSUM) or hashlib.sha256(data).hexdigest() != checksum:
            raise UserError(f"{path}: damaged: its contents do not give the checksum that it names")
        header = _header(described)
        tensors = safetensors.torch.load(bytes(data))
    except UserError:
        raise
    except (AttributeError, LookupError, SafetensorError, TypeError, ValueError) as error:
        raise UserError(f"{path}: damaged: {error}") from error
    _check_finite(path, tensors, "it cannot be used")
    # A loaded tensor may lie anywhere in the file; products may round by alignment, and these are to
    # continue as if they had never been saved.
    return MemoryFile(header, {name: tensor.clone() for name, tensor in tensors.items()}, checksum)


def is_memory_file(path: Path) -> bool:
    """Whether the file at `path` is one, whole or damaged."""
    with path.open("rb") as file:
        return f'"{FORMAT}"'.encode() in file.read(200)  # safetensors puts the metadata first


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Be the only writer of the memory file `path`, among processes and within this one.

    The kernel holds the lock, on a hidden file beside `path`, and lets go of it when the process ends,
    however it ends: no lock is ever stale.

    Raises:
        UserError: someone else is writing `path`, or its folder cannot be written.
    """
    lock = path.with_name(f".{path.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _take(lock)
    except BlockingIOError:
        raise UserError(f"{path}: another process is writing it") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)  # while it is ours
        os.close(descriptor)


def _take(lock: Path) -> int:
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held it may have removed it between our two calls: others would then lock a newer file.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(lock)):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _metadata(path: Path, data: bytearray) -> dict[str, str]:
    """The header's `__metadata__`; raises for what is no safetensors file or is cut short."""
    if not data:
        raise UserError(f"{path}: not a memory file: it is empty")
    try:
        length = int.from_bytes(data[:8], "little")
        if len(data) < 8 or length > len(data) - 8:
            # A safetensors file that was cut inside its header still begins like one.
            cut = data[8:9] == b"{" and length < 1 << 30
            raise UserError(f"{path}: {'cut short' if cut else 'not a memory file'}")
        contents = json.loads(data[8 : 8 + length])
        described = contents.pop("__metadata__", {})
        end = 8 + length + max((tensor["data_offsets"][1] for tensor in contents.values()), default=0)
    except UserError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError):
        raise UserError(f"{path}: not a memory file, or its header is damaged") from None
    if end > len(data):
        raise UserError(f"{path}: cut short: {len(data)} bytes, expected {end}")
    return described if isinstance(described, dict) else {}


def _checksum_place(data: bytearray, checksum: str) -> slice:
    """Where the checksum stands in the file's bytes: it is taken with zeros there, and covers all others."""
    key = json.dumps(f'"checksum": "{checksum}"')[1:-1].encode()  # JSON within JSON
    start = data.find(key, 8, 8 + int.from_bytes(data[:8], "little"))
    if start < 0:
        raise ValueError("the checksum is not where it should be")
    end = start + len(key) - len('\\"')
    return slice(end - len(checksum), end)


def _header(fields: dict[str, Any]) -> Header:
    sources = tuple(Source(**source) for source in fields.pop("sources"))
    reading = fields.pop("reading")
    if reading is not None:
        reading["sources"] = tuple(Source(**source) for source in reading["sources"])
        reading["names"] = tuple(reading["names"])
        reading = Reading(**reading)
    return Header(**fields, sources=sources, reading=reading)


def _check_finite(path: Path, tensors: Mapping[str, Tensor], consequence: str) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UserError(
                f"{path}: {name} holds values that are not finite (NaN or infinity): {consequence}"
            )
