# SPDX-License-Identifier: Apache-2.0
"""Rewarded Soups: policies that were tuned for one objective each, averaged in their weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from peft_pblora.preference import Preference

from .methods import objective_weights


def rewarded_soup(
    policies: Mapping[str, Any],
    preference: Preference,
    adapters_of: PeftModel | None = None,
    adapter_name: str = "soup",
) -> PreTrainedModel | PeftModel:
    """The model with weights θ(α) = Σ_i α_i θ_i (Rewarded Soups, NeurIPS 2023, arXiv 2306.04488).

    LoRAs are averaged exactly: Σ_i α_i B_i A_i is a LoRA of rank Σ_i r_i, with factors put side by side. Averaging A
    and B on their own would add products of one policy's A with another's B.

    Args:
        policies (`Mapping[str, PreTrainedModel]`):
            Objective → model, all of one architecture; or → name of a LoRA of `adapters_of`.
        preference (`Mapping[str, float]`, `Sequence[float]` or `torch.Tensor`): α of shape `(k,)`.
        adapters_of (`PeftModel`, *optional*): The model whose adapters `policies` names.
        adapter_name (`str`, *optional*, defaults to `"soup"`):
            Name of the averaged adapter; one that exists is replaced.

    Returns:
        A new model, on the device and in the dtype of the first policy; or `adapters_of` with the averaged adapter
        added and active.

    Raises:
        ValueError: no policy, an invalid preference, models that differ in shape, adapters that are not there or are
            no LoRA.

    Example:

    ```python
    soup = rewarded_soup({"helpful": helpful_model, "harmless": harmless_model}, [0.3, 0.7])
    soup = rewarded_soup({"helpful": "adapter_1", "harmless": "adapter_2"}, [0.3, 0.7], adapters_of=model)
    ```
    """
    weights = objective_weights("policies", list(policies), preference)
    if any(isinstance(weight, torch.Tensor) for weight in weights):
        raise ValueError("A soup has one preference of shape (k,). Make one soup for each preference.")
    chosen = [(float(w), policy) for w, policy in zip(weights, policies.values(), strict=True) if w]
    if adapters_of is not None:
        return _soup_of_adapters(adapters_of, chosen, adapter_name)
    return _soup_of_models(chosen)


def _soup_of_adapters(model: PeftModel, chosen: list[tuple[float, Any]], adapter_name: str) -> PeftModel:
    names = [name for _, name in chosen]
    for name in names:
        if not isinstance(name, str) or not isinstance(model.peft_config.get(name), LoraConfig):
            raise ValueError(f"`adapters_of` has no LoRA {name!r}. Its adapters are {list(model.peft_config)}.")
    if adapter_name in names:
        raise ValueError(f"`adapter_name` is {adapter_name!r}, which is a policy. Choose another name.")
    if adapter_name in model.peft_config:
        model.delete_adapter(adapter_name)
    tuner: Any = model.base_model
    tuner.add_weighted_adapter(names, [weight for weight, _ in chosen], adapter_name, combination_type="cat")
    model.set_adapter(adapter_name)
    # PEFT makes the dropout of a new adapter in training mode, whatever the model's mode is.
    for module in model.modules():
        if isinstance(module, LoraLayer) and adapter_name in module.lora_dropout:
            module.lora_dropout[adapter_name].train(module.training)
    return model


@torch.no_grad()
def _soup_of_models(chosen: list[tuple[float, Any]]) -> PreTrainedModel:
    if any(not isinstance(policy, PreTrainedModel) for _, policy in chosen):
        kinds = sorted({type(policy).__name__ for _, policy in chosen})
        raise ValueError(
            f"`policies` has {', '.join(kinds)}, but needs `PreTrainedModel`s. Load LoRAs into one `PeftModel` with "
            "`load_adapter`, name them in `policies` and pass it as `adapters_of`."
        )
    soup = copy.deepcopy(chosen[0][1])
    for name, value in soup.state_dict().items():
        if not value.is_floating_point():
            continue
        total = torch.zeros_like(value, dtype=torch.float32)
        for weight, policy in chosen:
            own = policy.state_dict().get(name)
            if own is None or own.shape != value.shape:
                found = "none" if own is None else tuple(own.shape)
                raise ValueError(f"The policies differ in {name}: shapes {tuple(value.shape)} and {found}.")
            total += weight * own.to(total)
        value.copy_(total)
    return soup
