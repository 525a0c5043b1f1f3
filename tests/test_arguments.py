# SPDX-License-Identifier: Apache-2.0
"""What the training script reads: YAML, flags, and the shipped configurations."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from training_runs import write_run
from trl import TrlParser

from trl_parm import PreferenceARMConfig
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
