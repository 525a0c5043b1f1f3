# SPDX-License-Identifier: Apache-2.0
import copy
import math

import pytest
import torch
from conftest import OBJECTIVES, tiny_arm, tiny_llama
from datasets import Dataset
from peft import LoraConfig, PeftModel

from peft_pblora import PBLoraConfig, as_preference, get_preference, set_preference
from trl_parm import PreferenceARMConfig, PreferenceARMTrainer
from trl_parm.training import data
from trl_parm.training.data import JointPreferenceDataset, PreferenceCollator, tokenize_pairs
from trl_parm.training.log_probs import response_log_probs
from trl_parm.training.losses import accuracies, objective_losses, pair_losses
from trl_parm.training.preferences import step_preference


def pairs(n: int, offset: int = 0, conversational: bool = False) -> Dataset:
    """`n` pairs whose chosen response ends in `w1` and whose rejected one in `w2`, of different lengths."""
    rows = []
    for i in range(n):
        prompt, stem = f"w{(i + offset) % 50}", " w5" * (i % 3)
        row = {"prompt": prompt, "chosen": f" w{i % 7}{stem} w1", "rejected": f" w{i % 5} w2"}
        if conversational:
            roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
            row = {key: [{"role": roles[key], "content": text.strip()}] for key, text in row.items()}
        rows.append(row)
    return Dataset.from_list(rows)


def config(folder, **changes) -> PreferenceARMConfig:
    settings = {
        "per_device_train_batch_size": 2, "max_steps": 3, "learning_rate": 0.1, "beta": 0.1, "logging_steps": 1,
        "bf16": False, "use_cpu": True, "report_to": "none", "save_strategy": "no", "gradient_checkpointing": False,
    }  # fmt: skip
    return PreferenceARMConfig(str(folder), **{**settings, **changes})


def trainer(folder, tokenizer, model=None, data=None, evaluation=None, peft_config="pblora", **changes):
    if peft_config == "pblora":
        peft_config = PBLoraConfig(objectives=OBJECTIVES, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return PreferenceARMTrainer(
        tiny_llama() if model is None else model,
        config(folder, **changes),
        train_dataset={"helpful": pairs(6), "harmless": pairs(4, 9)} if data is None else data,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def naive_log_probs(model, prompt: list[int], response: list[int]) -> float:
    """Sums the log-probability of each response token, one forward for each token, in float64."""
    model, total = copy.deepcopy(model).double(), 0.0
    for i, token in enumerate(response):
        ids = torch.tensor([prompt + response[:i]])
        total += torch.log_softmax(model(input_ids=ids).logits[0, -1], -1)[token].item()
    return total


def test_response_log_probs_equal_the_naive_twin():
    model = tiny_llama()
    rows = [([5, 6, 7], [8, 9, 1]), ([5], [10, 11, 12, 13, 1]), ([2, 3, 4, 5, 6], [7])]
    width = max(len(p) + len(r) for p, r in rows)
    ids = torch.tensor([p + r + [0] * (width - len(p + r)) for p, r in rows])
    attention = torch.tensor([[1] * len(p + r) + [0] * (width - len(p + r)) for p, r in rows])
    completion = torch.tensor([[0] * len(p) + [1] * len(r) + [0] * (width - len(p + r)) for p, r in rows])
    log_probs = response_log_probs(model, ids, attention, completion)
    expected = torch.tensor([naive_log_probs(model, p, r) for p, r in rows])
    torch.testing.assert_close(log_probs, expected, atol=1e-4, rtol=1e-5)


def test_loss_is_the_formula():
    margins = torch.tensor([3.0, -2.0, 0.5], dtype=torch.float64)
    labels = torch.tensor([[1.0, -1.0], [0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    beta = torch.tensor([0.1, 0.5], dtype=torch.float64)
    losses = pair_losses(margins, labels, beta)
    for pair in range(3):
        for i in range(2):
            z, b, m = labels[pair, i].item(), beta[i].item(), margins[pair].item()
            expected = -math.log(1 / (1 + math.exp(-z * b * m))) if z else 0.0
            assert losses[pair, i].item() == pytest.approx(expected)
    means = objective_losses(losses, labels)
    torch.testing.assert_close(means, torch.stack([losses[[0, 2], 0].mean(), losses[[0, 1], 1].mean()]))
    assert accuracies(margins, labels).nan_to_num(-1).tolist() == [[1, 0], [-1, 0], [0, -1]]


def test_trainer_loss_equals_the_naive_twin(tmp_path, tokenizer):
    """One step's logged loss: Σ α_i l_i from per-token float64 log-probabilities."""
    data = {"helpful": pairs(2), "harmless": pairs(2, 9)}
    run = trainer(tmp_path, tokenizer, tiny_arm(), data, peft_config=None, beta={"helpful": 0.1, "harmless": 0.3})
    model = copy.deepcopy(run.model).eval()
    batch = next(iter(run.get_train_dataloader()))
    loss = run.compute_loss(run.model, batch).item()
    alpha = get_preference(run.model)
    torch.testing.assert_close(alpha, step_preference(run.args.seed, 0, OBJECTIVES, run.args.concentration))
    set_preference(model, alpha)
    expected = 0.0
    for i, (name, beta) in enumerate([("helpful", 0.1), ("harmless", 0.3)]):
        values = []
        for row in tokenize_pairs(data[name], name, tokenizer, 1024):
            chosen = naive_log_probs(model, row["prompt_ids"], row["chosen_ids"])
            rejected = naive_log_probs(model, row["prompt_ids"], row["rejected_ids"])
            values.append(-math.log(1 / (1 + math.exp(-beta * (chosen - rejected)))))
        expected += alpha[i].item() * sum(values) / len(values)
    assert loss == pytest.approx(expected, rel=1e-5)


def test_train_changes_the_adapter_and_nothing_else(tmp_path, tokenizer):
    run = trainer(tmp_path, tokenizer)
    before = {name: p.clone() for name, p in run.model.named_parameters()}
    run.train()
    assert run.state.log_history[-1]["train_loss"] is not None
    for name, p in run.model.named_parameters():
        assert torch.equal(p, before[name]) != ("pblora_" in name), name


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_trains_alike(tmp_path, tokenizer, reentrant):
    weights = []
    for checkpointing in (False, True):
        run = trainer(
            tmp_path, tokenizer, gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant},
        )  # fmt: skip
        run.train()
        weights.append([p.detach().clone() for p in run.model.parameters() if p.requires_grad])
    torch.testing.assert_close(weights[0], weights[1])


def test_training_raises_the_accuracy_of_each_objective_at_its_own_vertex(tmp_path, tokenizer):
    """Two objectives that contradict each other on the same pairs: only the preference can tell them apart."""
    data = {"helpful": pairs(40), "harmless": pairs(40).rename_columns({"chosen": "rejected", "rejected": "chosen"})}
    run = trainer(
        tmp_path, tokenizer, data=data, evaluation=data, max_steps=60, learning_rate=0.05, beta=1.0,
        per_device_train_batch_size=8,
    )  # fmt: skip
    run.train()
    metrics = run.evaluate()
    for mine, other in (OBJECTIVES, OBJECTIVES[::-1]):
        assert metrics[f"eval_{mine}_accuracy@{mine}"] > 0.9
        assert metrics[f"eval_{mine}_accuracy@{other}"] < 0.1


def test_evaluation_is_deterministic_and_names_every_cell(tmp_path, tokenizer):
    data = {"helpful": pairs(5), "harmless": pairs(3, 9)}
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
    for name in OBJECTIVES:
        key = f"eval_{name}_accuracy@helpful"
        set_preference(run.model, {"helpful": 1.0, "harmless": 0.0})
        rows = tokenize_pairs(data[name], name, tokenizer, None)
        margins = [
            naive_log_probs(run.model, row["prompt_ids"], row["chosen_ids"])
            - naive_log_probs(run.model, row["prompt_ids"], row["rejected_ids"])
            for row in rows
        ]
        assert first[key] == pytest.approx(sum(m > 0 for m in margins) / len(rows))


def test_ratio_accuracy_is_relative_to_the_untrained_model(tmp_path, tokenizer):
    data = {"helpful": pairs(5), "harmless": pairs(5, 9)}
    fresh = trainer(tmp_path, tokenizer, data=data, evaluation=data).evaluate()
    assert fresh["eval_helpful_ratio_accuracy@helpful"] == 0.0  # a fresh adapter changes nothing: no margin above 0


def test_one_objective_with_plain_lora_is_genarm(tmp_path, tokenizer):
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    run = trainer(tmp_path, tokenizer, data={"helpful": pairs(4)}, evaluation={"helpful": pairs(4)}, peft_config=lora)
    run.train()
    assert "eval_helpful_accuracy@helpful" in run.evaluate()


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


def test_step_preferences_depend_on_seed_and_step_alone():
    state = torch.get_rng_state()
    draws = {(seed, step): step_preference(seed, step, OBJECTIVES, 0.5) for seed in range(3) for step in range(50)}
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(draws[1, 7], step_preference(1, 7, OBJECTIVES, 0.5))
    assert len({tuple(draw.tolist()) for draw in draws.values()}) == 150
    for draw in draws.values():
        as_preference(draw, OBJECTIVES)
    first = torch.stack([draw[0] for draw in draws.values()])
    assert abs(first.mean().item() - 0.5) < 0.12


@pytest.mark.parametrize("conversational", [False, True])
def test_tokenized_pairs(tokenizer, conversational):
    row = tokenize_pairs(pairs(1, conversational=conversational), "helpful", tokenizer, None)[0]
    prompt = "user w0 <eos> assistant" if conversational else "w0"
    assert tokenizer.convert_ids_to_tokens(row["prompt_ids"]) == prompt.split()
    assert tokenizer.convert_ids_to_tokens(row["chosen_ids"]) == ["w0", "w1", "<eos>"]
    assert tokenizer.convert_ids_to_tokens(row["rejected_ids"]) == ["w0", "w2", "<eos>"]


def test_too_long_pairs_are_left_out_and_counted(tokenizer, monkeypatch):
    lines = []
    monkeypatch.setattr(data.logger, "warning", lines.append)
    kept = tokenize_pairs(pairs(6), "helpful", tokenizer, max_length=5)
    assert len(kept) == 4
    assert lines == ["helpful: 2 of 6 pairs are longer than 5 tokens and were left out."]
    assert all(len(r["prompt_ids"] + r["chosen_ids"]) <= 5 for r in kept)


def test_collator():
    collator = PreferenceCollator(pad_token_id=0, objectives=OBJECTIVES)
    pair = {"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8, 9]}
    other = {"prompt_ids": [4], "chosen_ids": [3, 2], "rejected_ids": [3]}
    batch = collator([{"helpful": pair, "harmless": other}])
    assert {key: value.tolist() for key, value in batch.items()} == {
        "input_ids": [[5, 6, 7, 0], [4, 3, 2, 0], [5, 6, 8, 9], [4, 3, 0, 0]],
        "attention_mask": [[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]],
        "completion_mask": [[0, 0, 1, 0], [0, 1, 1, 0], [0, 0, 1, 1], [0, 1, 0, 0]],
        "pair_labels": [[1.0, 0.0], [0.0, 1.0]],
    }


def test_repeated_pairs_have_no_label():
    pair = {"prompt_ids": [5], "chosen_ids": [7], "rejected_ids": [8]}
    rows = [{"helpful": pair, "harmless": pair}, {"helpful": pair, "harmless": {**pair, "repeated": True}}]
    labels = PreferenceCollator(pad_token_id=0, objectives=OBJECTIVES)(rows)["pair_labels"]
    assert labels.tolist() == [[1, 0], [0, 1], [1, 0], [0, 0]]


def test_short_data_sets_start_over():
    joint = JointPreferenceDataset({"helpful": pairs(5), "harmless": pairs(2)})
    assert not any(pair["repeated"] for i in range(5) for pair in joint[i].values())
    once = JointPreferenceDataset(joint.datasets, once=True)
    assert [once[i]["harmless"]["repeated"] for i in range(5)] == [False, False, True, True, True]
    rows = [joint[i] for i in range(len(joint))]
    assert [row["helpful"]["prompt"] for row in rows] == [f"w{i}" for i in range(5)]
    assert [row["harmless"]["prompt"] for row in rows] == ["w0", "w1", "w0", "w1", "w0"]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"data": pairs(3)}, TypeError, "Give a mapping such as"),
        ({"data": {"helpful": pairs(3), "harmful": pairs(3)}}, ValueError, "but the adapter was made for"),
        ({"data": {"helpful": pairs(3), "harmless": Dataset.from_list([])}}, ValueError, "'harmless' is empty"),
        (
            {"data": {"helpful": pairs(3), "harmless": pairs(3).remove_columns("chosen")}},
            ValueError,
            r"lacks the columns \['chosen'\]",
        ),
        ({"evaluation": {"helpful": pairs(3)}}, ValueError, r"`eval_dataset` has the objectives \['helpful'\]"),
        ({"max_length": 2}, ValueError, "fits into `max_length`=2"),
        ({"beta": {"helpful": 0.1}}, ValueError, "`beta` names the objectives"),
        ({"beta": 0.0}, ValueError, "every β must be positive"),
        ({"concentration": 0.0}, ValueError, "must be positive"),
        ({"peft_config": None}, ValueError, "no preference-conditioned adapter, but there are 2 objectives"),
        ({"eval_preferences": [[0.5, 0.6]]}, ValueError, "must sum to 1"),
    ],
)
def test_bad_input_is_refused_before_the_first_step(tmp_path, tokenizer, changes, error, message):
    with pytest.raises(error, match=message):
        trainer(tmp_path / "out", tokenizer, **changes)
    assert not (tmp_path / "out").exists()


def test_tokenizer_without_pad_token_uses_its_end_token(tmp_path, tokenizer):
    tokenizer.pad_token = None
    assert trainer(tmp_path, tokenizer).processing_class.pad_token == "<eos>"
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="neither a pad token nor an end token"):
        trainer(tmp_path, tokenizer)
