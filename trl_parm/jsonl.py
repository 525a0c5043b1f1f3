# SPDX-License-Identifier: Apache-2.0
"""Rows as lines of JSON: written, read back after a kill, kept from other processes; and what stands beside them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any


def as_line(row: Mapping[str, Any]) -> str:
    """A row as one line. Raises `ValueError` for numbers that are not finite."""
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def parse(data: bytes, path: Path) -> tuple[list[dict[str, Any]], int]:
    """The rows, and how many bytes they take. Raises `ValueError` for what no run can have written."""
    whole = data.rfind(b"\n") + 1
    torn = data[whole:].strip(b"\0")
    lines = data[:whole].splitlines() + ([torn] if torn and not torn.startswith(b"{") else [])
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line, parse_constant=_refuse_constant)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise ValueError(
                f"Line {number} of {path} is not a row in JSON. Only the last line of an interrupted run can be "
                "incomplete, so something else has changed the file. Take that line out, or name another output."
            )
        rows.append(row)
    return rows, whole


def configuration_path(path: str | Path) -> Path:
    """Where the configuration of a file of rows stands."""
    return beside(path, "config.json")


def beside(path: str | Path, ending: str) -> Path:
    """A file that belongs to one file of rows: `results.config.json` to `results.jsonl`."""
    path = Path(path)
    return path.with_name(f"{path.stem if path.suffix == '.jsonl' else f'{path.name}.rows'}.{ending}")


def lock(file: IO, path: Path) -> None:
    """Keeps other processes from writing what an open file stands for, until it is closed, as far as the system can.
    Raises `ValueError` if another process has the lock."""
    with contextlib.suppress(ImportError):  # not a Unix
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"Another process is writing {path}. Wait for it, or name another output.") from None
        except OSError:  # a file system without locks
            return
