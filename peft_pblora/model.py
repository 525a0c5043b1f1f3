# SPDX-License-Identifier: Apache-2.0
"""The tuners: which modules of a model get a preference-conditioned layer."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    get_quantization_kwargs,
    resolve_quantization_backend,
)
from torch import nn
from transformers.pytorch_utils import Conv1D

from .config import PreferenceConfig
from .layer import PBLoraLinear, PreferenceLinear


class PreferenceTuner(BaseTuner):
    """Puts a [`PreferenceLinear`] in the place of each targeted module. Subclasses name the layer class."""

    tuner_layer_cls: ClassVar[type[PreferenceLinear]]
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

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
        if current_key is None:
            raise ValueError("Current Key shouldn't be `None`")
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
        backend = resolve_quantization_backend(base)
        if isinstance(base, nn.Linear | Conv1D):
            _match_orientation(config, transposed=isinstance(base, Conv1D))
        elif backend is None or backend.layer_type != "linear":
            raise TypeError(
                f"Target module {target} is not supported. Currently, only `torch.nn.Linear` (optionally quantized) "
                "and `transformers.pytorch_utils.Conv1D` are supported."
            )
        return cls.tuner_layer_cls(target, adapter_name, config=config, **kwargs)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        container = f".{cls.prefix}adapter."
        return key.replace(f"{container}{adapter_name}.", container, 1)


class PBLoraModel(PreferenceTuner):
    """PEFT tuner for [`PBLoraConfig`]. Made by `get_peft_model(model, PBLoraConfig(...))`."""

    prefix = PBLoraLinear.prefix
    tuner_layer_cls = PBLoraLinear


def _match_orientation(config: PreferenceConfig, transposed: bool) -> None:
    if config.fan_in_fan_out != transposed:
        kind = "Conv1D" if transposed else "torch.nn.Linear"
        warnings.warn(
            f"fan_in_fan_out is set to {config.fan_in_fan_out} but the target module is `{kind}`. "
            f"Setting fan_in_fan_out to {transposed}.",
            stacklevel=2,
        )
        config.fan_in_fan_out = transposed
