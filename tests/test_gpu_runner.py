# SPDX-License-Identifier: Apache-2.0
"""`make gpu`: what its runner does with parts that end, fail, hang or find no time left.

`make gpu REHEARSE=1` runs the parts themselves, with tiny models.
"""

import csv
import importlib
import os
import subprocess
import sys
import time

import gpu
import pytest
import torch
from common import report
from gpu import PARTS, Part
from packaging.requirements import Requirement


WRITE = """
import sys
sys.path[:0] = [{benchmarks!r}]
from pathlib import Path
from common import argument_parser, report
args = argument_parser(None).parse_args()
report("gpu", [{{"": "first", "x": 1}}, {{"": "second", "x": 2}}], ["the end"], args.results, args.table)
"""


def part(name: str, code: str, limit: float = 240, writes: bool = False) -> Part:
    return Part(name, limit, ("-c", code), writes=writes)


def writing(name: str) -> Part:
    return part(name, WRITE.format(benchmarks=str(gpu.HERE)), writes=True)


def table(folder, name: str) -> list[dict[str, str]]:
    ending = "_cuda" if torch.cuda.is_available() else ""
    with (folder / f"{name}{ending}.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def gone(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    with open(f"/proc/{process}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] == "Z"  # nobody has asked how it ended


@pytest.mark.slow
def test_a_part_that_fails_or_hangs_stops_no_other(tmp_path, capfd):
    started = tmp_path / "started"
    hanging = (
        "import subprocess, sys, time, pathlib\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"pathlib.Path({str(started)!r}).write_text(str(child.pid))\nprint('I hang', flush=True)\ntime.sleep(600)"
    )
    parts = [
        part("failing", "print('fine so far'); raise ValueError('what | failed')"),
        part("hanging", hanging, limit=6),
        writing("whole"),
        part("plain", "print('5 passed')"),
    ]
    begin = time.monotonic()
    assert gpu.run(parts, 600, tmp_path, True) == 1
    assert time.monotonic() - begin < 500  # and no part slept to its end
    rows = table(tmp_path, "gpu")
    assert [row["part"] for row in rows] == ["failing", "hanging", "whole", "plain"]
    assert [row["exit"] for row in rows] == ["1", "out of time", "0", "0"]
    assert rows[0]["last line"] == "ValueError: what ¦ failed"
    assert rows[1]["last line"] == "I hang"
    assert rows[3]["last line"] == "5 passed"
    assert [bool(row["table"]) for row in rows] == [False, False, True, False]
    assert len(table(tmp_path, "whole")) == 2
    assert gone(int(started.read_text()))
    output = capfd.readouterr().out
    assert "fine so far" in output
    assert 'make gpu ONLY="failing hanging"' in output


def test_parts_after_the_last_second_are_said_not_to_have_run(tmp_path):
    parts = [part("long", "import time; time.sleep(600)"), part("late", "print('never')")]
    assert gpu.run(parts, 1.5, tmp_path, True) == 1
    rows = table(tmp_path, "gpu")
    assert [row["exit"] for row in rows] == ["out of time", "no time left"]
    assert float(rows[0]["seconds"]) < 10


def test_a_table_has_the_rows_that_were_there_when_its_benchmark_was_ended(tmp_path):
    def rows():
        yield {"": "first", "x": 1}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        report("gpu", rows(), ["the end"], tmp_path)
    assert table(tmp_path, "gpu") == [{"": "first", "x": "1"}]
    (written,) = tmp_path.glob("gpu*.md")
    assert "rows may be missing" in written.read_text()
    report("gpu", iter([{"": "first", "x": 1}, {"": "second", "y": 2}]), ["the end"], tmp_path)
    assert len(table(tmp_path, "gpu")) == 2
    assert "rows may be missing" not in written.read_text()
    assert written.read_text().endswith("the end\n")


def test_all_parts_well(tmp_path):
    assert gpu.run([part("one", "print(1)"), part("two", "print(2)")], 60, tmp_path, True) == 0


def test_a_table_that_something_else_wrote_is_not_replaced(tmp_path):
    (tmp_path / "mine.md").write_text("my notes")
    (tmp_path / "mine_cuda.md").write_text("my notes")
    assert gpu.run([writing("mine")], 60, tmp_path, True) == 1
    assert "Nothing is replaced" in table(tmp_path, "gpu")[0]["last line"]
    assert (tmp_path / "mine.md").read_text() == "my notes"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert gpu.main([]) == 2
    assert "There is no GPU" in capsys.readouterr().out


def test_packages_that_are_missing_are_named(monkeypatch, capsys, tmp_path):
    wanted = [
        "torch>=2",
        "no-such-package-of-ours",
        "numpy>=999",
        "old; python_version < '3'",
        "absent; extra == 'x'",
    ]
    monkeypatch.setattr(gpu, "declared", lambda: wanted)
    monkeypatch.setattr(gpu, "WHEELS", gpu.ROOT / "nowhere")
    assert gpu.main(["--rehearse"]) == 2
    output = capsys.readouterr().out
    assert "missing or too old: no-such-package-of-ours, numpy." in output
    assert "make gpu-wheels" in output


def test_what_is_missing_is_installed_from_the_wheels(monkeypatch):
    """Those of the list that are missing themselves too, such as a dependency of one."""
    calls = []
    monkeypatch.setattr(subprocess, "run", lambda command, **more: calls.append(command))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(gpu, "lacking", lambda names: [name for name in names if name in ("trl", "dill")])
    gpu.install(["trl", "elsewhere"])
    (command,) = calls
    assert [Requirement(one).name for one in command[command.index(str(gpu.WHEELS)) + 1 :]] == ["trl", "dill"]
    assert {"--no-index", "--no-deps", "--target"} <= set(command)


@pytest.mark.parametrize("rehearsed", [False, True])
@pytest.mark.parametrize("part", [part for part in PARTS if part.writes], ids=lambda part: part.name)
def test_benchmarks_understand_what_they_are_given(part, rehearsed, monkeypatch, tmp_path):
    script, *arguments = part.arguments(rehearsed, tmp_path)
    module = importlib.import_module(os.path.basename(script).removesuffix(".py"))
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    args = module.parse_args()
    assert args.table == part.name
    assert args.results == tmp_path


def test_names_of_parts_are_names_of_tables():
    assert len({part.name for part in PARTS}) == len(PARTS)
    assert all(part.name.replace("_", "").isalnum() for part in PARTS)
    assert sum(part.limit for part in PARTS[:4]) <= 530


def test_rehearsed_tables_come_to_a_folder_of_their_own(monkeypatch):
    found = []
    monkeypatch.setattr(gpu, "run", lambda parts, seconds, results, rehearsed: found.append((parts, results)) or 0)
    monkeypatch.setattr(gpu, "lacking", lambda names: [])
    monkeypatch.setattr(gpu, "has_gpu", lambda: True)
    assert gpu.main(["--rehearse"]) == 0
    assert gpu.main(["--only", "tests", "speculative"]) == 0
    (parts, rehearsal), (chosen, results) = found
    assert len(parts) == len(PARTS)
    assert gpu.HERE not in rehearsal.parents
    assert [part.name for part in chosen] == ["tests", "speculative"]
    assert results == gpu.HERE / "results"


def test_what_a_listed_package_needs_in_turn_is_looked_for(monkeypatch):
    needs = {
        "peft": ["no-such-package-of-ours>=1", "torch>=999", "absent; extra == 'x'"],
        "torch": ["not-ours-to-know"],
    }
    monkeypatch.setattr(gpu.metadata, "requires", needs.get)
    assert gpu.lacking(["peft>=0.1", "torch"]) == ["no-such-package-of-ours"]
