# SPDX-License-Identifier: Apache-2.0
"""A base model whose weights are elsewhere, as in vLLM's engine, and adapters on it, which are to be exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, PeftType
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from peft_pblora import get_preference, save_as_lora
from peft_pblora.config import PreferenceConfig
from peft_pblora.layer import PreferenceLinear
from peft_pblora.loras import Factors, beside_factors, has_lora, is_embedding, lora_factors, lora_layers
from peft_pblora.skeleton import skeleton_of
from peft_pblora.switch import changes_below
from trl_parm.decoding import LM

from .models import Models, adapter_config, backbone_name, canonical


class Unloaded(Models):
    """[`Models`] without any weights but those of adapters on the base model itself.

    Args:
        base (`str`): The base model, of which the configuration is read.
        dtype (`str`, *optional*, defaults to `"auto"`): As of [`Models`].

    Raises:
        ValueError: at a call, a model that is no adapter on the base model, or one that changes it.
    """

    def __init__(self, base: str, dtype: str = "auto") -> None:
        super().__init__(base, dtype)

    def adapter(self, name: str, backbone: str | None = None) -> tuple[PeftModel, str]:
        trained_on = backbone_name(name)
        self._check_same(name, trained_on and f"one on {trained_on!r}", trained_on or name)
        if trained_on is None:
            raise ValueError(f"{name!r} must be an adapter on the base model {self.name!r}, but it is that model.")
        if setting := changes_below(adapter_config(name), self.base):
            raise ValueError(
                f"The adapter {name!r} has `{setting}`, with which PEFT changes the model below it. One vLLM engine "
                "has one set of weights; use `engine: transformers`."
            )
        return super().adapter(name, backbone)

    def whole(self, name: str) -> PreTrainedModel:
        self._check_same(name, None, name)
        return self.base

    def apart(self, name: str) -> PreTrainedModel:
        raise ValueError(self._refusal(name, None))

    def extra(self) -> tuple[int, int]:
        """How many parameters, and bytes of them, the adapters have."""
        found = {id(p): p for model in self._adapted.values() for p in model.parameters() if not is_nowhere(p)}
        return sum(p.numel() for p in found.values()), sum(p.numel() * p.element_size() for p in found.values())

    def _load(self, name: str) -> PreTrainedModel:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config)
        return cast(PreTrainedModel, skeleton_of(model, on_cpu=True).eval())

    def _check_same(self, name: str, kind: str | None, trained_on: str) -> None:
        if canonical(trained_on) != canonical(self.name):
            raise ValueError(self._refusal(name, kind))

    def _refusal(self, name: str, kind: str | None) -> str:
        return (
            f"{name!r} must be an adapter on the base model {self.name!r}, but it is {kind or 'a model of its own'}. "
            "One vLLM engine has one set of weights; use `engine: transformers`."
        )


def is_nowhere(tensor: torch.Tensor) -> bool:
    """Whether a tensor is one of a skeleton's, which has no memory of its own."""
    return tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size()


def own_rank(model: PeftModel, name: str) -> int:
    """The largest rank of an adapter of a model, that a LoRA must have to be the same.

    Raises:
        ValueError: an adapter that vLLM can't load as a LoRA.
    """
    if isinstance(model.peft_config[name], PreferenceConfig):
        found = [m.adapter(name) for m in model.modules() if isinstance(m, PreferenceLinear) and name in m.adapters]
        if found[0].factors()[2] is not None:
            _refuse(name, "a shift, as MoSLoRA has it, which is a bias of a LoRA")
        return max(adapter.A.weight.shape[0] for adapter in found)
    return max(len(factors.down) for factors in _factors(model, name).values())


def export(term: LM, path: Path, rank: int) -> None:
    """Writes the adapter of a term as a plain LoRA of a rank, at the term's preference, or the one that is set."""
    model, (name,) = term.model, term.adapters
    if isinstance(model.peft_config[name], PreferenceConfig):
        α = get_preference(model, name) if term.preference is None else term.preference
        save_as_lora(model, path, cast(Any, α), name, rank, allow_off_simplex=term.allow_off_simplex)
        return
    tensors, found = {}, _factors(model, name)
    for layer, own in found.items():
        padding, at = rank - len(own.down), f"base_model.model.{layer}"
        tensors[f"{at}.lora_A.weight"] = nn.functional.pad(own.down.detach(), (0, 0, 0, padding)).contiguous()
        tensors[f"{at}.lora_B.weight"] = nn.functional.pad(own.scaling * own.up.detach(), (0, padding)).contiguous()
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=sorted(found), inference_mode=True)
    config.save_pretrained(str(path))


def _factors(model: PeftModel, name: str) -> dict[str, Factors]:
    """The factors of a LoRA by layer. Raises `ValueError` for what is no LoRA of linear layers alone."""
    config = cast(Any, model.peft_config[name])
    if config.peft_type != PeftType.LORA:
        _refuse(name, f"an adapter of the kind {config.peft_type}")
    every = lora_layers(cast(Any, model.base_model).model)
    layers = {key: layer for key, layer in every.items() if has_lora(layer, name)}
    if what := beside_factors(name, config, layers.values()):
        _refuse(name, what)
    if any(is_embedding(layer, name) for layer in layers.values()):
        _refuse(name, "a LoRA of embeddings")
    found = {key: cast(Factors, lora_factors(layer, name)) for key, layer in layers.items()}
    if any(own.bias is not None for own in found.values()):
        _refuse(name, "a bias (`lora_bias`)")
    return found


def _refuse(name: str, what: str) -> None:
    adapter = name.partition("~")[0]
    raise ValueError(f"The adapter {adapter!r} is or has {what}, which vLLM can't load. Use `engine: transformers`.")
