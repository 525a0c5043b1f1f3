# SPDX-License-Identifier: Apache-2.0
"""Rewards of the base model's best candidates for the next token, as they are (ARGS) or decoded on (Transfer-Q)."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from transformers import DynamicCache, PreTrainedModel

from peft_pblora.kv_cache import cache_argument

from .padding import attention_mask, pad_token_id
from .prefix import Prefix, read
from .prompts import Prompt
from .scorers import Scorer
from .trajectories import TrajectoryReward


class Rollout:
    """Decodes further after every candidate with an aligned model, greedily (Transfer-Q, arXiv 2405.20495).

    Args:
        policy (`PreTrainedModel`): The baseline aligned model, with the base model's vocabulary.
        tokens (`int`, *optional*, defaults to 20): How many tokens, 1 or more.

    Raises:
        ValueError: no tokens.
    """

    def __init__(self, policy: PreTrainedModel, tokens: int = 20) -> None:
        if tokens < 1:
            raise ValueError(f"`tokens` is {tokens}, but a rollout has at least one.")
        self.policy, self.tokens = policy.eval(), tokens
        ends = cast(Any, policy.generation_config).eos_token_id
        self.ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
        self.pad_token_id = cast(int, pad_token_id(policy) or 0)
        self._prefix: Prefix | None = None
        self._last: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def __call__(self, tokens: torch.Tensor, mask: torch.Tensor, candidates: torch.Tensor) -> tuple:
        """Candidates `(rows, k)` with what follows them, `(rows, k, 1 + tokens)`, and its mask up to the first end."""
        if self._last is None or not _same(self._last[0], tokens) or not _same(self._last[1], candidates):
            self._last = tokens.clone(), candidates.clone(), self._decode(tokens, mask, candidates)
        found = self._last[2]
        ends = torch.isin(found, found.new_tensor(self.ends)).long()
        return found, (ends.cumsum(-1) == ends).long()

    def _decode(self, tokens: torch.Tensor, mask: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        rows, k = candidates.shape
        device = self.policy.device
        tokens, mask = tokens.to(device), mask.to(device)
        with torch.no_grad():
            self._prefix = read(self._prefix, tokens, mask, self._forward, DynamicCache)
        cache = copy.deepcopy(self._prefix.cache)
        cache.batch_repeat_interleave(k)
        ids = torch.cat([tokens.repeat_interleave(k, 0), candidates.view(-1, 1).to(device)], 1)
        seen = torch.cat([mask.repeat_interleave(k, 0), mask.new_ones(rows * k, 1)], 1)
        output = cast(Any, self.policy).generate(
            input_ids=ids, attention_mask=seen, max_new_tokens=self.tokens, do_sample=False, num_beams=1,
            pad_token_id=self.pad_token_id, return_dict_in_generate=False, **cache_argument(self.policy, cache),
        )  # fmt: skip
        new = cast(torch.Tensor, output)[:, tokens.shape[1] :].view(rows, k, -1).to(candidates.device)
        return torch.nn.functional.pad(new, (0, 1 + self.tokens - new.shape[-1]), value=self.pad_token_id)

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Any) -> torch.Tensor:
        self.policy(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1,
            **cache_argument(self.policy, cache),
        )  # fmt: skip
        return mask.new_zeros(len(mask))


class TopKReward(Scorer):
    """Rewards of the base model's k best next tokens; all others are excluded (−inf).

    Args:
        reward ([`TrajectoryReward`]): Scores the text with each candidate.
        k (`int`, *optional*, defaults to 10): How many candidates, 1 or more.
        rollout ([`Rollout`], *optional*): Scores the candidates after decoding further, as Transfer-Q does.
        prompt ([`Prompt`], *optional*): The padding, where `generate` does not call.
        pad_token_id (`int`, *optional*): Tells padding where neither `generate` calls nor `prompt` is given.

    Raises:
        ValueError: no candidates.
    """

    def __init__(
        self,
        reward: TrajectoryReward,
        k: int = 10,
        rollout: Rollout | None = None,
        prompt: Prompt | None = None,
        pad_token_id: int | None = None,
    ) -> None:
        if k < 1:
            raise ValueError(f"`k` is {k}, but there must be at least one candidate.")
        self.reward, self.k, self.rollout, self.prompt, self.pad_token_id = reward, k, rollout, prompt, pad_token_id

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        mask = attention_mask(input_ids, self.prompt, self.pad_token_id)
        candidates = scores.topk(min(self.k, scores.shape[-1]), dim=-1).indices
        texts, seen = candidates[..., None], torch.ones_like(candidates)[..., None]
        if self.rollout is not None:
            texts, seen = self.rollout(input_ids, mask, candidates)
        values = self.reward(input_ids, mask, texts, seen).to(scores.device)
        return torch.full_like(scores, -torch.inf, dtype=torch.float32).scatter(1, candidates, values)

    def __repr__(self) -> str:
        name = "RolloutReward" if self.rollout is not None else "TopKReward"
        return f"{name}({type(self.reward).__name__}, k={self.k})"


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)
