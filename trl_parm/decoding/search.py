# SPDX-License-Identifier: Apache-2.0
"""Search with reward models of whole texts, ARGS and Transfer-Q: as formulas, guided models and processors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from numbers import Real
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_pblora.preference import Preference
from trl_parm.algebra import BASE, Scorer, Step, sum_of
from trl_parm.rewards import Reward
from trl_parm.texts import PromptText

from .methods import objective_weights
from .model import Guided
from .processor import MethodLogitsProcessor
from .terms import LM
from .trajectories import ClassifierReward, Rollout, TextReward, TrajectoryReward


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
    def reads_text_alone(self) -> bool:
        """Whether it sees texts, and so not where padding stands."""
        return self.rollout is None and isinstance(self.reward, TextReward)

    @property
    def reads_prompt(self) -> bool:
        """Whether it judges the base model's prompt too, which all do but rewards of texts that have `prompts`."""
        return not (self.reads_text_alone and cast(TextReward, self.reward).prompts)

    @property
    def pad_token_id(self) -> int | None:
        """The pad token of the reward, if it knows any."""
        return getattr(self.reward, "pad_token_id", None)

    @property
    def policy(self) -> LM | None:
        """What decodes further, with its adapters, if anything does."""
        return None if self.rollout is None else LM.of_base(self.rollout.policy, self.rollout.adapters)

    def models(self) -> Iterator[Any]:
        yield from self.reward.models()
        if self.rollout is not None:
            yield self.rollout.policy

    def row_counts(self) -> Iterator[int]:
        if isinstance(self.reward, TextReward) and self.reward.prompts:
            yield len(self.reward.prompts)

    def __call__(self, step: Step) -> torch.Tensor:
        scores = step.scores
        candidates = scores.topk(min(self.k, scores.shape[-1]), dim=-1).indices
        texts = candidates[..., None]
        mask = torch.ones_like(texts)
        if self.rollout is not None:
            texts, mask = self.rollout(step, candidates)
        values = self.reward(step, texts, mask).to(scores.device)
        return torch.full_like(scores, -torch.inf, dtype=torch.float32).scatter(1, candidates, values)

    def __repr__(self) -> str:
        name = "RolloutReward" if self.rollout is not None else "TopKReward"
        return f"{name}({type(self.reward).__name__}, k={self.k})"


def args(
    rewards: Mapping[str, Any] | Any,
    preference: Preference | None = None,
    weight: float = 1.5,
    k: int = 10,
    tokenizer: PreTrainedTokenizerBase | None = None,
    prompts: Sequence[PromptText] | None = None,
    rollout: Rollout | None = None,
) -> Scorer:
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
        prompts (`Sequence[PromptText]`, *optional*): As rewards of texts shall read them; see [`TextReward`].
        rollout ([`Rollout`], *optional*): Judge candidates after decoding further, see [`transfer_q`].

    Raises:
        ValueError: no reward, an invalid preference, weight or `k`, or rewards of texts without tokenizer.
    """
    if not isinstance(rewards, Mapping):
        rewards, preference = {"reward": rewards}, [1.0] if preference is None else preference
    if preference is None:
        raise ValueError(f"`preference` is required for several rewards ({', '.join(rewards)}).")
    if not (isinstance(weight, Real) and 0 < weight < float("inf")):
        raise ValueError(f"`weight` is {weight!r}, but it must be a positive, finite number.")
    weights = objective_weights("rewards", list(rewards), preference)
    judged = [_trajectory_reward(name, reward, tokenizer, prompts) for name, reward in rewards.items()]
    return BASE + sum_of((weight * own, TopKReward(reward, k, rollout)) for own, reward in zip(weights, judged))


def transfer_q(
    rewards: Mapping[str, Any] | Any,
    policy: PreTrainedModel,
    preference: Preference | None = None,
    weight: float = 1.0,
    k: int = 10,
    rollout_tokens: int = 20,
    tokenizer: PreTrainedTokenizerBase | None = None,
    prompts: Sequence[PromptText] | None = None,
) -> Scorer:
    """As [`args`], but a candidate is judged by where an aligned model leads from it (Transfer-Q, NeurIPS 2024, arXiv
    2405.20495):

        score(v) = log π_base(v) + w · Σ_i α_i · R_i([x, y_<t, v, y']),  y' decoded greedily by the baseline model

    Args:
        rewards, preference, k, tokenizer, prompts: As in [`args`].
        policy, rollout_tokens: The baseline aligned model and the length of y', as in [`Rollout`].
        weight (`float`, *optional*, defaults to 1.0): w, positive.

    Raises:
        ValueError: as [`args`], or no rollout.
    """
    return args(rewards, preference, weight, k, tokenizer, prompts, Rollout(policy, rollout_tokens))


class ARGS(Guided):
    """A base model whose best next tokens are reranked by rewards: `ARGS(base, ...)` with the arguments of [`args`].

    Example:

    ```python
    guided = ARGS(base, {"positive": positivity, "concise": conciseness}, [0.5, 0.5], tokenizer=tokenizer)
    guided.generate(**inputs)
    ```
    """

    def __init__(self, base: Any, *search: Any, **settings: Any) -> None:
        super().__init__(base, args(*search, **settings))


class TransferQ(Guided):
    """As [`ARGS`], of texts that a policy has decoded further: `TransferQ(base, ...)`, see [`transfer_q`]."""

    def __init__(self, base: Any, *search: Any, **settings: Any) -> None:
        super().__init__(base, transfer_q(*search, **settings))


class ARGSLogitsProcessor(MethodLogitsProcessor):
    """ARGS as a logits processor; the arguments are those of [`args`] and [`GuidedLogitsProcessor`].

    Where a call of `generate` begins, and so where its prompts end, is told by the tokens: make one processor for each
    batch of prompts, or pass `prompt=Prompt(inputs)`.
    """

    method = staticmethod(args)


class TransferQLogitsProcessor(MethodLogitsProcessor):
    """Transfer-Q as a logits processor, as [`ARGSLogitsProcessor`]; the arguments are those of [`transfer_q`]."""

    method = staticmethod(transfer_q)


def _trajectory_reward(name: str, reward: Any, tokenizer: Any, prompts: Any) -> TrajectoryReward:
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
    return TextReward(cast(Reward, reward), tokenizer, prompts, name)
