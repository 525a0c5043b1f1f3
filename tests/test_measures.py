# SPDX-License-Identifier: Apache-2.0
"""Measures against published check values, against their definitions, and their intervals against the truth."""

import csv
import itertools
import math
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from peft_pblora import preference_grid
from trl_parm import hypervolume, mean_inner_product, pareto_front
from trl_parm.evaluation import (
    Interval,
    arrange,
    bootstrap,
    correlations,
    costs,
    differences,
    markdown,
    mean_and_error,
    measure,
    rank_correlations,
)
from trl_parm.evaluation.measures import write_csv


# Check values of a published comparison: points (help, −cost) at α_help 0, .2, .4, .6, .8, 1.
WEIGHTS = [[w, 1 - w] for w in (0, 0.2, 0.4, 0.6, 0.8, 1)]
PARM = [(-1.92, 10.58), (-0.72, 7.35), (0.89, 1.47), (3.74, -7.81), (4.49, -12.15), (4.95, -15.29)]
GENARM = [(-2.41, 10.69), (0.02, 4.67), (3.21, -4.96), (4.78, -10.29), (5.29, -13.95), (5.37, -13.62)]
HYPERVOLUMES = [
    (PARM, (-3.41, -17.88), 138.02),
    (GENARM, (-3.41, -17.88), 139.01),
    (PARM, (-3, -5), 42.1),
    (GENARM, (-3, -5), 32.9),
]


@pytest.mark.parametrize(("points", "reference", "volume"), HYPERVOLUMES)
def test_hypervolume_check_values(points, reference, volume):
    digits = len(str(volume).split(".")[1])
    assert round(hypervolume(points, reference), digits) == volume


def test_the_order_of_methods_flips_with_the_reference_point():
    wide, near = (-3.41, -17.88), (-3, -5)
    assert hypervolume(PARM, wide) < hypervolume(GENARM, wide)
    assert hypervolume(PARM, near) > hypervolume(GENARM, near)


@pytest.mark.parametrize(("points", "value"), [(PARM, 3.80), (GENARM, 3.05)])
def test_mean_inner_product_check_values(points, value):
    assert round(mean_inner_product(WEIGHTS, points), 2) == value


def test_grids_of_the_papers():
    two = preference_grid(["a", "b"], 10)
    assert two.tolist()[0] == [0, 1]
    assert two.tolist()[-1] == [1, 0]
    assert len(two) == 11


points = st.lists(st.tuples(*[st.integers(-3, 6)] * 3), min_size=1, max_size=6)


@given(points)
def test_hypervolume_counts_unit_cubes(rows):
    """On integer points the volume above the origin is the number of unit cubes that some point dominates."""
    cubes = itertools.product(range(6), repeat=3)
    expected = sum(any(all(r > c for r, c in zip(row, cube)) for row in rows) for cube in cubes)
    if expected:
        assert hypervolume(rows, [0, 0, 0]) == pytest.approx(expected)
    else:
        with pytest.warns(UserWarning, match="hypervolume is 0"):
            assert hypervolume(rows, [0, 0, 0]) == 0


@given(points)
def test_pareto_front_equals_the_definition(rows):
    array = np.array(rows)
    dominated = [any((other >= row).all() and (other > row).any() for other in array) for row in array]
    assert pareto_front(rows).tolist() == [not d for d in dominated]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hypervolume([], [0, 0]), "has shape"),
        (lambda: hypervolume([[1, 2]], [0, 0, 0]), "have 2 objectives, but `reference` has 3"),
        (lambda: hypervolume([[1, float("nan")]], [0, 0]), "NaN or infinite"),
        (lambda: mean_inner_product([[1, 0]], [[1, 0], [0, 1]]), "have shape"),
        (lambda: rank_correlations([[1, 0]], [[1, 0], [0, 1]]), "have shape"),
        (lambda: bootstrap(np.sum, [[float("nan")]]), "finite values"),
        (lambda: bootstrap(np.sum, []), "finite values"),
        (lambda: bootstrap(np.sum, [[1.0]], confidence=1.0), "`confidence` is 1.0"),
    ],
)
def test_bad_measures(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_mean_and_error():
    mean, error = mean_and_error([1.0, 2.0, 3.0, 6.0])
    assert mean == 3.0
    assert error == pytest.approx(np.sqrt(14 / 3) / 2)


def test_rank_correlations_are_spearmans():
    rng = np.random.default_rng(0)
    weights, rewards = rng.dirichlet(np.ones(3), size=9), rng.normal(size=(9, 3))
    for i, value in enumerate(rank_correlations(weights, rewards)):
        ranks = [stats.rankdata(column[:, i]) for column in (weights, rewards)]
        assert value == pytest.approx(np.corrcoef(*ranks)[0, 1])
    monotone = rank_correlations(WEIGHTS, [(w, -(w**3)) for w, _ in WEIGHTS])
    assert monotone.tolist() == pytest.approx([1, 1])
    assert np.isnan(rank_correlations([[0.5, 0.5]], [[1.0, 2.0]])).all()


def rewards_around(points, prompts, seed=0, spread=1.0):
    """Rewards `(prompts, points, k)` whose mean is exactly `points`."""
    noise = np.random.default_rng(seed).normal(size=(prompts, len(points), len(points[0]))) * spread
    return np.asarray(points) + noise - noise.mean(0)


def test_bootstrap_equals_its_definition():
    """Prompts drawn with replacement one by one; the interval reaches as far up as down."""
    values = rewards_around(PARM, 9)
    found = bootstrap(lambda mean: hypervolume(mean, (-3, -5)), values, resamples=300, confidence=0.9, seed=3)
    shares = np.random.default_rng(3).multinomial(9, np.full(9, 1 / 9), size=300)
    drawn = []
    for counts in shares:
        sample = np.concatenate([np.repeat(values[i : i + 1], n, axis=0) for i, n in enumerate(counts)])
        assert len(sample) == 9
        drawn.append(hypervolume(sample.mean(0), (-3, -5)))
    estimate = hypervolume(PARM, (-3, -5))
    reach = np.quantile([abs(value - estimate) for value in drawn], 0.9)
    assert found == pytest.approx((estimate, estimate - reach, estimate + reach))
    assert str(Interval(1.234, 1, 2)) == "1.23 [1.00, 2.00]"


def test_the_interval_of_a_mean_is_the_usual_one():
    values = np.random.default_rng(0).normal(size=(400, 1))
    _, low, high = bootstrap(lambda mean: mean[0], values)
    expected = stats.norm.interval(0.95, values.mean(), values.std(ddof=1) / 20)
    assert (low, high) == pytest.approx(expected, abs=0.012)


def test_one_prompt_has_no_interval_and_says_so(tmp_path):
    interval = bootstrap(lambda mean: mean[0], [[2.0]])
    assert math.isnan(interval.low)
    assert str(interval) == "2.00 (one prompt: no interval)"
    found = arrange(table({"a": PARM, "b": GENARM}, prompts=1), OBJECTIVES)
    for rows in (measure(found, OBJECTIVES, [[0, 0]]), differences(found, OBJECTIVES, [[0, 0]], "a")):
        assert "one prompt" in markdown(rows)
        assert "nan" not in markdown(rows)
        write_csv(rows, tmp_path / "rows.csv")
        assert "nan" not in (tmp_path / "rows.csv").read_text()
    assert {row["differs"] for row in rows} == {None}


def test_intervals_of_the_hypervolume_hold_the_truth():
    """On a front of 11 points from 24 prompts the interval holds the true value about as often as it says; one of
    percentiles, which the bias of the hypervolume shifts, does not."""
    weights = np.linspace(0, 1, 11)
    true = np.stack([0.2 + 0.66 * weights**0.8, -9 - 21 * weights**1.2], 1)
    reference, rng = np.array([0.0, -40.0]), np.random.default_rng(0)
    value, held = hypervolume(true, reference), np.zeros(2)
    for _ in range(60):
        noise = 0.3 * rng.normal(size=(24, 1, 2)) + 0.95 * rng.normal(size=(24, 11, 2))
        rewards = true + noise * [0.5, 9.0]
        _, low, high = bootstrap(lambda m: hypervolume(m, reference), rewards, 200)
        drawn = [hypervolume(rewards[rng.integers(24, size=24)].mean(0), reference) for _ in range(100)]
        percentiles = np.quantile(drawn, [0.025, 0.975])
        held += low <= value <= high, percentiles[0] <= value <= percentiles[1]
    assert held[0] / 60 > 0.88
    assert held[1] / 60 < 0.8


def table(fronts: dict, prompts: int = 12, spread: float = 1.0, **changes) -> list[dict]:
    """Rows as an evaluation writes them: method → points, at `WEIGHTS`, or a single one for a control."""
    rows = []
    for number, (method, found) in enumerate(fronts.items()):
        values = rewards_around(found, prompts, seed=number, spread=spread)
        for j in range(len(found)):
            for i in range(prompts):
                rows.append(
                    {
                        "method": method, "preference": WEIGHTS[j] if len(found) > 1 else None, "label": str(j),
                        "prompt": f"prompt {i}", "help": values[i, j, 0], "harmless": values[i, j, 1],
                        "tokens": 10, "seconds": 0.5 + number, "extra_parameters": 1000 * number,
                        "extra_bytes": 2**20 * number, **changes,
                    }
                )  # fmt: skip
    return rows


OBJECTIVES = ["help", "harmless"]
REFERENCES = [(-3.41, -17.88), (-3, -5)]


def test_all_measures_in_one_table():
    found = arrange(table({"base": [(0.0, 0.0)], "PARM": PARM, "GenARM": GENARM}), OBJECTIVES)
    rows = measure(found, OBJECTIVES, REFERENCES, resamples=50)
    values = {(row["method"], row["reference"]): row["value"] for row in rows}
    assert round(values["PARM", "help -3.41, harmless -17.88"], 2) == 138.02
    assert round(values["GenARM", "help -3, harmless -5"], 1) == 32.9
    assert round(values["PARM", "-"], 2) == 3.80
    assert values["base", "help -3, harmless -5"] == pytest.approx(15)
    assert values["base", "-"] == pytest.approx(0)
    assert all(row["low"] < row["high"] for row in rows)
    assert all(row["reference"] != "-" for row in rows if row["measure"] == "hypervolume")
    text = markdown(rows)
    assert text.count("help -3.41, harmless -17.88") == 3
    assert "138.02 [" in text
    assert [row["help"] for row in correlations(found, OBJECTIVES)] == pytest.approx([1, 1])


def test_paired_differences_cancel_what_prompts_share():
    """Two methods whose rewards differ by the same on every prompt, however much prompts differ, surely differ."""
    rows = table({"PARM": PARM}, spread=30.0)
    better = [{**row, "method": "better", "help": row["help"] + 0.1} for row in rows]
    found = arrange(rows + better, OBJECTIVES)
    difference = next(r for r in differences(found, OBJECTIVES, [], "PARM") if r["measure"] == "mean inner product")
    expected = 0.1 * np.mean(WEIGHTS, 0)[0]
    assert (difference["value"], difference["low"], difference["high"]) == pytest.approx([expected] * 3)
    assert difference["differs"]
    alone = measure(found, OBJECTIVES, [])
    assert alone[0]["high"] > alone[1]["low"]
    same = differences(arrange(rows + [{**row, "method": "same"} for row in rows], OBJECTIVES), OBJECTIVES, [], "same")
    assert not same[0]["differs"]
    with pytest.raises(ValueError, match="`against` is 'none'"):
        differences(found, OBJECTIVES, [], "none")


def test_the_order_of_preferences_in_a_table_does_not_matter():
    """Such as that of a method that was evaluated after a preference was added."""
    rows = table({"PARM": PARM})
    turned = [{**row, "method": "turned"} for row in reversed(rows)]
    found = arrange(rows + turned, OBJECTIVES)
    assert found[1].preferences.tolist() == found[0].preferences.tolist() == WEIGHTS
    assert found[1].labels == found[0].labels
    for row in differences(found, OBJECTIVES, REFERENCES, "PARM", resamples=20):
        assert row["value"] == row["high"] == 0, row


def test_costs_are_relative_to_the_base(tmp_path):
    found = arrange(table({"base": [(0.0, 0.0)], "PARM": PARM, "GenARM": GENARM}), OBJECTIVES)
    rows = costs(found, "base")
    assert [row["relative_to_base"] for row in rows] == pytest.approx([1, 3, 5])
    assert [row["extra_parameters"] for row in rows] == [0, 1000, 2000]
    assert rows[1]["seconds_per_token"] == pytest.approx(0.15)
    assert rows[2]["extra_MiB"] == 2
    assert math.isnan(costs(found)[0]["relative_to_base"])
    write_csv(rows, tmp_path / "costs.csv")
    with (tmp_path / "costs.csv").open() as file:
        assert float(next(csv.DictReader(file))["seconds_per_token"]) == rows[0]["seconds_per_token"]


def test_a_front_of_one_point():
    found = arrange(table({"base": [(1.0, 2.0)]}), OBJECTIVES)
    rows = measure(found, OBJECTIVES, [(0, 0)])
    assert [(row["measure"], row["value"]) for row in rows] == [("hypervolume", pytest.approx(2))]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "has no rows"),
        ([{"method": "base"}], r"lacks the columns \['help', 'harmless', 'preference', 'prompt'\]"),
        (table({"PARM": PARM})[:-1], "differ in 1 prompts"),
        (table({"PARM": PARM, "GenARM": GENARM})[:-12], "'GenARM' has 5 preferences and 'PARM' 6"),
    ],
)
def test_bad_tables(rows, message):
    with pytest.raises(ValueError, match=message):
        arrange(rows, OBJECTIVES)


def test_reference_points_have_the_length_of_the_rewards():
    found = arrange(table({"PARM": PARM}), OBJECTIVES)
    with pytest.raises(ValueError, match="has 3 numbers, but there are 2 objectives"):
        measure(found, OBJECTIVES, [(0, 0, 0)])
    with pytest.warns(UserWarning, match="hypervolume is 0"):
        row = measure(found, OBJECTIVES, [(50, 50)], resamples=5)[0]
    assert (row["value"], row["low"], row["high"]) == (0, 0, 0)


def test_what_lies_just_below_the_reference_point_is_not_surely_below():
    found = arrange(table({"PARM": PARM}), OBJECTIVES)
    with pytest.warns(UserWarning, match="hypervolume is 0"):
        row = measure(found, OBJECTIVES, [(4.96, -15.0)], resamples=50)[0]
    assert (row["value"], row["low"]) == (0, 0)
    assert row["high"] > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a resample that lies below is no news
        row = measure(found, OBJECTIVES, [(4.94, -16.0)], resamples=50)[0]
    assert row["value"] > row["low"] == 0
