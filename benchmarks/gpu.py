# SPDX-License-Identifier: Apache-2.0
"""All that needs a GPU in one command: tests that need CUDA, and the benchmarks at the size of the papers' models.

    python benchmarks/gpu.py [--only PART ...] [--seconds 530]
    python benchmarks/gpu.py --rehearse     # the same commands with tiny models on a CPU, into build/gpu-rehearsal

Each part is a process of its own with its own limit, and leaves its table in `benchmarks/results`; one that fails or
runs out of time stops no other. The most telling come first, so that it is the last ones that may find no time left,
and `--only` runs those later. Exit code: 0 if all parts ran, 1 if one did not, 2 if nothing could.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from configparser import ConfigParser
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path


HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
WHEELS, REHEARSAL = ROOT / "build" / "gpu-wheels", ROOT / "build" / "gpu-rehearsal"
SITE = ROOT / "build" / "gpu-site" / f"{sys.version_info.major}.{sys.version_info.minor}"
TESTS = ["tests/test_device.py", "tests/decoding/test_compiled.py", "tests/test_training.py"]
TINY = ["--dtype", "float32", "--tokens", "3", "--repeats", "2"]


@dataclass(frozen=True)
class Part:
    """One process.

    Attributes:
        name (`str`): For `--only`, and of the table that it writes.
        limit (`float`): Seconds after which it is ended.
        command (`tuple[str, ...]`): What Python is given.
        rehearsal (`tuple[str, ...]`): Arguments that take precedence where it is rehearsed.
        writes (`bool`): Whether it writes a table.
    """

    name: str
    limit: float
    command: tuple[str, ...]
    rehearsal: tuple[str, ...] = ()
    writes: bool = True

    def arguments(self, rehearsed: bool, results: Path) -> list[str]:
        where = ["--results", str(results), "--table", self.name] if self.writes else []
        return [*self.command, *(self.rehearsal if rehearsed else ()), *where]


def benchmark(name: str, limit: float, script: str, *arguments: str, rehearsal: Sequence[str]) -> Part:
    return Part(name, limit, (str(HERE / f"{script}.py"), *arguments), tuple(rehearsal))


SHARED = ["--models", "Llama 7B", "--targets", "--repeats", "3"]
SHARED_TINY = ["--models", "Llama 4M", *TINY]
PARTS = [
    benchmark(
        "shared_backbone", 130, "shared_backbone", *SHARED, "--tokens", "16", "--batch-sizes", "1", "--genarm", "2",
        "3", rehearsal=SHARED_TINY,
    ),
    benchmark(
        "training_step", 100, "training_step", "--model", "Llama 7B", "--pairs", "2", "--prompt", "512", "--response",
        "512", "--checkpointing", "--no-dpo", "--targets", "--repeats", "3",
        rehearsal=["--model", "Llama 4M", "--pairs", "1", "--prompt", "8", "--response", "8", "--repeats", "2"],
    ),
    Part("tests", 90, ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "cuda", *TESTS), writes=False),
    benchmark(
        "compiled", 200, "shared_backbone", *SHARED, "--tokens", "64", "--batch-sizes", "1", "--cache",
        "compiled", "--only", "parm", "sweep", rehearsal=[*SHARED_TINY, "--backend", "eager"],
    ),
    benchmark(
        "weak_to_strong", 110, "weak_to_strong", "--base", "Llama 7B", "--guide", "Llama 1.1B", "--tokens", "32",
        "--repeats", "2", rehearsal=["--base", "Llama 4M", "--guide", "Llama 4M", *TINY],
    ),
    benchmark(
        "shared_backbone_batches", 80, "shared_backbone", *SHARED, "--tokens", "16", "--batch-sizes", "8", "32",
        "--genarm", "2", "3", "--only", "parm", "genarm", rehearsal=[*SHARED_TINY, "--batch-sizes", "2"],
    ),
    benchmark(
        "speculative", 100, "speculative", "--base", "Llama 7B", "--backbone-layers", "5", "--decoding", "greedy",
        "--batch-sizes", "1", "--tokens", "32", "--repeats", "2", "--no-real",
        rehearsal=["--base", "Llama 4M", "--backbone-layers", "1", "--strangeness", "0.02", *TINY],
    ),
    benchmark(
        "adapter_overhead", 60, "adapter_overhead", "--quick", "--sizes", "2048", "4096", "--seconds", "0.5",
        rehearsal=["--sizes", "64", "--layers", "1", "--seconds", "0.05"],
    ),
    benchmark(
        "compiled_batches", 250, "shared_backbone", *SHARED, "--tokens", "64", "--batch-sizes", "8", "32", "--cache",
        "compiled", "--only", "parm", rehearsal=[*SHARED_TINY, "--batch-sizes", "2", "--backend", "eager"],
    ),
    benchmark(
        "compiled_genarm", 200, "shared_backbone", *SHARED, "--tokens", "64", "--batch-sizes", "1", "--genarm", "2",
        "3", "--cache", "compiled", "--only", "genarm", rehearsal=[*SHARED_TINY, "--backend", "eager"],
    ),
    benchmark(
        "fixed_preference", 120, "fixed_preference", "--model", "Llama 1.1B", "--batch-sizes", "1", "--tokens", "32",
        "--repeats", "2", rehearsal=["--model", "Llama 4M", "--backend", "eager", *TINY],
    ),
]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_args(arguments)
    absent = lacking(declared())
    if absent and SITE.is_dir():
        sys.path.insert(0, str(SITE))
        absent = lacking(declared())
    if absent and WHEELS.is_dir():
        install(absent)
        absent = lacking(declared())
    if absent:
        print(
            f"These packages are missing or too old: {', '.join(absent)}. Run `make gpu-wheels` on a machine with a "
            f"package index, and bring {WHEELS.relative_to(ROOT)} here, or install them."
        )
        return 2
    if not args.rehearse and not has_gpu():
        print("There is no GPU that PyTorch can use. `make gpu REHEARSE=1` runs the same with tiny models on a CPU.")
        return 2
    parts = [part for part in PARTS if args.only is None or part.name in args.only]
    results = args.results or (REHEARSAL if args.rehearse else HERE / "results")
    return run(parts, args.seconds, results, args.rehearse)


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="tiny models, on a CPU too")
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS], help="these parts")
    parser.add_argument("--seconds", type=float, default=530, help="for all parts together")
    parser.add_argument("--results", type=Path, help="folder of the tables")
    return parser.parse_args(arguments)


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def declared() -> list[str]:
    """What the package needs, and pytest."""
    config = ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    return [*config["options"]["install_requires"].split(), "pytest"]


def listed() -> list[str]:
    """The requirements that wheels are collected of."""
    lines = (HERE / "gpu_wheels.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def lacking(wanted: Sequence[str]) -> list[str]:
    """Those of some requirements that are not fulfilled, and what packages of the list need that is not there at all.

    What comes with torch and others that are on every such machine is theirs to know.
    """
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return ["packaging"]
    found, seen, ours = [], set(), {Requirement(line).name for line in listed()}

    def look(text: str, version_counts: bool) -> None:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            return
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            found.append(requirement.name)
            return
        if version_counts and not requirement.specifier.contains(version, prereleases=True):
            found.append(requirement.name)
        elif requirement.name in ours - seen:
            seen.add(requirement.name)
            for other in metadata.requires(requirement.name) or ():
                look(other, False)

    for text in wanted:
        look(text, True)
    return list(dict.fromkeys(found))


def install(names: Sequence[str]) -> None:
    """Installs what the wheels have of these packages, and of all that is listed with them, beside the others."""
    from packaging.requirements import Requirement

    known = [Requirement(line) for line in listed()]
    wanted = [str(one) for one in known if one.name in names or lacking([one.name])]
    if wanted:
        command = ["-m", "pip", "install", "-q", "--no-index", "--no-deps", "--upgrade", "--target", str(SITE)]
        subprocess.run([sys.executable, *command, "--find-links", str(WHEELS), *wanted], check=False)
    if str(SITE) not in sys.path:
        sys.path.insert(0, str(SITE))


def run(parts: Sequence[Part], seconds: float, results: Path, rehearsed: bool) -> int:
    """Runs the parts one after the other, with the table `gpu` of how they went; the exit code."""
    sys.path += [str(path) for path in (ROOT, HERE) if str(path) not in sys.path]
    from common import report

    rows: list[dict[str, object]] = []

    def kept() -> Iterator[dict[str, object]]:
        deadline = time.monotonic() + seconds
        for part in parts:
            rows.append(run_part(part, deadline, results, rehearsed))
            print(rows[-1], flush=True)
            yield rows[-1]

    note = f"{seconds:g} seconds for all parts together. The last line is what a part printed last."
    report("gpu", kept(), [note], results)
    others = [str(row["part"]) for row in rows if row["exit"] != 0]
    if others:
        print(f'These parts did not run to their end: make gpu ONLY="{" ".join(others)}"')
    return 1 if others else 0


def run_part(part: Part, deadline: float, results: Path, rehearsed: bool) -> dict[str, object]:
    """Runs a part until its limit, or until the time of all is up, and says how it went."""
    start, began = time.monotonic(), time.time()
    limit = min(part.limit, deadline - start)
    row = {"part": part.name, "seconds": "0", "limit": f"{part.limit:g}", "exit": "no time left", "table": ""}
    if limit <= 0:
        return row | {"last line": ""}
    print(f"\n== {part.name}, {limit:.0f} seconds at most", flush=True)
    code, last = watch([sys.executable, *part.arguments(rehearsed, results)], limit)
    tables = [path.name for path in sorted(results.glob(f"{part.name}*.md")) if path.stat().st_mtime >= began - 1]
    tables = [name for name in tables if name in (f"{part.name}.md", f"{part.name}_cuda.md")]
    return row | {
        "seconds": f"{time.monotonic() - start:.0f}",
        "exit": "out of time" if code is None else code,
        "table": " ".join(tables),
        "last line": last.replace("|", "¦")[:200] if not tables or code != 0 else "",
    }


def watch(command: Sequence[str], limit: float) -> tuple[int | None, str]:
    """Runs a process with all that it starts, ends them after `limit` seconds, and prints what they print.

    Returns:
        `tuple` of the exit code, `None` if they were ended, and the last line.
    """
    paths = [str(path) for path in (SITE, ROOT) if str(path) in sys.path]
    given = os.environ.get("PYTHONPATH")
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join([*paths, *([given] if given else [])]), "PYTHONUNBUFFERED": "1",
        "CI": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, errors="replace", start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    lines = [""]

    def read() -> None:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            lines[0] = line.strip() or lines[0]

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    code: int | None = None
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        print(f"ended after {limit:.0f} seconds", flush=True)
    finally:
        end_group(process)
    reader.join(5)
    return code, lines[0]


def end_group(process: subprocess.Popen) -> None:
    """Ends a process and those that it has started, some of which may outlive it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


if __name__ == "__main__":
    sys.exit(main())
