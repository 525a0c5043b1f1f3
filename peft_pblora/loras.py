# SPDX-License-Identifier: Apache-2.0
"""PEFT's LoRAs, read: what each adds to a layer, s · B A, and whether a LoRA is nothing but such a sum."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn


class Factors(NamedTuple):
    """What a LoRA adds to a layer: y += scaling · (up (down x) + bias).

    `down` is `(r, n)`, `up` is `(m, r)`, and `bias` `(m,)` or `None`: the parameters themselves.
    """

    scaling: float
    down: torch.Tensor
    up: torch.Tensor
    bias: torch.Tensor | None


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """The layers of a model with LoRAs, by their names below the model."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}


def has_lora(layer: LoraLayer, name: str) -> bool:
    """Whether a layer has the LoRA of this name."""
    return name in layer.lora_A or name in layer.lora_embedding_A


def is_embedding(layer: LoraLayer, name: str) -> bool:
    """Whether the LoRA of this name is one of an embedding, whose input is a number."""
    return name in layer.lora_embedding_A


def lora_factors(layer: LoraLayer, name: str) -> Factors | None:
    """The factors of a LoRA, at its own scale in this layer; `None` where it has another form, as of convolutions."""
    if is_embedding(layer, name):
        return Factors(layer.scaling[name], layer.lora_embedding_A[name], layer.lora_embedding_B[name], None)
    if name not in layer.lora_A:
        return None
    down, up = layer.lora_A[name], layer.lora_B[name]
    if not (isinstance(down, nn.Linear) and isinstance(up, nn.Linear)):
        return None
    return Factors(layer.scaling[name], down.weight, up.weight, up.bias)


def beside_factors(name: str, config: LoraConfig, layers: Iterable[LoraLayer]) -> str | None:
    """What a LoRA has that is not s · B A of linear layers and embeddings, so that it is no sum with others, in words;
    `None` if there is nothing."""
    of_lora = [layer for layer in layers if has_lora(layer, name)]
    variants = [layer.lora_variant[name] for layer in of_lora if name in layer.lora_variant]
    found: Mapping[str, Any] = {
        "DoRA": config.use_dora,
        type(variants[0]).__name__ if variants else "a variant": variants,
        "`modules_to_save`": config.modules_to_save,
        "`bias`": config.bias != "none",
        "`trainable_token_indices`": config.trainable_token_indices,
        "`target_parameters`": config.target_parameters,
        "`layer_replication`": config.layer_replication,
        "layers that are neither linear nor embeddings": any(lora_factors(layer, name) is None for layer in of_lora),
    }
    return next((what for what, is_there in found.items() if is_there), None)
