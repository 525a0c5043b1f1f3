# SPDX-License-Identifier: Apache-2.0
"""Models without memory: what PEFT would make of an adapter, asked without touching the model that it is for."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from .switch import backbone_of


def skeleton_of(model: nn.Module, on_cpu: bool = False) -> Any:
    """A copy of a model's backbone without adapters, whose weights are on the meta device; or on the CPU, each one
    number in the place of all, so that adapters that are loaded into it are there too."""
    empty = {
        id(tensor): nn.Parameter(
            torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
            if on_cpu
            else torch.empty_like(tensor, device="meta"),
            requires_grad=False,
        )
        for tensor in (*model.parameters(), *model.buffers())
    }
    base: Any = copy.deepcopy(backbone_of(model), empty)
    vars(base).pop("peft_config", None)
    for name, module in list(base.named_modules()):
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            inner = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module.original_module
            base.set_submodule(name, inner)
    return base


def expected_tensors(skeleton: Any, config: PeftConfig) -> dict[str, torch.Tensor]:
    """The tensors, without memory, that PEFT expects in the file of an adapter; the skeleton gets the adapter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = PeftModel(skeleton, config, low_cpu_mem_usage=True)
        return get_peft_model_state_dict(loaded, save_embedding_layers=False)
