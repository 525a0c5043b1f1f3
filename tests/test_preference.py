# SPDX-License-Identifier: Apache-2.0
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_pblora import as_preference, name_preference, preference_grid, sample_preferences
from peft_pblora.preference import check_columns, check_objectives


OBJECTIVES = ["helpful", "harmless", "humorous"]


def test_mapping_sequence_and_tensor_agree():
    expected = torch.tensor([0.2, 0.3, 0.5])
    given_by_name = {"humorous": 0.5, "helpful": 0.2, "harmless": 0.3}
    for preference in (given_by_name, [0.2, 0.3, 0.5], (0.2, 0.3, 0.5), torch.tensor([0.2, 0.3, 0.5]).double()):
        result = as_preference(preference, OBJECTIVES)
        assert result.dtype == torch.float32
        torch.testing.assert_close(result, expected)


def test_one_preference_a_row():
    rows = as_preference([{"helpful": 1, "harmless": 0, "humorous": 0}, dict.fromkeys(OBJECTIVES, 1 / 3)], OBJECTIVES)
    torch.testing.assert_close(rows, torch.tensor([[1.0, 0, 0], [1 / 3, 1 / 3, 1 / 3]]))


@pytest.mark.parametrize(
    ("preference", "message"),
    [
        ({"helpfull": 1.0}, r"names \['helpfull'\].*Did you mean 'helpful'\?"),
        ({"helpful": 1.0, "harmless": 0.0}, r"no weight for \['humorous'\]"),
        ([0.5, 0.5], r"has 2 entries, but this adapter was trained for 3 objectives \(helpful, harmless, humorous\)"),
        ([1.5, -0.5, 0.0], "negative weight"),
        ([float("nan"), 0.5, 0.5], "NaN or infinite"),
        ([0.5, 0.4, 0.2], "must sum to 1"),
        ([[[1.0, 0.0, 0.0]]], "has shape"),
        ([], "has shape"),
    ],
)
def test_bad_preference(preference, message):
    with pytest.raises(ValueError, match=message):
        as_preference(preference, OBJECTIVES)


@pytest.mark.parametrize("preference", ["helpful", None, object()])
def test_not_a_preference(preference):
    with pytest.raises(TypeError, match="Give a mapping"):
        as_preference(preference, OBJECTIVES)


def test_rows_that_mix_mappings_with_something_else():
    with pytest.raises(TypeError, match="mixes mappings with"):
        as_preference([{"helpful": 1, "harmless": 0, "humorous": 0}, [1, 0, 0]], OBJECTIVES)


def test_weights_off_the_simplex_are_taken_where_they_are_allowed():
    for preference in ([1.5, -0.5, 0.0], [0.0, 0.0, 0.0], {"helpful": 2.0, "harmless": 1.0, "humorous": 0.5}):
        found = as_preference(preference, OBJECTIVES, allow_off_simplex=True)
        expected = list(preference.values()) if isinstance(preference, dict) else preference
        assert found.tolist() == expected
        with pytest.raises(ValueError, match="allow_off_simplex=True"):
            as_preference(preference, OBJECTIVES)
    with pytest.raises(ValueError, match="NaN or infinite"):
        as_preference([float("inf"), 0.0, 0.0], OBJECTIVES, allow_off_simplex=True)
    assert name_preference([1.5, -0.5, 0.0], OBJECTIVES, True) == "helpful=1.5,harmless=-0.5,humorous=0"


def test_rows_have_no_single_name():
    with pytest.raises(ValueError, match="has no single name"):
        name_preference(torch.eye(3), OBJECTIVES)


def test_normalize():
    torch.testing.assert_close(as_preference([2, 1, 1], OBJECTIVES, normalize=True), torch.tensor([0.5, 0.25, 0.25]))
    with pytest.raises(ValueError, match="sums to 0"):
        as_preference([0, 0, 0], OBJECTIVES, normalize=True)


def test_names():
    assert name_preference([0, 1, 0], OBJECTIVES) == "harmless"
    assert name_preference([1 / 3] * 3, OBJECTIVES) == "uniform"
    assert name_preference([0.2, 0.3, 0.5], OBJECTIVES) == "helpful=0.2,harmless=0.3,humorous=0.5"


def test_names_that_are_too_alike_for_a_label_are_told_apart():
    assert name_preference([0.5, 0.5], ["uniform", "b"]) == "uniform=0.5,b=0.5"
    assert name_preference([1, 0], ["uniform", "b"]) == "uniform"
    assert name_preference([1, 1e-9], ["a", "b"]) == "a=1,b=1e-09"
    assert name_preference([0.33333, 0.66667], ["a", "b"]) == "a=0.33333,b=0.66667"
    assert name_preference([1], ["a"]) == "a"


@given(st.lists(st.floats(0, 1, width=32), min_size=2, max_size=12), st.sampled_from(["uniform", "helpful"]))
def test_a_label_says_which_preference_it_is(firsts, name):
    found = {name_preference([first, 1 - first], [name, "other"]) for first in firsts}
    assert len(found) == len({tuple(as_preference([first, 1 - first], ["a", "b"]).tolist()) for first in firsts})


@pytest.mark.parametrize("names", [["a\nb"], ["a", " "], ["a\x00"], ["\u200b"], ["\ud800"], [""], [1], []])
def test_objectives_are_names_that_can_be_read(names):
    with pytest.raises(ValueError, match="must be a list of one or more non-empty names, without line breaks"):
        check_objectives(names)


def test_columns_of_objectives_are_told_from_those_of_the_table():
    check_columns(["a", "b"], ["method"], ("{}", "{}_low"))
    for names, column, owner in (
        (["b", "method"], "method", "the table itself"),
        (["a", "a_low"], "a_low", "the objective 'a'"),
        (["a_low", "a"], "a_low", "the objective 'a_low'"),
    ):
        message = f"the objective {names[1]!r} would make a column that is called {column!r}, which is a column of"
        with pytest.raises(ValueError, match=f"(?i){message} {owner}"):
            check_columns(names, ["method"], ("{}", "{}_low"))


@given(st.integers(1, 20), st.floats(0.01, 100), st.integers(0, 2**31))
def test_samples_lie_on_the_simplex(n, concentration, seed):
    samples = sample_preferences(n, OBJECTIVES, concentration, torch.Generator().manual_seed(seed))
    assert samples.shape == (n, 3)
    as_preference(samples, OBJECTIVES)


def test_samples_follow_the_dirichlet():
    concentration = torch.tensor([0.5, 1.0, 2.5])
    samples = sample_preferences(100_000, OBJECTIVES, concentration.tolist(), torch.Generator().manual_seed(0))
    exact = torch.distributions.Dirichlet(concentration)
    torch.testing.assert_close(samples.mean(0), exact.mean, atol=5e-3, rtol=0)
    torch.testing.assert_close(samples.var(0), exact.variance, atol=5e-3, rtol=0)


def test_samples_repeat_with_their_generator_and_leave_the_global_one_alone():
    state = torch.get_rng_state()
    first = sample_preferences(3, OBJECTIVES, generator=torch.Generator().manual_seed(7))
    second = sample_preferences(3, OBJECTIVES, generator=torch.Generator().manual_seed(7))
    assert torch.equal(first, second)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("n", "concentration"),
    [(0, 1.0), (1, 0.0), (1, -1.0), (1, [1.0, 1.0]), (1, float("nan")), (2.0, 1.0), (1, "much")],
)
def test_bad_samples(n, concentration):
    with pytest.raises(ValueError, match="`n`|`concentration`"):
        sample_preferences(n, OBJECTIVES, concentration)


@pytest.mark.parametrize(("k", "steps"), [*itertools.product([1, 2, 3], [1, 4])])
def test_grid_holds_every_point_once_in_lexicographic_order(k, steps):
    grid = preference_grid(OBJECTIVES[:k], steps)
    expected = [c for c in itertools.product(range(steps + 1), repeat=k) if sum(c) == steps]
    assert torch.equal(grid, torch.tensor(expected, dtype=torch.float32) / steps)


def test_a_grid_of_many_objectives_takes_no_longer_than_its_points():
    grid = preference_grid([f"objective {i}" for i in range(10)], 5)
    assert grid.shape == (math.comb(14, 9), 10)
    torch.testing.assert_close(grid.sum(1), torch.ones(len(grid)))
    assert len(preference_grid([f"objective {i}" for i in range(40)], 1)) == 40


def test_bad_grid():
    with pytest.raises(ValueError, match="at least one interval"):
        preference_grid(OBJECTIVES, 0)
    with pytest.raises(ValueError, match="`steps` is 2.0, but the grid needs at least one interval, a whole number"):
        preference_grid(OBJECTIVES, 2.0)
