"""``titans demo``: text, baselines, training, saving, reloading, generating and streaming, in minutes."""

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from titans.data.prepare import prepare
from titans.data.shards import Meta, TokenShards
from titans.data.sources import PYTHON_DOCS
from titans.errors import UserError
from titans.recipes import load_recipe
from titans.training.checkpoints import checkpoints_in
from titans.training.recipe import DataSettings, Recipe

if TYPE_CHECKING:
    from rich.console import Console

    from titans.data.ngrams import NgramLosses
    from titans.evaluation.stream_loss import StreamLoss
    from titans.inference.checkpoint import LoadedCheckpoint

RECIPE = "demo_mac"
_VALIDATION_FRACTION = 0.1  # CPython's documentation is 470 KB: 2 % would be too short to stream
_STREAM_OVER_TRAINING_LENGTH = 64
_PROMPT_TOKENS = 64
_PICTURE = "demo.png"


@dataclass(frozen=True)
class Arguments:
    """Train a small model on text, and show what it can do: a few minutes on two CPU cores.

    It prints unigram and bigram baselines, trains a byte-level MAC model (1-2 M parameters), saves and
    reloads it, continues a text, and streams one much longer than it was trained on, in constant memory.
    """

    source: str = PYTHON_DOCS
    """A text file or folder; by default the documentation text that Python ships."""
    out: Path = Path("runs/demo")
    """Output folder. Started again, an interrupted demo goes on."""


def run(arguments: Arguments) -> int:
    """The demo with its own recipe."""
    return demo(load_recipe(RECIPE), arguments.source, arguments.out)


def demo(recipe: Recipe, source: str, out: Path) -> int:
    """Everything, in order; returns the exit code (130: interrupted, and can go on)."""
    assert isinstance(recipe.data, DataSettings)
    data = replace(recipe.data, folder=out / "data")
    recipe = replace(recipe, data=data)
    _prepare(source, data, out)

    import torch
    from rich.console import Console
    from transformers.utils import logging as transformers_logging

    from titans.data.ngrams import ngram_losses
    from titans.inference.checkpoint import load_checkpoint
    from titans.training.callbacks import LOG_NAME, read_log
    from titans.training.data import open_data
    from titans.training.run import train

    # The products are too small to share: a step takes 0.29 s on one core and 0.23 s on two, but seconds on
    # two that others use as well. It also keeps the figures from depending on the number of cores.
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    console = Console(highlight=False, soft_wrap=True)
    train_shards, validation = TokenShards(data.folder), TokenShards(data.folder, "val")
    console.rule("1. text")
    console.print(f"{source}: {len(train_shards):,} tokens to train on, {len(validation):,} held out")
    baselines = ngram_losses(train_shards, validation)
    console.print(
        f"nats per byte on the held-out text: unigram {baselines.unigram:.3f}, bigram {baselines.bigram:.3f}"
    )

    console.rule("2. training")
    started = time.monotonic()
    result = train(recipe, open_data(recipe), out, console=console)
    if result.ending != "finished" or result.checkpoint is None:
        console.print(f"{result.message}; the same command goes on from here")
        return 130 if result.ending == "interrupted" else 1
    console.print(f"{result.message}, {time.monotonic() - started:.0f} s; saved {result.checkpoint}")

    console.rule("3. the saved model, loaded again, continues a text")
    loaded = load_checkpoint(result.checkpoint)
    _generate(loaded, validation)

    console.rule("4. one long stream of held-out text, in constant memory")
    stream, restarted = _stream(loaded, validation, data.sequence_length, console)

    console.rule("result")
    log = read_log(out / LOG_NAME)
    _print_result(console, loaded, log, baselines, stream, restarted)
    if picture := _draw(out / _PICTURE, log, baselines, stream):
        console.print(f"picture: {picture}")
    _print_next(console, out)
    return 0


def _prepare(source: str, data: DataSettings, out: Path) -> None:
    """Token shards of ``source``, made anew until there is a checkpoint that depends on them."""
    folder = data.folder
    started = bool(checkpoints_in(out))
    if started:
        made_of = Meta.read(folder).sources
        if made_of != (source,):
            raise UserError(f"{out} holds a run on {', '.join(made_of)}, not {source}: choose another --out")
    else:
        prepare([source], folder, validation_fraction=_VALIDATION_FRACTION, overwrite=True)
    expected = data.sequence_length
    for name, split in Meta.read(folder).splits.items():
        if split.tokens < expected:
            raise UserError(
                f"{source}: too little text: {split.tokens} tokens in the split {name!r}, "
                f"expected at least {expected}"
            )


def _generate(loaded: "LoadedCheckpoint", validation: TokenShards) -> None:
    from titans.inference.generate import Sampling, generate_text

    model, tokenizer, _ = loaded
    start = int(validation.starts[0]) + 1  # after <bos>
    prompt_ids = validation.read(start, min(start + _PROMPT_TOKENS, len(validation)))
    prompt = str(tokenizer.decode(prompt_ids, skip_special_tokens=True)).rstrip("\ufffd")
    sys.stdout.write(f"{prompt} >>> ")
    for piece in generate_text(model, tokenizer, prompt, Sampling(max_new_tokens=200, temperature=0.7)):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def _stream(
    loaded: "LoadedCheckpoint", validation: TokenShards, sequence_length: int, console: "Console"
) -> tuple["StreamLoss", float]:
    """The stream's losses, and the mean loss on the same text, memory emptied every training length."""
    import torch

    from titans.cli.eval_loss import loss_table
    from titans.evaluation.stream_loss import powers_of_two, stream_loss

    tokens = torch.from_numpy(validation.read(0, len(validation)))
    if (bos := validation.meta.boundary_id) is not None:  # one stream: only its start is marked
        tokens = torch.cat([tokens[:1], tokens[1:][tokens[1:] != bos]])
    tokens = tokens[: _STREAM_OVER_TRAINING_LENGTH * sequence_length]
    stream = stream_loss(loaded.model, tokens, edges=powers_of_two(len(tokens), sequence_length))
    title = f"{len(tokens):,} tokens, {len(tokens) // sequence_length} times the training length"
    console.print(loss_table(stream, title))
    windows = [window for window in tokens.split(sequence_length) if len(window) > 1]
    losses = [stream_loss(loaded.model, window, edges=()).loss * (len(window) - 1) for window in windows]
    return stream, sum(losses) / sum(len(window) - 1 for window in windows)


def _print_result(
    console: "Console",
    loaded: "LoadedCheckpoint",
    log: list[dict[str, float]],
    baselines: "NgramLosses",
    stream: "StreamLoss",
    restarted: float,
) -> None:
    from rich.table import Table

    validation_loss = [record["eval_loss"] for record in log if "eval_loss" in record][-1]
    parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    table = Table()
    table.add_column("")
    table.add_column("nats per token", justify="right")
    table.add_row("unigram", f"{baselines.unigram:.3f}")
    table.add_row("bigram", f"{baselines.bigram:.3f}")
    table.add_row(
        f"this model ({parameters / 1e6:.2f} M parameters), validation", f"[bold]{validation_loss:.3f}[/]"
    )
    table.add_row("  on the stream, one memory from start to end", f"{stream.loss:.3f}")
    table.add_row("  on the same text, memory emptied every training length", f"{restarted:.3f}")
    console.print(table)
    if validation_loss >= baselines.bigram:
        console.print("The model does not beat the bigram: the text is too short, or the run was.")


def _draw(
    path: Path, log: list[dict[str, float]], baselines: "NgramLosses", stream: "StreamLoss"
) -> Path | None:
    """Loss while training and loss by position, side by side; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return None
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for key, style in (("loss", "-"), ("eval_loss", "o-")):
        points = [(record["step"], record[key]) for record in log if key in record]
        left.plot(
            *zip(*points, strict=True), style, label={"loss": "training", "eval_loss": "validation"}[key]
        )
    for name, loss in baselines._asdict().items():
        left.axhline(loss, linestyle="--", color="grey")
        left.annotate(name, (0, loss), va="bottom")
    left.set(xlabel="step", ylabel="loss (nats per token)")
    left.legend()
    edges = [max(bucket.start, 1) for bucket in stream.buckets] + [stream.tokens]
    right.stairs([bucket.loss for bucket in stream.buckets], edges, baseline=None)
    right.set(xlabel="position in the stream (tokens)", xscale="log")
    figure.savefig(path, dpi=120)
    return path


def _print_next(console: "Console", out: Path) -> None:
    console.print(
        "try next:\n"
        f'  titans generate {out} --prompt "The "\n'
        f"  titans eval-loss {out} FILE\n"
        "  titans demo --source FOLDER --out runs/mine\n"
        f"  titans train {RECIPE} --data.folder {out / 'data'} --model.variant lmm --out runs/lmm",
        markup=False,
    )
