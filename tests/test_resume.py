# SPDX-License-Identifier: Apache-2.0
"""Runs that stop and go on: the same losses and the same weights, bit by bit."""

import shutil

import pytest
import torch
from conftest import tiny_llama
from pair_data import labelled, pairs
from training_runs import OBJECTIVES, trainer, two_sets
from transformers import TrainerCallback

from trl_parm.training.setup import last_complete_checkpoint


class Stop(TrainerCallback):
    """Breaks off a run at the end of a step, as a user or a scheduler does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def curve(run) -> list[tuple[int, float, float]]:
    return [(e["step"], e["loss"], e["grad_norm"]) for e in run.state.log_history if "loss" in e]


def weights(run) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in run.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    "changes",
    [
        {"preference_per": "step"},
        {"preference_per": "pair", "gradient_accumulation_steps": 2},
        {"data": labelled(7, helpful=lambda i: [0, 1, None][i % 3])},
        {"data": {name: rows.to_iterable_dataset() for name, rows in two_sets(7, 5).items()}},
        {"model": "dropout"},
        {"data": two_sets(5, 3), "train_sampling_strategy": "group_by_length", "save_steps": 4},
    ],
    ids=["step", "pair", "labels", "streams", "dropout", "lengths"],
)
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, tokenizer, changes):
    def make(folder, **more):
        options = {
            "data": two_sets(7, 5),
            "max_steps": 8,
            "save_strategy": "steps",
            "save_steps": 3,
            **changes,
            **more,
        }
        if options.pop("model", None):
            options |= {"model": tiny_llama(attention_dropout=0.3), "disable_dropout": False}
        return trainer(tmp_path / folder, tokenizer, **options)

    whole = make("whole")
    whole.train()
    broken = make("broken", callbacks=[Stop(5)])
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    resumed = make("broken")
    resumed.train(resume_from_checkpoint=True)
    assert curve(resumed) == curve(whole)
    for name, p in weights(resumed).items():
        assert torch.equal(p, weights(whole)[name]), name
    assert curve(resumed)[0][0] == 1


def test_a_half_written_checkpoint_is_passed_over(tmp_path, tokenizer):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    trainer(tmp_path, tokenizer, **options).train()
    (tmp_path / "checkpoint-4" / "trainer_state.json").unlink()
    (tmp_path / "checkpoint-3" / "trainer_state.json").write_text('{"epoch": 1.')
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    resumed = trainer(tmp_path, tokenizer, **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4


@pytest.mark.parametrize("steps", [3, 6], ids=["within an epoch", "at its end"])
def test_a_complete_run_takes_no_further_step(tmp_path, tokenizer, steps):
    """Broken off after its last checkpoint and before its model was saved. Transformers would take one step more."""
    options = {
        "data": two_sets(12, 12), "max_steps": steps, "save_strategy": "steps", "save_steps": 1,
        "lr_scheduler_type": "constant",
    }  # fmt: skip
    whole = trainer(tmp_path, tokenizer, **options)
    whole.train()
    resumed = trainer(tmp_path, tokenizer, **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == steps
    assert curve(resumed) == curve(whole)
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / f"checkpoint-{steps}")
    for name, p in weights(resumed).items():
        assert torch.equal(p, weights(whole)[name]), name


def test_nothing_to_resume_from(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="There is no complete checkpoint in"):
        trainer(tmp_path, tokenizer).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("metric", "better"), [("eval_loss", min), ("eval_harmless_accuracy@harmless", max), ("helpful_loss@uniform", min)]
)
def test_the_best_model_is_loaded_at_the_end(tmp_path, tokenizer, metric, better):
    run = trainer(
        tmp_path, tokenizer, evaluation=two_sets(4, 4), max_steps=5, learning_rate=1.0, save_strategy="steps",
        save_steps=1, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, metric_for_best_model=metric,
        greater_is_better=better is max,
    )  # fmt: skip
    run.train()
    name = metric if metric.startswith("eval_") else f"eval_{metric}"
    found = {e["step"]: e[name] for e in run.state.log_history if name in e}
    assert len(found) == 5
    assert run.state.best_metric == better(found.values())
    assert run.evaluate()[name] == pytest.approx(better(found.values()))


def test_checkpoints_hold_a_card_and_no_preference(tmp_path, tokenizer):
    run = trainer(tmp_path, tokenizer, save_strategy="steps", save_steps=3, data={o: pairs(4) for o in OBJECTIVES})
    run.train()
    folder = tmp_path / "checkpoint-3"
    assert "import peft_pblora" in (folder / "README.md").read_text()
    from safetensors.torch import load_file

    assert {key.split(".")[-2] for key in load_file(folder / "adapter_model.safetensors")} == {"A", "B", "core"}
    shutil.rmtree(folder)
