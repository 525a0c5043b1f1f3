# SPDX-License-Identifier: Apache-2.0
"""Every verb where no extra is installed: it does its work, or says in one line what to install, before it begins."""

import configparser
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import tiny_arm, tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM

from trl_parm.cli.main import VERBS
from trl_parm.demo.command import NEEDED
from trl_parm.server.command import NEEDED as SERVING


REWARDS = {"helpful": "trl_parm.rewards:brevity", "harmless": "trl_parm.rewards:conciseness"}
VADER = {"helpful": "trl_parm.rewards:positivity"}
DECODING = ("--model_name_or_path", "base", "--prompts", "w1 w2", "w3", "w4 w5", "--max_new_tokens", "4")
METHODS = [{"method": "parm", "arm": "arm", "beta": 0.5}]
ARGS = [{"method": "args", "rewards": VADER}]

WITHOUT = {
    "relabel": ("--data", "pairs.jsonl", "--rewards", json.dumps(REWARDS), "--output_dir", "labelled"),
    "make_pairs": (
        *DECODING, "--rewards", '{"helpful": "own:letters"}', "--keep_unfinished", "true", "--output_dir", "made"
    ),
    "train": (
        "--model_name_or_path", "base", "--train_data", "labelled/train.jsonl", "--eval_data", "labelled/test.jsonl",
        "--max_steps", "1", "--target_modules", "q_proj", "--bf16", "false", "--report_to", "none",
        "--use_cpu", "true", "--output_dir", "trained",
    ),
    "generate": DECODING,
    "evaluate": (
        *DECODING, "--methods", json.dumps(METHODS), "--rewards", json.dumps(REWARDS), "--grid_steps", "1",
        "--output_dir", "results",
    ),
    "rescore": (
        "--results", "results/results.jsonl", "--rewards", json.dumps(REWARDS), "--output", "rescored/results.jsonl"
    ),
    "export": ("--adapter", "arm", "--output_dir", "loras", "--grid_steps", "1"),
}  # fmt: skip
"""Words of each verb that needs no extra, in the order in which one reads what another has written."""
NEEDS = [
    ("plot", ("--results", "results/results.jsonl", "--output_dir", "refused"), "eval", "matplotlib, moocore, scipy"),
    ("demo", ("--arm", "arm"), "demo", ", ".join(NEEDED)),
    ("serve", ("--model_name_or_path", "base"), "serve", ", ".join(SERVING)),
    ("relabel", ("--data", "pairs.jsonl", "--rewards", json.dumps(VADER), "--output_dir", "refused"), "eval", "vader"),
    ("make_pairs", (*DECODING, "--rewards", json.dumps(VADER), "--output_dir", "refused"), "eval", "vader"),
    (
        "evaluate",
        (*DECODING, "--methods", '["base"]', "--rewards", json.dumps(VADER), "--grid_steps", "1")
        + ("--output_dir", "refused"),
        "eval",
        "vader",
    ),
    (
        "evaluate",
        (*DECODING, "--methods", json.dumps(["base", *ARGS]), "--rewards", json.dumps(REWARDS), "--grid_steps", "1")
        + ("--output_dir", "refused"),
        "eval",
        "vader",
    ),
    (
        "rescore",
        ("--results", "results/results.jsonl", "--rewards", json.dumps(VADER), "--output", "refused/results.jsonl"),
        "eval",
        "vader",
    ),
]
"""Verbs and words that need an extra, its name, and what the line says is missing."""
SCRIPT = """
import contextlib, io, json, sys
missing, calls = json.loads(sys.argv[1])
sys.modules |= dict.fromkeys(missing)  # which is how Python marks what can't be imported
from trl_parm.cli.main import main
for words in calls:
    told = io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
        code = main(words)
    print(json.dumps([code, told.getvalue()]), flush=True)
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """The exit code and standard error of every call, all in one process, and the folder."""
    folder = tmp_path_factory.mktemp("bare")
    tiny_llama().save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    arm = tiny_arm(AutoModelForCausalLM.from_pretrained(folder / "base"))
    arm.peft_config["default"].base_model_name_or_path = "base"
    arm.save_pretrained(folder / "arm")
    pairs = [
        {"prompt": f"w{i % 8}", "response_0": "w1 " * (i % 4 + 1), "response_1": "w2 . " * (i % 3 + 1)}
        for i in range(24)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (folder / "own.py").write_text("def letters(prompts, responses):\n    return list(map(len, responses))\n")
    calls = [[verb, *words] for verb, words in WITHOUT.items()] + [[verb, *words] for verb, words, _, _ in NEEDS]
    given = json.dumps([packages(), calls])
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, given], cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    found = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("[")]
    assert len(found) == len(calls)
    return found, folder


def packages() -> list[str]:
    """The packages of the extras `eval`, `demo` and `serve`."""
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parents[1] / "setup.cfg")
    extras = setup["options.extras_require"]
    lines = f"{extras['eval']}\n{extras['demo']}\n{extras['serve']}".split()
    return sorted({re.split("[<>=]", line)[0] for line in lines})


def test_what_is_missing_is_what_the_verbs_say():
    assert set(VERBS) == {*WITHOUT, *(verb for verb, *_ in NEEDS)}
    assert {*NEEDED, *SERVING, "scipy", "vaderSentiment"} <= set(packages())


@pytest.mark.parametrize("number", range(len(WITHOUT)), ids=list(WITHOUT))
def test_a_verb_without_use_for_an_extra_needs_none(answers, number):
    found, _ = answers
    assert found[number][0] == 0, found[number][1]


@pytest.mark.parametrize("number", range(len(NEEDS)), ids=[f"{verb}-{i}" for i, (verb, *_) in enumerate(NEEDS)])
def test_what_needs_an_extra_says_so_before_it_begins(answers, number):
    found, folder = answers
    verb, _, extra, missing = NEEDS[number]
    code, told = found[len(WITHOUT) + number]
    assert code == 2
    assert re.fullmatch(rf"trl-parm {verb}: error: .* needs {missing}.*: pip install 'trl-parm\[{extra}\]'\n", told), (
        told
    )
    assert not (folder / "refused").exists()
