# SPDX-License-Identifier: Apache-2.0
"""Output files and folders that are either complete or not there."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO


@contextlib.contextmanager
def output_folder(path: str | Path, needed_bytes: int = 0) -> Iterator[Path]:
    """Gives a fresh folder to write into and moves it to `path` only if the block ends without an error.

    An older folder at `path` is replaced as a whole; after an error it is as it was, and nothing new stays behind.

    Args:
        path (`str` or `Path`): Where the results shall stand.
        needed_bytes (`int`, *optional*, defaults to 0): Free disk space to ask for before the work begins.

    Raises:
        ValueError: `path` is a file, its parent can't be written to, or the disk has too little space.

    Example:

    ```python
    with output_folder("runs/demo") as folder:
        (folder / "table.md").write_text(table)
    ```
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"The output folder {path} is a file. Name another folder.")
    _check(path, needed_bytes)
    staging = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        yield staging
        staging.chmod(0o755)
        shutil.rmtree(path, ignore_errors=True)
        staging.rename(path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def output_file(path: str | Path) -> Iterator[TextIO]:
    """Gives a UTF-8 text file to write into, which replaces `path` only if the block ends without an error.

    Raises:
        ValueError: `path` is a folder, or its folder can't be written to.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"The output file {path} is a folder. Name a file.")
    _check(path, 0)
    staging = path.with_name(f".{path.name}.partial")
    try:
        with staging.open("w", encoding="utf-8") as file:
            yield file
        staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)


def _check(path: Path, needed_bytes: int) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"The output {path} can't be made: {error}. Name another place.") from None
    if not os.access(path.parent, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise ValueError(f"There is no permission to write the output {path}. Name another place.")
    free = shutil.disk_usage(path.parent).free
    if free < needed_bytes:
        raise ValueError(
            f"The output {path} needs {needed_bytes / 1e6:.0f} MB, but its disk has {free / 1e6:.0f} MB free. "
            "Make room or name another place."
        )
