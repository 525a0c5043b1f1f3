# SPDX-License-Identifier: Apache-2.0
"""The noise of sampling: values that published seeds stand for, and settings that act as transformers' warpers do."""

import itertools

import pytest
import torch
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from trl_parm.noise import Sampling, gumbel_noise, row_seed


def test_seeds_and_noise_are_those_of_all_earlier_results():
    """Numbers in README and docs were sampled with them."""
    assert row_seed(0, "w1 w2") == 949616082163424277
    assert row_seed(3, [{"role": "user", "content": "ä"}]) == 7855526283788192133
    assert row_seed(0, {"b": 1, "a": 2}) == row_seed(0, {"a": 2, "b": 1}) < 2**63
    expected = torch.tensor([0.68670171, 0.00474037, 0.00106660, 0.58160484])
    torch.testing.assert_close(gumbel_noise(5, 2, torch.zeros(1, 4)), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"), list(itertools.product((1.0, 0.7), (0, 5, 99), (1.0, 0.8), (0.0, 0.1)))
)
def test_settings_act_as_transformers_warpers(temperature, top_k, top_p, min_p):
    generator = torch.Generator().manual_seed(0)
    scores = (3 * torch.randn(20, 50, generator=generator)).round()  # with ties
    scores[torch.rand(20, 50, generator=generator) < 0.2] = -torch.inf
    expected, ids = TemperatureLogitsWarper(temperature)(None, scores), None
    expected = TopKLogitsWarper(top_k)(ids, expected) if top_k else expected
    expected = TopPLogitsWarper(top_p)(ids, expected) if top_p < 1 else expected
    expected = MinPLogitsWarper(min_p)(ids, expected) if min_p else expected
    assert torch.equal(Sampling(temperature, top_k, top_p, min_p).warp(scores), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "`temperature` is 0.0, but it must be positive and finite"),
        ({"temperature": float("nan")}, "`temperature` is nan"),
        ({"top_k": -1}, "`top_k` is -1, but it must be a whole number"),
        ({"top_k": 1.5}, "`top_k` is 1.5"),
        ({"top_p": 0.0}, "`top_p` is 0.0, but it must be above 0"),
        ({"min_p": 1.5}, "`min_p` is 1.5"),
    ],
)
def test_settings_out_of_their_range(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)
