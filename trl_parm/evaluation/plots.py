# SPDX-License-Identifier: Apache-2.0
"""Pictures of Pareto fronts: one plane for two objectives, a plane for each pair and a view in space for three."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.tri import Triangulation

from peft_pblora.output import check_output, output_file

from .fronts import SUMMARY
from .marks import Summary, by_method, column, extent, is_near, label, mark, reach, sizes
from .measures import WRITER, write_csv


KINDS = ("png", "svg")
"""Formats of figures."""
ENDINGS = ("", "_pairs", "_3d")
"""How the names of figures end."""
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#8C564B", "#7F7F7F")
"""Told apart by colour-blind readers (Okabe and Ito 2008, a brown and a grey). Controls are black."""
MARKERS = "os^Dvph<>d"
"""Shapes of methods, which tell them apart without any colour."""
OPEN_MARKERS = "*P8"
"""Shapes of controls."""
LINES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (4, 1.5, 1, 1.5)), (0, (8, 2)), (0, (2, 2)))
SHADES = "viridis"
"""Colours of α, from 0 to 1; they differ in lightness too."""


def plot_front(
    summary: Summary, objectives: Sequence[str], path: str | Path, reference: Sequence[float] | None = None
) -> None:
    """Draws the mean rewards of two objectives: a line for each method, a cross of 95 % intervals for each point.

    Points are filled by the weight of the first objective. A control is one open point.

    Args:
        summary (`Sequence[Mapping]`): From [`summarize`].
        objectives (`Sequence[str]`): The two objectives, x axis first.
        path (`str` or `Path`): File to write; its ending names the format (`.png`, `.svg`, ...).
        reference (`Sequence[float]`, *optional*): The hypervolume's reference point.

    Raises:
        ValueError: not exactly two objectives.
    """
    if len(objectives) != 2:
        raise ValueError(f"`objectives` are {list(objectives)}, but a plane shows exactly two.")
    _save(_one_plane(summary, objectives, [] if reference is None else [reference]), Path(path))


def draw_fronts(
    summary: Summary,
    objectives: Sequence[str],
    folder: str | Path,
    references: Sequence[Sequence[float]] = (),
    name: str = "fronts",
) -> list[Path]:
    """Writes the figures of all methods as PNG and SVG, and their numbers as CSV.

    Two objectives make `<name>`, more make `<name>_pairs`, and three also `<name>_3d`.

    Args:
        summary (`Sequence[Mapping]`): From [`summarize`].
        objectives (`Sequence[str]`): The objectives.
        folder (`str` or `Path`): Where to write.
        references (`Sequence[Sequence[float]]`, *optional*): Reference points, each of length k.
        name (`str`, *optional*, defaults to `"fronts"`): How the files begin.

    Returns:
        `list[Path]`: The files.

    Raises:
        ValueError: fewer than two objectives, a reference point of another length, or a file that is none of ours.
    """
    paths = figure_files(objectives, folder, name)
    if any(len(point) != len(objectives) for point in references):
        raise ValueError(f"A reference point in {list(references)} has not one number for each of {list(objectives)}.")
    for path in paths:
        check_output(path, WRITER)
    figures = [draw(summary, objectives, references) for draw in _drawings(objectives).values()]
    for path, figure in zip(paths, (figure for figure in figures for _ in KINDS)):
        _save(figure, path)
    write_csv([_flat(row, objectives) for row in summary], paths[-1])
    return paths


def figure_files(objectives: Sequence[str], folder: str | Path, name: str) -> list[Path]:
    """The files that [`draw_fronts`] writes, the numbers last. Raises `ValueError` for fewer than two objectives, or a
    name with a path in it."""
    if len(objectives) < 2:
        raise ValueError(f"`objectives` are {list(objectives)}, but a front needs two or more.")
    if not name or Path(name).name != name:
        raise ValueError(f"`name` is {name!r}, but it must be the beginning of a file's name, without any folder.")
    return _figure_files(_drawings(objectives), folder, name)


def any_figure_files(folder: str | Path, name: str) -> list[Path]:
    """The same of any number of objectives."""
    return _figure_files(ENDINGS, folder, name)


def _figure_files(endings: Iterable[str], folder: str | Path, name: str) -> list[Path]:
    figures = [f"{name}{ending}.{kind}" for ending in endings for kind in KINDS]
    return [Path(folder) / file for file in (*figures, f"{name}.csv")]


def _drawings(objectives: Sequence[str]) -> dict[str, Callable[..., Figure]]:
    """How the names of the figures end, and what draws them."""
    plane, pairs, space = ENDINGS
    if len(objectives) == 2:
        return {plane: _one_plane}
    return {pairs: _planes, space: _space} if len(objectives) == 3 else {pairs: _planes}


def _one_plane(summary: Summary, objectives: Sequence[str], references: Sequence[Sequence[float]]) -> Figure:
    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    axes = figure.subplots()
    shades = _plane(axes, summary, objectives, (0, 1), references, connect=True)
    guided = [row for row in summary if row["preference"] is not None]
    if len({row["method"] for row in guided}) == 1:
        label(axes, [((row[objectives[0]], row[objectives[1]]), row["preference"][0]) for row in guided])
    if shades is not None:
        figure.colorbar(shades, ax=axes, label=f"α, weight of {as_text(objectives[0])}", pad=0.01)
    legend(figure, summary, len(references), connect=True)
    return figure


def _planes(summary: Summary, objectives: Sequence[str], references: Sequence[Sequence[float]]) -> Figure:
    pairs = list(itertools.combinations(range(len(objectives)), 2))
    columns = min(3, len(pairs))
    rows = -(-len(pairs) // columns)
    figure = Figure(figsize=(4.4 * columns, 4.0 * rows + 0.5), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    shades = None
    for axes, pair in zip(panels, pairs):
        shades = _plane(axes, summary, objectives, pair, references, connect=False) or shades
    for axes in panels[len(pairs) :]:
        axes.set_axis_off()
    if shades is not None:
        figure.colorbar(shades, ax=list(panels), label="α, weight of the x axis' objective", pad=0.01, fraction=0.03)
    legend(figure, summary, len(references))
    return figure


def _plane(
    axes: Axes,
    summary: Summary,
    objectives: Sequence[str],
    pair: tuple[int, int],
    references: Sequence[Sequence[float]],
    connect: bool,
) -> Any:
    """Draws two of the objectives, and returns what a colour bar can be made of."""
    x, y = objectives[pair[0]], objectives[pair[1]]
    shades = None
    for rows, (colour, marker, line), size in zip(by_method(summary).values(), styles(summary), sizes(summary)):
        xs, ys = column(rows, x), column(rows, y)
        right, up = reach(rows, x), reach(rows, y)
        axes.errorbar(xs, ys, up, right, fmt="none", ecolor=colour, elinewidth=0.8, alpha=0.45, zorder=1)
        if rows[0]["preference"] is None:
            axes.scatter(xs, ys, marker=marker, s=size, facecolor="none", edgecolor=colour, linewidth=1.4, zorder=4)
            continue
        if connect:
            along = np.argsort([row["preference"][0] for row in rows])
            axes.plot(xs[along], ys[along], color=colour, lw=1.3, ls=line, zorder=2)
        shades = axes.scatter(
            xs, ys, c=[row["preference"][pair[0]] for row in rows], cmap=SHADES, vmin=0, vmax=1, marker=marker, s=size,
            edgecolor=colour, linewidth=1.3, zorder=3,
        )  # fmt: skip
    mark(axes, [extent(summary, name) for name in (x, y)], [(point[pair[0]], point[pair[1]]) for point in references])
    axes.set(xlabel=f"{as_text(x)} (higher is better)", ylabel=f"{as_text(y)} (higher is better)")
    axes.grid(color="0.92", zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    return shades


def _space(summary: Summary, objectives: Sequence[str], references: Sequence[Sequence[float]]) -> Figure:
    """Surfaces over the simplex, with points filled by the weight of the objective that goes up."""
    figure = Figure(figsize=(7.4, 5.8), layout="constrained")
    axes: Any = figure.add_subplot(projection="3d")
    shades = None
    for rows, (colour, marker, _), size in zip(by_method(summary).values(), styles(summary), sizes(summary)):
        points = [column(rows, name) for name in objectives]
        if rows[0]["preference"] is None:
            axes.scatter(*points, marker=marker, s=size, facecolor="none", edgecolor=colour, linewidth=1.4)
            continue
        weights = np.array([row["preference"] for row in rows])
        if len(rows) > 3 and np.linalg.matrix_rank(weights - weights[0]) > 1:  # no line of preferences
            triangles = Triangulation(weights[:, 0], weights[:, 1]).triangles
            axes.plot_trisurf(*points, triangles=triangles, color=colour, alpha=0.16, edgecolor=colour, linewidth=0.5)
        shades = axes.scatter(
            *points, c=weights[:, 2], cmap=SHADES, vmin=0, vmax=1, marker=marker, s=size, edgecolor=colour,
            linewidth=1.0, depthshade=False,
        )  # fmt: skip
    extents = [extent(summary, name) for name in objectives]
    beyond = [point for point in references if not is_near(point, extents)]
    for point in (point for point in references if point not in beyond):
        axes.scatter(*([value] for value in point), marker="x", s=55, color="black", linewidth=1.6)
    axes.set(**dict(zip(("xlabel", "ylabel", "zlabel"), map(as_text, objectives))))
    axes.xaxis.labelpad = axes.yaxis.labelpad = 9
    axes.view_init(elev=22, azim=-52)
    axes.set_box_aspect(None, zoom=0.95)
    if shades is not None:
        figure.colorbar(shades, ax=axes, label=f"α, weight of {as_text(objectives[2])}", shrink=0.7, pad=0.07)
    legend(figure, summary, len(references) - len(beyond), crosses=False, beyond=beyond)
    return figure


def _flat(row: Mapping[str, Any], objectives: Sequence[str]) -> dict[str, Any]:
    """A row with a column for the weight of each objective in the place of its preference and label."""
    weights = row["preference"] or [""] * len(objectives)
    rest = {key: value for key, value in row.items() if key not in SUMMARY}
    return {"method": row["method"], **{f"α {name}": α for name, α in zip(objectives, weights, strict=True)}, **rest}


def _save(figure: Figure, path: Path) -> None:
    """Writes a figure, complete or not at all, and the same bytes for the same numbers."""
    kind = path.suffix.removeprefix(".")
    dated = {"Date": None} if kind == "svg" else {}
    with output_file(path, WRITER, binary=True) as file, matplotlib.rc_context({"svg.hashsalt": "trl-parm"}):
        figure.savefig(file, format=kind, dpi=150, metadata=dated, bbox_inches="tight", pad_inches=0.08)


def as_text(name: str) -> str:
    """A name as matplotlib shows it: no `$` in it begins a formula."""
    return name.replace("$", r"\$")


def styles(summary: Summary) -> list[tuple[str, str, Any]]:
    """Colour, marker and line of each method; no two of eight share a colour, of ten a marker. Controls are black."""
    controls = zip(itertools.repeat("black"), itertools.cycle(OPEN_MARKERS), itertools.repeat("none"))
    methods = zip(itertools.cycle(COLOURS), itertools.cycle(MARKERS), itertools.cycle(LINES))
    kinds = (rows[0]["preference"] is None for rows in by_method(summary).values())
    return [next(controls if control else methods) for control in kinds]


def legend(
    figure: Figure,
    summary: Summary,
    references: int,
    connect: bool = False,
    crosses: bool = True,
    beyond: Sequence[Sequence[float]] = (),
) -> None:
    """Below the panels, so that it hides no point. Reference points `beyond` the picture are told in numbers."""
    handles = []
    for (name, rows), (colour, marker, line) in zip(by_method(summary).items(), styles(summary)):
        control = rows[0]["preference"] is None
        handles.append(
            Line2D(
                [], [], color=colour, marker=marker, ls=line if connect and not control else "none", lw=1.3,
                label=as_text(name), markersize=9 if control else 7, markerfacecolor="white" if control else colour,
            )
        )  # fmt: skip
    if crosses:
        handles.append(Line2D([], [], color="0.5", marker="+", ls="none", label="95 % interval", markersize=11))
    if references:
        label = "reference point" if references == 1 else "reference points"
        handles.append(Line2D([], [], color="black", marker="x", ls="none", label=label, markersize=7))
    for point in beyond:
        label = f"reference point {', '.join(f'{value:g}' for value in point)}, outside"
        handles.append(Line2D([], [], color="none", marker="none", ls="none", label=label))
    columns = min(len(handles), 3 if figure.get_figwidth() < 8 else 6)
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
