# SPDX-License-Identifier: Apache-2.0
"""LoRAs of one base model, one for each objective, as one PBLoRA: their soup at every preference, without training."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftConfig, PeftModel
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from .base_weights import without_base
from .card import save_card
from .config import PBLoraConfig
from .loading import check_loaded, check_weights, refused
from .loras import Factors, beside_factors, has_lora, is_embedding, lora_factors, lora_layers
from .output import check_output, output_folder
from .preference import check_objectives
from .skeleton import expected_tensors, skeleton_of


WRITER = "from_loras"
UNCHANGED_BASE = (True, False, None, "gaussian", "eva", "orthogonal")
"""Starts of a LoRA that leave the base model's weights as they are."""

EMBEDDINGS = "layers that are embeddings"


class Joined(NamedTuple):
    """The LoRAs of one layer as one: ΔW_i = up φ_i down, with `down` `(r, n)`, `up` `(m, r)` and `phi` `(k, r, r)`."""

    down: torch.Tensor
    up: torch.Tensor
    phi: torch.Tensor


def from_loras(
    loras: Mapping[str, str | Path],
    path: str | Path,
    model: Any = None,
    rank: int | None = None,
) -> dict[str, float]:
    """Writes k LoRAs of one base model as *one* PBLoRA with ΔW(α) = Σ_i α_i ΔW_i, without training.

    PBLoRA contains this soup: A = [A_1; …; A_k], B = [B_1 … B_k], r1 = 0, r2 = Σ_i r_i, and φ_i is s_i on block i. Its
    guidance is that of a soup of the ARMs (Rewarded Soups, arXiv 2306.04488) in one guide row. It is *not* GenARM's
    Σ_i α_i log π_i of k guides, which it equals at the vertices alone.

    Args:
        loras (`Mapping[str, str]`):
            Objective → LoRA: a folder or an id on the Hub; or, if `model` is a `PeftModel`, the name of its adapter.
        path (`str` or `Path`):
            The folder to write: a new one, an empty one, or one that holds what this function wrote and nothing else.
        model (`PeftModel` or `PreTrainedModel`, *optional*):
            The model that has the LoRAs, or the base model of the folders, of which modules and shapes are read, and
            which stays as it is. If not given, the configuration of the base model that the LoRAs name is read.
        rank (`int`, *optional*):
            A smaller r2. Each layer gets the leading singular vectors of [ΔW_1 … ΔW_k] and of [ΔW_1; …; ΔW_k], with
            dense φ_i between them, which is not exact any more.

    Returns:
        `dict[str, float]`: Of each layer √(Σ_i |ΔW_i − ΔW'_i|² / Σ_i |ΔW_i|²), the relative Frobenius error; 0 where
        nothing was cut off.

    Raises:
        ValueError: no mapping, no LoRA, one that is not there, damaged, of another method or base model, or merged;
            one whose change is no sum of products in linear layers (DoRA and other variants, biases,
            `modules_to_save`, embeddings, a start that changed the base model's weights); a rank out of its range; a
            folder that holds anything else.

    Example:

    ```python
    from_loras({"helpful": "runs/helpful", "harmless": "runs/harmless"}, "runs/arm")
    arm = load_adapter(base, "runs/arm")
    set_preference(arm, {"helpful": 0.7, "harmless": 0.3})
    ```
    """
    if not isinstance(loras, Mapping):
        raise ValueError(f"`loras` is {loras!r}, but it must be a mapping from each objective to its LoRA.")
    if rank is not None and (not isinstance(rank, Integral) or isinstance(rank, bool)):
        raise ValueError(f"`rank` is {rank!r}, but it must be a whole number, or None for all of the LoRAs' ranks.")
    objectives = check_objectives(list(loras))
    path = Path(path)
    check_output(path.resolve(), WRITER)
    if isinstance(model, PeftModel):
        names = dict(zip(objectives, map(str, loras.values()), strict=True))
        configs = {name: model.peft_config.get(name) for name in names.values()}
        _check_configs(configs, f"the model, whose adapters are {', '.join(model.peft_config)}")
        owner = model
    else:
        configs = {str(folder): _read_config(str(folder)) for folder in loras.values()}
        _check_configs(configs, "its folder")
        owner, numbers = _load_all(configs, model)
        names = {objective: numbers[str(folder)] for objective, folder in loras.items()}
    layers: dict[str, Any] = lora_layers(cast(Any, owner.base_model).model)
    for given, name in {str(given): names[objective] for objective, given in loras.items()}.items():
        _check_layers(given, name, cast(LoraConfig, owner.peft_config[name]), layers)
    order = list(names.values())
    with torch.no_grad():
        adapted = {place: layer for place, layer in layers.items() if any(has_lora(layer, name) for name in order)}
        joined = {place: _join(layer, order) for place, layer in adapted.items()}
        total = max(len(one.down) for one in joined.values())
        if rank is not None and not 1 <= rank <= total:
            raise ValueError(f"`rank` is {rank}, but it must lie between 1 and {total}, the sum of the LoRAs' ranks.")
        size = rank or total
        cut = {place: _cut(one, size) for place, one in joined.items()}
        errors = {place: _error(joined[place], one) for place, one in cut.items()}
    config = _config(list(configs.values()), objectives, size, owner, list(cut))
    tensors = _tensors({place: _padded(one, size) for place, one in cut.items()}, config, owner)
    with output_folder(path, WRITER) as staging:
        save_file(tensors, staging / "adapter_model.safetensors")
        config.save_pretrained(str(staging))
        save_card(staging, config, {})
    return errors


def _read_config(folder: str) -> PeftConfig:
    with refused(folder):
        return PeftConfig.from_pretrained(folder)


def _check_configs(configs: Mapping[str, PeftConfig | None], place: str) -> None:
    """Raises `ValueError` unless all are LoRAs of one base model, whose weights they have left as they were."""
    for name, config in configs.items():
        if not isinstance(config, LoraConfig):
            kind = "is not there" if config is None else f"is an adapter of the method {config.peft_type}"
            raise ValueError(f"{name!r} {kind}, but it must be a LoRA in {place}.")
        if config.init_lora_weights not in UNCHANGED_BASE:
            raise ValueError(
                f"The LoRA {name!r} started with `init_lora_weights={config.init_lora_weights!r}`, which changes the "
                "weights of the base model that others are for. Convert it with PEFT's "
                "`path_initial_model_for_weight_conversion` as you save it."
            )
        _refuse(name, beside_factors(name, config, ()))
    for field in ("base_model_name_or_path", "revision", "task_type"):
        values = {name: getattr(config, field) for name, config in configs.items() if getattr(config, field)}
        if len(set(values.values())) > 1:
            listed = ", ".join(f"{name!r} has {value!r}" for name, value in values.items())
            raise ValueError(
                f"The LoRAs differ in `{field}`: {listed}. Their sum is for one base model: train them on "
                "the same, or correct the name in their adapter_config.json where only the name differs."
            )


def _refuse(name: str, what: str | None) -> None:
    if what:
        raise ValueError(
            f"The LoRA {name!r} has {what}, but a PBLoRA is a sum of products in linear layers. Keep it as a guide of "
            "its own, as GenARM does."
        )


def _load_all(configs: Mapping[str, Any], model: Any) -> tuple[PeftModel, dict[str, str]]:
    """The LoRAs of folders on a model without memory, and their names there."""
    if model is None:
        first = next(iter(configs.values()))
        base = first.base_model_name_or_path
        if not base or first.task_type not in (None, "CAUSAL_LM"):
            raise ValueError("The LoRAs name no base model that is a causal language model. Pass theirs as `model`.")
        try:
            described = AutoConfig.from_pretrained(base, revision=first.revision)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"The configuration of the LoRAs' base model {base!r} can't be read. Pass the model as `model`."
            ) from error
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(described)
    names = {folder: f"lora_{number}" for number, folder in enumerate(configs)}
    loaded: Any = skeleton_of(model, on_cpu=True)
    for folder, name in names.items():
        tensors, config = check_weights(folder), copy.deepcopy(configs[folder])
        if any(".lora_embedding_" in key for key in tensors):  # PEFT may have saved the embeddings too
            _refuse(folder, EMBEDDINGS)
        with refused(folder):
            own = without_base(model, config, tensors)
            if isinstance(loaded, PeftModel):
                loaded.add_adapter(name, config)
            else:
                loaded = PeftModel(loaded, config, name)
        others = [key for key in own if ".lora_" not in key]
        _refuse(folder, f"weights of its base model ({others[0]})" if others else None)
        check_loaded(loaded, folder, name, own, {})
    return loaded, names


def _check_layers(given: str, name: str, config: LoraConfig, layers: Mapping[str, Any]) -> None:
    what = beside_factors(name, config, layers.values())
    if any(is_embedding(layer, name) for layer in layers.values()):
        what = EMBEDDINGS
    elif what is None and config.lora_bias:
        what = "`lora_bias`"
    _refuse(given, what)
    if any(name in layer.merged_adapters for layer in layers.values()):
        raise ValueError(f"The LoRA {given!r} is merged into the weights. Call `unmerge_adapter()` first.")


def _join(layer: Any, names: Sequence[str]) -> Joined:
    """The LoRAs of a layer side by side, in float32; one that the layer lacks has φ_i = 0."""
    found = [cast(Factors, lora_factors(layer, name)) if has_lora(layer, name) else None for name in names]
    own_factors = [own for own in found if own is not None]
    down = torch.cat([own.down.float().cpu() for own in own_factors])
    up = torch.cat([own.up.float().cpu() for own in own_factors], 1)
    phi, start = torch.zeros(len(names), len(down), len(down)), 0
    for matrix, own in zip(phi, found, strict=True):
        if own is not None:
            end = start + len(own.down)
            matrix[start:end, start:end] = own.scaling * torch.eye(end - start)
            start = end
    return Joined(down, up, phi)


def _cut(one: Joined, rank: int) -> Joined:
    """The truncated higher-order SVD of ΔW_i = up φ_i down in its two outer modes, by that of small cores.

    With QR factors of `up` and `downᵀ`, C_i = R_up φ_i R_downᵀ has the singular values of ΔW_i.
    """
    if len(one.down) <= rank:
        return one
    left, of_up = torch.linalg.qr(one.up.double())
    right, of_down = torch.linalg.qr(one.down.T.double())
    cores = of_up @ one.phi.double() @ of_down.T
    rows = torch.linalg.svd(torch.cat(list(cores), 1), full_matrices=False)[0][:, :rank]
    columns = torch.linalg.svd(torch.cat(list(cores)), full_matrices=False)[2][:rank].T
    return Joined((right @ columns).T.float(), (left @ rows).float(), (rows.T @ cores @ columns).float())


def _error(before: Joined, after: Joined) -> float:
    if before is after:
        return 0.0
    # In the bases of `before`, so that no m×n matrix is made: |Q C Pᵀ| = |C| for orthonormal Q and P.
    left, of_up = torch.linalg.qr(torch.cat([before.up, after.up], 1).double())
    right, of_down = torch.linalg.qr(torch.cat([before.down, after.down]).T.double())
    r = len(before.down)
    old = of_up[:, :r] @ before.phi.double() @ of_down[:, :r].T
    new = of_up[:, r:] @ after.phi.double() @ of_down[:, r:].T
    norm = old.norm()
    return float((old - new).norm() / norm) if norm > 0 else 0.0


def _padded(one: Joined, rank: int) -> Joined:
    """With zeros up to a rank, which is one for all layers of an adapter."""
    more = rank - len(one.down)
    return Joined(F.pad(one.down, (0, 0, 0, more)), F.pad(one.up, (0, more)), F.pad(one.phi, (0, more, 0, more)))


def _config(
    configs: Sequence[Any], objectives: list[str], rank: int, owner: PeftModel, places: list[str]
) -> PBLoraConfig:
    """The configuration with which PEFT puts the adapter where the LoRAs are: with their targets if all have the same,
    or the modules by name."""
    first = configs[0]
    by_name = PBLoraConfig(
        objectives=objectives,
        r1=0,
        r2=rank,
        lora_alpha=rank,  # s = 1: the scales are in φ
        target_modules=places,
        fan_in_fan_out=any(config.fan_in_fan_out for config in configs),
        base_model_name_or_path=next((c.base_model_name_or_path for c in configs if c.base_model_name_or_path), None),
        revision=first.revision,
        task_type=first.task_type,
        inference_mode=True,
    )
    targets = [config.target_modules for config in configs]
    if isinstance(targets[0], set) and all(target == targets[0] for target in targets):
        short = copy.deepcopy(by_name)
        short.target_modules = set(targets[0])
        if _modules(owner, short) == _modules(owner, by_name):
            return short
    return by_name


def _modules(owner: nn.Module, config: PBLoraConfig) -> set[str]:
    tensors = expected_tensors(skeleton_of(owner), copy.deepcopy(config))
    return {key.rpartition(".pblora_adapter.")[0] for key in tensors}


def _tensors(layers: Mapping[str, Joined], config: PBLoraConfig, owner: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of the adapter's file. Raises `ValueError` unless they are those that PEFT expects of it."""
    tensors: dict[str, torch.Tensor] = {}
    for place, one in layers.items():
        head = f"base_model.model.{place}.pblora_adapter"
        found = {"A.weight": one.down, "B.weight": one.up, "core.W2": one.phi.flatten(1)}
        tensors |= {f"{head}.{name}": tensor.contiguous() for name, tensor in found.items()}
    with refused("of the LoRAs"):
        expected = expected_tensors(skeleton_of(owner), copy.deepcopy(config))
    wrong = {key for key in tensors.keys() | expected.keys() if _shape(tensors, key) != _shape(expected, key)}
    if wrong:
        raise ValueError(
            f"PEFT can't put a PBLoRA where the LoRAs are, such as {min(wrong)}. Keep each LoRA as a guide of its own."
        )
    return tensors


def _shape(tensors: Mapping[str, torch.Tensor], key: str) -> torch.Size | None:
    return tensors[key].shape if key in tensors else None
