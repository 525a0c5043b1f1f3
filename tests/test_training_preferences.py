# SPDX-License-Identifier: Apache-2.0
"""Preferences in training: a pure function of seed, step and pair."""

import pytest
import torch
from pair_data import OBJECTIVES
from training_runs import config

from trl_parm.training.preferences import PreferenceSampler, mix


def test_draws_depend_on_counters_and_nothing_else():
    sampler = PreferenceSampler(7, OBJECTIVES, 0.5)
    before = torch.random.get_rng_state()
    steps = [sampler.for_step(step) for step in range(5)]
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(99)
    again = PreferenceSampler(7, OBJECTIVES, 0.5)
    assert all(torch.equal(again.for_step(step), steps[step]) for step in (4, 0, 2))
    assert len({tuple(alpha.tolist()) for alpha in steps}) == 5
    assert not torch.equal(PreferenceSampler(8, OBJECTIVES, 0.5).for_step(0), steps[0])


def test_a_pair_gets_its_draw_whichever_batch_it_is_in():
    sampler = PreferenceSampler(0, OBJECTIVES, 0.5)
    whole = sampler.for_pairs(3, torch.arange(6))
    assert torch.equal(sampler.for_pairs(3, torch.tensor([4, 1])), whole[[4, 1]])
    assert not torch.equal(sampler.for_pairs(4, torch.arange(6)), whole)
    assert len(whole.unique(dim=0)) == 6


@pytest.mark.parametrize("concentration", [0.5, 2.0])
def test_draws_follow_the_dirichlet_distribution(concentration):
    """Mean 1/k and variance (k − 1) / (k² (k p + 1)), by steps and by pairs, with k = 3."""
    sampler = PreferenceSampler(1, ["a", "b", "c"], concentration)
    variance = 2 / (9 * (3 * concentration + 1))
    for drawn in (torch.stack([sampler.for_step(s) for s in range(3000)]), sampler.for_pairs(5, torch.arange(3000))):
        torch.testing.assert_close(drawn.sum(1), torch.ones(3000))
        torch.testing.assert_close(drawn.mean(0), torch.full((3,), 1 / 3), atol=0.03, rtol=0)
        torch.testing.assert_close(drawn.var(0), torch.full((3,), variance), atol=0.15 * variance, rtol=0)


def test_neighbouring_counters_give_unrelated_seeds():
    seeds = {mix(seed, step, pair) for seed in range(10) for step in range(10) for pair in range(10)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert mix(1, 2) != mix(2, 1)


def test_the_default_is_the_one_of_the_papers(tmp_path):
    args = config(tmp_path)
    assert (args.concentration, args.preference_per) == (0.5, "step")
