"""Plots of the recall tests: answers by length, and the picture by length and depth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from report_recall import BABILONG, NEEDLES, BySeed, Row, shares, short_length, short_name, spread


def plot_needles(record: Row, figure: Any) -> None:
    """A column for each task: answers by length, a line a model; below, each model by length and depth."""
    found = shares(record["rows"], lambda row: (row["model"], row["task"], row["length"]))
    by_depth = shares(
        record["rows"], lambda row: (row["model"], row["task"], row["depth_from"], row["length"])
    )
    models = list(dict.fromkeys(model for model, _, _ in found))
    lengths = sorted({length for _, _, length in found})
    depths = sorted({depth for _, _, depth, _ in by_depth})
    tasks = {task: short for task, short in NEEDLES.items() if any(task == each for _, each, _ in found)}
    figure.set_size_inches(4.2 * len(tasks), 3.4 + 2.4 * len(models))
    panels = figure.subplots(
        1 + len(models), len(tasks), squeeze=False, height_ratios=[3.4, *[2.4] * len(models)]
    )
    for column, (task, short) in enumerate(tasks.items()):
        _lines(
            {model: {n: found.get((model, task, n)) for n in lengths} for model in models}, panels[0][column]
        )
        panels[0][column].set(title=short, ylabel="% answered" if not column else "")
        for row, model in enumerate(models, 1):
            grid = [[by_depth.get((model, task, depth, n)) for n in lengths] for depth in depths]
            axes = panels[row][column]
            _heat(grid, lengths, [f"{depth:.0%}" for depth in depths], axes)
            axes.set(title=f"{short_name(model)}, {short}", ylabel="depth from" if not column else "")
    panels[0][0].legend(fontsize="small")


def plot_babilong(record: Row, figure: Any) -> None:
    """A panel for each task: answers by length, a line a model."""
    found = shares(record["rows"], lambda row: (row["model"], row["task"], row["length"]))
    models = list(dict.fromkeys(model for model, _, _ in found))
    lengths = sorted({length for _, _, length in found})
    tasks = {task: short for task, short in BABILONG.items() if any(task == each for _, each, _ in found)}
    figure.set_size_inches(3.4 * max(len(tasks), 2), 4.6)
    panels = figure.subplots(1, len(tasks), squeeze=False, sharey=True)[0]
    for axes, (task, short) in zip(panels, tasks.items(), strict=True):
        _lines({model: {n: found.get((model, task, n)) for n in lengths} for model in models}, axes)
        axes.set(title=short)
    panels[0].set(ylabel="% answered")
    lines = {line.get_label(): line for axes in panels for line in axes.get_lines()}
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=6, fontsize="small")


def plot_mqar(record: Row, figure: Any) -> None:
    """A panel for each model: values right by length and number of pairs."""
    found = shares(record["rows"], lambda row: (row["model"], row["pairs"], row["length"]))
    models = list(dict.fromkeys(model for model, _, _ in found))
    pairs = sorted({pairs for _, pairs, _ in found})
    lengths = sorted({length for _, _, length in found})
    columns = min(len(models), 4)
    lines = math.ceil(len(models) / columns)
    figure.set_size_inches(4 * columns, 3 * lines)
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes in panels:
        axes.set_visible(False)
    for axes, model in zip(panels, models, strict=False):
        axes.set_visible(True)
        grid = [[found.get((model, number, n)) for n in lengths] for number in pairs]
        _heat(grid, lengths, list(map(str, pairs)), axes)
        axes.set(title=short_name(model), ylabel="pairs")


def _lines(by_model: dict[str, dict[int, BySeed | None]], axes: Any) -> None:
    """The mean over seeds by length, between the lowest and the highest."""
    lengths: set[int] = set()
    for number, (model, by_length) in enumerate(by_model.items()):
        there = {length: spread(by_seed.values()) for length, by_seed in by_length.items() if by_seed}
        if there:
            lows, means, highs = zip(*there.values(), strict=True)
            # A model's own in every panel; colours alone would not tell more than ten apart.
            style = {"color": f"C{number % 10}", "linestyle": ("-", "--", ":")[number // 10 % 3]}
            (line,) = axes.plot(
                list(there), means, marker="o", markersize=3, label=short_name(model), **style
            )
            axes.fill_between(list(there), lows, highs, color=line.get_color(), alpha=0.15)
        lengths |= set(there)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(lengths), [short_length(length) for length in sorted(lengths)], fontsize="small")
    axes.minorticks_off()
    axes.set(ylim=(-3, 103))
    axes.grid(True, alpha=0.3)


def _heat(grid: Sequence[Sequence[BySeed | None]], lengths: list[int], names: list[str], axes: Any) -> None:
    """Mean percentages over seeds, lengths from left to right; empty where nothing was measured."""
    means = [[spread(cell.values())[1] if cell else math.nan for cell in line] for line in grid]
    axes.imshow(means, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
    for y, line in enumerate(means):
        for x, value in enumerate(line):
            if not math.isnan(value):
                colour = "black" if 15 < value < 85 else "white"
                axes.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize="small", color=colour)
    axes.set_xticks(range(len(lengths)), [short_length(length) for length in lengths], fontsize="small")
    axes.set_yticks(range(len(names)), names, fontsize="small")
