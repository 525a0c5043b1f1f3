# SPDX-License-Identifier: Apache-2.0
"""Whole runs of `PreferenceARMTrainer`: what TRL's own tests ask of its trainers, and what objectives add."""

import copy
import math
from itertools import islice

import pytest
import torch
from accelerate import DeepSpeedPlugin
from conftest import tiny_arm, tiny_llama
from datasets import Dataset
from pair_data import OBJECTIVES, labelled, pairs, prepared
from peft import PeftConfig, PeftModel, PromptTuningConfig, get_peft_model
from training_runs import LORA, PBLORA, config, trained, trainer, two_sets, without_ranks
from transformers import AutoModelForCausalLM, BloomConfig
from transformers.utils import logging

from peft_pblora import PBLoraConfig, get_preference, set_preference
from trl_parm import PreferenceARMTrainer
from trl_parm.training.model import adapt_model


def test_train_changes_the_adapter_and_nothing_else(tmp_path, tokenizer):
    run = trainer(tmp_path, tokenizer)
    before = {name: p.clone() for name, p in run.model.named_parameters()}
    run.train()
    assert run.state.log_history[-1]["train_loss"] is not None
    for name, p in run.model.named_parameters():
        assert torch.equal(p, before[name]) != ("pblora_" in name), name


def test_train_a_model_by_its_folder(tmp_path, tokenizer):
    tiny_llama().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    run = PreferenceARMTrainer(
        str(tmp_path / "base"), config(tmp_path / "arm"), train_dataset=two_sets(), peft_config=copy.deepcopy(PBLORA)
    )
    run.train()
    assert run.processing_class.eos_token == "<eos>"
    assert run.model.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_train_keeps_the_dtype_of_the_model(tmp_path, tokenizer, dtype):
    run = trainer(tmp_path, tokenizer, tiny_llama().to(dtype))
    run.train()
    for name, p in run.model.named_parameters():
        assert p.dtype == (torch.float32 if "pblora_" in name else dtype), name


def test_train_in_bf16_autocast_stays_close_to_float32(tmp_path, tokenizer):
    losses = [trained(tmp_path, tokenizer, bf16=bf16)[0][0] for bf16 in (False, True)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert losses[0] != losses[1]


@pytest.mark.parametrize("form", ["conversational", "implicit prompt", "token ids"])
def test_train_on_every_format(tmp_path, tokenizer, form):
    """The same tokens in another format give the same run."""

    def changed(data: Dataset, name: str) -> Dataset:
        if form == "token ids":
            names = {"first_ids": "chosen_ids", "second_ids": "rejected_ids"}
            return prepared(data, name, tokenizer).rename_columns(names).remove_columns("labels")
        if form == "implicit prompt":
            data = data.map(lambda row: {r: row["prompt"] + row[r] for r in ("chosen", "rejected")})
            return data.remove_columns("prompt")
        return data

    plain = {name: pairs(n, conversational=form != "token ids") for name, n in (("helpful", 6), ("harmless", 4))}
    data = {name: changed(rows, name) for name, rows in plain.items()}
    torch.testing.assert_close(trained(tmp_path, tokenizer, data=data), trained(tmp_path, tokenizer, data=plain))


def batches_of(run, n: int = 3) -> tuple[list[tuple], list[int]]:
    """The texts and the numbers of the pairs of the first batches."""
    texts, numbers = [], []
    for batch in islice(run.get_train_dataloader(), n):
        numbers += batch["pair_ids"].tolist()
        texts += [tuple(row) for row in batch["input_ids"][: len(batch["pair_ids"])].tolist()]
    return texts, numbers


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("shards", [(1, 1), (2, 2), (2, 0), (3, 1)])
def test_streams_give_each_pair_once_in_a_pass_whatever_the_workers(tmp_path, tokenizer, caplog, shards, workers):
    sets = {name: pairs(6, 9 * i) for i, name in enumerate(OBJECTIVES)}
    data = {
        name: rows.to_iterable_dataset(num_shards=n) if n else rows
        for (name, rows), n in zip(sets.items(), shards, strict=True)
    }
    logging.get_logger("trl_parm").addHandler(caplog.handler)
    run = trainer(
        tmp_path, tokenizer, data=data, dataloader_num_workers=workers,
        dataloader_persistent_workers=workers > 0, dataloader_prefetch_factor=2 if workers else None,
    )  # fmt: skip
    logging.get_logger("trl_parm").removeHandler(caplog.handler)
    assert ("`dataloader_num_workers` is 0 instead of 2" in caplog.text) == (workers > 0)
    for _ in range(2):
        texts, numbers = batches_of(run)
        assert len(texts) == len(set(numbers)) == 12


def test_workers_read_data_sets_that_are_no_streams(tmp_path, tokenizer):
    run = trainer(tmp_path, tokenizer, data=two_sets(6, 6), dataloader_num_workers=2)
    assert len(set(batches_of(run)[1])) == 12
    assert run.args.dataloader_num_workers == 2


def test_train_on_streams_equals_train_on_data_sets(tmp_path, tokenizer):
    streams = {name: rows.to_iterable_dataset() for name, rows in two_sets(6, 6).items()}
    ours = trained(tmp_path, tokenizer, data=streams, train_sampling_strategy="sequential")
    theirs = trained(tmp_path, tokenizer, data=two_sets(6, 6), train_sampling_strategy="sequential")
    torch.testing.assert_close(ours, theirs)


def test_a_stream_goes_on_within_a_step_when_it_has_ended(tmp_path, tokenizer):
    """One big batch is as several small ones, where the pairs of a step end and begin the stream too."""
    found = {}
    for batch, accumulation in ((4, 1), (2, 2), (1, 4)):
        run = trainer(
            tmp_path / str(batch), tokenizer, data={"helpful": pairs(7).to_iterable_dataset()}, peft_config=LORA,
            per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, max_steps=5,
        )  # fmt: skip
        steps = run.get_train_dataloader()
        numbers = [n for step in islice(steps, 5 * accumulation) for n in step["pair_ids"].tolist()]
        assert numbers == [i % 7 for i in range(20)]
        run.train()
        found[batch] = torch.tensor([[e["loss"], e["grad_norm"]] for e in run.state.log_history if "loss" in e])
    torch.testing.assert_close(found[2], found[4])
    torch.testing.assert_close(found[1], found[4])


def test_train_on_files(tmp_path, tokenizer):
    for name, rows in two_sets().items():
        rows.to_json(tmp_path / f"{name}.jsonl")
    files = {name: str(tmp_path / f"{name}.jsonl") for name in OBJECTIVES}
    torch.testing.assert_close(trained(tmp_path, tokenizer, data=files), trained(tmp_path, tokenizer))


def test_train_on_data_sets_by_their_name(tmp_path, tokenizer):
    """A folder stands for an id on the Hub: both go through `load_dataset`, which knows splits."""
    for name, rows in two_sets().items():
        rows.to_json(tmp_path / name / "train.jsonl")
        rows.select(range(2)).to_json(tmp_path / name / "test.jsonl")
    names = {name: str(tmp_path / name) for name in OBJECTIVES}
    run = trainer(tmp_path, tokenizer, data=names, evaluation=names)
    assert (len(run.train_dataset), len(run.eval_dataset)) == (6, 2)
    run.train()


@pytest.mark.slow
def test_a_compiled_model_trains_alike(tmp_path, tokenizer):
    compiled = trained(tmp_path, tokenizer, torch_compile=True, torch_compile_backend="aot_eager", optim="sgd")
    torch.testing.assert_close(compiled, trained(tmp_path, tokenizer, optim="sgd"), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("preference_per", ["step", "pair"])
def test_gradient_checkpointing_trains_alike(tmp_path, tokenizer, reentrant, preference_per):
    runs = [
        trained(
            tmp_path, tokenizer, gradient_checkpointing=checkpointing, preference_per=preference_per,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant},
        )
        for checkpointing in (False, True)
    ]  # fmt: skip
    torch.testing.assert_close(*runs)


@pytest.mark.parametrize("preference_per", ["step", "pair"])
@pytest.mark.parametrize("form", ["ranked", "labelled"])
def test_gradient_accumulation_equals_the_big_batch(tmp_path, tokenizer, form, preference_per):
    """Also where micro-batches have different numbers of labels."""
    data = two_sets(8, 8) if form == "ranked" else labelled(8, helpful=lambda i: [0, None, -1, 1][i % 4])
    options = {"data": data, "preference_per": preference_per, "max_steps": 2, "global_weight": 0.3}
    big = trained(tmp_path, tokenizer, per_device_train_batch_size=4, **options)
    small = trained(tmp_path, tokenizer, per_device_train_batch_size=1, gradient_accumulation_steps=4, **options)
    torch.testing.assert_close(big, small, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("ideal", [None, {"helpful": 0.1, "harmless": 3.0}])
def test_the_maximum_of_a_step_needs_no_big_batch(tmp_path, tokenizer, ideal):
    """Each micro-batch has a maximum and a sign of its own, which are not those of the step."""
    options = {"data": two_sets(8, 8), "aggregation": "tchebycheff", "ideal_losses": ideal, "beta": 1.0}
    options["train_preferences"] = ["[0.5, 0.5]"]
    big = trained(tmp_path, tokenizer, per_device_train_batch_size=4, **options)
    small = trained(tmp_path, tokenizer, per_device_train_batch_size=1, gradient_accumulation_steps=4, **options)
    torch.testing.assert_close(big, small, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("preference_per", ["step", "pair"])
def test_shared_prompts_train_alike(tmp_path, tokenizer, preference_per):
    runs = [
        trained(tmp_path, tokenizer, share_prompt=shared, preference_per=preference_per, optim="sgd")
        for shared in (False, True)
    ]
    torch.testing.assert_close(*runs, atol=1e-5, rtol=1e-4)


@pytest.mark.cuda
def test_activation_offloading_trains_alike(tmp_path, tokenizer):
    runs = [
        trained(tmp_path, tokenizer, use_cpu=False, activation_offloading=offloading) for offloading in (False, True)
    ]
    torch.testing.assert_close(*runs)


def test_batches_of_similar_lengths(tmp_path, tokenizer):
    run = trainer(
        tmp_path, tokenizer, data=two_sets(30, 30), train_sampling_strategy="group_by_length", num_train_epochs=1,
        evaluation=two_sets(4, 4),
    )  # fmt: skip
    spread = [len(set((b["segments"] >= 0).sum(1).tolist())) for b in run.get_train_dataloader()]
    plain = trainer(tmp_path, tokenizer, data=two_sets(30, 30), num_train_epochs=1)
    assert sum(spread) < sum(len(set((b["segments"] >= 0).sum(1).tolist())) for b in plain.get_train_dataloader())
    run.train()
    assert math.isfinite(run.evaluate()["eval_loss"])


def test_dropout_is_off_unless_asked_for(tmp_path, tokenizer):
    dropping = PBLoraConfig(objectives=OBJECTIVES, target_modules=["q_proj"], lora_dropout=0.5)
    losses = [
        [
            trained(tmp_path, tokenizer, peft_config=peft_config, disable_dropout=disable)[0]
            for disable in (True, False)
        ]
        for peft_config in (PBLoraConfig(objectives=OBJECTIVES, target_modules=["q_proj"]), dropping)
    ]
    assert losses[0][0] == losses[0][1] == losses[1][0] != losses[1][1]


def test_a_model_that_can_not_share_prompts_is_refused_before_the_first_step(tmp_path, tokenizer):
    config = BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)
    run = trainer(
        tmp_path, tokenizer, AutoModelForCausalLM.from_config(config), share_prompt=True,
        peft_config=PBLoraConfig(objectives=OBJECTIVES, target_modules=["query_key_value"]),
    )  # fmt: skip
    with pytest.raises(ValueError, match="which the model can't take.*Use `share_prompt=False`"):
        run.train()
    assert run.state.global_step == 0


class Noisy(torch.nn.Module):
    """A dropout that no attribute tells of."""

    def forward(self, x):
        return torch.nn.functional.dropout(x, 0.01, self.training)


def test_dropout_that_can_not_be_found_is_refused_before_the_first_step(tmp_path, tokenizer):
    def noisy():
        model = tiny_llama()
        model.model.layers[1].mlp.act_fn = torch.nn.Sequential(torch.nn.SiLU(), Noisy())
        return model

    run = trainer(tmp_path, tokenizer, noisy())
    with pytest.raises(ValueError, match="`disable_dropout=True`, but log-probabilities scatter from forward to"):
        run.train()
    assert run.state.global_step == 0
    trainer(tmp_path, tokenizer, noisy(), disable_dropout=False).train()


class Drawing(torch.nn.SiLU):
    """Draws random numbers of which it makes nothing, as layers that are never dropped do."""

    def forward(self, input):
        torch.rand(1)
        return super().forward(input)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_random_numbers_without_effect_change_nothing(tmp_path, tokenizer, checkpointing):
    """They are found out by further forwards, of which the backward of the first must not notice anything."""
    weights = []
    for act in (torch.nn.SiLU(), Drawing()):
        model = tiny_llama()
        model.model.layers[1].mlp.act_fn = act
        options = {"gradient_checkpointing": checkpointing, "max_steps": 1, "per_device_train_batch_size": 4}
        weights.append(trained(tmp_path, tokenizer, model=model, **options)[1])
    torch.testing.assert_close(weights[1], weights[0])


def second_adapter(model: PeftModel) -> PeftModel:
    """One for other objectives, which is active and trains."""
    model.add_adapter("three", PBLoraConfig(objectives=["a", "b", "c"], target_modules=["q_proj"]))
    model.set_adapter("three")
    return model.train()


@pytest.mark.parametrize("preference_per", ["step", "pair"])
def test_the_active_adapter_of_several_trains_alone(tmp_path, tokenizer, preference_per):
    data = {name: pairs(4, i) for i, name in enumerate("abc")}
    options = {"data": data, "evaluation": data, "preference_per": preference_per, "peft_config": None}
    run = trainer(tmp_path, tokenizer, second_adapter(tiny_arm()), **options, save_strategy="steps", save_steps=1)
    set_preference(run.model, [0.3, 0.7], "default")
    before = {name: p.clone() for name, p in run.model.named_parameters()}
    run.train()
    assert run.objectives == ["a", "b", "c"]
    assert get_preference(run.model, "default").tolist() == pytest.approx([0.3, 0.7])
    assert "eval_c_accuracy@b" in run.evaluate()
    for name, p in run.model.named_parameters():
        assert torch.equal(p, before[name]) != (".three." in name), name
    more = trainer(tmp_path, tokenizer, second_adapter(tiny_arm()), **options, max_steps=4)
    more.train(resume_from_checkpoint=True)
    assert more.state.global_step == 4


def half_frozen(kind: PeftConfig, several: bool = False) -> PeftModel:
    """An adapter of which B alone trains, as in LoRA-FA."""
    model = get_peft_model(tiny_llama(), copy.deepcopy(kind))
    if several:
        model = second_adapter(model)
        model.set_adapter("default")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("default" in name and ("lora_B" in name or name.endswith("B.weight")))
    return model


@pytest.mark.parametrize("kind", [PBLORA, LORA], ids=["pblora", "lora"])
def test_an_evaluation_leaves_frozen_weights_frozen(tmp_path, tokenizer, kind):
    options = {"data": two_sets() if kind is PBLORA else pairs(4), "peft_config": None, "max_grad_norm": 0.01}
    alone = trainer(tmp_path / "alone", tokenizer, half_frozen(kind), **options)
    each = {"evaluation": options["data"], "eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}
    evaluated = trainer(tmp_path / "evaluated", tokenizer, half_frozen(kind), **options, **each)
    before = [parameter.requires_grad for parameter in evaluated.model.parameters()]
    evaluated.evaluate()
    for run in (alone, evaluated):
        run.train()
        assert [parameter.requires_grad for parameter in run.model.parameters()] == before
    assert all(map(torch.equal, alone.model.parameters(), evaluated.model.parameters()))


def test_a_resumed_run_leaves_frozen_weights_of_one_adapter_of_several_frozen(tmp_path, tokenizer):
    options = {"peft_config": None, "save_strategy": "steps", "save_steps": 1}
    run = trainer(tmp_path, tokenizer, half_frozen(PBLORA, several=True), **options)
    before = [parameter.requires_grad for parameter in run.model.parameters()]
    run.train()
    resumed = trainer(tmp_path, tokenizer, half_frozen(PBLORA, several=True), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert [parameter.requires_grad for parameter in resumed.model.parameters()] == before
    assert all(map(torch.equal, run.model.parameters(), resumed.model.parameters()))


def test_prompt_learning_is_refused(tmp_path, tokenizer):
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match=r"The adapter .default. is tuned by prompt learning.*Use a method"):
        trainer(tmp_path, tokenizer, data={"reward": pairs(4)}, peft_config=prompts)


@pytest.mark.parametrize("kind", [PBLORA, LORA], ids=["pblora", "lora"])
def test_an_adapter_that_does_not_train_is_refused(tmp_path, tokenizer, kind):
    get_peft_model(tiny_llama(), copy.deepcopy(kind)).save_pretrained(tmp_path / "arm")
    data = two_sets() if kind is PBLORA else pairs(4)
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "arm")
    with pytest.raises(ValueError, match=r"No weight of the active adapter 'default' trains.*is_trainable=True"):
        trainer(tmp_path, tokenizer, model, data, peft_config=None)
    # Another adapter that would train does not help: it is not in use.
    model.load_adapter(str(tmp_path / "arm"), "other", is_trainable=True)
    with pytest.raises(ValueError, match="No weight of the active adapter 'default' trains"):
        trainer(tmp_path, tokenizer, model, data, peft_config=None)
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "arm", is_trainable=True)
    before = [p.clone() for p in model.parameters() if p.requires_grad]
    trainer(tmp_path, tokenizer, model, data, peft_config=None).train()
    assert not all(torch.equal(a, b) for a, b in zip(before, [p for p in model.parameters() if p.requires_grad]))


def test_a_model_that_does_not_train_is_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="No weight of the model trains"):
        trainer(tmp_path, tokenizer, tiny_llama().requires_grad_(False), pairs(4), peft_config=None)


def test_one_adapter_trains_at_a_time(tmp_path, tokenizer):
    model = second_adapter(tiny_arm())
    model.base_model.set_adapter(["default", "three"])
    with pytest.raises(ValueError, match=r"The adapters \['default', 'three'\] are active, but one trains"):
        trainer(tmp_path, tokenizer, model, peft_config=None)


def test_training_raises_the_accuracy_of_each_objective_at_its_own_vertex(tmp_path, tokenizer):
    """Two objectives that contradict each other on the same pairs: only the preference can tell them apart."""
    for preference_per in ("step", "pair"):
        data = labelled(40, helpful=lambda i: i % 2, harmless=lambda i: 1 - i % 2)
        data = {"helpful": pairs(40), "harmless": without_ranks({"x": pairs(40)})["x"]}
        run = trainer(
            tmp_path, tokenizer, data=data, evaluation=data, max_steps=60, learning_rate=0.05, beta=1.0,
            per_device_train_batch_size=8, preference_per=preference_per,
        )  # fmt: skip
        run.train()
        metrics = run.evaluate()
        for mine, other in (OBJECTIVES, OBJECTIVES[::-1]):
            assert metrics[f"eval_{mine}_accuracy@{mine}"] > 0.9
            assert metrics[f"eval_{mine}_accuracy@{other}"] < 0.1


def test_a_full_model_trains_without_any_adapter(tmp_path, tokenizer):
    model = tiny_llama()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer(tmp_path, tokenizer, model, data=pairs(6), peft_config=None).train()
    for name, p in model.named_parameters():
        assert not torch.equal(p, before[name]), name


def test_saved_adapter_loads(tmp_path, tokenizer):
    run = trainer(tmp_path, tokenizer)
    run.train()
    run.save_model(tmp_path / "arm")
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "arm").eval()
    run.model.eval()
    for model in (loaded, run.model):
        set_preference(model, [0.3, 0.7])
    ids = torch.arange(8)[None]
    torch.testing.assert_close(loaded(ids).logits, run.model(ids).logits)


def test_zero_3_gets_one_dtype_and_reentrant_checkpointing(tmp_path):
    args = config(tmp_path, gradient_checkpointing=True)
    args.deepspeed_plugin = DeepSpeedPlugin(zero_stage=3)
    model = adapt_model(tiny_llama().to(torch.bfloat16), args, copy.deepcopy(PBLORA))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert args.activation_checkpointing_kwargs["use_reentrant"]


def test_quantized_bases_train_their_adapter_in_bf16(tmp_path, tokenizer):
    model = tiny_llama()
    model.is_loaded_in_4bit = True  # bitsandbytes is not needed to see what is done with such a model
    model = adapt_model(model, config(tmp_path), copy.deepcopy(PBLORA))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16}
