# SPDX-License-Identifier: Apache-2.0
"""The code blocks of README and docs, as a reader meets them: found in a page, run in its order, in a folder.

Python blocks of a page share their names, commands of `sh` blocks run where they stand between them, and a `yaml`
block that begins with a line such as `# pairs.yaml` is that file. What can't run in a test has `<!-- not run: reason
-->` before its fence. No block is hidden from a reader, who would lack what it makes.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from configparser import ConfigParser
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from accelerate.commands.config.config_args import load_config_from_file
from conftest import tiny_arm, tiny_llama, tiny_tokenizer

from trl_parm.cli.main import VERBS, main


ROOT = Path(__file__).parents[1]
MODEL = "runs/models/smollm2-135m-instruct"
OBJECTIVES = ["positive", "concise"]
FENCE = re.compile(
    r"(?:<!-- not run: (?P<reason>.+?) -->\n)?^```(?P<language>\w+)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE
)
CHEAP = {
    "make_pairs": [
        "--num_prompts",
        "2",
        "--num_answers",
        "3",
        "--max_new_tokens",
        "4",
        "--keep_unfinished",
        "--rewards",
        '{"positive": "doc_blocks:letters", "concise": "doc_blocks:letters"}',
    ],
    "train": ["--max_steps", "2"],
    "evaluate": ["--num_prompts", "2", "--max_new_tokens", "3"],
    "generate": ["--max_new_tokens", "3"],
    "plot": ["--resamples", "20"],
}
"""Flags that a command gets here, after its own, since it is to show that it runs."""


def letters(prompts: list[str], responses: list[str]) -> list[float]:
    """A reward that tells the tiny model's responses, which have no words, apart."""
    return [float(len(response)) for response in responses]


@dataclass(frozen=True)
class Block:
    """A fenced block: where it begins, its language and text, and why it can't run, if it can't."""

    page: str
    line: int
    language: str
    code: str
    reason: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    name = str(page.relative_to(ROOT))
    found = list(FENCE.finditer(text))
    fences = re.findall(r"^\s*```\w", text, re.MULTILINE)
    assert len(fences) == len(found), f"{name} has a block that is indented or not closed, and would not be run"
    shown = FENCE.findall(re.sub(r"<!--(?! not run).*?-->", "", text, flags=re.DOTALL))
    assert len(shown) == len(found), f"{name} has a block in an HTML comment, whose work its readers would lack"
    return [
        Block(name, text.count("\n", 0, found.start("code")) + 1, found["language"], found["code"], found["reason"])
        for found in found
    ]


def make_folder(folder: Path) -> Path:
    """A folder as `make demo` leaves the checkout, with a tiny model, an untrained ARM and few pairs."""
    tiny_llama(hidden_size=16, intermediate_size=16).save_pretrained(folder / MODEL)
    tiny_tokenizer().save_pretrained(folder / MODEL)
    arm = tiny_arm(tiny_llama(hidden_size=16, intermediate_size=16), OBJECTIVES)
    arm.peft_config["default"].base_model_name_or_path = MODEL
    arm.save_pretrained(folder / "runs/demo/arm")
    shutil.copytree(ROOT / "examples", folder / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    pairs = folder / "examples/data/pairs.jsonl"
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    few = [
        row for objective in OBJECTIVES for split in ("train", "test")
        for row in [r for r in rows if (r["objective"], r["split"]) == (objective, split)][:8]
    ]  # fmt: skip
    pairs.write_text("".join(json.dumps(row) + "\n" for row in few))
    return folder


def run(folder: Path, *command: str) -> subprocess.CompletedProcess:
    """Python in a process of its own."""
    environment = {**os.environ, "CI": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


ALONE = """
import os, sys, traceback
import datasets, peft, torch, transformers, trl  # once for all; none of them knows peft_pblora
for number, code in enumerate(sys.stdin.read().split(chr(0))):
    sys.stdout.flush()
    child = os.fork()
    if not child:
        assert "peft_pblora" not in sys.modules
        try:
            exec(compile(code, f"block {number}", "exec"), {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        sys.stdout.flush()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print(chr(0), status, flush=True)
"""


def run_each_alone(folder: Path, blocks: list[Block]) -> list[tuple[str, str]]:
    """Each block in a process of its own, where nobody has imported peft_pblora: its status, `"0"`, and output."""
    environment = {**os.environ, "CI": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", ALONE], cwd=folder, env=environment, capture_output=True, text=True, timeout=300,
        input=chr(0).join(block.code for block in blocks),
    )  # fmt: skip
    parts = re.split(r"\0 (\d+)\n", result.stdout)
    assert len(parts) == 2 * len(blocks) + 1, result.stderr
    return [
        (status, f"{output}\n{result.stderr}" if status != "0" else output)
        for output, status in zip(parts[::2], parts[1::2])
    ]


def run_page(blocks: list[Block]) -> None:
    """Runs a page in the working directory, or checks what can't run."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks:
        if block.language == "python":
            code = compile(block.code, str(block), "exec")
            if block.reason is None:
                exec(code, names)
            else:
                check_imports(block)
        elif block.language == "yaml":
            write_yaml(block)
        elif block.language == "sh":
            for command in commands(block):
                run_command(block, command)


def check_imports(block: Block) -> None:
    """Makes sure that what a block imports from this project is there."""
    for node in ast.walk(ast.parse(block.code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("trl_parm", "peft_pblora"):
            module = importlib.import_module(str(node.module))
            missing = [alias.name for alias in node.names if alias.name not in dir(module)]
            assert not missing, f"{block}: {node.module} has no {missing}"


def write_yaml(block: Block) -> None:
    assert yaml.safe_load(block.code) is not None, str(block)
    first = re.match(r"# (\S+\.yaml)\b", block.code)
    if first:
        Path(first[1]).parent.mkdir(parents=True, exist_ok=True)
        Path(first[1]).write_text(block.code, encoding="utf-8")


def commands(block: Block) -> list[list[str]]:
    lines = block.code.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def run_command(block: Block, words: list[str]) -> None:
    if words[0] == "trl-parm":
        verb = words[1]
        assert verb in VERBS, f"{block}: {verb}"
        if block.reason is None:
            assert main([*words[1:], *CHEAP.get(verb, [])]) == 0, str(block)
    elif words[0] == "make":
        assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text(), f"{block}: {words[1]}"
    elif words[:2] == ["pip", "install"]:
        check_extras(block, words[2:])
    elif words[:2] == ["accelerate", "launch"]:
        load_config_from_file(words[words.index("--config_file") + 1])
    elif words[0] == "python":
        assert words[1] == "-m" or (ROOT / words[1]).exists(), f"{block}: {words[1]}"
    else:
        assert block.reason is not None, f"{block}: the test does not know how to run {words[0]}"
    files = [word for word in words if word.endswith((".yaml", ".py"))]
    lacking = [file for file in files if not Path(file).exists() and not (ROOT / file).exists()]
    assert not lacking or block.reason, f"{block}: there is no {lacking}"


def check_extras(block: Block, words: list[str]) -> None:
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    for extras in re.findall(r"\[(.+?)\]", " ".join(words)):
        for extra in extras.split(","):
            assert config.has_option("options.extras_require", extra), f"{block}: no extra {extra}"
