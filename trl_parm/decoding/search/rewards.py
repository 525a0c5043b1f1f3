# SPDX-License-Identifier: Apache-2.0
"""Reward models of whole texts as judges of a few candidates for the next tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_pblora.kv_cache import cache_argument
from trl_parm.algebra import Step
from trl_parm.rewards import Reward

from ..prefix import Prefix
from ..terms import check_evaluates


class TrajectoryReward:
    """Scores continuations of prefixes. Subclasses define `__call__`. It keeps nothing: what a call is worth to the
    next one goes into `step.memory`."""

    def __call__(self, step: Step, candidates: torch.Tensor, candidate_mask: torch.Tensor) -> torch.Tensor:
        """Scores k candidates for each row.

        Args:
            step ([`Step`]): The prefixes, `step.tokens` and `step.mask` of shape `(rows, length)`, padded on the left.
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

    def __call__(self, step, candidates, candidate_mask):
        ids, seen = _texts(step, 0, candidates, candidate_mask)
        return checked(self.reward(ids, seen), *candidates.shape[:2]).to(candidates.device)


class TextReward(TrajectoryReward):
    """A function of texts, such as those in [`trl_parm.rewards`].

    Args:
        reward (`Reward`): Maps prompts and responses to one number for each.
        tokenizer (`PreTrainedTokenizerBase`): The base model's tokenizer.
        prompts (`Sequence[str]`, *optional*):
            The batch's prompts as the reward shall read them; decoded from the ids, without special tokens, if not
            given.

    Raises:
        ValueError: at a call, another number of prompts, or a reward that is not one finite number for each response.
    """

    def __init__(
        self, reward: Reward, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str] | None = None
    ) -> None:
        self.reward, self.tokenizer, self.prompts = reward, tokenizer, prompts

    def __call__(self, step, candidates, candidate_mask):
        rows, k, _ = candidates.shape
        start = step.prompt_length
        prompts = self.prompts or self._decode(step.tokens[:, :start], step.mask[:, :start])
        if rows % len(prompts):
            raise ValueError(f"There are {len(prompts)} `prompts`, but the batch has {rows} rows. Give one for each.")
        prompts = [prompt for prompt in prompts for _ in range(rows // len(prompts) * k)]
        responses = self._decode(*_texts(step, start, candidates, candidate_mask))
        values = torch.as_tensor(self.reward(prompts, responses), dtype=torch.float32)
        return checked(values, rows, k).to(candidates.device)

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
        ValueError: no such output, or a model without pad token; at a call, a model in training mode.
    """

    def __init__(self, model: PreTrainedModel, label: int = 0) -> None:
        config: Any = model.config.get_text_config()
        outputs = cast(int, model.config.num_labels)
        if not 0 <= label < outputs:
            raise ValueError(f"`label` is {label}, but the classifier has {outputs} outputs.")
        if config.pad_token_id is None:
            raise ValueError("The classifier's config has no pad token, so it can't read a batch. Set `pad_token_id`.")
        self.model, self.label, self.pad_token_id = model, label, config.pad_token_id

    @torch.no_grad()
    def __call__(self, step, candidates, candidate_mask):
        check_evaluates(self.model)
        rows, k, _ = candidates.shape
        device = self.model.device
        tokens, mask = step.tokens.to(device), step.mask.to(device)
        prefix = step.memory.setdefault(("prefix", id(self.model)), Prefix(self.model))
        kept = prefix.align(tokens, mask)
        self._forward(tokens[:, kept:], mask, prefix.cache)
        cache = copy.deepcopy(prefix.cache)
        cache.reorder_cache(torch.arange(rows).repeat_interleave(k))
        seen = candidate_mask.flatten(0, 1).to(device)
        ids = candidates.flatten(0, 1).to(device).masked_fill(seen == 0, self.pad_token_id)
        logits = self._forward(ids, torch.cat([mask.repeat_interleave(k, 0), seen], 1), cache)
        return checked(logits[:, self.label].float(), rows, k).to(candidates.device)

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor, cache: Any) -> torch.Tensor:
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        return self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True,
            **cache_argument(self.model, cache),
        ).logits  # fmt: skip


def checked(values: torch.Tensor, rows: int, k: int) -> torch.Tensor:
    """The rewards of `rows * k` candidates as `(rows, k)`, float32. Raises `ValueError` if they are not that."""
    if values.numel() != rows * k or not torch.isfinite(values).all():
        raise ValueError(
            f"The reward returned {values.tolist()} for {rows * k} candidates, but it must return one finite number "
            "for each."
        )
    return values.float().view(rows, k)


def _texts(
    step: Step, start: int, candidates: torch.Tensor, candidate_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every prefix from a column on with each of its candidates, ids and mask of shape `(rows * k, columns)`."""
    k = candidates.shape[1]
    tokens, mask = cast(torch.Tensor, step.tokens)[:, start:], cast(torch.Tensor, step.mask)[:, start:]
    ids = torch.cat([tokens.repeat_interleave(k, 0), candidates.flatten(0, 1)], 1)
    return ids, torch.cat([mask.repeat_interleave(k, 0), candidate_mask.flatten(0, 1)], 1)
