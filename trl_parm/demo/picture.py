# SPDX-License-Identifier: Apache-2.0
"""The Pareto picture of a session, as SVG: it needs no script, follows the page's colours and tells more on hovering.

An open point is an answer of the base model, a filled one is guided, coloured by a weight; a line joins the two to one
question. One objective is drawn over the number of the question, more in planes.
"""

from __future__ import annotations

import html
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.colors import to_hex
from matplotlib.ticker import MaxNLocator

from trl_parm.evaluation import pareto_front
from trl_parm.evaluation.plots import SHADES

from .questions import Entry


WIDTH, HEIGHT = 420, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 46
MOST_PAIRED = 4
"""With more objectives a plane for every pair would be too many: then only neighbours share one."""


@dataclass(frozen=True)
class _Point:
    x: float
    y: float
    fill: str | None
    title: str
    question: int
    newest: bool


class _Scale:
    """Data to pixels, with some room at both ends."""

    def __init__(self, values: Sequence[float], start: float, end: float, whole: bool = False) -> None:
        low, high = min(values), max(values)
        room = 0.08 * (high - low) or max(0.5 if whole else 0.0, 0.1 * abs(high), 0.1)
        self.low, self.high, self.start, self.end = low - room, high + room, start, end
        locator = MaxNLocator(5, integer=whole)
        self.ticks = [t for t in locator.tick_values(self.low, self.high) if self.low <= t <= self.high]

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def picture(entries: Sequence[Entry], objectives: Sequence[str]) -> str:
    """HTML with the session's answers in planes of two objectives; a note if there are none."""
    if not any(entry.base or entry.guided for entry in entries):
        return '<div class="parm-empty">Every answer becomes a point here.</div>'
    k = len(objectives)
    if k == 1:
        planes = [_plane(_points(entries, objectives, None, 0), "question", objectives[0], whole=True, front=False)]
    else:
        indices = itertools.combinations(range(k), 2) if k <= MOST_PAIRED else itertools.pairwise(range(k))
        planes = [_plane(_points(entries, objectives, x, y), objectives[x], objectives[y]) for x, y in indices]
    return f'<div class="parm-planes">{"".join(planes)}</div>{_legend(k)}'


def shade(weight: float) -> str:
    """The colour of a weight from 0 to 1."""
    return to_hex(matplotlib.colormaps[SHADES](weight))


def _points(entries: Sequence[Entry], objectives: Sequence[str], x: int | None, y: int) -> list[_Point]:
    """The answers by two of their measures, or over the number of the question."""
    points = []
    for i, entry in enumerate(entries):
        for measured, name in ((entry.base, "base"), (entry.guided, "guided")):
            if measured is not None:
                fill = None if name == "base" else shade(1.0 if x is None else entry.weights[x])
                title = _title(entry, objectives, measured, name)
                across = i + 1 if x is None else measured[x]
                points.append(_Point(across, measured[y], fill, title, i, i == len(entries) - 1))
    return points


def _title(entry: Entry, objectives: Sequence[str], measured: Sequence[float], name: str) -> str:
    values = ", ".join(f"{one} {value:.2f}" for one, value in zip(objectives, measured, strict=True))
    weights = ", ".join(f"{one} {weight:.2f}" for one, weight in zip(objectives, entry.weights, strict=True))
    how = f" at α = ({weights}), β = {entry.beta:g}" if name == "guided" else ""
    return f"{name}{how}: {values}\n{_shortened(entry.prompt)}"


def _plane(points: Sequence[_Point], x_name: str, y_name: str, whole: bool = False, front: bool = True) -> str:
    xs = _Scale([p.x for p in points], LEFT, WIDTH - RIGHT, whole)
    ys = _Scale([p.y for p in points], HEIGHT - BOTTOM, TOP)
    parts = [_axes(xs, ys, x_name, y_name)]
    parts += [_front(points, xs, ys)] if front else []
    for _, group in itertools.groupby(points, key=lambda p: p.question):
        parts.append(_question(list(group), xs, ys))
    label = html.escape(f"{y_name} over {x_name} of {len(points)} answers")
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _axes(xs: _Scale, ys: _Scale, x_name: str, y_name: str) -> str:
    parts, floor, right = [], HEIGHT - BOTTOM, WIDTH - RIGHT
    for tick in xs.ticks:
        at = xs(tick)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{floor}"/>')
        parts.append(f'<text x="{at:.1f}" y="{floor + 15}" text-anchor="middle">{_number(tick)}</text>')
    for tick in ys.ticks:
        at = ys(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 3.5:.1f}" text-anchor="end">{_number(tick)}</text>')
    centre, middle = (LEFT + right) / 2, (TOP + floor) / 2
    parts.append(
        f'<text class="name" x="{centre}" y="{HEIGHT - 8}" text-anchor="middle">{html.escape(x_name)} →</text>'
        f'<text class="name" transform="translate(13 {middle}) rotate(-90)" text-anchor="middle">'
        f"{html.escape(y_name)} →</text>"
    )
    return "".join(parts)


def _front(points: Sequence[_Point], xs: _Scale, ys: _Scale) -> str:
    """A line through the answers that no other one beats in both objectives."""
    kept = pareto_front([[p.x, p.y] for p in points])
    best = sorted((p.x, p.y) for p, is_kept in zip(points, kept, strict=True) if is_kept)
    path = " ".join(f"{xs(x):.1f},{ys(y):.1f}" for x, y in best)
    return f'<polyline class="front" points="{path}"/>'


def _question(points: Sequence[_Point], xs: _Scale, ys: _Scale) -> str:
    newest = " newest" if points[0].newest else ""
    parts = []
    if len(points) == 2:
        (x1, y1), (x2, y2) = ((xs(p.x), ys(p.y)) for p in points)
        parts.append(f'<line class="pair{newest}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>')
    for p in points:
        kind = "guided" if p.fill else "base"
        fill = f' fill="{p.fill}"' if p.fill else ""
        parts.append(
            f'<circle class="{kind}{newest}" cx="{xs(p.x):.1f}" cy="{ys(p.y):.1f}" r="{6.5 if newest else 5}"{fill}>'
            f"<title>{html.escape(p.title)}</title></circle>"
        )
    return "".join(parts)


def _legend(k: int) -> str:
    colours = ", ".join(shade(i / 4) for i in range(5))
    bar = f'<span class="parm-bar" style="background: linear-gradient(90deg, {colours})"></span>'
    weight = f"<span>weight of the x axis' objective: 0 {bar} 1</span>" if k > 1 else ""
    front = '<span><i class="parm-line"></i> no answer beats these in both</span>' if k > 1 else ""
    return (
        '<div class="parm-legend"><span><i class="parm-dot"></i> base</span>'
        f'<span><i class="parm-dot" style="background: {shade(0.5 if k > 1 else 1.0)}"></i> guided</span>'
        f"{weight}{front}</div>"
    )


def _number(value: float) -> str:
    return f"{value:.3g}".replace("-", "−") if abs(value) > 1e-9 else "0"


def _shortened(text: str, most: int = 80) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= most else flat[: most - 1] + "…"
