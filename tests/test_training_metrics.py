# SPDX-License-Identifier: Apache-2.0
"""What a run reports while it trains, and evaluation at fixed preferences."""

import math

import pytest
from conftest import tiny_arm
from datasets import Dataset, IterableDataset
from pair_data import OBJECTIVES, labelled, naive_margins, pairs, prepared, split_by_objective
from training_runs import LORA, trainer, two_sets, without_ranks

from peft_pblora import set_preference


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


def test_several_data_sets_of_one_objective(tmp_path, tokenizer):
    evaluation = {"near": pairs(3), "far": without_ranks({"x": pairs(3)})["x"]}
    run = trainer(tmp_path, tokenizer, data={"helpful": pairs(4)}, evaluation=evaluation, peft_config=LORA)
    metrics = run.evaluate()
    near, far = (metrics[f"eval_{name}_helpful_margin@helpful"] for name in ("near", "far"))
    assert near == pytest.approx(-far, rel=1e-4)
    assert {"eval_near_loss", "eval_far_loss"} <= set(metrics)


def test_evaluate_takes_raw_data_and_streams(tmp_path, tokenizer):
    run = trainer(tmp_path, tokenizer, tiny_arm(), peft_config=None)
    data = two_sets(3, 2)
    given = run.evaluate(data, metric_key_prefix="test")
    streamed = run.evaluate({name: rows.to_iterable_dataset() for name, rows in data.items()})
    assert given["test_helpful_accuracy@uniform"] == streamed["eval_helpful_accuracy@uniform"]
    assert given["test_loss"] == pytest.approx(streamed["eval_loss"])


def test_evaluate_and_predict_take_what_the_trainer_takes(tmp_path, tokenizer):
    data, path = {"helpful": pairs(3)}, str(tmp_path / "held_out.jsonl")
    data["helpful"].to_json(path)
    run = trainer(tmp_path, tokenizer, data=data, evaluation={"near": pairs(3), "far": pairs(2, 9)}, peft_config=LORA)
    found = run.evaluate(data)["eval_loss"]
    assert found == run.evaluate("near")["eval_loss"] == run.evaluate(path)["eval_loss"]
    assert (
        found
        == run.evaluate(run.eval_dataset)["eval_near_loss"]
        == run.evaluate(run.eval_dataset["near"])["eval_loss"]
    )
    for given in (data, path, run.eval_dataset["near"]):
        output = run.predict(given)
        assert (output.predictions.shape, output.metrics["test_loss"]) == ((3, 1, 1), found)
    with pytest.raises(ValueError, match="`predict` takes one data set, .* but got those called near, far"):
        run.predict(run.eval_dataset)
    with pytest.raises(ValueError, match="There is no data at 'e.jsonl'"):
        run.evaluate("e.jsonl")


def test_a_stream_of_texts_and_messages_is_evaluated(tmp_path, tokenizer):
    rows = [pairs(1)[0], pairs(2, conversational=True)[1]]
    data = {"helpful": IterableDataset.from_generator(lambda: iter(rows)), "harmless": pairs(3)}
    run = trainer(tmp_path, tokenizer, data=data, evaluation=data, max_steps=1)
    run.train()
    assert run.predict(data).label_ids[..., 0].sum() == 2


def test_an_objective_that_evaluation_has_no_label_for_adds_nothing_to_its_loss(tmp_path, tokenizer):
    """Neither is it a loss of 0, at a distance from its ideal."""
    ideal = {"helpful": 5.0, "harmless": 0.0}
    run = trainer(
        tmp_path, tokenizer, data=labelled(3), evaluation=labelled(3, helpful=lambda i: -1), ideal_losses=ideal,
        aggregation="tchebycheff", eval_preferences=["[0.5, 0.5]"],
    )  # fmt: skip
    metrics = run.evaluate()
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_harmless_loss@uniform"] / 2)


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
