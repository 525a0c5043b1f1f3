# SPDX-License-Identifier: Apache-2.0
"""Cores: the r×r matrix W(α) between B and A that makes a LoRA preference-conditioned. Mathematics only."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn


class Core(nn.Module):
    """What every core offers: its size, its initialisation, W(α), and δ(α) where the map is affine.

    y = W0 x + s · B (W(α) A x + δ(α))
    """

    rank: int
    """The size r of W(α)."""

    def reset_parameters(self) -> None:
        """Draws fresh parameters, as the method's authors do."""
        raise NotImplementedError

    def forward(self, preference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns W(α) and δ(α).

        Args:
            preference (`torch.Tensor` of shape `(k,)` or `(rows, k)`): α, in the dtype of the parameters.

        Returns:
            `tuple` of W(α), `(r, r)` or `(rows, r, r)`, and δ(α), `(r,)` or `(rows, r)`, or `None` without a shift.
        """
        raise NotImplementedError

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={tuple(parameter.shape)}" for name, parameter in self.named_parameters())


class PBLoraCore(Core):
    """W(α) = blockdiag(W1, reshape(α φ, r2, r2)): PBLoRA (PARM, ICML 2025, arXiv 2505.06274).

    With `r2=0` it is LoRA with a free r1×r1 matrix in the middle, with `r1=0` purely preference-aware; an empty block
    has no parameter. Both ranks must be 0 or larger, and one positive; `objectives` is k. `disjoint` is a start as k
    LoRAs side by side: φ_i is the identity on its own part of the r2 dimensions and zero elsewhere. It takes `r1=0`
    and an `r2` of k or more; parts differ by 1 where k does not divide r2.

    Attributes:
        W1 (`nn.Parameter` of shape `(r1, r1)` or `None`): The same for every preference.
        W2 (`nn.Parameter` of shape `(k, r2 * r2)` or `None`): φ, one flattened row-major matrix for each objective.
    """

    def __init__(self, objectives: int, r1: int, r2: int, disjoint: bool = False) -> None:
        super().__init__()
        if min(r1, r2) < 0 or r1 + r2 == 0:
            raise ValueError(f"`r1` is {r1} and `r2` is {r2}, but both must be 0 or larger and one must be positive.")
        if disjoint and (r1 or r2 < objectives):
            raise ValueError(
                f"A disjoint start gives each of {objectives} objectives a part of r2 dimensions of its own, with "
                f"nothing in common, but `r1` is {r1}, `r2` is {r2}. Set `r1` to 0 and `r2` to {objectives} or more."
            )
        self.r1, self.r2, self.rank, self.disjoint = r1, r2, r1 + r2, disjoint
        self.W1 = nn.Parameter(torch.empty(r1, r1)) if r1 else None
        self.W2 = nn.Parameter(torch.empty(objectives, r2 * r2)) if r2 else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws W1 and φ from kaiming_uniform(a=√5), as the authors do, or sets φ to its disjoint start."""
        if self.disjoint and self.W2 is not None:
            nn.init.zeros_(self.W2)
            with torch.no_grad():
                for phi, part in zip(self.W2, torch.arange(self.r2).tensor_split(len(self.W2)), strict=True):
                    phi[part * (self.r2 + 1)] = 1  # the entries (j, j) of a flattened matrix
            return
        for weight in self.parameters():
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))

    def forward(self, preference: torch.Tensor) -> tuple[torch.Tensor, None]:
        rows = preference.shape[:-1]
        matrix = preference.new_zeros(*rows, self.rank, self.rank)
        if self.W1 is not None:
            matrix[..., : self.r1, : self.r1] = self.W1
        if self.W2 is not None:
            matrix[..., self.r1 :, self.r1 :] = (preference @ self.W2).view(*rows, self.r2, self.r2)
        return matrix, None


class SVDLoraCore(Core):
    """W(α) = diag(σ_1..σ_r, c·α_1..c·α_k): SVD-LoRA (Panacea, NeurIPS 2024, arXiv 2402.02030).

    `objectives` is k, and r must be 0 or larger.

    Attributes:
        sigma (`nn.Parameter` of shape `(r,)` or `None`): The preference-agnostic singular values.
        c (`nn.Parameter` of shape `(1,)`): The scale of the preference in this layer.
    """

    def __init__(self, objectives: int, r: int) -> None:
        super().__init__()
        if r < 0:
            raise ValueError(f"`r` is {r}, but it must be 0 or larger.")
        self.r, self.rank = r, r + objectives
        self.sigma = nn.Parameter(torch.empty(r)) if r else None
        self.c = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws σ from N(0, 0.02) and c from N(0, 0.5)."""
        if self.sigma is not None:
            nn.init.normal_(self.sigma, std=0.02)
        nn.init.normal_(self.c, std=0.5)

    def forward(self, preference: torch.Tensor) -> tuple[torch.Tensor, None]:
        values = self.c * preference
        if self.sigma is not None:
            values = torch.cat([self.sigma.expand(*preference.shape[:-1], self.r), values], dim=-1)
        return torch.diag_embed(values), None


class MoSLoraCore(Core):
    """W(α) = diag(1 + γ(α)) and a shift δ(α), [γ, δ] = M Σ_i α_i o_i: MoSLoRA (UniARM, arXiv 2602.09538).

    This is our reading of the paper's description, not checked against its equations. A shared module extracts
    low-rank features, and a modulation conditioned on the *mixed* preference applies an affine map to them.
    `objectives` is k, r must be positive, and `embedding_size` is d; 0 uses the preference itself (o = I, d = k).
    `frozen` is an o of shape `(k, d)` that is given and does not train, such as embeddings of descriptions; it is part
    of the configuration and not of the weights, so that the weights' shapes do not depend on k.

    Attributes:
        M (`nn.Parameter` of shape `(2r, d)`): The modulation, zero at the start.
        embeddings (`nn.Parameter` or `torch.Tensor` of shape `(k, d)`, or `None`): o.
    """

    def __init__(
        self, objectives: int, r: int, embedding_size: int = 0, frozen: Sequence[Sequence[float]] | None = None
    ) -> None:
        super().__init__()
        if r < 1 or embedding_size < 0:
            raise ValueError(
                f"`r` is {r} and `embedding_size` {embedding_size}, but r must be positive and `embedding_size` 0 or "
                "larger."
            )
        self.rank = r
        self.embeddings: torch.Tensor | None = None
        if frozen is not None:
            self.embeddings = torch.tensor(frozen, dtype=torch.float32, device="cpu")
            embedding_size = self.embeddings.shape[1]
        elif embedding_size:
            self.embeddings = nn.Parameter(torch.empty(objectives, embedding_size))
        self.M = nn.Parameter(torch.empty(2 * r, embedding_size or objectives))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """M zero, so that W(α) = I and δ(α) = 0; learned embeddings from N(0, 1)."""
        nn.init.zeros_(self.M)
        if isinstance(self.embeddings, nn.Parameter):
            nn.init.normal_(self.embeddings)

    def forward(self, preference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mixed = preference if self.embeddings is None else preference @ self.embeddings.to(preference)
        gamma, delta = (mixed @ self.M.T).chunk(2, dim=-1)
        return torch.diag_embed(1 + gamma), delta

    def _apply(self, fn: Callable, recurse: bool = True) -> MoSLoraCore:
        super()._apply(fn, recurse)
        if self.embeddings is not None and not isinstance(self.embeddings, nn.Parameter) and not self.M.is_meta:
            # Neither parameter nor buffer: it follows the weights to their device but not to their dtype.
            self.embeddings = self.embeddings.to(self.M.device)
        return self
