"""Token shards: the format on disk, its writer and its reader.

A prepared folder holds ``meta.json``, the tokenizer's files and, per split, shards in order::

    train-00000.bin   token ids, little-endian uint16 (vocabularies up to 65,536) or uint32
    train-00000.idx   int64 offsets, in tokens within this shard, of the documents that start in it

A split is one stream of tokens: a document that does not fit into a shard goes on in the next one.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from titans.errors import UserError, unknown_name

FORMAT = "titans-token-shards"
VERSION = 1
META = "meta.json"
SPLITS = ("train", "val")
DEFAULT_SHARD_SIZE = 1 << 27
_DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}

IntArray = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Shard:
    """One shard's files: their common stem, sizes and checksums."""

    name: str
    tokens: int
    documents: int
    sha256: str
    index_sha256: str


@dataclass(frozen=True)
class Split:
    """One split's totals and shards. ``documents`` counts the documents that start in it."""

    tokens: int
    documents: int
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Meta:
    """What ``meta.json`` says.

    ``boundary`` tells how documents are marked in the stream: ``bos`` before each, ``eos`` after each, or
    ``none``; ``boundary_id`` is that token. ``tokenizer`` describes the tokenizer, whose files lie beside.
    ``validation`` tells what the split ``val`` consists of: whole ``documents``, the last part of the only
    document (``position``), or nothing (``none``).
    """

    vocab_size: int
    dtype: str
    boundary: str
    boundary_id: int | None
    tokenizer: dict[str, Any]
    sources: tuple[str, ...]
    seed: int
    validation: str
    splits: dict[str, Split]

    def write(self, folder: Path) -> None:
        """Write ``meta.json``: the same contents give the same bytes."""
        contents = {"format": FORMAT, "version": VERSION, **asdict(self)}
        with (folder / META).open("w", encoding="utf-8") as file:
            json.dump(contents, file, indent=1)
            file.write("\n")
            _sync(file)

    @classmethod
    def read(cls, folder: Path) -> "Meta":
        """Read and check ``meta.json``.

        Raises:
            UserError: the folder is missing, or is not prepared by a version that this one reads.
        """
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder (make it with: titans prepare SOURCE --out {folder})")
        path = folder / META
        if not path.is_file():
            raise UserError(f"{folder}: no {META}: not a folder that `titans prepare` made")
        try:
            contents = json.loads(path.read_text(encoding="utf-8"))
            if contents.pop("format", None) != FORMAT:
                raise UserError(f"{path}: not a description of token shards (format is not {FORMAT!r})")
            if (version := contents.pop("version", None)) != VERSION:
                raise UserError(f"{path}: format version {version}, this titans reads version {VERSION}")
            splits = {
                name: Split(
                    split["tokens"], split["documents"], tuple(Shard(**shard) for shard in split["shards"])
                )
                for name, split in contents.pop("splits").items()
            }
            meta = cls(**{**contents, "sources": tuple(contents["sources"])}, splits=splits)
        except UserError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{path}: damaged: {error}") from None
        if meta.dtype not in _DTYPES:
            raise UserError(f"{path}: dtype {meta.dtype!r}, expected one of {sorted(_DTYPES)}")
        return meta


def token_dtype(vocab_size: int) -> str:
    """The smallest dtype that holds ids below ``vocab_size``."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


class ShardWriter:
    """Writes one split into ``folder``, starting a new shard whenever ``shard_size`` tokens are full."""

    def __init__(self, folder: Path, split: str, dtype: str, shard_size: int):
        self._folder, self._split, self._dtype, self._shard_size = folder, split, _DTYPES[dtype], shard_size
        self._shards: list[Shard] = []
        self._starts: list[IntArray] = []
        self._file: Any = None
        self._digest = hashlib.sha256()
        self._tokens = 0

    def write(self, tokens: IntArray, starts: IntArray) -> None:
        """Append ``tokens`` [n]; ``starts`` are the offsets in them at which documents start, ascending."""
        while len(tokens):
            if self._file is None:
                self._file = (self._folder / f"{self._name}.bin").open("wb")
            room = self._shard_size - self._tokens
            inside = np.searchsorted(starts, room)  # documents that start before the shard is full
            block = np.ascontiguousarray(tokens[:room], dtype=self._dtype)
            self._file.write(block.data)
            self._digest.update(block.data)
            self._starts.append(np.asarray(starts[:inside], dtype="<i8") + self._tokens)
            self._tokens += len(block)
            tokens, starts = tokens[room:], starts[inside:] - room
            if self._tokens == self._shard_size:
                self._finish_shard()

    def close(self) -> Split:
        """Finish the last shard and return the split's description."""
        if self._file is not None:
            self._finish_shard()
        tokens, documents = sum(s.tokens for s in self._shards), sum(s.documents for s in self._shards)
        return Split(tokens, documents, tuple(self._shards))

    def abandon(self) -> None:
        """Close the open file; what was written is the caller's to remove."""
        if self._file is not None:
            self._file.close()

    @property
    def _name(self) -> str:
        return f"{self._split}-{len(self._shards):05d}"

    def _finish_shard(self) -> None:
        _sync(self._file)
        self._file.close()
        index = np.concatenate(self._starts).astype("<i8")
        with (self._folder / f"{self._name}.idx").open("wb") as file:
            file.write(index.data)
            _sync(file)
        index_digest = hashlib.sha256(index.data).hexdigest()
        self._shards.append(
            Shard(self._name, self._tokens, len(index), self._digest.hexdigest(), index_digest)
        )
        self._file, self._starts, self._tokens, self._digest = None, [], 0, hashlib.sha256()


class TokenShards:
    """One split of a prepared folder, memory-mapped: opening it reads only the documents' index.

    Args:
        folder: what ``titans prepare`` made.
        split: ``train`` or ``val``.

    Attributes:
        meta: the folder's description.
        starts: int64 [documents], the position in the stream at which each document starts, ascending.

    Raises:
        UserError: the folder or split is missing, of another format version, or a shard's size is not what
            ``meta.json`` says (a copy cut short). Contents are compared only by ``verify``.
    """

    def __init__(self, folder: str | Path, split: str = "train"):
        self.folder = Path(folder)
        self.meta = Meta.read(self.folder)
        if split not in self.meta.splits:
            raise unknown_name("split", split, self.meta.splits)
        self.split = split
        self._description = self.meta.splits[split]
        if not self._description.tokens:
            raise UserError(
                f"{self.folder}: the split {split!r} is empty (see --validation-fraction of titans prepare)"
            )
        dtype = _DTYPES[self.meta.dtype]
        self._maps, starts, self._firsts = [], [], [0]
        for shard in self._description.shards:
            bin_path, idx_path = self._paths(shard)
            _expect_size(bin_path, shard.tokens * dtype.itemsize)
            _expect_size(idx_path, shard.documents * 8)
            self._maps.append(np.memmap(bin_path, dtype=dtype, mode="r"))
            starts.append(np.fromfile(idx_path, dtype="<i8") + self._firsts[-1])
            self._firsts.append(self._firsts[-1] + shard.tokens)
        self.starts: npt.NDArray[np.int64] = np.concatenate(starts).astype(np.int64)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled by name: a memory map would travel to a data loader's worker as a copy of the file."""
        return TokenShards, (self.folder, self.split)

    def __len__(self) -> int:
        """Tokens in the split."""
        return self._firsts[-1]

    @property
    def vocab_size(self) -> int:
        """Ids lie below it."""
        return self.meta.vocab_size

    def read(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Tokens ``start`` to ``stop`` of the stream as int64 [stop - start], across shards if need be."""
        if not 0 <= start <= stop <= len(self):
            raise ValueError(f"expected 0 <= start <= stop <= {len(self)}, got start={start}, stop={stop}")
        parts = []
        shard = int(np.searchsorted(self._firsts, start, side="right")) - 1
        while start < stop:
            first = self._firsts[shard]
            part = self._maps[shard][start - first : stop - first]
            parts.append(part)
            start, shard = start + len(part), shard + 1
        return np.concatenate(parts).astype(np.int64) if parts else np.empty(0, dtype=np.int64)

    def starts_between(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Positions p of documents' first tokens with ``start <= p < stop``."""
        first, last = np.searchsorted(self.starts, [start, stop])
        return self.starts[first:last]

    def blocks(self, size: int = 1 << 22) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
        """The whole stream in blocks of ``size`` tokens, each with its position: constant memory."""
        for start in range(0, len(self), size):
            yield start, self.read(start, min(start + size, len(self)))

    def verify(self) -> None:
        """Compare every file with its checksum (reads everything).

        Raises:
            UserError: a file's contents are not those that were written.
        """
        for shard in self._description.shards:
            for path, expected in zip(self._paths(shard), (shard.sha256, shard.index_sha256), strict=True):
                with path.open("rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
                if found != expected:
                    raise UserError(f"{path}: damaged: sha256 is {found}, {META} says {expected}")

    def _paths(self, shard: Shard) -> tuple[Path, Path]:
        return self.folder / f"{shard.name}.bin", self.folder / f"{shard.name}.idx"


def _expect_size(path: Path, expected: int) -> None:
    if not path.is_file():
        raise UserError(f"{path}: missing, though {META} lists it")
    if (size := path.stat().st_size) != expected:
        raise UserError(f"{path}: {size} bytes, {META} says {expected}: the file was cut short or changed")


def _sync(file: IO[Any]) -> None:
    """Onto the disk itself: the folder is renamed into place later, with its contents there."""
    file.flush()
    os.fsync(file.fileno())
