"""The needle tests on the page of results: shares by length, and the picture by length and depth."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

TASKS = {"niah_single_1": "PK", "niah_single_2": "N", "niah_single_3": "W"}
# Table 2 of the paper (arXiv v1), 16K tokens: 760M parameters, 30 billion tokens of training.
PAPER = {"PK": 0.984, "N": 0.974, "W": 0.952}

Row = dict[str, Any]


def shares(rows: list[Row]) -> dict[tuple[str, str, int], dict[int, float]]:
    """(model, task, length) -> seed -> share of the samples answered, all depths together."""
    counts: dict[tuple[str, str, int, int], list[int]] = defaultdict(lambda: [0, 0])
    for row in rows:
        if row.get("kind") == "test" and row.get("task") in TASKS and "error" not in row:
            count = counts[row["model"], row["task"], row["length"], row["seed"]]
            count[0] += row["correct"]
            count[1] += row["samples"]
    found: dict[tuple[str, str, int], dict[int, float]] = defaultdict(dict)
    for (model, task, length, seed), (correct, samples) in counts.items():
        found[model, task, length][seed] = correct / samples
    return found


def needles(record: Row, table: Callable[[list[str], list[list[str]]], str], title: str) -> str:
    """The section: how the models were trained, and what they answer at which length."""
    rows = record["rows"]
    trained = [row for row in rows if row.get("kind") == "training"]
    parts = [
        f"## {title}\n",
        "RULER's single needles (S-NIAH-PK, -N and -W of the paper) in held-out books, lengths in Llama-2 "
        "tokens; trained on rows of at most "
        f"{max((max(row['recipe']['data']['lengths']) for row in trained), default=0):,} tokens of other "
        "books. Percent of the samples whose answer is exactly what greedy decoding begins with; with "
        "several seeds their mean and, in brackets, the lowest and the highest.\n",
        _trainings(trained, table),
        "",
        _answers(rows, table),
        "\nThe paper's Titans (MAC), 760M parameters, at 16K: "
        + ", ".join(f"{task} {share:.1%}" for task, share in PAPER.items())
        + ". Its models are trained on text; these on needles alone.\n",
    ]
    return "\n".join(parts)


def _trainings(trained: list[Row], table: Callable[[list[str], list[list[str]]], str]) -> str:
    lines = [
        [
            row["model"],
            str(row["seed"]),
            f"{row['parameters'] / 1e6:.2f}",
            row["ending"],
            f"{row['steps']:,}",
            f"{row['tokens'] / 1e6:,.0f}",
            f"{row['seconds']:.0f}",
            f"{row['validation'][-1]['eval_answer_accuracy']:.1%}" if row["validation"] else "",
            f"{row['max_grad_norm']:.1f}" if row["max_grad_norm"] is not None else "",
        ]
        for row in trained
    ]
    header = ["model", "seed", "M parameters", "ending", "steps", "M tokens", "seconds"]
    return table([*header, "answers right in validation", "largest gradient norm"], lines)


def _answers(rows: list[Row], table: Callable[[list[str], list[list[str]]], str]) -> str:
    found = shares(rows)
    lengths = sorted({length for _, _, length in found})
    lines = []
    for model in dict.fromkeys(model for model, _, _ in found):
        for task, short in TASKS.items():
            cells = [_cell(found.get((model, task, length), {})) for length in lengths]
            lines.append([model, short, *cells])
    samples = next((row["rows"] for row in rows if row.get("kind") == "test" and "rows" in row), 0)
    header = ["model", f"task ({samples} samples)", *map(short_length, lengths)]
    return table(header, lines)


def _cell(by_seed: dict[int, float]) -> str:
    if not by_seed:
        return ""
    values = [100 * share for share in by_seed.values()]
    mean = f"{sum(values) / len(values):.0f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.0f}-{max(values):.0f})"


def short_length(length: int) -> str:
    """2048 -> 2K, 2097152 -> 2M."""
    for unit, name in ((1 << 20, "M"), (1 << 10, "K")):
        if length % unit == 0:
            return f"{length // unit}{name}"
    return str(length)


def plot_needles(record: Row, figure: Any) -> None:
    """Left: answers by length, a line a model, all tasks. Right: the best model by length and depth."""
    found = shares(record["rows"])
    lengths = sorted({length for _, _, length in found})
    left, right = figure.subplots(1, 2)
    means: dict[str, list[float | None]] = {}
    for model in dict.fromkeys(model for model, _, _ in found):
        points: list[float | None] = []
        for length in lengths:
            values = [share for task in TASKS for share in found.get((model, task, length), {}).values()]
            points.append(100 * sum(values) / len(values) if values else None)
        means[model] = points
        there = [(length, point) for length, point in zip(lengths, points, strict=True) if point is not None]
        left.plot(*zip(*there, strict=True), marker="o", label=model.removeprefix("needle_"))
    left.set_xscale("log", base=2)
    left.set_xticks(lengths, [short_length(length) for length in lengths])
    left.set(xlabel="Llama-2 tokens", ylabel="% answered, three tasks", ylim=(-3, 103))
    left.grid(True, alpha=0.3)
    left.legend(fontsize="small")
    best = max(means, key=lambda model: sum(point or 0.0 for point in means[model]))
    _heat(record["rows"], best, lengths, right)


def _share(count: list[int]) -> float:
    return 100 * count[0] / count[1] if count[1] else math.nan


def _heat(rows: list[Row], model: str, lengths: list[int], axes: Any) -> None:
    depths = sorted({row["depth_from"] for row in rows if "depth_from" in row})
    counts = {(depth, length): [0, 0] for depth in depths for length in lengths}
    for row in rows:
        if (
            row.get("kind") == "test"
            and row["model"] == model
            and row.get("task") in TASKS
            and "correct" in row
        ):
            count = counts[row["depth_from"], row["length"]]
            count[0] += row["correct"]
            count[1] += row["samples"]
    grid = [[_share(counts[depth, length]) for length in lengths] for depth in depths]
    axes.imshow(grid, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
    for y, line in enumerate(grid):
        for x, value in enumerate(line):
            if value == value:
                axes.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize="small")
    axes.set_xticks(range(len(lengths)), [short_length(length) for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.set(
        title=f"{model.removeprefix('needle_')}: % answered", xlabel="Llama-2 tokens", ylabel="depth from"
    )
