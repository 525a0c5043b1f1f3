# SPDX-License-Identifier: Apache-2.0
"""Evaluation of an autoregressive reward model at fixed preferences."""

from __future__ import annotations

from typing import Any, cast

import torch
from accelerate.utils import is_peft_model
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import EvalLoopOutput

from peft_pblora import set_preference

from .arm_loss import ARMLoss
from .compat import BaseTrainer
from .config import PreferenceARMConfig
from .data import JointPreferenceDataset
from .losses import accuracies
from .metrics import EvalMetrics
from .responses import Responses
from .sources import join_evaluation


class PreferenceEvaluation(BaseTrainer):
    """The half of [`PreferenceARMTrainer`] that evaluates: every objective at every evaluation preference."""

    args: PreferenceARMConfig
    objectives: list[str]
    adapter: str | None
    preference_conditioned: bool
    eval_preferences: dict[str, torch.Tensor]
    arm_loss: ARMLoss
    responses: Responses
    _shares_prompts = False

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Evaluates one batch at every preference of `eval_preferences`."""
        inputs = self._prepare_inputs(inputs)
        labels = inputs["pair_labels"]
        found = []
        with torch.no_grad(), self.compute_loss_context_manager():
            untrained = self._untrained_margins(model, inputs)
            known = self._gather_pairs(labels) != 0
            for name, preference in self.eval_preferences.items():
                first, second = self._log_probs(model, inputs, preference)
                margins = first - second
                values = {
                    "loss": self.arm_loss.of_pairs(margins, labels),
                    "accuracy": accuracies(margins, labels),
                    "margin": margins[:, None] * labels,
                }
                if untrained is not None:
                    values["ratio_accuracy"] = accuracies(margins - untrained, labels)
                self._eval_metrics.add(name, known, {kind: self._gather_pairs(v) for kind, v in values.items()})
                found.append(margins)
        margins, sets = torch.stack(found, -1), self._pairs_of_a_row
        return margins.new_zeros(()), margins.unflatten(0, (-1, sets)), labels.unflatten(0, (-1, sets))

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """As `transformers.Trainer.evaluate`; a data set given here is tokenized like that of the trainer."""
        if eval_dataset is not None and not isinstance(eval_dataset, str | JointPreferenceDataset):
            tokenizer = cast(PreTrainedTokenizerBase, self.processing_class)
            eval_dataset = join_evaluation(eval_dataset, self.objectives, tokenizer, self.args)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def evaluation_loop(self, dataloader, *args, metric_key_prefix: str = "eval", **kwargs) -> EvalLoopOutput:
        """Adds the metrics of every objective at every evaluation preference to the loop's own.

        The loss aggregates the l_i as in training, each over all pairs of its objective, without the global term, and
        is the mean over the evaluation preferences: it does not depend on how the pairs fall into batches.
        """
        self._eval_metrics = EvalMetrics(self.objectives, self.eval_preferences)
        self._pairs_of_a_row = len(dataloader.dataset.datasets)
        output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        assert output.metrics is not None
        one = torch.ones(1, len(self.objectives) + 1)
        losses = [
            self.arm_loss.aggregate(self._eval_metrics.losses_at(name)[None], one[:, :-1], preference, one[0])
            for name, preference in self.eval_preferences.items()
        ]
        means = {**self._eval_metrics.means(), "loss": torch.stack(losses).mean().item()}
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output

    def _get_eval_sampler(self, eval_dataset: Any) -> torch.utils.data.Sampler | None:
        """In the order of the data, also where training groups rows by length."""
        return torch.utils.data.SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None

    def _log_probs(self, model, inputs, preference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.args.share_prompt and not self._shares_prompts:
            self._set_preference(model, preference.mean(0) if preference.ndim == 2 else preference)
            self.responses.check_shared_prompts(model, inputs)
            self._shares_prompts = True
        # Set before the forward and left until the next: gradient checkpointing runs the forward again in backward
        # and must see the same preference.
        rows = self.responses.rows_per_pair
        self._set_preference(model, preference.repeat(rows, 1) if preference.ndim == 2 else preference)
        return self.responses.log_probs(model, inputs)

    def _set_preference(self, model, preference: torch.Tensor) -> None:
        if self.preference_conditioned:
            set_preference(model, preference, self.adapter)

    def _untrained_margins(self, model, inputs) -> torch.Tensor | None:
        model = self.accelerator.unwrap_model(model)
        if not is_peft_model(model):
            return None
        with model.disable_adapter():
            first, second = self.responses.log_probs(model, inputs)
        return first - second

    def _gather_pairs(self, values: torch.Tensor) -> torch.Tensor:
        """Gathers `(pairs, k)` values of all ranks without the rows that fill up the last batch."""
        rows = values.unflatten(0, (-1, self._pairs_of_a_row))
        return self.accelerator.gather_for_metrics(rows).flatten(0, 1)
