# SPDX-License-Identifier: Apache-2.0
"""Which adapters of a model act in a forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn


class AdapterSwitch:
    """Chooses the adapters of a model for the time of a forward. It touches no weight and no `requires_grad`.

    Args:
        model (`nn.Module`): A model with or without adapters, as PEFT or transformers put them in.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers: list[Any] = [
            module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
        ]

    @property
    def names(self) -> list[str]:
        """All adapters of the model."""
        tuners = (layer for layer in self.layers if isinstance(layer, BaseTunerLayer))
        return list(dict.fromkeys(name for layer in tuners for name in layer._get_available_adapters()))

    @property
    def active(self) -> list[str]:
        """The adapters that were chosen with `set_adapter`, whether they are switched on or not."""
        return list(dict.fromkeys(name for layer in self.layers for name in layer.active_adapters))

    @property
    def merged(self) -> list[str]:
        """The adapters that are merged into the weights."""
        return list(dict.fromkeys(name for layer in self.layers for name in getattr(layer, "merged_adapters", ())))

    @contextmanager
    def only(self, names: Sequence[str]) -> Iterator[None]:
        """Lets these adapters act, and no others, and puts everything back after it, also on an error."""
        former = [(layer._active_adapter, layer._disable_adapters) for layer in self.layers]
        chosen, off = list(names), not names
        try:
            for layer in self.layers:
                layer._disable_adapters = off
                if chosen:
                    layer._active_adapter = chosen
            yield
        finally:
            for layer, (active, disabled) in zip(self.layers, former):
                layer._active_adapter, layer._disable_adapters = active, disabled


def backbone_of(model: nn.Module) -> nn.Module:
    """The transformers model below a `PeftModel`, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model
