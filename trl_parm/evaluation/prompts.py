# SPDX-License-Identifier: Apache-2.0
"""Prompts, texts or conversations, as the ids that a model reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from transformers import BatchEncoding, PreTrainedTokenizerBase

from trl_parm.texts import PromptText, as_messages, fill


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[PromptText],
    template: str | None = None,
    max_length: int | None = None,
) -> BatchEncoding:
    """Tokenizes a batch of prompts, padded on the left.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The model's.
        prompts (`Sequence[PromptText]`): Texts or conversations.
        template (`str`, *optional*):
            A text with `{prompt}` in it, such as `"BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:"`. If not
            given, the tokenizer's chat template, and without one the prompt as it is.
        max_length (`int`, *optional*): Most tokens; of a longer prompt the end is kept.

    Raises:
        ValueError: a template without `{prompt}`, or a conversation of several messages without chat template.
    """
    tokenizer.padding_side = tokenizer.truncation_side = "left"
    fit: dict[str, Any] = {} if max_length is None else {"truncation": True, "max_length": max_length}
    if template is not None or tokenizer.chat_template is None:
        texts = [fill(template or "{prompt}", prompt=prompt) for prompt in prompts]
        return tokenizer(texts, return_tensors="pt", padding=True, **fit)
    chats = [as_messages(prompt, "user") for prompt in prompts]
    encoded = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True, **fit
    )
    return cast(BatchEncoding, encoded)
