# SPDX-License-Identifier: Apache-2.0
"""Rewards of the base model's best candidates for the next token, as they are (ARGS) or decoded on (Transfer-Q)."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from peft_pblora.kv_cache import cache_argument
from trl_parm.algebra import Scorer, Step

from ..prefix import Prefix
from ..terms import check_evaluates
from .rewards import TrajectoryReward


class Rollout:
    """Decodes further after every candidate with an aligned model, greedily (Transfer-Q, arXiv 2405.20495).

    Args:
        policy (`PreTrainedModel`): The baseline aligned model, with the base model's vocabulary.
        tokens (`int`, *optional*, defaults to 20): How many tokens, 1 or more.

    Raises:
        ValueError: no tokens; at a call, a policy in training mode.
    """

    def __init__(self, policy: PreTrainedModel, tokens: int = 20) -> None:
        if tokens < 1:
            raise ValueError(f"`tokens` is {tokens}, but a rollout has at least one.")
        self.policy, self.tokens = policy, tokens
        config = cast(Any, policy.generation_config)
        ends = config.eos_token_id
        self.ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
        self.pad_token_id = config.pad_token_id if config.pad_token_id is not None else (self.ends or [0])[0]

    def __call__(self, step: Step, candidates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Candidates `(rows, k)` with what follows them, `(rows, k, 1 + tokens)`, and its mask up to the first end."""
        key = ("rollout", id(self))
        known = step.memory.get(key)  # several rewards judge the same rollouts
        if known is None or not (_same(known[0], step.tokens) and _same(known[1], candidates)):
            found = self._decode(
                cast(torch.Tensor, step.tokens), cast(torch.Tensor, step.mask), candidates, step.memory
            )
            known = step.memory[key] = step.tokens, candidates, found
        ends = torch.isin(known[2], known[2].new_tensor(self.ends)).long()
        return known[2], (ends.cumsum(-1) == ends).long()

    @torch.no_grad()
    def _decode(
        self, tokens: torch.Tensor, mask: torch.Tensor, candidates: torch.Tensor, memory: dict[Any, Any]
    ) -> torch.Tensor:
        check_evaluates(self.policy)
        rows, k = candidates.shape
        device = self.policy.device
        tokens, mask = tokens.to(device), mask.to(device)
        prefix = memory.setdefault(("prefix", id(self.policy)), Prefix(self.policy))
        kept = prefix.align(tokens, mask)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, kept:]
        self.policy(
            input_ids=tokens[:, kept:], attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1,
            **cache_argument(self.policy, prefix.cache),
        )  # fmt: skip
        cache = copy.deepcopy(prefix.cache)
        cache.reorder_cache(torch.arange(rows).repeat_interleave(k))
        ids = torch.cat([tokens.repeat_interleave(k, 0), candidates.view(-1, 1).to(device)], 1)
        seen = torch.cat([mask.repeat_interleave(k, 0), mask.new_ones(rows * k, 1)], 1)
        output = cast(Any, self.policy).generate(
            input_ids=ids, attention_mask=seen, max_new_tokens=self.tokens, do_sample=False, num_beams=1,
            pad_token_id=self.pad_token_id, return_dict_in_generate=False, **cache_argument(self.policy, cache),
        )  # fmt: skip
        new = cast(torch.Tensor, output)[:, tokens.shape[1] :].view(rows, k, -1).to(candidates.device)
        return torch.nn.functional.pad(new, (0, 1 + self.tokens - new.shape[-1]), value=self.pad_token_id)


class TopKReward(Scorer):
    """Rewards of the base model's k best next tokens; all others are excluded (−inf).

    Args:
        reward ([`TrajectoryReward`]): Scores the text with each candidate.
        k (`int`, *optional*, defaults to 10): How many candidates, 1 or more.
        rollout ([`Rollout`], *optional*): Scores the candidates after decoding further, as Transfer-Q does.

    Raises:
        ValueError: no candidates.
    """

    reads_text = True

    def __init__(self, reward: TrajectoryReward, k: int = 10, rollout: Rollout | None = None) -> None:
        if k < 1:
            raise ValueError(f"`k` is {k}, but there must be at least one candidate.")
        self.reward, self.k, self.rollout = reward, k, rollout

    @property
    def pad_token_id(self) -> int | None:
        """The pad token of the reward, if it knows any."""
        return getattr(self.reward, "pad_token_id", None)

    def __call__(self, step: Step) -> torch.Tensor:
        scores = step.scores
        candidates = scores.topk(min(self.k, scores.shape[-1]), dim=-1).indices
        texts, seen = candidates[..., None], torch.ones_like(candidates)[..., None]
        if self.rollout is not None:
            texts, seen = self.rollout(step, candidates)
        values = self.reward(step, texts, seen).to(scores.device)
        return torch.full_like(scores, -torch.inf, dtype=torch.float32).scatter(1, candidates, values)

    def __repr__(self) -> str:
        name = "RolloutReward" if self.rollout is not None else "TopKReward"
        return f"{name}({type(self.reward).__name__}, k={self.k})"


def _same(a: Any, b: Any) -> bool:
    return a.shape == b.shape and torch.equal(a, b)
