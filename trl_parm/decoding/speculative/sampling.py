# SPDX-License-Identifier: Apache-2.0
"""Speculative sampling: which drafted tokens are kept, so that the text is distributed as the target says.

Leviathan et al., ICML 2023, arXiv 2211.17192, algorithm 1. Mathematics only.
"""

from __future__ import annotations

import torch


def verify(
    target: torch.Tensor, draft: torch.Tensor, tokens: torch.Tensor, noise: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Accepts the drafted token x at each position with probability min(1, p(x)/q(x)) until one is rejected.

    Args:
        target, draft (`torch.Tensor` of shape `(rows, drafted, vocab)`): The distributions p that are to be sampled,
            and q that the tokens were sampled from; q is 0 where nothing was drafted, which is rejected.
        tokens, noise (`torch.Tensor` of shape `(rows, drafted)`): The drafted tokens; uniform in [0, 1).

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the number of accepted tokens of each row, shape `(rows,)`, and the
        distribution of the token after them, shape `(rows, vocab)`: (p − q)₊, normalised, at the rejected position. It
        is of no use in a row where all are accepted.
    """
    p = target.gather(-1, tokens[..., None])[..., 0]
    q = draft.gather(-1, tokens[..., None])[..., 0]
    accepted = (noise * q < p) & (q > 0)
    counts = accepted.long().cumprod(1).sum(1)
    at = counts.clamp(max=tokens.shape[1] - 1)[:, None, None].expand(-1, 1, target.shape[-1])
    wanted = target.gather(1, at)[:, 0]
    left = (wanted - draft.gather(1, at)[:, 0]).clamp(min=0)
    total = left.sum(-1, keepdim=True)
    return counts, torch.where(total > 0, left / total, wanted)


def acceptance(target: torch.Tensor, draft: torch.Tensor) -> torch.Tensor:
    """The probability that a token drafted from q is accepted: Σ_x min(p(x), q(x)), over the last dimension."""
    return torch.minimum(target, draft).sum(-1)


def expected_tokens(acceptance: float, drafted: int) -> float:
    """E[tokens of a round] = (1 − a^(n+1)) / (1 − a) for n drafted tokens, each accepted with probability a."""
    return sum(acceptance**i for i in range(drafted + 1))
