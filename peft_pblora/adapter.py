# SPDX-License-Identifier: Apache-2.0
"""The low-rank adapter s · B W(α) A of one linear layer, in plain PyTorch. It is never multiplied out."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from .condition import Condition
from .cores import Core
from .rows import may_be_repeated


class LowRankAdapter(nn.Module):
    """Adds s · B (W(α) A x + δ(α)) to the output of a frozen linear layer; most cores have no shift δ.

    W(α) is folded into the smaller factor, or applied in the rank dimension where each row has its own preference.

    Args:
        in_features, out_features (`int`): n and m, sizes of the layer's input and output.
        core ([`Core`]): Maps a preference to W(α), of shape `(r, r)` or `(rows, r, r)`, and δ(α).
        scaling (`float`): s.
        condition ([`Condition`]): α, which adapters of other layers may share.
        dropout (`float`, *optional*, defaults to 0.0): Dropout on the adapter's input.
        identity (`bool`, *optional*, defaults to `True`):
            Start with B = 0, so that the layer is unchanged, instead of drawing it as A, from kaiming_uniform(a=√5).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        core: Core,
        scaling: float,
        condition: Condition,
        dropout: float = 0.0,
        identity: bool = True,
    ) -> None:
        super().__init__()
        self.A = nn.Linear(in_features, core.rank, bias=False)
        self.B = nn.Linear(core.rank, out_features, bias=False)
        self.core = core
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.scaling = scaling
        self.condition = condition
        self._folds: dict[torch.dtype, Fold] = {}
        self._trains = False
        nn.init.kaiming_uniform_(self.A.weight, a=math.sqrt(5))
        if identity:
            nn.init.zeros_(self.B.weight)
        else:
            nn.init.kaiming_uniform_(self.B.weight, a=math.sqrt(5))
        core.reset_parameters()

    def factors(
        self, preference: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The adapter at one preference, `(k,)`, or that which is set, as plain factors: y += up (down x) + bias.

        down is `(r, n)`, up `(m, r)`, and bias `(m,)` or `None`. A preference for each row raises `ValueError`.
        """
        preference = (self.condition.preference if preference is None else preference).to(self.A.weight)
        check_single(preference)
        down, up = self.A.weight, self.B.weight
        matrix, shift = self.core(preference)
        matrix = self.scaling * matrix
        bias = None if shift is None else self.scaling * (up @ shift)
        return (down, up @ matrix, bias) if up.shape[0] <= down.shape[1] else (matrix @ down, up, bias)

    def forward(
        self,
        x: torch.Tensor,
        result: torch.Tensor,
        preference: torch.Tensor | None = None,
        condition: Condition | None = None,
        folded: bool = False,
    ) -> torch.Tensor:
        """Returns `result + s · B (W(α) A x + δ(α))`; without gradients it is written into `result`.

        Args:
            x (`torch.Tensor` of shape `(batch, ..., n)`): The layer's input.
            result (`torch.Tensor` of shape `(batch, ..., m)`): The frozen layer's output; it fixes dtype and shape.
            preference (`torch.Tensor` of shape `(k,)` or `(rows, k)`, *optional*): Instead of the one that is set.
            condition ([`Condition`], *optional*): In the place of the adapter's own.
            folded (`bool`, *optional*, defaults to `False`):
                Whether [`fold_ahead`] was called since anything changed; a compiled forward then uses that fold.

        Raises:
            ValueError: the batch is not a multiple of the preference's rows.
            RuntimeError: gradient checkpointing repeats the forward at another preference.
        """
        noted: Condition | None = None
        if preference is None:
            condition = self.condition if condition is None else condition
            compiling = torch.compiler.is_compiling()
            if not (compiling or condition.was_set):
                condition.say_default()
            if not (self.training or torch.is_grad_enabled()) and x.dtype == result.dtype:
                fold = self._folds.get(dtype_for(x)) if folded else None if compiling else self._folded(x, condition)
                if fold is not None:
                    return fold.add_(x, result)
            noted = condition if self.training and not compiling else None
            preference = condition.preference
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._folds.clear()
            self._trains = True
        if noted is not None:
            noted.note_forward(may_be_repeated())
        output = self._add(self.dropout(x), result, preference)
        if noted is not None:
            noted.note_graph(output)
        return output

    def _add(self, x: torch.Tensor, result: torch.Tensor, preference: torch.Tensor) -> torch.Tensor:
        """As [`forward`], at this preference, without dropout and without a fold."""
        if not self._weights_are_here():
            hidden = self._mix_rows(self.A(x.to(self.A.weight.dtype)), torch.atleast_2d(preference))
            return result + self.B(hidden).to(result.dtype)
        if preference.ndim == 1:
            down, up, bias = self.factors(preference)
            hidden = F.linear(x, down.to(x.dtype))
        else:
            up, bias = self.B.weight, None
            hidden = self._mix_rows(F.linear(x, self.A.weight.to(x.dtype)), preference)
        flat = result.reshape(-1, result.shape[-1])
        hidden = hidden.reshape(-1, hidden.shape[-1]).to(result.dtype)
        flat = torch.addmm(flat, hidden, up.to(result.dtype).T)
        return (flat if bias is None else flat + bias.to(result.dtype)).view(result.shape)

    def row_factors(self, preference: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """s · W(α), `(rows, r, r)`, and s · δ(α), `(rows, r)` or `None`, in the dtype and on the device of `like`."""
        matrix, shift = self.core(preference.to(like.device, self.A.weight.dtype))
        matrix = (self.scaling * matrix).to(like)
        return matrix, None if shift is None else (self.scaling * shift).to(like)

    def has_shift(self) -> bool:
        """Whether the core has a shift δ(α)."""
        with torch.no_grad():
            return self.core(self.condition.preference.to(self.A.weight))[1] is not None

    def _weights_are_here(self) -> bool:
        """Whether A and B can be read uncalled: accelerate's offloading and FSDP bring weights for a call."""
        return type(self.A) is type(self.B) is nn.Linear and not self.A.weight.is_meta

    def _folded(self, x: torch.Tensor, condition: Condition) -> Fold | None:
        dtype = dtype_for(x)
        fold = self._folds.get(dtype)
        # PyTorch's fused optimizers change weights without a trace.
        self._trains = self._trains and any(weight.requires_grad for weight in self.parameters())
        if fold is None or self._trains or not fold.fits(condition):
            if not self._weights_are_here():
                return None
            with torch.autocast(x.device.type, enabled=False):
                fold = self._folds[dtype] = Fold(self, condition, dtype)
        check_rows(condition.rows, x.shape[0])
        return fold

    def fold_ahead(self, x: torch.Tensor, condition: Condition | None = None) -> None:
        """Folds the adapter for inputs of the dtype, device and shape of `x`, and forgets folds that no longer hold.

        Arguments and errors are as of [`forward`].
        """
        condition = self.condition if condition is None else condition
        for dtype in [dtype for dtype, fold in self._folds.items() if not fold.fits(condition)]:
            del self._folds[dtype]
        self._folded(x, condition)

    def train(self, mode: bool = True) -> LowRankAdapter:
        self.condition.pending.clear()
        self._folds.clear()
        self._trains = False
        return super().train(mode)

    def _replicate_for_data_parallel(self) -> LowRankAdapter:
        replica = super()._replicate_for_data_parallel()
        replica._folds = {}
        return replica

    def _mix_rows(self, hidden: torch.Tensor, preference: torch.Tensor) -> torch.Tensor:
        """s · (W(α) h + δ(α)) with the α of each batch row; rows that `generate` repeats stand together."""
        check_rows(len(preference), len(hidden))
        matrix, shift = self.row_factors(preference, hidden)
        mixed = torch.bmm(hidden.reshape(len(preference), -1, hidden.shape[-1]), matrix.transpose(1, 2))
        return (mixed if shift is None else mixed + shift[:, None]).view(hidden.shape)

    def _apply(self, fn: Callable, recurse: bool = True) -> LowRankAdapter:
        super()._apply(fn, recurse)
        self._folds.clear()
        self.condition.to(self.A.weight.device)
        return self

    def extra_repr(self) -> str:
        return f"scaling={self.scaling}, objectives={self.condition.objectives}"


class Fold:
    """What an adapter adds at the preference of a condition, computed in a dtype from [`dtype_for`].

    One preference is folded into the factors; with a preference for each of several rows, W(α) of every row is kept.
    """

    def __init__(self, adapter: LowRankAdapter, condition: Condition, dtype: torch.dtype) -> None:
        self.dtype, self.condition, self.version = dtype, condition, condition.version
        self.weights = [
            # Inference tensors keep no version; whoever changes one in place must set the preference again.
            (tensors, name, weight, weight.data_ptr(), None if weight.is_inference() else weight._version)
            for module in (adapter.A, adapter.B, *adapter.core.modules())
            for tensors in (module._parameters, module._buffers)
            for name, weight in tensors.items()
            if weight is not None
        ]
        self._held = [weight.detach() for _, _, weight, _, _ in self.weights]  # no other takes an address meanwhile
        self.matrix: torch.Tensor | None = None
        if condition.rows > 1:
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
        for tensors, name, weight, address, version in self.weights:
            if tensors[name] is not weight or weight.data_ptr() != address:
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
    few = x.is_cpu and x.numel() <= 16 * x.shape[-1]
    return torch.float32 if few and x.dtype in (torch.bfloat16, torch.float16) else x.dtype


def expand_rows(preference: torch.Tensor, batch: int) -> torch.Tensor:
    """Repeats each row of a `(rows, k)` preference, as `generate` repeats rows, so that there are `batch`."""
    check_rows(preference.shape[0], batch)
    return preference.repeat_interleave(batch // preference.shape[0], dim=0)


def check_single(preference: torch.Tensor) -> None:
    """Raises `ValueError` for a preference for each row, `(rows, k)`."""
    if preference.ndim == 2:
        raise ValueError("A preference for each row can't be merged into one weight. Set one of shape (k,) first.")


def check_rows(rows: int, batch: int) -> None:
    """Raises `ValueError` unless the batch is a multiple of the preference's rows."""
    if batch % rows:
        raise ValueError(
            f"`preference` is set for {rows} rows, but the batch has {batch}, which is no multiple. "
            "Set one preference of shape (k,), or one for each row of the batch."
        )
