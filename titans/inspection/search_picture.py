"""Answers by depth and length as a picture."""

from __future__ import annotations

import io

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from titans.inspection.search_report import Found
from titans.inspection.tokens import visible

DPI = 160


def draw(found: Found, *, dark: bool = False) -> bytes:
    """A PNG file: a panel for each model, filled squares where it was right, crosses where it was not."""
    ink, page = ("#e9e7e2", "#1b1e24") if dark else ("#1c1e21", "#ffffff")
    right, wrong, edge = ("#a9cf62", "#f08a4b", "#333841") if dark else ("#8fb548", "#c8501e", "#dddad3")
    lengths = sorted({cell.length for cell in found.cells})
    depths = sorted({cell.depth for cell in found.cells})
    size = (2.2 + 1.1 * len(lengths) * len(found.sides), 1.2 + 0.55 * len(depths))
    figure = Figure(figsize=size, layout="constrained", facecolor=page)
    panels = figure.subplots(1, len(found.sides), sharey=True, squeeze=False)[0]
    for axes, side in zip(panels, found.sides, strict=True):
        for cell in found.cells:
            answer = cell.answers[side.name]
            x, y = lengths.index(cell.length), depths.index(cell.depth)
            good = answer is not None and answer.right
            axes.add_patch(
                Rectangle((x - 0.46, y - 0.44), 0.92, 0.88, facecolor=right if good else page, edgecolor=edge)
            )
            sign = "–" if answer is None else "✓" if good else "✗"
            colour = ink if answer is None or good else wrong
            axes.text(x, y, sign, ha="center", va="center", fontsize=13, color="#14161a" if good else colour)
        axes.set(
            xlim=(-0.6, len(lengths) - 0.4),
            ylim=(len(depths) - 0.4, -0.6),
            facecolor=page,
            xticks=range(len(lengths)),
            yticks=range(len(depths)),
            xticklabels=[f"{length:,}" for length in lengths],
            yticklabels=[f"{depth:.0%}" for depth in depths],
        )
        axes.set_title(visible(side.name), fontsize=10, color=ink, parse_math=False)
        axes.set_xlabel("tokens read", color=ink)
        axes.tick_params(colors=ink, length=0, labelsize=8)
        axes.spines[:].set_visible(False)
    panels[0].set_ylabel("depth of the fact", color=ink)
    file = io.BytesIO()
    figure.savefig(file, dpi=DPI, format="png")
    return file.getvalue()
