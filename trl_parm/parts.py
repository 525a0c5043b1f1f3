# SPDX-License-Identifier: Apache-2.0
"""Files that several processes write rows into, one each, beside the file of rows that they become together.

A part begins with a line that says of what configuration its rows are. Every further line is a batch, so that a kill
costs whole batches. Parts whose processes were killed stay there, until the rows are opened for writing again.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .jsonl import as_line, beside, lock, parse


Row = dict[str, Any]


class Part:
    """The rows of one process, in a file that only it writes.

    Args:
        path (`str` or `Path`): The file that the parts become, such as `results.jsonl`.
        number (`int`): The process, whose part is `results.part-0.jsonl`.
        mark (`str`): What configuration the rows are of, see [`make_parts`].

    Raises:
        ValueError: there is no such part, or not of this configuration: the folder is not the first process's; another
            process writes it.
    """

    def __init__(self, path: str | Path, number: int, mark: str) -> None:
        self.path = part_path(path, number)
        if not self.path.is_file():
            raise ValueError(
                f"Process {number} finds no {self.path}, which process 0 has made. All processes need one folder, "
                "also those on other machines: name one on a common disk."
            )
        self.file = self.path.open("r+b")
        try:
            lock(self.file, self.path)
            if self.file.read() != _head(mark).encode():
                raise ValueError(f"{self.path} is not the empty part that process 0 has made for process {number}.")
        except BaseException:
            self.file.close()
            raise

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Writes a batch, so that it survives whatever happens after this call."""
        self.file.write(as_line({"rows": list(rows)}).encode())
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        """Lets others read and remove it."""
        self.file.close()


def part_path(path: str | Path, number: int) -> Path:
    """Where the part of a process stands."""
    return beside(os.path.realpath(path), f"part-{number}.jsonl")


def make_parts(path: str | Path, count: int, mark: str) -> None:
    """Makes an empty part for each process. There must be none, see [`taken_parts`]."""
    for number in range(count):
        with part_path(path, number).open("x", encoding="utf-8") as file:
            file.write(_head(mark))
            file.flush()
            os.fsync(file.fileno())


def find_parts(path: str | Path) -> list[Path]:
    """The parts that there are, by their numbers."""
    first = part_path(path, 0)
    start, end = first.name.removesuffix("0.jsonl"), ".jsonl"
    found = first.parent.glob(f"{glob.escape(start)}*{end}")
    return sorted((p for p in found if _number(p, start, end) is not None), key=lambda p: _number(p, start, end) or 0)


def read_part(path: Path, data: bytes) -> tuple[str | None, list[Row]]:
    """The mark and the rows of a part, without a batch that was not written to its end. Raises `ValueError` for what
    is no part."""
    lines, whole = parse(data, path)
    if not lines and _head("").encode().startswith(data[:10]):
        return None, []  # killed before it was written
    if not lines or set(lines[0]) != {"rows_of"} or any(set(line) != {"rows"} for line in lines[1:]):
        raise ValueError(f"{path} is in the place of a process's rows, but is none. Move that file away.")
    return lines[0]["rows_of"], [row for line in lines[1:] for row in line["rows"]]


def with_parts(stored: list[Row], parts: Iterable[list[Row]]) -> list[Row]:
    """The rows of a file and those of its parts. A kill while they were put together has left some in both."""
    new = [row for rows in parts for row in rows]
    known = {as_line(row) for row in stored} if new else ()
    return [*stored, *(row for row in new if as_line(row) not in known)]


@contextlib.contextmanager
def taken_parts(path: str | Path) -> Iterator[dict[Path, tuple[str | None, list[Row]]]]:
    """The mark and the rows of each part, which nobody else writes within the block. Raises `ValueError` for one that
    is being written, or is no part."""
    with contextlib.ExitStack() as stack:
        found = {}
        for part in find_parts(path):
            file = stack.enter_context(part.open("r+b"))
            lock(file, part)
            found[part] = read_part(part, file.read())
        yield found


def _head(mark: str) -> str:
    return json.dumps({"rows_of": mark}) + "\n"


def _number(path: Path, start: str, end: str) -> int | None:
    digits = path.name[len(start) : -len(end)]
    return int(digits) if digits.isascii() and digits.isdigit() else None
