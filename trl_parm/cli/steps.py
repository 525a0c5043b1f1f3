# SPDX-License-Identifier: Apache-2.0
"""Where a training is, on one line, in the place of the dozens of numbers that a trainer prints."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from .common import Progress


class Steps(TrainerCallback):
    """A bar for training and one for each evaluation; lines in a pipe or a file, see [`Progress`]."""

    steps: Progress | None = None
    batches: Progress | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self.steps = Progress(state.max_steps, "step", done=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.steps is not None:
            self.steps.update()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        losses = [(name, value) for name, value in (logs or {}).items() if name == "loss" or name.endswith("_loss")]
        told = [f"{name} {value:.4g}" for name, value in losses if name != "train_loss"]
        if self.steps is not None and told:
            self.steps.update(0, ", ".join(told))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.steps is not None:
            self.steps.close()
        self.steps = None

    def on_prediction_step(self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **_: Any) -> None:
        if state.is_world_process_zero and eval_dataloader is not None:
            self.batches = self.batches or Progress(len(eval_dataloader), "batch of the evaluation")
            self.batches.update()

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.batches is not None:
            self.batches.close()
        self.batches = None
