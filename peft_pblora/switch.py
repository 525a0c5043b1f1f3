# SPDX-License-Identifier: Apache-2.0
"""Which adapters of a model act in a forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn


CHANGING = ("pissa", "olora", "corda", "loftq")
"""Ways of PEFT to begin a LoRA that put a residual in the place of each weight."""


class AdapterSwitch:
    """Chooses the adapters of some layers for the time of a forward. It touches no weight and no `requires_grad`."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.layers: list[Any] = list(layers)

    @classmethod
    def of(cls, model: nn.Module) -> AdapterSwitch:
        """For all layers of a model that have adapters, as PEFT or transformers put them in."""
        return cls([m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)])

    @property
    def names(self) -> list[str]:
        """All adapters of the model."""
        tuners = (layer for layer in self.layers if isinstance(layer, BaseTunerLayer))
        return list(dict.fromkeys(name for layer in tuners for name in layer._get_available_adapters()))

    @property
    def active(self) -> list[str]:
        """The adapters that were chosen with `set_adapter`, whether they are switched on or not."""
        return list(dict.fromkeys(name for layer in self.layers for name in layer.active_adapters))

    def chosen(self, name: str | None) -> list[str]:
        """The active adapters, or the one of this name. Raises `ValueError` if there is none."""
        if name is not None and name not in self.names:
            raise ValueError(f"The guiding model has no adapter {name!r}. It has {self.names}.")
        return self.active if name is None else [name]

    @property
    def merged(self) -> list[str]:
        """The adapters that are merged into the weights."""
        return list(dict.fromkeys(name for layer in self.layers for name in getattr(layer, "merged_adapters", ())))

    @contextmanager
    def only(self, names: Sequence[str]) -> Iterator[None]:
        """Lets these adapters act, and no others, and puts everything back after it, also on an error."""
        former = [(layer, layer._active_adapter, layer._disable_adapters) for layer in self.layers]
        try:
            for layer in self.layers:
                layer._disable_adapters = not names
                if names:
                    layer._active_adapter = list(names)
            yield
        finally:
            for layer, active, disabled in former:
                layer._active_adapter, layer._disable_adapters = active, disabled


def changes_below(config: Any, model: nn.Module) -> str | None:
    """By which setting an adapter changes the model that it is put on, so that this is another one without it too."""
    start = getattr(config, "init_lora_weights", None)
    if isinstance(start, str) and start.lower().startswith(CHANGING):
        return f"init_lora_weights={start!r}"
    for setting in ("layer_replication", "kasa_config"):
        if getattr(config, setting, None):
            return setting
    biases = (name for name, _ in model.named_parameters() if name.endswith(".bias") and ".lora_B." not in name)
    return f"bias={config.bias!r}" if getattr(config, "bias", "none") != "none" and any(biases) else None


def check_below(model: nn.Module) -> None:
    """Raises `ValueError` if an adapter has changed the model below it, which is to be read without it."""
    backbone = backbone_of(model)
    for name, config in getattr(backbone, "peft_config", {}).items():
        if setting := changes_below(config, backbone):
            raise ValueError(
                f"The adapter {name!r} has `{setting}`, with which PEFT changes the model below it, which is another "
                "one then without the adapter too. Load it on a model of its own and use a guided model, such as "
                "`PARM(base, ...)`; or merge it, `merge_and_unload()`; or save a PiSSA, OLoRA or CorDA as a plain "
                "LoRA with PEFT's `path_initial_model_for_weight_conversion`."
            )


def backbone_of(model: nn.Module) -> nn.Module:
    """The transformers model below a `PeftModel`, or the model itself."""
    if not isinstance(model, PeftModel):
        return model
    # `get_base_model` asks the active adapter, which may have been deleted.
    return model.base_model.model if isinstance(model.base_model, BaseTuner) else model.base_model
