"""`memorize`: a corpus into a memory, saved now and then, so that an interrupted reading goes on exactly.

Text comes in units (`cut`), tokens in pieces of one size. A save notes the unit that the next token belongs
to, by the text before it, and how many tokens of the unit are read. To go on, the sources are read again up
to there: that takes little beside the model, works for archives and pipes, and shows whether they changed.
"""

import hashlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from titans.data.sources import Corpus, Document
from titans.errors import UserError
from titans.inference.memory import Memory
from titans.inference.memory_file import Reading, Source
from titans.inference.text import cut

SAVE_EVERY = 60.0  # seconds: what a kill costs at most

Progress = Callable[[int, int], None]


class ChangedSourceError(UserError):
    """A source is not, or no longer, what was read of it before."""


def memorize(
    memory: Memory,
    corpus: Corpus,
    out: Path,
    *,
    options: dict[str, Any] | None = None,
    origin: str | None = None,
    save_every: float = SAVE_EVERY,
    stop: Callable[[], bool] = lambda: False,
    progress: Progress = lambda bytes_read, tokens: None,
) -> bool:
    """Read all of `corpus` into `memory` and keep it in the file `out`; hold `locked(out)` meanwhile.

    A memory with an unfinished reading goes on with it: `corpus` must be the same.

    Args:
        options, origin: noted in the file, see `Reading`.
        save_every: seconds between saves; 0 after every piece.
        stop: asked after every piece; True saves and ends the reading.
        progress: called after every piece with the bytes taken from disk and the tokens read so far.

    Returns:
        Whether everything was read (else the reading is unfinished, and saved).

    Raises:
        ChangedSourceError: a source changed, while it was read or since the reading that goes on. The file
            is as the last save left it.
        UserError: a source cannot be read (what was read before is saved), or the file not be written.
    """
    source = _TokenSource(memory, corpus)
    started = memory.reading
    if started is not None:
        source.skip(started)
        options, origin = started.options, started.origin
    piece = memory.stream.piece

    def save() -> None:
        source.check_unchanged()
        sources, skip = source.position()
        memory.reading = Reading(
            names=tuple(corpus.names),
            options=options or {},
            sources=sources,
            skip=skip,
            piece=piece,
            origin=origin,
        )
        memory.write(out)

    saved = time.monotonic()
    while True:
        try:
            ids = source.take(piece)
        except ChangedSourceError:
            raise
        except (UserError, OSError) as error:
            save()
            reason = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else error
            raise UserError(f"{reason} (what was read before is saved in {out})") from error
        if not len(ids):
            break
        memory.stream.read(ids)
        progress(source.bytes_read, memory.stream.tokens_read)
        if stop():
            save()
            return False
        if time.monotonic() - saved >= save_every:
            save()
            saved = time.monotonic()
    source.check_unchanged()
    if not source.ledger.total:
        raise UserError(f"no text in {', '.join(corpus.names)}")
    memory.sources, memory.reading = (*memory.sources, *source.ledger.sources()), None
    memory.write(out)
    return True


class _Unit(NamedTuple):
    """A text to tokenize, where it comes from, and the bytes on disk up to its end (for progress)."""

    text: str
    source: str
    bytes_read: int


class _Mark(NamedTuple):
    """A place in the ledger."""

    done: int
    current: str | None
    bytes: int
    hash: Any


class _End(NamedTuple):
    """The end of a unit: the number of the token behind it, bytes on disk, and the place in the ledger."""

    token: int
    bytes_read: int
    mark: _Mark


@dataclass
class _Ledger:
    """Length and hash of what was read of each source, so far."""

    done: list[Source] = field(default_factory=list)
    current: str | None = None
    bytes: int = 0
    total: int = 0
    hash: Any = field(default_factory=hashlib.sha256)

    def add(self, unit: _Unit) -> None:
        if unit.source != self.current:
            self.done = self.sources()
            self.current, self.bytes, self.hash = unit.source, 0, hashlib.sha256()
        data = unit.text.encode()
        self.hash.update(data)
        self.bytes += len(data)
        self.total += len(data)

    def mark(self) -> _Mark:
        return _Mark(len(self.done), self.current, self.bytes, self.hash.copy())

    def sources(self, mark: _Mark | None = None) -> list[Source]:
        """What was read up to `mark`, or so far."""
        mark = mark or self.mark()
        found = self.done[: mark.done]
        if mark.current is not None:
            found.append(Source(name=mark.current, bytes=mark.bytes, sha256=mark.hash.hexdigest()))
        return found


class _TokenSource:
    """The corpus as tokens, taken in pieces; it knows where in the text the next token is."""

    def __init__(self, memory: Memory, corpus: Corpus) -> None:
        self.ledger = _Ledger()
        self._encode = memory.encode
        self._units = _units(corpus)
        self._files = {str(path): _signature(path) for path in corpus.files}
        self._buffer = memory.start()
        # Ends of units, ascending. Tokens are counted from the first unit that is tokenized here.
        self._ends = deque([_End(0, 0, self.ledger.mark()), _End(len(self._buffer), 0, self.ledger.mark())])
        self._taken = 0

    def take(self, count: int) -> Tensor:
        """The next `count` token ids; fewer only at the end, none after it."""
        parts, length = [self._buffer], len(self._buffer)
        while length < count and (unit := next(self._units, None)) is not None:
            ids = self._tokens(unit)
            parts.append(ids)
            length += len(ids)
        joined = torch.cat(parts) if len(parts) > 1 else self._buffer
        taken, self._buffer = joined[:count], joined[count:]
        self._taken += len(taken)
        return taken

    def skip(self, reading: Reading) -> None:
        """Go to where `reading` stands, without tokenizing what lies before it."""
        target = sum(source.bytes for source in reading.sources)
        last = 0
        while self.ledger.total < target and (unit := next(self._units, None)) is not None:
            self.ledger.add(unit)
            last = unit.bytes_read
        for expected, found in zip(reading.sources, [*self.ledger.sources(), None], strict=False):
            if expected != found:
                raise ChangedSourceError(
                    f"{expected.name}: changed since it was read: start anew, or without it"
                )
        self._ends = deque([_End(0, last, self.ledger.mark())])
        if reading.skip:
            unit = next(self._units, None)
            ids = self._tokens(unit) if unit is not None else torch.empty(0)
            if len(ids) < reading.skip:
                name = reading.sources[-1].name if reading.sources else reading.names[0]
                raise ChangedSourceError(f"{name}: changed since it was read: it ends earlier")
            self._buffer, self._taken = ids[reading.skip :], reading.skip

    def position(self) -> tuple[tuple[Source, ...], int]:
        """What was read before the unit of the next token, and the tokens of that unit taken already."""
        start = self._start()
        return tuple(self.ledger.sources(start.mark)), self._taken - start.token

    @property
    def bytes_read(self) -> int:
        """Bytes on disk up to the next token, as far as one can say within a unit."""
        start = self._start()
        end = self._ends[1] if len(self._ends) > 1 else start
        share = (self._taken - start.token) / max(1, end.token - start.token)
        return start.bytes_read + int(share * (end.bytes_read - start.bytes_read))

    def _start(self) -> _End:
        """Where the unit of the next token begins."""
        while len(self._ends) > 1 and self._ends[1].token <= self._taken:
            self._ends.popleft()
        return self._ends[0]

    def check_unchanged(self) -> None:
        """Raise for the file in progress if it is no longer the one that was there at the start."""
        name = self.ledger.current
        if name in self._files and _signature(Path(name)) != self._files[name]:
            raise ChangedSourceError(f"{name}: changed while it was read: its text may be torn")

    def _tokens(self, unit: _Unit) -> Tensor:
        if unit.source != self.ledger.current:
            self.check_unchanged()
        ids = torch.from_numpy(self._encode([unit.text])[0].astype("int64"))
        self.ledger.add(unit)
        self._ends.append(_End(self._ends[-1].token + len(ids), unit.bytes_read, self.ledger.mark()))
        return ids


def _units(corpus: Corpus) -> Iterator[_Unit]:
    """The corpus's text in units, the same ones whenever its sources are."""
    before = 0
    known = {*map(str, corpus.files), "standard input"}
    for document in corpus:
        after, done = corpus.bytes_read, 0
        name = _source_name(document, known)
        for text in cut(document.text):
            done += len(text)
            yield _Unit(text, name, before + (after - before) * done // len(document.text))
        before = after


def _source_name(document: Document, known: set[str]) -> str:
    """A document of several in one source is called `source:number`."""
    return document.source if document.source in known else document.source.rpartition(":")[0]


def _signature(path: Path) -> tuple[int, int, int]:
    """What changes when a file is written; a pipe has none."""
    if not path.is_file():
        return (0, 0, 0)
    found = os.stat(path)
    return (found.st_ino, found.st_size, found.st_mtime_ns)
