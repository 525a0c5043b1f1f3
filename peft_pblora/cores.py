# SPDX-License-Identifier: Apache-2.0
"""Cores: the r×r matrix W(α) that makes a LoRA preference-conditioned.

Every adapter of this package is ΔW(α) = s · B W(α) A and differs only in W(α). A core is a small `nn.Module` that
owns the parameters of W and maps a preference to the matrix. It knows nothing of layers, PEFT or models.
"""

import math

import torch
from torch import nn


class Core(nn.Module):
    """What every core offers: its size, its initialisation, and W(α)."""

    rank: int
    """The size r of W(α)."""

    def reset_parameters(self) -> None:
        """Draws fresh parameters, as the method's authors do."""
        raise NotImplementedError

    def forward(self, preference: torch.Tensor) -> torch.Tensor:
        """Returns W(α).

        Args:
            preference (`torch.Tensor` of shape `(k,)` or `(rows, k)`): α, in the dtype of the parameters.

        Returns:
            `torch.Tensor` of shape `(r, r)` or `(rows, r, r)`.
        """
        raise NotImplementedError


class PBLoraCore(Core):
    """W(α) = blockdiag(W1, reshape(α φ, r2, r2)): PBLoRA (PARM, ICML 2025, arXiv 2505.06274).

    `W1` serves every preference alike, the second block is linear in α. With `r2=0` it is LoRA with a free r1×r1
    matrix in the middle, with `r1=0` purely preference-aware; an empty block has no parameter.

    Args:
        objectives (`int`): Number of objectives k.
        r1 (`int`): Rank of the preference-agnostic block, 0 or larger.
        r2 (`int`): Rank of the preference-aware block, 0 or larger; `r1 + r2` must be positive.

    Attributes:
        W1 (`nn.Parameter` of shape `(r1, r1)` or `None`).
        W2 (`nn.Parameter` of shape `(k, r2 * r2)` or `None`): φ, one flattened row-major matrix for each objective.
    """

    def __init__(self, objectives: int, r1: int, r2: int) -> None:
        super().__init__()
        if min(r1, r2) < 0 or r1 + r2 == 0:
            raise ValueError(f"`r1` is {r1} and `r2` is {r2}, but both must be 0 or larger and one must be positive.")
        self.r1, self.r2, self.rank = r1, r2, r1 + r2
        self.W1 = nn.Parameter(torch.empty(r1, r1)) if r1 else None
        self.W2 = nn.Parameter(torch.empty(objectives, r2 * r2)) if r2 else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws W1 and φ from kaiming_uniform(a=√5), as the authors do."""
        for weight in (self.W1, self.W2):
            if weight is not None:
                nn.init.kaiming_uniform_(weight, a=math.sqrt(5))

    def forward(self, preference: torch.Tensor) -> torch.Tensor:
        rows = preference.shape[:-1]
        matrix = preference.new_zeros(*rows, self.rank, self.rank)
        if self.W1 is not None:
            matrix[..., : self.r1, : self.r1] = self.W1
        if self.W2 is not None:
            matrix[..., self.r1 :, self.r1 :] = (preference @ self.W2).view(*rows, self.r2, self.r2)
        return matrix

    def extra_repr(self) -> str:
        return f"r1={self.r1}, r2={self.r2}"
