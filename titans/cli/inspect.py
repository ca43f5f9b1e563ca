"""``titans inspect``: a memory at work on a text, as one HTML page and as pictures."""

import importlib.util
import os
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from titans.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from titans.data.sources import Corpus
    from titans.inspection.ablate import Dependence
    from titans.inspection.record import Record

# More text than so much is not even tokenised: a vocabulary's tokens have 4 to 5 characters on average.
CHARACTERS_PER_TOKEN = 40


@dataclass(frozen=True)
class Arguments:
    """Show what the memories of a model do with a text: surprise, gates, change, loss, dependence.

    Example: titans inspect README.md --model runs/mag --png figures
    """

    file: tyro.conf.Positional[str]
    """A text file, plain or .gz or .xz; - for standard input."""
    model: Path
    """A checkpoint, the output folder of titans train (its last checkpoint), or a shipped one's name."""
    out: Path | None = None
    """The page; by default FILE.html beside FILE, standard-input.html for standard input."""
    png: Path | None = None
    """Also write the figures as PNG files into this folder (needs matplotlib)."""
    max_tokens: int = 50_000
    """Read only so many tokens."""
    spans: int = 16
    """Spans whose writes are left out in turn, to see what depends on them; 0: none. Every span costs a run
    from its beginning to the end of the text."""


def run(arguments: Arguments) -> int:
    """Check the options and the file, then the model, then read."""
    out = _check(arguments)

    from titans.data.sources import Corpus

    corpus = Corpus([arguments.file], input_format="text")

    from rich.console import Console
    from transformers.utils import logging as transformers_logging

    from titans import __version__
    from titans.inference.checkpoint import load_checkpoint
    from titans.inspection.page import About, render
    from titans.inspection.tokens import token_texts
    from titans.inspection.watch import memories_of

    transformers_logging.disable_progress_bar()
    model, tokenizer, folder = load_checkpoint(arguments.model)
    memory = memories_of(model)[0].spec
    ids, left_out = _tokens(corpus, tokenizer, arguments)

    started = time.monotonic()
    record, dependence = _measure(model, ids, arguments.spans)
    about = About(
        source=Path(arguments.file).name if arguments.file != "-" else "standard input",
        model=str(arguments.model),
        summary=f"{model.config.variant}, {sum(each.numel() for each in model.parameters()) / 1e6:,.1f} M "
        f"parameters, {model.config.num_hidden_layers} blocks of {memory.heads} memory heads, "
        f"chunk {memory.chunk_size}; {len(ids):,} tokens",
        left_out=left_out,
        command=_command(arguments),
        version=__version__,
        chunk=memory.chunk_size,
    )
    texts = token_texts(tokenizer, ids.tolist())
    _write(out, render(about, texts, record, dependence))
    written = [out]
    if arguments.png is not None:
        from titans.inspection.figures import draw

        written += draw(arguments.png, about, texts, record, dependence)
    console = Console(highlight=False, soft_wrap=True)
    console.print(_table(record, f"{arguments.file} through {folder}"))
    console.print(
        f"loss {record.loss.mean():.4f} nats per token, without writes {record.frozen_loss.mean():.4f}; "
        f"{len(ids):,} tokens in {time.monotonic() - started:,.0f} s"
    )
    if dependence is not None:
        console.print(
            "what a block reads at the last token changes by "
            + ", ".join(f"{value:.3g}" for value in dependence.retrieval[:-1, :, -1].mean(1, dtype="f8"))
            + " without one of the spans, first to last; by "
            f"{dependence.retrieval[-1, :, -1].mean(dtype='f8'):.3g} in the control"
        )
    if left_out:
        console.print(left_out)
    for path in written:
        console.print(f"{path} ({path.stat().st_size / 1e6:,.1f} MB)", markup=False)
    return 0


def _check(arguments: Arguments) -> Path:
    """The page's path; mistakes in the options come before anything is loaded."""
    if arguments.max_tokens < 2:
        raise UserError(f"--max-tokens: expected at least 2, got {arguments.max_tokens}")
    if arguments.spans < 0:
        raise UserError(f"--spans: expected 0 (none) or more, got {arguments.spans}")
    file = Path(arguments.file)
    if arguments.file != "-" and (file.is_dir() or not file.exists()):
        raise UserError(
            f"{file}: expected a text file, {'got a folder' if file.is_dir() else 'no such file'}"
        )
    out = arguments.out
    if out is None and arguments.file != "-" and not file.is_file():
        raise UserError(f"{file}: not a regular file: say with --out where the page shall be")
    if out is None:
        out = Path("standard-input.html") if arguments.file == "-" else file.with_name(f"{file.name}.html")
    if out.is_dir() or not out.parent.is_dir():
        raise UserError(f"--out {out}: expected a file in a folder that exists")
    if not os.access(out.parent, os.W_OK):
        raise UserError(f"--out {out}: the folder cannot be written to (permission denied)")
    if out.exists() and file.exists() and out.samefile(file):
        raise UserError(f"--out {out}: would replace the text")
    if arguments.png is not None:
        if arguments.png.exists() and not arguments.png.is_dir():
            raise UserError(f"--png {arguments.png}: expected a folder, got a file")
        if importlib.util.find_spec("matplotlib") is None:
            raise UserError("--png needs the package 'matplotlib': pip install 'titans-ltm[plots]'")
    return out


def _tokens(
    corpus: "Corpus", tokenizer: "PreTrainedTokenizerBase", arguments: Arguments
) -> tuple["Tensor", str]:
    """The first tokens of the text, and a sentence on what was left out ("" for nothing)."""
    from titans.evaluation.stream_loss import as_stream

    limit = arguments.max_tokens
    parts, characters, whole = [], 0, True
    for document in corpus:
        if characters >= limit * CHARACTERS_PER_TOKEN:
            whole = False
            break
        parts.append(document.text)
        characters += len(document.text)
    text = "".join(parts)
    ids = as_stream(tokenizer, [text[: limit * CHARACTERS_PER_TOKEN]])
    if len(ids) < 2:
        raise UserError(f"{arguments.file}: expected at least 2 tokens, got {len(ids)}")
    if whole and characters <= limit * CHARACTERS_PER_TOKEN:
        left = f"{len(ids) - limit:,}" if len(ids) > limit else ""
    else:
        left = f"more than {max(len(ids) - limit, 0):,}"
    sentence = f"Left out: {left} tokens after the first {limit:,} (--max-tokens)." if left else ""
    return ids[:limit], sentence


def _measure(model: "PreTrainedModel", ids: "Tensor", count: int) -> tuple["Record", "Dependence | None"]:
    """Both passes and the runs without each span, with one progress bar over all tokens that they read."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from titans.inspection.ablate import cost, dependence, equal_spans, starts_of
    from titans.inspection.record import first_boundary, record

    tokens = len(ids)
    boundary, chunk = first_boundary(model), model.config.chunk_size
    spans = equal_spans(tokens, count, chunk, boundary) if count else ()
    total = 2 * tokens + cost(spans, tokens)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f} of {task.total:,.0f} tokens, {task.fields[rate]:,.0f} tokens/s"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as bar:
        task = bar.add_task("reading", total=total, rate=0)
        started = time.monotonic()

        def show(done: int) -> None:
            bar.update(task, completed=done, rate=done / (time.monotonic() - started))

        found, caches = record(model, ids, starts_of(spans), show)
        if not spans:
            return found, None
        bar.update(task, description="leaving out spans")
        return found, dependence(model, ids, spans, caches, lambda done: show(2 * tokens + done))


def _command(arguments: Arguments) -> str:
    words = ["titans", "inspect", arguments.file, "--model", str(arguments.model)]
    for name in ("max_tokens", "spans"):
        value, default = getattr(arguments, name), getattr(Arguments, name)
        if value != default:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(words)


def _write(path: Path, page: str) -> None:
    """The old file or the whole new one, whenever this ends."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(page, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _table(record: "Record", title: str) -> "Table":
    """One row per block: means over heads and tokens."""
    from rich.table import Table

    table = Table(title=title)
    for column in ("block", "surprise", "theta", "alpha", "eta", "change of the memory"):
        table.add_column(column, justify="right", no_wrap=True)
    for block in range(len(record.surprise)):
        gates = (record.theta, record.alpha, record.eta)
        table.add_row(
            str(block + 1),
            f"{record.surprise[block].mean():.3g}",
            *("-" if gate is None else f"{gate[block].mean(dtype='f8'):.3g}" for gate in gates),
            f"{(record.change[block, :, -1] / record.initial_norm[block]).mean():.1%}",
        )
    return table
