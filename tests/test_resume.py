# SPDX-License-Identifier: Apache-2.0
"""Runs that stop and go on: the same losses and the same weights, bit by bit, of the same run alone."""

import copy
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import before_5_24, tiny_llama, tiny_tokenizer
from datasets import Dataset
from pair_data import labelled, pairs
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from training_runs import OBJECTIVES, PBLORA, trainer, two_sets, without_ranks, write_run
from transformers import TrainerCallback, trainer_utils

from peft_pblora import PBLoraConfig
from peft_pblora.card import add_results
from trl_parm.cli import train
from trl_parm.training import checkpoints
from trl_parm.training.checkpoints import last_complete_checkpoint
from trl_parm.training.saving import SUMS


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
        {"data": {name: rows.to_iterable_dataset() for name, rows in two_sets(5, 3).items()}, "save_steps": 4},
        {"model": "dropout"},
        {"data": two_sets(5, 3), "train_sampling_strategy": "group_by_length", "save_steps": 4},
    ],
    ids=["step", "pair", "labels", "streams", "streams in their second pass", "dropout", "lengths"],
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


def logged(run) -> list[dict]:
    return [entry for entry in run.state.log_history if "loss" in entry]


def broken_and_resumed(folder, tokenizer, callbacks, **options):
    """The whole run, and the same one broken off and resumed."""
    runs = [trainer(folder / name, tokenizer, **options) for name in ("whole", "broken")]
    runs[0].train()
    with pytest.raises(KeyboardInterrupt):
        trainer(folder / "broken", tokenizer, callbacks=callbacks, **options).train()
    runs[1].train(resume_from_checkpoint=True)
    return runs


@pytest.mark.parametrize(
    "changes",
    [
        {"logging_steps": 4},
        {"logging_steps": 0.8},
        {"logging_strategy": "epoch"},
        {"logging_steps": 5, "preference_per": "pair", "gradient_accumulation_steps": 2},
        {"logging_steps": 4, "data": labelled(7, helpful=lambda i: [0, 1, None][i % 3])},
    ],
    ids=["steps", "a share of the steps", "epochs", "pairs", "labels"],
)
def test_a_log_after_resuming_is_of_all_steps_since_the_last_one(tmp_path, tokenizer, changes):
    """With every metric: the checkpoint lies between two logs, and what was added up before it counts too."""
    options = {"data": two_sets(7, 5), "max_steps": 8, "save_strategy": "steps", "save_steps": 3, **changes}
    whole, resumed = broken_and_resumed(tmp_path, tokenizer, [Stop(4)], **options)
    assert logged(resumed) == logged(whole)
    assert 3 not in [entry["step"] for entry in logged(whole)]


@pytest.mark.skipif(before_5_24, reason="transformers divides it by the steps of earlier calls too")
def test_the_loss_of_a_training_is_that_of_the_steps_it_has_taken(tmp_path, tokenizer):
    options = {"data": two_sets(7, 5), "max_steps": 8, "save_strategy": "steps", "save_steps": 3}
    whole, resumed = broken_and_resumed(tmp_path, tokenizer, [Stop(4)], logging_steps=4, **options)
    alone = trainer(tmp_path / "alone", tokenizer, **options)
    alone.train()
    losses = [entry["loss"] for entry in logged(alone)]
    assert whole.state.log_history[-1]["train_loss"] == pytest.approx(sum(losses) / 8)
    assert resumed.state.log_history[-1]["train_loss"] == pytest.approx(sum(losses[3:]) / 5)


def test_a_checkpoint_of_an_epochs_last_step_leaves_the_log_of_the_next_epoch_alone(tmp_path, tokenizer):
    options = {"data": two_sets(7, 5), "max_steps": 8, "save_strategy": "steps", "save_steps": 4}
    whole, resumed = broken_and_resumed(tmp_path, tokenizer, [Stop(5)], logging_strategy="epoch", **options)
    assert [entry["step"] for entry in logged(whole)] == [4, 8]
    assert logged(resumed) == logged(whole)[1:]


def test_sums_since_the_last_log_go_on_in_another_number_of_processes(tmp_path, tokenizer):
    options = {"data": two_sets(7, 5), "max_steps": 8, "save_strategy": "steps", "save_steps": 3, "logging_steps": 4}
    whole = trainer(tmp_path / "whole", tokenizer, **options)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "broken", tokenizer, callbacks=[Stop(4)], **options).train()
    file = tmp_path / "broken/checkpoint-3" / SUMS
    (own,) = json.loads(file.read_text())
    halves = [
        {
            **own,
            "loss": factor * own["loss"],
            "metrics": {k: [factor / 2 * x for x in v] for k, v in own["metrics"].items()},
        }
        for factor in (0.5, 1.5)
    ]
    file.write_text(json.dumps(halves))
    resumed = trainer(tmp_path / "broken", tokenizer, **options)
    resumed.train(resume_from_checkpoint=True)
    for entry, expected in zip(logged(resumed), logged(whole), strict=True):
        assert entry == pytest.approx(expected)
    file.unlink()  # as in a checkpoint of an earlier version
    shutil.rmtree(tmp_path / "broken/checkpoint-6")
    older = trainer(tmp_path / "broken", tokenizer, **options)
    older.train(resume_from_checkpoint=str(tmp_path / "broken/checkpoint-3"))
    assert logged(older)[0]["loss"] != pytest.approx(logged(whole)[0]["loss"])
    assert logged(older)[1] == logged(whole)[1]


def test_a_second_training_counts_nothing_of_the_first(tmp_path, tokenizer):
    run = trainer(tmp_path, tokenizer, max_steps=3, logging_steps=2)
    run.train()
    first = logged(run)[0]
    run.train()
    for objective in OBJECTIVES:  # which are the same in the same steps
        assert logged(run)[0][f"preference/{objective}"] == first[f"preference/{objective}"]


def test_a_resumed_run_logs_evaluates_and_saves_as_often_as_it_says(tmp_path, tokenizer, monkeypatch):
    """Not as often as the checkpoint says, and a share of the steps is one of all steps that there are now."""
    said: list[str] = []
    monkeypatch.setattr(trainer_utils.logger, "warning_once", said.append)
    options = {"data": two_sets(7, 5), "evaluation": two_sets(2, 2), "save_strategy": "steps"}
    trainer(tmp_path, tokenizer, max_steps=2, save_steps=1, **options).train()
    resumed = trainer(
        tmp_path, tokenizer, max_steps=8, save_steps=3, logging_steps=0.25, eval_strategy="steps", eval_steps=0.5,
        **options,
    )  # fmt: skip
    resumed.train(resume_from_checkpoint=True)
    assert [entry["step"] for entry in logged(resumed)] == [1, 2, 4, 6, 8]
    assert [entry["step"] for entry in resumed.state.log_history if "eval_loss" in entry] == [4, 8]
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {f"checkpoint-{i}" for i in (1, 2, 3, 6, 8)}
    args = resumed.args
    assert (args.save_steps, args.logging_steps, args.eval_steps) == (3, 0.25, 0.5)
    assert said == []


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


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A folder with the first checkpoint of a run."""
    folder = tmp_path_factory.mktemp("first")
    trainer(folder, tiny_tokenizer(), save_strategy="steps", save_steps=1, max_steps=1).train()
    return folder


def one_word_changed() -> dict[str, Dataset]:
    data = two_sets()
    rows = data["harmless"].to_list()
    rows[2]["rejected"] += " w3"
    return {**data, "harmless": Dataset.from_list(rows)}


SWAPPED = PBLoraConfig(**{**PBLORA.to_dict(), "objectives": OBJECTIVES[::-1]})
WIDER = PBLoraConfig(**{**PBLORA.to_dict(), "lora_alpha": 16})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": tiny_llama(seed=3)}, "base.frozen weights was .*, but is"),
        ({"model": tiny_llama(rope_theta=500.0)}, "base.rope_parameters.rope_theta was 10000.0, but is 500.0"),
        ({"data": two_sets(5)}, r"data was \['6 pairs, .*', '4 pairs, .*'\], but is \['5 pairs, "),
        ({"data": one_word_changed()}, "data was "),
        ({"data": dict(reversed(two_sets().items()))}, "data was "),
        ({"data": {name: d.to_iterable_dataset() for name, d in two_sets().items()}}, r"but is \['a stream, "),
        ({"peft_config": SWAPPED}, r"objectives was \['helpful', 'harmless'\], but is \['harmless', 'helpful'\]"),
        ({"peft_config": WIDER}, "adapter.lora_alpha was 8, but is 16"),
        ({"beta": {"helpful": 0.1, "harmless": 0.2}}, "beta.harmless was 0.1, but is 0.2"),
        ({"learning_rate": 0.2}, "learning_rate was 0.1, but is 0.2"),
        ({"lr_scheduler_type": "cosine"}, "lr_scheduler_type was linear, but is cosine"),
        ({"lr_scheduler_kwargs": {"num_cycles": 2}}, "lr_scheduler_kwargs.num_cycles is not recorded, but is 2"),
        ({"warmup_steps": 3}, "warmup_steps was 0, but is 3"),
        ({"max_grad_norm": 0.01}, "max_grad_norm was 1.0, but is 0.01"),
        ({"adam_beta2": 0.5}, "adam_beta2 was 0.999, but is 0.5"),
        ({"optimize_for_cpu": False}, "optimize_for_cpu was True, but is False"),
        ({"seed": 1}, "seed was 42, but is 1"),
        ({"loss_type": "hinge"}, "loss_type was sigmoid, but is hinge"),
        ({"global_weight": 0.5}, "global_weight was 0.0, but is 0.5"),
        ({"preference_per": "pair"}, "preference_per was step, but is pair"),
        ({"concentration": 1.0}, "concentration was 0.5, but is 1.0"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(first, tokenizer, change, message):
    run = trainer(first, tokenizer, max_steps=4, **change)
    with pytest.raises(ValueError, match=f"{first}/checkpoint-1 is of another training: .*{message}"):
        run.train(resume_from_checkpoint=True)
    assert run.state.global_step == 0


def test_weights_in_another_dtype_are_another_run(tmp_path, tokenizer):
    """Though they have the same values."""
    halves = tiny_llama().bfloat16()
    trainer(tmp_path, tokenizer, copy.deepcopy(halves), save_strategy="steps", save_steps=1, max_steps=1).train()
    with pytest.raises(ValueError, match="is of another training: loaded dtype was bfloat16, but is float32. Resume"):
        trainer(tmp_path, tokenizer, halves.float()).train(resume_from_checkpoint=True)


def test_entries_of_a_mapping_are_compared(tmp_path):
    old, new = ({"adapter": {"alpha_pattern": pattern}} for pattern in ({}, {"q_proj": 64}))
    for one, other, message in [(old, new, "is not recorded, but is 64"), (new, old, "was 64, but is gone")]:
        checkpoints.write_record(tmp_path, one)
        checkpoints.check_record(tmp_path, one)
        with pytest.raises(ValueError, match=f"adapter.alpha_pattern.q_proj {message}"):
            checkpoints.check_record(tmp_path, other)


def test_what_only_one_version_records_is_not_compared(first, tmp_path, tokenizer):
    """Settings, and fields of configurations."""
    shutil.copytree(first / "checkpoint-1", tmp_path / "checkpoint-1")
    file = tmp_path / "checkpoint-1" / checkpoints.RECORD
    record = json.loads(file.read_text())
    for name in ("lr_scheduler_type", "lr_scheduler_kwargs", "max_grad_norm", "loaded dtype", checkpoints.TRAINING):
        del record[name]
    record["base"]["field of another version"] = record["adapter"]["field of another version"] = True
    del record["base"]["rope_parameters"], record["adapter"]["r1"]
    file.write_text(json.dumps(record))
    run = trainer(tmp_path, tokenizer, lr_scheduler_type="cosine")
    run.train(resume_from_checkpoint=True)
    assert run.state.global_step == 3


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors, name: tensors.pop(name), "1 of its tensors are missing"),
        (lambda tensors, name: tensors[name].fill_(torch.nan), "1 of its tensors are NaN"),
        (lambda tensors, name: tensors.update({name: tensors[name][:1].clone()}), "of another shape"),
        (None, "adapter_model.safetensors' can't be loaded"),
    ],
)
def test_a_checkpoint_with_a_damaged_adapter_is_refused(first, tmp_path, tokenizer, edit, message):
    """Of a missing tensor transformers says nothing, and trains on from the adapter's first value."""
    shutil.copytree(first / "checkpoint-1", tmp_path / "checkpoint-1")
    file = tmp_path / "checkpoint-1" / "adapter_model.safetensors"
    if edit is None:
        file.write_bytes(file.read_bytes()[:-8])
    else:
        tensors = load_file(file)
        edit(tensors, max(tensors))
        save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, tokenizer).train(resume_from_checkpoint=True)


def test_a_checkpoint_is_compared_by_its_name_too_and_may_lie_elsewhere(first, tmp_path, tokenizer):
    with pytest.raises(ValueError, match="checkpoint-1 is of another training: seed was 42"):
        trainer(tmp_path, tokenizer, seed=1).train(resume_from_checkpoint=str(first / "checkpoint-1"))
    run = trainer(tmp_path, tokenizer)
    run.train(resume_from_checkpoint=str(first / "checkpoint-1"))
    assert run.state.global_step == 3


def test_a_stream_that_begins_otherwise_is_another_run(tmp_path, tokenizer):
    def run(n: int, **more):
        streams = {name: rows.to_iterable_dataset() for name, rows in two_sets(n).items()}
        return trainer(tmp_path, tokenizer, data=streams, save_strategy="steps", save_steps=1, **more)

    run(6).train()
    run(6, max_steps=4).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"data was \['a stream, .*'\], but is \['a stream, "):
        run(5).train(resume_from_checkpoint=True)


def test_a_checkpoint_that_does_not_say_its_run_is_resumed_with_a_warning(tmp_path, tokenizer, monkeypatch):
    """As those of version 0.1.0."""
    options = {"save_strategy": "steps", "save_steps": 1}
    trainer(tmp_path, tokenizer, max_steps=2, **options).train()
    (tmp_path / "checkpoint-2" / checkpoints.RECORD).unlink()
    (tmp_path / checkpoints.BEGUN).unlink()
    said = []
    monkeypatch.setattr(checkpoints.logger, "warning", said.append)
    resumed = trainer(tmp_path, tokenizer, max_steps=4, **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    assert [text.partition(". ")[0] for text in said] == [
        f"The checkpoint {tmp_path}/checkpoint-2 does not say what it was trained with"
    ]


def test_a_killed_run_goes_on_from_no_checkpoint_of_a_former_one(tmp_path, tokenizer, monkeypatch):
    """Killed before its own first one, while it writes that over one of the former run, and after it."""
    options = {"save_strategy": "steps", "save_steps": 2}
    trainer(tmp_path, tokenizer, max_steps=6, per_device_train_batch_size=1, **options).train()

    def killed(step: int) -> None:
        with pytest.raises(KeyboardInterrupt):
            trainer(tmp_path, tokenizer, max_steps=4, callbacks=[Stop(step)], **options).train()

    def kill(*args):
        raise KeyboardInterrupt

    killed(1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "note_files", kill)
        killed(3)
    with pytest.raises(ValueError, match="resume from: .*/checkpoint-6 is of another training than the one"):
        trainer(tmp_path, tokenizer).train(resume_from_checkpoint=True)
    killed(3)
    resumed = trainer(tmp_path, tokenizer, max_steps=4, **options)
    resumed.train(resume_from_checkpoint=True)
    whole = trainer(tmp_path / "whole", tokenizer, max_steps=4, **options)
    whole.train()
    assert curve(resumed) == curve(whole)
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    assert (tmp_path / "checkpoint-6/optimizer.pt").exists()


def test_a_run_of_an_earlier_version_goes_on(tmp_path, tokenizer):
    """Whose folder and checkpoints have no id: after another kill too."""
    options = {"save_strategy": "steps", "save_steps": 1}
    trainer(tmp_path, tokenizer, max_steps=1, **options).train()
    (tmp_path / checkpoints.BEGUN).unlink()
    record = json.loads((tmp_path / "checkpoint-1" / checkpoints.RECORD).read_text())
    del record[checkpoints.TRAINING]
    checkpoints.write_record(tmp_path / "checkpoint-1", record)
    for step, run in [(3, {"max_steps": 3}), (4, {"max_steps": 4})]:
        resumed = trainer(tmp_path, tokenizer, **run, **options)
        resumed.train(resume_from_checkpoint=True)
        assert curve(resumed)[0][0] == 1
        assert last_complete_checkpoint(tmp_path) == str(tmp_path / f"checkpoint-{step}")


def files(folder) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != checkpoints.LOCK}


FOREIGN = (
    "adapter_config.json", "adapter_model.safetensors", "pytorch_model.bin", "tokenizer.json", "vocab.txt",
    "checkpoint-1/optimizer.pt", "trainer_state.json", "all_results.json",
)  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_a_training_does_not_begin_where_a_model_of_somebody_is(tmp_path, tokenizer, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    run = trainer(tmp_path, tokenizer)
    with pytest.raises(ValueError, match="was not written by 'train'.* Nothing is replaced"):
        run.train()
    assert run.state.global_step == 0
    assert files(tmp_path) == {tmp_path / name: b"mine"}


def test_a_named_adapter_does_not_begin_where_one_of_somebody_is(tmp_path, tokenizer):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/adapter_config.json").write_text("mine")
    model = get_peft_model(tiny_llama(), copy.deepcopy(PBLORA), adapter_name="mine")
    with pytest.raises(ValueError, match="mine/adapter_config.json was not written by 'train'"):
        trainer(tmp_path, tokenizer, model, peft_config=None).train()
    assert files(tmp_path) == {tmp_path / "mine/adapter_config.json": b"mine"}


@pytest.mark.parametrize("name", ["adapter_config.json", "tokenizer_config.json", "training_args.bin"])
def test_saving_replaces_and_removes_nothing_of_somebody(tmp_path, tokenizer, name):
    run = trainer(tmp_path / "run", tokenizer)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    if name == "training_args.bin":
        run.save_model(str(tmp_path / "out"))
    else:
        with pytest.raises(ValueError, match=f"{name} was not written by 'train'"):
            run.save_model(str(tmp_path / "out"))
        assert files(tmp_path / "out") == {tmp_path / "out" / name: b"mine"}
    assert (tmp_path / "out" / name).read_text() == "mine"


def test_a_training_goes_over_what_one_has_written(tmp_path, tokenizer):
    """Its card completed meanwhile, but nothing else changed; and after a kill before a checkpoint was noted."""
    for _ in range(2):
        run = trainer(tmp_path, tokenizer, save_strategy="steps", save_steps=2)
        run.train()
        run.save_model()
        run.create_model_card("Mine")
        add_results(tmp_path, [["measure", "value"], ["accuracy", 0.5]])
    (tmp_path / "checkpoint-9/.killed.partial").mkdir(parents=True)
    trainer(tmp_path, tokenizer).train()
    with (tmp_path / "adapter_config.json").open("a") as file:
        file.write(" ")
    with pytest.raises(ValueError, match="adapter_config.json was not written by 'train', or was changed"):
        trainer(tmp_path, tokenizer).train()


def test_metrics_and_state_replace_nothing_of_somebody(tmp_path, tokenizer):
    """Written after the training has begun, in the place of what it could not yet see."""
    run = trainer(tmp_path, tokenizer)
    with run.claim_output():
        run.save_state()
        run.save_metrics("eval", {"eval_loss": 1.0})
        run.save_metrics("test", {"test_loss": 2.0})
        assert json.loads((tmp_path / "all_results.json").read_text()) == {"eval_loss": 1.0, "test_loss": 2.0}
        for name in ("trainer_state.json", "test_results.json", "all_results.json"):
            (tmp_path / name).write_text('{"mine": 1}')
        for save in (run.save_state, lambda: run.save_metrics("test", {"test_loss": 3.0})):
            with pytest.raises(ValueError, match="was not written by 'train', or was changed"):
                save()
    assert {(tmp_path / n).read_text() for n in ("test_results.json", "all_results.json")} == {'{"mine": 1}'}


@pytest.mark.parametrize("best", [False, True])
def test_old_checkpoints_are_removed_but_not_a_file_of_somebody_in_them(tmp_path, tokenizer, best):
    class Notes(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            assert args.save_total_limit == 1
            if state.global_step == 2:
                (tmp_path / "checkpoint-2/notes.txt").write_text("mine")

    run = trainer(
        tmp_path, tokenizer, evaluation=two_sets(4, 4), max_steps=5, save_strategy="steps", save_steps=1,
        save_total_limit=1, callbacks=[Notes()], eval_strategy="steps", eval_steps=1, load_best_model_at_end=best,
        metric_for_best_model="loss",
    )  # fmt: skip
    run.train()
    last = run.state.best_global_step if best else 5
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-2", f"checkpoint-{last}"}
    assert (tmp_path / "checkpoint-2/notes.txt").read_text() == "mine"
    assert (tmp_path / "checkpoint-2/optimizer.pt").exists()
    assert run.args.save_total_limit == 1


@pytest.mark.parametrize("changes", [{"max_steps": 0}, {"max_steps": -2}, {"max_steps": -1, "num_train_epochs": 0}])
def test_a_training_of_no_step_is_refused(tmp_path, tokenizer, changes):
    with pytest.raises(ValueError, match="it must be positive"):
        trainer(tmp_path, tokenizer, **changes)


def test_a_card_of_the_users_own_stays(tmp_path, tokenizer):
    (tmp_path / "README.md").write_text("My words.")
    trainer(tmp_path, tokenizer).save_model()
    assert (tmp_path / "README.md").read_text().startswith("My words.\n\n")


HOLD = """
import sys
from trl_parm.training.checkpoints import locked
with locked(sys.argv[1]):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_two_trainings_into_one_folder_are_refused(tmp_path, tokenizer):
    """And a process that was killed leaves no lock behind."""
    command, environment = [sys.executable, "-c", HOLD, str(tmp_path)], {**os.environ, "PYTHONPATH": os.getcwd()}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as other:
        assert other.stdout.readline() == b"locked\n"
        run = trainer(tmp_path, tokenizer)
        with pytest.raises(ValueError, match=f"Another process is writing {tmp_path}. Wait for it, or name another"):
            run.train()
        with pytest.raises(ValueError, match=f"Another process is writing {tmp_path}"):
            run.save_model()
        assert run.state.global_step == 0
        other.kill()
    run.train()
    assert run.state.global_step == 3


def test_a_training_holds_its_folder_until_it_ends(tmp_path, tokenizer):
    class Second(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            with pytest.raises(ValueError, match="Another process is writing"):
                trainer(tmp_path, tokenizer).train()

    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, tokenizer, callbacks=[Second(), Stop(2)]).train()
    run = trainer(tmp_path, tokenizer)
    with run.claim_output():
        run.train()
        with pytest.raises(ValueError, match="Another process is writing"):
            trainer(tmp_path, tokenizer).train()
    trainer(tmp_path, tokenizer).train()


def test_the_command_leaves_the_files_of_a_run_that_it_must_not_touch(tmp_path, monkeypatch):
    write_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    command = ["--config", "config.yaml", "--save_strategy", "steps", "--save_steps", "1", "--max_steps", "2"]
    train.main(command)

    def files() -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}

    before = files()
    with pytest.raises(ValueError, match="is of another training: learning_rate was 0.1, but is 0.2"):
        train.main([*command, "--learning_rate", "0.2", "--resume", "True"])
    with checkpoints.locked("one"), pytest.raises(ValueError, match="Another process is writing one"):
        train.main([*command, "--learning_rate", "0.2"])
    assert files() == before


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
    )  # fmt: skip
    run.train()
    name = metric if metric.startswith("eval_") else f"eval_{metric}"
    found = {e["step"]: e[name] for e in run.state.log_history if name in e}
    assert len(found) == 5
    assert run.state.best_metric == better(found.values())
    assert run.evaluate()[name] == pytest.approx(better(found.values()))


def test_the_best_model_is_loaded_into_an_adapter_of_any_name(tmp_path, tokenizer):
    arm = get_peft_model(tiny_llama(), copy.deepcopy(PBLORA), adapter_name="mine")
    run = trainer(
        tmp_path, tokenizer, arm, evaluation=without_ranks(two_sets(4, 4)), peft_config=None, learning_rate=3.0,
        save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
    )  # fmt: skip
    run.train()
    found = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    assert min(found) < found[-1]
    assert run.evaluate()["eval_loss"] == pytest.approx(min(found))
    assert run.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{run.state.best_global_step}")


def test_checkpoints_hold_a_card_and_no_preference(tmp_path, tokenizer):
    run = trainer(tmp_path, tokenizer, save_strategy="steps", save_steps=3, data={o: pairs(4) for o in OBJECTIVES})
    run.train()
    folder = tmp_path / "checkpoint-3"
    assert "import peft_pblora" in (folder / "README.md").read_text()
    from safetensors.torch import load_file

    assert {key.split(".")[-2] for key in load_file(folder / "adapter_model.safetensors")} == {"A", "B", "core"}
    shutil.rmtree(folder)


def test_a_base_that_zero_3_has_cut_up_is_described_as_the_whole_one(monkeypatch, tmp_path, tokenizer):
    """By shapes: a process holds all of a weight, a part or nothing, at other times and in other processes."""
    monkeypatch.setattr(checkpoints, "is_deepspeed_zero3_enabled", lambda: True)
    run = trainer(tmp_path, tokenizer)
    whole = checkpoints.describe_inputs(run.model, run.adapter, run.train_dataset)["base"]
    for parameter in run.model.parameters():
        if not parameter.requires_grad:
            parameter.ds_shape, parameter.data = parameter.shape, parameter.data.new_empty(0)
    assert checkpoints.describe_inputs(run.model, run.adapter, run.train_dataset)["base"] == whole
    other = trainer(tmp_path, tokenizer, tiny_llama(intermediate_size=40))
    assert checkpoints.describe_inputs(other.model, other.adapter, other.train_dataset)["base"] != whole
