# SPDX-License-Identifier: Apache-2.0
"""An adapter folded for inference: two small products, added in place, until something they depend on changes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch


if TYPE_CHECKING:
    from .adapter import LowRankAdapter
    from .condition import Condition


SMALL_TOKENS = 16
HALF = (torch.bfloat16, torch.float16)


class Fold:
    """What an adapter adds at the preference of a condition, computed in a dtype from [`dtype_for`].

    One preference is folded into the factors; with a preference for each of several rows, W(α) of every row is kept.
    """

    def __init__(self, adapter: LowRankAdapter, condition: Condition, dtype: torch.dtype) -> None:
        self.dtype, self.condition, self.version = dtype, condition, condition.version
        self.weights = [
            # Inference tensors keep no version; whoever changes one in place must set the preference again.
            (parameters, name, weight, weight.data_ptr(), None if weight.is_inference() else weight._version)
            for parameters in (adapter.A._parameters, adapter.B._parameters, adapter.core._parameters)
            for name, weight in parameters.items()
            if weight is not None
        ]
        self.rows = condition.rows
        self.matrix: torch.Tensor | None = None
        if self.rows > 1:
            down, up = adapter.A.weight, adapter.B.weight
            matrix, bias = adapter.row_factors(condition.preference, down)
            self.matrix = matrix.transpose(1, 2).to(dtype).contiguous()
        else:
            down, up, bias = adapter.factors(condition.preference.view(-1))
        self.bias = None if bias is None else bias.to(dtype)
        self.down, self.up = down.T.to(dtype).contiguous(), up.T.to(dtype).contiguous()

    def fits(self, condition: Condition) -> bool:
        """Whether nothing that the fold depends on has changed: the preference and the weights."""
        if self.condition is not condition or self.version != condition.version:
            return False
        # Asked for every layer of every token, where a generator expression would cost as much as the small products.
        for parameters, name, weight, address, version in self.weights:
            if parameters[name] is not weight or weight.data_ptr() != address:
                return False
            if version is not None and weight._version != version:
                return False
        return True

    def add_(self, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """Adds to `result`, of shape `(batch, ..., m)`, in place."""
        hidden = torch.matmul(x.to(self.dtype), self.down)
        if self.matrix is not None:
            # Rows that `generate` repeats stand together.
            rows, shape = hidden.reshape(len(self.matrix), -1, hidden.shape[-1]), hidden.shape
            if self.bias is None:
                hidden = torch.bmm(rows, self.matrix).view(shape)
            else:
                hidden = torch.baddbmm(self.bias[:, None], rows, self.matrix).view(shape)
        # Autocast lowers the dtype of `hidden`, and in-place products do not follow it.
        if result.dtype == self.dtype == hidden.dtype and result.is_contiguous():
            result.view(-1, result.shape[-1]).addmm_(hidden.view(-1, hidden.shape[-1]), self.up)
        else:
            result.add_(torch.matmul(hidden, self.up))
        return result if self.matrix is not None or self.bias is None else result.add_(self.bias)


def dtype_for(x: torch.Tensor) -> torch.dtype:
    """The dtype in which a fold is applied to `x`: its own, but float32 for a few tokens of a half type on a CPU.

    There a product in bfloat16 has a fixed cost of several small products in float32.
    """
    dtype = x.dtype
    if dtype in HALF and x.is_cpu and x.numel() <= SMALL_TOKENS * x.shape[-1]:
        return torch.float32
    return dtype
