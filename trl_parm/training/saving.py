# SPDX-License-Identifier: Apache-2.0
"""What transformers' trainer writes, loads, removes and uploads by itself, kept to what a training has written."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

from accelerate.utils import gather_object
from huggingface_hub import HfApi
from peft import PeftModel
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, IntervalStrategy
from transformers.utils.hub import PushInProgress
from trl.trainer.base_trainer import _BaseTrainer

from peft_pblora.card.files import FILES, LOGS
from peft_pblora.loading import check_adapter
from peft_pblora.output import NOTES, output_file, output_files

from . import checkpoints
from .card import subfolder_of
from .metrics import TrainMetrics


SUMS = "sums_since_log.json"
"""In a checkpoint, of each process: the step of the last log, and the sums of loss and [`TrainMetrics`] since then."""


class SavingTrainer(_BaseTrainer):
    """A trainer that replaces and removes nothing of somebody's own."""

    best_loaded: tuple[int, int] | None = None
    """The step of the best model, once it was loaded, and how many entries the log had then."""
    training_id: str | None = None
    """Of the run that [`checkpoints.begin`] has noted in the output folder."""
    train_metrics: TrainMetrics
    _saves_checkpoint = False
    push_in_progress: PushInProgress | None

    def save_state(self) -> None:
        """As transformers', over nothing but what a training has written."""
        if self.is_world_process_zero():
            with output_files(cast(str, self.args.output_dir), checkpoints.WRITER) as work:
                self.state.save_to_json(str(work / TRAINER_STATE_NAME))

    def save_metrics(self, split: str, metrics: Mapping[str, float], combined: bool = True) -> None:
        """As transformers', over nothing but what a training has written."""
        if not self.is_world_process_zero():
            return
        folder, found = Path(cast(str, self.args.output_dir)), {f"{split}_results.json": metrics}
        if combined:
            name = "all_results.json"
            found[name] = {**(checkpoints.read_json(folder / name) or {}), **metrics}
        folder.mkdir(parents=True, exist_ok=True)
        with output_files(folder, checkpoints.WRITER) as work:
            for name, content in found.items():
                (work / name).write_text(json.dumps(content, indent=4, sort_keys=True), encoding="utf-8")

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._saves_checkpoint = True
        try:
            with self._hidden("save_total_limit") as (limit,):  # beyond which transformers would remove whole folders
                super()._save_checkpoint(model, trial)
        finally:
            self._saves_checkpoint = False
        self.accelerator.wait_for_everyone()  # until each process has written its files
        if self.args.should_save:
            folder, name = self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            checkpoints.note_files(Path(folder, name), self.training_id)
            checkpoints.rotate(folder, limit, [name, self.state.best_model_checkpoint])

    def _finalize_training(self, trial: Any, *args: Any) -> Any:
        with self._hidden("save_total_limit") as (limit,):
            output = super()._finalize_training(trial, *args)
        if self.args.should_save and limit == 1 and self.state.best_model_checkpoint is not None:
            checkpoints.rotate(self._get_output_dir(trial), limit, [self.state.best_model_checkpoint])
        return output

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """As transformers', which lets all weights of one of several adapters train, and in releases such as 5.16.1
        reads only those that are not called `default`. Frozen ones stay so."""
        trains = [(one, one.requires_grad) for one in cast(Any, model or self.model).parameters()]
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        tuned: Any = self.model
        several = isinstance(tuned, PeftModel) and len(tuned.peft_config) > 1
        if several and not (self.is_deepspeed_enabled or self.is_fsdp_enabled):  # whose files are not PEFT's
            check_adapter(tuned, Path(resume_from_checkpoint, subfolder_of(self)), str(cast(Any, self).adapter))
        for parameter, required in trains:
            parameter.requires_grad_(required)

    def _load_best_model(self) -> None:
        """As transformers', also where PEFT saves an adapter below the checkpoint, by its name."""
        checkpoint = cast(str, self.state.best_model_checkpoint)
        if not (self.is_deepspeed_enabled or self.is_fsdp_enabled):  # whose files are not PEFT's
            self.state.best_model_checkpoint = str(Path(checkpoint, subfolder_of(self)))
        try:
            super()._load_best_model()
        finally:
            self.state.best_model_checkpoint = checkpoint
        self.best_loaded = int(checkpoint.rpartition("-")[2]), len(self.state.log_history)

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> Any:
        """As transformers', which resumes with the checkpoint's numbers of steps between two logs, evaluations and
        checkpoints: here they are those of the arguments."""
        self.train_metrics.clear()
        with self._hidden("logging_steps", "eval_steps", "save_steps"):
            found = super()._init_training_state(max_steps, *args, **kwargs)
        self.state.compute_steps(self.args, max_steps)
        return found

    def _save_rng_state(self, output_dir: str) -> None:
        """As transformers', with what each process has added up since the last log."""
        super()._save_rng_state(output_dir)
        own = {
            "step": self._globalstep_last_logged,
            "loss": self._tr_loss.item(),
            "metrics": self.train_metrics.state(),
        }
        of_processes = gather_object([own])
        if self.args.should_save:
            with output_file(Path(output_dir) / SUMS) as file:
                json.dump(of_processes, file)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """As transformers', and goes on with the sums since the last log, which earlier versions have not kept."""
        super()._load_rng_state(checkpoint)
        of_processes = checkpoints.read_json(Path(checkpoint) / SUMS) if checkpoint else None
        # A checkpoint of an epoch's last step stands before the epoch's log, which is not made up for.
        missed = self.args.logging_strategy == IntervalStrategy.EPOCH and float(self.state.epoch).is_integer()
        if not of_processes or missed:
            return
        mean = sum(own["loss"] for own in of_processes) / len(of_processes)
        if len(of_processes) == self.args.world_size:
            own = of_processes[self.args.process_index]
            loss, metrics = own["loss"], own["metrics"]
        else:
            loss, metrics = mean, _shared([own["metrics"] for own in of_processes], self.args.world_size)
        self._tr_loss += loss
        self._total_loss_scalar -= mean  # `train_loss` is the mean over the steps that this call takes
        self._globalstep_last_logged = of_processes[0]["step"]
        self.train_metrics.load_state(metrics, self._tr_loss.device)

    @contextmanager
    def _hidden(self, *names: str) -> Iterator[list[Any]]:
        """Gives the values of arguments that transformers does not see in the block."""
        values = [getattr(self.args, name) for name in names]
        try:
            for name in names:
                setattr(self.args, name, None)
            yield values
        finally:
            for name, value in zip(names, values, strict=True):
                setattr(self.args, name, value)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Uploads the model of a checkpoint from where it is, without pickles: transformers would first write it over
        that of the output folder."""
        strategy, busy = self.args.hub_strategy, self.push_in_progress and not self.push_in_progress.is_done()
        if not self.is_world_process_zero() or strategy == HubStrategy.END or (busy and not self.args.hub_always_push):
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        message = f"Training in progress, step {self.state.global_step}"
        upload = partial(
            HfApi(token=self.args.hub_token).upload_folder, repo_id=cast(str, self.hub_model_id),
            folder_path=checkpoint_folder, revision=self.args.hub_revision, run_as_future=True,
        )  # fmt: skip
        ignored = [*LOGS, checkpoints.RECORD, SUMS]
        jobs = [upload(commit_message=message, allow_patterns=list(FILES), ignore_patterns=ignored)]
        names = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: Path(checkpoint_folder).name}
        if strategy in names:
            message, name = f"{message}, checkpoint", names[cast(HubStrategy, strategy)]
            jobs.append(upload(commit_message=message, path_in_repo=name, ignore_patterns=[NOTES]))
        if busy:
            cast(PushInProgress, self.push_in_progress).jobs.extend(jobs)
        else:
            self.push_in_progress = PushInProgress(cast(Any, jobs))


def _shared(states: Sequence[Mapping[str, Any]], processes: int) -> dict[str, list[float]]:
    """States of [`TrainMetrics`] as those of another number of processes, which together are the same."""
    return {
        name: [sum(parts) / processes for parts in zip(*(state[name] for state in states), strict=True)]
        for name in states[0]
    }
