# SPDX-License-Identifier: Apache-2.0
"""The examples: headers that say what a script needs, the notebook, the decoders side by side, and the Space.

`test_launch.py` runs `train_arm.py` with every configuration of accelerate that a CPU can run, `test_quickstart.py`
the demo.
"""

import ast
import json
import subprocess
import sys
import tomllib
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml
from conftest import tiny_arm, tiny_llama, tiny_tokenizer
from packaging.requirements import Requirement
from packaging.version import Version


ROOT = Path(__file__).parents[1]
EXAMPLES, SPACE = ROOT / "examples", ROOT / "examples/space"
OBJECTIVES = ["positive", "concise"]
MODULES = {"peft_pblora": "trl-parm", "trl_parm": "trl-parm", "vaderSentiment": "vadersentiment"}
"""Module → its distribution, where the names differ."""
OF_RICH = {"rich", "tqdm"}
"""What trl and transformers need, and so is there."""


def headers() -> dict[str, dict]:
    """Script → its PEP 723 header."""
    found = {}
    for path in sorted(EXAMPLES.glob("*.py")):
        lines = path.read_text(encoding="utf-8").splitlines()
        if "# /// script" in lines:
            start = lines.index("# /// script")
            end = lines.index("# ///", start)
            found[path.name] = tomllib.loads("\n".join(line[2:] for line in lines[start + 1 : end]))
    return found


def declared(extras: set[str] = frozenset()) -> dict[str, Requirement]:
    """What setup.cfg requires, with these extras, by name."""
    config = ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    texts = [config["options"]["install_requires"], *(config["options.extras_require"][extra] for extra in extras)]
    found = [Requirement(line) for text in texts for line in text.splitlines() if line.strip()]
    return {requirement.name.lower().replace("_", "-"): requirement for requirement in found}


@pytest.mark.parametrize("script", ["train_arm.py", "compare_decoders.py"])
def test_a_header_asks_for_what_setup_cfg_declares(script):
    config = ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    header = headers()[script]
    assert header["requires-python"] == config["options"]["python_requires"]
    wanted = {requirement.name: requirement for requirement in map(Requirement, header["dependencies"])}
    extras = wanted.pop(config["metadata"]["name"]).extras
    known = declared(extras)  # a KeyError for an extra that is not there
    for name, requirement in wanted.items():
        assert requirement.specifier == known[name].specifier
    imported = {
        (node.module or "").split(".")[0] if isinstance(node, ast.ImportFrom) else node.names[0].name.split(".")[0]
        for node in ast.walk(ast.parse((EXAMPLES / script).read_text(encoding="utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    needed = {MODULES.get(name, name) for name in imported - sys.stdlib_module_names - OF_RICH}
    assert needed <= {"trl-parm", *known}


def cells(kind: str) -> list[str]:
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


def test_the_notebook_is_that_of_the_script(tmp_path):
    check = [sys.executable, str(EXAMPLES / "make_notebook.py"), "--check"]
    assert subprocess.run(check).returncode == 0
    copy = tmp_path / "make_notebook.py"
    copy.write_text((EXAMPLES / "make_notebook.py").read_text(encoding="utf-8"))
    script = (EXAMPLES / "quickstart.py").read_text(encoding="utf-8")
    (tmp_path / "quickstart.py").write_text(script.replace("top_k=50", "top_k=40"))
    (tmp_path / "quickstart.ipynb").write_text((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))
    changed = subprocess.run([sys.executable, str(copy), "--check"], capture_output=True, text=True)
    assert changed.returncode == 1
    assert "out of date" in changed.stdout


def test_a_notebook_that_somebody_has_changed_is_not_replaced(tmp_path):
    for name in ("make_notebook.py", "quickstart.py", "quickstart.ipynb"):
        (tmp_path / name).write_text((EXAMPLES / name).read_text(encoding="utf-8"))
    make = [sys.executable, str(tmp_path / "make_notebook.py")]
    path = tmp_path / "quickstart.ipynb"
    (tmp_path / "quickstart.py").write_text((EXAMPLES / "quickstart.py").read_text().replace("top_k=50", "top_k=40"))
    assert subprocess.run(make).returncode == 0
    assert "top_k=40" in path.read_text()
    changed = path.read_text().replace("A rainy", "A sunny").replace("rainy Monday", "sunny Monday")
    path.write_text(changed)
    refused = subprocess.run(make, capture_output=True, text=True)
    assert (refused.returncode, "Nothing is replaced" in refused.stderr) == (1, True)
    assert path.read_text() == changed


def test_the_notebook_has_every_function_of_the_script_and_no_output():
    script = ast.parse((EXAMPLES / "quickstart.py").read_text(encoding="utf-8"))
    functions = {node.name for node in script.body if isinstance(node, ast.FunctionDef)}
    defined = [
        node.name for text in cells("code") for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)
    ]
    assert set(defined) == functions
    assert len(defined) == len(functions)
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    assert not any(cell.get("outputs") for cell in notebook["cells"])


def test_make_clean_removes_only_what_make_has_made(tmp_path):
    """Neither runs, nor an environment or a build of the user's, nor one that is linked from elsewhere."""
    for place, folders in {
        "here": ("runs/arm", "dist", ".venv", ".venv-oldest", ".venv-vllm", "build/wheel", "build/site", "build/mine"),
        "elsewhere": ("venv",),
    }.items():
        for folder in folders:
            (tmp_path / place / folder).mkdir(parents=True)
            (tmp_path / place / folder / "file").write_text("mine")
    here = tmp_path / "here"
    (here / ".venv-wheel").symlink_to(tmp_path / "elsewhere/venv")
    for made in (here / ".venv", here / "build/wheel", tmp_path / "elsewhere/venv"):
        (made / ".made_by_make").touch()
    (here / "Makefile").write_text((ROOT / "Makefile").read_text())
    result = subprocess.run(["make", "clean"], cwd=here, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    left = {"runs", "dist", ".venv-oldest", ".venv-vllm", ".venv-wheel", "build", "Makefile"}
    assert {path.name for path in here.iterdir()} == left
    assert {path.name for path in (here / "build").iterdir()} == {"site", "mine"}
    assert (tmp_path / "elsewhere/venv/file").exists()
    assert "runs stays" in result.stdout
    assert ".venv-oldest stays: it was not made here" in result.stdout
    refused = subprocess.run(["make", "-o", ".venv/.docs", "docs"], cwd=here, capture_output=True, text=True)
    assert (refused.returncode != 0, "build/site stays" in refused.stdout) == (True, True)
    assert (here / "build/site/file").exists()


def test_make_marks_the_environments_that_it_makes(tmp_path):
    """And not one that was there before."""
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text().replace("python3 -m venv", "mkdir -p"))
    (tmp_path / "Makefile").write_text((tmp_path / "Makefile").read_text() + "\nmade:\n\t$(call new_venv,$(VENV))\n")
    (tmp_path / "theirs").mkdir()
    for name in ("ours", "theirs"):
        subprocess.run(["make", "made", f"VENV={name}"], cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "ours/.made_by_make").exists()
    assert not (tmp_path / "theirs/.made_by_make").exists()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder as `make demo` leaves it, with a tiny model and an untrained ARM."""
    model = tmp_path / "runs/models/smollm2-135m-instruct"
    tiny_llama(0).save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    arm = tiny_arm(tiny_llama(0), OBJECTIVES)
    arm.peft_config["default"].base_model_name_or_path = "runs/models/smollm2-135m-instruct"
    arm.save_pretrained(tmp_path / "runs/demo/arm")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_the_notebooks_cells_run_in_their_order(folder):
    (folder / "examples").symlink_to(EXAMPLES)
    rows = [json.loads(line) for line in (EXAMPLES / "data/pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    few = [
        pair for objective in OBJECTIVES for split in ("train", "test")
        for pair in [row for row in rows if (row["objective"], row["split"]) == (objective, split)][:4]
    ]  # fmt: skip
    (folder / "few.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in few))
    small = ["--steps", "2", "--batch-size", "2", "--eval-pairs", "2", "--max-new-tokens", "5", "--pairs", "few.jsonl"]
    small += ["--model", "runs/models/smollm2-135m-instruct", "--output", "runs/notebook"]
    code = "\n".join(cells("code"))
    assert code.count("\narguments = []\n") == 1
    code = code.replace("\narguments = []\n", f"\narguments = {small}\n")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert (folder / "runs/notebook/pareto.png").exists()
    assert "Hypervolume" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("w") or result.stdout.endswith(
        "\n\n"
    )  # an answer, or an empty one


@pytest.mark.slow
def test_all_decoders_side_by_side(folder, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from compare_decoders import main

    table = main(["--prompts", "w3 w4", "w9", "--max-new-tokens", "6", "--show-responses"])
    printed = capsys.readouterr().out
    answers = {(row["method"], row["label"], row["prompt"]): row["response"] for row in table}
    methods = list(dict.fromkeys(method for method, _, _ in answers))
    assert methods == [
        "Base", "Base × untrained ARM", "PARM", "GenARM", "MOD", "MOD-w2s", "Rewarded Soups", "ARGS", "Transfer-Q",
    ]  # fmt: skip
    assert all(method in printed for method in methods)
    labels = {label for method, label, _ in answers if method == "PARM"}
    assert labels == {"positive", "uniform", "concise"}
    # At a vertex these pairs are the same formula of the same model, reached by different ways.
    for label in OBJECTIVES:
        for prompt in ("w3 w4", "w9"):
            assert answers["GenARM", label, prompt] == answers["PARM", label, prompt]
            assert answers["Rewarded Soups", label, prompt] == answers["MOD", label, prompt]
    assert len({answers[method, "uniform", "w3 w4"] for method in methods[2:]}) > 2


@pytest.mark.slow
def test_the_comparison_says_what_is_missing(folder):
    script = [sys.executable, str(EXAMPLES / "compare_decoders.py"), "--arm", "nowhere"]
    result = subprocess.run(script, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1] == (
        "error: There is no folder nowhere. Run `make demo` first, or name others."
    )


# The Space


def test_the_space_has_the_metadata_that_it_needs():
    text = (SPACE / "README.md").read_text(encoding="utf-8")
    metadata = yaml.safe_load(text.split("---\n")[1])
    assert metadata["sdk"] == "gradio"
    assert (SPACE / metadata["app_file"]).is_file()
    assert Version(metadata["sdk_version"]) in declared({"demo"})["gradio"].specifier
    assert len(metadata["short_description"]) <= 60  # the Hub refuses longer ones
    assert {metadata["colorFrom"], metadata["colorTo"]} <= {
        "red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray",
    }  # fmt: skip
    requirements = [Requirement(line) for line in (SPACE / "requirements.txt").read_text().split()]
    assert [(r.name, r.extras) for r in requirements] == [("trl-parm", {"demo"})]


def test_the_space_builds_its_page(folder, monkeypatch):
    pytest.importorskip("gradio", reason="needs the extra `demo`")
    monkeypatch.syspath_prepend(str(SPACE))
    import app

    monkeypatch.setenv("ARM", "runs/demo/arm")
    monkeypatch.setenv("BASE", "")  # as an empty variable of a Space: the adapter's own
    monkeypatch.setenv("BETA", "0.5")
    page = app.build()
    try:
        labels = {block.label for block in page.blocks.blocks.values() if getattr(block, "label", None)}
        assert {*OBJECTIVES, "β"} <= labels
        assert page.answering.models.base_name == "runs/models/smollm2-135m-instruct"
        assert not page.answering.escape_control_tokens
    finally:
        page.answering.close()
    monkeypatch.setenv("ESCAPE_CONTROL_TOKENS", "True")
    page = app.build()
    page.answering.close()
    assert page.answering.escape_control_tokens
    monkeypatch.setenv("ESCAPE_CONTROL_TOKENS", "yes")
    with pytest.raises(ValueError, match="ESCAPE_CONTROL_TOKENS is 'yes', but it must be true or false"):
        app.build()
    monkeypatch.delenv("ESCAPE_CONTROL_TOKENS")
    monkeypatch.setenv("BETA", "-1")
    with pytest.raises(ValueError, match="must be a positive, finite number"):
        app.build()
    monkeypatch.delenv("ARM")
    monkeypatch.setenv("BETA", "")
    with pytest.raises(ValueError, match="There is no adapter to read at .*space/arm'"):
        app.build()
