# SPDX-License-Identifier: Apache-2.0
"""An adapter folded for inference: two small products, added in place, until something they depend on changes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch


if TYPE_CHECKING:
    from .adapter import LowRankAdapter


class Fold:
    """What an adapter adds at the preference that is set, in the dtype of the layer's input.

    One preference is folded into the factors; with a preference for each row, W(α) of every row is kept instead.

    Args:
        adapter ([`LowRankAdapter`]): The adapter to fold.
        dtype (`torch.dtype`): The dtype of the layer's input and output.
    """

    def __init__(self, adapter: LowRankAdapter, dtype: torch.dtype) -> None:
        self.dtype, self.version = dtype, adapter.version
        self.weights = [
            (parameters, name, weight, _state(weight))
            for parameters in (adapter.A._parameters, adapter.B._parameters, adapter.core._parameters)
            for name, weight in parameters.items()
            if weight is not None
        ]
        self.rows = adapter.preference.shape[0] if adapter.preference.ndim == 2 else 0
        self.matrix = None
        if self.rows:
            down, up = adapter.A.weight, adapter.B.weight
            matrix, self.bias = adapter.row_factors(adapter.preference, dtype)
            self.matrix = matrix.transpose(1, 2).contiguous()
        else:
            down, up, bias = adapter.factors()
            self.bias = None if bias is None else bias.to(dtype)
        self.down, self.up = down.T.to(dtype).contiguous(), up.T.to(dtype).contiguous()

    def fits(self, adapter: LowRankAdapter, dtype: torch.dtype) -> bool:
        """Whether nothing that the fold depends on has changed: preference, weights, dtype."""
        if self.version != adapter.version or self.dtype != dtype:
            return False
        return all(parameters[name] is w and _state(w) == state for parameters, name, w, state in self.weights)

    def add_(self, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """Adds to `result`, of shape `(batch, ..., m)`, in place."""
        hidden = torch.mm(x.reshape(-1, x.shape[-1]), self.down)
        flat = result.view(-1, result.shape[-1])
        if self.matrix is None:
            flat.addmm_(hidden, self.up)
            return result if self.bias is None else result.add_(self.bias)
        matrix, bias, repeats = self.matrix, self.bias, x.shape[0] // self.rows
        if repeats > 1:
            matrix = matrix.repeat_interleave(repeats, dim=0)
            bias = None if bias is None else bias.repeat_interleave(repeats, dim=0)
        hidden = hidden.view(x.shape[0], -1, hidden.shape[-1])
        hidden = torch.bmm(hidden, matrix) if bias is None else torch.baddbmm(bias[:, None], hidden, matrix)
        flat.addmm_(hidden.view(-1, hidden.shape[-1]), self.up)
        return result


def _state(weight: torch.Tensor) -> Any:
    # Inference tensors keep no version; whoever changes one in place must set the preference again.
    return (weight.data_ptr(), None if weight.is_inference() else weight._version)
