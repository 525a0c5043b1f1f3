# SPDX-License-Identifier: Apache-2.0
"""The tuners: which modules of a model get a preference-conditioned layer."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, ClassVar, cast

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    AuxiliaryTrainingWrapper,
    get_quantization_kwargs,
    resolve_quantization_backend,
)
from torch import nn
from transformers.pytorch_utils import Conv1D

from .condition import Condition
from .config import PreferenceConfig
from .layer import PreferenceLinear, preference_layers
from .rows import through_tuner
from .targets import is_linear, name_all_linear


class PreferenceTuner(BaseTuner):
    """Puts a [`PreferenceLinear`] in the place of each targeted module. [`register`] derives one for each method."""

    tuner_layer_cls: ClassVar[type[PreferenceLinear]]
    conditions: dict[str, Condition]
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT's. All layers of an adapter then share one [`Condition`], and all of the method one dict of them."""
        former = self._layers(model)
        self.conditions = former[0].conditions if former else {}
        config = cast(PreferenceConfig, self.peft_config[adapter_name])
        name_all_linear(config, model)
        aside = {name for name, condition in self.conditions.items() if condition.aside}
        super().inject_adapter(model, adapter_name, *args, **kwargs)  # which sets active adapters anew
        for name in aside:
            self.conditions[name].aside = True
        self.conditions[adapter_name] = Condition(config.objectives, config.initial_preference)
        for layer in self._layers(model):
            layer.conditions = self.conditions
            for name in layer.adapters:
                adapter = layer.adapter(name)
                adapter.share(self.conditions.setdefault(name, adapter.condition))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As PEFT's, see [`Condition`]."""
        with through_tuner():
            return super().forward(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's. What a processor guides, `reads_apart` being true, is the model without what guides it."""
        apart = any(getattr(processor, "reads_apart", False) for processor in kwargs.get("logits_processor") or ())
        with nullcontext() if apart else through_tuner():
            return self.model.generate(*args, **kwargs)

    def set_adapter(self, adapter_name: str | list[str], *args: Any, **kwargs: Any) -> None:
        """As PEFT's. The adapters act in the model itself again, see [`Condition`]."""
        super().set_adapter(adapter_name, *args, **kwargs)
        for name in [adapter_name] if isinstance(adapter_name, str) else adapter_name:
            if name in self.conditions:
                self.conditions[name].aside = False

    def _layers(self, model: nn.Module) -> list[PreferenceLinear]:
        return [layer for layer in preference_layers(model) if isinstance(layer, self.tuner_layer_cls)]

    def _create_and_replace(
        self,
        config: PreferenceConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional_kwargs: Any,
    ) -> None:
        if isinstance(target, self.tuner_layer_cls):
            target.update_layer(adapter_name, config=config)
            return
        layer = self._create_new_module(config, adapter_name, target, **get_quantization_kwargs(self))
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    @classmethod
    def _create_new_module(
        cls, config: PreferenceConfig, adapter_name: str, target: nn.Module, **kwargs: Any
    ) -> PreferenceLinear:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if isinstance(base, nn.Linear | Conv1D):
            if not is_linear(base):
                raise TypeError(
                    f"Target module {base} does not give the output of a linear layer, or not that alone. Leave it "
                    "out by `exclude_modules`."
                )
            _match_orientation(config, transposed=isinstance(base, Conv1D))
        else:
            backend = resolve_quantization_backend(base)
            if backend is None or backend.layer_type != "linear":
                raise TypeError(
                    f"Target module {target} is not supported. Currently, only `torch.nn.Linear` (optionally "
                    "quantized) and `transformers.pytorch_utils.Conv1D` are supported."
                )
        return cls.tuner_layer_cls(target, adapter_name, config=config, **kwargs)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hands `adapter_names`, one name for each row of the batch, to every layer for the time of a call."""
        adapter_names = kwargs.get("adapter_names")
        if adapter_names is None:
            yield
            return
        self._check_adapter_names(adapter_names)
        beams = kwargs.get("num_beams")
        expanded = [name for name in adapter_names for _ in range(beams if isinstance(beams, int) else 1)]
        encoder = _encoder_of(self.model)
        # An encoder runs before beams are expanded.
        in_encoder = set(encoder.modules()) if encoder is not None else set()
        handles = [
            module.register_forward_pre_hook(
                partial(_add_adapter_names, adapter_names=adapter_names if module in in_encoder else expanded),
                with_kwargs=True,
            )
            for module in self.modules()
            if isinstance(module, self.tuner_layer_cls | AuxiliaryTrainingWrapper)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _check_adapter_names(self, adapter_names: list[str]) -> None:
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        unknown = sorted(set(adapter_names) - set(self.conditions) - {"__base__"})
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        container = f".{cls.prefix}adapter."
        return key.replace(f"{container}{adapter_name}.", container, 1)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        tensors = cast(PreferenceConfig, config).rename_tensors(state_dict)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, dict(tensors))


def _add_adapter_names(module: nn.Module, args: tuple, kwargs: dict, adapter_names: list[str]) -> tuple[tuple, dict]:
    return args, {**kwargs, "adapter_names": adapter_names}


def _encoder_of(model: nn.Module) -> nn.Module | None:
    encoder = cast(Any, model).get_encoder() if hasattr(model, "get_encoder") else None
    return None if encoder is model else encoder


def _match_orientation(config: PreferenceConfig, transposed: bool) -> None:
    if config.fan_in_fan_out != transposed:
        kind = "Conv1D" if transposed else "torch.nn.Linear"
        warnings.warn(
            f"fan_in_fan_out is set to {config.fan_in_fan_out} but the target module is `{kind}`. "
            f"Setting fan_in_fan_out to {transposed}.",
            stacklevel=2,
        )
        config.fan_in_fan_out = transposed
