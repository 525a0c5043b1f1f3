# SPDX-License-Identifier: Apache-2.0
"""Which of the base model's tokens are padding, which `generate` does not tell a processor."""

from __future__ import annotations

from typing import Any, cast

import torch
from transformers import PreTrainedModel

from .guided import GuidedLogitsProcessor
from .prompts import Prompt, extend_mask
from .running import GenerateCall, guided_generate


def attention_mask(tokens: torch.Tensor, prompt: Prompt | None, pad_token_id: int | None) -> torch.Tensor:
    """The mask of base tokens: the one given, that of the running `generate`, or leading pad tokens left out.

    Args:
        tokens (`torch.Tensor` of shape `(rows, length)`): All tokens so far.
        prompt ([`Prompt`], *optional*): What is known of the batch.
        pad_token_id (`int`, *optional*): For where nothing is known.

    Returns:
        `torch.Tensor` of the shape of `tokens`: 1, or 0 for padding.

    Raises:
        ValueError: the batch is not the prompt's, or padding can't be told, or the base model is an encoder-decoder
            model, whose tokens have no prompt.
    """
    given = prompt.mask(tokens) if prompt else None
    if given is not None:
        return given
    call = decoder_only_call()
    mask = call.attention_mask if call else None
    if mask is not None and mask.shape[1] <= tokens.shape[1] and len(tokens) % len(mask) == 0:
        return extend_mask(mask, tokens)
    return _mask_of_padding(tokens, pad_token_id)


def decoder_only_call() -> GenerateCall | None:
    """The guided `generate` that runs, if any. Raises `ValueError` for an encoder-decoder base model."""
    call = guided_generate(GuidedLogitsProcessor)
    if call is not None and call.model.config.is_encoder_decoder:
        raise ValueError(
            "The base model is an encoder-decoder model, so the guide would see no prompt. Give it one with "
            "`prompt=Prompt(guide=..., length=1)`."
        )
    return call


def pad_token_id(model: PreTrainedModel) -> int | None:
    """A model's pad token, or its end token where it has none."""
    configs: list[Any] = [model.generation_config, model.config.get_text_config()]
    for config in configs:
        if getattr(config, "pad_token_id", None) is not None:
            return config.pad_token_id
    end = getattr(configs[0] or configs[1], "eos_token_id", None)
    return cast(int | None, end[0] if isinstance(end, list) else end)


def _mask_of_padding(tokens: torch.Tensor, pad: int | None) -> torch.Tensor:
    """Takes a leading run of pad tokens, beyond one that all rows share, for padding."""
    mask = torch.ones_like(tokens)
    if len(tokens) == 1:
        return mask
    if pad is None:
        raise ValueError(
            "The guiding model names neither a pad token nor an end token, so padding in a batch can't be told. Set "
            "its `generation_config.pad_token_id`, or pass `prompt=Prompt(inputs)`."
        )
    padding = (tokens == pad).cumprod(-1)
    shared = padding.sum(-1).min()
    return mask - padding * (torch.arange(tokens.shape[1], device=tokens.device) >= shared)
