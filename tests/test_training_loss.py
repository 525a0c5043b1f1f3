# SPDX-License-Identifier: Apache-2.0
"""The loss of a step: against slow twins, TRL's own, and at the preference that the model runs at."""

import copy
import math

import pytest
import torch
from conftest import tiny_arm
from pair_data import OBJECTIVES, labelled, naive_margins, pairs, prepared, split_by_objective
from training_runs import LORA, trained, trainer, two_sets

from peft_pblora import get_preference, set_preference
from trl_parm.training.losses import pair_losses


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


WEIGHTS = {"helpful": [3.0, 0.5, 0.0, 1.0], "harmless": [1.0, 0.0, 2.0, 0.25]}


@pytest.mark.parametrize(
    ("changes", "accumulation"),
    [
        ({}, 1), ({}, 2), ({"preference_per": "pair"}, 2), ({"global_weight": 0.5}, 2),
        ({"aggregation": "tchebycheff"}, 2),
        *(pytest.param(changes, 1, marks=pytest.mark.slow) for changes in (
            {"preference_per": "pair"}, {"global_weight": 0.5}, {"aggregation": "tchebycheff"}
        )),
    ],
)  # fmt: skip
def test_weights_of_pairs_make_a_weighted_mean(tmp_path, tokenizer, changes, accumulation):
    """The loss of a step from float64 margins, pair by pair; a pair of weight 0 adds nothing."""
    data = {name: pairs(4, 9 * i).add_column("w", WEIGHTS[name]) for i, name in enumerate(OBJECTIVES)}
    run = trainer(
        tmp_path, tokenizer, tiny_arm(), data, data, None, weight_column="w", beta=0.3, max_steps=1,
        per_device_train_batch_size=4 // accumulation, gradient_accumulation_steps=accumulation, **changes,
    )  # fmt: skip
    rows = [pair for i in range(4) for pair in run.train_dataset[i]["pairs"]]
    model = copy.deepcopy(run.model).eval()
    sums, total, extra = [0.0, 0.0], [sum(WEIGHTS[name]) for name in OBJECTIVES], 0.0
    for pair in rows:
        sampler = run.preference_sampler
        alone = changes.get("preference_per") == "pair"
        alpha = sampler.for_pairs(0, torch.tensor([pair["pair_id"]]))[0] if alone else sampler.for_step(0)
        set_preference(model, alpha)
        i = pair["labels"].index(1)
        loss = math.log(1 + math.exp(-0.3 * naive_margins(model, [pair])[0]))
        sums[i] += pair["weight"] * alpha[i].item() * loss
        extra += pair["weight"] * alpha[i].item() * loss / sum(total)  # β is the same for both objectives
    means = [s / n for s, n in zip(sums, total)]
    expected = max(means) if "aggregation" in changes else sum(means) + changes.get("global_weight", 0) * extra
    run.train()
    entry = run.state.log_history[0]
    assert entry["loss"] == pytest.approx(expected, rel=1e-4)
    if not changes:
        α = [entry[f"preference/{name}"] for name in OBJECTIVES]
        assert [entry[f"loss/{name}"] for name in OBJECTIVES] == pytest.approx([m / a for m, a in zip(means, α)])


@pytest.mark.parametrize("aggregation", ["sum", "tchebycheff"])
def test_a_training_is_the_same_at_any_scale_of_the_weights(tmp_path, tokenizer, aggregation):
    """Sums of weights far below 1e-9 are no reason for a smaller loss or gradient."""
    found = []
    for scale in (1.0, 2.0**-40, 2.0**-100, 2.0**90):
        weights = {name: [scale * w for w in WEIGHTS[name]] for name in OBJECTIVES}
        data = {name: pairs(4, 9 * i).add_column("w", weights[name]) for i, name in enumerate(OBJECTIVES)}
        run = trainer(
            tmp_path / str(scale), tokenizer, tiny_arm(), data, data, None, weight_column="w", beta=0.3, max_steps=1,
            per_device_train_batch_size=2, gradient_accumulation_steps=2, global_weight=0.5, aggregation=aggregation,
        )  # fmt: skip
        run.train()
        entry = run.state.log_history[0]
        found.append([entry[name] for name in ("loss", "grad_norm", "loss/helpful")] + [run.evaluate()["eval_loss"]])
    for scaled in found[1:]:
        assert scaled == pytest.approx(found[0], rel=1e-5)


def test_a_step_whose_pairs_all_have_weight_0_adds_nothing(tmp_path, tokenizer):
    data = {name: pairs(2, 9 * i).add_column("w", [0.0, 1.0]) for i, name in enumerate(OBJECTIVES)}
    run = trainer(
        tmp_path, tokenizer, tiny_arm(), data, None, None, weight_column="w", max_steps=2, global_weight=0.5,
        per_device_train_batch_size=1,
    )  # fmt: skip
    run.train()
    losses = sorted((entry["loss"], entry["grad_norm"]) for entry in run.state.log_history[:2])
    assert losses[0] == (0.0, 0.0)
    assert losses[1][0] > 0


def test_evaluation_weighs_its_losses(tmp_path, tokenizer):
    weights = [2.0, 0.0, 1.0]
    data = {name: pairs(3).add_column("w", weights) for name in OBJECTIVES}
    run = trainer(tmp_path, tokenizer, tiny_arm(), data, data, None, weight_column="w")
    found, model = run.evaluate(), copy.deepcopy(run.model).eval()
    set_preference(model, {"helpful": 1.0, "harmless": 0.0})
    margins = naive_margins(model, prepared(data["helpful"], "helpful", tokenizer))
    losses = [math.log(1 + math.exp(-0.1 * margin)) for margin in margins]
    expected = sum(w * loss for w, loss in zip(weights, losses)) / sum(weights)
    assert found["eval_helpful_loss@helpful"] == pytest.approx(expected, rel=1e-5)
    assert found["eval_helpful_accuracy@helpful"] == pytest.approx(sum(m > 0 for m in margins) / 3)
    with pytest.raises(ValueError, match="'helpful' lacks the `weight_column` 'w'"):
        run.evaluate(two_sets(2, 2))


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


@pytest.mark.parametrize("preference", [None, [0.3, 0.7], [[1.0, 0.0], [0.0, 1.0]]])
def test_training_and_evaluating_leave_the_preference_of_the_model(tmp_path, tokenizer, preference):
    """And whether it was set, so that a default is told later."""
    run = trainer(tmp_path, tokenizer, evaluation=two_sets(2, 2), preference_per="pair", max_steps=1)
    if preference is not None:
        set_preference(run.model, preference)
    before, condition = get_preference(run.model), run.model.base_model.conditions["default"]
    for do in (run.evaluate, lambda: run.predict(two_sets(2, 2)), run.train):
        do()
        assert torch.equal(get_preference(run.model), before)
        assert condition.was_set == (preference is not None)


def test_train_at_a_fixed_preference_and_at_a_fixed_set(tmp_path, tokenizer):
    run = trainer(tmp_path, tokenizer, train_preferences=[{"helpful": 0.25, "harmless": 0.75}])
    run.train()
    logged = [entry for entry in run.state.log_history if "loss" in entry]
    assert [[entry[f"preference/{name}"] for name in OBJECTIVES] for entry in logged] == [[0.25, 0.75]] * 3
    run = trainer(tmp_path, tokenizer, train_preferences=["[1, 0]", "[0, 1]"])
    drawn = [tuple(run.preference_sampler.for_step(step).tolist()) for step in range(50)]
    assert set(drawn) == {(1.0, 0.0), (0.0, 1.0)}
    assert 12 < drawn.count((1.0, 0.0)) < 38
    run = trainer(tmp_path, tokenizer, train_preferences=["[1, 0]", "[0, 1]", "[1, 0]", "[1, 0]"])
    drawn = [run.preference_sampler.for_step(step)[0].item() for step in range(200)]
    assert 130 < drawn.count(1.0) < 170


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
