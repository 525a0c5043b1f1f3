# SPDX-License-Identifier: Apache-2.0
"""From prompts and runs to rows: decoded together by an engine, and scored. Not which ones, nor where they go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from peft_pblora import name_preference
from trl_parm.identity import short_hash
from trl_parm.noise import row_seed
from trl_parm.reward_models import reward_configuration
from trl_parm.rewards import Reward, score, with_failures
from trl_parm.texts import PromptText

from .decoding import Run, acting_settings, ends_within, split_settings
from .engines import Decoding, Engine


class Answering:
    """How prompts are answered, and the answers scored. The arguments are those of [`sweep`], and the base model's
    generation config.

    Attributes:
        how ([`Decoding`]): What an engine needs of it.
        configuration (`dict`): What the rows depend on beside the models, as JSON.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        base_config: Any,
        rewards: Mapping[str, Reward | None],
        seed: int = 0,
        template: str | None = None,
        max_prompt_length: int | None = None,
        escape_control_tokens: bool = False,
        **generation: Any,
    ) -> None:
        self.rewards, self.objectives, self.seed = rewards, list(rewards), seed
        sampling, others = split_settings(generation)
        acting, ends = acting_settings(base_config) or {}, others.get("eos_token_id", base_config.eos_token_id)
        self.how = Decoding(
            tokenizer, self.objectives, template, max_prompt_length, escape_control_tokens, sampling, others, acting,
            ends,
        )  # fmt: skip
        chat = tokenizer.chat_template if template is None else None
        self.configuration = {
            "objectives": self.objectives,
            "rewards": {name: reward_configuration(reward) for name, reward in rewards.items()},
            "seed": seed,
            "sampling": sampling,
            "generation": others,
            "generation_config": acting or None,
            "end_tokens": ends,
            "template": template,
            "chat_template": chat and short_hash(chat.encode()),
            "max_prompt_length": max_prompt_length,
            "escape_control_tokens": escape_control_tokens or None,  # as in files of before there was a choice
        }

    @property
    def judges(self) -> dict[str, Reward]:
        """The rewards that there are: nothing is scored by the others."""
        return {name: reward for name, reward in self.rewards.items() if reward is not None}

    def check_lengths(self, prompts: Sequence[PromptText], positions: int | None) -> list[int]:
        """The tokens of each prompt. Raises `ValueError` for one that can't be read, or that fills all positions of
        the base model."""
        found = self.how.ids(prompts)
        for number, ids in enumerate(found):
            if positions is not None and len(ids) >= positions:
                raise ValueError(
                    f"row {number} of `prompts` has {len(ids)} tokens, but the base model has {positions} positions. "
                    "Leave it out, or set `max_prompt_length`, which keeps the end of a prompt."
                )
        return list(map(len, found))

    def rows(self, pairs: Sequence[tuple[Run, PromptText]], engine: Engine) -> list[dict[str, Any]]:
        """The rows of runs and prompts, decoded together: of one run, or of several that share batches."""
        runs, prompts = [run for run, _ in pairs], [prompt for _, prompt in pairs]
        seeds = [row_seed(self.seed, prompt) for prompt in prompts]
        answers, seconds = engine.answers(self.how, runs, prompts, seeds)
        responses = self.how.responses(prompts, answers)
        scores = {n: score(n, reward, prompts, responses, may_fail=True) for n, reward in self.judges.items()}
        judged = [with_failures(scores, i) for i in range(len(prompts))]
        weights, αs = [run.weights(self.objectives) for run in runs], [run.vector(self.objectives) for run in runs]
        return [
            {
                "method": run.method,
                "preference": None if (own := weights[i]) is None else list(own),
                "label": "-" if (α := αs[i]) is None else name_preference(α, self.objectives, run.allow_off_simplex),
                "prompt": prompt,
                "response": responses[i],
                **judged[i][0],
                "tokens": len(answer.tokens),
                "seconds": seconds / len(prompts),
                "seed": seeds[i],
                "extra_parameters": run.extra_parameters,
                "extra_bytes": run.extra_bytes,
                "capped": not ends_within(answer.tokens, self.how.ends),
                "log_prob_base": answer.log_prob_base,
                "log_ratio": answer.log_prob - answer.log_prob_base,
                **judged[i][1],
            }
            for i, ((run, prompt), answer) in enumerate(zip(pairs, answers, strict=True))
        ]
