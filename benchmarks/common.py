# SPDX-License-Identifier: Apache-2.0
"""How every benchmark here measures: variants interleaved in one loop, paired ratios, medians with their spread.

On a CPU one thread runs and its CPU time counts, so that neighbours on a shared machine disturb little; on CUDA the
device is synchronised and wall time counts.
"""

from __future__ import annotations

import csv
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from peft_pblora.output import output_file


RESULTS = Path(__file__).parent / "results"


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def describe_machine() -> str:
    """The device, in words, for the head of a table."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        models = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
        name = f"{models[0] if models else platform.processor() or platform.machine()}, one thread, CPU time"
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
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (ratios[0],) * 3
    return middle, low, high


def report(name: str, rows: Sequence[Mapping[str, object]], notes: Sequence[str] = ()) -> None:
    """Prints rows as a Markdown table and writes them to `benchmarks/results/<name>.csv` and `.md`.

    Raises:
        ValueError: there are files of these names that are no results of this benchmark.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(str(row.get(column, "")) for column in columns) + " |" for row in rows]
    command = f"`python benchmarks/{name}.py` on "
    text = "\n".join([f"{command}{describe_machine()}", "", *lines, "", *notes])
    print(text)
    stem = RESULTS / f"{name}{'_cuda' if torch.cuda.is_available() else ''}"
    there = [path for path in (stem.with_suffix(".md"), stem.with_suffix(".csv")) if path.exists()]
    if there and not (there[0].suffix == ".md" and there[0].read_text().startswith(command)):
        raise ValueError(f"{there[0]} is no result of this benchmark. Nothing is replaced: move it away.")
    with output_file(stem.with_suffix(".csv")) as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    with output_file(stem.with_suffix(".md")) as file:
        file.write(text + "\n")


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.thread_time()


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
