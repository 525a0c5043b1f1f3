# SPDX-License-Identifier: Apache-2.0
"""Exact export of an adapter at one preference to plain LoRA, which every serving engine loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import onload_layer
from safetensors.torch import save_file
from torch import nn

from .card import exported_card
from .control import adapted_layers
from .layer import PreferenceLinear
from .output import check_output, file_name, output_folder
from .preference import Preference, as_preference, name_preference


WRITER = "save_as_lora"
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM accepts for `max_lora_rank`."""


def save_as_lora(
    model: Any,
    path: str | Path,
    preference: Preference,
    adapter_name: str | None = None,
    rank: int | None = None,
    normalize: bool = False,
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
            Pad the factors with zeros to this rank, for engines that accept certain ranks only, such as
            [`VLLM_RANKS`]. The adapter's own rank if not given.
        normalize (`bool`, *optional*, defaults to `False`): Rescale preferences to sum 1 instead of refusing.

    Returns:
        `list[Path]`: The folders written, in the order of the preferences.

    Raises:
        ValueError: no such adapter, a preference off the simplex or twice in a grid, a rank below the adapter's own,
            or a folder that holds anything but an export.
    """
    layers = adapted_layers(model, adapter_name)
    name = adapter_name or next((n for layer, n in layers if n in layer.active_adapters), layers[0][1])
    adapters = {id(layer): layer for layer, n in layers if n == name}
    objectives = next(iter(adapters.values())).adapter(name).condition.objectives
    preferences = as_preference(preference, objectives, normalize)
    config: Any = model.peft_config[name]
    rows, folders = torch.atleast_2d(preferences), [Path(path)]
    if preferences.ndim == 2:
        folders = [Path(path) / file_name(name_preference(row, objectives)) for row in rows]
        if len(set(folders)) < len(folders):
            twice = next(folder for folder in folders if folders.count(folder) > 1)
            raise ValueError(f"The preference {twice.name} is in the grid twice. Give each preference once.")
    for folder in folders:
        check_output(folder.resolve(), WRITER)  # before any of them is written
    for folder, row in zip(folders, rows, strict=True):
        _write(model, adapters, config, name, row, folder, rank)
    return folders


def _write(
    model: Any,
    layers: dict[int, PreferenceLinear],
    config: Any,
    name: str,
    preference: torch.Tensor,
    folder: Path,
    rank: int | None,
) -> None:
    weights, own_rank, shifts = _lora_weights(model, layers, name, preference, rank)
    # What the adapter saves beside its own factors: modules_to_save and trained biases.
    weights |= {
        key: value for key, value in get_peft_model_state_dict(model, adapter_name=name).items()
        if f".{type(next(iter(layers.values()))).prefix}adapter." not in key
    }  # fmt: skip
    lora = LoraConfig(
        r=own_rank,
        lora_alpha=own_rank,
        lora_bias=shifts,
        bias="lora_only" if config.bias.endswith("_only") else config.bias,
        task_type=config.task_type,
        inference_mode=True,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        **{
            field: getattr(config, field)
            for field in (
                "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save",
                "fan_in_fan_out",
            )
        },
    )  # fmt: skip
    with output_folder(folder, WRITER) as staging:
        save_file(
            {key: value.contiguous().cpu() for key, value in weights.items()}, staging / "adapter_model.safetensors"
        )
        lora.save_pretrained(str(staging))
        exported_card(config, preference).save(staging / "README.md")


def _lora_weights(model, layers, name, preference, rank) -> tuple[dict[str, torch.Tensor], int, bool]:
    weights, own_rank, shifts = {}, 0, False
    for key, layer in model.named_modules():
        if id(layer) not in layers:
            continue
        with torch.no_grad(), onload_layer(layer):
            down, up, bias = layer.adapter(name).factors(preference)
        own_rank = down.shape[0] if rank is None else rank
        if own_rank < down.shape[0]:
            raise ValueError(f"`rank` is {rank}, but the adapter has rank {down.shape[0]} already. Give a larger one.")
        padding = own_rank - down.shape[0]
        prefix = key if key.startswith("base_model.model.") else f"base_model.model.{key}"
        weights[f"{prefix}.lora_A.weight"] = nn.functional.pad(down, (0, 0, 0, padding))
        weights[f"{prefix}.lora_B.weight"] = nn.functional.pad(up, (0, padding))
        if bias is not None:
            weights[f"{prefix}.lora_B.bias"], shifts = bias, True
    return weights, own_rank, shifts
