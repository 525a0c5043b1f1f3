# SPDX-License-Identifier: Apache-2.0
"""`PreferenceARMTrainer`: what TRL's own tests ask of its trainers, and what several objectives add."""

import copy
import math

import pytest
import torch
from conftest import tiny_arm, tiny_llama
from datasets import Dataset, DatasetDict
from pair_data import OBJECTIVES, labelled, naive_margins, pairs, prepared, split_by_objective
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM

from peft_pblora import PBLoraConfig, get_preference, set_preference
from trl_parm import PreferenceARMConfig, PreferenceARMTrainer
from trl_parm.training.losses import pair_losses


PBLORA = PBLoraConfig(objectives=OBJECTIVES, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
LORA = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")


def config(folder, **changes) -> PreferenceARMConfig:
    settings = {
        "per_device_train_batch_size": 2, "max_steps": 3, "learning_rate": 0.1, "beta": 0.1, "logging_steps": 1,
        "bf16": False, "use_cpu": True, "report_to": "none", "save_strategy": "no", "gradient_checkpointing": False,
    }  # fmt: skip
    return PreferenceARMConfig(str(folder), **{**settings, **changes})


def two_sets(n: int = 6, m: int = 4) -> dict[str, Dataset]:
    return {"helpful": pairs(n), "harmless": pairs(m, 9)}


def trainer(folder, tokenizer, model=None, data=None, evaluation=None, peft_config=PBLORA, callbacks=None, **changes):
    return PreferenceARMTrainer(
        tiny_llama() if model is None else model,
        config(folder, **changes),
        train_dataset=two_sets() if data is None else data,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        peft_config=copy.deepcopy(peft_config),
        callbacks=callbacks,
    )


def trained(folder, tokenizer, **changes) -> tuple[list[float], list[torch.Tensor]]:
    """The logged losses and the trained weights of a run."""
    run = trainer(folder, tokenizer, **changes)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    return losses, [p.detach().clone() for p in run.model.parameters() if p.requires_grad]


def without_ranks(data: dict[str, Dataset]) -> dict[str, Dataset]:
    return {name: rows.rename_columns({"chosen": "rejected", "rejected": "chosen"}) for name, rows in data.items()}


# One step


@pytest.mark.parametrize("form", ["a data set for each objective", "labels", "both"])
@pytest.mark.parametrize("preference_per", ["step", "pair"])
def test_loss_of_a_step_equals_the_naive_twin(tmp_path, tokenizer, form, preference_per):
    """Σ_i α_i l_i from per-token float64 log-probabilities, with the preferences that the trainer draws."""
    data = {
        "a data set for each objective": two_sets(2, 2),
        "labels": labelled(2, helpful=lambda i: [0, None][i], harmless=lambda i: i),
        "both": {"judged": labelled(2, harmless=lambda i: [1, -1][i]), "harmless": pairs(2, 9)},
    }[form]
    beta = {"helpful": 0.1, "harmless": 0.3}
    run = trainer(tmp_path, tokenizer, tiny_arm(), data, peft_config=None, beta=beta, preference_per=preference_per)
    batch = next(iter(run.get_train_dataloader()))
    loss = run.compute_loss(run.model, batch).item()
    model = copy.deepcopy(run.model).eval()
    rows = {pair["pair_id"]: pair for i in range(2) for pair in run.train_dataset[i]["pairs"]}
    sampler, sums, counts = run.preference_sampler, [0.0, 0.0], [0, 0]
    for number, pair in rows.items():
        alpha = sampler.for_pairs(0, torch.tensor([number]))[0] if preference_per == "pair" else sampler.for_step(0)
        set_preference(model, alpha)
        margin = naive_margins(model, [pair])[0]
        for i, objective in enumerate(OBJECTIVES):
            if label := pair["labels"][i]:
                sums[i] += alpha[i].item() * math.log(1 + math.exp(-label * beta[objective] * margin))
                counts[i] += 1
    assert sum(counts) == {"a data set for each objective": 4, "labels": 3, "both": 5}[form]
    assert loss == pytest.approx(sum(s / n for s, n in zip(sums, counts)), rel=1e-5)


def test_labels_give_the_loss_of_split_data_sets_in_fewer_sequences(tmp_path, tokenizer):
    data = labelled(4, helpful=lambda i: i % 2, harmless=lambda i: 0)
    losses, rows = [], []
    for form in (data, split_by_objective(data)):
        run = trainer(tmp_path, tokenizer, tiny_arm(), form, peft_config=None, per_device_train_batch_size=4)
        batch = next(iter(run.get_train_dataloader()))
        losses.append(run.compute_loss(run.model, batch).item())
        rows.append(len(batch["input_ids"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert rows == [8, 16]


@pytest.mark.parametrize(
    "changes",
    [
        {"loss_type": "hinge"},
        {"label_smoothing": 0.2},
        {"target_margin": 0.5},
        {"length_normalized": True},
        {"aggregation": "tchebycheff"},
        {"aggregation": "tchebycheff", "ideal_losses": {"helpful": 0.1, "harmless": 0.6}},
        {"global_weight": 0.5},
        {"global_weight": 0.5, "preference_per": "pair"},
    ],
)
def test_options_of_the_loss_reach_it(tmp_path, tokenizer, changes):
    losses = []
    for options in ({}, changes):
        run = trainer(tmp_path, tokenizer, tiny_arm(), labelled(2), peft_config=None, **options)
        losses.append(run.compute_loss(run.model, next(iter(run.get_train_dataloader()))).item())
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("preference_per", ["step", "pair"])
def test_the_model_runs_at_the_preference_of_the_loss(tmp_path, tokenizer, preference_per):
    seen = []
    run = trainer(tmp_path, tokenizer, data=two_sets(6, 6), preference_per=preference_per)
    forward = run.model.base_model.model.forward

    def watch(*args, **kwargs):
        seen.append(get_preference(run.model).clone())
        return forward(*args, **kwargs)

    run.model.base_model.model.forward = watch
    run.train()
    assert len(seen) == 3
    for step, alpha in enumerate(seen):
        if preference_per == "step":
            torch.testing.assert_close(alpha, run.preference_sampler.for_step(step))
        else:
            assert alpha.shape == (8, 2)
            assert torch.equal(alpha[:4], alpha[4:])
            assert len(alpha[:4].unique(dim=0)) == 4


def test_train_at_a_fixed_preference_and_at_a_fixed_set(tmp_path, tokenizer):
    run = trainer(tmp_path, tokenizer, train_preferences=[{"helpful": 0.25, "harmless": 0.75}])
    run.train()
    assert get_preference(run.model).tolist() == [0.25, 0.75]
    run = trainer(tmp_path, tokenizer, train_preferences=["[1, 0]", "[0, 1]"])
    drawn = [tuple(run.preference_sampler.for_step(step).tolist()) for step in range(50)]
    assert set(drawn) == {(1.0, 0.0), (0.0, 1.0)}
    assert 12 < drawn.count((1.0, 0.0)) < 38


# A run


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


@pytest.mark.parametrize("conversational", [False, True])
def test_train_on_every_format(tmp_path, tokenizer, conversational):
    data = {"helpful": pairs(4, conversational=conversational), "harmless": pairs(4, 9)}
    assert math.isfinite(trained(tmp_path, tokenizer, data=data)[0][-1])


def test_train_on_streams_equals_train_on_data_sets(tmp_path, tokenizer):
    streams = {name: rows.to_iterable_dataset() for name, rows in two_sets(6, 6).items()}
    ours = trained(tmp_path, tokenizer, data=streams, train_sampling_strategy="sequential")
    theirs = trained(tmp_path, tokenizer, data=two_sets(6, 6), train_sampling_strategy="sequential")
    torch.testing.assert_close(ours, theirs)


def test_train_on_files(tmp_path, tokenizer):
    for name, rows in two_sets().items():
        rows.to_json(tmp_path / f"{name}.jsonl")
    files = {name: str(tmp_path / f"{name}.jsonl") for name in OBJECTIVES}
    torch.testing.assert_close(trained(tmp_path, tokenizer, data=files), trained(tmp_path, tokenizer))


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


@pytest.mark.parametrize("preference_per", ["step", "pair"])
def test_shared_prompts_train_alike(tmp_path, tokenizer, preference_per):
    runs = [
        trained(tmp_path, tokenizer, share_prompt=shared, preference_per=preference_per, optim="sgd")
        for shared in (False, True)
    ]
    torch.testing.assert_close(*runs, atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is nothing to offload from")
def test_activation_offloading_trains_alike(tmp_path, tokenizer):
    runs = [
        trained(tmp_path, tokenizer, use_cpu=False, activation_offloading=offloading) for offloading in (False, True)
    ]
    torch.testing.assert_close(*runs)


def test_batches_of_similar_lengths(tmp_path, tokenizer):
    run = trainer(
        tmp_path, tokenizer, data=two_sets(30, 30), train_sampling_strategy="group_by_length", num_train_epochs=1
    )
    spread = [len(set((b["segments"] >= 0).sum(1).tolist())) for b in run.get_train_dataloader()]
    plain = trainer(tmp_path, tokenizer, data=two_sets(30, 30), num_train_epochs=1)
    assert sum(spread) < sum(len(set((b["segments"] >= 0).sum(1).tolist())) for b in plain.get_train_dataloader())
    run.train()


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


def test_one_objective_with_plain_lora_is_genarm(tmp_path, tokenizer):
    """The same loss and weights as from a mapping with a name, and as by hand: −log σ(β · margin)."""
    run = trainer(tmp_path, tokenizer, data=pairs(2), peft_config=LORA, evaluation=pairs(2))
    assert run.objectives == ["reward"]
    model = copy.deepcopy(run.model).eval()
    margins = naive_margins(model, prepared(pairs(2), "helpful", tokenizer))
    run.train()
    expected = sum(math.log(1 + math.exp(-0.1 * margin)) for margin in margins) / 2
    assert run.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)
    assert "eval_reward_accuracy@reward" in run.evaluate()
    named = trained(tmp_path, tokenizer, data={"helpful": pairs(2)}, peft_config=LORA)
    torch.testing.assert_close(named[1], [p for p in run.model.parameters() if p.requires_grad])


@pytest.mark.parametrize(("loss_type", "changes"), [("sigmoid", {"label_smoothing": 0.1}), ("hinge", {})])
def test_the_loss_of_one_objective_is_that_of_cpo_without_its_likelihood_term(monkeypatch, loss_type, changes):
    """CPO's preference loss has no reference model either; TRL's own code says what it is."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.cpo import CPOTrainer

    theirs = object.__new__(CPOTrainer)
    theirs.beta, theirs.loss_type, theirs.alpha = 0.3, loss_type, 0.0
    theirs.label_smoothing = changes.get("label_smoothing", 0.0)
    theirs.accelerator = type("Accelerator", (), {"device": torch.device("cpu")})()
    chosen, rejected = torch.tensor([-3.0, -9.0, -4.0]), torch.tensor([-5.0, -2.0, -4.5])
    expected, *_ = theirs.cpo_loss(chosen, rejected)
    losses = pair_losses(
        chosen - rejected, torch.ones(3, 1), torch.tensor([0.3]), hinge=loss_type == "hinge", **changes
    )
    torch.testing.assert_close(losses[:, 0], expected)


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


def test_quantized_bases_train_their_adapter_in_bf16(tmp_path, tokenizer):
    model = tiny_llama()
    model.is_loaded_in_4bit = True  # bitsandbytes is not needed to see what is done with such a model
    from trl_parm.training.setup import adapt_model

    model = adapt_model(model, config(tmp_path), copy.deepcopy(PBLORA))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16}


# Metrics


def test_metrics_carry_the_objective(tmp_path, tokenizer):
    run = trainer(tmp_path, tokenizer, max_steps=1)
    run.train()
    entry = run.state.log_history[0]
    for objective in OBJECTIVES:
        for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen",
                     "logps/rejected", "loss", "preference"):  # fmt: skip
            assert math.isfinite(entry[f"{name}/{objective}"])
        reward, log_prob = entry[f"rewards/chosen/{objective}"], entry[f"logps/chosen/{objective}"]
        assert reward == pytest.approx(0.1 * log_prob)
    weights = [entry[f"preference/{objective}"] for objective in OBJECTIVES]
    assert sum(weights) == pytest.approx(1)
    assert entry["loss"] == pytest.approx(sum(w * entry[f"loss/{o}"] for w, o in zip(weights, OBJECTIVES)), rel=1e-4)


def test_an_objective_without_labels_in_a_step_is_not_reported_as_zero(tmp_path, tokenizer):
    data = labelled(2, helpful=lambda i: None, harmless=lambda i: 0)
    data = Dataset.from_list([*data, {**data[0], "helpful": 0, "prompt": "w33"}])
    run = trainer(tmp_path, tokenizer, data=data, max_steps=3, per_device_train_batch_size=1)
    run.train()
    reported = ["loss/helpful" in entry for entry in run.state.log_history[:3]]
    assert sorted(reported) == [False, False, True]


def test_evaluation_is_deterministic_and_names_every_cell(tmp_path, tokenizer):
    data = two_sets(5, 3)
    run = trainer(tmp_path, tokenizer, tiny_arm(), data, data, peft_config=None)
    first, second = run.evaluate(), run.evaluate()
    for objective in OBJECTIVES:
        for preference in [*OBJECTIVES, "uniform"]:
            for kind in ("loss", "accuracy", "margin", "ratio_accuracy"):
                key = f"eval_{objective}_{kind}@{preference}"
                assert first[key] == second[key]
    assert first["eval_loss"] == second["eval_loss"]
    run.args.per_device_eval_batch_size = 2
    rebatched = run.evaluate()
    assert {k: rebatched[k] for k in first if "@" in k or k == "eval_loss"} == pytest.approx(
        {k: v for k, v in first.items() if "@" in k or k == "eval_loss"}, rel=1e-5
    )
    vertex = {"helpful": (1, 0), "harmless": (0, 1), "uniform": (0.5, 0.5)}
    assert first["eval_loss"] == pytest.approx(
        sum(w * first[f"eval_{o}_loss@{p}"] for p, ws in vertex.items() for o, w in zip(OBJECTIVES, ws)) / 3
    )
    set_preference(run.model, {"helpful": 1.0, "harmless": 0.0})
    for name in OBJECTIVES:
        margins = naive_margins(run.model, prepared(data[name], name, tokenizer))
        assert first[f"eval_{name}_accuracy@helpful"] == pytest.approx(sum(m > 0 for m in margins) / len(margins))


def test_labelled_evaluation_equals_that_of_split_data_sets(tmp_path, tokenizer):
    data = labelled(5, helpful=lambda i: [0, 1, None, -1, 1][i])
    found = [
        trainer(tmp_path, tokenizer, tiny_arm(), data, form, peft_config=None).evaluate()
        for form in (data, split_by_objective(data))
    ]
    for name in [key for key in found[0] if "@" in key or key == "eval_loss"]:
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-5), name


def test_several_evaluations_keep_their_names(tmp_path, tokenizer):
    run = trainer(tmp_path, tokenizer, evaluation={"near": two_sets(3, 3), "far": without_ranks(two_sets(3, 3))})
    run.train()
    metrics = run.evaluate()
    for objective in OBJECTIVES:
        near, far = (metrics[f"eval_{name}_{objective}_margin@uniform"] for name in ("near", "far"))
        assert near == pytest.approx(-far, rel=1e-4)
        assert near != 0


def test_evaluate_takes_raw_data_and_streams(tmp_path, tokenizer):
    run = trainer(tmp_path, tokenizer, tiny_arm(), peft_config=None)
    data = two_sets(3, 2)
    given = run.evaluate(data, metric_key_prefix="test")
    streamed = run.evaluate({name: rows.to_iterable_dataset() for name, rows in data.items()})
    assert given["test_helpful_accuracy@uniform"] == streamed["eval_helpful_accuracy@uniform"]
    assert given["test_loss"] == pytest.approx(streamed["eval_loss"])


def test_compute_metrics_gets_margins_and_labels(tmp_path, tokenizer):
    shapes = []

    def compute(prediction) -> dict:
        shapes.append((prediction.predictions.shape, prediction.label_ids.shape))
        return {"positive": float((prediction.predictions > 0).mean())}

    run = trainer(tmp_path, tokenizer, evaluation=two_sets(5, 3))
    run.compute_metrics = compute
    assert 0 <= run.evaluate()["eval_positive"] <= 1
    assert shapes == [((5, 2, 3), (5, 2, 2))]


def test_ratio_accuracy_is_relative_to_the_untrained_model(tmp_path, tokenizer):
    fresh = trainer(tmp_path, tokenizer, evaluation=two_sets(5, 5)).evaluate()
    assert fresh["eval_helpful_ratio_accuracy@helpful"] == 0.0  # a fresh adapter changes nothing: no margin above 0


def test_given_evaluation_preferences(tmp_path, tokenizer):
    preferences = ['{"helpful": 0.2, "harmless": 0.8}']
    run = trainer(tmp_path, tokenizer, evaluation=two_sets(3, 3), eval_preferences=preferences)
    names = {key.split("@")[1] for key in run.evaluate() if "@" in key}
    assert names == {"helpful=0.2,harmless=0.8"}


# Surface


def test_defaults_of_the_arguments(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_llama().save_pretrained("base")
    run = PreferenceARMTrainer(
        "base", train_dataset=two_sets(), processing_class=tokenizer, peft_config=copy.deepcopy(PBLORA)
    )
    assert run.args.output_dir == "base-PARM"
    assert run.args.learning_rate == 5e-4
    assert run.arm_loss.beta.tolist() == pytest.approx([0.01, 0.01])


def test_card_tells_what_was_trained_and_how_to_use_it(tmp_path, tokenizer):
    tiny_llama().save_pretrained(tmp_path / "base")
    run = trainer(tmp_path / "arm", tokenizer, AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    run.train()
    run.save_model()
    run.create_model_card("my arm", "my/data", tags="mine")
    card = (tmp_path / "arm" / "README.md").read_text()
    for part in ("# my arm", "import peft_pblora", "lin2025parm", "helpful 0.1, harmless 0.1", "Dirichlet(0.5)",
                 "my/data", "- trl\n", "- parm\n", "- mine\n", "library_name: peft"):  # fmt: skip
        assert part in card, part
    block = card.split("```python\n")[1].split("```")[0].replace("path/to/this/folder", str(tmp_path / "arm"))
    guide = card.split("```python\n")[2].split("```")[0]
    base, inputs = tiny_llama(1), {"input_ids": torch.tensor([[5, 6]])}
    scope = {"base": base, "inputs": inputs}
    exec(block + guide, scope)
    assert scope["output"].shape[1] > 2


@pytest.mark.parametrize(
    ("peft_config", "data", "changes", "citation"),
    [
        (LORA, pairs(4), {}, "xu2025genarm"),
        (PBLORA, None, {"aggregation": "tchebycheff"}, "zhong2024panacea"),
        (PBLORA, None, {"global_weight": 0.1}, "uniarm2026"),
    ],
)
def test_card_cites_the_methods_used(tmp_path, tokenizer, peft_config, data, changes, citation):
    run = trainer(tmp_path, tokenizer, data=data, peft_config=peft_config, **changes)
    run.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert citation in card
    assert ("lin2025parm" in card) == (peft_config is PBLORA)


def test_tags_are_added(tmp_path, tokenizer):
    assert {"trl", "parm"} <= set(trainer(tmp_path, tokenizer).model.model_tags)


def test_tokenizer_without_pad_token_uses_its_end_token(tmp_path, tokenizer):
    tokenizer.pad_token = None
    run = trainer(tmp_path, tokenizer)
    assert run.processing_class.pad_token == "<eos>"
    assert run.model.config.pad_token_id == 1
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="The tokenizer has no end token"):
        trainer(tmp_path, tokenizer)


def broken_llama():
    model = tiny_llama()
    model.model.layers[0].self_attn.o_proj.weight.data[0, 0] = torch.nan
    return model


def test_a_loss_that_is_not_a_number_stops_before_the_first_step(tmp_path, tokenizer):
    run = trainer(tmp_path, tokenizer, broken_llama())
    before = [p.clone() for p in run.model.parameters() if p.requires_grad]
    with pytest.raises(ValueError, match="The loss is nan at step 0"):
        run.train()
    assert all(torch.equal(a, b) for a, b in zip(before, [p for p in run.model.parameters() if p.requires_grad]))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"data": [1, 2]}, TypeError, "Give a mapping such as"),
        ({"data": {}}, ValueError, "`train_dataset` is required"),
        ({"data": pairs(3)}, ValueError, "one data set with `chosen` and `rejected`, but the adapter was made for"),
        ({"data": DatasetDict(train=pairs(3), test=pairs(3))}, ValueError, r"has the splits \['test', 'train'\]"),
        ({"data": {"helpful": pairs(3), "harmful": pairs(3)}}, ValueError, "but the adapter was made for"),
        ({"data": {"helpful": pairs(3)}}, ValueError, r"`train_dataset` has the objectives \['helpful'\]"),
        ({"data": labelled(3).remove_columns("helpful")}, ValueError, r"has the objectives \['harmless'\]"),
        ({"data": {"helpful": pairs(3), "harmless": pairs(3).select([])}}, ValueError, "'harmless' is empty"),
        (
            {"data": {"helpful": pairs(3), "harmless": pairs(3).remove_columns("chosen")}},
            ValueError,
            r"lacks the columns \['chosen'\]",
        ),
        ({"evaluation": {"helpful": pairs(3)}}, ValueError, r"`eval_dataset` has the objectives \['helpful'\]"),
        ({"max_length": 2}, ValueError, "longer than 2 tokens"),
        ({"activation_offloading": True}, ValueError, "where this run computes already"),
        ({"beta": {"helpful": 0.1}}, ValueError, "`beta` names the objectives"),
        ({"beta": 0.0}, ValueError, "every β must be positive"),
        ({"beta": float("nan")}, ValueError, "every β must be positive"),
        ({"concentration": 0.0}, ValueError, "must be positive"),
        ({"loss_type": "ipo"}, ValueError, "must be one of sigmoid, hinge"),
        ({"label_smoothing": 0.5}, ValueError, r"must lie in \[0, 0.5\)"),
        ({"global_weight": -1.0}, ValueError, "must be 0 or larger"),
        ({"aggregation": "tchebycheff", "preference_per": "pair"}, ValueError, "needs one preference for all pairs"),
        ({"ideal_losses": {"helpful": 0.1}}, ValueError, "`ideal_losses` names the objectives"),
        ({"peft_config": None}, ValueError, "no preference-conditioned adapter, but there are 2 objectives"),
        ({"peft_config": LORA}, ValueError, "no preference-conditioned adapter, but there are 2 objectives"),
        ({"peft_config": LORA, "data": labelled(3)}, ValueError, "does not say which column belongs to the objective"),
        ({"peft_config": {"r": 8}}, TypeError, "must be a `PeftConfig`"),
        ({"eval_preferences": [[0.5, 0.6]]}, ValueError, "must sum to 1"),
        ({"train_preferences": [[0.5, 0.6]]}, ValueError, "must sum to 1"),
    ],
)
def test_bad_input_is_refused_before_the_first_step(tmp_path, tokenizer, changes, error, message):
    with pytest.raises(error, match=message):
        trainer(tmp_path / "out", tokenizer, **changes)
    assert not (tmp_path / "out").exists()


def test_train_dataset_is_required(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="`train_dataset` is required"):
        PreferenceARMTrainer(tiny_llama(), config(tmp_path), processing_class=tokenizer, peft_config=PBLORA)


def test_a_ready_adapter_takes_no_second_one(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="is a PeftModel already"):
        trainer(tmp_path, tokenizer, tiny_arm())
    with pytest.raises(ValueError, match="`quantization_config` needs a model id"):
        PreferenceARMTrainer(
            tiny_llama(), config(tmp_path), train_dataset=two_sets(), processing_class=tokenizer,
            quantization_config=object(),
        )  # fmt: skip
