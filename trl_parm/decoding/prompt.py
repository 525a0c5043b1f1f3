# SPDX-License-Identifier: Apache-2.0
"""What guides read in the place of the base model's prompts, and how padding is told without a mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase

from peft_pblora.preference import Preference
from peft_pblora.switch import backbone_of
from trl_parm.preference_text import PreferenceText
from trl_parm.templates import tokenize_text

from .terms import LM


OwnPrompt = tuple[torch.Tensor, torch.Tensor]
"""Ids and mask of the guides' own prompts, both of shape `(rows, columns)`."""


class Prompt:
    """What a guide reads in the place of the base model's prompts, or the mask of these, for the prompts of one batch.

    Args:
        inputs (`Mapping`, *optional*):
            What `generate` gets: `input_ids` or `inputs_embeds`, and `attention_mask`.
        guide (`Mapping`, `str` or `list[str]`, *optional*):
            The guide's own prompts, one for each prompt of the batch: encoded (`input_ids`, `attention_mask`, padded
            on the left) or as texts, which need `tokenizer`. Most of all where it was trained with another template.
            Without a mask, padding is told by the guide's pad token, if that is no end token.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): The guide's tokenizer, for texts.
        length (`int`, *optional*):
            How many leading columns of `generate`'s `input_ids` are the prompt, for which the guide's prompts stand:
            those of `inputs` if not given, 0 for `inputs_embeds`. It is 1 for an encoder-decoder base model, whose
            decoder starts with one token.

    Attributes:
        rows (`int` or `None`): How many prompts the batch has, if that is known.

    Raises:
        ValueError: nothing to read, texts without tokenizer, a mask of fewer columns than `length`, or batches that
            differ.

    Example:

    ```python
    prompt = Prompt(inputs, guide=["BEGINNING OF CONVERSATION: USER: Hi ASSISTANT:"], tokenizer=arm_tokenizer)
    model.generate(**inputs, logits_processor=[PARMLogitsProcessor(arm, preference, prompt=prompt)])
    PARM(model, arm, preference).generate(**inputs, **prompt.arguments)
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
        given = [inputs.get(name) for name in ("input_ids", "inputs_embeds", "attention_mask")]
        self.attention_mask: torch.Tensor | None = given[-1]
        self.length, self._has_length = length, length is not None
        if length is None and inputs.get("input_ids") is not None:
            self.length = inputs["input_ids"].shape[1]
        elif length is None and inputs.get("inputs_embeds") is not None:
            self.length = 0
        elif length is None and self.attention_mask is not None:
            self.length = self.attention_mask.shape[1]
        if self.length is None:
            raise ValueError("`Prompt` needs `inputs` with `input_ids` or `inputs_embeds`, or a `length`.")
        self.own = None if guide is None else _encode(guide, tokenizer)
        rows = [len(t) for t in (*given, self.own and self.own[0]) if t is not None]
        self.rows = rows[0] if rows else None
        if len(set(rows)) > 1:
            raise ValueError(f"`inputs` has {rows[0]} prompts, but `guide` {rows[-1]}. Give the guide one for each.")
        columns = self.length if self.attention_mask is None else self.attention_mask.shape[1]
        if columns < self.length:
            raise ValueError(
                f"The prompt has {self.length} columns, but its `attention_mask` {columns}. Give a mask of all of "
                "them."
            )

    @classmethod
    def with_preference(
        cls,
        inputs: Mapping[str, Any],
        preference: Preference,
        text: PreferenceText,
        tokenizer: PreTrainedTokenizerBase,
        guide: Mapping[str, Any] | None = None,
        allow_off_simplex: bool = False,
    ) -> Prompt:
        """The guide's own prompts with α written at their start, for a guide that was trained to read it there.

        Args:
            inputs (`Mapping`): What `generate` gets, `input_ids` and `attention_mask`.
            preference (`Mapping[str, float]`, `Sequence[float]` or `torch.Tensor`):
                α, or of shape `(rows, k)` with one for each prompt.
            text ([`PreferenceText`]): How it is written, such as `PreferenceText.load("runs/arm")`.
            tokenizer (`PreTrainedTokenizerBase`): The guide's.
            guide (`Mapping`, *optional*):
                The guide's own prompts, encoded, where it reads others than the base model's.
            allow_off_simplex (`bool`, *optional*, defaults to `False`): As in [`as_preference`].

        Raises:
            ValueError: no `input_ids`, no mask where padding can't be told without, an invalid preference, or
                preferences of another number of rows.

        Example:

        ```python
        prompt = Prompt.with_preference(inputs, {"helpful": 0.7, "harmless": 0.3}, text, tokenizer)
        PARM(model, arm).generate(**inputs, **prompt.arguments)
        ```
        """
        read = inputs if guide is None else guide
        if read.get("input_ids") is None:
            raise ValueError("There are no `input_ids` that a preference could be written into. Give `guide` some.")
        ids, mask = read["input_ids"], read.get("attention_mask")
        if mask is None:
            pad, end = cast(Any, tokenizer).pad_token_id, cast(Any, tokenizer).eos_token_id
            remedy = "Give the attention mask of the prompts too."
            mask = told_by_pad_token(ids, pad, set() if end is None else {end}, remedy)
        prompts = [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True)]
        written = text.insert(tokenizer, prompts, preference, allow_off_simplex)
        return cls(inputs, guide=_padded(written, ids.device))

    @property
    def arguments(self) -> dict[str, Any]:
        """The guide's own prompts, and a `length` that was given, as arguments of a guided model's `generate`."""
        ids, mask = (None, None) if self.own is None else self.own
        length = self.length if self._has_length else None
        found = {"guide_input_ids": ids, "guide_attention_mask": mask, "prompt_length": length}
        return {name: value for name, value in found.items() if value is not None}

    def own_of(self, terms: Sequence[LM]) -> OwnPrompt | None:
        """What these guides read in the place of the base model's prompts, if they do. Raises `ValueError` where
        padding can't be told."""
        return None if self.own is None else own_prompt(*self.own, terms, "guide")

    def mask(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """The mask of all tokens so far, of their shape `(rows, columns)`; `None` if it is not known.

        Raises:
            ValueError: the batch is not the one that the prompt belongs to.
        """
        rows = len(self.own[0]) if self.own is not None else None
        if self.attention_mask is not None and self.length:
            rows = len(self.attention_mask)
        if rows is None:
            return None
        length = cast(int, self.length)
        if len(tokens) % rows or length > tokens.shape[1]:
            raise ValueError(
                f"The prompt has {rows} rows of {length} tokens, which does not fit input ids of shape "
                f"{tuple(tokens.shape)}. Make one `Prompt`, and one processor, for each batch of prompts."
            )
        if self.attention_mask is None or not self.length:
            return None
        mask = torch.ones_like(tokens)
        own = self.attention_mask[:, :length].to(mask)
        mask[:, :length] = own.repeat_interleave(len(tokens) // rows, dim=0)
        return mask


def _encode(guide: Any, tokenizer: PreTrainedTokenizerBase | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    if isinstance(guide, str):
        guide = [guide]
    if not isinstance(guide, Mapping):
        if tokenizer is None:
            raise ValueError("`guide` has texts, which need `tokenizer`, the guiding model's tokenizer.")
        guide = _padded([tokenize_text(tokenizer, text) for text in guide], torch.device("cpu"))
    ids, mask = guide["input_ids"], guide.get("attention_mask")
    _check(ids, torch.ones_like(ids) if mask is None else mask, "guide")
    return ids, mask


def _padded(prompts: Sequence[Sequence[int]], device: torch.device) -> dict[str, torch.Tensor]:
    """Prompts as a batch, padded on the left by tokens that the mask hides."""
    longest = max(map(len, prompts), default=0)
    ids = [[0] * (longest - len(prompt)) + [*prompt] for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {
        "input_ids": torch.tensor(ids, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }


def own_prompt(
    ids: torch.Tensor | None,
    mask: torch.Tensor | None,
    terms: Sequence[LM] = (),
    argument: str = "guide_input_ids",
) -> OwnPrompt | None:
    """Prompts with their mask, if any are given; without a mask, padding is told by the pad token of these guides.
    Raises `ValueError` unless they have tokens and are padded on the left, or where padding can't be told."""
    if ids is None:
        return None
    if mask is None:
        pads = [term.backbone.generation_config.pad_token_id for term in terms]
        pad = next((pad for pad in pads if pad is not None), None)
        ends = {end for term in terms for end in end_tokens(term.model)}
        if not terms or len(ids) == 1 and (pad is None or pad in ends):  # nobody reads it, or it is padded to no other
            mask = torch.ones_like(ids)
    if mask is None:
        mask = told_by_pad_token(ids, pad, ends, f"Give the attention mask of `{argument}` too.")
    _check(ids, mask, argument)
    return ids, mask


def _check(ids: torch.Tensor, mask: torch.Tensor, argument: str) -> None:
    if ids.ndim != 2 or ids.numel() == 0 or mask.shape != ids.shape or not mask[:, -1].all():
        raise ValueError(
            f"`{argument}` has input ids of shape {tuple(ids.shape)}, but it needs (rows, columns), not empty and "
            "padded on the left, and an attention mask of the same shape."
        )


def told_by_pad_token(tokens: torch.Tensor, pad: int | None, ends: set[int], remedy: str) -> torch.Tensor:
    """The mask that `generate` finds where none is given: by a pad token that is no end token.

    Args:
        tokens (`torch.Tensor` of shape `(rows, columns)`): The prompts.
        pad (`int` or `None`): The pad token, if one is known.
        ends (`set[int]`): The end tokens.
        remedy (`str`): What to do where it is not known.

    Raises:
        ValueError: rows may begin with padding that can't be told from text.
    """
    told = pad is not None and pad not in ends
    mask = (tokens != pad).long() if told else torch.ones_like(tokens)
    runs = (next(groupby(row[kept].tolist()), None) for row, kept in zip(tokens, mask.bool()))
    begun = {(run[0], len(list(run[1]))) for run in runs if run is not None}  # first tokens, and how often they stand
    if pad is None and (len(begun) > 1 or begun and not ends and len(tokens) > 1):
        raise ValueError(
            f"No pad token is known, so that rows may begin with padding, which can't be told from text. {remedy}"
        )
    doubtful = {pad} if pad in ends else ends
    begin_with_bos = told and len(begun) == 1 and next(iter(begun))[1] == 1
    if not begin_with_bos and any(token in doubtful for token, _ in begun):
        raise ValueError(f"A row begins with an end token, which may be padding or text. {remedy}")
    return mask


def end_tokens(model: Any) -> set[int]:
    """The end tokens of a model, by its generation configuration where it has one, as a classifier has not."""
    backbone = backbone_of(model)
    config = getattr(backbone, "generation_config", None) or getattr(backbone, "config", None)
    ends = getattr(config, "eos_token_id", None)
    return {end for end in (ends if isinstance(ends, list) else [ends]) if end is not None}
