# SPDX-License-Identifier: Apache-2.0
"""`PreferenceARMTrainer`: trains one autoregressive reward model for all preferences."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import broadcast_object_list, is_peft_model, set_seed
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import EvalLoopOutput
from trl.models.activation_offloading import get_act_offloading_ctx_manager
from trl.trainer.base_trainer import _BaseTrainer
from trl.trainer.utils import get_config_model_id

from peft_pblora import PreferenceConfig, set_preference
from peft_pblora.card import save_card

from . import checkpoints
from .card import facts_with, first_facts, new_sample, rewrite, subfolder_of
from .config import PreferenceARMConfig
from .data import (
    JointPreferenceDataset,
    JointPreferenceStream,
    PairSources,
    PreferenceCollator,
    SimilarLengths,
    join_evaluation,
    join_sources,
    name_sources,
    only_objective,
)
from .log_probs import Responses
from .losses import accuracies, count_labels
from .metrics import EvalMetrics, TrainMetrics
from .model import (
    adapt_model,
    check_device,
    disable_dropout,
    load_model,
    load_tokenizer,
    trained_adapter,
    without_noise,
)
from .preferences import PreferenceSampler, name_preferences


class PreferenceARMTrainer(_BaseTrainer):
    """Trains an autoregressive reward model (ARM) on preference pairs for each objective.

    Every step draws a preference α ~ Dirichlet, sets it in the model's adapter and minimises Σ_i α_i l_i(θ(α), D_i)
    (PARM, arXiv 2505.06274). With one objective and a plain LoRA it is GenARM's trainer (arXiv 2410.08193).

    The data is a mapping from objective to a data set with `prompt`, `chosen` and `rejected`; or one data set with
    `prompt`, `response_0`, `response_1` and a column of labels for each objective; or a mapping that mixes both.
    Texts, conversations and token ids are taken, see [`tokenization.PairReader`]. A batch of size B holds B pairs of
    every data set; an epoch visits every pair of the longest one once, shorter ones start over.

    Args:
        model (`str`, `PreTrainedModel` or `PeftModel`):
            The ARM's backbone, or a ready adapter on it; of several the active one is trained.
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
        ValueError: no data, objective names that differ between data, adapter and `beta`, more than one objective with
            an adapter that is not preference-conditioned, or nothing that trains.
    """

    args: PreferenceARMConfig
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
            disable_dropout(model)
        self.adapter = trained_adapter(model)
        adapter = model.peft_config[self.adapter] if self.adapter else None
        self.adapter_config = adapter if is_peft_model(model) else None
        self.preference_conditioned = isinstance(adapter, PreferenceConfig)
        if isinstance(adapter, PreferenceConfig):
            self.objectives = list(adapter.objectives)
        else:
            self.objectives = only_objective(sources, cast(dict, args.label_columns))
        self.arm_loss = args.arm_loss(self.objectives)
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
        pad_token_id = cast(int, tokenizer.pad_token_id)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator
            or PreferenceCollator(pad_token_id, args.pad_to_multiple_of, args.share_prompt),
            train_dataset=joined,
            eval_dataset=join_evaluation(eval_dataset, self.objectives, tokenizer, args),
            processing_class=tokenizer,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self._signature_columns = ["pairs"]
        self._distances_ahead: torch.Tensor | None = None
        self._saves_checkpoint = self._claimed = self._noise_checked = self._rows_checked = False
        self._offloading = get_act_offloading_ctx_manager(model) if args.activation_offloading else nullcontext()
        model.add_model_tags(self._tag_names)
        # What the adapter's own card says goes before what a run knows, apart from the former sample.
        self.own_card: dict[str, Any] = dict(getattr(self.adapter_config, "card", None) or {})
        self.own_card.pop("sample", None)
        self.card = first_facts(self, train_dataset, sources)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """As `transformers.Trainer.train`; `True` resumes from the last checkpoint that was written to its end.

        Raises:
            ValueError: as [`claim_output`] does.
        """
        with self.claim_output(resume_from_checkpoint) as checkpoint:
            return super().train(checkpoint, **kwargs)

    @contextmanager
    def claim_output(self, resume_from_checkpoint: str | bool | None = None) -> Iterator[str | None]:
        """Keeps other processes from training into the output folder for the time of a `with` block.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*): As for `train`.

        Yields:
            `str`, the checkpoint's folder, or `None`.

        Raises:
            ValueError: another process trains into the folder, there is no complete checkpoint, or it is of another
                run: with another base model, other data, objectives or their order, β, learning rate, seed, ...
        """
        folder, checkpoint, error = cast(str, self.args.output_dir), resume_from_checkpoint or None, None
        with ExitStack() as stack:
            if self.is_world_process_zero():
                try:
                    if not self._claimed:
                        stack.enter_context(checkpoints.locked(folder))
                    if checkpoint is True:
                        checkpoint = checkpoints.last_complete_checkpoint(folder)
                    if checkpoint:
                        checkpoints.check_record(checkpoint, self._describe_run())
                except ValueError as refusal:
                    error = str(refusal)
            checkpoint, error = broadcast_object_list([checkpoint, error])
            if error:
                raise ValueError(error)
            outer, self._claimed = self._claimed, True
            try:
                yield checkpoint
            finally:
                self._claimed = outer

    @cached_property
    def _inputs(self) -> dict[str, Any]:
        return checkpoints.describe_inputs(self.model, self.adapter, cast(Any, self.train_dataset))

    def _describe_run(self) -> dict[str, Any]:
        return {**self._inputs, **checkpoints.describe_settings(self.args, self.objectives)}

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
        if self.args.disable_dropout and model.training and not self._noise_checked:
            first, second = without_noise(lambda: self._log_probs(model, inputs, preference), labels.device)
            self._noise_checked = True
        else:
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

    def _log_probs(self, model, inputs, preference: torch.Tensor | None) -> torch.Tensor:
        """The forward of training and evaluation: log π of both responses of each pair, shape `(2, pairs)`.

        Without a preference it is that of the untrained model, without its adapter.
        """
        if self.args.share_prompt and not self._rows_checked:
            if self.preference_conditioned:
                k = len(self.objectives)
                set_preference(model, torch.full((k,), 1 / k), self.adapter)  # one for any number of rows
            self.responses.check_shared_prompts(model, inputs)
            self._rows_checked = True
        if preference is None:
            model = cast(PeftModel, self.accelerator.unwrap_model(model))
            with model.disable_adapter():
                return self.responses.log_probs(model, inputs)
        if self.preference_conditioned:
            # Left until the next forward: gradient checkpointing runs this one again, and must see the same.
            rows = self.responses.rows_per_pair
            preference = preference.repeat(rows, 1) if preference.ndim == 2 else preference
            set_preference(model, preference, self.adapter)
        return self.responses.log_probs(model, inputs)

    def _margins(self, model, inputs, preference: torch.Tensor | None) -> torch.Tensor:
        first, second = self._log_probs(model, inputs, preference)
        return first - second

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Evaluates one batch at every preference of `eval_preferences`."""
        inputs = self._prepare_inputs(inputs)
        labels = inputs["pair_labels"]
        found = []
        with torch.no_grad(), self.compute_loss_context_manager():
            relative = is_peft_model(self.accelerator.unwrap_model(model))
            untrained = self._margins(model, inputs, None) if relative else None
            known = self._gather_pairs(labels) != 0
            for name, preference in self.eval_preferences.items():
                margins = self._margins(model, inputs, preference)
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
        self._eval_metrics = EvalMetrics(self.objectives)
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

    def _get_eval_sampler(self, eval_dataset: Any) -> None:
        """In the order of the data, also where training groups rows by length."""

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
        facts = facts_with(self, None if self._saves_checkpoint else new_sample(self))
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
            if self._saves_checkpoint:
                checkpoints.write_record(folder, self._describe_run())
            save_card(folder, self.adapter_config, facts, subfolder_of(self))

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
            margins = self._margins(self.model_wrapped, inputs, preference)
            losses = self.arm_loss.of_pairs(margins, inputs["pair_labels"])
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

    def _gather_pairs(self, values: torch.Tensor) -> torch.Tensor:
        """Gathers `(pairs, k)` values of all ranks without the rows that fill up the last batch."""
        rows = values.unflatten(0, (-1, self._pairs_of_a_row))
        return self.accelerator.gather_for_metrics(rows).flatten(0, 1)
