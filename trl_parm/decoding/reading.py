# SPDX-License-Identifier: Apache-2.0
"""From the base model's tokens to what a guide reads: its own prompt, its own vocabulary, and what is padding."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from .padding import attention_mask, pad_token_id
from .prompts import Prompt
from .vocabulary import Vocabulary


def read_by_guide(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    mask: torch.Tensor | None,
    prompt: Prompt | None,
    vocabulary: Vocabulary | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The guide's tokens and their mask, both of shape `(rows, length)`.

    Args:
        model (`PreTrainedModel`): The guide.
        tokens (`torch.Tensor` of shape `(rows, columns)`): The base model's tokens.
        mask (`torch.Tensor` of shape `(rows, columns)`, *optional*): Their mask; found as [`attention_mask`] does if
            not given.
        prompt ([`Prompt`], *optional*): What is known of the batch.
        vocabulary ([`Vocabulary`], *optional*): From the base model's tokens to the guide's.

    Raises:
        ValueError: the batch does not fit the guide's prompts, or there is nothing to read.
    """
    tokens = tokens.to(model.device)
    own = prompt.own(tokens) if prompt else None
    if own is not None and prompt is not None:
        tokens = tokens[:, prompt.length :]
        mask = torch.ones_like(tokens) if mask is None else mask.to(tokens)[:, prompt.length :]
    elif mask is None:
        pad = vocabulary.base_pad_token_id if vocabulary else pad_token_id(model)
        mask = attention_mask(tokens, prompt, pad)
    else:
        mask = mask.to(tokens)
    if vocabulary is not None:
        tokens, known = vocabulary.to_guide(tokens)
        mask = mask * known
    if own is not None:
        tokens, mask = torch.cat([own[0], tokens], 1), torch.cat([own[1], mask], 1)
    if tokens.shape[1] == 0:
        raise ValueError(
            "The guiding model has nothing to read: with `inputs_embeds` it can't see the prompt. Give it one "
            "with `prompt=Prompt(inputs, guide=...)`."
        )
    return tokens, mask
