# SPDX-License-Identifier: Apache-2.0
"""From prompts and runs to rows: decoded together, scored, and measured. Not which ones, nor where they go."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from peft_pblora import name_preference
from trl_parm.decoding import BASE, Guided
from trl_parm.decoding.adapters import Adapters
from trl_parm.decoding.probes import sees_over_padding
from trl_parm.decoding.search import TopKReward
from trl_parm.identity import short_hash
from trl_parm.noise import row_seed
from trl_parm.reward_models import reward_configuration
from trl_parm.rewards import Reward, score, with_failures
from trl_parm.texts import PromptText

from .decoding import (
    GREEDY,
    Batch,
    RowSampling,
    Run,
    acting_settings,
    encode_prompts,
    ends_within,
    prompt_ids,
    split_settings,
    text_length,
    with_common_start,
)
from .likelihood import ChosenLogProbs, base_log_probs, own_adapters


class Answering:
    """How prompts are answered, and the answers scored. The arguments are those of [`sweep`], and the base model's
    generation config.

    Attributes:
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
        self.tokenizer, self.settings = tokenizer, acting_settings(base_config) or {}
        self.rewards, self.objectives = rewards, list(rewards)
        self.seed, self.reading = seed, (template, max_prompt_length, escape_control_tokens)
        self.sampling, self.generation = split_settings(generation)
        self.ends = self.generation.get("eos_token_id", base_config.eos_token_id)
        self._over_padding: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()
        chat = tokenizer.chat_template if template is None else None
        self.configuration = {
            "objectives": self.objectives,
            "rewards": {name: reward_configuration(reward) for name, reward in rewards.items()},
            "seed": seed,
            "sampling": self.sampling,
            "generation": self.generation,
            "generation_config": self.settings or None,
            "end_tokens": self.ends,
            "template": template,
            "chat_template": chat and short_hash(chat.encode()),
            "max_prompt_length": max_prompt_length,
            "escape_control_tokens": escape_control_tokens or None,  # as in files of before there was a choice
        }

    @property
    def judges(self) -> dict[str, Reward]:
        """The rewards that there are: nothing is scored by the others."""
        return {name: reward for name, reward in self.rewards.items() if reward is not None}

    def check_lengths(self, prompts: Sequence[PromptText], positions: int | None) -> None:
        """Raises `ValueError` for a prompt that can't be read, or that fills all positions of the base model."""
        for number, ids in enumerate(prompt_ids(self.tokenizer, prompts, *self.reading)):
            if positions is not None and len(ids) >= positions:
                raise ValueError(
                    f"row {number} of `prompts` has {len(ids)} tokens, but the base model has {positions} positions. "
                    "Leave it out, or set `max_prompt_length`, which keeps the end of a prompt."
                )

    def rows(self, pairs: Sequence[tuple[Run, PromptText]], base: PreTrainedModel) -> list[dict[str, Any]]:
        """The rows of runs and prompts, decoded together: of one run, or of several that share batches."""
        runs, prompts = [run for run, _ in pairs], [prompt for _, prompt in pairs]
        αs = [run.vector(self.objectives) for run in runs]
        inputs = encode_prompts(self.tokenizer, prompts, *self.reading).to(base.device)
        model, arguments = self._model(runs, prompts, αs, inputs, base)
        seeds = [row_seed(self.seed, prompt) for prompt in prompts]
        chosen = ChosenLogProbs()
        tokens, seconds = self._generate(model, arguments, inputs, seeds, chosen)
        lengths = [text_length(row, self.ends) for row in tokens]
        guided = [row[:length].sum().item() for row, length in zip(chosen.of(tokens), lengths, strict=True)]
        read = [ids[mask.bool()] for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
        texts = [row[:length] for row, length in zip(tokens, lengths, strict=True)]
        likely = base_log_probs(base, read, texts, own_adapters(model, base))
        responses = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        scores = {n: score(n, reward, prompts, responses, may_fail=True) for n, reward in self.judges.items()}
        judged = [with_failures(scores, i) for i in range(len(prompts))]
        weights = [run.weights(self.objectives) for run in runs]
        return [
            {
                "method": run.method,
                "preference": None if (own := weights[i]) is None else list(own),
                "label": "-" if (α := αs[i]) is None else name_preference(α, self.objectives, run.allow_off_simplex),
                "prompt": prompt,
                "response": responses[i],
                **judged[i][0],
                "tokens": lengths[i],
                "seconds": seconds / len(prompts),
                "seed": seeds[i],
                "extra_parameters": run.extra_parameters,
                "extra_bytes": run.extra_bytes,
                "capped": not ends_within(tokens[i], self.ends),
                "log_prob_base": likely[i],
                "log_ratio": guided[i] - likely[i],
                **judged[i][1],
            }
            for i, (run, prompt) in enumerate(pairs)
        ]

    def _model(
        self, runs: list[Run], prompts: list[PromptText], αs: list[Any], inputs: BatchEncoding, base: PreTrainedModel
    ) -> tuple[Any, dict[str, Any]]:
        """The model that decodes a batch, and further arguments of its `generate`."""
        run, several = runs[0], any(run is not runs[0] for run in runs)
        names = [{} if α is None else dict(zip(self.objectives, α.tolist(), strict=True)) for α in αs]
        α, named = (torch.stack(αs), names) if several else (αs[0], names[0])
        batch = Batch(α, prompts, inputs, named, self.reading[2], run.allow_off_simplex)
        found = base if run.model is None else run.model(batch)
        return found if isinstance(found, tuple) else (found, {})

    def _generate(
        self, model: Any, arguments: Mapping[str, Any], inputs: BatchEncoding, seeds: list[int], chosen: ChosenLogProbs
    ) -> tuple[torch.Tensor, float]:
        """The new tokens, of shape `(rows, new)`, and the seconds that they took. All methods generate greedily, and
        where texts are sampled, that is the noise of each prompt."""
        # log π of every method, so that a repetition penalty and its like act on all of them alike.
        model = model if isinstance(model, Guided) else Guided(model, BASE)
        own = dict.fromkeys(acting_settings(cast(Any, model.generation_config)) or {})  # the base's act instead
        length = cast(torch.Tensor, inputs["input_ids"]).shape[1]
        noise = [] if self.sampling is None else [RowSampling(seeds, length, **self.sampling)]
        if self._reads_over_padding(model, arguments):
            inputs = with_common_start(inputs)
        start = _now(model.device)
        output = cast(Any, model).generate(
            **inputs,
            **arguments,
            logits_processor=[chosen, *noise],
            pad_token_id=self.tokenizer.pad_token_id,
            end_tokens=[self.ends] if isinstance(self.ends, int) else self.ends,
            **{**own, **self.settings, **GREEDY, "eos_token_id": self.ends, **self.generation},
        )
        return output[:, length:], _now(model.device) - start

    def _reads_over_padding(self, model: Guided, arguments: Mapping[str, Any]) -> bool:
        """Whether padding may stand within the prompts, so that what they all begin with is read once."""
        others = {"cache_implementation", "use_cache", "prefill_chunk_size"} & set(self.generation)
        if others or not set(arguments) <= {"guide_input_ids", "guide_attention_mask"}:
            return False
        scorers = set(model.formula.scorers()) - {BASE, *model.terms}
        if not all(isinstance(scorer, TopKReward) and scorer.reads_text_alone for scorer in scorers):
            return False
        for backbone in (model.backbone, *(term.backbone for term in model.terms)):
            if backbone not in self._over_padding:
                self._over_padding[backbone] = sees_over_padding(backbone, Adapters(backbone))
        return all(self._over_padding[term.backbone] for term in model.terms) and self._over_padding[model.backbone]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
