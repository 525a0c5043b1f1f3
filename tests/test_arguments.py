# SPDX-License-Identifier: Apache-2.0
"""What the training script reads: YAML, flags, and the shipped configurations."""

import os
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from training_runs import write_run
from trl import TrlParser

from trl_parm import PreferenceARMConfig
from trl_parm.arguments import parse as parse_verb
from trl_parm.cli.evaluate import EvaluateArguments
from trl_parm.cli.generate import GenerateArguments
from trl_parm.training.config import ARMArguments


EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("arguments")
    write_run(folder)
    return folder


def parse(*arguments: str) -> tuple[ARMArguments, PreferenceARMConfig]:
    return TrlParser((ARMArguments, PreferenceARMConfig)).parse_args_and_config(["--use_cpu", "True", *arguments])


def test_every_key_is_a_flag_too(folder):
    base = ("--model_name_or_path", "base", "--output_dir", "out")
    for text, value in (("0.05", 0.05), ('{"helpful": 0.1}', {"helpful": 0.1})):
        assert parse(*base, "--beta", text)[1].beta == value
    columns = parse(*base, "--label_columns", '{"helpful": "better"}')[1].label_columns
    assert columns == {"helpful": "better"}
    preferences = parse(*base, "--eval_preferences", "[0.5, 0.5]", '{"helpful": 1}')[1].eval_preferences
    assert preferences == [[0.5, 0.5], {"helpful": 1}]
    arguments = parse(*base, "--adapter", "svdlora", "--adapter_kwargs", '{"r": 4}', "--objectives", "a", "b")[0]
    config = arguments.peft_config(None)
    assert (config.peft_type, config.r, config.objectives) == ("SVDLORA", 4, ["a", "b"])


def test_yaml_and_flags_agree(folder):
    arguments, config = parse("--config", str(folder / "config.yaml"), "--beta", "0.7")
    assert config.beta == 0.7
    assert arguments.train_data[1].objective == "harmless"
    assert arguments.peft_config(None).objectives == ["helpful", "harmless"]


@pytest.mark.parametrize("name", [path.name for path in sorted(EXAMPLES.glob("*.yaml"))])
def test_shipped_configurations_parse(name):
    arguments, _ = parse("--config", str(EXAMPLES / name))
    assert arguments.train_data


@pytest.mark.parametrize("path", sorted((EXAMPLES / "accelerate_configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_configurations_of_accelerate_are_read(path):
    engine = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
    found = load_config_from_file(str(path))
    assert found.distributed_type == engine[path.stem.removesuffix("_cpu")]
    assert found.num_processes == (2 if path.stem.endswith("_cpu") else 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_data": [{"objective": "helpful"}]}, "but it needs `path`, and may have objective, name"),
        ({"train_data": [{"path": "x.jsonl", "spilt": "train"}]}, "but it needs `path`"),
        ({"adapter_kwargs": "r1=4"}, "`adapter_kwargs` is 'r1=4', but it must be a mapping, or that in JSON"),
        ({"adapter_kwargs": "[4]"}, r"`adapter_kwargs` is \[4\], but it must be a mapping"),
        ({"adapter": "dora"}, "must be one of pblora, svdlora, moslora, lora"),
        ({"train_data": [{"path": "missing.jsonl"}]}, "There is no data at 'missing.jsonl'"),
        ({"train_data": [{"path": "judged.jsonl", "where": {"nosuch": 1}}]}, r"lacks the columns \['nosuch'\]"),
        ({"train_data": [{"objective": "harmless", "path": "harmless.jsonl"}] * 2}, "have the same objective"),
    ],
)
def test_bad_configurations_are_refused(folder, monkeypatch, change, message):
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match=message):
        arguments = ARMArguments("base", **change)
        arguments.load(arguments.train_data)


def test_data_by_columns_and_rows(folder, monkeypatch):
    monkeypatch.chdir(folder)
    entry = {"path": "judged.jsonl", "columns": {"helpful": "better"}, "where": {"harmless": 0}}
    data = next(
        iter(
            ARMArguments("base", train_data=[entry]).load(ARMArguments("base", train_data=[entry]).train_data).values()
        )
    )
    assert "better" in data.column_names
    assert set(data["harmless"]) == {0}
    assert len(data) == 10


BASE = "model_name_or_path: base\nprompts: [w1]\nmethods: [base]\nrewards: {a: 'x:y', b: 'x:z'}\noutput_dir: out\n"
TRAIN = "model_name_or_path: base\noutput_dir: out\nuse_cpu: true\n"


def of_file(tmp_path, text, *words, verb="evaluate", classes=EvaluateArguments):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return parse_verb(verb, classes, ["--config", str(path), *words])


def training(tmp_path, text, *words):
    return of_file(tmp_path, TRAIN + text, *words, verb="train", classes=(ARMArguments, PreferenceARMConfig))[1]


def test_numbers_are_those_of_yaml_1_2_at_any_depth(tmp_path):
    text = BASE + "preferences: [[1e-1, 9E-1], [.1e1, +0e0]]\n"
    text = text.replace("[base]", "[{method: parm, arm: '1e5', beta: 1e-1, name: 1e, dtype: \"2e3\"}]")
    found = of_file(tmp_path, text)
    assert found.preferences == [[0.1, 0.9], [1.0, 0.0]]
    assert found.methods == [{"method": "parm", "arm": "1e5", "beta": 0.1, "name": "1e", "dtype": "2e3"}]
    config = training(tmp_path, "beta: {x: 1e-2, y: 1.5e+2}\n")
    assert config.beta == {"x": 0.01, "y": 150.0}
    assert training(tmp_path, "learning_rate: 5e-4\nbeta: 1e-2\n").beta == 0.01


def test_no_is_a_word_of_an_enumeration(tmp_path):
    config = training(
        tmp_path, "eval_strategy: no\nsave_strategy: no\nlogging_strategy: 'no'\nlr_scheduler_type: linear\n"
    )
    assert [config.eval_strategy, config.save_strategy, config.logging_strategy] == ["no"] * 3


@pytest.mark.parametrize("word", ["null", "Null", "~", "none", "None"])
def test_a_flag_may_say_nothing(tmp_path, word):
    names = ("card_prompt", "max_length", "bf16", "weight-column", "label_columns", "eval_preferences")
    words = [part for name in names for part in (f"--{name}", word)]
    config = training(tmp_path, "weight_column: w\n", *words, "--report_to", "none")
    assert [config.card_prompt, config.max_length, config.weight_column, config.label_columns] == [None] * 4
    assert config.eval_preferences is None
    assert config.report_to == []
    given = ["--model_name_or_path", "base", "--prompts_data", "a.jsonl", "--top_p", word, "--template", f"={word}"]
    found = parse_verb("generate", GenerateArguments, [*given, "--prompts", word])
    assert (found.top_p, found.template, found.prompts) == (None, f"={word}", None)
    assert found.method == "base"


def test_a_quoted_null_is_a_text_and_not_every_key_may_be_nothing(tmp_path):
    assert training(tmp_path, "card_prompt: 'null'\n").card_prompt == "null"
    assert training(tmp_path, "card_prompt: null\n").card_prompt is None
    with pytest.raises(ValueError, match="argument --max_new_tokens.*: invalid int value: 'null'"):
        of_file(tmp_path, BASE, "--max_new_tokens", "null")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "rewards:\n  a: x:y\n  a: x:z\n",
            "has the key `a` 2 times in the mapping that begins in line 2. Give it once",
        ),
        (
            "methods: [base, {method: base, name: A, name: B}]",
            "the key `name` 2 times in the mapping that begins in line 1",
        ),
        ("model_kwargs: {a: {b: [{c: 1, c: 1}]}}", "the key `c` 2 times"),
        ("rewards: {1: a, 1: b}", "the key `1` 2 times"),
    ],
)
def test_a_key_that_is_twice_anywhere_is_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        of_file(tmp_path, text)


def test_aliases_and_what_they_replace_are_no_repetition(tmp_path):
    text = BASE.replace("[base]", "[&one {method: parm, beta: 1}, *one, {<<: *one, beta: 2}]")
    assert [method["beta"] for method in of_file(tmp_path, text).methods] == [1, 1, 2]


def test_variables_of_the_environment_may_stand_in_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_PARM_TRIED", "0")
    of_file(tmp_path, BASE + "env: {TRL_PARM_TRIED: 1}\n")
    assert os.environ["TRL_PARM_TRIED"] == "1"
    with pytest.raises(ValueError, match="`env` is 3, but it must be a mapping"):
        of_file(tmp_path, BASE + "env: 3\n")
