# SPDX-License-Identifier: Apache-2.0
"""How every benchmark here measures: variants interleaved in one loop, paired ratios, medians with their spread.

On a CPU one thread runs and its CPU time counts, so that neighbours on a shared machine disturb little; on CUDA the
device is synchronised and wall time counts.
"""

from __future__ import annotations

import argparse
import csv
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from peft_pblora.output import output_file


RESULTS = Path(__file__).parent / "results"


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with what all benchmarks take: where their table is written, see [`report`]."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the table")
    parser.add_argument("--table", help="name of the table's files, that of the benchmark if not given")
    return parser


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def describe_machine(timed: str = "CPU time") -> str:
    """The device and what is timed on a CPU, in words, for the head of a table."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        models = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
        name = f"{models[0] if models else platform.processor() or platform.machine()}, one thread, {timed}"
    return f"{name}; torch {torch.__version__}; {time.strftime('%Y-%m-%d')}"


def interleave(variants: Mapping[Any, Callable[[], object]], repeats: int, warmup: int = 2) -> dict[Any, list[float]]:
    """Runs all variants in turn, `repeats` times, and returns each one's seconds for each round."""
    for run in variants.values():
        for _ in range(warmup):
            run()
    times: dict[Any, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, run in variants.items():
            start = _now()
            run()
            times[name].append(_now() - start)
    return times


def rounds_for(variants: Mapping[str, Callable[[], object]], seconds: float, least: int = 7, most: int = 400) -> int:
    """How many rounds of all variants take about so many seconds."""
    for run in variants.values():
        run()
    start = _now()
    for run in variants.values():
        run()
    return max(least, min(most, int(seconds / max(_now() - start, 1e-6))))


def paired_ratio(times: Mapping[str, Sequence[float]], name: str, unit: str) -> tuple[float, float, float]:
    """Median, lower and upper quartile of the ratio of two variants, round by round."""
    ratios = [a / b for a, b in zip(times[name], times[unit], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else (ratios[0],) * 3
    return middle, low, high


def verdict(value: float, most: float) -> str:
    """Whether a figure meets a target, in words that stand beside it."""
    return f"at most {most:.2f}: {'met' if value <= most else 'MISSED'}"


def report(
    name: str,
    rows: Iterable[Mapping[str, object]],
    notes: Sequence[str] = (),
    folder: Path = RESULTS,
    table: str | None = None,
    timed: str = "CPU time",
) -> None:
    """Writes rows as a Markdown table to `<table>.csv` and `.md`, with `_cuda` before the dot on a GPU, and prints it.

    Rows that are made one by one are written one by one: a run that is ended leaves those that it had.

    Args:
        name (`str`): The benchmark's script.
        rows (`Iterable[Mapping]`): Column → what stands there.
        notes (`Sequence[str]`, *optional*): Lines below the table, read when the last row is there.
        folder (`Path`, *optional*): Where the files are written.
        table (`str`, *optional*): Their name, if it is not that of the script.
        timed (`str`, *optional*, defaults to `"CPU time"`): What is timed on a CPU.

    Raises:
        ValueError: there are files of these names that are no results of this benchmark.
    """
    stem = folder / f"{table or name}{'_cuda' if torch.cuda.is_available() else ''}"
    command = f"`python benchmarks/{name}.py"
    there = [path for path in (stem.with_suffix(".md"), stem.with_suffix(".csv")) if path.exists()]
    if there and not (there[0].suffix == ".md" and there[0].read_text(encoding="utf-8").startswith(command)):
        raise ValueError(f"{there[0]} is no result of this benchmark. Nothing is replaced: move it away.")
    head = f"{' '.join([command, *_given_arguments()])}` on {describe_machine(timed)}"
    found: list[Mapping[str, object]] = []
    for row in rows:
        found.append(row)
        _write(stem, head, found, ["The run did not end: rows may be missing."])
    print(_write(stem, head, found, notes))


def _given_arguments() -> list[str]:
    """The command's arguments, but for where the table goes."""
    given, kept = iter(sys.argv[1:]), []
    for argument in given:
        if argument in ("--results", "--table"):
            next(given, None)
        else:
            kept.append(shlex.quote(argument))
    return kept


def _write(stem: Path, head: str, rows: Sequence[Mapping[str, object]], notes: Sequence[str]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(str(row.get(column, "")) for column in columns) + " |" for row in rows]
    text = "\n".join([head, "", *lines, "", *notes])
    stem.parent.mkdir(parents=True, exist_ok=True)
    with output_file(stem.with_suffix(".csv")) as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    with output_file(stem.with_suffix(".md")) as file:
        file.write(text + "\n")
    return text


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.thread_time()


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
