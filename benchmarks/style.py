"""One look for every picture in docs/: 900 logical pixels wide, drawn at 2x, on a background that neither a
light nor a dark page makes ugly; no legend over data."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdxl_fixes.atomic import replacing

WIDTH, DPI = 9.0, 200  # inches of 100 logical pixels, each two dots wide
PAPER, INK, SOFT, LINE = "#f7f7f5", "#22252b", "#6b707a", "#d9dade"
ACCENT, DARK, OCHRE, GREEN, PALE = "#2f6fde", "#3b4252", "#c98a1b", "#3f8f6b", "#8b93a1"
COLOURS = (ACCENT, OCHRE, GREEN, DARK, PALE)  # the accent is for what the page speaks for
_STYLE = {
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": SOFT,
    "axes.titlecolor": INK,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.edgecolor": LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 2,
    "lines.markersize": 4,
    "legend.frameon": False,
}


def figure(height: float, columns: int = 1, rows: int = 1, **options: Any) -> tuple[Any, Any]:
    """A figure of the width of a page, ``height`` inches high, and its axes."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update(_STYLE)
    import matplotlib.pyplot as plt

    return plt.subplots(rows, columns, figsize=(WIDTH, height), layout="constrained", **options)


def save(figure: Any, path: Path) -> None:
    """Write a PNG of twice the logical size, or leave what is there."""
    import matplotlib.pyplot as plt
    from PIL import Image

    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=DPI, format="png")
    plt.close(figure)
    with replacing(path) as file:
        Image.open(buffer).convert("RGB").quantize(128).save(file, "PNG", optimize=True)


def line(axis: Any, x: Sequence[float], points: Sequence[tuple[float, float]], **options: Any) -> None:
    """Means with their intervals as a line and a band: (mean, half the width) for each of ``x``."""
    means, halves = zip(*points, strict=True)
    (drawn,) = axis.plot(x, means, marker="o", **options)
    low, high = ([m + sign * h for m, h in zip(means, halves, strict=True)] for sign in (-1, 1))
    axis.fill_between(x, low, high, color=drawn.get_color(), alpha=0.12, linewidth=0)


def name_ends(axis: Any, x: float, names: list[tuple[float, str, str]], apart: float) -> None:
    """Names of lines right of their ends, in place of a legend: (height, name, colour), no nearer to each
    other than ``apart``, in the axis' units."""
    names, groups = sorted(names), []  # groups: (mean height, how many)
    for height, _, _ in names:
        groups.append((height, 1))
        while len(groups) > 1 and groups[-1][0] - groups[-2][0] < apart * (groups[-1][1] + groups[-2][1]) / 2:
            (low, below), (high, above) = groups[-2:]
            groups[-2:] = [((low * below + high * above) / (below + above), below + above)]
    places = [mean + apart * (k - (count - 1) / 2) for mean, count in groups for k in range(count)]
    for place, (_, name, colour) in zip(places, names, strict=True):
        axis.annotate(
            name,
            (x, place),
            (10, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontsize=9,
            annotation_clip=False,
        )


def above(figure: Any) -> None:
    """One legend for the whole figure, above its axes."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=len(labels), fontsize=9)
