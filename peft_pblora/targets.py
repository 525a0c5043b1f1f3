# SPDX-License-Identifier: Apache-2.0
"""Which modules are linear layers: some inherit from one and do more, such as routers that return a tuple."""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners.tuners_utils import _get_in_out_features, _maybe_include_all_linear_layers
from peft.utils import resolve_quantization_backend
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.pytorch_utils import Conv1D

from .config import PreferenceConfig


def name_all_linear(config: PreferenceConfig, model: nn.Module) -> None:
    """Puts names in the place of `target_modules="all-linear"`, as PEFT does, but those of linear layers alone."""
    asked = config.target_modules
    _maybe_include_all_linear_layers(config, model)
    if asked != config.target_modules:
        linear = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear))
        others = {name for name, module in linear if not is_linear(module)}
        config.target_modules = cast(Any, config.target_modules) - others


def is_linear(module: nn.Module) -> bool:
    """Whether a module, an `nn.Linear` or `Conv1D` by its class, maps `(..., n)` to `(..., m)` and no more.

    Where it has a forward of its own that is asked for shapes, without computing or hooks. A quantised layer need not
    answer.
    """
    kind: Any = type(module)
    if kind.forward in (nn.Linear.forward, Conv1D.forward) or resolve_quantization_backend(module) is not None:
        return True
    weight, (inputs, outputs) = cast(torch.Tensor, module.weight), _get_in_out_features(module)
    try:
        # Compiled code would take the fake tensors' memory for real.
        with torch.compiler.set_stance("force_eager"), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            x = torch.empty(1, 2, cast(int, inputs), dtype=weight.dtype, device=weight.device)
            output = kind.forward(module, x)
    except Exception:
        return type(weight) is not nn.Parameter or weight.dtype.itemsize < 2
    return isinstance(output, torch.Tensor) and output.shape == (1, 2, outputs)
