# SPDX-License-Identifier: Apache-2.0
"""Several adapters of one model in one forward, each for its own rows of the batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from peft_pblora.layer import PreferenceLinear

from .adapters import AdapterSwitch


@dataclass(frozen=True)
class Rows:
    """An adapter, and the rows of the batch that it acts on."""

    adapter: str
    start: int
    stop: int


class RowAdapters:
    """Lets adapters act on rows of a batch: layers compute all rows without them, and hooks add what is theirs.

    PEFT's own mixed batches (`adapter_names`) need one name for each row in every layer's forward, and a copy of the
    rows; here rows of an adapter stand together and are views.

    Args:
        switch ([`AdapterSwitch`]): The model's layers with adapters.
    """

    def __init__(self) -> None:
        self._plan: Sequence[Rows] = ()
        self._hooked: set[int] = set()

    def hook(self, switch: AdapterSwitch) -> None:
        """Registers the hooks on layers that have none yet."""
        for layer in switch.layers:
            if id(layer) not in self._hooked and isinstance(layer, PreferenceLinear | LoraLinear):
                self._hooked.add(id(layer))
                layer.register_forward_hook(self._add)

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
    def acting(self, plan: Sequence[Rows], switch: AdapterSwitch) -> Iterator[None]:
        """For the time of a forward, the adapters of the plan act on their rows, and no others do."""
        self._plan = plan
        try:
            with switch.only([]):
                yield
        finally:
            self._plan = ()

    def _add(self, layer: Any, args: tuple, output: torch.Tensor) -> None:
        for rows in self._plan:
            if rows.adapter not in _adapters_of(layer):
                continue
            x, result = args[0][rows.start : rows.stop], output[rows.start : rows.stop]
            if isinstance(layer, PreferenceLinear):
                added = layer.adapter(rows.adapter)(x, result)
                if added is not result:
                    result.copy_(added)
            else:
                x = layer._cast_input_dtype(x, layer.lora_A[rows.adapter].weight.dtype)
                low = layer.lora_A[rows.adapter](x)
                result.copy_(result + layer.lora_B[rows.adapter](low) * layer.scaling[rows.adapter])


def _adapters_of(layer: nn.Module) -> Any:
    if isinstance(layer, PreferenceLinear):
        return layer.adapters
    if isinstance(layer, LoraLinear):
        return layer.lora_A
    return layer._get_available_adapters() if isinstance(layer, BaseTunerLayer) else getattr(layer, "_adapters", ())
