# SPDX-License-Identifier: Apache-2.0
"""`PreferenceARMTrainer`: trains one autoregressive reward model for all preferences."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import broadcast_object_list, is_peft_model, set_seed
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput
from trl.models.activation_offloading import get_act_offloading_ctx_manager
from trl.trainer.utils import get_config_model_id

from peft_pblora import PreferenceConfig, get_preference, set_preference, use_preference
from peft_pblora.card import save_card
from peft_pblora.output import output_files
from peft_pblora.switch import AdapterSwitch, changes_below
from trl_parm.preference_text import PreferenceText

from . import checkpoints
from .card import facts_with, first_facts, new_sample, own_facts, rewrite, subfolder_of
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
    objectives_of,
    only_objective,
    read_in_order,
    with_texts,
)
from .log_probs import Responses
from .losses import count_labels
from .metrics import EvalMetrics, TrainMetrics, check_metric
from .model import (
    adapt_model,
    check_causal,
    check_device,
    check_unconditioned,
    disable_dropout,
    limits_of,
    load_model,
    load_tokenizer,
    trained_adapter,
    without_noise,
)
from .preferences import PreferenceSampler, eval_preferences, read_preferences
from .saving import SavingTrainer


CARD = "README.md"


class PreferenceARMTrainer(SavingTrainer):
    """Trains an autoregressive reward model (ARM) on preference pairs for each objective.

    Every step draws a preference α ~ Dirichlet, sets it in the model's adapter and minimises Σ_i α_i l_i(θ(α), D_i)
    (PARM, arXiv 2505.06274). With one objective and a plain LoRA it is GenARM's trainer (arXiv 2410.08193), and with
    several and `preference_template` α stands in the prompts' text, as a baseline.

    Arguments that are not listed are those of `transformers.Trainer`.

    Args:
        model (`str`, `PreTrainedModel` or `PeftModel`):
            The ARM's backbone, or a ready adapter on it; of several the active one is trained.
        data_collator (`Callable`, *optional*): Defaults to [`PreferenceCollator`].
        train_dataset (`Mapping[str, Dataset]`, `Dataset`, `IterableDataset` or `str`):
            A data set with `chosen` and `rejected` for each objective, or one with a column of labels for each, or a
            mapping that mixes both, see [`tokenization.PairReader`]. A string is a JSON, CSV or Parquet file, or an id
            on the Hub, of which the split `train` is taken. A batch of size B holds B pairs of every data set.
        eval_dataset (*optional*):
            The same for evaluation, of a string the split `test`; or a mapping from a name to such mappings, for
            several evaluations, with one objective also from a name to data sets. A stream is read into memory.
        processing_class (`PreTrainedTokenizerBase`, *optional*): Tokenizer; loaded by the model's id if not given.
        compute_metrics (`Callable`, *optional*):
            Of predictions log π(y1|x) − log π(y2|x), shape `(rows, data sets, evaluation preferences)`, and labels
            of shape `(rows, data sets, k)`.
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
        check_causal(model)
        tokenizer = load_tokenizer(model, processing_class, args)
        model = adapt_model(model, args, peft_config, tokenizer)
        if args.disable_dropout:
            disable_dropout(model)
        self.adapter = trained_adapter(model)
        adapter = model.peft_config[self.adapter] if self.adapter else None
        self.adapter_config = adapter if is_peft_model(model) else None
        self.preference_conditioned = isinstance(adapter, PreferenceConfig)
        self.preference_text = None
        if isinstance(adapter, PreferenceConfig):
            self.objectives = list(adapter.objectives)
        elif args.preference_template is not None:
            self.objectives = objectives_of(sources, cast(dict, args.label_columns))
        else:
            self.objectives = only_objective(sources, cast(dict, args.label_columns))
        if args.preference_template is not None:
            check_unconditioned(adapter)
            self.preference_text = PreferenceText(self.objectives, args.preference_template)
        self.arm_loss = args.arm_loss(self.objectives)
        self.eval_preferences = eval_preferences(args.eval_preferences, self.objectives)
        own = cast(Any, model)
        self._has_untrained = bool(is_peft_model(model)) and not changes_below(own.peft_config[self.adapter], own)
        if args.metric_for_best_model and compute_metrics is None:
            check_metric(args.metric_for_best_model, self.objectives, self.eval_preferences, self._has_untrained)
        fixed = read_preferences("train_preferences", args.train_preferences or [], self.objectives)
        choices = [preference for _, preference in fixed]
        self.preference_sampler = PreferenceSampler(args.seed, self.objectives, args.concentration, choices)
        self.responses = Responses(model, args)
        self.train_metrics = TrainMetrics(self.objectives, self.arm_loss.beta)
        self.limits = limits_of(model)
        if self.preference_text is not None:
            self.limits = self.limits._replace(reserved=self.preference_text.most_tokens(tokenizer))
        joined = join_sources("train_dataset", sources, self.objectives, tokenizer, args, self.limits)
        if isinstance(joined, JointPreferenceStream):
            read_in_order(args)
        pad_token_id = cast(int, tokenizer.pad_token_id)
        collator = PreferenceCollator(pad_token_id, args.pad_to_multiple_of, args.share_prompt)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator or collator,
            train_dataset=joined,
            eval_dataset=join_evaluation(eval_dataset, self.objectives, tokenizer, args, self.limits),
            processing_class=tokenizer,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self._signature_columns = ["pairs"]
        self._distances_ahead: torch.Tensor | None = None
        self._claimed = self._noise_checked = self._rows_checked = False
        self._offloading = get_act_offloading_ctx_manager(model) if args.activation_offloading else nullcontext()
        model.add_model_tags(self._tag_names)
        self.own_card: Any = own_facts(self.adapter_config)  # which goes before what a run knows
        self.card = first_facts(self, train_dataset, sources)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """As `transformers.Trainer.train`; `True` resumes from the last checkpoint that was written to its end.

        The model's preference is afterwards what it was before, as after `evaluate` and `predict`. Raises `ValueError`
        as [`claim_output`] does.
        """
        with self.claim_output(resume_from_checkpoint) as checkpoint, self._preference_kept():
            self.best_loaded = None
            if self.is_world_process_zero():
                self._describe_run()  # before DeepSpeed casts the weights
                self.training_id = checkpoints.begin(cast(str, self.args.output_dir), checkpoint)
            return super().train(checkpoint, **kwargs)

    def _preference_kept(self) -> AbstractContextManager:
        """A block after which the adapter's α is what it is now."""
        if not self.preference_conditioned:
            return nullcontext()
        model = cast(Any, self.model)
        return use_preference(model, get_preference(model, self.adapter), self.adapter, allow_off_simplex=True)

    @contextmanager
    def claim_output(self, resume_from_checkpoint: str | bool | None = None) -> Iterator[str | None]:
        """Keeps other processes from training into the output folder for the time of a `with` block.

        It gives the folder of the checkpoint to resume from, as `train` is asked to; `None` for none.

        Raises:
            ValueError: another process trains into the folder, it holds a model or checkpoints that no training of
                ours has written, there is no complete checkpoint, its adapter is damaged, or it is of another run:
                with another base model, other data, objectives or their order, β, learning rate, seed, ...
        """
        folder, checkpoint, error = cast(str, self.args.output_dir), resume_from_checkpoint or None, None
        with ExitStack() as stack:
            if self.is_world_process_zero():
                try:
                    if not self._claimed:
                        checkpoints.check_folder(folder, subfolder_of(self))
                        stack.enter_context(checkpoints.locked(folder))
                    if checkpoint is True:
                        checkpoint = checkpoints.last_complete_checkpoint(folder)
                    if checkpoint:
                        checkpoints.check_record(checkpoint, self._describe_run())
                        checkpoints.check_adapter_of(checkpoint, self.model, self.adapter)
                except ValueError as refusal:
                    error = str(refusal)
            checkpoint, error = broadcast_object_list([checkpoint, error])
            if error:
                raise ValueError(error)
            stack.callback(setattr, self, "_claimed", self._claimed)
            self._claimed = True  # so that a call within this one takes no second lock
            yield checkpoint

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
        step, labels, weights = self.state.global_step, inputs["pair_labels"], inputs.get("pair_weights")
        if self.args.preference_per == "pair":
            preference = self.preference_sampler.for_pairs(step, inputs["pair_ids"])
        else:
            preference = self.preference_sampler.for_step(step)
        whole = None if num_items_in_batch is None else self._distances_of_step
        counts = cast(torch.Tensor, num_items_in_batch) if whole else count_labels(labels, weights)
        inputs = self._at(model, inputs, preference)
        if self.args.disable_dropout and model.training and not self._noise_checked:
            log_probs = without_noise(lambda: self.responses.log_probs(model, inputs), labels.device)
            self._noise_checked = True
        else:
            log_probs = self.responses.log_probs(model, inputs)
        margins = log_probs[0] - log_probs[1]
        loss, losses = self.arm_loss(margins, labels, preference, counts, whole, weights)
        if not torch.isfinite(loss):
            raise ValueError(
                f"The loss is {loss.item()} at step {step}; log-probabilities of the responses: "
                f"{log_probs[0].tolist()} and {log_probs[1].tolist()}. Lower the learning rate, or use bf16 instead "
                "of fp16."
            )
        self.train_metrics.add(preference.to(margins), log_probs, losses, labels, weights)
        return (loss, {"margins": margins}) if return_outputs else loss

    def _at(self, model, inputs: dict, preference: torch.Tensor | None) -> dict:
        """Sets α, once for all forwards before a backward: none of them, nor gradient checkpointing, which runs one
        again, may find it changed. Gives the batch to read, into whose prompts α is written where that is asked for.
        """
        if self.args.share_prompt and not self._rows_checked:
            if self.preference_conditioned:
                k = len(self.objectives)
                set_preference(model, torch.full((k,), 1 / k), self.adapter)  # one for any number of rows
            self.responses.check_shared_prompts(model, inputs)
            self._rows_checked = True
        if preference is not None and self.preference_conditioned:
            rows = self.responses.rows_per_pair
            preference = preference.repeat(rows, 1) if preference.ndim == 2 else preference
            set_preference(model, preference, self.adapter)
        if preference is None or self.preference_text is None:
            return inputs
        tokenizer = cast(PreTrainedTokenizerBase, self.processing_class)
        texts = self.preference_text.ids(tokenizer, preference, len(torch.atleast_2d(preference)))
        return with_texts(inputs, texts, cast(Any, tokenizer).bos_token_id, cast(int, tokenizer.pad_token_id))

    def _margins(self, model, inputs, preference: torch.Tensor | None) -> torch.Tensor:
        """By how much log π of the first response of each pair is larger, of the untrained model without α."""
        inputs = self._at(model, inputs, preference)
        without = nullcontext()
        if preference is None:
            model = self.accelerator.unwrap_model(model)
            without = AdapterSwitch.of(model).only([])
        with without:
            first, second = self.responses.log_probs(model, inputs)
        return first - second

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Evaluates one batch at every preference of `eval_preferences`."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            untrained = [self._margins(model, inputs, None)] if self._has_untrained else []
            margins = [self._margins(model, inputs, preference) for preference in self.eval_preferences.values()]
        weights = inputs.get("pair_weights", torch.ones_like(margins[0]))
        values = [inputs["pair_labels"], torch.stack(margins, -1), weights, *untrained]
        rows = [pairs.unflatten(0, (-1, self._pairs_of_a_row)) for pairs in values]
        # It leaves out the rows that fill up the last batch of several processes.
        gathered = self.accelerator.gather_for_metrics(rows)
        self._eval_metrics.add(*(pairs.flatten(0, 1) for pairs in cast(list, gathered)))
        return rows[1].new_zeros(()), rows[1], rows[0]

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """As `transformers.Trainer.evaluate`; a data set given here is tokenized like that of the trainer."""
        own = self.eval_dataset if isinstance(self.eval_dataset, dict) else {}
        if not (isinstance(eval_dataset, str) and eval_dataset in own):
            eval_dataset = self._joined(eval_dataset)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def predict(self, test_dataset, ignore_keys=None, metric_key_prefix="test") -> PredictionOutput:
        """As `transformers.Trainer.predict`; a data set is tokenized like that of the trainer.

        Raises `ValueError` for several evaluations at once.
        """
        test_dataset = self._joined(test_dataset)
        if not isinstance(test_dataset, JointPreferenceDataset):
            given = f"those called {', '.join(test_dataset)}" if test_dataset else "none"
            raise ValueError(f"`predict` takes one data set, or one for each objective, but got {given}.")
        return super().predict(cast(Any, test_dataset), ignore_keys, metric_key_prefix)

    def _joined(self, given: Any) -> Any:
        """What [`join_evaluation`] makes of it."""
        tokenizer = cast(PreTrainedTokenizerBase, self.processing_class)
        return join_evaluation(given, self.objectives, tokenizer, self.args, self.limits)

    def evaluation_loop(self, dataloader, *args, metric_key_prefix: str = "eval", **kwargs) -> EvalLoopOutput:
        """Adds the metrics of every objective at every evaluation preference to the loop's own."""
        self._eval_metrics = EvalMetrics(self.objectives, self.eval_preferences, self.arm_loss)
        self._pairs_of_a_row = len(dataloader.dataset.datasets)
        with self._preference_kept():
            output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        means = self._eval_metrics.means()
        cast(dict, output.metrics).update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output

    def _get_eval_sampler(self, eval_dataset: Any) -> None:
        """None, which is the order of the data, also where training groups rows by length."""
        return None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the training metrics since the last log."""
        if "loss" in logs:
            logs.update(self.train_metrics.pop_means(self.accelerator))
        super().log(logs, start_time)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """As TRL's: a card with this title, data set on the Hub and further tags; see [`peft_pblora.card.render`]."""
        if not self.is_world_process_zero():
            return
        given = [tags] if isinstance(tags, str) else list(tags or [])
        known = self.own_card.get("tags") or self.card.get("tags", ())
        self.own_card["tags"] = sorted({*known, *given})
        if model_name:
            self.own_card["title"] = model_name
        if dataset_name:
            self.own_card["datasets"] = [dataset_name]
        rewrite(self, cast(str, self.args.output_dir))

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """As transformers', with our card, over nothing but what a training has written.

        The arguments stand in the card as YAML, so that no pickle need hold them. Raises `ValueError` if a file would
        be replaced that was not written by a training, or another process trains into the output folder.
        """
        own = cast(str, self.args.output_dir)
        folder = Path(output_dir or own)
        facts = facts_with(self, None if self._saves_checkpoint else new_sample(self))
        if not self.args.should_save:
            super()._save(output_dir, state_dict)
            return
        alone = checkpoints.locked(own) if folder == Path(own) and not self._claimed else nullcontext()
        with alone, output_files(folder, checkpoints.WRITER) as work:
            super()._save(str(work), state_dict)
            (work / TRAINING_ARGS_NAME).unlink(missing_ok=True)
            if self.preference_text is not None:
                self.preference_text.save(work)
            if self._saves_checkpoint:
                checkpoints.write_record(work, self._describe_run())
            if (folder / CARD).exists():  # which `save_card` goes on with
                (work / CARD).unlink(missing_ok=True)
        save_card(folder, self.adapter_config, facts, subfolder_of(self))

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | None:
        """Labelled pairs of each objective, and pairs, or their weights, of the whole step by the number of processes.

        Each process adds up its pairs by these, and the mean over processes, which DDP takes of gradients, is then the
        loss of one big batch.
        """
        if not batch_samples:
            return None
        self._leave_out_repeated(batch_samples[-1])
        of_batches = [count_labels(batch["pair_labels"], batch.get("pair_weights")) for batch in batch_samples]
        counts = torch.stack(of_batches).sum(0).to(device)
        counts = cast(torch.Tensor, self.accelerator.reduce(counts, "mean"))
        self._distances_ahead = None
        if self.args.aggregation == "tchebycheff" and len(batch_samples) > 1:
            self._distances_ahead = torch.stack([self._distances(batch, counts) for batch in batch_samples]).sum(0)
        return counts

    def _leave_out_repeated(self, batch: dict) -> None:
        """Takes the labels of rows that come again, with which several processes fill up an epoch's last batch."""
        processes, last = self.accelerator.num_processes, self.accelerator.gradient_state.end_of_dataloader
        filled = self.accelerator.even_batches and not self.args.dataloader_drop_last
        if processes == 1 or not (filled and last):
            return
        data = cast(JointPreferenceDataset, self.train_dataset)
        rows = batch["pair_labels"].unflatten(0, (-1, len(data.datasets)))
        if own := len(data) % (processes * len(rows)):
            rows[max(own - self.accelerator.process_index * len(rows), 0) :] = 0

    def _distances(self, batch: dict, counts: torch.Tensor) -> torch.Tensor:
        """What a batch adds to l_i − z*_i of the step that begins, without gradients."""
        inputs = self._prepare_inputs(batch)
        with torch.no_grad(), self.compute_loss_context_manager():
            preference = self.preference_sampler.for_step(self.state.global_step)
            margins = self._margins(self.model_wrapped, inputs, preference)
            losses = self.arm_loss.of_pairs(margins, inputs["pair_labels"])
            return self.arm_loss.distances(losses, inputs["pair_labels"], counts, inputs.get("pair_weights"))

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
