# SPDX-License-Identifier: Apache-2.0
"""README and docs: every block runs, links lead somewhere, numbers are measured, every public name is documented."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import peft.mapping
import pytest
from accelerate.commands.config.config_args import load_config_from_file
from doc_blocks import MODEL, OBJECTIVES, ROOT, blocks_of, make_folder, run, run_each_alone, run_page
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from peft_pblora import PBLoraConfig
from trl_parm.evaluation.methods import METHODS


DOCS = ROOT / "docs"
PAGES = sorted(page for page in DOCS.rglob("*.md"))
WITH_CODE = [page for page in PAGES if any(b.language in ("python", "sh", "yaml") for b in blocks_of(page))]
REAL = ("quickstart", "decoding")
"""Pages that also run with the model that they name."""
PACKAGES = (
    "peft_pblora",
    "trl_parm",
    "trl_parm.decoding",
    "trl_parm.evaluation",
    "trl_parm.serving",
    "trl_parm.training",
)
README_BLOCKS = [block for block in blocks_of(ROOT / "README.md") if block.language == "python"]
MEASURED = re.compile(r"\d[\d,]*\.?\d* (?:\[\d+\.\d+, \d+\.\d+\]|± \d+\.\d+)")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("checkout"))


@pytest.fixture
def folder(checkout, tmp_path, monkeypatch) -> Iterator[Path]:
    """A fresh copy of the folder as working directory. What a page registers is gone after it."""
    shutil.copytree(checkout, tmp_path / "checkout")
    monkeypatch.chdir(tmp_path / "checkout")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("TRL_PARM_TRACEBACK", "1")
    mapping = vars(peft.mapping)
    tables: list[Any] = [mapping[f"PEFT_TYPE_TO_{name}_MAPPING"] for name in ("CONFIG", "TUNER", "PREFIX")]
    tables += [METHODS, os.environ]
    before = [dict(table) for table in tables]
    yield tmp_path / "checkout"
    for table, entries in zip(tables, before, strict=True):
        for key in set(table) - set(entries):
            del table[key]


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.stem)
def test_the_blocks_of_a_page_run_one_after_the_other(folder, page):
    run_page(blocks_of(page))


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_a_page_runs_with_the_model_that_it_names(folder, name):
    """SmolLM2 with an ARM of random weights, so that the preference matters."""
    for path in (MODEL, "runs/demo/arm"):
        shutil.rmtree(folder / path)
    convert = "from smollm2 import smollm2; smollm2()"
    result = run(folder, "-c", f"import sys; sys.path.insert(0, {str(ROOT / 'examples')!r}); {convert}")
    assert result.returncode == 0, result.stderr
    config = PBLoraConfig(
        objectives=OBJECTIVES, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_weights=False
    )
    get_peft_model(AutoModelForCausalLM.from_pretrained(MODEL), config).save_pretrained("runs/demo/arm")
    run_page(blocks_of(DOCS / f"{name}.md"))


def test_each_block_of_the_readme_runs_on_its_own(folder):
    """In a process of its own, where nobody has imported peft_pblora before."""
    for block, (status, output) in zip(README_BLOCKS, run_each_alone(folder, README_BLOCKS), strict=True):
        assert status == "0", f"{block}: {output}"
        assert output.strip(), str(block)


@pytest.mark.parametrize("path", sorted((ROOT / "examples/accelerate_configs").iterdir()), ids=lambda path: path.stem)
def test_configurations_of_accelerate_load(path):
    assert load_config_from_file(str(path)).num_processes >= 2


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        plain = re.sub(r"\[([^]]+)\]\([^)]+\)", r"\1", heading).replace("`", "").lower()
        found.add(re.sub(r"[^\w\- ]", "", plain).replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {link}"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {link}; there are {anchors(target)}"


def test_every_page_can_be_reached_and_is_in_the_site():
    navigation = (ROOT / "zensical.toml").read_text(encoding="utf-8")
    for page in PAGES:
        assert f'"{page.relative_to(DOCS)}"' in navigation, page


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *(p for p in PAGES if p.stem not in ("results", "demo"))], ids=lambda page: page.stem
)
def test_measured_numbers_are_those_of_the_benchmarks(page):
    """Whatever stands with its spread was printed by a benchmark or the comparison, or by the demo in the README."""
    tables = [*(ROOT / "benchmarks/results").glob("*.md"), DOCS / "results.md"]
    results = "\n".join(path.read_text(encoding="utf-8") for path in tables)
    numbers = MEASURED.findall(page.read_text(encoding="utf-8"))
    for number in numbers if page.stem != "README" else (number for number in numbers if "[" in number):
        assert number in results, f"{page.name} says {number}, but no benchmark does"


def test_the_readme_has_the_table_of_results():
    """The claims of the project as the comparison's page has them, whole, and its shares."""
    readme, page = (path.read_text(encoding="utf-8") for path in (ROOT / "README.md", DOCS / "results.md"))
    table = re.search(r"^\| task \|.*?\n\n", page, re.MULTILINE | re.DOTALL)
    assert table
    assert table[0] in readme
    assert [share for share in re.findall(r"\d+\.\d%", readme) if share not in page] == []


def public_names() -> list[tuple[str, str]]:
    found = [(package, name) for package in PACKAGES for name in importlib.import_module(package).__all__]
    return [(package, name) for package, name in found if name != "__version__"]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_has_a_docstring(package):
    module = importlib.import_module(package)
    for name in (name for owner, name in public_names() if owner == package):
        assert documentation(module, name), f"{package}.{name} has no docstring"


def documentation(module: ModuleType, name: str) -> str | None:
    """A docstring, read from the source where a package that is not installed is needed to import."""
    try:
        found = getattr(module, name)
    except ImportError:
        trees = [ast.parse(path.read_text()) for path in Path(str(module.__file__)).parent.glob("*.py")]
        bodies = [node for tree in trees for node in tree.body if getattr(node, "name", None) == name]
        return ast.get_docstring(bodies[0])  # pyright: ignore[reportArgumentType]
    for key, member in vars(found).items() if inspect.isclass(found) else ():
        if not key.startswith("_") and (inspect.isfunction(member) or isinstance(member, property)):
            assert inspect.getdoc(getattr(found, key)), f"{module.__name__}.{name}.{key} has no docstring"
    return inspect.getdoc(found)


def test_the_reference_has_every_public_name_once():
    pages = "\n".join(page.read_text(encoding="utf-8") for page in sorted((DOCS / "reference").glob("*.md")))
    listed = re.findall(r"^::: (\S+)$", pages, re.MULTILINE)
    assert len(set(listed)) == len(listed)
    short = {entry.rpartition(".")[2] for entry in listed}
    lacking = [name for name in public_names() if name[1] not in short]
    assert not lacking
    for entry in listed:
        package, _, name = entry.rpartition(".")
        assert documentation(importlib.import_module(package), name), entry


@pytest.mark.slow
def test_the_site_builds_with_all_names_of_the_reference(tmp_path):
    zensical = shutil.which("zensical", path=str(Path(sys.executable).parent))
    if zensical is None:
        pytest.skip("the extra `docs` is not installed")
    for name in ("docs", "peft_pblora", "trl_parm"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "zensical.toml", tmp_path)
    result = subprocess.run([zensical, "build", "--strict"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    for page in sorted((DOCS / "reference").glob("*.md")):
        site = (tmp_path / f"build/site/reference/{page.stem}.html").read_text(encoding="utf-8")
        for entry in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE):
            assert f'id="{entry}"' in site, entry
