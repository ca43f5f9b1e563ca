"""The page's figures as PNG files, for papers: one line per block, means over heads."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, LogNorm, PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from titans.inspection.ablate import Dependence
from titans.inspection.page import About
from titans.inspection.record import Record
from titans.inspection.tokens import visible

COLUMNS = 240  # points of a curve: noise of single tokens would hide it
DPI = 200
TEXT_LINES, TEXT_WIDTH, TEXT_SIZE = 24, 88, 8.0
ADVANCE = 0.602  # em, of a character of DejaVu Sans Mono, which matplotlib brings

Array = npt.NDArray[np.floating]


def draw(
    folder: Path, about: About, texts: list[str], record: Record, dependence: Dependence | None
) -> list[Path]:
    """Write text.png, surprise.png, gates.png, change.png, loss.png and dependence.png into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "text": _text(texts, record),
        "surprise": _surprise(record),
        "gates": _gates(record),
        "change": _change(record),
        "loss": _loss(record),
    }
    if dependence is not None:
        figures["dependence"] = _dependence(dependence)
    paths = []
    for name, figure in figures.items():
        figure.suptitle(visible(f"{about.source}, {about.model}"), fontsize=8, color="0.4", x=0.01, ha="left")
        paths.append(folder / f"{name}.png")
        with (
            warnings.catch_warnings()
        ):  # a script that DejaVu Sans Mono lacks: boxes stand for its characters
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            figure.savefig(paths[-1], dpi=DPI)
    return paths


def averaged(values: Array, columns: int = COLUMNS) -> tuple[Array, Array]:
    """Middles of at most `columns` equal stretches of `[..., T]`, and the means in them."""
    size = -(-values.shape[-1] // columns)
    starts = np.arange(0, values.shape[-1], size)
    lengths = np.diff([*starts, values.shape[-1]])
    return starts + lengths / 2, np.add.reduceat(values, starts, axis=-1, dtype=np.float64) / lengths


def _axes(height: float, columns: int = 1, **options: Any) -> tuple[Figure, Any]:
    figure = Figure(figsize=(7, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False, **options)[0]
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.grid(alpha=0.25)
        each.set_xlabel("position (tokens)")
    return figure, axes


def _per_block(axes: Any, at: Array, values: Array, **options: Any) -> None:
    """values `[M, N]`, dark to light from the first block to the last."""
    for block, row in enumerate(values):
        colour = colormaps["viridis"](0.85 * block / max(len(values) - 1, 1))
        axes.plot(at, row, color=colour, linewidth=1, label=f"block {block + 1}", **options)


def _surprise(record: Record) -> Figure:
    figure, (axes,) = _axes(2.6)
    _per_block(axes, *averaged(record.surprise.mean(1)))
    axes.set_ylabel("surprise $\\|\\nabla\\ell\\|$")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7, ncols=4, frameon=False)
    return figure


def _gates(record: Record) -> Figure:
    known = {
        "step size $\\theta$": record.theta,
        "forgetting $\\alpha$ a token": record.alpha,
        "momentum $\\eta$": record.eta,
    }
    gates = {name: gate for name, gate in known.items() if gate is not None}
    figure, axes = _axes(2.6, len(gates))
    for each, (name, gate) in zip(axes, gates.items(), strict=True):
        mean = gate.mean(1, dtype=np.float64)  # [M, L, T]
        for layer in range(mean.shape[1]):
            at, values = averaged(mean[:, layer], 120)
            _per_block(each, at, values, linestyle=("-", "--", "-.", ":")[layer])
        each.set_title(name, fontsize=9)
        each.locator_params(axis="x", nbins=4)
    axes[0].set_yscale("log")
    lines = ("solid $W_1$", "dashed $W_2$", "dash-dotted $W_3$", "dotted $W_4$")[: record.theta.shape[2]]
    axes[0].set_ylabel(", ".join(lines) if len(lines) > 1 else "", fontsize=8)
    return figure


def _change(record: Record) -> Figure:
    figure, (axes,) = _axes(2.6)
    _per_block(axes, record.change_at.astype(float), (record.change / record.initial_norm[..., None]).mean(1))
    axes.set_ylabel("$\\|M - M_0\\| / \\|M_0\\|$")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7, ncols=4, frameon=False)
    return figure


def _loss(record: Record) -> Figure:
    figure, (axes,) = _axes(2.6)
    for name, loss, colour in (
        ("without writes", record.frozen_loss, "0.6"),
        ("with memory", record.loss, "C0"),
    ):
        at, values = averaged(loss[None], 60)
        axes.plot(1 + at, values[0], color=colour, label=f"{name}: {loss.mean():.3f}")
    axes.set_ylabel("loss (nats per token)")
    axes.legend(fontsize=7, frameon=False)
    return figure


def _dependence(dependence: Dependence) -> Figure:
    figure, axes = _axes(3.2, 2, sharey=True)
    panels = {
        "retrieval: $\\|y' - y\\| / \\|y\\|$, mean of the blocks": dependence.retrieval.mean(
            1, dtype=np.float64
        ),
        "prediction: KL divergence (nats)": dependence.prediction,
    }
    edges = [*(first for first, _ in dependence.spans), dependence.spans[-1][1]]
    for each, (name, values) in zip(axes, panels.items(), strict=True):
        control = float(values[-1, values.shape[-1] // 2 :].mean())
        _, cells = averaged(values[:-1], 300)
        norm = PowerNorm(0.5, vmin=0, vmax=max(float(np.quantile(cells, 0.99)), 1e-12))
        places = np.linspace(0, values.shape[-1], cells.shape[-1] + 1)
        mesh = each.pcolormesh(places, edges, cells, cmap="Blues", norm=norm, rasterized=True)
        each.set_title(f"{name}\ncontrol, second half: {control:.2g}", fontsize=8)
        each.grid(visible=False)
        each.locator_params(axis="x", nbins=4)
        figure.colorbar(mesh, ax=each)
    axes[0].set_ylabel("span left out (tokens)")
    axes[0].invert_yaxis()
    return figure


def _text(texts: list[str], record: Record) -> Figure:
    """The first lines of the text; every token's background is its surprise, mean over blocks and heads."""
    surprise = record.surprise.mean((0, 1))
    low, high = (max(float(value), 1e-9) for value in np.quantile(surprise, (0.02, 0.99)))
    high = max(high, low * 1.001)
    norm = LogNorm(low, high, clip=True)
    colours = LinearSegmentedColormap.from_list("surprise", colormaps["Oranges"](np.linspace(0, 0.6, 64)))
    cell = TEXT_SIZE * ADVANCE / 72, TEXT_SIZE * 1.5 / 72  # inches
    figure = Figure(figsize=(TEXT_WIDTH * cell[0] + 0.9, TEXT_LINES * cell[1] + 0.4), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(0, TEXT_WIDTH), ylim=(TEXT_LINES, 0))
    axes.axis("off")
    for line, characters in enumerate(_wrapped(texts)):
        for column, (character, token) in enumerate(characters):
            shade = colours(norm(float(surprise[token])))
            axes.add_patch(Rectangle((column, line + 0.06), 1, 0.88, facecolor=shade, linewidth=0))
            if not character.isspace():
                axes.text(
                    *(column + 0.5, line + 0.5, character),
                    family="DejaVu Sans Mono",
                    size=TEXT_SIZE,
                    ha="center",
                    va="center",
                    parse_math=False,
                )
    bar = figure.colorbar(ScalarMappable(norm, colours), ax=axes, shrink=0.5, pad=0.01, aspect=12)
    bar.minorticks_off()
    bar.set_ticks([low, high], labels=[f"{low:.3g}", f"{high:.3g}"], fontsize=8)
    bar.set_label("surprise $\\|\\nabla\\ell\\|$", fontsize=8)
    return figure


def _wrapped(texts: list[str]) -> list[list[tuple[str, int]]]:
    """The first TEXT_LINES lines, broken after a space where there is one, as characters and their tokens."""
    lines: list[list[tuple[str, int]]] = [[]]
    for token, text in enumerate(texts):
        for character in visible(text).replace("\t", "    "):
            if character == "\n":
                lines.append([])
                continue
            if len(lines[-1]) == TEXT_WIDTH:
                words = [i for i, (each, _) in enumerate(lines[-1], start=1) if each == " "]
                cut = words[-1] if words and words[-1] > TEXT_WIDTH // 2 else TEXT_WIDTH
                lines[-1], rest = lines[-1][:cut], lines[-1][cut:]
                lines.append(rest)
            lines[-1].append((character, token))
        if len(lines) > TEXT_LINES:
            break
    return lines[:TEXT_LINES]
