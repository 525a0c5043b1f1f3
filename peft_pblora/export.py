# SPDX-License-Identifier: Apache-2.0
"""Exact export of an adapter at one preference to plain LoRA, which every serving engine loads."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer, onload_layer
from safetensors.torch import save_file
from torch import nn

from .card import exported_card
from .control import find_adapter
from .layer import PreferenceLinear
from .output import check_output, file_name, output_folder
from .preference import Preference, as_preference, name_preference
from .skeleton import expected_tensors, skeleton_of
from .switch import backbone_of


WRITER = "save_as_lora"
KEPT = (
    "base_model_name_or_path", "exclude_modules", "fan_in_fan_out", "layers_pattern", "layers_to_transform",
    "modules_to_save", "revision", "target_modules", "task_type",
)  # fmt: skip
"""What an exported configuration has of the adapter's own."""
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM accepts for `max_lora_rank`."""


def vllm_rank(own: int) -> int:
    """The least rank that vLLM accepts for adapters of a rank, but 1. Raises `ValueError` if none is large enough."""
    for rank in VLLM_RANKS:
        if rank >= own and rank > 1:
            return rank
    raise ValueError(f"The adapter has the rank {own}, but vLLM takes at most {VLLM_RANKS[-1]}.")


def save_as_lora(
    model: Any,
    path: str | Path,
    preference: Preference,
    adapter_name: str | None = None,
    rank: int | None = None,
    normalize: bool = False,
    allow_off_simplex: bool = False,
) -> list[Path]:
    """Writes an adapter at a fixed preference as a plain PEFT LoRA, exactly: W(α) is folded into a factor, no SVD.

    The result needs no `peft_pblora` to load. MoSLoRA's shift becomes the bias of `lora_B` (`lora_bias=True`), which
    PEFT loads and vLLM does not.

    Args:
        model (`PeftModel` or a model with injected adapters): Where the adapter is.
        path (`str` or `Path`):
            The folder to write: a new one, an empty one, or one that holds an export as it was written and nothing
            else, which is replaced.
        preference (`Preference`):
            α of shape `(k,)`; or `(n, k)` for a whole grid, written as one folder for each α below `path`, named by
            its preference ([`name_preference`], as [`output.file_name`]).
        adapter_name (`str`, *optional*): The adapter to export; the active one if not given.
        rank (`int`, *optional*):
            Pad the factors with zeros to this rank, for engines that accept certain ones only ([`VLLM_RANKS`]).
        normalize (`bool`, *optional*, defaults to `False`): Rescale preferences to sum 1 instead of refusing.
        allow_off_simplex (`bool`, *optional*, defaults to `False`): As in [`as_preference`].

    Returns:
        `list[Path]`: The folders written, in the order of the preferences.

    Raises:
        ValueError: no such adapter, a preference off the simplex or twice in a grid, a rank below the adapter's own,
            a folder that holds anything but an export, or a model on which PEFT would put the LoRA into other modules.
    """
    name, condition = find_adapter(model, adapter_name)
    layers = {
        _in_file(key): module
        for key, module in model.named_modules()
        if isinstance(module, PreferenceLinear) and name in module.adapters
        and module.adapter(name).condition is condition  # another below may have the name too
    }  # fmt: skip
    preferences = as_preference(preference, condition.objectives, normalize, allow_off_simplex)
    rows, folders = torch.atleast_2d(preferences), [Path(path)]
    if preferences.ndim == 2:
        folders = [
            Path(path) / file_name(name_preference(row, condition.objectives, allow_off_simplex)) for row in rows
        ]
        if len(set(folders)) < len(folders):
            twice = next(folder for folder in folders if folders.count(folder) > 1)
            raise ValueError(f"The preference {twice.name} is in the grid twice. Give each preference once.")
    for folder in folders:
        check_output(folder.resolve(), WRITER)  # before any of them is written
    config, beside = model.peft_config[name], _beside(model, name)
    lora = _lora_config(model, config, _lora_weights(layers, name, rows[0], rank))
    for folder, row in zip(folders, rows, strict=True):
        weights = _lora_weights(layers, name, row, rank)
        with output_folder(folder, WRITER) as staging:
            tensors = {key: value.contiguous().cpu() for key, value in (weights | beside).items()}
            save_file(tensors, staging / "adapter_model.safetensors")
            lora.save_pretrained(str(staging))
            exported_card(config, row).save(staging / "README.md")
    return folders


def _in_file(key: str) -> str:
    """The name of a tensor or module of a model in an adapter's file."""
    return key if key.startswith("base_model.model.") else f"base_model.model.{key}"


def _beside(model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    """What an adapter saves beside its own factors, or those of others: modules_to_save and trained biases."""
    layers = [_in_file(key) for key, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    saved = {_in_file(key): value for key, value in get_peft_model_state_dict(model, adapter_name=name).items()}
    of_adapters = {
        key for key in saved for layer in layers
        if key.startswith(f"{layer}.") and not key.startswith(f"{layer}.base_layer.")
    }  # fmt: skip
    return {key: value for key, value in saved.items() if key not in of_adapters}


def _lora_weights(
    layers: dict[str, PreferenceLinear], name: str, preference: torch.Tensor, rank: int | None
) -> dict[str, torch.Tensor]:
    weights = {}
    for key, layer in layers.items():
        with torch.no_grad(), onload_layer(layer):
            down, up, bias = layer.adapter(name).factors(preference)
        padding = 0 if rank is None else rank - len(down)
        if padding < 0:
            raise ValueError(f"`rank` is {rank}, but the adapter has rank {len(down)} already. Give a larger one.")
        weights[f"{key}.lora_A.weight"] = nn.functional.pad(down, (0, 0, 0, padding))
        weights[f"{key}.lora_B.weight"] = nn.functional.pad(up, (0, padding))
        if bias is not None:
            weights[f"{key}.lora_B.bias"] = bias
    return weights


def _lora_config(model: nn.Module, config: Any, weights: dict[str, torch.Tensor]) -> LoraConfig:
    """The configuration with which PEFT puts the LoRA where the adapter is.

    PEFT renames targets of mixtures of experts as it loads them. So it is let put the LoRA into a copy of the model
    without memory: with the adapter's targets and, if that gives another LoRA, with its modules' names.

    Raises:
        ValueError: both give another one, or PEFT refuses such a LoRA.
    """
    rank = len(next(iter(weights.values())))
    lora = LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_bias=any(key.endswith("lora_B.bias") for key in weights),
        bias="lora_only" if config.bias.endswith("_only") else config.bias,
        inference_mode=True,
        **{field: getattr(config, field) for field in KEPT},
    )
    modules = {key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in weights}
    by_name = replace(
        lora, target_modules=modules, exclude_modules=None, layers_to_transform=None, layers_pattern=None
    )
    shapes = {key: tensor.shape for key, tensor in weights.items()}
    loaded: dict[str, torch.Size] = {}
    for candidate in (lora, by_name):
        try:
            loaded = _shapes_loaded(model, copy.deepcopy(candidate))
        except ValueError as error:
            raise ValueError(f"PEFT can't load this adapter as a LoRA. {error}") from error
        if loaded == shapes:
            return candidate
    lost = min(shapes.keys() - loaded.keys() or loaded.keys() - shapes.keys() or shapes.keys())
    raise ValueError(
        f"PEFT would load this adapter as another LoRA: of a {type(backbone_of(model)).__name__} it takes other "
        f"modules than the adapter has, see {lost}. Leave those out of `target_modules`, or use the adapter as it is."
    )


def _shapes_loaded(model: nn.Module, config: LoraConfig) -> dict[str, torch.Size]:
    """The tensors that PEFT expects of a LoRA of this configuration on a model, whatever its adapters are."""
    tensors = expected_tensors(skeleton_of(model), config)
    return {key: tensor.shape for key, tensor in tensors.items() if ".lora_" in key}
