# SPDX-License-Identifier: Apache-2.0
"""Games on tokens, the common agency and the worst case: against SciPy in float64."""

import functools

import numpy as np
import pytest
import torch
from conftest import tiny_arm, tiny_llama
from scipy.optimize import minimize, minimize_scalar

from trl_parm import BASE, LM, PARM, Step, cage, genarm, parm
from trl_parm.decoding import worst_case
from trl_parm.decoding.games import best_response, common_agency
from trl_parm.decoding.worst_case import worst_weights


def game(seed: int, principals: int = 2, candidates: int = 6, scale: float = 1.0):
    draw = np.random.default_rng(seed)
    base = np.log(draw.dirichlet(np.ones(candidates)))
    values = scale * draw.exponential(size=(principals, candidates))
    return base, values - values.min(-1, keepdims=True)


def utility(payment, scores, value, tau):
    weights = np.exp(scores + payment / tau - (scores + payment / tau).max())
    return weights @ (value - payment) / weights.sum()


def by_scipy(scores, value, tau):
    """The best of several searches from different starts, over all payments and not only those of one margin."""
    starts = [np.zeros_like(value), value / 2, np.maximum(value - tau, 0)]
    found = [
        minimize(lambda y: -utility(y, scores, value, tau), start, bounds=[(0, v) for v in value], tol=1e-12)
        for start in starts
    ]
    return min(found, key=lambda result: result.fun)


@pytest.mark.parametrize("tau", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("scale", [0.05, 1.0, 10.0])
def test_best_responses_are_those_that_scipy_finds(tau, scale):
    for seed in range(5):
        base, values = game(seed, scale=scale)
        scores = base + values[1] / 2 / tau
        ours = best_response(torch.from_numpy(scores)[None], torch.from_numpy(values[:1]), tau)[0].numpy()
        theirs = by_scipy(scores, values[0], tau)
        assert (ours >= 0).all()
        assert (ours <= values[0]).all()
        assert utility(ours, scores, values[0], tau) >= -theirs.fun - 1e-9


def test_rows_are_games_of_their_own():
    games = [game(seed, principals=3) for seed in range(4)]
    base, values = (torch.from_numpy(np.stack(parts, axis)) for parts, axis in zip(zip(*games), (0, 1)))
    together, _ = common_agency(base, values, 0.3, 4)
    for row in range(4):
        alone, _ = common_agency(base[row], values[:, row], 0.3, 4)
        torch.testing.assert_close(together[row], alone)


@pytest.mark.parametrize(
    ("principals", "seeds"), [(2, [0]), *(pytest.param(n, range(5), marks=pytest.mark.slow) for n in (2, 3))]
)
def test_after_many_rounds_no_principal_can_do_better(principals, seeds):
    for seed in seeds:
        tau, (base, values) = 0.5, game(seed, principals)
        paid, payments = torch.zeros(principals, 6, dtype=torch.float64), None
        total, moved = common_agency(torch.from_numpy(base), torch.from_numpy(values), tau, 200)
        assert moved < 1e-6
        for _ in range(200):
            others = paid.sum(0) - paid
            paid = torch.stack(
                [
                    best_response(torch.from_numpy(base) + o / tau, q, tau)
                    for o, q in zip(others, torch.from_numpy(values))
                ]
            )
        payments = paid.numpy()
        torch.testing.assert_close(total, paid.sum(0))
        for i in range(principals):
            scores = base + (payments.sum(0) - payments[i]) / tau
            best = by_scipy(scores, values[i], tau)
            assert utility(payments[i], scores, values[i], tau) >= -best.fun - 1e-7


def test_a_principal_whose_weight_is_zero_pays_nothing_and_is_not_read():
    arm = tiny_arm().eval()
    formula = cage(arm, [1.0, 0.0])
    assert {scorer for scorer in formula.scorers()} == {BASE, LM(arm, [1.0, 0.0]), LM(arm, disable_adapter=True)}


def test_tokens_beyond_the_candidates_are_excluded_and_excluded_ones_are_no_reward():
    arm = tiny_arm().eval()
    formula = cage(arm, [0.5, 0.5], k=3)
    scores = torch.randn(2, 64)
    answers = {s: torch.randn(2, 64).log_softmax(-1) for s in formula.scorers() if isinstance(s, LM)}
    first = next(iter(answers))
    answers[first][:, scores.argmax()] = -torch.inf
    found = formula(Step(scores, answers))
    assert (found > -torch.inf).sum(-1).tolist() == [3, 3]
    assert not found.isnan().any()


def test_a_game_that_does_not_settle_says_so():
    arm = tiny_arm().eval()
    formula = cage(arm, [0.5, 0.5], rounds=1)
    answers = {s: 5 * torch.randn(2, 64) for s in formula.scorers() if isinstance(s, LM)}
    with pytest.warns(UserWarning, match="After 1 rounds payments still move by more than 0.001 nats"):
        formula(Step(torch.randn(2, 64), answers))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tau": 0.0}, "`tau` is 0.0"),
        ({"tau": True}, "`tau` is True"),
        ({"k": 1}, "`k` is 1, but it must be a whole number, 2 or larger"),
        ({"rounds": 0}, "`rounds` is 0"),
        ({"preference": [0.5, 0.6]}, "sums to"),
        ({"arm": {"a": tiny_llama()}, "preference": [1.0]}, "has 1 objectives, but a game needs two or more"),
        ({"arm": {"a": tiny_llama(), "b": tiny_llama()}}, "Give `reference`, that model"),
        ({"allow_off_simplex": True}, "weights on the simplex alone. Leave `allow_off_simplex` out"),
    ],
    ids=str,
)
def test_bad_games_are_refused(settings, message):
    given = {"arm": tiny_arm().eval(), "preference": [0.5, 0.5], **settings}
    with pytest.raises(ValueError, match=message):
        cage(**given)


@pytest.mark.parametrize("objectives", [1, 2, 3, 5])
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_worst_weights_are_those_that_scipy_finds(objectives, scale):
    for seed in range(4):
        base, values = game(seed, objectives, candidates=12, scale=scale)

        def gain(weights, base=base, values=values):
            scores = base + weights @ values
            return np.log(np.exp(scores - scores.max()).sum()) + scores.max()

        simplex = {"type": "eq", "fun": lambda weights: weights.sum() - 1}
        start = np.full(objectives, 1 / objectives)
        theirs = minimize(
            gain, start, bounds=[(0, 1)] * objectives, constraints=simplex, tol=1e-12, options={"maxiter": 500}
        )
        found, gap = worst_weights(torch.from_numpy(base), torch.from_numpy(values), tolerance=1e-9)
        ours = found.numpy()
        assert gap < 1e-4
        assert (ours >= 0).all()
        assert ours.sum() == pytest.approx(1)
        assert gain(ours) <= theirs.fun + 1e-7


def test_a_worst_case_is_the_method_at_the_weights_of_each_token():
    arm = tiny_arm().eval()
    formula = parm(arm, "worst_case", beta=0.5)
    vertices = [LM(arm, [1.0, 0.0]), LM(arm, [0.0, 1.0])]
    assert set(formula.scorers()) == {BASE, *vertices}
    scores = torch.randn(3, 64)
    answers = {vertex: torch.randn(3, 64).log_softmax(-1) for vertex in vertices}
    weights, _ = worst_weights(scores.log_softmax(-1), 2 * torch.stack([answers[vertex] for vertex in vertices]))
    fixed = BASE + 2.0 * weights[0] * vertices[0] + 2.0 * weights[1] * vertices[1]
    step = Step(scores, answers)
    torch.testing.assert_close(formula(step), fixed(step), atol=1e-4, rtol=1e-4)
    text = PARM(arm.get_base_model(), arm, "worst_case").generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4)
    assert text.shape == (1, 7)
    with pytest.raises(ValueError, match="`arms` is empty"):
        genarm({}, "worst_case")
    with pytest.raises(TypeError):
        parm(arm, "worst case")


@pytest.mark.parametrize("beta", [1.0, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
def test_a_worst_case_is_as_strong_as_asked(beta):
    """Down to the smallest β: two guides that say the same are one of them, and two that do not are what SciPy finds,
    also where one of them excludes a token."""
    arm = tiny_arm().eval()
    formula = parm(arm, "worst_case", beta=beta)
    _, *vertices = formula.scorers()
    for seed in range(8):
        draw = torch.Generator().manual_seed(seed)
        base, first, second = (torch.randn(1, 64, generator=draw).log_softmax(-1) for _ in range(3))
        if seed % 2:
            first[:, :3] = -torch.inf
            first = first.log_softmax(-1)
        alone = (base.double() + first.double() / beta).softmax(-1)
        found = formula(Step(base, dict.fromkeys(vertices, first))).softmax(-1)
        assert (found - alone).abs().sum() < 2e-3
        found = formula(Step(base, dict(zip(vertices, (first, second))))).softmax(-1)
        kept = first > -torch.inf
        scores, one, other = base[kept].double(), first[kept].double() / beta, second[kept].double() / beta

        def at(w, scores=scores, one=one, other=other):
            return scores + w * one + (1 - w) * other

        best = minimize_scalar(lambda w, at=at: torch.logsumexp(at(w), -1).item(), bounds=(0, 1), method="bounded")
        ours = found[kept].double()
        if 0.01 < best.x < 0.99:  # then both expect as much
            assert abs((ours * (one - other)).sum().item()) < max(1e-2, 1e-6 / beta)
        else:
            assert (ours - at(round(best.x)).softmax(-1)).abs().sum() < 2e-3


def test_worst_weights_that_are_not_found_say_so(monkeypatch):
    """Objectives that are far from each other, and a single round, which three objectives can't be settled in."""
    draw = torch.Generator().manual_seed(0)
    base, values = torch.randn(4, 12, generator=draw), 10 * torch.randn(3, 4, 12, generator=draw)
    last, gap = worst_weights(base, values, rounds=1)
    assert gap > 0.1
    assert (last >= 0).all()
    torch.testing.assert_close(last.sum(0), torch.ones(4))
    more, less = worst_weights(base, values)
    assert less < gap
    arm = tiny_arm(objectives=["a", "b", "c"]).eval()
    formula = parm(arm, "worst_case")
    terms = [scorer for scorer in formula.scorers() if isinstance(scorer, LM)]
    step = Step(
        torch.nn.functional.pad(base, (0, 52), value=-30.0),
        {
            term: torch.nn.functional.pad(value, (0, 52), value=-30.0)
            for term, value in zip(terms, values, strict=True)
        },
    )
    monkeypatch.setattr(worst_case, "worst_weights", functools.partial(worst_weights, rounds=1))
    with pytest.warns(UserWarning, match="expected values of objectives still differ by more than"):
        found = formula(step)
    assert torch.isfinite(found).all()
