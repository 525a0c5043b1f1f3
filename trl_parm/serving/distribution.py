# SPDX-License-Identifier: Apache-2.0
"""The guided distribution of logits that an engine has computed already. Mathematics only."""

from __future__ import annotations

from collections.abc import Sequence

import torch


Strength = float | torch.Tensor
"""A number, or a tensor of shape `(rows,)`."""


def combine(
    base_logits: torch.Tensor,
    arm_logits: torch.Tensor | Sequence[torch.Tensor],
    strength: Strength | Sequence[Strength],
) -> torch.Tensor:
    """The guided log-probabilities, up to log Z (PARM, arXiv 2505.06274, eq. 5; GenARM, arXiv 2410.08193):

        log π = log π_base + Σ_i w_i · log π_i − log Z,   w = 1/β of PARM, α_i/β of GenARM

    Tokens that the base excludes (−inf) stay excluded, and a guide of strength 0 changes nothing. The arguments are
    not changed.

    Args:
        base_logits (`torch.Tensor` of shape `(..., vocab)`): The base model's logits or log-probabilities.
        arm_logits (`torch.Tensor` of shape `(..., vocab)`, or a sequence of them): Those of the guide, or of each.
        strength (`float` or `torch.Tensor` of shape `(rows,)`, or a sequence of them): w of each guide.

    Returns:
        `torch.Tensor` of shape `(..., vocab)`, float32.

    Raises:
        ValueError: shapes that differ, or not one strength for each guide.

    Example:

    ```python
    combine(base, arm, 1 / beta)
    combine(base, [helpful, harmless], [0.7 / beta, 0.3 / beta])
    ```
    """
    alone = isinstance(arm_logits, torch.Tensor)
    guides = [arm_logits] if alone else list(arm_logits)
    strengths = [strength] if alone else list(strength)  # pyright: ignore[reportArgumentType]
    if len(guides) != len(strengths):
        raise ValueError(f"There are {len(guides)} guides, but {len(strengths)} strengths. Give one for each guide.")
    base = torch.log_softmax(base_logits.float(), dim=-1)
    guided = base
    for logits, weight in zip(guides, strengths):
        if logits.shape != base.shape:
            raise ValueError(f"The base's logits have shape {tuple(base.shape)}, a guide's {tuple(logits.shape)}.")
        guided = guided + _weighted(weight, torch.log_softmax(logits.float(), dim=-1))  # pyright: ignore[reportArgumentType]
    return guided.masked_fill(base == -torch.inf, -torch.inf)


def _weighted(weight: Strength, values: torch.Tensor) -> torch.Tensor:
    """`weight * values`, where 0 · −inf is 0."""
    column = torch.as_tensor(weight, dtype=values.dtype, device=values.device)
    if column.ndim:
        column = column[:, None]
    return torch.where(column == 0, torch.zeros_like(values), column * values)
