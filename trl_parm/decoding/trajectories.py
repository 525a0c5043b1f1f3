# SPDX-License-Identifier: Apache-2.0
"""Reward models of whole texts as judges of a few candidates for the next tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from peft_pblora.kv_cache import cache_argument
from trl_parm.rewards import Reward

from .padding import decoder_only_call
from .prefix import Prefix, read
from .prompts import Prompt


class TrajectoryReward:
    """Scores continuations of prefixes. Subclasses define `__call__`."""

    def __call__(
        self, tokens: torch.Tensor, mask: torch.Tensor, candidates: torch.Tensor, candidate_mask: torch.Tensor
    ) -> torch.Tensor:
        """Scores k candidates for each row.

        Args:
            tokens, mask (`torch.Tensor` of shape `(rows, length)`): The prefixes, padded on the left.
            candidates, candidate_mask (`torch.Tensor` of shape `(rows, k, new)`):
                What may follow, padded on the right.

        Returns:
            `torch.Tensor` of shape `(rows, k)`, float32, higher is better.
        """
        raise NotImplementedError


class SequenceReward(TrajectoryReward):
    """A function of token ids.

    Args:
        reward (`Callable`): Maps ids and mask, of shape `(n, length)`, to rewards of shape `(n,)`.
    """

    def __init__(self, reward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        self.reward = reward

    def __call__(self, tokens, mask, candidates, candidate_mask):
        rows, k, _ = candidates.shape
        ids = torch.cat([tokens.repeat_interleave(k, 0), candidates.flatten(0, 1)], 1)
        seen = torch.cat([mask.repeat_interleave(k, 0), candidate_mask.flatten(0, 1)], 1)
        return checked(self.reward(ids, seen), rows, k).to(tokens.device)


class TextReward(TrajectoryReward):
    """A function of texts, such as those in [`trl_parm.rewards`].

    Args:
        reward (`Reward`): Maps prompts and responses to one number for each.
        tokenizer (`PreTrainedTokenizerBase`): The base model's tokenizer.
        prompts (`Sequence[str]`, *optional*):
            The batch's prompts as the reward shall read them; decoded from the ids, without special tokens, if not
            given.
        prompt ([`Prompt`], *optional*): Where the prompts end, if `generate` is not what calls.

    Raises:
        ValueError: at the first call, where the prompts end is not known, or the reward is not one finite number for
            each response.
    """

    def __init__(
        self,
        reward: Reward,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[str] | None = None,
        prompt: Prompt | None = None,
    ) -> None:
        self.reward, self.tokenizer, self.prompts, self.prompt = reward, tokenizer, prompts, prompt

    def __call__(self, tokens, mask, candidates, candidate_mask):
        rows, k, _ = candidates.shape
        length = self._prompt_length()
        prompts = self.prompts or self._decode(tokens[:, :length], mask[:, :length])
        if rows % len(prompts):
            raise ValueError(f"There are {len(prompts)} `prompts`, but the batch has {rows} rows. Give one for each.")
        prompts = [prompt for prompt in prompts for _ in range(rows // len(prompts) * k)]
        responses = torch.cat([tokens[:, length:].repeat_interleave(k, 0), candidates.flatten(0, 1)], 1)
        seen = torch.cat([mask[:, length:].repeat_interleave(k, 0), candidate_mask.flatten(0, 1)], 1)
        values = self.reward(prompts, self._decode(responses, seen))
        return checked(torch.as_tensor(values, dtype=torch.float32), rows, k).to(tokens.device)

    def _prompt_length(self) -> int:
        if self.prompt is not None:
            return cast(int, self.prompt.length)
        call = decoder_only_call()
        if call is None or call.prompt_length is None:
            raise ValueError("Where the prompts end is not known outside `generate`. Pass `prompt=Prompt(inputs)`.")
        return call.prompt_length

    def _decode(self, tokens: torch.Tensor, mask: torch.Tensor) -> list[str]:
        seen = [row[keep.bool()] for row, keep in zip(tokens, mask)]
        return cast(list[str], self.tokenizer.batch_decode(cast(Any, seen), skip_special_tokens=True))


class ClassifierReward(TrajectoryReward):
    """A sequence classifier with the base model's vocabulary: its output at a text's last token. It reads every prefix
    once.

    Args:
        model (`PreTrainedModel`): Such as `AutoModelForSequenceClassification` of a causal model.
        label (`int`, *optional*, defaults to 0): Which of its outputs is the reward.

    Raises:
        ValueError: no such output, or a model without pad token.
    """

    def __init__(self, model: PreTrainedModel, label: int = 0) -> None:
        config: Any = model.config.get_text_config()
        outputs = cast(int, model.config.num_labels)
        if not 0 <= label < outputs:
            raise ValueError(f"`label` is {label}, but the classifier has {outputs} outputs.")
        if config.pad_token_id is None:
            raise ValueError("The classifier's config has no pad token, so it can't read a batch. Set `pad_token_id`.")
        self.model, self.label, self.pad_token_id = model.eval(), label, config.pad_token_id
        self._prefix: Prefix | None = None

    @torch.no_grad()
    def __call__(self, tokens, mask, candidates, candidate_mask):
        rows, k, _ = candidates.shape
        device = self.model.device
        mask = mask.to(device)
        self._prefix = read(self._prefix, tokens.to(device), mask, self._forward, DynamicCache)
        cache = copy.deepcopy(self._prefix.cache)
        cache.batch_repeat_interleave(k)
        seen = candidate_mask.flatten(0, 1).to(device)
        ids = candidates.flatten(0, 1).to(device).masked_fill(seen == 0, self.pad_token_id)
        mask = torch.cat([mask.repeat_interleave(k, 0), seen], 1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        return checked(self._forward(ids, mask, positions, cache), rows, k).to(candidates.device)

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Any) -> torch.Tensor:
        logits = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            **cache_argument(self.model, cache),
        ).logits
        return logits[:, self.label].float()


def checked(values: torch.Tensor, rows: int, k: int) -> torch.Tensor:
    """The rewards of `rows * k` candidates as `(rows, k)`, float32. Raises `ValueError` if they are not that."""
    if values.numel() != rows * k or not torch.isfinite(values).all():
        raise ValueError(
            f"The reward returned {values.tolist()} for {rows * k} candidates, but it must return one finite number "
            "for each."
        )
    return values.float().view(rows, k)
