# SPDX-License-Identifier: Apache-2.0
"""The mathematics of speculative sampling."""

import pytest
import torch

from trl_parm.decoding.speculative.sampling import acceptance, expected_tokens, verify


@pytest.mark.parametrize("seed", range(4))
def test_what_verify_emits_has_the_target_distribution(seed):
    """Over a fine grid of uniform noise and all drafted tokens: min(p, q) + (p − q)₊ = p."""
    generator = torch.Generator().manual_seed(seed)
    p, q = (torch.softmax(3 * torch.randn(6, generator=generator).double(), 0) for _ in range(2))
    if seed == 0:
        q[2] = 0
        q /= q.sum()
    grid = (torch.arange(20000).double() + 0.5) / 20000
    emitted = torch.zeros(6).double()
    for token in range(6):
        tokens = torch.full((len(grid), 1), token)
        rows = (len(grid), 1, 6)
        counts, left = verify(p.expand(rows), q.expand(rows), tokens, grid[:, None])
        accepted = counts.double().mean()
        emitted[token] += q[token] * accepted
        emitted += q[token] * (1 - accepted) * left[counts == 0].mean(0).nan_to_num()
    torch.testing.assert_close(emitted, p, atol=1e-4, rtol=1e-4)
    assert acceptance(p, q) == pytest.approx(float(torch.minimum(p, q).sum()))


def test_verify_stops_at_the_first_rejection_and_where_nothing_was_drafted():
    p = torch.eye(4)[None, [1, 2, 3]].repeat(3, 1, 1)
    q = torch.eye(4)[torch.tensor([[1, 2, 3], [1, 0, 3], [1, 2, 3]])]
    q[2, 1] = 0
    counts, left = verify(p, q, torch.tensor([[1, 2, 3], [1, 0, 3], [1, 2, 3]]), torch.full((3, 3), 0.5))
    assert counts.tolist() == [3, 1, 1]
    assert left[1:].argmax(-1).tolist() == [2, 2]
    assert torch.isfinite(left).all()


def test_expected_tokens_is_the_geometric_sum():
    assert expected_tokens(0.8, 4) == pytest.approx((1 - 0.8**5) / (1 - 0.8))
    assert expected_tokens(1.0, 4) == 5
