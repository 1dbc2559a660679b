"""Draw what formats lose for their bits: divergence and perplexity, with both fronts.

draw(points, perplexity_of_the_original, Path("docs/pareto.svg"))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.lines import Line2D

from pareto import METHODS, Point, by_kl, front

# Okabe and Ito's colours, which colour-blind readers tell apart; families have shapes of their own.
COLOURS = dict(zip(METHODS, ("#999999", "#E69F00", "#0072B2", "#009E73"), strict=True))
MARKERS = {
    "int per group": "s",
    "int per channel": "D",
    "int with zero point": "P",
    "codebook": "o",
    "codebook of pairs": "^",
    "mxfp4": "X",
    "mixed": "*",
}
# Points between labels of a panel, and of their letters.
SPACING, LETTERS = 8.5, 7.0
# Of perplexity above it, in percent, differences are not noise.
LEAST = 0.1


def draw(points: Sequence[Point], base: float, path: Path) -> None:
    """Write the plot.

    Args:
        points: What was measured.
        base: Perplexity with unquantized blocks.
        path: An `.svg` or `.png` file.
    """
    pyplot.rcParams.update({"font.size": 9, "svg.hashsalt": "pareto", "svg.fonttype": "none"})
    figure, axes = pyplot.subplots(2, 1, figsize=(8, 11), sharex=True, layout="constrained")

    def above(point: Point) -> float:
        return 100 * (point.perplexity / base - 1)

    heights: tuple[Callable[[Point], float], ...] = (by_kl, above)
    for axis, height in zip(axes, heights, strict=True):
        for point in points:
            scatter(axis, point, height(point))
        axis.grid(alpha=0.25, linewidth=0.5)
    axes[0].set_ylabel("mean KL divergence, nats per token")
    axes[1].set_ylabel("perplexity above that of unquantized blocks")
    axes[0].set_yscale("log")
    axes[1].set_yscale("symlog", linthresh=1, linscale=0.6)
    axes[1].axhline(0, color="black", linewidth=0.5)
    axes[1].yaxis.set_major_formatter(lambda number, _: f"{number:+g} %")
    axes[1].set_xlabel("bits per weight, scales and tables included")
    axes[0].set_xlim(0.3, 9.1)
    for axis, height in zip(axes, heights, strict=True):
        best = front(list(points), height)
        axis.plot([p.bits for p in best], [height(p) for p in best], color="black", linewidth=0.8)
        name_points(figure, axis, [p for p in best if axis is axes[0] or height(p) > LEAST], height)
    legend(axes[0], points)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=110)


def scatter(axis: Any, point: Point, height: float) -> None:
    """Draw a point: a colour for its method, a shape for its family."""
    axis.scatter(
        point.bits,
        height,
        marker=MARKERS[point.family],
        s=64 if MARKERS[point.family] in "*PX" else 32,
        facecolor=COLOURS[point.method],
        edgecolor="white",
        linewidth=0.4,
        zorder=3,
    )


def name_points(
    figure: Any, axis: Any, best: Sequence[Point], height: Callable[[Point], float]
) -> None:
    """Name points of a front at its lower left, where no others are, one line for each."""
    figure.canvas.draw()
    scale, above = figure.dpi / 72, float("inf")
    for point in best:
        at = (point.bits, height(point))
        y = axis.transData.transform(at)[1] / scale
        above = min(y - 4, above - SPACING)
        axis.annotate(
            short(point.name),
            at,
            xytext=(-12, above - y),
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=LETTERS,
            arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": "#555555"},
        )


def short(name: str) -> str:
    """Return a format's name as a label: `LUT 3, 64 columns`."""
    for long, brief in (
        ("codebook ", "LUT "),
        (" bit", ""),
        (" a table", ""),
        ("1 rows", "1 row"),
        (" for 2 rows", " of pairs"),
        (" group ", " g"),
        ("integer zero points", "int zeros"),
        ("float zero points", "float zeros"),
    ):
        name = name.replace(long, brief)
    return name


def legend(axis: Any, points: Sequence[Point]) -> None:
    """Explain colours and shapes."""
    seen = {name for point in points for name in (point.family, point.method)}
    handles = [
        Line2D([], [], marker="o", linestyle="", color=colour, label=method)
        for method, colour in COLOURS.items()
        if method in seen
    ]
    handles += [
        Line2D([], [], marker=marker, linestyle="", color="#555555", label=name)
        for name, marker in MARKERS.items()
        if name in seen
    ]
    handles.append(Line2D([], [], color="black", linewidth=0.8, label="best for its bits"))
    axis.legend(handles=handles, loc="upper right", ncols=2, fontsize=8)
