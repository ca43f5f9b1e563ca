"""One experiment: train a recipe on tasks for some steps or seconds, then test the model at many lengths."""

from __future__ import annotations

import copy
import os
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, set_seed

from titans.errors import UserError
from titans.nn import ShortConv
from titans.tasks.answers import Asked, right
from titans.tasks.dataset import TokenMaker
from titans.tasks.needle_test import NeedleTest, run_test
from titans.tasks.settings import TaskSettings
from titans.training.callbacks import LOG_NAME, read_log
from titans.training.data import open_data
from titans.training.recipe import Recipe
from titans.training.run import build_model, train

PROBE = (
    0.15  # of the time: steps to see their speed before the schedule is fixed; kernels compile in the first
)
PROBE_STEPS = 400  # at most
_TRAINING = 0.9  # of the time left then; validation and the checkpoint take the rest
_LATE = 1.15  # a training that takes so much longer than its budget is ended

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The model in evaluation mode, and how it came about, as plain values."""

    model: PreTrainedModel
    row: Row


def train_model(
    recipe: Recipe,
    *,
    seconds: float | None = None,
    start: Path | None = None,
    console: Console | None = None,
) -> Trained:
    """Train ``recipe``; with ``seconds`` for as many steps as fit, start and measuring the speed included.

    start: weights that `save_weights` has written, of the same model: another leg of its training.

    The number of steps is fixed before training, so that the learning rate ends where it should. A run that
    diverges is a result, too: the model is that before the step.
    """
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        probed = None
        if seconds is not None:
            probed = seconds_a_step(recipe, out / "probe", PROBE * seconds)
            left = seconds - (time.monotonic() - started)
            recipe = with_steps(recipe, max(int(_TRAINING * left / probed), 1))
        data = open_data(recipe)
        set_seed(recipe.training.seed)
        model = build_model(recipe, data)
        if start is not None:
            load_weights(model, start)
        deadline = None if seconds is None else _LATE * seconds - (time.monotonic() - started)
        begun = time.monotonic()
        with _ended_after(deadline):
            result = train(recipe, data, out / "run", model=model, console=console or Console(quiet=True))
        took = time.monotonic() - begun
        log = read_log(out / "run" / LOG_NAME)
    losses = [(record["step"], record["loss"]) for record in log if "loss" in record]
    norms = [record["grad_norm"] for record in log if record.get("grad_norm") is not None]
    speeds = [record["tokens_per_second"] for record in log if "tokens_per_second" in record]
    row = {
        "recipe": recipe.to_dict(),
        "seed": recipe.training.seed,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "ending": result.ending,
        "message": result.message,
        "steps": result.step,
        "tokens": log[-1].get("tokens_seen") or max((r.get("tokens_seen", 0) for r in log), default=0),
        "seconds": took,
        "seconds_a_step_probed": probed,
        "median_tokens_per_second": statistics.median(speeds) if speeds else None,
        "loss": losses[:: max(len(losses) // 60, 1)],
        "validation": [
            {key: value for key, value in record.items() if key == "step" or key.startswith("eval_")}
            for record in log
            if "eval_loss" in record
        ],
        "write_share": [(r["step"], r["write_share"]) for r in log if "write_share" in r][-1:],
        "median_grad_norm": statistics.median(norms) if norms else None,
        "max_grad_norm": max(norms, default=None),
    }
    return Trained(model=model.eval(), row=row)


def untrained(recipe: Recipe, start: Path) -> Trained:
    """The recipe's model with the weights that `save_weights` has written to ``start``, as they are.

    Where training would have left it: on the GPU, if there is one.
    """
    model = build_model(recipe, open_data(recipe))
    load_weights(model, start)
    if torch.cuda.is_available():
        model.to("cuda")
    row = {
        "recipe": recipe.to_dict(),
        "seed": recipe.training.seed,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "ending": "not trained",
        "message": f"the weights of {start.name}",
        "steps": 0,
    }
    return Trained(model=model.eval(), row=row)


def with_steps(recipe: Recipe, steps: int) -> Recipe:
    """The recipe cut to ``steps``: a tenth of them at most to warm up, five evaluations, one checkpoint."""
    training = replace(
        recipe.training,
        steps=steps,
        warmup_steps=min(recipe.training.warmup_steps, steps // 10),
        eval_every=max(steps // 5, 1),
        save_every=steps,
    )
    return replace(recipe, training=training)


def seconds_a_step(recipe: Recipe, out: Path, seconds: float) -> float:
    """Of the recipe's training on this machine as it is now, by a short one that is thrown away.

    All lengths are drawn from the start, as they are later; what was done in the last third of ``seconds``
    counts, when others that started beside it have compiled their kernels, too: of mac's seconds a step over
    the second half of the steps, seven eighths were compilation.
    """
    short = with_steps(recipe, PROBE_STEPS)
    short = replace(short, training=replace(short.training, eval_every=PROBE_STEPS, save_every=PROBE_STEPS))
    if isinstance(short.data, TaskSettings):
        short = replace(short, data=replace(short.data, curriculum_steps=0))
    data = replace(open_data(short), validation=None)
    with _ended_after(seconds):
        train(short, data, out, console=Console(quiet=True))
    log = [record for record in read_log(out / LOG_NAME) if "tokens_per_second" in record]
    if len(log) < 2:
        raise UserError("the model diverges at once, or takes too long for a step")
    seen = [0, *(record["tokens_seen"] for record in log)]
    times = [
        (now - before) / record["tokens_per_second"]
        for before, now, record in zip(seen, seen[1:], log, strict=False)
    ]
    late, left = [], sum(times) / 3
    while times and left > 0:
        late.append(times.pop())
        left -= late[-1]
    return statistics.median(late)


def needle_rows(
    model: PreTrainedModel,
    paths: Sequence[Path],
    *,
    rows: int | None = None,
    until: float = float("inf"),
    wait: float = 600.0,
) -> Iterator[Row]:
    """Scores by depth on the tests at ``paths``, shortest first, each as soon as its file is there.

    Args:
        rows: samples at once; None: all.
        until: `time.monotonic()` after which nothing more is begun, nor what would end after it.
        wait: seconds that a file may be late.
    """
    pace = 0.0  # seconds a token of all rows, of the test before
    for path in paths:
        patience = min(time.monotonic() + wait, until)
        while not path.exists() and time.monotonic() < patience:
            time.sleep(0.2)
        if not path.exists():
            yield {"test": path.stem, "error": "not measured: its samples are not there"}
            continue
        test = NeedleTest.load(path)
        if time.monotonic() + pace * test.asked.ids.size > until:
            yield {"test": path.stem, "error": "not measured: out of time"}
            continue
        found, measured = _measured(model, lambda test=test: run_test(model, test, rows=rows))  # type: ignore[misc]
        pace = measured["seconds"] / test.asked.ids.size
        facts = {
            "rows": len(test.asked.ids),
            "model_tokens": int(test.asked.ids.shape[1]),
            "tokens_per_second": test.asked.ids.size / measured["seconds"],
        }
        for score in found:
            yield score.to_dict() | facts | measured


def token_rows(
    model: PreTrainedModel, settings: TaskSettings, lengths: Sequence[int], *, samples: int, seed: int
) -> Iterator[Row]:
    """The share of right tokens at each of ``lengths``, with each number of pairs that fits, on a task of
    tokens (MQAR, selective copying)."""
    maker = TokenMaker(settings)
    for length, pairs in [(each, pairs) for each in lengths for pairs in maker.pairs(each)]:
        asked = Asked.of_batch(maker.task(length, pairs, seed).batch(0, samples))
        hits, measured = _measured(model, lambda asked=asked: right(model, asked))  # type: ignore[misc]
        yield {
            "task": settings.tasks[0],
            "length": length,
            "pairs": pairs,
            "samples": samples,
            "tokens_asked": len(hits),
            "tokens_correct": int(hits.sum()),
            "tokens_per_second": asked.ids.size / measured["seconds"],
        } | measured


def save_weights(model: PreTrainedModel, path: Path, dtype: torch.dtype) -> None:
    """The weights alone, in ``dtype`` but for gates and initial memory, which stay in fp32: a gate that was
    exactly zero must stay so. The head that is tied to the embedding is left out."""
    stored = copy.deepcopy(model).to("cpu", dtype)
    tied = set(model._tied_weights_keys) if model.config.tie_word_embeddings else set()
    weights = {
        name: tensor.detach().contiguous() for name, tensor in stored.state_dict().items() if name not in tied
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, path, metadata={"config": model.config.to_json_string()})


def load_weights(model: PreTrainedModel, path: Path) -> None:
    """What `save_weights` has written, into the model's own dtypes.

    A convolution may have grown: its weights for older tokens start at zero, so nothing is lost.

    Raises:
        UserError: they are another model's.
    """
    weights = load_file(path)
    for name, module in model.named_modules():
        stored = weights.get(f"{name}.weight")
        if isinstance(module, ShortConv) and stored is not None and stored.shape[1] < module.width:
            weights[f"{name}.weight"] = F.pad(stored, (module.width - stored.shape[1], 0))
    try:
        found = model.load_state_dict(weights, strict=False)
        tied = set(model._tied_weights_keys) if model.config.tie_word_embeddings else set()
        if set(found.missing_keys) - tied or found.unexpected_keys:
            raise RuntimeError(f"{found.missing_keys[:3]} missing, {found.unexpected_keys[:3]} unknown")
    except RuntimeError as error:
        raise UserError(f"{path}: the weights are not this model's: {error}") from error


def _measured(model: PreTrainedModel, work: Callable[[], Any]) -> tuple[Any, Row]:
    """The work's result, its seconds, and on a GPU the most memory that it held."""
    cuda = model.device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(model.device)
    started = time.perf_counter()
    result = work()  # ends with a copy to the host
    measured: Row = {"seconds": time.perf_counter() - started}
    if cuda:
        measured["peak_memory_bytes"] = torch.cuda.max_memory_allocated(model.device)
    return result, measured


@contextmanager
def _ended_after(seconds: float | None) -> Iterator[None]:
    """Ask this process to end its training after so long, as Ctrl-C would."""
    if seconds is None:
        yield
        return
    timer = threading.Timer(max(seconds, 0.0), os.kill, [os.getpid(), signal.SIGTERM])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
