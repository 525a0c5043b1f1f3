# SPDX-License-Identifier: Apache-2.0
"""Reward models of whole texts as judges of a few candidates for the next token, as they are or decoded on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_pblora.switch import AdapterSwitch
from trl_parm.algebra import Step
from trl_parm.rewards import Reward, score
from trl_parm.texts import PromptText

from .branches import Classifier, Continuations


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

    def models(self) -> Iterator[Any]:
        """The models of whose answers something is in `step.memory`."""
        yield from ()


class SequenceReward(TrajectoryReward):
    """A function of token ids.

    Args:
        reward (`Callable`): Maps ids and mask, of shape `(n, length)`, to rewards of shape `(n,)`.
    """

    def __init__(self, reward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        self.reward = reward

    def __call__(self, step, candidates, candidate_mask):
        return _checked(self.reward(*_texts(step, candidates, candidate_mask)), candidates)


class TextReward(TrajectoryReward):
    """A function of texts, such as those in [`trl_parm.rewards`].

    Args:
        reward (`Reward`): Maps prompts and responses to one number for each.
        tokenizer (`PreTrainedTokenizerBase`): The base model's tokenizer.
        prompts (`Sequence[PromptText]`, *optional*):
            The batch's prompts as the reward shall read them; decoded from the ids, without special tokens, if not
            given.
        name (`str`, *optional*, defaults to `"reward"`): What errors call the reward.

    Raises:
        ValueError: at a call, another number of prompts; or as [`trl_parm.rewards.score`].
    """

    def __init__(
        self,
        reward: Reward,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[PromptText] | None = None,
        name: str = "reward",
    ) -> None:
        self.reward, self.tokenizer, self.prompts, self.name = reward, tokenizer, prompts, name

    def __call__(self, step, candidates, candidate_mask):
        rows, k, _ = candidates.shape
        start = step.prompt_length
        prompts = self.prompts or self._decode(*(x[:, :start] for x in step.text))
        if rows % len(prompts):
            raise ValueError(f"There are {len(prompts)} `prompts`, but the batch has {rows} rows. Give one for each.")
        prompts = [prompt for prompt in prompts for _ in range(rows // len(prompts) * k)]
        responses = self._decode(*(x[:, start:] for x in _texts(step, candidates, candidate_mask)))
        return _checked(torch.tensor(score(self.name, self.reward, prompts, responses)), candidates)

    def has_text(self, tokens: torch.Tensor, mask: torch.Tensor) -> bool:
        """Whether any of these prompts, `(rows, columns)`, has more than special tokens."""
        return any(self._decode(tokens, mask))

    def _decode(self, tokens: torch.Tensor, mask: torch.Tensor) -> list[str]:
        seen = [row[keep.bool()] for row, keep in zip(tokens, mask)]
        return cast(list[str], self.tokenizer.batch_decode(cast(Any, seen), skip_special_tokens=True))


class ClassifierReward(TrajectoryReward):
    """A sequence classifier with the base model's vocabulary: its output at a text's last token. It reads every prefix
    once, and all candidates as branches of it in one forward, where its architecture allows that.

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

    def models(self) -> Iterator[Any]:
        yield self.model

    def __call__(self, step, candidates, candidate_mask):
        reader = step.memory.setdefault(("classifier", id(self.model)), Classifier(self.model, self.pad_token_id))
        return _checked(reader.scores(step, candidates, candidate_mask)[..., self.label], candidates)


class Rollout:
    """Decodes further after every candidate with an aligned model, greedily (Transfer-Q, arXiv 2405.20495): after all
    of them in one batch, for which it has read the text once.

    Args:
        policy (`PreTrainedModel`): The baseline aligned model, with the base model's vocabulary.
        tokens (`int`, *optional*, defaults to 20): How many tokens, 1 or more.

    Attributes:
        adapters (`list[str]`): Those that act in it, where it is a `PeftModel`: they do so whenever it decodes.

    Raises:
        ValueError: no tokens; at a call, a policy in training mode.
    """

    def __init__(self, policy: PreTrainedModel, tokens: int = 20) -> None:
        if tokens < 1:
            raise ValueError(f"`tokens` is {tokens}, but a rollout has at least one.")
        self.policy, self.tokens = policy, tokens
        known = AdapterSwitch.of(policy).names
        active = policy.active_adapters if isinstance(policy, PeftModel) else []
        self.adapters = [name for name in active if name in known]
        config = cast(Any, policy.generation_config)
        ends = config.eos_token_id
        self.ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
        self.pad_token_id = config.pad_token_id if config.pad_token_id is not None else (self.ends or [0])[0]

    def __call__(self, step: Step, candidates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Candidates `(rows, k)` with what follows them, `(rows, k, 1 + tokens)`, and its mask up to the first end."""
        asked = step.text[0], candidates
        known = step.memory.get(("rollout", id(self)))  # several rewards judge the same rollouts
        if known is None or not all(map(torch.equal, known[0], asked)):
            known = step.memory["rollout", id(self)] = asked, self._reader(step).decode(step, candidates)
        texts = known[1]
        ends = torch.isin(texts, texts.new_tensor(self.ends)).long()
        return texts, (ends.cumsum(-1) == ends).long()

    def _reader(self, step: Step) -> Continuations:
        made = Continuations(self.policy, self.tokens, self.pad_token_id, self.adapters)
        return step.memory.setdefault(("continuations", id(self)), made)


def _texts(step: Step, candidates: torch.Tensor, candidate_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Every prefix with each of its candidates, ids and mask of shape `(rows * k, columns)`."""
    pairs = zip(step.text, (candidates, candidate_mask))
    ids, mask = (torch.cat([x.repeat_interleave(new.shape[1], 0), new.flatten(0, 1)], 1) for x, new in pairs)
    return ids, mask


def _checked(values: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """Rewards of candidates `(rows, k, new)` as `(rows, k)`, float32. Raises `ValueError` if they are not that."""
    rows, k, _ = candidates.shape
    if values.numel() != rows * k or not torch.isfinite(values).all():
        raise ValueError(
            f"The reward returned {values.tolist()} for {rows * k} candidates, but it must return one finite number "
            "for each."
        )
    return values.float().view(rows, k).to(candidates.device)
