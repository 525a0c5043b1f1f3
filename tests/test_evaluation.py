# SPDX-License-Identifier: Apache-2.0
import itertools

import numpy as np
import pytest
from conftest import tiny_arm, tiny_llama
from hypothesis import given
from hypothesis import strategies as st

from trl_parm import PARMLogitsProcessor, hypervolume, mean_inner_product, pareto_front
from trl_parm.evaluation import Run, mean_and_error, plot_front, summarize, sweep
from trl_parm.rewards import brevity, conciseness, positivity


# Check values of a published comparison: points (help, −cost) at α_help 0, .2, .4, .6, .8, 1.
WEIGHTS = [[w, 1 - w] for w in (0, 0.2, 0.4, 0.6, 0.8, 1)]
PARM = [(-1.92, 10.58), (-0.72, 7.35), (0.89, 1.47), (3.74, -7.81), (4.49, -12.15), (4.95, -15.29)]
GENARM = [(-2.41, 10.69), (0.02, 4.67), (3.21, -4.96), (4.78, -10.29), (5.29, -13.95), (5.37, -13.62)]


@pytest.mark.parametrize(
    ("points", "reference", "volume"),
    [
        (PARM, (-3.41, -17.88), 138.02),
        (GENARM, (-3.41, -17.88), 139.01),
        (PARM, (-3, -5), 42.1),
        (GENARM, (-3, -5), 32.9),
    ],
)
def test_hypervolume_check_values(points, reference, volume):
    digits = len(str(volume).split(".")[1])
    assert round(hypervolume(points, reference), digits) == volume


@pytest.mark.parametrize(("points", "value"), [(PARM, 3.80), (GENARM, 3.05)])
def test_mean_inner_product_check_values(points, value):
    assert round(mean_inner_product(WEIGHTS, points), 2) == value


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
    ],
)
def test_bad_measures(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_rewards():
    texts = ["This is wonderful! I love it.", "Terrible. Awful.", "no end"]
    assert brevity(texts, texts) == [-6, -2, -2]
    assert conciseness(texts, texts) == [-3, -1, -2]
    positive = positivity(texts, texts)
    assert positive[0] > 0.5 > 0 > positive[1]
    assert positive[2] <= 0


def test_mean_and_error():
    mean, error = mean_and_error([1.0, 2.0, 3.0, 6.0])
    assert mean == 3.0
    assert error == pytest.approx(np.sqrt(14 / 3) / 2)


def _sweep(tokenizer, runs, rewards=None, prompts=("w1 w2", "w3", "w4"), **generation):
    rewards = rewards or {"helpful": brevity, "harmless": conciseness}
    return sweep(tiny_llama(), tokenizer, list(prompts), runs, rewards, batch_size=2, max_new_tokens=6, **generation)


def test_sweep_and_figure(tmp_path, tokenizer):
    arm = tiny_arm()
    runs = [Run("base")]
    runs += [Run("PARM", [w, 1 - w], lambda p: PARMLogitsProcessor(arm, p, 0.5)) for w in (0.0, 0.5, 1.0)]
    seen = []
    table = _sweep(tokenizer, runs, on_batch=seen.append, do_sample=True)
    assert len(table) == 4 * 3
    assert len(seen) == 4 * 2
    assert table["label"][3:12:3] == ["harmless", "uniform", "helpful"]
    assert table["preference"][0] is None
    for row in table:
        assert row["helpful"] == -len(row["response"].split())
    summary = summarize(table, ["helpful", "harmless"])
    assert [cell["label"] for cell in summary] == ["-", "harmless", "uniform", "helpful"]
    first = table.select(range(3))["helpful"]
    assert (summary[0]["helpful"], summary[0]["helpful_error"]) == mean_and_error(first)
    plot_front(summary, ["helpful", "harmless"], tmp_path / "front.png", reference=[-10, -10])
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    repeated = _sweep(tokenizer, runs, do_sample=True)
    assert repeated["response"] == table["response"]


def test_bad_sweeps(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="`prompts` is empty"):
        _sweep(tokenizer, [Run("base")], prompts=())
    with pytest.raises(ValueError, match="'bad' returned"):
        _sweep(tokenizer, [Run("base")], {"bad": lambda prompts, responses: [float("nan")] * len(responses)})
    with pytest.raises(ValueError, match="exactly two"):
        plot_front([], ["one"], tmp_path / "front.png")
