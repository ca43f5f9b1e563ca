"""``prepare``: documents -> token shards, all or nothing.

Tokens first go to one spool file in a hidden sibling of the target, then, when the documents' number and
lengths are known, into the shards of their splits. Copying tokens (GB/s) costs nothing beside making them
(MB/s) and makes the validation split exact without holding text in memory. The folder is renamed into place
last.
"""

import hashlib
import os
import secrets
import shutil
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from titans.data.shards import DEFAULT_SHARD_SIZE, META, Meta, ShardWriter, Split, token_dtype
from titans.data.sources import Corpus, Document
from titans.errors import UserError

if TYPE_CHECKING:  # transformers takes seconds to import: a mistake in the sources must not wait for it
    from transformers import PreTrainedTokenizerBase

DEFAULT_VALIDATION_FRACTION = 0.02
_BATCH_CHARACTERS = (
    1 << 22
)  # per call of the tokenizer: keeps fast tokenizers' threads busy in some 100s of MB
_COPY_TOKENS = 1 << 22

ProgressCallback = Callable[[int, int, int], None]
Int64Array = npt.NDArray[np.int64]


def prepare(
    sources: Corpus | Sequence[str | Path],
    out: str | Path,
    tokenizer: "str | Path | PreTrainedTokenizerBase" = "bytes",
    *,
    validation_fraction: float = DEFAULT_VALIDATION_FRACTION,
    validation_documents: int | None = None,
    shard_size: int = DEFAULT_SHARD_SIZE,
    seed: int = 0,
    overwrite: bool = False,
    progress: ProgressCallback | None = None,
) -> Meta:
    """Tokenize documents into the folder ``out`` (format: ``titans.data.shards``) and return its description.

    The same sources, tokenizer and seed give the same bytes. Memory does not grow with the size of the input,
    but for 16 bytes a document.

    Args:
        sources: a ``Corpus``, or what one is made of.
        out: the folder to make. An interrupted run leaves what was there before.
        tokenizer: a tokenizer, or what ``load_tokenizer`` takes.
        validation_fraction: the share of the tokens to hold out, by whole documents chosen by a hash of their
            text and ``seed``; copies of a document stay on one side. A single document is split by position:
            its last part is the validation split. 0 holds nothing out.
        validation_documents: hold out exactly this many documents instead.
        shard_size: tokens per shard.
        seed: of the choice of validation documents.
        overwrite: replace ``out`` if an earlier run made it.
        progress: called after every batch with (documents, tokens, bytes read from disk) so far.

    Raises:
        UserError: an argument, a source or the tokenizer cannot be used.
    """
    target = Path(out)
    check_arguments(target, validation_fraction, validation_documents, shard_size, overwrite)
    corpus = sources if isinstance(sources, Corpus) else Corpus(sources)
    check_output_is_no_source(target, corpus)

    from titans.data.tokenizer import load_tokenizer, save_tokenizer

    name = Path(tokenizer).name if isinstance(tokenizer, str | Path) else str(tokenizer.name_or_path)
    loaded = load_tokenizer(tokenizer) if isinstance(tokenizer, str | Path) else tokenizer

    target.parent.mkdir(parents=True, exist_ok=True)
    work = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    work.mkdir()
    try:
        spool = _tokenize(corpus, loaded, work / "spool", seed, progress or (lambda *counts: None))
        in_val = _choose_validation(spool, validation_fraction, validation_documents)
        train, val, validation = _write_splits(spool, in_val, validation_fraction, work, shard_size)
        spool.path.unlink()
        save_tokenizer(loaded, work)
        meta = Meta(
            vocab_size=spool.vocab_size,
            dtype=spool.dtype,
            boundary=spool.boundary,
            boundary_id=spool.boundary_id,
            tokenizer={
                "name": name,
                "class": type(loaded).__name__,
                "bos_token_id": loaded.bos_token_id,
                "eos_token_id": loaded.eos_token_id,
                "pad_token_id": loaded.pad_token_id,
            },
            sources=tuple(corpus.names),
            seed=seed,
            validation=validation,
            splits={"train": train, "val": val},
        )
        meta.write(work)
        _install(work, target)
    except BaseException:  # an interrupt too
        shutil.rmtree(work, ignore_errors=True)
        raise
    return meta


def check_arguments(
    out: Path, fraction: float, documents: int | None, shard_size: int, overwrite: bool
) -> None:
    """The checks that need no source: values in range, and a target that may be written."""
    if not 0 <= fraction < 1:
        raise UserError(f"validation_fraction: expected a number in [0, 1), got {fraction}")
    if documents is not None and documents < 0:
        raise UserError(f"validation_documents: expected 0 or more, got {documents}")
    if shard_size < 1:
        raise UserError(f"shard_size: expected at least 1 token, got {shard_size}")
    if not out.name:
        raise UserError(f"{out}: expected the name of a folder to make")
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"{out}: exists and is not a folder")
    if any(out.iterdir()):
        if not (out / META).is_file():
            raise UserError(f"{out}: exists and was not made by titans prepare: choose another name")
        if not overwrite:
            raise UserError(f"{out}: exists already (replace it with --overwrite)")


def check_output_is_no_source(out: Path, corpus: Corpus) -> None:
    """A target inside a source folder would be read as text by the next run."""
    resolved = out.resolve()
    for name in corpus.names:
        if Path(name).is_dir() and resolved.is_relative_to(Path(name).resolve()):
            raise UserError(f"{out}: lies inside the source {name}: choose a folder elsewhere")


@dataclass(frozen=True)
class _Spool:
    """The whole corpus as one file of tokens, and where its documents start."""

    path: Path
    dtype: str
    vocab_size: int
    boundary: str
    boundary_id: int | None
    tokens: int
    starts: Int64Array
    keys: npt.NDArray[np.uint64]

    def read(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Tokens of the stream. Read, not mapped: a map of all of it would count as this process's memory."""
        offset = start * np.dtype(self.dtype).itemsize
        return np.fromfile(self.path, dtype=self.dtype, count=stop - start, offset=offset)


def _tokenize(
    corpus: Corpus, tokenizer: "PreTrainedTokenizerBase", path: Path, seed: int, progress: ProgressCallback
) -> _Spool:
    from titans.data.tokenizer import TextEncoder, boundary_token

    encode = TextEncoder(tokenizer)
    boundary, boundary_id = boundary_token(tokenizer)
    marker = np.asarray([boundary_id] if boundary_id is not None else [], dtype=np.int64)
    # Vocabularies may have holes: the largest id counts, not the number of tokens.
    vocab_size = max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)
    dtype = token_dtype(vocab_size)
    starts, keys = array("q"), array("Q")
    tokens = 0
    with path.open("wb") as file:
        for batch in _batches(corpus):
            parts: list[npt.NDArray[Any]] = []
            for document, ids in zip(batch, encode([document.text for document in batch]), strict=True):
                if not document.continues:
                    if boundary == "eos" and starts:
                        parts.append(marker)
                        tokens += 1
                    starts.append(tokens)
                    keys.append(_key(document, seed))
                    if boundary == "bos":
                        parts.append(marker)
                        tokens += 1
                parts.append(ids)
                tokens += len(ids)
            file.write(np.concatenate(parts).astype(dtype).data)
            progress(len(starts), tokens, corpus.bytes_read)
        if boundary == "eos" and starts:
            file.write(marker.astype(dtype).data)
            tokens += 1
    if not tokens:
        empty = f" ({corpus.empty} empty ones)" if corpus.empty else ""
        raise UserError(f"no documents in {', '.join(corpus.names)}{empty}")
    start_of = np.frombuffer(starts, dtype=np.int64)
    # Without a marker a text that a tokenizer maps to nothing would be a document of no tokens.
    real = np.diff(start_of, append=tokens) > 0
    key_of = np.frombuffer(keys, dtype=np.uint64)
    return _Spool(path, dtype, vocab_size, boundary, boundary_id, tokens, start_of[real], key_of[real])


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text) + 1
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _key(document: Document, seed: int) -> int:
    """A number that orders documents at random: of the text, so that copies of a document stay together."""
    beginning = document.text[: 1 << 16].encode()
    return int.from_bytes(
        hashlib.blake2b(beginning, digest_size=8, key=seed.to_bytes(8, "little", signed=True)).digest(),
        "little",
    )


def _choose_validation(spool: _Spool, fraction: float, documents: int | None) -> npt.NDArray[np.bool_]:
    """Which documents are held out, bool [documents]; none of them when there is only one."""
    number = len(spool.starts)
    chosen = np.zeros(number, dtype=np.bool_)
    if documents is not None and documents >= number > 1:
        raise UserError(f"validation_documents: expected fewer than the {number} documents, got {documents}")
    if number == 1 or documents == 0 or (documents is None and fraction == 0):
        return chosen
    order = np.argsort(spool.keys, kind="stable")
    if documents is not None:
        chosen[order[:documents]] = True
        return chosen
    lengths = np.diff(spool.starts, append=spool.tokens)
    target = fraction * spool.tokens
    # One book among notes must not become the whole validation split, nor most of the corpus.
    order = order[lengths[order] <= 4 * target]
    if not len(order):
        chosen[np.argmin(lengths)] = True
        return chosen
    order = order[: number - 1]
    last = int(np.argmin(np.abs(np.cumsum(lengths[order]) - target)))
    while last + 2 < len(order) and spool.keys[order[last + 1]] == spool.keys[order[last]]:
        last += 1
    chosen[order[: last + 1]] = True
    return chosen


def _write_splits(
    spool: _Spool, in_val: npt.NDArray[np.bool_], fraction: float, folder: Path, shard_size: int
) -> tuple[Split, Split, str]:
    """Copy the spool's documents into their splits' shards."""
    starts, in_split = spool.starts, in_val
    validation = "documents" if in_val.any() else "none"
    if len(starts) == 1 and fraction > 0 and spool.tokens > 1:
        held_out = min(max(1, round(fraction * spool.tokens)), spool.tokens - 1)
        # To the shards it is a second document, which starts where the first one's training part ends.
        starts = np.asarray([0, spool.tokens - held_out])
        in_split, validation = np.asarray([False, True]), "position"
    ends = np.append(starts[1:], spool.tokens)
    splits = []
    for name, selected in (("train", ~in_split), ("val", in_split)):
        writer = ShardWriter(folder, name, spool.dtype, shard_size)
        try:
            for first, last in _runs(selected):
                for begin in range(starts[first], ends[last], _COPY_TOKENS):
                    end = min(begin + _COPY_TOKENS, int(ends[last]))
                    inside = starts[np.searchsorted(starts, begin) : np.searchsorted(starts, end)]
                    writer.write(spool.read(begin, end), inside - begin)
            splits.append(writer.close())
        except BaseException:
            writer.abandon()
            raise
    return splits[0], splits[1], validation


def _runs(selected: npt.NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """(first, last) of each run of consecutive selected documents."""
    edges = np.flatnonzero(np.diff(selected.astype(np.int8), prepend=0, append=0))
    yield from ((int(first), int(end) - 1) for first, end in zip(edges[::2], edges[1::2], strict=True))


def _install(work: Path, target: Path) -> None:
    """Put the finished folder into place; the old one, if any, goes only when the new one stands."""
    if not target.exists():
        os.rename(work, target)
        return
    old = work.with_suffix(".old")
    os.rename(target, old)
    try:
        os.rename(work, target)
    except BaseException:
        os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)
