# SPDX-License-Identifier: Apache-2.0
"""The guided distribution of logits that an engine has computed already. Mathematics only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from trl_parm.algebra import BASE, Scorer, Step, Weight, guided_logits, sum_of


def combine(
    base_logits: torch.Tensor, arm_logits: torch.Tensor | Sequence[torch.Tensor], strength: Weight | Sequence[Weight]
) -> torch.Tensor:
    """The guided log-probabilities (PARM, arXiv 2505.06274, eq. 5; GenARM, arXiv 2410.08193):

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
    for logits in guides:
        if logits.shape != base_logits.shape:
            shapes = tuple(base_logits.shape), tuple(logits.shape)
            raise ValueError(f"The base's logits have shape {shapes[0]}, a guide's {shapes[1]}.")
    answers = {_Guide(number): torch.log_softmax(logits.float(), -1) for number, logits in enumerate(guides)}
    return guided_logits(BASE + sum_of(zip(strengths, answers)), Step(base_logits, answers))


@dataclass(frozen=True)
class _Guide(Scorer):
    """A guide that the engine has read."""

    number: int

    def __call__(self, step: Step) -> torch.Tensor:
        return step.answers[self]
