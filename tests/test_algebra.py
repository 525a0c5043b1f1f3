# SPDX-License-Identifier: Apache-2.0
"""The algebra of scorers, on tensors alone."""

from decimal import Decimal, localcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_parm.algebra import BASE, Intersection, PowerMean, Scorer, Step, Union, guided_logits, sum_of


class Fixed(Scorer):
    """Fixed values, one of them −inf."""

    def __init__(self, seed: int) -> None:
        self.values = torch.randn(2, 5, generator=torch.Generator().manual_seed(seed)).double()
        self.values[:, seed % 5] = -torch.inf

    def __call__(self, step):
        return self.values.float()

    def __repr__(self) -> str:
        return "Fixed"


FIXED = [Fixed(seed) for seed in range(4)]
SCORES = torch.randn(2, 5, generator=torch.Generator().manual_seed(9))
STEP = Step(SCORES)
weights = st.integers(-24, 24).map(lambda n: n / 8)
terms = st.lists(st.tuples(weights, st.integers(0, 3)), min_size=1, max_size=6)


@given(a=terms, b=terms, factor=weights, row=st.booleans())
@settings(max_examples=60, deadline=None)
def test_laws_of_the_algebra(a, b, factor, row):
    """Sums commute and distribute; equal terms merge; the value is the weighted sum without terms of weight 0, and
    −inf where a term of any other weight excludes a token."""
    weight = torch.tensor([factor, 1.0]) if row else factor

    def build(terms):
        return sum_of((w, FIXED[i]) for w, i in terms)

    def same(x, y):
        torch.testing.assert_close(x(STEP), y(STEP), atol=1e-4, rtol=1e-4)

    x, y = build(a), build(b)
    same(x + y, y + x)
    if factor:
        same(weight * (x + y), weight * x + weight * y)
    same(x * 2 / 2, x)
    assert (x - x).terms() == []
    assert len((x + y).terms()) <= 4
    expected = torch.zeros(2, 5, dtype=torch.float64)
    for i in range(4):
        total = sum(w for w, j in a if j == i)
        if total:
            known = FIXED[i].values > -torch.inf
            expected = torch.where(known, expected + total * FIXED[i].values, -torch.inf)
    torch.testing.assert_close(x(STEP).double(), expected, atol=1e-4, rtol=1e-4)


def test_unions_and_intersections_are_the_largest_and_the_smallest():
    values = torch.stack([FIXED[0].values, FIXED[1].values, torch.log_softmax(SCORES.double(), -1)])
    for kind, expected in ((Union, values.amax(0)), (Intersection, values.amin(0))):
        found = kind(FIXED[0], FIXED[1], BASE, FIXED[0])
        torch.testing.assert_close(found(STEP).double(), expected)
        assert repr(found) == f"{kind.__name__}(Fixed, Fixed, BASE)"
        assert len(list((2 * found + BASE).scorers())) == 4


def test_a_step_of_several_positions_is_each_position():
    positions = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(1))
    formula = 2.0 * BASE + torch.tensor([0.5, -1.0]) * BASE
    together = guided_logits(formula, Step(positions))
    for i in range(3):
        torch.testing.assert_close(together[:, i], guided_logits(formula, Step(positions[:, i])))


def test_what_the_base_excludes_stays_excluded_and_the_rest_is_normalised():
    scores = SCORES.clone()
    scores[0, 2] = -torch.inf
    found = guided_logits(BASE + FIXED[1], Step(scores))
    expected = torch.log_softmax((torch.log_softmax(scores, -1) + FIXED[1].values), -1)
    torch.testing.assert_close(found.double(), expected.double(), atol=1e-6, rtol=1e-5)
    assert found[0, 2] == -torch.inf
    torch.testing.assert_close(found.logsumexp(-1), torch.zeros(2), atol=1e-6, rtol=0)


def test_power_means():
    values = [BASE(STEP).double(), FIXED[1].values]
    mean = PowerMean([(0.25, BASE), (0.75, FIXED[1]), (0.0, FIXED[2])], order=2.0)
    expected = (0.25 * values[0].exp() ** -2 + 0.75 * values[1].exp() ** -2) ** -0.5
    torch.testing.assert_close(mean(STEP).double().exp(), expected, atol=1e-5, rtol=1e-5)
    assert (mean(STEP)[:, 1] == -torch.inf).all()
    assert repr(mean) == "PowerMean(0.25 * BASE, 0.75 * Fixed; order=2)"
    rows = PowerMean([(torch.tensor([1.0, 0.0]), BASE), (torch.tensor([0.0, 1.0]), FIXED[1])])(STEP)
    torch.testing.assert_close(rows[0].double(), values[0][0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rows[1].double(), values[1][1], atol=1e-5, rtol=1e-5)


class Given(Scorer):
    """Values that a test gives."""

    def __init__(self, values) -> None:
        self.values = torch.tensor(values, dtype=torch.float32)

    def __call__(self, step):
        return self.values


EXTREMES = [
    [[-0.1, -3.0, -80.0, -1e4, 0.0, -1e-3, -torch.inf, -2.0, -1.5, -torch.inf]],
    [[-2.5, -3.0, -0.3, -7.0, -1e4, -1.1e-3, -2.0, -torch.inf, -1.5000002, -torch.inf]],
    [[-9.0, -3.0, -700.0, -12.5, -3e3, -2e-3, -1.0, -4.0, -1.4999999, -torch.inf]],
]


def power_mean(values: list[float], weights: list[float], order: float) -> float:
    """The definition with 400 digits."""
    with localcontext() as context:
        context.prec = 400
        if -torch.inf in (value for value, weight in zip(values, weights) if weight):
            return -torch.inf
        a, total = Decimal(order), sum(map(Decimal, weights))
        terms = (Decimal(w) / total * (-a * Decimal(v)).exp() for v, w in zip(values, weights) if w)
        return float(-sum(terms).ln() / a)


@pytest.mark.parametrize("order", [1e-300, 1e-12, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 0.5, 1, 2, 10, 1e300])
@pytest.mark.parametrize(
    "weights", [[0.3, 0.7, 0.0], [0.25, 0.25, 0.5], [1e-12, 1 - 1e-12, 0.0], [1e-20, 1e-6, 0.7], [3.0, 5.0, 4.0]]
)
def test_power_means_of_any_order_are_those_of_many_digits(weights, order):
    """Near the geometric mean and near the minimum, where a float32 holds nothing of π^−a but 1, 0 or infinity."""
    found = PowerMean([(w, Given(v)) for w, v in zip(weights, EXTREMES, strict=True)], order)(Step(torch.zeros(1, 10)))
    for i, answer in enumerate(found[0].tolist()):
        values = [scorer[0][i] for scorer in (Given(v).values.tolist() for v in EXTREMES)]
        expected = power_mean(values, weights, min(order, 50))  # at 50 it is the minimum, but for −log(w)/50
        if order > 50:
            expected = min(value for value, weight in zip(values, weights) if weight)
        largest = max(abs(v) for v, w in zip(values, weights) if w and v > -torch.inf) if expected > -torch.inf else 0
        assert answer == pytest.approx(expected, rel=0, abs=1e-6 * largest + 1e-9)
        if order < 1e-10 and expected > -torch.inf:
            mean = sum(v * w for v, w in zip(values, weights) if w) / sum(weights)
            assert answer == pytest.approx(mean, rel=0, abs=1e-6 * largest + 1e-9)


def test_power_means_of_rows_count_shares_of_each_row():
    values = [Given([v[0], v[0]]) for v in EXTREMES]
    rows = torch.tensor([[0.3, 0.7, 0.0], [0.0, 2.0, 6.0]])
    found = PowerMean(list(zip(rows.unbind(1), values)), 1e-6)(Step(torch.zeros(2, 10)))
    for row, weights in zip(found, rows.tolist()):
        alone = PowerMean(list(zip(weights, values)), 1e-6)(Step(torch.zeros(2, 10)))
        torch.testing.assert_close(row, alone[0], atol=0, rtol=1e-6)


def test_silent_guides_are_kept_in_mind():
    """Weights that cancel, or are 0, leave no term, but whoever would guide is known."""
    for formula in (
        0.0 * FIXED[0] + BASE,
        (FIXED[0] - FIXED[0]) * 2 + BASE,
        PowerMean([(1.0, BASE), (0.0, FIXED[0])]),
    ):
        assert list(formula.scorers()) == [BASE]
        assert FIXED[0] in formula.silent()
    assert (0.0 * FIXED[0] + BASE).terms() == [(1.0, BASE)]


def test_a_weight_of_rows_multiplies_the_rows_that_generate_makes_of_one():
    four = Step(torch.zeros(4, 5))
    weights = torch.tensor([1.0, 3.0])
    found = (weights * BASE)(four) / BASE(four)
    assert found[:, 0].tolist() == [1.0, 1.0, 3.0, 3.0]
    with pytest.raises(ValueError, match="weights for 2 rows, but the batch has 3"):
        (weights * BASE)(Step(torch.zeros(3, 5)))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: BASE + 1, TypeError, "unsupported operand"),
        (lambda: BASE * "2", TypeError, "can't multiply|unsupported operand"),
        (lambda: BASE * float("nan"), ValueError, "must be finite"),
        (lambda: BASE * torch.tensor([1.0, float("inf")]), ValueError, "must be finite"),
        (lambda: BASE * torch.ones(2, 2), ValueError, "must be a number or"),
        (lambda: PowerMean([(-0.5, BASE)]), ValueError, "none may be negative"),
        (lambda: PowerMean([(1.0, BASE)], order=0.0), ValueError, "`order` is 0.0"),
        (lambda: PowerMean([(0.0, BASE), (0.0, FIXED[0])]), ValueError, "a mean needs one above 0"),
        (lambda: PowerMean([(torch.tensor([1.0, 0.0]), BASE)]), ValueError, "a mean needs one above 0, in every row"),
        (
            lambda: PowerMean([(torch.ones(2), BASE), (torch.ones(3), FIXED[0])]),
            ValueError,
            "weights for 2 and for 3 rows",
        ),
        (lambda: Union(BASE), ValueError, "Union was given \\[BASE\\], but it needs two scorers or more"),
        (lambda: Intersection(BASE, 2.0), ValueError, "Intersection was given"),
    ],
)
def test_bad_formulas(make, error, message):
    with pytest.raises(error, match=message):
        make()
