"""``titans memorize``: text of any length into a memory file, in constant memory."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from titans.cli.timed_bar import TimedBar
from titans.errors import UserError

if TYPE_CHECKING:  # torch takes seconds to import: a mistake in the options must not wait for it
    from titans.data.sources import Corpus
    from titans.inference.memory import Memory
    from titans.inference.memory_file import MemoryFile


@dataclass(frozen=True)
class Arguments:
    """Read text into a memory and keep it as a file. Ctrl-C saves; the same command goes on.

    Example: titans memorize book.txt notes/ --model runs/mac --out notes.memory
    """

    sources: tyro.conf.Positional[tuple[str, ...]]
    """Text files, folders, JSON lines, .gz or .xz of those, - for standard input, python-docs for the
    documentation that Python ships."""
    out: Path
    """The memory file to write."""
    model: Path | None = None
    """A checkpoint, the output folder of titans train, or a shipped checkpoint's name; by default the one of
    the memory that goes on."""
    start: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """Continue this memory file (it may be the one that is written)."""
    format: Literal["auto", "text", "jsonl"] = "auto"
    """What the files and standard input hold; auto goes by the suffix."""
    text_field: str = "text"
    """The field of JSON lines that holds the text."""
    piece: int | None = None
    """Tokens per forward pass: speed and memory, not the result; by default 1,024, on a GPU 16,384."""
    save_every: float = 60.0
    """Seconds between saves: what a kill costs at most."""
    overwrite: bool = False
    """Replace the file, finished or not."""


def run(arguments: Arguments) -> int:
    """Check the sources, then the files, then the model; read; print a table."""
    if arguments.piece is not None and arguments.piece < 1:
        raise UserError(f"--piece: expected at least 1 token, got {arguments.piece}")
    if not arguments.save_every >= 0:
        raise UserError(f"--save-every: expected 0 seconds or more, got {arguments.save_every}")

    from titans.data.prepare import check_output_is_no_source
    from titans.data.sources import Corpus

    corpus = Corpus(arguments.sources, text_field=arguments.text_field, input_format=arguments.format)
    check_output_is_no_source(arguments.out, corpus)
    if arguments.out.exists() and any(arguments.out.samefile(path) for path in corpus.files):
        raise UserError(f"{arguments.out}: is one of the sources")

    from transformers.utils import logging as transformers_logging

    from titans.inference.memory_file import locked

    transformers_logging.disable_progress_bar()
    with locked(arguments.out):
        return _memorize(arguments, corpus)


def _memorize(arguments: Arguments, corpus: "Corpus") -> int:
    from titans.inference.memory import Memory

    file, path = _starting_point(arguments)
    reading = None if file is None else file.header.reading
    piece = arguments.piece or (reading.piece if reading else None)
    model = arguments.model or (None if file is None else Path(file.header.model_path))
    if model is None:
        raise UserError("--model: expected a checkpoint (a new memory has none yet)")
    memory = Memory.new(model, piece=piece)
    if file is not None:
        memory.restore(file, path)

    from titans.inference.reading import memorize
    from titans.training.callbacks import stop_on_signals

    options = {"format": arguments.format, "text_field": arguments.text_field}
    origin = None if file is None else file.checksum
    before, started = memory.stream.tokens_read, time.monotonic()
    with _Display(corpus, before) as display, stop_on_signals() as request:
        finished = memorize(
            memory,
            corpus,
            arguments.out,
            options=options,
            origin=origin,
            save_every=arguments.save_every,
            stop=lambda: request.signal is not None,
            progress=display.show,
        )
    _print_summary(memory, arguments.out, memory.stream.tokens_read - before, time.monotonic() - started)
    if finished:
        return 0
    print(f"interrupted and saved: the same command goes on from {memory.stream.tokens_read:,} tokens")
    return 130


def _starting_point(arguments: Arguments) -> "tuple[MemoryFile | None, Path]":
    """The memory file to go on from: an unfinished `out`, else `from`, else none."""
    from titans.inference.memory_file import is_memory_file, read_memory

    out = arguments.out
    if out.exists() and arguments.overwrite and not is_memory_file(out):
        raise UserError(f"{out}: not a memory file: choose another name")
    if out.exists() and not arguments.overwrite:
        file = read_memory(out)
        reading = file.header.reading
        if reading is not None:
            options = {"format": arguments.format, "text_field": arguments.text_field}
            if reading.names != arguments.sources or reading.options != options:
                raise UserError(
                    f"{out}: holds an unfinished reading of {' '.join(reading.names)} with "
                    f"{reading.options}: give the same to go on, or --overwrite"
                )
            _check_origin(arguments, reading.origin)
            return file, out
        if arguments.start is None or not out.samefile(arguments.start):
            raise UserError(
                f"{out}: exists already: read on with --from {out}, or replace it with --overwrite"
            )
    if arguments.start is None:
        return None, out
    file = read_memory(arguments.start)
    if file.header.reading is not None:
        raise UserError(f"--from {arguments.start}: its own reading is unfinished: finish that first")
    return file, arguments.start


def _check_origin(arguments: Arguments, origin: str | None) -> None:
    """An unfinished reading began from one memory: another --from would be ignored in silence."""
    from titans.inference.memory_file import read_memory

    start = arguments.start
    if start is not None and not start.samefile(arguments.out) and read_memory(start).checksum != origin:
        raise UserError(
            f"--from {start}: not the memory that the unfinished reading in {arguments.out} began with"
        )


class _Display(TimedBar):
    """Speed, and the share of the text where its size is known."""

    def __init__(self, corpus: "Corpus", tokens: int):
        super().__init__("reading", corpus.size)
        self._size, self._first = corpus.size, tokens

    def show(self, bytes_read: int, tokens: int) -> None:
        now = time.monotonic()
        figures = f"{tokens:,} tokens, {(tokens - self._first) / (now - self.started):,.0f} tokens/s"
        share = f", {bytes_read / self._size:.0%} of the text" if self._size else ""
        self.update(now, bytes_read, figures, figures + share)


def _print_summary(memory: "Memory", out: Path, tokens: int, seconds: float) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False)
    table.add_column(justify="left")
    table.add_column(justify="right")
    table.add_row("tokens read now", f"{tokens:,}")
    table.add_row("tokens read in all", f"{memory.stream.tokens_read:,}")
    table.add_row("tokens/s", f"{tokens / seconds:,.0f}")
    table.add_row("state", f"{memory.state_bytes:,} bytes")
    table.add_row(str(out), f"{out.stat().st_size:,} bytes")
    Console().print(table)
