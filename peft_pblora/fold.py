# SPDX-License-Identifier: Apache-2.0
"""An adapter folded for inference: two small products, added in place, until something they depend on changes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch


if TYPE_CHECKING:
    from .adapter import LowRankAdapter


SMALL_TOKENS = 16


class Fold:
    """What an adapter adds at the preference that is set.

    One preference is folded into the factors; with a preference for each of several rows, W(α) of every row is kept.

    Args:
        adapter ([`LowRankAdapter`]): The adapter to fold.
        dtype (`torch.dtype`): The dtype to compute in, see [`dtype_for`].
    """

    def __init__(self, adapter: LowRankAdapter, dtype: torch.dtype) -> None:
        self.dtype, self.version = dtype, adapter.version
        self.weights = [
            (parameters, name, weight, _state(weight))
            for parameters in (adapter.A._parameters, adapter.B._parameters, adapter.core._parameters)
            for name, weight in parameters.items()
            if weight is not None
        ]
        preference = adapter.preference
        self.rows = preference.shape[0] if preference.ndim == 2 and len(preference) > 1 else 0
        self.matrix = None
        if self.rows:
            down, up = adapter.A.weight, adapter.B.weight
            matrix, self.bias = adapter.row_factors(preference, dtype)
            self.matrix = matrix.transpose(1, 2).contiguous()
        else:
            down, up, bias = adapter.factors(preference.view(-1))
            self.bias = None if bias is None else bias.to(dtype)
        self.down, self.up = down.T.to(dtype).contiguous(), up.T.to(dtype).contiguous()

    def fits(self, adapter: LowRankAdapter) -> bool:
        """Whether nothing that the fold depends on has changed: the preference and the weights."""
        return self.version == adapter.version and all(
            parameters[name] is w and _state(w) == state for parameters, name, w, state in self.weights
        )

    def add_(self, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """Adds to `result`, of shape `(batch, ..., m)`, in place."""
        hidden = torch.mm(x.reshape(-1, x.shape[-1]).to(self.dtype), self.down)
        if self.matrix is None:
            self._add_up(hidden, result)
            return result if self.bias is None else result.add_(self.bias)
        matrix, bias, repeats = self.matrix, self.bias, x.shape[0] // self.rows
        if repeats > 1:
            matrix = matrix.repeat_interleave(repeats, dim=0)
            bias = None if bias is None else bias.repeat_interleave(repeats, dim=0)
        hidden = hidden.view(x.shape[0], -1, hidden.shape[-1])
        hidden = torch.bmm(hidden, matrix) if bias is None else torch.baddbmm(bias[:, None], hidden, matrix)
        self._add_up(hidden.view(-1, hidden.shape[-1]), result)
        return result

    def _add_up(self, hidden: torch.Tensor, result: torch.Tensor) -> None:
        flat = result.view(-1, result.shape[-1])
        if flat.dtype == self.dtype:
            flat.addmm_(hidden, self.up)
        else:
            flat.add_(torch.mm(hidden, self.up))


def dtype_for(x: torch.Tensor) -> torch.dtype:
    """The dtype in which a fold is applied to `x`: its own, but float32 for a few tokens of a half type on a CPU.

    There a product in bfloat16 has a fixed cost of several small products in float32.
    """
    few = x.numel() <= SMALL_TOKENS * x.shape[-1]
    half_on_cpu = x.dtype in (torch.bfloat16, torch.float16) and x.device.type == "cpu"
    return torch.float32 if few and half_on_cpu else x.dtype


def _state(weight: torch.Tensor) -> Any:
    # Inference tensors keep no version; whoever changes one in place must set the preference again.
    return (weight.data_ptr(), None if weight.is_inference() else weight._version)
