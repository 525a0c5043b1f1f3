# SPDX-License-Identifier: Apache-2.0
"""`PreferenceARMTrainer`: trains one autoregressive reward model for all preferences."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import set_seed
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer import TRAINING_ARGS_NAME

from peft_pblora.card import save_card
from peft_pblora.control import has_preference

from .arm_loss import ARMLoss, count_labels
from .card import adapter_config, first_facts, hand_over, rewrite, subfolder_of
from .collator import PreferenceCollator
from .compat import (
    disable_dropout_in_model,
    get_act_offloading_ctx_manager,
    get_config_model_id,
)
from .config import PreferenceARMConfig
from .data import JointPreferenceDataset, JointPreferenceStream, SimilarLengths
from .evaluation import PreferenceEvaluation
from .metrics import TrainMetrics
from .preferences import PreferenceSampler
from .responses import Responses
from .setup import adapt_model, check_device, last_complete_checkpoint, load_model, load_tokenizer, name_preferences
from .sources import PairSources, join_evaluation, join_sources, match_objectives, name_sources


class PreferenceARMTrainer(PreferenceEvaluation):
    """Trains an autoregressive reward model (ARM) on preference pairs for each objective.

    Every step draws a preference α ~ Dirichlet, sets it in the model's adapter and minimises Σ_i α_i l_i(θ(α), D_i)
    (PARM, arXiv 2505.06274). With one objective and a plain LoRA it is GenARM's trainer (arXiv 2410.08193).

    The data is a mapping from objective to a data set with `prompt`, `chosen` and `rejected`; or one data set with
    `prompt`, `response_0`, `response_1` and a column of labels for each objective; or a mapping that mixes both.
    Texts, conversations and token ids are taken, see [`tokenization.PairReader`]. A batch of size B holds B pairs of
    every data set; an epoch visits every pair of the longest one once, shorter ones start over.

    Args:
        model (`str`, `PreTrainedModel` or `PeftModel`): The ARM's backbone, or a ready adapter on it.
        args ([`PreferenceARMConfig`], *optional*): Training arguments.
        data_collator (`Callable`, *optional*): Defaults to [`PreferenceCollator`].
        train_dataset (`Mapping[str, Dataset]`, `Dataset`, `IterableDataset` or `str`):
            The pairs, as said above. A string is a JSON, CSV or Parquet file, or an id on the Hub, of which the split
            `train` is taken.
        eval_dataset (*optional*):
            The same for evaluation, of a string the split `test`; or a mapping from a name to such mappings, for
            several evaluations, with one objective also from a name to data sets. A stream is read into memory.
        processing_class (`PreTrainedTokenizerBase`, *optional*): Tokenizer; loaded by the model's id if not given.
        compute_metrics (`Callable`, *optional*):
            As in `transformers.Trainer`; predictions are log π(y1|x) − log π(y2|x), of shape
            `(rows, data sets, evaluation preferences)`, and labels of shape `(rows, data sets, k)`.
        callbacks (`list[TrainerCallback]`, *optional*): As in `transformers.Trainer`.
        optimizers (`tuple`, *optional*): As in `transformers.Trainer`.
        quantization_config (*optional*): For a model given by id.
        peft_config (`PeftConfig`, *optional*): Such as [`peft_pblora.PBLoraConfig`]; wraps `model`.

    Raises:
        ValueError: no data, objective names that differ between data, adapter and `beta`, or more than one objective
            with an adapter that is not preference-conditioned.
    """

    loss_is_scaled_for_ga = True
    _tag_names = ["trl", "parm"]
    _name = "PARM"

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: PreferenceARMConfig | None = None,
        data_collator: Callable | None = None,
        train_dataset: PairSources | None = None,
        eval_dataset: Any = None,
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
        check_device(args)
        sources = name_sources("train_dataset", train_dataset, "train")
        # PEFT draws the adapter's weights, so the seed comes before the model.
        set_seed(args.seed)
        model = load_model(model, args, quantization_config)
        tokenizer = load_tokenizer(model, processing_class, args)
        model = adapt_model(model, args, peft_config)
        if args.disable_dropout:
            disable_dropout_in_model(model)
        self.objectives = match_objectives(model, sources, cast(dict, args.label_columns))
        self.preference_conditioned = has_preference(model)
        self.arm_loss = ARMLoss(args, self.objectives)
        self.eval_preferences = name_preferences(args.eval_preferences, self.objectives)
        choices = name_preferences(args.train_preferences, self.objectives) if args.train_preferences else {}
        self.preference_sampler = PreferenceSampler(
            args.seed, self.objectives, args.concentration, list(choices.values())
        )
        self.responses = Responses(model, args)
        self.train_metrics = TrainMetrics()
        joined = join_sources("train_dataset", sources, self.objectives, tokenizer, args)
        if isinstance(joined, JointPreferenceStream):
            cast(Any, args.accelerator_config).dispatch_batches = False
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator
            or PreferenceCollator(cast(int, tokenizer.pad_token_id), args.pad_to_multiple_of, args.share_prompt),
            train_dataset=joined,
            eval_dataset=join_evaluation(eval_dataset, self.objectives, tokenizer, args),
            processing_class=tokenizer,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self._distances_ahead: torch.Tensor | None = None
        self._offloading: Any = nullcontext()
        self._saves_checkpoint = False
        if args.activation_offloading:
            self._offloading = get_act_offloading_ctx_manager(model)
        model.add_model_tags(self._tag_names)
        self.own_card: dict[str, Any] = dict(getattr(adapter_config(self), "card", None) or {})
        self.card = first_facts(self, train_dataset, sources)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """As `transformers.Trainer.train`; `True` resumes from the last checkpoint that was written to its end."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(cast(str, self.args.output_dir))
        return super().train(resume_from_checkpoint, **kwargs)

    def get_batch_samples(self, *args, **kwargs):
        """As transformers', but a run that was complete when it was resumed takes no further step."""
        if self.state.global_step >= self.state.max_steps:
            return [], None
        return super().get_batch_samples(*args, **kwargs)

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        with self._offloading:
            return super().training_step(*args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The part of a step's loss Σ_i α_i l_i that one batch adds, at the preference that the step draws."""
        step, labels = self.state.global_step, inputs["pair_labels"]
        if self.args.preference_per == "pair":
            preference = self.preference_sampler.for_pairs(step, inputs["pair_ids"])
        else:
            preference = self.preference_sampler.for_step(step)
        whole = None if num_items_in_batch is None else self._distances_of_step
        counts = count_labels(labels) if num_items_in_batch is None else cast(torch.Tensor, num_items_in_batch)
        first, second = self._log_probs(model, inputs, preference)
        margins = first - second
        loss, losses = self.arm_loss(margins, labels, preference, counts, whole)
        if not torch.isfinite(loss):
            raise ValueError(
                f"The loss is {loss.item()} at step {step}; log-probabilities of the responses: {first.tolist()} and "
                f"{second.tolist()}. Lower the learning rate, or use bf16 instead of fp16."
            )
        self.train_metrics.add_pairs(
            self.objectives, preference.to(first), first, second, losses, labels, self.arm_loss.beta.to(first)
        )
        return (loss, {"margins": margins}) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the training metrics since the last log."""
        if "loss" in logs:
            logs.update(self.train_metrics.pop_means(self.accelerator))
        super().log(logs, start_time)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Writes the card of the reward model to the output folder, see [`peft_pblora.card.render`].

        Args:
            model_name (`str`, *optional*): The card's title.
            dataset_name (`str`, *optional*): Of the training data, as on the Hub.
            tags (`str` or `list[str]`, *optional*): Further tags.
        """
        if not self.is_world_process_zero():
            return
        given = [tags] if isinstance(tags, str) else list(tags or [])
        self.card["tags"] = sorted({*self.card.get("tags", ()), *given})
        if model_name:
            self.card["title"] = model_name
        if dataset_name:
            self.card["datasets"] = [dataset_name]
        rewrite(self, cast(str, self.args.output_dir))

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """As transformers', with our card. The arguments stand in it as YAML, so that no pickle need hold them."""
        folder = Path(cast(str, output_dir or self.args.output_dir))
        facts = hand_over(self, sample=not self._saves_checkpoint)
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
            save_card(folder, adapter_config(self), facts, subfolder_of(self))

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._saves_checkpoint = True
        try:
            super()._save_checkpoint(*args, **kwargs)
        finally:
            self._saves_checkpoint = False

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | None:
        """Labelled pairs of each objective, and pairs, of the whole step, divided by the number of processes.

        Each process adds up its pairs by these, and the mean over processes, which DDP takes of gradients, is then the
        loss of one big batch.
        """
        if not batch_samples:
            return None
        counts = torch.stack([count_labels(batch["pair_labels"]) for batch in batch_samples]).sum(0).to(device)
        counts = cast(torch.Tensor, self.accelerator.reduce(counts, "mean"))
        self._distances_ahead = None
        if self.args.aggregation == "tchebycheff" and len(batch_samples) > 1:
            self._distances_ahead = torch.stack([self._distances(batch, counts) for batch in batch_samples]).sum(0)
        return counts

    def _distances(self, batch: dict, counts: torch.Tensor) -> torch.Tensor:
        """What a batch adds to l_i − z*_i of the step that begins, without gradients."""
        inputs = self._prepare_inputs(batch)
        with torch.no_grad(), self.compute_loss_context_manager():
            preference = self.preference_sampler.for_step(self.state.global_step)
            first, second = self._log_probs(self.model_wrapped, inputs, preference)
            losses = self.arm_loss.of_pairs(first - second, inputs["pair_labels"])
            return self.arm_loss.distances(losses, inputs["pair_labels"], counts)

    def _distances_of_step(self, distances: torch.Tensor) -> torch.Tensor:
        """l_i − z*_i of the whole optimisation step, from what one of its batches adds."""
        ahead = distances if self._distances_ahead is None else self._distances_ahead
        return cast(torch.Tensor, self.accelerator.reduce(ahead, "mean"))

    def _get_train_sampler(self, train_dataset=None) -> torch.utils.data.Sampler | None:
        data = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length" or not isinstance(data, JointPreferenceDataset):
            return super()._get_train_sampler(train_dataset)
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return SimilarLengths(data.lengths(), batch, seed, lambda: int(self.state.epoch or 0))

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = ["pairs"]
