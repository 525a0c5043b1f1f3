# SPDX-License-Identifier: Apache-2.0
"""What figures show, read back from them and from the files that they become."""

import csv

import matplotlib.colors
import numpy as np
import pytest

from peft_pblora.output import NOTES
from trl_parm.evaluation import draw_fronts, plot_front
from trl_parm.evaluation.measures import correlations, markdown
from trl_parm.evaluation.plots import _one_plane, _planes, _space, styles


def summary(k=2, methods=("PARM", "GenARM"), grid=None):
    rng = np.random.default_rng(0)
    names = [f"o{i}" for i in range(k)]
    rows = []
    for method in ("Base", *methods):
        for weights in [None] if method == "Base" else np.eye(k).tolist() if grid is None else grid:
            row = {"method": method, "preference": weights, "label": "x"}
            for name in names:
                value = rng.normal()
                row |= {name: value, f"{name}_error": 0.1, f"{name}_low": value - 0.2, f"{name}_high": value + 0.3}
            rows.append(row)
    return rows, names


def positions(axes) -> set[tuple]:
    return {tuple(np.round(p, 9)) for dots in axes.collections for p in np.asarray(dots.get_offsets()) if len(p) == 2}


def test_a_plane_shows_every_point_interval_and_reference():
    rows, names = summary(grid=[[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    figure = _one_plane(rows, names, [(-2.0, -3.0), (-1.0, -2.0)])
    axes = figure.axes[0]
    assert {(-2.0, -3.0), (-1.0, -2.0)} | {(round(r["o0"], 9), round(r["o1"], 9)) for r in rows} <= positions(axes)
    assert len(axes.containers) == 3
    texts = {text.get_text() for text in figure.legends[0].get_texts()}
    assert texts == {"Base", "PARM", "GenARM", "95 % interval", "reference points"}
    segments = [s for c in axes.collections if hasattr(c, "get_segments") for s in c.get_segments()]
    assert any(
        np.allclose(s, [[r["o0"] - 0.2, r["o1"]], [r["o0"] + 0.3, r["o1"]]]) for s in segments for r in rows[1:2]
    )
    line = next(line for line in axes.lines if len(line.get_xdata()) == 3)
    assert line.get_xdata().tolist() == [rows[i]["o0"] for i in (2, 3, 1)]
    assert figure.axes[1].get_ylabel() == "α, weight of o0"


def test_three_objectives_have_a_plane_for_each_pair_and_a_view_in_space():
    rows, names = summary(3, grid=[[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0], [0.4, 0.3, 0.3]])
    figure = _planes(rows, names, [(-1.0, -2.0, -3.0)])
    shown = [(a.get_xlabel().split()[0], a.get_ylabel().split()[0]) for a in figure.axes[:3]]
    assert shown == [("o0", "o1"), ("o0", "o2"), ("o1", "o2")]
    assert (-2.0, -3.0) in positions(figure.axes[2])
    shades = [c.get_array() for c in figure.axes[2].collections if c.get_array() is not None]
    assert [list(s) for s in shades] == [[0, 1, 0, 0.3]] * 2
    axes = _space(rows, names, []).axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_zlabel()) == ("o0", "o1", "o2")


def coinciding() -> list[dict]:
    """A control and two methods, of which most points are in one place."""
    rows, _ = summary(grid=[[w, 1 - w] for w in (0.0, 0.25, 0.75, 1.0)])
    for row in rows:
        value = 2.0 if row["preference"] == [1.0, 0.0] else 1.0
        row |= {f"{name}{end}": value for name in ("o0", "o1") for end in ("", "_low", "_high")}
    return rows


def test_far_reference_points_do_not_press_the_points_together():
    """The points fill a third of the plane at least; a point that is too far is an arrow at the edge with numbers."""
    rows, names = coinciding(), ["o0", "o1"]
    axes = _one_plane(rows, names, [(-0.9, 0.5), (-60.0, 1.5), (50.0, 70.0)]).axes[0]
    assert (-0.9, 0.5) in positions(axes)
    for low, high in (axes.get_xlim(), axes.get_ylim()):
        assert low < 1 < 2 < high
        assert high - low < 3.2
    arrows = {text.get_text(): text.xy for text in axes.texts if text.arrow_patch is not None}
    assert list(arrows) == ["× -60, 1.5", "× 50, 70"]
    assert arrows["× -60, 1.5"] == (axes.get_xlim()[0], 1.5)
    assert arrows["× 50, 70"] == (axes.get_xlim()[1], axes.get_ylim()[1])


def test_a_far_reference_point_is_told_beside_a_view_in_space():
    rows, names = summary(3, grid=[[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0], [0.4, 0.3, 0.3]])
    figure = _space(rows, names, [(-50.0, -50.0, -50.0)])
    assert figure.axes[0].get_xlim()[0] > -10
    assert "reference point -50, -50, -50, outside" in {text.get_text() for text in figure.legends[0].get_texts()}


def test_coinciding_points_can_all_be_seen():
    """One label for points in one place; marks get smaller from method to method, and controls are rings."""
    rows = coinciding()
    alone = [row for row in rows if row["method"] != "GenARM"]
    labels = [text.get_text() for text in _one_plane(alone, ["o0", "o1"], []).axes[0].texts]
    assert labels == ["0, 0.25, 0.75", "1"]
    axes = _one_plane(rows, ["o0", "o1"], []).axes[0]
    dots = [marks for marks in axes.collections if hasattr(marks, "get_sizes") and len(marks.get_sizes())]
    control, first, second = dots
    assert len(control.get_facecolor()) == 0
    assert control.get_sizes()[0] > first.get_sizes()[0] > second.get_sizes()[0]


def test_four_objectives_have_six_planes():
    rows, names = summary(4)
    panels = [axes for axes in _planes(rows, names, []).axes if axes.axison and "higher" in axes.get_xlabel()]
    assert len(panels) == 6


def test_methods_differ_in_colour_and_shape():
    rows, _ = summary(methods=[f"method {i}" for i in range(8)])
    found = styles(rows)
    assert len({colour for colour, _, _ in found}) == len({marker for _, marker, _ in found}) == 9
    assert all(matplotlib.colors.is_color_like(colour) for colour, _, _ in found)


@pytest.mark.parametrize(("k", "stems"), [(2, ["f"]), (3, ["f_pairs", "f_3d"])])
def test_files(tmp_path, k, stems):
    rows, names = summary(k)
    paths = draw_fronts(rows, names, tmp_path / "new", [[-5.0] * k], "f")
    assert sorted(p.name for p in paths) == sorted(
        [f"{stem}.{kind}" for stem in stems for kind in ("png", "svg")] + ["f.csv"]
    )
    assert {p.name for p in (tmp_path / "new").iterdir()} == {NOTES, *(p.name for p in paths)}
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in paths if p.suffix == ".png")
    with (tmp_path / "new/f.csv").open(encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [row["method"] for row in table] == [row["method"] for row in rows]
    assert float(table[1]["o0"]) == rows[1]["o0"]
    assert float(table[1]["o1_high"]) == rows[1]["o1_high"]
    assert (table[0]["α o0"], float(table[1]["α o0"])) == ("", 1)
    if k == 2:  # the same numbers make the same bytes
        before = (tmp_path / "new/f.svg").read_bytes()
        draw_fronts(rows, names, tmp_path / "new", [[-5.0] * k], "f")
        assert (tmp_path / "new/f.svg").read_bytes() == before


def test_one_point_of_one_prompt(tmp_path):
    rows, names = summary(methods=())
    rows[0] |= {"o0_low": float("nan"), "o0_high": float("nan")}
    plot_front(rows, names, tmp_path / "front.png")
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")


def test_bad_figures(tmp_path):
    rows, names = summary()
    with pytest.raises(ValueError, match="exactly two"):
        plot_front(rows, ["one"], tmp_path / "front.png")
    with pytest.raises(ValueError, match="needs two or more"):
        draw_fronts(rows, ["one"], tmp_path)
    with pytest.raises(ValueError, match="has not one number for each"):
        draw_fronts(rows, names, tmp_path, [(0, 0, 0)])
    with pytest.raises(ValueError, match="not supported"):
        plot_front(rows, names, tmp_path / "front.xyz")
    assert not list(tmp_path.iterdir())


def test_figures_replace_only_figures(tmp_path):
    rows, names = summary()
    (tmp_path / "f.csv").write_text("mine")
    with pytest.raises(ValueError, match="f.csv was not written by 'plot'"):
        draw_fronts(rows, names, tmp_path, name="f")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"f.csv": "mine"}
    draw_fronts(rows, names, tmp_path, name="g")
    draw_fronts(rows[:-1], names, tmp_path, name="g")
    assert len((tmp_path / "g.csv").read_text().splitlines()) == len(rows)
    for name in ("../up", str(tmp_path / "up"), ""):
        with pytest.raises(ValueError, match="without any folder"):
            draw_fronts(rows, names, tmp_path, name=name)


@pytest.mark.parametrize("k", [2, 3])
def test_names_are_shown_as_they_are(tmp_path, k):
    """Also where matplotlib would read a formula, even a wrong one, and where a table's cells would end."""
    rows, names = summary(k, methods=("$x_{$", "a|b\nc"))
    odd = [f"../$o^{{$ {i}" for i in range(k)]
    for old, new in zip(names, odd):
        rows = [{key.replace(old, new): value for key, value in row.items()} for row in rows]
    paths = draw_fronts(rows, odd, tmp_path / "figures")
    assert {path.parent for path in paths} == {tmp_path / "figures"}
    assert {path.name for path in tmp_path.iterdir()} == {"figures"}
    figure = _one_plane(rows, odd, []) if k == 2 else _planes(rows, odd, [])
    assert figure.axes[0].get_xlabel() == r"../\$o^{\$ 0 (higher is better)"
    assert markdown([{"method": "a|b\nc", "x|y": 1.0}]).splitlines() == [
        r"| method | x\|y |", "|---|---|", r"| a\|b c | 1 |",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="objective 'method' would make a column that is called 'method'"):
        correlations([], ["method"])
