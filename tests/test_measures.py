# SPDX-License-Identifier: Apache-2.0
"""Measures against published check values, against their definitions, and their intervals against the truth."""

import csv
import itertools
import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from peft_pblora import preference_grid
from trl_parm import hypervolume, mean_inner_product, pareto_front
from trl_parm.evaluation import (
    Front,
    Interval,
    arrange,
    bootstrap,
    correlations,
    costs,
    differences,
    markdown,
    mean_and_error,
    measure,
    pool_seeds,
    rank_correlations,
    seed_bootstrap,
    spread,
    standardized,
)
from trl_parm.evaluation.measures import write_csv
from trl_parm.evaluation.metrics import hypervolumes


OBJECTIVES = ["help", "harmless"]

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

POINT = [Front("base", None, ["-"], np.ones((1, 3, 1, 2)), 1.0, 1.0, 0, 0)]


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


@pytest.mark.parametrize("k", [1, 2, 3])
@given(data=st.data())
@pytest.mark.filterwarnings("ignore:No point lies above")
def test_hypervolumes_of_many_are_those_of_each(k, data):
    """Among them points that are equal, on the edge and below the reference point."""
    rows = st.lists(st.tuples(*[st.integers(-3, 4) | st.floats(-2, 3)] * k), min_size=4, max_size=4)
    sets = np.array(data.draw(st.lists(rows, min_size=1, max_size=5)), dtype=float)
    reference = np.array(data.draw(st.tuples(*[st.sampled_from([-1.0, 0.0, 0.5])] * k)))
    before = sets.copy()
    assert hypervolumes(sets, reference) == pytest.approx([hypervolume(each, reference) for each in sets], abs=1e-12)
    assert (sets == before).all()


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
        (lambda: bootstrap(np.sum, [[1.0], [2.0]], vectorized=True), r"shape \(\), but it needs \(1,\)"),
        (lambda: seed_bootstrap(np.sum, np.ones((2, 3, 1)), vectorized=True), r"shape \(\), but it needs \(2,\)"),
        (lambda: measure(POINT, OBJECTIVES, [[math.nan, 0]], 5), "`reference` has NaN"),
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
    at_once = bootstrap(
        lambda means: hypervolumes(means, (-3, -5)), values, resamples=300, confidence=0.9, seed=3, vectorized=True
    )
    assert at_once == pytest.approx(found)
    assert str(Interval(1.234, 1, 2)) == "1.23 [1.00, 2.00]"
    assert str(Interval(-0.001, -0.004, 0.0)) == "0.00 [0.00, 0.00]"


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


@pytest.mark.parametrize("seeds", [2, 3])
def test_intervals_over_seeds_hold_what_another_training_would_give(seeds):
    """The truth is the mean over trainings; an interval over prompts alone, and a plain resampling of seeds and of
    prompts, hold it less often than they say."""
    weights = np.linspace(0, 1, 5)
    grid, rng, held = np.stack([weights, 1 - weights], 1), np.random.default_rng(0), np.zeros(3)
    scale, rounds = [0.5, 9.0], 80

    def statistic(mean):
        return mean_inner_product(grid, mean / scale)

    true = np.stack([0.2 + 0.66 * weights**0.8, -9 - 21 * weights**1.2], 1)
    for _ in range(rounds):
        trained = 0.16 * rng.normal(size=(seeds, 1, 5, 2)) + 0.22 * rng.normal(size=(seeds, 1, 1, 2))
        noise = 0.3 * rng.normal(size=(1, 24, 1, 2)) + 0.95 * rng.normal(size=(seeds, 24, 5, 2))
        rewards = true + (trained + noise) * scale
        found = [seed_bootstrap(statistic, rewards, 100), bootstrap(statistic, rewards.mean(0), 100)]
        drawn = []
        for _ in range(100):
            chosen, prompts = rng.integers(seeds, size=seeds), rng.integers(24, size=24)
            drawn.append(np.mean([statistic(rewards[s][prompts].mean(0)) for s in chosen]))
        found.append(Interval(0.0, *np.quantile(drawn, [0.025, 0.975])))
        held += [low <= statistic(true) <= high for _, low, high in found]
    assert held[0] / rounds > 0.9
    assert max(held[1:]) / rounds < 0.9


def test_an_interval_over_seeds_is_that_over_prompts_and_students_together():
    rewards = rewards_around(PARM, 30) + np.random.default_rng(1).normal(size=(4, 1, 6, 2))
    values = [mean_inner_product(WEIGHTS, of_seed.mean(0)) for of_seed in rewards]
    value, low, high = seed_bootstrap(lambda mean: mean_inner_product(WEIGHTS, mean), rewards, seed=3)
    _, low_of_prompts, _ = bootstrap(lambda mean: mean_inner_product(WEIGHTS, mean), rewards.mean(0), seed=3)
    of_seeds = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert value == pytest.approx(np.mean(values))
    assert high - value == pytest.approx(np.hypot(value - low_of_prompts, of_seeds[1] - value))
    assert value - low == pytest.approx(high - value)
    at_once = seed_bootstrap(lambda means: (WEIGHTS * means).sum(-1).mean(-1), rewards, seed=3, vectorized=True)
    assert at_once == pytest.approx((value, low, high))
    one = seed_bootstrap(lambda mean: mean_inner_product(WEIGHTS, mean), rewards[:1], seed=3)
    assert one == bootstrap(lambda mean: mean_inner_product(WEIGHTS, mean), rewards[0], seed=3)
    assert math.isnan(seed_bootstrap(lambda mean: mean.sum(), rewards[:, :1]).low)


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


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("seeds", [1, 3])
def test_measures_are_those_of_each_resample(k, seeds):
    """Of a method at every preference and of a control, each by the function that users have."""
    rng, grid, names = np.random.default_rng(k), np.array(preference_grid(list("abc"[:k]), 3)), list("abc"[:k])
    runs = {"PARM": rng.normal(size=(seeds, 9, len(grid), k)), "base": rng.normal(size=(seeds, 9, 1, k))}
    found = [Front(name, grid if name == "PARM" else None, [], of, 1.0, 1.0, 0, 0) for name, of in runs.items()]
    point = [-2.0] * k
    of_means = {"hypervolume": lambda mean: hypervolume(mean, point)}
    of_means["mean inner product"] = lambda mean: mean_inner_product(grid, np.broadcast_to(mean, grid.shape))
    for i, name in enumerate(names):
        of_means[f"spread of {name}"] = lambda mean, i=i: spread(grid, np.broadcast_to(mean, grid.shape), i)
    for row in measure(found, names, [point], 40):
        value, low, high = seed_bootstrap(of_means[row["measure"]], runs[row["method"]], 40)
        low = max(low, 0.0) if row["measure"] == "hypervolume" else low
        assert (row["value"], row["low"], row["high"]) == pytest.approx((value, low, high))
    both = np.concatenate([runs["PARM"], runs["base"]], axis=2)
    rows = differences(found, names, [point], "base", 40)
    assert len(rows) == len(of_means)
    for row in rows:
        of = of_means[row["measure"]]
        expected = seed_bootstrap(lambda mean, of=of: of(mean[:-1]) - of(mean[-1:]), both, 40)
        assert (row["value"], row["low"], row["high"]) == pytest.approx(tuple(expected))


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


def of_seeds(counts: dict[str, int], prompts: int = 12):
    """Fronts of methods with several trainings each, and the method of each front."""
    fronts, names = {}, {}
    for method, count in counts.items():
        points = {"PARM": PARM, "GenARM": GENARM, "base": [(0.0, 0.0)]}[method]
        for seed in range(count):
            label = f"{method} ({seed})"
            fronts[label] = np.asarray(points) + seed
            names[label] = method
    return arrange(table(fronts, prompts), OBJECTIVES), names


def test_runs_of_several_seeds_are_one_method():
    found, names = of_seeds({"base": 1, "PARM": 3, "GenARM": 3})
    pooled = pool_seeds(found, names)
    assert [(front.method, front.runs.shape[:2]) for front in pooled] == [
        ("base", (1, 12)), ("PARM", (3, 12)), ("GenARM", (3, 12)),
    ]  # fmt: skip
    np.testing.assert_array_equal(pooled[1].runs[2], found[3].runs[0])
    rows = measure(pooled, OBJECTIVES, [(-3, -5)], resamples=20)
    volumes = [hypervolume(np.asarray(PARM) + seed, (-3, -5)) for seed in range(3)]
    row = next(r for r in rows if (r["method"], r["measure"]) == ("PARM", "hypervolume"))
    assert (row["value"], row["seeds"], row["prompts"]) == (pytest.approx(np.mean(volumes)), 3, 12)
    assert row["high"] - row["value"] > 4.3 * np.std(volumes, ddof=1) / 3**0.5  # Student's quantile for three
    difference = differences(pooled, OBJECTIVES, [(-3, -5)], "GenARM", resamples=20)
    other = [hypervolume(np.asarray(GENARM) + seed, (-3, -5)) for seed in range(3)]
    row = next(r for r in difference if (r["method"], r["measure"]) == ("PARM", "hypervolume"))
    assert row["value"] == pytest.approx(np.mean(volumes) - np.mean(other))
    row = next(r for r in difference if (r["method"], r["measure"]) == ("base", "mean inner product"))
    expected = [mean_inner_product(WEIGHTS, np.asarray(GENARM) + seed) for seed in range(3)]
    assert row["value"] == pytest.approx(-np.mean(expected))


@pytest.mark.parametrize(("seeds", "fewer"), [(3, 2), (3, 1), (2, 1)])
def test_seeds_that_are_missing_are_named(seeds, fewer):
    """One training is not taken for that of every seed."""
    found, names = of_seeds({"base": 1, "PARM": seeds, "GenARM": fewer})
    listed = f"'PARM' has {seeds}, 'GenARM' has {fewer}. Eval"
    with pytest.raises(ValueError, match=f"different numbers of training seeds: {listed}"):
        pool_seeds(found, names)


def test_seeds_are_paired_by_the_files_that_they_were_read_from():
    """Differences are taken run by run, so that the second seed of one is not set against the third of another."""
    found, names = of_seeds({"base": 1, "PARM": 3, "GenARM": 3})

    def files(parm: str, genarm: str) -> dict[str, str]:
        return dict(zip(names, ["one", *(f"seed-{n}" for n in parm + genarm)], strict=True))

    pooled = pool_seeds(found, names)
    for parm, genarm in (("123", "123"), ("123", "456")):  # of one evaluation for both, or of one for each
        for ours, theirs in zip(pool_seeds(found, names, files(parm, genarm)), pooled, strict=True):
            np.testing.assert_array_equal(ours.runs, theirs.runs)
    with pytest.raises(ValueError, match="seed by seed, but 'PARM' was read from seed-1, .* 'GenARM' from seed-2"):
        pool_seeds(found, names, files("123", "234"))


def test_standardised_rewards_have_the_scale_of_the_base_model_s_answers():
    found = arrange(table({"base": [(1.0, 5.0)], "PARM": PARM}, spread=2.0), OBJECTIVES)
    base, scaled = standardized(found, "base", OBJECTIVES)
    assert base.rewards.mean(0)[0].tolist() == pytest.approx([0, 0])
    assert base.rewards.std(0, ddof=1)[0].tolist() == pytest.approx([1, 1])
    deviation = found[0].rewards.std(0, ddof=1)[0]
    np.testing.assert_allclose(scaled.points, (np.asarray(PARM) - [1, 5]) / deviation)
    in_other_units = [
        {**row, "harmless": 100 * row["harmless"] - 7}
        for row in table({"base": [(1.0, 5.0)], "PARM": PARM}, spread=2.0)
    ]
    again = standardized(arrange(in_other_units, OBJECTIVES), "base", OBJECTIVES)
    np.testing.assert_allclose(again[1].points, scaled.points)


def test_intervals_of_standardised_measures_hold_what_other_prompts_would_give():
    """Among them the scale, which is estimated from as many answers: with it taken for exact, intervals of hypervolume
    and mean inner product hold the truth in less than two thirds of the cases."""
    rng, prompts, cases = np.random.default_rng(5), 100, 60
    grid = np.array([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
    means = np.array([[1.2, 0.6], [0.9, 0.9], [0.6, 1.2]])
    names = ("hypervolume", "mean inner product")
    truth = dict(zip(names, (hypervolume(means, [0, 0]), mean_inner_product(grid, means))))
    held = dict.fromkeys([(name, kind, scaled) for name in names for kind in "md" for scaled in (True, False)], 0)
    for _ in range(cases):
        fronts = [
            Front("base", None, ["-"], rng.normal(size=(1, prompts, 1, 2)), 1.0, 1.0, 0, 0),
            Front(
                "PARM", grid, ["1", "2", "3"], means + rng.normal(scale=0.4, size=(1, prompts, 3, 2)), 1.0, 1.0, 0, 0
            ),
        ]
        found = standardized(fronts, "base", OBJECTIVES)
        for scaled in (True, False):
            used = found if scaled else [replace(front, scale=None) for front in found]
            rows = [("m", row) for row in measure(used, OBJECTIVES, [[0, 0]], 200) if row["method"] == "PARM"]
            rows += [("d", row) for row in differences(used, OBJECTIVES, [[0, 0]], "base", 200)]
            for kind, row in rows:
                if row["measure"] in names:  # of the base both are 0
                    held[row["measure"], kind, scaled] += row["low"] <= truth[row["measure"]] <= row["high"]
    coverage = {key: count / cases for key, count in held.items()}
    assert min(value for (*_, scaled), value in coverage.items() if scaled) >= 0.9
    assert max(coverage[name, "m", False] for name in names) < 2 / 3


@pytest.mark.parametrize(("prompts", "seeds"), [(3, 1), (4, 1), (6, 2), (16, 1)])
def test_the_scale_of_a_resample_is_the_deviation_of_its_answers(prompts, seeds):
    """Prompts drawn with replacement one by one, and each draw standardised by its own mean and standard deviation."""
    rng, grid = np.random.default_rng(prompts), np.array([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
    base = rng.normal([0, 10], [1, 5], (seeds, prompts, 1, 2))
    own = rng.normal([1, 12], [1, 5], (seeds, prompts, 3, 2))
    fronts = [Front("base", None, ["-"], base, 1.0, 1.0, 0, 0), Front("PARM", grid, list("123"), own, 1.0, 1.0, 0, 0)]
    mean, deviation = base.mean((0, 1, 2)), base.std((0, 1, 2), ddof=1)
    drawn = []
    for counts in np.random.default_rng(4).multinomial(prompts, np.full(prompts, 1 / prompts), size=400):
        chosen = np.repeat(np.arange(prompts), counts)
        answers = base[:, chosen].reshape(-1, 2)
        alike = seeds == 1 and len(set(chosen)) == 1
        own_scale = deviation if alike else answers.std(0, ddof=1)
        drawn.append([(grid * (run[chosen].mean(0) - answers.mean(0)) / own_scale).sum(-1).mean() for run in own])
    found = standardized(fronts, "base", OBJECTIVES)
    values = [(grid * (run.mean(0) - mean) / deviation).sum(-1).mean() for run in own]
    reach = np.quantile(np.abs(np.mean(drawn, 1) - np.mean(values)), 0.95)
    if seeds > 1:
        reach = np.hypot(reach, stats.t.ppf(0.975, seeds - 1) * np.std(values, ddof=1) / np.sqrt(seeds))
    expected = np.mean(values) + np.array([0, -reach, reach])
    tables = [measure(found, OBJECTIVES, [], 400, seed=4)]
    if seeds == 1:  # the base's own is 0 in every resample
        tables.append(differences(found, OBJECTIVES, [], "base", 400, seed=4))
    for rows in tables:
        (row,) = (row for row in rows if row["method"] == "PARM" and row["measure"] == "mean inner product")
        np.testing.assert_allclose([row["value"], row["low"], row["high"]], expected, rtol=1e-9)


def test_a_resample_of_answers_that_are_alike_keeps_the_scale():
    """Two prompts: half of the resamples hold one of them twice."""
    found = standardized(
        arrange(table({"base": [(1.0, 5.0)], "PARM": PARM}, prompts=2), OBJECTIVES), "base", OBJECTIVES
    )
    np.testing.assert_allclose(found[1].scale.mean(0), [[0, 0], [0.5, 0.5]], atol=1e-12)
    for row in measure(found, OBJECTIVES, [[0, 0]], 50):
        assert np.isfinite([row["low"], row["high"]]).all()


@pytest.mark.parametrize("values", [[1.0], [0.1], [0.3, 0.1 + 0.2], [-7.1, float(np.nextafter(np.float32(-7.1), 0))]])
def test_rewards_without_a_scale_are_refused(values):
    constant = table({"base": [(1.0, 5.0)], "PARM": PARM}, prompts=7)
    for i, row in enumerate(row for row in constant if row["method"] == "base"):
        row["help"] = values[i % len(values)]
    with pytest.raises(ValueError, match="The reward 'help' is the same for all answers of 'base'"):
        standardized(arrange(constant, OBJECTIVES), "base", OBJECTIVES)
    alone = arrange(table({"PARM": PARM}), OBJECTIVES)
    with pytest.raises(ValueError, match="scale that they have for 'base', but the methods are PARM. Evaluate it"):
        standardized(alone, "base", OBJECTIVES)
    with pytest.raises(ValueError, match="there is one answer only"):
        standardized(arrange(table({"base": [(1.0, 5.0)]}, prompts=1), OBJECTIVES), "base", OBJECTIVES)


def test_a_spread_is_how_far_the_preference_moves_a_reward():
    assert spread(WEIGHTS, PARM, 0) == pytest.approx(4.95 + 1.92)
    assert spread(WEIGHTS, PARM, 1) == pytest.approx(10.58 + 15.29)
    corners = [[0, 0, 1], [1, 0, 0], [1 / 3, 1 / 3, 1 / 3], [0, 1, 0]]
    assert spread(corners, [[1, 0, 0], [7, 0, 0], [9, 0, 0], [3, 0, 0]], 0) == pytest.approx(7 - 2)
    with pytest.raises(ValueError, match="needs the vertices of two or more objectives"):
        spread([[0.5, 0.5], [1, 0]], [[0, 0], [0, 0]], 0)
    found = arrange(table({"base": [(0.0, 0.0)], "PARM": PARM}), OBJECTIVES)
    values = {(r["method"], r["measure"]): r["value"] for r in measure(found, OBJECTIVES, [], resamples=5)}
    assert values["PARM", "spread of help"] == pytest.approx(4.95 + 1.92)
    assert ("base", "spread of help") not in values
