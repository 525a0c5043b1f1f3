# SPDX-License-Identifier: Apache-2.0
"""TRL's surface: defaults, cards, tags, and bad input that is refused before the first step."""

import copy
import json

import pytest
import torch
from conftest import tiny_arm, tiny_gpt2, tiny_llama
from datasets import Dataset, DatasetDict, IterableDatasetDict
from pair_data import labelled, pairs
from peft import LoraConfig
from training_runs import LORA, PBLORA, config, trainer, two_sets, write_run
from transformers import BartForConditionalGeneration, BertForMaskedLM

from trl_parm import PreferenceARMConfig, PreferenceARMTrainer
from trl_parm.cli import train
from trl_parm.training import data as training_data
from trl_parm.training.metrics import check_metric


def test_defaults_of_the_arguments(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_llama().save_pretrained("base")
    run = PreferenceARMTrainer(
        "base", train_dataset=two_sets(), processing_class=tokenizer, peft_config=copy.deepcopy(PBLORA)
    )
    assert run.args.output_dir == "base-PARM"
    assert run.args.learning_rate == 5e-4
    assert run.arm_loss.beta.tolist() == pytest.approx([0.01, 0.01])


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


def test_code_from_a_model_folder_needs_trust(tmp_path, tokenizer):
    config_json = {"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}
    (tmp_path / "config.json").write_text(json.dumps(config_json))
    with pytest.raises(ValueError, match="custom code"):
        PreferenceARMTrainer(
            str(tmp_path), config(tmp_path / "out"), train_dataset=pairs(3), processing_class=tokenizer
        )


def test_several_gpus_need_several_processes(tmp_path, tokenizer):
    args = config(tmp_path / "out")
    args._n_gpu = 2
    with pytest.raises(ValueError, match="2 GPUs in one process would need torch.nn.DataParallel"):
        PreferenceARMTrainer(tiny_llama(), args, train_dataset=pairs(3), processing_class=tokenizer)


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


def test_a_pad_token_that_the_model_has_no_embedding_for_is_refused(tmp_path, tokenizer):
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    with pytest.raises(ValueError, match=r"'\[PAD\]' has the id 64, but the model has embeddings for 64 tokens"):
        trainer(tmp_path, tokenizer)
    model = tiny_llama()
    model.resize_token_embeddings(len(tokenizer))
    trainer(tmp_path, tokenizer, model, max_steps=1).train()


def identical(n: int) -> Dataset:
    return Dataset.from_list([{**row, "rejected": row["chosen"]} for row in pairs(n)])


def ids_beyond(token: int) -> dict[str, Dataset]:
    rows = Dataset.from_dict({"prompt_ids": [[5]] * 3, "chosen_ids": [[6], [7], [token]], "rejected_ids": [[8]] * 3})
    return {"helpful": rows, "harmless": pairs(3)}


GPT2 = LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM")


def broken_llama():
    model = tiny_llama()
    model.model.layers[0].self_attn.o_proj.weight.data[0, 0] = torch.nan
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            BartForConditionalGeneration,
            "BartForConditionalGeneration is an encoder-decoder, but .* causal language",
        ),
        (BertForMaskedLM, "BertForMaskedLM is no language model that writes, but a reward model must be a causal"),
    ],
)
def test_models_that_are_no_causal_language_models_are_refused(tmp_path, tokenizer, model, message):
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = model.config_class(**sizes, intermediate_size=32, encoder_ffn_dim=32, decoder_ffn_dim=32)
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path / "out", tokenizer, model(config), pairs(3), peft_config=None)
    assert not (tmp_path / "out").exists()


def test_positions_of_the_model_are_a_limit_of_length(tmp_path, tokenizer):
    rows = [*pairs(3), {**pairs(1)[0], "prompt": " ".join(["w4"] * 70)}]
    for changes in ({}, {"max_length": None}):
        run = trainer(tmp_path, tokenizer, tiny_gpt2(), {"reward": Dataset.from_list(rows)}, None, GPT2, **changes)
        assert len(run.train_dataset) == 3
    run.train()
    cut = {"truncation_mode": "cut_prompt", "max_steps": 1, "per_device_train_batch_size": 4}
    run = trainer(tmp_path, tokenizer, tiny_gpt2(), {"reward": Dataset.from_list(rows)}, None, GPT2, **cut)
    assert run.train_dataset.lengths()[3] == 64
    run.train()


def test_an_objective_that_evaluation_has_no_label_for_is_said(tmp_path, tokenizer, monkeypatch):
    lines = []
    monkeypatch.setattr(training_data.logger, "warning", lines.append)
    ties = labelled(3, helpful=lambda i: -1)
    metrics = trainer(tmp_path, tokenizer, data=labelled(3), evaluation=ties).evaluate()
    assert lines == [
        "No pair of `eval_dataset` has a label for ['helpful']: all are ties or missing. Give labels to at least one "
        "pair, or leave the objective out."
    ]
    assert "eval_harmless_accuracy@helpful" in metrics


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
        (
            {"data": IterableDatasetDict(train=pairs(3).to_iterable_dataset()), "peft_config": LORA},
            ValueError,
            r"has the splits \['train'\]",
        ),
        ({"data": {"helpful": pairs(3), "harmful": pairs(3)}}, ValueError, "but the adapter was made for"),
        ({"data": {"helpful": pairs(3)}}, ValueError, r"`train_dataset` has the objectives \['helpful'\]"),
        ({"data": labelled(3).remove_columns("helpful")}, ValueError, r"has the objectives \['harmless'\]"),
        ({"data": {"helpful": pairs(3), "harmless": pairs(3).select([])}}, ValueError, "'harmless' is empty"),
        (
            {"data": {"helpful": pairs(3), "harmless": pairs(3).remove_columns("chosen")}},
            ValueError,
            r"lacks the columns \['chosen'\]",
        ),
        (
            {"evaluation": {"helpful": pairs(3)}},
            ValueError,
            r"`eval_dataset` has the objectives \['helpful'\], but .*. Give pairs for harmless too, or name data sets",
        ),
        (
            {"evaluation": {**two_sets(), "other": pairs(3)}},
            ValueError,
            "`eval_dataset` has the objectives .*'other'.*. Leave the others out, or name data sets and label columns",
        ),
        ({"evaluation": {"one": two_sets(), "two": None}}, ValueError, "`eval_dataset` is required"),
        ({"data": {"helpful": pairs(3), "harmless": identical(3)}}, ValueError, "since both responses are the same"),
        ({"data": labelled(3, harmless=lambda i: 2)}, ValueError, "is 2, but it must be 0 or 1"),
        ({"max_length": 2}, ValueError, "longer than 2 tokens"),
        (
            {"data": labelled(3, helpful=lambda i: -1)},
            ValueError,
            r"No pair of `train_dataset` has a label for \['helpful'\]: all are ties or missing",
        ),
        ({"data": ids_beyond(64)}, ValueError, "token id 64 in row 2 of the data set 'helpful'"),
        ({"activation_offloading": True}, ValueError, "where this run computes already"),
        ({"beta": {"helpful": 0.1}}, ValueError, "`beta` names the objectives"),
        ({"beta": "helpful"}, ValueError, "`beta` is 'helpful', but it must be a positive number, or a mapping from"),
        ({"beta": [0.1, 0.2]}, ValueError, "every β must be positive"),
        ({"learning_rate": 0.0}, ValueError, "it must be positive"),
        ({"learning_rate": "5e-4"}, ValueError, "`learning_rate` is '5e-4', but it must be one finite number"),
        ({"concentration": [1, 2]}, ValueError, r"`concentration` is \[1, 2\], but it must be one finite number"),
        ({"target_margin": float("nan")}, ValueError, "`target_margin` is nan, but it must be one finite number"),
        ({"max_length": 8.5}, ValueError, "`max_length` is 8.5, but it must be a whole number, 1 or larger, or None"),
        ({"pad_to_multiple_of": 0}, ValueError, "`pad_to_multiple_of` is 0, but it must be a whole number"),
        ({"label_columns": "helpful"}, ValueError, "`label_columns` is 'helpful', but it must be a mapping, or that"),
        ({"label_columns": "[0]"}, ValueError, r"`label_columns` is '\[0\]', but it must be a mapping"),
        ({"model_init_kwargs": "{dtype}"}, ValueError, "`model_init_kwargs` is '{dtype}', but it must be a mapping"),
        (
            {"ideal_losses": {"helpful": "x"}, "aggregation": "tchebycheff"},
            ValueError,
            "`ideal_losses` is {'helpful': 'x'}, but each of them must be a finite number",
        ),
        ({"label_smoothing_factor": 0.1}, ValueError, "the loss of pairs has `label_smoothing`"),
        ({"neftune_noise_alpha": 5}, ValueError, "such noise needs `disable_dropout=False`"),
        ({"beta": 0.0}, ValueError, "every β must be positive"),
        ({"beta": float("nan")}, ValueError, "every β must be positive"),
        ({"concentration": 0.0}, ValueError, "must be positive"),
        ({"loss_type": "ipo"}, ValueError, "must be one of sigmoid, hinge"),
        ({"label_smoothing": 0.5}, ValueError, r"must lie in \[0, 0.5\)"),
        ({"global_weight": -1.0}, ValueError, "must be 0 or larger"),
        ({"aggregation": "tchebycheff", "preference_per": "pair"}, ValueError, "needs one preference for all pairs"),
        ({"ideal_losses": {"helpful": 0.1}}, ValueError, "but they are of `aggregation='tchebycheff'`"),
        (
            {"ideal_losses": {"helpful": 0.1}, "aggregation": "tchebycheff"},
            ValueError,
            "`ideal_losses` names the objectives",
        ),
        ({"append_end_token": "<APPEND_END_TOKEN>"}, ValueError, "'<APPEND_END_TOKEN>', but it must be True or False"),
        ({"share_prompt": 1}, ValueError, "it must be True or False"),
        ({"peft_config": None}, ValueError, "no preference-conditioned adapter, but there are 2 objectives"),
        ({"peft_config": LORA}, ValueError, "no preference-conditioned adapter, but there are 2 objectives"),
        ({"peft_config": LORA, "data": labelled(3)}, ValueError, "does not say which column belongs to the objective"),
        ({"peft_config": {"r": 8}}, TypeError, "must be a `PeftConfig`"),
        ({"eval_preferences": [[0.5, 0.6]]}, ValueError, r"`eval_preferences` has \[0.5, 0.6\]. .* must sum to 1"),
        ({"train_preferences": [[0.5, 0.6]]}, ValueError, r"`train_preferences` has \[0.5, 0.6\]. .* must sum to 1"),
        ({"eval_preferences": [{"helpfull": 1.0}]}, ValueError, r"`eval_preferences` has .* Did you mean 'helpful'"),
        ({"train_preferences": [[[0.5, 0.5]]]}, ValueError, r"`train_preferences` has .* has no single name"),
        (
            {"eval_preferences": ["helpful"]},
            ValueError,
            "An entry of `eval_preferences` is 'helpful', but it must be a vector such as .*, or a mapping such as",
        ),
        ({"train_preferences": ["uniform"]}, ValueError, "An entry of `train_preferences` is 'uniform', but it must"),
        ({"eval_preferences": "helpful"}, ValueError, "`eval_preferences` is 'helpful', but it must be a list of"),
        ({"eval_preferences": [True]}, ValueError, "An entry of `eval_preferences` is True, but it must be a vector"),
        ({"eval_preferences": []}, ValueError, "but it must name one. Leave it out for the vertices"),
        (
            {
                "data": {"judged": labelled(3), "helpful": pairs(3)},
                "label_columns": {"helpful": "helpfull", "harmless": "harmless"},
            },
            ValueError,
            r"names \['helpfull'\], which no labelled data set of `train_dataset` has",
        ),
    ],
)
def test_bad_input_is_refused_before_the_first_step(tmp_path, tokenizer, changes, error, message):
    with pytest.raises(error, match=message):
        trainer(tmp_path / "out", tokenizer, **changes)
    assert not (tmp_path / "out").exists()


def test_one_preference_stands_for_a_list_of_one(tmp_path):
    """As on the command line, and from wherever numbers come."""
    by_name = {"helpful": 0.5, "harmless": 0.5}
    for given in (
        [0.5, 0.5],
        "[0.5, 0.5]",
        [[0.5, 0.5]],
        ["[0.5, 0.5]"],
        torch.tensor([0.5, 0.5]),
        [torch.ones(2) / 2],
    ):
        assert config(tmp_path, eval_preferences=given, train_preferences=given).eval_preferences == [[0.5, 0.5]]
    for given in (by_name, [by_name], json.dumps(by_name)):
        assert config(tmp_path, train_preferences=given).train_preferences == [by_name]


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


def test_a_processor_is_no_tokenizer(tmp_path, tokenizer):
    class Processor:
        """As models that read images too have one."""

        def __init__(self, tokenizer):
            self.tokenizer = tokenizer

    with pytest.raises(TypeError, match="is a Processor, .* Give a tokenizer, such as the `tokenizer` of a processor"):
        trainer(tmp_path, Processor(tokenizer))


@pytest.mark.parametrize("key", ["train_data", "eval_data"])
def test_damage_far_into_a_stream_is_told_by_its_line(tmp_path, monkeypatch, key):
    """pyarrow reads some 10 MB at a time, and counts rows from within them."""
    write_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    row = {"prompt": "w1", "response_0": "w2", "response_1": "w3", "helpful": 1, "harmless": 0, "note": "x" * 100_000}
    with open("far.jsonl", "w") as file:
        for number in range(1, 121):
            file.write(json.dumps(row)[: -1 if number == 115 else None] + "\n")
    labels = {"helpful": "helpful", "harmless": "harmless"}
    data = {"train_data": [{"path": "judged.jsonl"}], "eval_data": []}
    data[key] = [{"path": "far.jsonl", "streaming": True}]
    words = [w for k, v in {**data, "label_columns": labels}.items() for w in (f"--{k}", json.dumps(v))]
    with pytest.raises(ValueError, match="^Line 115 of 'far.jsonl' is no JSON object"):
        train.main(["--config", "config.yaml", *words, "--max_steps", "40"])


def test_pairs_that_it_trains_on_are_no_held_out_ones(tmp_path, monkeypatch, capsys):
    write_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    data = [{"path": "judged.jsonl", "split": "train[:9]"}, {"path": "harmless.jsonl", "objective": "harmless"}]
    train.main(["--config", "config.yaml", "--eval_data", json.dumps(data), "--max_steps", "1"])
    said = capsys.readouterr().out
    assert "Warning: the evaluation pairs of 'harmless.jsonl' are pairs that it trains on" in said
    assert "'judged.jsonl'" not in said


@pytest.mark.parametrize("name", ["loss", "eval_loss", "eval_vertex_correlation", "eval_helpful_gain"])
def test_metric_for_the_best_model(tmp_path, tokenizer, name):
    trainer(tmp_path, tokenizer, metric_for_best_model=name)


@pytest.mark.parametrize(
    ("name", "larger"),
    [
        ("loss", False),
        ("helpful_loss@helpful", False),
        ("eval_near_helpful_loss@helpful=0.2,harmless=0.8", False),
        ("vertex_correlation", False),
        ("eval_vertex_correlation@helpful,harmless", False),
        ("helpful_gain_error", False),
        ("helpful_gain", True),
        ("vertex_distance", True),
        ("helpful_margin@uniform", True),
        ("helpful_accuracy@weight_loss", True),
    ],
)
def test_which_values_of_a_metric_are_the_better_ones(tmp_path, name, larger):
    assert config(tmp_path, metric_for_best_model=name).greater_is_better == larger
    assert config(tmp_path, metric_for_best_model=name, greater_is_better=not larger).greater_is_better != larger


def test_arguments_as_a_mapping_make_the_same_arguments(tmp_path):
    for appended in (False, True):
        given = config(tmp_path, append_end_token=appended, hub_token="hf_secret")
        assert PreferenceARMConfig(**given.to_dict()).append_end_token is appended
        assert "hf_secret" not in given.to_json_string()


def test_whatever_an_evaluation_reports_can_judge(tmp_path, tokenizer):
    run = trainer(tmp_path, tokenizer, evaluation=two_sets())
    run.train()
    found = {name for name in run.evaluate() if not name.endswith(("runtime", "per_second", "epoch"))}
    assert {"eval_loss", "eval_helpful_gain", "eval_vertex_distance"} < found
    for name in found:
        check_metric(name, run.objectives, run.eval_preferences, untrained=True)


@pytest.mark.parametrize(
    ("name", "objectives", "at", "untrained"),
    [
        ("vertex_correlation@a,b", ["a", "b"], torch.eye(2), True),
        ("eval_vertex_correlation", ["a"], torch.eye(1), True),
        ("a_gain", ["a", "b"], torch.full((1, 2), 0.5), True),
        ("a_gain", ["a", "b"], torch.eye(2), False),
        ("a_ratio_accuracy@0", ["a", "b"], torch.eye(2), False),
    ],
)
def test_what_this_evaluation_does_not_report_can_not_judge(name, objectives, at, untrained):
    preferences = {str(i): preference for i, preference in enumerate(at)}
    with pytest.raises(ValueError, match="but no evaluation of this run reports that"):
        check_metric(name, objectives, preferences, untrained)
    check_metric("eval_a_margin@0", objectives, preferences, untrained)


def test_metric_that_no_evaluation_reports(tmp_path, tokenizer):
    with pytest.raises(
        ValueError, match="'eval_losss', but no evaluation of this run reports that. Take such as loss"
    ):
        trainer(tmp_path, tokenizer, metric_for_best_model="eval_losss")
    args = config(tmp_path, metric_for_best_model="mine")
    settings = {"processing_class": tokenizer, "peft_config": copy.deepcopy(PBLORA)}
    PreferenceARMTrainer(tiny_llama(), args, None, two_sets(), compute_metrics=lambda found: {"mine": 1.0}, **settings)
