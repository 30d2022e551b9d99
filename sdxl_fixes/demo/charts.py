"""Charts as SVG inside a page, in the page's colours: rows of dots, and lines."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

LEFT, RIGHT, WIDTH, ROW, TOP = 130, 34, 640, 30, 26  # of a drawing, in its units


@dataclass(frozen=True)
class Dots:
    """One row: what was asked, and what each network gave, all 0 to 1."""

    name: str
    asked: float
    got: Sequence[float]


def dot_rows(title: str, rows: Sequence[Dots], classes: Sequence[str]) -> str:
    """A row per place: a bar from what was asked to what the first network gave, a dot per network (of the
    classes ``classes``), and a tick where it was asked. The axis is 0 to 100 % whatever the numbers."""
    height = TOP + ROW * len(rows) + 26
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{html.escape(title)}">'
    ]
    for percent in range(0, 101, 25):
        x = _x(percent / 100)
        parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{TOP - 8}" y2="{height - 24}"/>')
        parts.append(f'<text class="axis" x="{x}" y="{height - 6}" text-anchor="middle">{percent} %</text>')
    for number, row in enumerate(rows):
        y = TOP + ROW * number + ROW / 2 - 4
        parts.append(f'<text class="name" x="0" y="{y + 5}">{html.escape(row.name)}</text>')
        ends = _x(row.asked), _x(row.got[0])
        parts.append(f'<line class="miss" x1="{ends[0]}" x2="{ends[1]}" y1="{y}" y2="{y}"/>')
        for value, name in zip(row.got, classes, strict=True):
            radius = 9 if name in ("control", "v_alone") else 6  # rings, so that they hide nothing
            parts.append(f'<circle class="{name}" cx="{_x(value)}" cy="{y}" r="{radius}"/>')
        x = ends[0]
        parts.append(f'<line class="asked" x1="{x}" x2="{x}" y1="{y - 10}" y2="{y + 10}"/>')
    return "".join(parts) + "</svg>"


def _x(share: float) -> float:
    """Where a share is drawn; what lies outside 0 to 1 is drawn at the edge."""
    return round(LEFT + (WIDTH - LEFT - RIGHT) * min(1.0, max(0.0, share)), 1)
