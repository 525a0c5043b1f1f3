# SPDX-License-Identifier: Apache-2.0
"""What a guiding model reads in the place of the base model's prompt, and where a prompt ends and padding is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase


class Prompt:
    """The prompts of one batch, where the guiding model has its own or `generate` is not what calls a processor.

    Inside `generate` nothing is needed as long as base and guide read the same prompt: mask and length are known. A
    processor with a `Prompt` serves that batch only.

    Args:
        inputs (`Mapping`, *optional*):
            What `generate` gets: `input_ids` or `inputs_embeds`, and `attention_mask`.
        guide (`Mapping`, `str` or `list[str]`, *optional*):
            The guide's own prompts, one for each prompt of the batch: encoded (`input_ids`, `attention_mask`, padded
            on the left) or as texts, which need `tokenizer`. Most of all where it was trained with another template.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): The guide's tokenizer, for texts.
        length (`int`, *optional*):
            How many leading columns of `generate`'s `input_ids` the guide's prompts stand for: those of `inputs` if
            not given, 0 for `inputs_embeds`. It is 1 for an encoder-decoder base model, whose decoder starts with one
            token.

    Raises:
        ValueError: nothing to read, texts without tokenizer, or batches that differ.

    Example:

    ```python
    prompt = Prompt(inputs, guide=["BEGINNING OF CONVERSATION: USER: Hi ASSISTANT:"], tokenizer=arm_tokenizer)
    model.generate(**inputs, logits_processor=[PARMLogitsProcessor(arm, preference, prompt=prompt)])
    ```
    """

    def __init__(
        self,
        inputs: Mapping[str, Any] | None = None,
        guide: Mapping[str, Any] | str | Sequence[str] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        length: int | None = None,
    ) -> None:
        inputs = inputs or {}
        self.attention_mask: torch.Tensor | None = inputs.get("attention_mask")
        self.length = length
        if length is None and inputs.get("input_ids") is not None:
            self.length = inputs["input_ids"].shape[1]
        elif length is None and inputs.get("inputs_embeds") is not None:
            self.length = 0
        elif length is None and self.attention_mask is not None:
            self.length = self.attention_mask.shape[1]
        if self.length is None:
            raise ValueError("`Prompt` needs `inputs` with `input_ids` or `inputs_embeds`, or a `length`.")
        self.guide_ids, self.guide_mask = None, None
        if guide is not None:
            self.guide_ids, self.guide_mask = _encode(guide, tokenizer)
        rows = [len(t) for t in (self.attention_mask, self.guide_ids) if t is not None]
        if len(set(rows)) > 1:
            raise ValueError(f"`inputs` has {rows[0]} prompts, but `guide` {rows[1]}. Give the guide one for each.")

    def mask(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """The attention mask of base tokens `(rows, length)`, of the same shape, or `None` if it is not known.

        Raises:
            ValueError: the batch is not the one that the prompt belongs to.
        """
        return extend_mask(self.attention_mask, tokens) if self.attention_mask is not None and self.length else None

    def own(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The guide's own prompt, ids and mask, for each row of the base's tokens; `None` if it reads the base's.

        Raises:
            ValueError: the batch is not the one that the prompt belongs to.
        """
        if self.guide_ids is None or self.guide_mask is None:
            return None
        _check(len(self.guide_ids), cast(int, self.length), tokens)
        repeats = len(tokens) // len(self.guide_ids)
        ids, mask = self.guide_ids.to(tokens.device), self.guide_mask.to(tokens.device)
        return ids.repeat_interleave(repeats, dim=0), mask.repeat_interleave(repeats, dim=0)


def extend_mask(mask: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """A prompt's mask for all tokens so far, of their shape `(rows, length)`: new tokens are seen, rows repeated.

    Raises:
        ValueError: the batch is not the one that the mask belongs to.
    """
    _check(mask.shape[0], mask.shape[1], tokens)
    extended = torch.ones_like(tokens)
    extended[:, : mask.shape[1]] = mask.to(extended).repeat_interleave(len(tokens) // len(mask), dim=0)
    return extended


def _check(batch: int, length: int, tokens: torch.Tensor) -> None:
    if len(tokens) % batch or length > tokens.shape[1]:
        raise ValueError(
            f"The prompt has {batch} rows of {length} tokens, which does not fit input ids of shape "
            f"{tuple(tokens.shape)}. Make one `Prompt`, and one processor, for each batch of prompts."
        )


def _encode(guide: Any, tokenizer: PreTrainedTokenizerBase | None) -> tuple[torch.Tensor, torch.Tensor]:
    if isinstance(guide, str):
        guide = [guide]
    if not isinstance(guide, Mapping):
        if tokenizer is None:
            raise ValueError("`guide` has texts, which need `tokenizer`, the guiding model's tokenizer.")
        side, tokenizer.padding_side = tokenizer.padding_side, "left"
        try:
            guide = tokenizer(list(guide), return_tensors="pt", padding=len(guide) > 1)
        finally:
            tokenizer.padding_side = side
    ids = guide["input_ids"]
    mask = guide.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    if ids.ndim != 2 or ids.numel() == 0 or not mask[:, -1].all():
        raise ValueError(
            f"`guide` has input ids of shape {tuple(ids.shape)}, but it needs (batch, prompt), not empty and padded "
            "on the left."
        )
    return ids, mask
