"""``titans prepare``: text -> token shards on disk."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from titans.data.prepare import (
    DEFAULT_VALIDATION_FRACTION,
    check_arguments,
    check_output_is_no_source,
    prepare,
)
from titans.data.shards import DEFAULT_SHARD_SIZE, Meta
from titans.data.sources import Corpus


@dataclass(frozen=True)
class Arguments:
    """Turn text into token shards, which `titans train` reads.

    Example: titans prepare books/ notes.txt more.jsonl.xz --out shards
    """

    sources: tyro.conf.Positional[tuple[str, ...]]
    """Text files, folders, JSON lines, .gz or .xz of those, - for standard input, python-docs for the
    documentation that Python ships, or a Hugging Face data set (owner/name)."""
    out: Path
    """The folder to make."""
    tokenizer: str = "bytes"
    """bytes, or the path of a Hugging Face tokenizer (folder or tokenizer.json) or SentencePiece model."""
    format: Literal["auto", "text", "jsonl"] = "auto"
    """What the files and standard input hold; auto goes by the suffix."""
    text_field: str = "text"
    """The field of JSON lines and data sets that holds the text."""
    dataset_config: str | None = None
    """The Hugging Face data set's configuration."""
    dataset_split: str = "train"
    """The Hugging Face data set's split."""
    validation_fraction: float = DEFAULT_VALIDATION_FRACTION
    """The share of the tokens held out for validation, by whole documents."""
    validation_documents: int | None = None
    """Hold out exactly this many documents instead."""
    shard_size: int = DEFAULT_SHARD_SIZE
    """Tokens per shard."""
    seed: int = 0
    """Of the choice of validation documents."""
    overwrite: bool = False
    """Replace the folder if an earlier run made it."""


def run(arguments: Arguments) -> int:
    """Check everything that can be checked at once, then tokenize with a progress bar and print a table."""
    check_arguments(
        arguments.out,
        arguments.validation_fraction,
        arguments.validation_documents,
        arguments.shard_size,
        arguments.overwrite,
    )
    corpus = Corpus(
        arguments.sources,
        text_field=arguments.text_field,
        input_format=arguments.format,
        dataset_config=arguments.dataset_config,
        dataset_split=arguments.dataset_split,
    )
    check_output_is_no_source(arguments.out, corpus)
    started = time.monotonic()
    with _progress_bar() as bar:
        task = bar.add_task("reading", total=corpus.size, documents=0, tokens=0, speed=0)

        def show(documents: int, tokens: int, bytes_read: int) -> None:
            speed = tokens / (time.monotonic() - started)
            bar.update(task, completed=bytes_read, documents=documents, tokens=tokens, speed=speed)

        meta = prepare(
            corpus,
            arguments.out,
            arguments.tokenizer,
            validation_fraction=arguments.validation_fraction,
            validation_documents=arguments.validation_documents,
            shard_size=arguments.shard_size,
            seed=arguments.seed,
            overwrite=arguments.overwrite,
            progress=show,
        )
    _print_summary(arguments.out, meta, corpus.empty, time.monotonic() - started)
    return 0


def _progress_bar() -> Progress:
    return Progress(
        SpinnerColumn(),
        BarColumn(),
        TextColumn("{task.fields[documents]:,} documents, {task.fields[tokens]:,} tokens"),
        TextColumn("{task.fields[speed]:,.0f} tokens/s"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )


def _print_summary(out: Path, meta: Meta, empty: int, seconds: float) -> None:
    total = sum(split.tokens for split in meta.splits.values())
    table = Table(title=f"{out}: {meta.tokenizer['name']} tokens, {meta.vocab_size:,} ids, {meta.dtype}")
    table.add_column("split")
    for column in ("documents", "tokens", "share", "shards"):
        table.add_column(column, justify="right")
    for name, split in meta.splits.items():
        share = f"{split.tokens / total:.2%}"
        table.add_row(name, f"{split.documents:,}", f"{split.tokens:,}", share, str(len(split.shards)))
    console = Console()
    console.print(table)
    if meta.validation == "position":
        console.print("There is one document only: its last part is the validation split.")
    if meta.validation == "none":
        console.print("No validation split was asked for.")
    if empty:
        console.print(f"{empty:,} empty documents were left out.")
    console.print(f"{total:,} tokens in {seconds:.1f} s ({total / seconds:,.0f} tokens/s)")
