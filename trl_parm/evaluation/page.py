# SPDX-License-Identifier: Apache-2.0
"""One self-contained HTML page of an evaluation: fronts, tables, responses side by side, and the record of the run."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment
from matplotlib import colormaps
from matplotlib.colors import to_hex
from matplotlib.ticker import MaxNLocator

from peft_pblora.output import output_file
from trl_parm.rewards import UNJUDGED
from trl_parm.texts import as_text, prompt_key

from .marks import Summary, by_method, column, extent, is_near, reach
from .measures import WRITER, as_cells
from .plots import SHADES, styles


WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 560, 400, 62, 548, 12, 356
"""Of a plane: its size, and where its axes are."""


def write_page(
    path: str | Path,
    rows: Sequence[Mapping[str, Any]],
    summary: Summary,
    objectives: Sequence[str],
    tables: Mapping[str, Sequence[Mapping[str, Any]]],
    records: Mapping[str, str],
    references: Sequence[Sequence[float]] = (),
    notes: Sequence[str] = (),
    prompts: int = 50,
    title: str = "Responses at preferences",
) -> None:
    """Writes a page that needs nothing beside itself: no network, no other file.

    Marks of the fronts tell their method, α, rewards and intervals when they are pointed at, and show their responses
    when they are clicked. Responses to a prompt stand side by side, and are filtered by prompt, preference and method.

    Args:
        path (`str` or `Path`): The file; an older one is replaced if it was written here.
        rows (`Sequence[Mapping]`): The rows of [`sweep`].
        summary (`Sequence[Mapping]`): From [`summarize`].
        objectives (`Sequence[str]`): Two or more.
        tables (`Mapping[str, Sequence[Mapping]]`): By their titles; the first one is open.
        records (`Mapping[str, str]`): What the rows depend on, as texts by name.
        references (`Sequence[Sequence[float]]`, *optional*): Reference points of the hypervolume.
        notes (`Sequence[str]`, *optional*): What to say below the tables.
        prompts (`int`, *optional*, defaults to 50): Of how many prompts the responses are there, the first ones.
        title (`str`, *optional*): Of the page.

    Raises:
        ValueError: a file in its place that was not written here.
    """
    methods, keys = list(by_method(summary)), list(dict.fromkeys(prompt_key(row["prompt"]) for row in rows))
    pairs = itertools.combinations(range(len(objectives)), 2)
    legend = [
        (name, colour, own[0]["preference"] is None)
        for (name, own), (colour, *_) in zip(by_method(summary).items(), styles(summary), strict=True)
    ]
    text = _template().render(
        title=title,
        lead=f"{len(methods)} methods on {len(keys)} prompts; rewards: {', '.join(objectives)}.",
        legend=legend,
        planes=[_plane(summary, objectives, pair, references) for pair in pairs],
        tables=[(name, *as_cells(found)) for name, found in tables.items() if found],
        notes=notes,
        shown=f"To the first {min(prompts, len(keys))} of {len(keys)} prompts, side by side.",
        records=list(records.items()),
        data=_embedded(_responses(rows, summary, objectives, keys[:prompts])),
    )
    with output_file(path, WRITER) as file:
        file.write(text)


def _template() -> Any:
    source = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(source)


def _embedded(data: Any) -> str:
    """JSON that ends no `script` element, whatever texts are in it."""
    found = json.dumps(data, ensure_ascii=False)
    return found.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _responses(
    rows: Sequence[Mapping[str, Any]], summary: Summary, objectives: Sequence[str], keys: Sequence[str]
) -> dict[str, Any]:
    number = {key: i for i, key in enumerate(keys)}
    prompts: list[str] = [""] * len(keys)
    found = []
    for row in rows:
        if (at := number.get(prompt_key(row["prompt"]))) is None:
            continue
        prompts[at] = as_text(row["prompt"])
        values = [f"{name} {_short(row[name])}" for name in objectives]
        values += [f"{row['tokens']} tokens"] + (["cut off"] if row.get("capped") else [])
        values += [f"{name}: {why}" for name, why in (row.get(UNJUDGED) or {}).items()]
        found.append(
            {
                "prompt": at, "method": row["method"], "alpha": _alpha(row, objectives), "response": row["response"],
                "values": " · ".join(values),
            }
        )  # fmt: skip
    alphas = list(dict.fromkeys(_alpha(row, objectives) for row in summary if row["preference"] is not None))
    return {"prompts": prompts, "rows": found, "alphas": alphas, "methods": list(by_method(summary))}


def _alpha(row: Mapping[str, Any], objectives: Sequence[str]) -> str:
    """A preference in words; `-` for none."""
    if row["preference"] is None:
        return "-"
    return ", ".join(f"{name} {weight:.3g}" for name, weight in zip(objectives, row["preference"], strict=True))


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}".replace("-", "−")


def _plane(
    summary: Summary, objectives: Sequence[str], pair: tuple[int, int], references: Sequence[Sequence[float]]
) -> dict[str, Any]:
    """What `page.html` draws of two of the objectives, in the pixels of its drawing."""
    names = [objectives[i] for i in pair]
    extents = [extent(summary, name) for name in names]
    near = [point for point in ([r[i] for i in pair] for r in references) if is_near(point, extents)]
    to_x, xticks = _scale(extents[0][:2], [point[0] for point in near], LEFT, RIGHT)
    to_y, yticks = _scale(extents[1][:2], [point[1] for point in near], BOTTOM, TOP)
    points, lines = [], []
    for (method, rows), (colour, *_) in zip(by_method(summary).items(), styles(summary), strict=True):
        xs, ys = column(rows, names[0]), column(rows, names[1])
        places = [(to_x(x), to_y(y)) for x, y in zip(xs, ys)]
        right, up = reach(rows, names[0]), reach(rows, names[1])
        for i, row in enumerate(rows):
            weight = None if row["preference"] is None else row["preference"][pair[0]]
            across = f"M{to_x(xs[i] - right[0, i])} {places[i][1]}H{to_x(xs[i] + right[1, i])}"
            along = f"M{places[i][0]} {to_y(ys[i] - up[0, i])}V{to_y(ys[i] + up[1, i])}"
            points.append(
                {
                    "method": method, "label": _alpha(row, objectives), "cx": places[i][0], "cy": places[i][1],
                    "colour": _hex(colour), "control": weight is None, "interval": across + along,
                    "fill": None if weight is None else _hex(colormaps[SHADES](min(max(weight, 0), 1))),
                    "told": _told(row, objectives),
                }
            )  # fmt: skip
        if rows[0]["preference"] is not None and len(objectives) == 2:
            order = np.argsort([row["preference"][0] for row in rows])
            joined = " ".join(f"{places[i][0]},{places[i][1]}" for i in order)
            lines.append({"points": joined, "colour": _hex(colour)})
    return {
        "x": names[0], "y": names[1], "width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "top": TOP,
        "bottom": BOTTOM, "xticks": xticks, "yticks": yticks, "points": points, "lines": lines,
        "references": [(to_x(x), to_y(y)) for x, y in near],
    }  # fmt: skip


def _scale(values: Sequence[float], more: Sequence[float], first: float, last: float) -> tuple[Any, list]:
    """Maps values to pixels, and ticks with their texts."""
    low, high = min(*values, *more), max(*values, *more)
    margin = 0.07 * ((high - low) or abs(high) or 1.0)
    low, high = low - margin, high + margin

    def place(value: float) -> float:
        return round(float(first + (value - low) / (high - low) * (last - first)), 2)

    ticks = [tick for tick in MaxNLocator(5).tick_values(low, high) if low <= tick <= high]
    return place, [(place(tick), f"{tick:.6g}".replace("-", "−")) for tick in ticks]


def _told(row: Mapping[str, Any], objectives: Sequence[str]) -> str:
    """What a mark tells."""
    lines = [row["method"], "no preference" if row["preference"] is None else f"α: {_alpha(row, objectives)}"]
    for name in objectives:
        low, high = row[f"{name}_low"], row[f"{name}_high"]
        interval = "" if np.isnan(low) else f" [{_short(low)}, {_short(high)}]"
        lines.append(f"{name} {_short(row[name])}{interval}")
    return "\n".join(lines)


def _hex(colour: Any) -> str:
    return to_hex(colour)
