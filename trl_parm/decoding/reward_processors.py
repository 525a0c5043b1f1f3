# SPDX-License-Identifier: Apache-2.0
"""The methods that search with reward models of whole texts, as logits processors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_pblora.preference import Preference
from trl_parm.rewards import Reward

from .candidates import Rollout, TopKReward
from .guided import GuidedLogitsProcessor
from .processors import objective_weights, sum_of
from .prompts import Prompt
from .scorers import BASE
from .trajectories import ClassifierReward, TextReward, TrajectoryReward


class ARGSLogitsProcessor(GuidedLogitsProcessor):
    """Reranks the base model's k best next tokens by rewards of the text so far (ARGS, ICLR 2024, arXiv 2402.01694):

        score(v) = log π_base(v) + w · Σ_i α_i · R_i([x, y_<t, v]),  v among the k best; others are excluded

    Args:
        rewards (`Mapping`, `Callable` or `PreTrainedModel`):
            Objective → reward, or a single one: a function of prompts and responses (texts), a sequence classifier
            with the base model's vocabulary, or any [`TrajectoryReward`], such as [`SequenceReward`] for a function of
            ids.
        preference (`Mapping[str, float]`, `Sequence[float]` or `torch.Tensor`, *optional*):
            α, in the order of `rewards`, or of shape `(rows, k)`; not needed for a single reward.
        weight (`float`, *optional*, defaults to 1.5): w, positive, as in the paper.
        k (`int`, *optional*, defaults to 10): Candidates, as in the paper.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): The base model's, for rewards of texts.
        prompts (`Sequence[str]`, *optional*): The prompts as rewards of texts shall read them; see [`TextReward`].
        prompt ([`Prompt`], *optional*): The padding and the prompt's end, where `generate` does not call.

    Raises:
        ValueError: no reward, an invalid preference, weight or `k`, or rewards of texts without tokenizer.

    Example:

    ```python
    guide = ARGSLogitsProcessor({"positive": positivity, "concise": conciseness}, [0.5, 0.5], tokenizer=tokenizer)
    model.generate(**inputs, logits_processor=[guide])
    ```
    """

    def __init__(
        self,
        rewards: Mapping[str, Any] | Any,
        preference: Preference | None = None,
        weight: float = 1.5,
        k: int = 10,
        tokenizer: PreTrainedTokenizerBase | None = None,
        prompts: Sequence[str] | None = None,
        prompt: Prompt | None = None,
    ) -> None:
        super().__init__(_search(rewards, preference, weight, k, None, tokenizer, prompts, prompt))


class TransferQLogitsProcessor(GuidedLogitsProcessor):
    """As [`ARGSLogitsProcessor`], but a candidate is judged by where an aligned model leads from it (Transfer-Q,
    NeurIPS 2024, arXiv 2405.20495):

        score(v) = log π_base(v) + w · Σ_i α_i · R_i([x, y_<t, v, y']),  y' decoded greedily by the baseline model

    Args:
        rewards, preference, k, tokenizer, prompts, prompt: As in [`ARGSLogitsProcessor`].
        policy (`PreTrainedModel`): The baseline aligned model, with the base model's vocabulary.
        weight (`float`, *optional*, defaults to 1.0): w, positive.
        rollout_tokens (`int`, *optional*, defaults to 20): The length of y', 1 or more.

    Raises:
        ValueError: as [`ARGSLogitsProcessor`], or no rollout.
    """

    def __init__(
        self,
        rewards: Mapping[str, Any] | Any,
        policy: PreTrainedModel,
        preference: Preference | None = None,
        weight: float = 1.0,
        k: int = 10,
        rollout_tokens: int = 20,
        tokenizer: PreTrainedTokenizerBase | None = None,
        prompts: Sequence[str] | None = None,
        prompt: Prompt | None = None,
    ) -> None:
        rollout = Rollout(policy, rollout_tokens)
        super().__init__(_search(rewards, preference, weight, k, rollout, tokenizer, prompts, prompt))


def _search(rewards, preference, weight, k, rollout, tokenizer, prompts, prompt):
    """BASE + w · Σ_i α_i · TopKReward(R_i)."""
    if not isinstance(rewards, Mapping):
        rewards, preference = {"reward": rewards}, [1.0] if preference is None else preference
    if preference is None:
        raise ValueError(f"`preference` is required for several rewards ({', '.join(rewards)}).")
    if not (isinstance(weight, int | float) and 0 < weight < float("inf")):
        raise ValueError(f"`weight` is {weight!r}, but it must be a positive, finite number.")
    weights = objective_weights("rewards", list(rewards), preference)
    judged = [_trajectory_reward(name, reward, tokenizer, prompts, prompt) for name, reward in rewards.items()]
    pad = None if tokenizer is None else tokenizer.pad_token_id
    return BASE + sum_of(
        (weight * own, TopKReward(reward, k, rollout, prompt, pad)) for own, reward in zip(weights, judged)
    )


def _trajectory_reward(name, reward, tokenizer, prompts, prompt) -> TrajectoryReward:
    if isinstance(reward, TrajectoryReward):
        return reward
    if isinstance(reward, PreTrainedModel):
        return ClassifierReward(reward)
    if not callable(reward):
        raise TypeError(
            f"The reward {name!r} is a {type(reward).__name__}. Give a function of prompts and responses, a sequence "
            "classifier, or a `TrajectoryReward`."
        )
    if tokenizer is None:
        raise ValueError(f"The reward {name!r} reads texts, which need `tokenizer`, the base model's tokenizer.")
    return TextReward(cast(Reward, reward), tokenizer, prompts, prompt)
