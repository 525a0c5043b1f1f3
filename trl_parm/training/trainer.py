# SPDX-License-Identifier: Apache-2.0
"""`PreferenceARMTrainer`: trains one autoregressive reward model for all preferences."""

from __future__ import annotations

import textwrap
from collections import defaultdict
from collections.abc import Callable
from typing import Any, cast

import torch
from accelerate.utils import is_peft_model, set_seed
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from peft_pblora import set_preference
from peft_pblora.control import has_preference

from .compat import BaseTrainer, get_config_model_id
from .config import PreferenceARMConfig
from .data import PreferenceCollator
from .log_probs import response_log_probs
from .losses import accuracies, objective_losses, pair_losses
from .preferences import step_preference
from .setup import (
    PairDatasets,
    adapt_model,
    check_datasets,
    join_datasets,
    load_model,
    load_tokenizer,
    match_objectives,
    name_preferences,
)


class PreferenceARMTrainer(BaseTrainer):
    """Trains an autoregressive reward model (ARM) on one preference data set for each objective.

    Every step draws a preference α ~ Dirichlet, sets it in the model's adapter and minimises Σ_i α_i l_i(θ(α), D_i)
    (PARM, arXiv 2505.06274). With one objective and a plain LoRA it is GenARM's trainer (arXiv 2410.08193).

    Args:
        model (`str`, `PreTrainedModel` or `PeftModel`): The ARM's backbone, or a ready adapter on it.
        args ([`PreferenceARMConfig`], *optional*): Training arguments.
        data_collator (`Callable`, *optional*): Defaults to [`PreferenceCollator`].
        train_dataset (`Mapping[str, Dataset]`):
            Objective name → preference data set with `prompt`, `chosen`, `rejected`. A batch of size B holds B pairs
            of every objective; an epoch visits every pair of the longest data set once, shorter ones start over.
        eval_dataset (`Mapping[str, Dataset]`, *optional*): The same for evaluation.
        processing_class (`PreTrainedTokenizerBase`, *optional*): Tokenizer; loaded by the model's id if not given.
        compute_metrics (`Callable`, *optional*): As in `transformers.Trainer`.
        callbacks (`list[TrainerCallback]`, *optional*): As in `transformers.Trainer`.
        optimizers (`tuple`, *optional*): As in `transformers.Trainer`.
        quantization_config (*optional*): For a model given by id.
        peft_config (`PeftConfig`, *optional*): Such as [`peft_pblora.PBLoraConfig`]; wraps `model`.

    Raises:
        ValueError: no data, objective names that differ between data, adapter and `beta`, or more than one objective
            with an adapter that is not preference-conditioned.
    """

    loss_is_scaled_for_ga = False
    _tag_names = ["trl", "parm"]
    _name = "PARM"
    _paper = {
        "title": "PARM: Multi-Objective Test-Time Alignment via Preference-Aware Autoregressive Reward Model",
        "id": "2505.06274",
        "citation": textwrap.dedent("""\
            @inproceedings{lin2025parm,
                title     = {{PARM: Multi-Objective Test-Time Alignment via Preference-Aware
                             Autoregressive Reward Model}},
                author    = {Baijiong Lin and Weisen Jiang and Yuancheng Xu and Hao Chen and Ying-Cong Chen},
                booktitle = {International Conference on Machine Learning},
                year      = 2025,
            }"""),
    }

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: PreferenceARMConfig | None = None,
        data_collator: Callable | None = None,
        train_dataset: PairDatasets | None = None,
        eval_dataset: PairDatasets | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = PreferenceARMConfig(f"{name.split('/')[-1]}-PARM")
        train_dataset = check_datasets(train_dataset, eval_dataset)
        # PEFT draws the adapter's weights, so the seed comes before the model.
        set_seed(args.seed)
        model = load_model(model, args, quantization_config)
        tokenizer = load_tokenizer(model, processing_class, args)
        model = adapt_model(model, args, peft_config)
        self.objectives = match_objectives(model, train_dataset)
        self.preference_conditioned = has_preference(model)
        self.beta = torch.tensor(args.betas(self.objectives))
        self.eval_preferences = name_preferences(args.eval_preferences, self.objectives)
        self._metrics: dict[str, dict[str, list[float]]] = {"train": defaultdict(list), "eval": defaultdict(list)}
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator
            or PreferenceCollator(cast(int, tokenizer.pad_token_id), self.objectives, args.pad_to_multiple_of),
            train_dataset=join_datasets(train_dataset, tokenizer, args),
            eval_dataset=join_datasets(eval_dataset, tokenizer, args, once=True),
            processing_class=tokenizer,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        model.add_model_tags(self._tag_names)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss Σ_i α_i l_i of one batch, at the preference that this step draws."""
        preference = step_preference(self.args.seed, self.state.global_step, self.objectives, self.args.concentration)
        margins, losses = self._pair_margins_and_losses(model, inputs, preference)
        labels = inputs["pair_labels"]
        by_objective = objective_losses(losses, labels)
        loss = (preference.to(by_objective) * by_objective).sum()
        self._record_train_metrics(preference, by_objective.detach(), margins.detach(), labels)
        return (loss, {"margins": margins}) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Evaluates one batch at every preference of `eval_preferences`."""
        inputs = self._prepare_inputs(inputs)
        losses = []
        with torch.no_grad(), self.compute_loss_context_manager():
            untrained = self._untrained_margins(model, inputs)
            for name, preference in self.eval_preferences.items():
                margins, pairwise = self._pair_margins_and_losses(model, inputs, preference)
                losses.append((preference.to(pairwise) * objective_losses(pairwise, inputs["pair_labels"])).sum())
                self._record_eval_metrics(name, pairwise, margins, untrained, inputs["pair_labels"])
        return torch.stack(losses).mean(), None, None

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs) -> EvalLoopOutput:
        """Adds the metrics of every objective at every evaluation preference to the loop's own.

        The loss is Σ_i α_i l_i, each l_i over all pairs of its objective, averaged over the evaluation preferences:
        it does not depend on how the pairs fall into batches.
        """
        self._metrics["eval"].clear()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        assert output.metrics is not None
        means = {name: sum(values) / len(values) for name, values in self._metrics["eval"].items()}
        losses = [
            sum(w * means[f"{o}_loss@{name}"] for o, w in zip(self.objectives, weights.tolist(), strict=True))
            for name, weights in self.eval_preferences.items()
        ]
        means["loss"] = sum(losses) / len(losses)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the training metrics since the last log."""
        if "loss" in logs:
            logs.update({name: sum(values) / len(values) for name, values in self._metrics["train"].items()})
            self._metrics["train"].clear()
        super().log(logs, start_time)

    def _pair_margins_and_losses(self, model, inputs, preference):
        # Set before the forward and left until the next step: gradient checkpointing runs the forward again in
        # backward and must see the same preference.
        if self.preference_conditioned:
            set_preference(model, preference)
        margins = _margins(model, inputs)
        return margins, pair_losses(margins, inputs["pair_labels"], self.beta.to(margins))

    def _untrained_margins(self, model, inputs) -> torch.Tensor | None:
        model = self.accelerator.unwrap_model(model)
        if not is_peft_model(model):
            return None
        with model.disable_adapter():
            return _margins(model, inputs)

    def _record_train_metrics(self, preference, losses, margins, labels) -> None:
        metrics = self._metrics["train"]
        correct = accuracies(margins, labels)
        for i, name in enumerate(self.objectives):
            metrics[f"alpha/{name}"].append(preference[i].item())
            metrics[f"loss/{name}"].append(losses[i].item())
            metrics[f"rewards/accuracies/{name}"].append(correct[:, i].nanmean().item())
            signed = (margins * labels[:, i])[labels[:, i] != 0]
            metrics[f"rewards/margins/{name}"].append(self.beta[i].item() * signed.mean().item())

    def _record_eval_metrics(self, preference_name, losses, margins, untrained, labels) -> None:
        found = {"loss": losses, "accuracy": accuracies(margins, labels), "margin": margins[:, None] * labels}
        if untrained is not None:
            found["ratio_accuracy"] = accuracies(margins - untrained, labels)
        known = self._gather_pairs(labels) != 0
        for kind, values in found.items():
            values = self._gather_pairs(values)
            for i, objective in enumerate(self.objectives):
                self._metrics["eval"][f"{objective}_{kind}@{preference_name}"] += values[:, i][known[:, i]].tolist()

    def _gather_pairs(self, values: torch.Tensor) -> torch.Tensor:
        """Gathers `(pairs, k)` values of all ranks without the rows that fill up the last batch."""
        k = len(self.objectives)
        return self.accelerator.gather_for_metrics(values.reshape(-1, k, k)).reshape(-1, k)

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = list(self.objectives)


def _margins(model, inputs) -> torch.Tensor:
    """log π(y1|x) − log π(y2|x) of each pair."""
    first, second = response_log_probs(
        model, inputs["input_ids"], inputs["attention_mask"], inputs["completion_mask"]
    ).chunk(2)
    return first - second
