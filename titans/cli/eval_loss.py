"""``titans eval-loss``: loss by position over long streams of text."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from titans.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from titans.evaluation.stream_loss import StreamLoss


@dataclass(frozen=True)
class Arguments:
    """Read each file as one stream through a trained model, in constant memory; print the loss by position.

    Example: titans eval-loss runs/mac book.txt --buckets 1024 4096 16384
    """

    checkpoint: tyro.conf.Positional[Path]
    """A checkpoint, the output folder of titans train (its last checkpoint), or a shipped one's name."""
    files: tyro.conf.Positional[tuple[str, ...]]
    """Text files, plain or .gz or .xz; python-docs for the documentation that Python ships."""
    buckets: tuple[int, ...] = ()
    """Positions at which a new bucket starts; by default powers of two from 256."""
    piece: int = 1024
    """Tokens per forward pass: speed and memory, not the result."""
    max_tokens: int | None = None
    """Read only so many tokens of each stream."""
    json: Path | None = None
    """Also write the figures to this file."""


def run(arguments: Arguments) -> int:
    """Check the files, then the checkpoint, then read."""
    if not arguments.files:
        raise UserError("expected at least one file")
    if arguments.max_tokens is not None and arguments.max_tokens < 2:
        raise UserError(f"--max-tokens: expected at least 2, got {arguments.max_tokens}")

    from titans.data.sources import Corpus

    corpora = {file: Corpus([file]) for file in arguments.files}

    from rich.console import Console
    from transformers.utils import logging as transformers_logging

    from titans.evaluation.stream_loss import as_stream, stream_loss
    from titans.inference.checkpoint import load_checkpoint

    transformers_logging.disable_progress_bar()
    model, tokenizer, folder = load_checkpoint(arguments.checkpoint)
    console = Console()
    results: dict[str, StreamLoss] = {}
    for file, corpus in corpora.items():
        tokens = as_stream(tokenizer, (document.text for document in corpus))[: arguments.max_tokens]
        if len(tokens) < 2:
            raise UserError(f"{file}: expected at least 2 tokens, got {len(tokens)}")
        with console.status(f"{file}: {len(tokens):,} tokens"):
            results[file] = stream_loss(model, tokens, piece=arguments.piece, edges=arguments.buckets or None)
        console.print(loss_table(results[file], title=f"{file} through {folder}"))
    if arguments.json:
        contents = {
            "checkpoint": str(folder),
            "streams": {file: result.to_dict() for file, result in results.items()},
        }
        arguments.json.write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")
    return 0


def loss_table(result: "StreamLoss", title: str) -> "Table":
    """One row per bucket, the whole stream below."""
    from rich.table import Table

    table = Table(title=title)
    for column in ("position", "tokens", "loss (nats)", "bits/token", "tokens/s", "memory"):
        table.add_column(column, justify="right", no_wrap=True)
    for bucket in result.buckets:
        table.add_row(
            f"{bucket.start:,} - {bucket.stop:,}",
            f"{bucket.tokens:,}",
            f"{bucket.loss:.4f}",
            f"{bucket.loss / math.log(2):.4f}",
            f"{bucket.tokens_per_second:,.0f}",
            f"{bucket.memory_bytes / 2**20:,.0f} MiB",
        )
    table.add_section()
    table.add_row(
        "all",
        f"{result.tokens:,}",
        f"{result.loss:.4f}",
        f"{result.loss / math.log(2):.4f}",
        f"{result.tokens_per_second:,.0f}",
        f"{result.peak_memory_bytes / 2**20:,.0f} MiB peak",
    )
    return table
