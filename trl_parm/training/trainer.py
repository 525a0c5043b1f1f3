# SPDX-License-Identifier: Apache-2.0
"""`PreferenceARMTrainer`: trains one autoregressive reward model for all preferences."""

from __future__ import annotations

import textwrap
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from accelerate import PartialState
from accelerate.utils import is_peft_model, set_seed
from datasets import Dataset
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from peft_pblora import as_preference, name_preference, set_preference
from peft_pblora.control import get_objectives, has_preference

from .compat import BaseTrainer, create_model_from_path, get_config_model_id
from .config import PreferenceARMConfig
from .data import JointPreferenceDataset, PreferenceCollator, tokenize_pairs
from .log_probs import response_log_probs
from .losses import accuracies, objective_losses, pair_losses
from .preferences import step_preference


PairDatasets = Mapping[str, Dataset]


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
        train_dataset = _check_datasets(train_dataset, eval_dataset)
        # PEFT draws the adapter's weights, so the seed comes before the model.
        set_seed(args.seed)
        model = _load_model(model, args, quantization_config)
        tokenizer = _load_tokenizer(model, processing_class, args)
        model = _adapt_model(model, args, peft_config)
        self.objectives = _match_objectives(model, train_dataset)
        self.preference_conditioned = has_preference(model)
        self.beta = torch.tensor(args.betas(self.objectives))
        self.eval_preferences = _eval_preferences(args.eval_preferences, self.objectives)
        self._metrics: dict[str, dict[str, list[float]]] = {"train": defaultdict(list), "eval": defaultdict(list)}
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator
            or PreferenceCollator(cast(int, tokenizer.pad_token_id), self.objectives, args.pad_to_multiple_of),
            train_dataset=_join(train_dataset, tokenizer, args),
            eval_dataset=_join(eval_dataset, tokenizer, args, once=True),
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


def _check_datasets(train: PairDatasets | None, evaluation: PairDatasets | None) -> PairDatasets:
    if train is None:
        raise ValueError("`train_dataset` is required: a mapping from objective name to preference data set.")
    for name, data in (("train_dataset", train), ("eval_dataset", evaluation)):
        if data is not None and not isinstance(data, Mapping):
            raise TypeError(
                f"`{name}` is a {type(data).__name__}. Give a mapping such as {{'helpful': dataset, ...}} with one "
                "preference data set for each objective."
            )
    if evaluation is not None and set(evaluation) != set(train):
        raise ValueError(
            f"`eval_dataset` has the objectives {sorted(evaluation)}, but `train_dataset` has {sorted(train)}."
        )
    return train


def _load_model(model, args: PreferenceARMConfig, quantization_config):
    if not isinstance(model, str):
        if quantization_config is not None:
            raise ValueError("`quantization_config` needs a model id; this model is loaded already.")
        return model
    kwargs: dict[str, Any] = dict(cast(dict, args.model_init_kwargs or {}))
    if quantization_config is not None:
        kwargs["quantization_config"] = quantization_config
    if cast(PartialState, args.distributed_state).distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        kwargs["device_map"] = None
    kwargs.setdefault("trust_remote_code", args.trust_remote_code)
    return create_model_from_path(model, **kwargs)


def _load_tokenizer(model, tokenizer, args: PreferenceARMConfig) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(
            get_config_model_id(model.config), trust_remote_code=args.trust_remote_code
        )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError("The tokenizer has neither a pad token nor an end token. Set `tokenizer.pad_token`.")
        tokenizer.pad_token = tokenizer.eos_token
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return tokenizer


def _adapt_model(model, args: PreferenceARMConfig, peft_config: PeftConfig | None):
    if peft_config is not None:
        if is_peft_model(model):
            raise ValueError("`model` is a PeftModel already, so `peft_config` can't be used. Leave one of them out.")
        model = get_peft_model(model, peft_config)
    if is_peft_model(model) and args.gradient_checkpointing:
        model.enable_input_require_grads()
    return model


def _match_objectives(model, datasets: PairDatasets) -> list[str]:
    if has_preference(model):
        objectives = get_objectives(model)
        if set(objectives) != set(datasets):
            raise ValueError(
                f"`train_dataset` has the objectives {sorted(datasets)}, but the adapter was made for {objectives}. "
                "Give `PBLoraConfig(objectives=...)` the names of the data sets."
            )
        return objectives
    if len(datasets) > 1:
        raise ValueError(
            f"The model has no preference-conditioned adapter, but there are {len(datasets)} objectives "
            f"({', '.join(datasets)}). Pass `peft_config=PBLoraConfig(objectives=[...])`, or train on one objective."
        )
    return list(datasets)


def _eval_preferences(given: list | None, objectives: list[str]) -> dict[str, torch.Tensor]:
    if given is None:
        given = torch.eye(len(objectives)).tolist()
        if len(objectives) > 1:
            given.append([1 / len(objectives)] * len(objectives))
    return {name_preference(p, objectives): as_preference(p, objectives) for p in given}


def _join(
    datasets: PairDatasets | None, tokenizer, args: PreferenceARMConfig, once: bool = False
) -> JointPreferenceDataset | None:
    if datasets is None:
        return None
    with args.main_process_first(desc="tokenizing"):
        return JointPreferenceDataset(
            {name: tokenize_pairs(data, name, tokenizer, args.max_length) for name, data in datasets.items()},
            once,
        )
