# SPDX-License-Identifier: Apache-2.0
"""Whether an ARM follows α and has learned: measured as a slow twin does, and said where it has not."""

import json

import numpy as np
import pytest
import torch
from conftest import OBJECTIVES, tiny_arm, tiny_llama
from datasets import Dataset
from pair_data import labelled, naive_margins, pairs, prepared
from peft import LoraConfig, PeftModel, get_peft_model
from training_runs import LORA, trainer, two_sets, without_ranks
from training_runs import config as config_of

from peft_pblora import PBLoraConfig, PreferenceConfig, SVDLoraConfig, set_preference
from peft_pblora.config import MoSLoraConfig
from trl_parm.training.diagnosis import VertexMetrics, diagnose, vertex_correlation


def opposed(n: int) -> Dataset:
    """Pairs whose chosen response is another one for each objective."""
    return labelled(n, helpful=lambda i: 1, harmless=lambda i: 0)


def evaluated(folder, tokenizer, arm, data, **changes) -> tuple[dict[str, float], str]:
    run = trainer(folder, tokenizer, arm, data, data, peft_config=None, **changes)
    metrics = run.evaluate()
    return metrics, diagnose(metrics, run.objectives, run.adapter_config)


def test_the_correlation_is_that_of_pairs_in_both_orders():
    first, second = torch.randn(2, 40, dtype=torch.float64) + 0.7
    both = [np.concatenate([values, -values]) for values in (first.numpy(), second.numpy())]
    assert vertex_correlation(first, second) == pytest.approx(np.corrcoef(*both)[0, 1], abs=1e-12)
    swapped = torch.where(torch.rand(40) < 0.5, -1.0, 1.0)
    assert vertex_correlation(first * swapped, second * swapped) == pytest.approx(vertex_correlation(first, second))
    assert vertex_correlation(first, -3 * first) == pytest.approx(-1)
    assert np.isnan(vertex_correlation(first, torch.zeros(40, dtype=torch.float64)))


def test_metrics_are_those_of_a_slow_twin(tmp_path, tokenizer):
    data, arm = two_sets(5, 4), tiny_arm()
    metrics, said = evaluated(tmp_path, tokenizer, arm, data)
    rows = {name: list(prepared(data[name], name, tokenizer)) for name in OBJECTIVES}
    changes, losses = {}, {}
    for name in OBJECTIVES:
        with arm.disable_adapter():
            before = {owner: np.array(naive_margins(arm, rows[owner])) for owner in OBJECTIVES}
        set_preference(arm, {other: float(other == name) for other in OBJECTIVES})
        after = {owner: np.array(naive_margins(arm, rows[owner])) for owner in OBJECTIVES}
        changes[name] = np.concatenate([after[owner] - before[owner] for owner in OBJECTIVES])
        losses[name] = [np.log1p(np.exp(-0.1 * margins[name])) for margins in (before, after)]
    one, two = changes.values()
    both = np.concatenate([one, -one]), np.concatenate([two, -two])
    assert metrics["eval_vertex_correlation"] == pytest.approx(np.corrcoef(*both)[0, 1], abs=1e-4)
    assert metrics["eval_vertex_distance"] == pytest.approx(np.abs(one - two).mean(), rel=1e-4)
    for name, (before, after) in losses.items():
        gain = before - after
        assert metrics[f"eval_{name}_untrained_loss"] == pytest.approx(before.mean(), rel=1e-4)
        assert metrics[f"eval_{name}_gain"] == pytest.approx(gain.mean(), abs=1e-5)
        assert metrics[f"eval_{name}_gain_error"] == pytest.approx(gain.std() / len(gain) ** 0.5, rel=1e-3)
    assert f"correlate by {metrics['eval_vertex_correlation']:.2f}" in said


def test_an_adapter_without_its_aware_block_ignores_alpha_exactly(tmp_path, tokenizer):
    arm = tiny_arm()
    for name, parameter in arm.named_parameters():
        if name.endswith("W2"):
            torch.nn.init.zeros_(parameter)
    metrics, said = evaluated(tmp_path, tokenizer, arm, two_sets(5, 5))
    assert (metrics["eval_vertex_correlation"], metrics["eval_vertex_distance"]) == (pytest.approx(1), 0)
    assert "It ignores α" in said
    assert "Try more steps, another learning rate, a larger `lora_alpha` in" in said


def test_an_adapter_that_hardly_follows_alpha_is_told_so(tmp_path, tokenizer):
    arm = tiny_arm()
    for name, parameter in arm.named_parameters():
        if name.endswith("W2"):
            with torch.no_grad():
                parameter.mul_(0.02)
    metrics, said = evaluated(tmp_path, tokenizer, arm, two_sets(5, 5))
    assert 0.9 < metrics["eval_vertex_correlation"] < 1
    assert (
        "It hardly follows α: the changes that training made to held-out pairs at helpful = 1 and harmless = 1" in said
    )


def test_an_untrained_adapter_has_neither_followed_nor_gained(tmp_path, tokenizer):
    run = trainer(tmp_path, tokenizer, evaluation=two_sets(4, 4))
    metrics = run.evaluate()
    assert metrics["eval_vertex_distance"] == metrics["eval_helpful_gain"] == metrics["eval_helpful_gain_error"] == 0
    assert "eval_vertex_correlation" not in metrics
    said = diagnose(metrics, OBJECTIVES, run.adapter_config)
    assert "It ignores α" in said
    assert "For harmless it is no better than untrained: the loss of held-out pairs at harmless = 1 is" in said


@pytest.mark.parametrize("disjoint", [False, True])
def test_a_training_on_labels_that_contradict_each_other_follows_alpha(tmp_path, tokenizer, disjoint):
    """Without an agnostic block, r1 = 0, from either start; saved, it is loaded as it was."""
    settings = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "r1": 0, "r2": 4}
    run = trainer(
        tmp_path, tokenizer, data=opposed(16), evaluation=opposed(16), max_steps=30, per_device_train_batch_size=8,
        learning_rate=0.03, card_prompt=None,
        peft_config=PBLoraConfig(objectives=OBJECTIVES, disjoint_start=disjoint, **settings),
    )  # fmt: skip
    run.train()
    metrics = run.evaluate()
    assert metrics["eval_vertex_correlation"] < 0.5
    assert min(metrics[f"eval_{name}_gain"] for name in OBJECTIVES) > 0
    said = diagnose(metrics, OBJECTIVES, run.adapter_config)
    assert said.startswith("It follows α: ")
    assert "Try" not in said
    run.save_model()
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    assert loaded.peft_config["default"].disjoint_start == disjoint
    for model in (run.model.eval(), loaded):
        set_preference(model, [0.3, 0.7])
    ids = torch.arange(2, 12)[None]
    torch.testing.assert_close(loaded(ids).logits, run.model(ids).logits)


def test_a_training_that_does_harm_says_for_which_objective_in_its_card(tmp_path, tokenizer):
    harm = {**two_sets(6, 6), "helpful": without_ranks(two_sets(6, 6))["helpful"]}
    run = trainer(tmp_path / "arm", tokenizer, data=two_sets(6, 6), evaluation=harm, max_steps=10, card_prompt=None)
    run.train()
    metrics = run.evaluate()
    assert metrics["eval_helpful_gain"] < 0 < metrics["eval_harmless_gain"]
    run.save_model()
    card = (tmp_path / "arm/README.md").read_text()
    loss = metrics["eval_helpful_loss@helpful"]
    assert (
        f"For helpful it is no better than untrained: the loss of held-out pairs at helpful = 1 is {loss:.4g}" in card
    )
    assert "For harmless" not in card
    saved = json.loads((tmp_path / "arm/adapter_config.json").read_text())["card"]["diagnosis"]
    assert saved == diagnose(metrics, OBJECTIVES, run.adapter_config)
    assert saved in card


def test_one_objective_and_a_plain_lora_has_its_gain_alone(tmp_path, tokenizer):
    data = {"helpful": pairs(5)}
    run = trainer(tmp_path, tokenizer, data=data, evaluation=without_ranks(data), peft_config=LORA, max_steps=10)
    run.train()
    metrics = run.evaluate()
    assert not any("vertex" in name for name in metrics)
    said = diagnose(metrics, ["helpful"], run.adapter_config)
    assert said.startswith("For helpful it is no better than untrained: the loss of held-out pairs is ")
    assert "Try more steps, or another learning rate." in said


def test_without_vertices_or_an_adapter_nothing_is_said(tmp_path, tokenizer):
    metrics, said = evaluated(tmp_path, tokenizer, tiny_arm(), two_sets(4, 4), eval_preferences=["[0.5, 0.5]"])
    assert said == ""
    assert not any("gain" in name or "vertex" in name for name in metrics)
    whole = trainer(tmp_path, tokenizer, tiny_llama(), {"x": pairs(4)}, {"x": pairs(4)}, peft_config=None)
    assert diagnose(whole.evaluate(), ["x"], None) == ""


def test_three_objectives_name_the_two_vertices_that_are_most_alike():
    objectives, preferences = ["a", "b", "c"], [*torch.eye(3).flip(0), torch.full((3,), 1 / 3)]
    config = PBLoraConfig(objectives=objectives)
    loss = config_of("unused", beta=0.3).arm_loss(objectives)
    torch.manual_seed(0)
    changes = torch.randn(30, 3, dtype=torch.float64)
    changes[:, 2] = 0.5 * changes[:, 0] + 0.01 * changes[:, 2]
    untrained = torch.randn(30, dtype=torch.float64)
    margins = torch.cat([untrained[:, None] + changes.flip(1), torch.zeros(30, 1)], 1)
    labels, weights = torch.where(torch.rand(30, 3) < 0.5, -1.0, 1.0).double(), torch.rand(30, dtype=torch.float64)
    labels[:4] = 0  # pairs that only fill up
    metrics = VertexMetrics(objectives, preferences, loss)
    for rows in (slice(0, 11), slice(11, 30)):
        metrics.add(labels[rows], margins[rows], weights[rows], untrained[rows])
    found = metrics.means()
    for i, j in ((0, 1), (0, 2), (1, 2)):
        expected = vertex_correlation(changes[4:, i], changes[4:, j])
        assert found[f"vertex_correlation@{objectives[i]},{objectives[j]}"] == pytest.approx(expected)
    assert found["vertex_correlation"] == found["vertex_correlation@a,c"] > 0.99
    assert "at a = 1 and c = 1 correlate by 1.00" in diagnose(found, objectives, config, prefix="")
    for i, name in enumerate(objectives):
        before, after = (loss.of_pairs(m, labels)[4:, i] for m in (untrained, untrained + changes[:, i]))
        gain = np.average(before - after, weights=weights[4:])
        spread = (weights[4:] * (before - after - gain)).square().sum().sqrt() / weights[4:].sum()
        assert found[f"{name}_gain"] == pytest.approx(gain)
        assert found[f"{name}_gain_error"] == pytest.approx(spread.item())
        assert found[f"{name}_untrained_loss"] == pytest.approx(np.average(before, weights=weights[4:]))


@pytest.mark.parametrize(
    ("config", "remedy"),
    [
        (PBLoraConfig(), "or `r1` = 0 there"),
        (PBLoraConfig(), ", a larger `lora_alpha` in the adapter's configuration"),
        (PBLoraConfig(r1=0), ", or a larger `lora_alpha`"),
        (PBLoraConfig(r1=0, disjoint_start=True), "or another learning rate."),
        (MoSLoraConfig(), "an `embedding_size` of 64"),
        (MoSLoraConfig(embedding_size=8), "or another learning rate."),
        (SVDLoraConfig(), ", or a larger `lora_alpha`"),
    ],
)
def test_what_to_try_depends_on_the_adapter(config: PreferenceConfig, remedy):
    metrics = {"eval_vertex_distance": 0.5, "eval_vertex_correlation": 0.95}
    assert remedy in diagnose(metrics, ["a", "b"], config)


def test_an_adapter_that_is_trained_further_forgets_what_was_measured_before(tmp_path, tokenizer):
    arm = tiny_arm()
    config = arm.peft_config["default"]
    config.card = {"diagnosis": "of old", "accuracies": [["of old"]], "title": "kept"}
    run = trainer(tmp_path / "arm", tokenizer, arm, evaluation=two_sets(4, 4), peft_config=None, card_prompt=None)
    run.evaluate()
    run.save_model()
    card = (tmp_path / "arm/README.md").read_text()
    assert "# kept" in card
    assert "of old" not in card
    assert "α: the changes" in card


def test_a_lora_with_adapters_disabled_is_the_untrained_model(tmp_path, tokenizer):
    """The untrained loss is that of the backbone, whatever the adapter does."""
    lora = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    data = {"helpful": pairs(5)}
    metrics, _ = evaluated(tmp_path, tokenizer, lora, data)
    margins = np.array(naive_margins(tiny_llama(), prepared(data["helpful"], "helpful", tokenizer)))
    assert metrics["eval_helpful_untrained_loss"] == pytest.approx(np.log1p(np.exp(-0.1 * margins)).mean(), rel=1e-4)
