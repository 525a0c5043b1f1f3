# SPDX-License-Identifier: Apache-2.0
"""Several adapters of one model in one forward, each for its own rows of the batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from peft_pblora.layer import PreferenceLinear
from peft_pblora.rows import acting, current_plan
from peft_pblora.switch import AdapterSwitch


class RowAdapters:
    """Lets adapters of a model act on rows of a batch.

    PEFT's own mixed batches (`adapter_names`) hand one name for each row to every layer, and copy the rows; here the
    rows of an adapter stand together. Our layers know of such a plan; for PEFT's LoRA layers, which compute all rows
    without an adapter meanwhile, hooks add what is theirs.
    """

    def __init__(self) -> None:
        self._loras: dict[int, Any] = {}

    def attach(self, switch: AdapterSwitch) -> None:
        """Makes the layers of a model follow the plan."""
        for layer in switch.layers:
            if isinstance(layer, LoraLinear) and id(layer) not in self._loras:
                self._loras[id(layer)] = layer
                layer.register_forward_hook(self._add)
        self._ours = [layer for layer in switch.layers if isinstance(layer, PreferenceLinear)]
        self._others = AdapterSwitch([layer for layer in switch.layers if not isinstance(layer, PreferenceLinear)])

    @staticmethod
    def obstacle(switch: AdapterSwitch, names: Sequence[str]) -> str | None:
        """Why these adapters can't act on rows, or `None` if they can."""
        for layer in switch.layers:
            has = [name for name in names if name in _adapters_of(layer)]
            if has and not isinstance(layer, PreferenceLinear | LoraLinear):
                return f"the adapter {has[0]!r} has a {type(layer).__name__}"
            if any(name in getattr(layer, "lora_variant", ()) for name in has):
                return f"the adapter {has[0]!r} is a variant of LoRA"
        merged = set(switch.merged)
        return f"adapters are merged ({', '.join(sorted(merged))})" if merged else None

    @contextmanager
    def acting(
        self,
        entries: Sequence[tuple[str, slice]],
        rows: int,
        groups: int | None = None,
        activations: Sequence[torch.Tensor] | None = None,
    ) -> Iterator[None]:
        """For the time of a forward, these adapters act on these rows, and no others do.

        Args:
            entries (`Sequence[tuple[str, slice]]`): Adapters with their rows.
            rows (`int`): Rows of the batch.
            groups (`int`, *optional*): How many groups of rows the batch has, if slices count those, see [`RowPlan`].
            activations (`Sequence[torch.Tensor]`, *optional*):
                For each of them something like what it will get, if the forward may be compiled. A compiled layer
                can't see that its adapter has changed, so that adapters are folded ahead.
        """
        if activations is not None:
            self._fold_ahead(entries, activations)
        with self._others.only([]), acting(entries, rows, groups=groups, folded=activations is not None):
            yield

    def _fold_ahead(self, entries: Sequence[tuple[str, slice]], activations: Sequence[torch.Tensor]) -> None:
        for layer in self._ours:
            for (name, _), like in zip(entries, activations):
                if name in layer.adapters:
                    layer.adapter(name).fold_ahead(like)

    def _add(self, layer: Any, args: tuple, output: torch.Tensor) -> None:
        plan = current_plan()
        for name, rows in plan.slices(args[0]) if plan is not None else ():
            if name in layer.lora_A._modules:
                low, up = layer.lora_A[name], layer.lora_B[name]
                added = up(low(layer._cast_input_dtype(args[0][rows], low.weight.dtype)))
                output[rows].add_(added, alpha=layer.scaling[name])


def _adapters_of(layer: nn.Module) -> Any:
    if isinstance(layer, PreferenceLinear):
        return layer.adapters
    if isinstance(layer, LoraLinear):
        return layer.lora_A
    return layer._get_available_adapters() if isinstance(layer, BaseTunerLayer) else getattr(layer, "_adapters", ())
