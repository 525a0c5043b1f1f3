# SPDX-License-Identifier: Apache-2.0
"""Outputs that are either complete or not there, and that cost nobody anything.

Every writer notes what it wrote, with a hash of it, in a hidden file beside it. Only what a writer has noted, and what
is still as it wrote it, is ever replaced or removed: whatever else stands in the way is an error.
"""

import contextlib
import hashlib
import os
import re
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


NOTES = ".written_by_trl_parm"
"""What was written into a folder: lines with a writer, the SHA-256 of a file and its path from there."""
DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{i}" for port in ("com", "lpt") for i in range(10))}
"""What Windows takes for a device, whatever ending it has."""


def file_name(name: str) -> str:
    """A name from outside, such as an adapter's objective, as the name of one file or folder below an output.

    Short names of small Latin letters, digits and `_.,=+-` stay as they are. All others become what can be read of
    them, `~` and a hash, as `helpful~dccecd84eda81616` for `../Helpful`, so that two names never share a file, not
    even where upper and lower case are the same.
    """
    if re.fullmatch(r"[a-z0-9_]([a-z0-9_.,=+-]{0,98}[a-z0-9_])?", name) and name.split(".")[0] not in DEVICES:
        return name
    readable = re.sub(r"[^\w.,=+-]+", "_", name).lower().strip("_.,=+-")[:40] or "name"
    mark = "_" if readable.split(".")[0] in DEVICES else ""
    return f"{mark}{readable}~{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"


def check_output(path: str | Path, writer: str) -> None:
    """Raises `ValueError` unless there is nothing at a path, an empty folder, or just what this writer wrote there."""
    path = Path(path)
    with _alone(path.parent):
        _refuse_foreign(path, writer)


def remove_output(path: str | Path, writer: str) -> None:
    """Removes a file that is as this writer wrote it; anything else stays."""
    path = Path(path)
    with _alone(path.parent):
        if path.is_file() and _foreign(path, writer) is None:
            path.unlink()


@contextlib.contextmanager
def output_folder(path: str | Path, writer: str = "output", needed_bytes: int = 0) -> Iterator[Path]:
    """Gives a fresh folder to write into and moves it to `path` only if the block ends without an error.

    An older folder there is replaced as a whole. After an error it is as it was, and nothing new stays behind.

    Args:
        path (`str` or `Path`): Where the results shall stand; a link leads to where it points.
        writer (`str`, *optional*, defaults to `"output"`): Who writes.
        needed_bytes (`int`, *optional*, defaults to 0): Free disk space to ask for before the work begins.

    Raises:
        ValueError: `path` is a file, or holds anything that is not as this writer wrote it, it can't be written, or
            the disk has too little space.
    """
    path = Path(os.path.realpath(path))
    with contextlib.suppress(OSError):  # asked once: another process may move a folder away meanwhile
        if not stat.S_ISDIR(path.stat().st_mode):
            raise ValueError(f"The output folder {path} is a file. Name another folder.")
    _check_place(path, needed_bytes)
    check_output(path, writer)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name[:40]}-", dir=path.parent))
    new, old = work / "new", work / "old"
    new.mkdir()
    try:
        yield new
        _note(new, writer, {file.relative_to(new): file for file in new.rglob("*") if file.is_file()})
        _move(new, path, old, writer)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        if _foreign(old, writer) is None:
            shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def output_file(path: str | Path, writer: str | None = None, binary: bool = False) -> Iterator[Any]:
    """Gives a file to write into, which takes its place at `path` only if the block ends without an error.

    Args:
        path (`str` or `Path`): Where the file shall stand.
        writer (`str`, *optional*):
            Who writes: an older file is replaced if it is as this writer wrote it, and refused otherwise. Without it
            any file is replaced, for callers that have looked at what stands there; whose it was, it stays.
        binary (`bool`, *optional*, defaults to `False`): Give a file for bytes instead of one for text in UTF-8.

    Raises:
        ValueError: `path` is a folder or a file that is not the writer's, or its folder can't be written to.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"The output file {path} is a folder. Name a file.")
    if writer is not None:
        check_output(path, writer)
    _check_place(path)
    owner = _owner(path) if writer is None else writer
    staging = path.with_name(f".{uuid.uuid4().hex}.partial")
    try:
        with staging.open("xb") if binary else staging.open("x", encoding="utf-8") as file:
            yield file
        with _alone(path.parent):
            if writer is not None:
                _refuse_foreign(path, writer)  # again, since the work has taken its time
            if owner is not None:
                _note(path.parent, owner, {Path(path.name): staging})
            staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)


@contextlib.contextmanager
def output_files(path: str | Path, writer: str) -> Iterator[Path]:
    """Gives a fresh folder whose files come into the folder `path` only if the block ends without an error.

    What else is in that folder stays. Raises `ValueError` if a file there would be replaced that is not as this writer
    wrote it, or if it can't be written to.
    """
    path = Path(os.path.realpath(path))
    _check_place(path / NOTES)
    work = Path(tempfile.mkdtemp(prefix=".", suffix=".partial", dir=path))
    try:
        yield work
        files = {path / file.relative_to(work): file for file in work.rglob("*") if file.is_file()}
        with _alone(path):
            for target in files:
                _refuse_foreign(target, writer)
            for target, file in files.items():
                target.parent.mkdir(parents=True, exist_ok=True)
                _note(target.parent, writer, {Path(target.name): file})
                file.replace(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keeps other processes from moving outputs below a folder, where the system can; the lock ends with the block."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError, OSError):  # not a Unix, no such folder yet, or no locks on its disk
            import fcntl

            opened = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, opened)
            fcntl.flock(opened, fcntl.LOCK_EX)
        yield


def _refuse_foreign(path: Path, writer: str, place: Path | None = None) -> None:
    """As [`check_output`]; `place` is where that which stood at the path is for now."""
    foreign = _foreign(place or path, writer)
    if foreign is not None:
        within = "" if foreign in (path, place) else f" holds {foreign.relative_to(place or path)}, which"
        raise ValueError(
            f"The output {path}{within} was not written by {writer!r}, or was changed or protected since. Nothing is "
            "replaced: name another output, or move that away."
        )


def _move(new: Path, path: Path, old: Path, writer: str) -> None:
    """Moves a new folder to its path. What stood there goes away before, and comes back if it must."""
    with _alone(path.parent):
        _refuse_foreign(path, writer)
        try:
            with contextlib.suppress(FileNotFoundError):
                path.rename(old)
            _refuse_foreign(path, writer, old)  # again, now that nobody can add to it
            new.rename(path)
        except BaseException:
            if old.exists() and not path.exists():
                old.rename(path)
            raise


def _foreign(path: Path, writer: str) -> Path | None:
    """The first thing at a path, or below it, that is not as the writer wrote it."""
    if not os.path.lexists(path):
        return None
    if path.is_symlink() or not path.is_dir():
        return None if _is_noted(path, path.parent, writer, _notes(path.parent)) else path
    notes = _notes(path)
    for entry in sorted(path.rglob("*")):
        if not (entry == path / NOTES or _is_noted(entry, path, writer, notes)):
            return entry
    return None


def _is_noted(path: Path, folder: Path, writer: str, notes: set[str]) -> bool:
    """Whether it is a noted file, or a folder that holds something; what is a link or write-protected never is."""
    if path.is_symlink() or not path.stat().st_mode & stat.S_IWUSR:
        return False
    if path.is_dir():
        return any(path.iterdir())
    return path.is_file() and _line(writer, path, path.relative_to(folder)) in notes


def _owner(path: Path) -> str | None:
    """Who has noted a file as it is, if anybody."""
    if not path.is_file():
        return None
    end = _line("", path, Path(path.name))
    return next((line.removesuffix(end) for line in _notes(path.parent) if line.endswith(end)), None)


def is_written_by(folder: str | Path, writer: str) -> bool:
    """Whether a writer has written into a folder."""
    return any(line.startswith(f"{writer} ") for line in _notes(Path(folder)))


def _notes(folder: Path) -> set[str]:
    path = folder / NOTES
    return set(path.read_text(encoding="utf-8", errors="replace").splitlines()) if path.is_file() else set()


def _note(folder: Path, writer: str, files: Mapping[Path, Path]) -> None:
    """Notes files by their path from the folder, before they are there: a kill must not make them foreign."""
    lines = {_line(writer, file, name) for name, file in files.items()} - _notes(folder)
    with (folder / NOTES).open("a", encoding="utf-8") as notes:
        notes.writelines(f"{line}\n" for line in sorted(lines))


def _line(writer: str, file: Path, name: Path) -> str:
    with file.open("rb") as content:
        return f"{writer} {hashlib.file_digest(content, 'sha256').hexdigest()} {name.as_posix()}"


def _check_place(path: Path, needed_bytes: int = 0) -> None:
    """Raises `ValueError` unless an output can be written there; makes the folder that it is in."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"The output {path} can't be made: {error}. Name another place.") from None
    with _alone(path.parent):
        writable = os.access(path.parent, os.W_OK) and (not path.exists() or os.access(path, os.W_OK))
    if not writable:
        raise ValueError(f"There is no permission to write the output {path}. Name another place.")
    free = shutil.disk_usage(path.parent).free
    if free < needed_bytes:
        raise ValueError(
            f"The output {path} needs {needed_bytes / 1e6:.0f} MB, but its disk has {free / 1e6:.0f} MB free. "
            "Make room or name another place."
        )
