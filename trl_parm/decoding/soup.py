# SPDX-License-Identifier: Apache-2.0
"""Rewarded Soups: policies that were tuned for one objective each, averaged in their weights."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, PeftType
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from peft_pblora.loras import Factors, beside_factors, has_lora, lora_factors, lora_layers
from peft_pblora.preference import Preference
from peft_pblora.switch import AdapterSwitch, check_below

from .methods import objective_weights


def rewarded_soup(
    policies: Mapping[str, Any],
    preference: Preference,
    adapters_of: PeftModel | None = None,
    adapter_name: str = "soup",
    allow_off_simplex: bool = False,
) -> PreTrainedModel | PeftModel:
    """The model with weights θ(α) = Σ_i α_i θ_i (Rewarded Soups, NeurIPS 2023, arXiv 2306.04488).

    LoRAs are averaged exactly: Σ_i α_i s_i B_i A_i is a LoRA of rank Σ_i r_i, with factors put side by side, in every
    layer that a policy has, at the policy's own scale s_i there, biases included. Averaging A and B on their own would
    add products of one policy's A with another's B. Weights that are all 0 leave the model below the LoRAs as it is,
    and make of whole models one whose weights are all 0, which knows nothing.

    Args:
        policies (`Mapping[str, PreTrainedModel]`):
            Objective → model, all of one architecture; or → name of a LoRA of `adapters_of`.
        preference (`Mapping[str, float]`, `Sequence[float]` or `torch.Tensor`): α of shape `(k,)`.
        adapters_of (`PeftModel`, *optional*): The model whose adapters `policies` names.
        adapter_name (`str`, *optional*, defaults to `"soup"`):
            Name of the averaged adapter; one that exists is replaced.
        allow_off_simplex (`bool`, *optional*, defaults to `False`): As in [`as_preference`].

    Returns:
        A new model, on the device and in the dtype of the first policy; or `adapters_of` with the averaged adapter
        added and active.

    Raises:
        ValueError: no policy, an invalid preference, models that differ in shape, adapters that are not there, are no
            LoRA, or one whose change is no sum (DoRA and other variants, `modules_to_save`, trained biases).

    Example:

    ```python
    soup = rewarded_soup({"helpful": helpful_model, "harmless": harmless_model}, [0.3, 0.7])
    soup = rewarded_soup({"helpful": "adapter_1", "harmless": "adapter_2"}, [0.3, 0.7], adapters_of=model)
    ```
    """
    weights = objective_weights("policies", list(policies), preference, allow_off_simplex)
    if any(isinstance(weight, torch.Tensor) for weight in weights):
        raise ValueError("A soup has one preference of shape (k,). Make one soup for each preference.")
    every = [(float(w), policy) for w, policy in zip(weights, policies.values(), strict=True)]
    chosen = [(w, policy) for w, policy in every if w] or every[:1]
    if adapters_of is not None:
        return _soup_of_adapters(adapters_of, chosen, adapter_name)
    return _soup_of_models(chosen)


@torch.no_grad()
def _soup_of_adapters(model: PeftModel, chosen: list[tuple[float, Any]], adapter_name: str) -> PeftModel:
    names = [name for _, name in chosen]
    for name in names:
        config = model.peft_config.get(name) if isinstance(name, str) else None
        if config is None or config.peft_type != PeftType.LORA:
            raise ValueError(f"`adapters_of` has no LoRA {name!r}. Its adapters are {list(model.peft_config)}.")
    if adapter_name in names:
        raise ValueError(f"`adapter_name` is {adapter_name!r}, which is a policy. Choose another name.")
    tuner: Any = model.base_model
    layers: dict[str, Any] = lora_layers(tuner.model)
    for name in names:
        _check_is_sum(name, cast(LoraConfig, model.peft_config[name]), layers)
    check_below(model)  # by any adapter
    if adapter_name in model.peft_config:
        model.delete_adapter(adapter_name)
    # Of each layer, α_i and the factors of every policy that has it: weights and scales go to B.
    factors = {
        name: [(w, cast(Factors, lora_factors(layer, policy))) for w, policy in chosen if has_lora(layer, policy)]
        for name, layer in layers.items()
    }
    factors = {name: found for name, found in factors.items() if found}
    ranks = {name: sum(len(own.down) for _, own in found) for name, found in factors.items()}
    # Anchored, so that no pattern is another layer's too; a scale of 1 for every rank.
    others = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != max(ranks.values())}
    config = replace(
        cast(LoraConfig, model.peft_config[names[0]]),
        r=max(ranks.values()),
        lora_alpha=max(ranks.values()),
        rank_pattern=others,
        alpha_pattern=others,
        target_modules=sorted(factors),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        use_rslora=False,
        lora_bias=any(own.bias is not None for found in factors.values() for _, own in found),
        init_lora_weights=True,
    )
    model.add_adapter(adapter_name, config)
    for name, layer in layers.items():
        if has_lora(layer, adapter_name) != (name in factors):
            model.delete_adapter(adapter_name)
            raise ValueError(
                f"PEFT can't put the soup's adapter into the same layers as the policies', such as {name}."
            )
        if name in factors:
            soup, found = cast(Factors, lora_factors(layer, adapter_name)), factors[name]
            soup.down.copy_(torch.cat([own.down.to(soup.down) for _, own in found]))
            soup.up.copy_(torch.cat([weight * own.scaling * own.up.to(soup.up) for weight, own in found], 1))
            for weight, own in found:
                if own.bias is not None:
                    cast(torch.Tensor, soup.bias).add_(own.bias.to(soup.up), alpha=weight * own.scaling)
    model.set_adapter(adapter_name)
    # PEFT makes the dropout of a new adapter in training mode, whatever the model's mode is.
    for layer in layers.values():
        if adapter_name in layer.lora_dropout:
            layer.lora_dropout[adapter_name].train(layer.training)
    return model


def _check_is_sum(name: str, config: LoraConfig, layers: Mapping[str, LoraLayer]) -> None:
    """Raises `ValueError` for a LoRA whose change of the model is not s · B A of linear layers and embeddings, and so
    not a sum with others'."""
    what = beside_factors(name, config, layers.values())
    if what:
        raise ValueError(
            f"The policy {name!r} is a LoRA with {what}, whose average with others is not a LoRA. Merge each "
            "policy into a model of its own, `merge_and_unload()`, and pass the models."
        )
    if any(name in layer.merged_adapters for layer in layers.values()):
        raise ValueError(f"The policy {name!r} is merged into the weights. Call `unmerge_adapter()` first.")


@torch.no_grad()
def _soup_of_models(chosen: list[tuple[float, Any]]) -> PreTrainedModel:
    if any(not isinstance(policy, PreTrainedModel) for _, policy in chosen):
        kinds = sorted({type(policy).__name__ for _, policy in chosen})
        raise ValueError(
            f"`policies` has {', '.join(kinds)}, but needs `PreTrainedModel`s. Load LoRAs into one `PeftModel` with "
            "`load_adapter`, name them in `policies` and pass it as `adapters_of`."
        )
    weights = [(weight, policy.state_dict()) for weight, policy in chosen]
    for _, policy in chosen:
        if AdapterSwitch.of(policy).layers:
            raise ValueError(
                f"A policy, a {type(policy).__name__}, has adapters in it, whose factors have no average. Merge them "
                "with `merge_and_unload()`, or name LoRAs of one `PeftModel` and pass it as `adapters_of`."
            )
    if len({bool(policy.config.get_text_config().tie_word_embeddings) for _, policy in chosen}) > 1:
        raise ValueError("Some of the policies have an output layer that is tied to the embedding. Untie it in all.")
    soup = copy.deepcopy(chosen[0][1])
    values = soup.state_dict()
    for _, own in weights:
        for name in sorted(values.keys() | own.keys()):
            shapes = [tuple(held[name].shape) if name in held else "none" for held in (values, own)]
            if shapes[0] != shapes[1]:
                raise ValueError(f"The policies differ in {name}: shapes {shapes[0]} and {shapes[1]}.")
            whole = not values[name].is_floating_point()
            if whole and not torch.equal(values[name], own[name].to(values[name])):
                raise ValueError(
                    f"The policies have whole numbers in {name} that differ, as quantized weights do, of which there "
                    "is no average. Load the policies without quantization."
                )
    for name, value in values.items():
        if value.is_floating_point():
            wide = torch.promote_types(value.dtype, torch.float32)
            value.copy_(sum(weight * own[name].to(value.device, wide) for weight, own in weights))
    return soup
