# SPDX-License-Identifier: Apache-2.0
"""The low-rank adapter s · B W(α) A of one linear layer, in plain PyTorch.

It is never multiplied out: W(α) is folded into the smaller factor, or applied row by row in the rank dimension when
every row of the batch has a preference of its own. It knows nothing of PEFT.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from .cores import Core


class LowRankAdapter(nn.Module):
    """Adds s · B W(α) A x to the output of a frozen linear layer.

    The preference is a plain float32 tensor attribute: neither parameter nor buffer. So it is not trained, not saved,
    not broadcast over by DDP, not sharded by FSDP, and follows the weights to their device but not to their dtype.

    Args:
        in_features (`int`): n, size of the layer's input.
        out_features (`int`): m, size of the layer's output.
        core ([`Core`]): Maps a preference to W(α), of shape `(r, r)` or `(rows, r, r)`.
        scaling (`float`): s.
        objectives (`Sequence[str]`): Names of the k objectives.
        preference (`Sequence[float]`): The preference to start with, of length k.
        dropout (`float`, *optional*, defaults to 0.0): Dropout on the adapter's input.
        identity (`bool`, *optional*, defaults to `True`): Start with B = 0, so that the layer is unchanged.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        core: Core,
        scaling: float,
        objectives: Sequence[str],
        preference: Sequence[float],
        dropout: float = 0.0,
        identity: bool = True,
    ) -> None:
        super().__init__()
        self.A = nn.Linear(in_features, core.rank, bias=False)
        self.B = nn.Linear(core.rank, out_features, bias=False)
        self.core = core
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.scaling = scaling
        self.objectives = list(objectives)
        self.preference = torch.tensor(preference, dtype=torch.float32, device="cpu")
        self.preference_was_set = False
        self.reset_parameters(identity)

    def reset_parameters(self, identity: bool = True) -> None:
        """A from kaiming_uniform(a=√5), B zero (or small random for `identity=False`), the core as it defines."""
        nn.init.kaiming_uniform_(self.A.weight, a=math.sqrt(5))
        if identity:
            nn.init.zeros_(self.B.weight)
        else:
            nn.init.kaiming_uniform_(self.B.weight, a=math.sqrt(5))
        self.core.reset_parameters()

    def set_preference(self, preference: torch.Tensor) -> None:
        """Sets α, of shape `(k,)` or `(rows, k)`, in place where the shape allows it. It must be valid already."""
        if self.preference.shape == preference.shape and not self.preference.is_inference():
            self.preference.copy_(preference)
        else:
            self.preference = preference.to(self.preference.device, torch.float32, copy=True)
        self.preference_was_set = True

    def core_matrix(self, preference: torch.Tensor | None = None) -> torch.Tensor:
        """W(α) for the given preference, or the one that is set, in the dtype of the adapter."""
        preference = self.preference if preference is None else preference
        return self.core(preference.to(self.A.weight))

    def delta_weight(self, preference: torch.Tensor | None = None) -> torch.Tensor:
        """The dense ΔW(α) of shape `(m, n)`, for merging. Raises `ValueError` for a preference a row."""
        matrix = self.core_matrix(preference)
        if matrix.ndim == 3:
            raise ValueError(
                "A preference for each row can't be merged into one weight. Set one preference of shape (k,) first."
            )
        return self.scaling * (self.B.weight @ matrix @ self.A.weight)

    def forward(self, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """Returns `result + s · B W(α) A x`.

        Args:
            x (`torch.Tensor` of shape `(batch, ..., n)`): The layer's input.
            result (`torch.Tensor` of shape `(batch, ..., m)`): The frozen layer's output; it fixes dtype and shape.

        Raises:
            ValueError: a preference a row is set and the batch is not a multiple of its rows.
        """
        matrix = self.core_matrix()
        x = self.dropout(x)
        down, up = self.A.weight, self.B.weight
        if matrix.ndim == 2:
            if up.shape[0] <= down.shape[1]:
                up = up @ (self.scaling * matrix)
            else:
                down = (self.scaling * matrix) @ down
            hidden = F.linear(x, down.to(x.dtype))
        else:
            hidden = _mix_rows(F.linear(x, down.to(x.dtype)), self.scaling * matrix)
        hidden = hidden.reshape(-1, up.shape[1]).to(result.dtype)
        flat = result.reshape(-1, result.shape[-1])
        return torch.addmm(flat, hidden, up.to(result.dtype).T).view(result.shape)

    def _apply(self, fn: Callable, recurse: bool = True) -> LowRankAdapter:
        super()._apply(fn, recurse)
        if self.A.weight.device.type != "meta":
            self.preference = self.preference.to(self.A.weight.device)
        return self

    def extra_repr(self) -> str:
        return f"scaling={self.scaling}, objectives={self.objectives}"


def _mix_rows(hidden: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Applies the row's own (r, r) matrix to each batch row of `hidden`, expanding rows as `generate` does."""
    batch, rows = hidden.shape[0], matrix.shape[0]
    if batch % rows:
        raise ValueError(
            f"`preference` is set for {rows} rows, but the batch has {batch}, which is no multiple. "
            "Set one preference of shape (k,), or one for each row of the batch."
        )
    matrix = matrix.repeat_interleave(batch // rows, dim=0).to(hidden.dtype)
    return torch.bmm(hidden.reshape(batch, -1, hidden.shape[-1]), matrix.transpose(1, 2)).view(hidden.shape)
