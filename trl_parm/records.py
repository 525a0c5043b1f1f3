# SPDX-License-Identifier: Apache-2.0
"""What a run leaves: rows, from which one that was killed goes on, and what they came from. Not what is in them."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from textwrap import shorten
from types import MappingProxyType
from typing import Any, cast

import yaml

from peft_pblora.output import check_output, output_file

from .jsonl import as_line, configuration_path, lock, parse
from .parts import Part, find_parts, make_parts, read_part, taken_parts, with_parts
from .preference_text import FILE as PREFERENCE_TEXT
from .processes import ALONE, Processes


PACKAGES = (
    "trl-parm", "torch", "transformers", "peft", "trl", "datasets", "accelerate", "numpy", "scipy", "moocore", "vllm",
)  # fmt: skip
HASHED = (
    "*.safetensors", "pytorch_model*.bin", "adapter_model.bin", "config.json", "adapter_config.json",
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "*.gguf", "*.py",
    PREFERENCE_TEXT,
)  # fmt: skip
"""What a model's answers depend on; not what a trainer writes about itself."""
VOCABULARIES = ("*.model", "vocab.*", "merges.txt", "added_tokens.json", "special_tokens_map.json")
"""What a tokenizer depends on where there is no `tokenizer.json`."""
SECRET = ("token", "use_auth_token", "hf_token")
NOT_RECORDED = ("device_map", *SECRET)
"""Arguments of `from_pretrained` that change no model."""
WHOLE = 64 * 2**20
"""Files up to this size are hashed as a whole, of larger ones the first and the last MiB, and 4 KiB of each 1024th."""

logger = logging.getLogger(__name__)


class Records:
    """Rows in a JSONL file, with the configuration that they belong to in a file beside it.

    Rows are written as soon as they are there. What a kill left half-written is the last line at most; it is dropped.

    Several [`Processes`] write one file together. Each appends to a part of its own, and [`gather`](Records.gather)
    puts the parts into the file. Parts that a kill has left are put there when the file is opened the next time, by as
    many processes as there are then.

    Args:
        path (`str` or `Path`, *optional*):
            The file, such as `results.jsonl`, with its configuration in `results.config.json`; in memory if `None`.
        configuration (`Mapping`): What the rows depend on, as JSON. Rows that are there already must belong to it.
        growing (`Mapping[str, str]`, *optional*):
            Keys of the configuration that are mappings to which entries may be added, such as methods by name, and the
            column that names a row's entry. An entry that is there already must stay as it is.
        restart (`bool`, *optional*, defaults to `False`):
            Remove rows of another configuration, instead of refusing them: those of the entries that differ, or all.
        cell_of (`Callable`, *optional*): What a row is of, such as its method and prompt. No two are of the same.
        processes ([`Processes`], *optional*): Who writes together, on one disk; this process alone if not given.
        renew (`Callable`, *optional*): What becomes of the rows that stay when the file is opened, such as those on
            which a judge failed: other rows in their places, or none, which are missing then.

    Raises:
        ValueError: rows of another configuration, or without one; rows that are not such rows, or twice there;
            anything else in one of the files; a path that can't be written to; another job that writes this file;
            processes with other configurations, without a path, or without a common folder.
    """

    def __init__(
        self,
        path: str | Path | None,
        configuration: Mapping[str, Any],
        growing: Mapping[str, str] = MappingProxyType({}),
        restart: bool = False,
        cell_of: Callable[[Mapping[str, Any]], Any] | None = None,
        processes: Processes = ALONE,
        renew: Callable[[list[dict[str, Any]]], list[dict[str, Any]]] = list,
    ) -> None:
        self.rows: list[dict[str, Any]] = []
        self._file: Any = None
        self._part: Part | None = None
        self._merged = False
        self._turns = itertools.count()
        self._cell_of, self.processes, self._renew = cell_of, processes, renew
        if path is None:
            if processes.count > 1:
                raise ValueError(f"{processes.count} processes share work by a file of rows. Name one as `path`.")
            return
        self.path, self.configuration = Path(path), json.loads(json.dumps(configuration))
        processes.agree({key: self.configuration[key] for key in sorted(self.configuration)})
        try:
            processes.first(partial(self._open, growing, restart))
            if processes.count > 1:
                self.rows = parse(self.path.read_bytes(), self.path)[0]
                self._part = Part(self.path, processes.number, self._mark())
        except BaseException:
            self.__exit__()
            raise

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Writes rows, so that they survive whatever happens to the process or to the machine after this call."""
        rows = [dict(row) for row in rows]
        if self._part is not None:
            self._part.append(rows)
        elif self._file is not None:
            self._write(rows)
        self.rows += rows

    def missing(self, cells: Sequence[Any], cell_of: Callable, batch_size: int) -> Iterator[tuple[int, list[int]]]:
        """The size of each batch of cells, and the numbers of those in it that no row is of and that are for this
        process to do. Batches are cut as if nothing was there and nobody else, so that they are those of one run;
        processes take those with something missing in turn, and must all ask for the same."""
        done = set(map(cell_of, self.rows))
        for start in range(0, len(cells), batch_size):
            batch = range(start, min(start + batch_size, len(cells)))
            todo = [number for number in batch if cells[number] not in done]
            own = not todo or next(self._turns) % self.processes.count == self.processes.number
            yield len(batch), todo if own else []

    def gather(self, cells: Sequence[Any], cell_of: Callable) -> None:
        """Waits until all processes have done their share. Then the file, and `rows` in each process, have the rows of
        all, in the order of these cells, after rows of others. What one process has written alone stays as it is.

        Raises:
            ValueError: a cell without a row.
        """
        if self._part is not None:
            self._part.close()
            self.processes.gather(None)
        if self.processes.count > 1 or self._merged:
            self.processes.first(partial(self._put_in_order, cells, cell_of))
            self.rows = parse(self.path.read_bytes(), self.path)[0]
        lost = set(cells) - set(map(cell_of, self.rows))
        if lost:
            raise ValueError(f"{len(lost)} rows are missing, although all processes are done. Start them again.")

    def __enter__(self) -> Records:
        return self

    def __exit__(self, *_: object) -> None:
        for file in (self._file, self._part):
            if file is not None:
                file.close()

    def _open(self, growing: Mapping[str, str], restart: bool) -> None:
        """Opens the file, makes of it and of the parts beside it the rows that stay, and makes new parts."""
        self._lock()
        self._file.seek(0)
        data = self._file.read()
        with taken_parts(self.path) as parts:
            stored, whole = parse(data, self.path)
            self._check_marks({part: mark for part, (mark, rows) in parts.items() if rows})
            self.rows = with_parts(stored, [rows for _, rows in parts.values()])
            if self._cell_of is not None:
                check_cells(self.rows, self._cell_of, self.path)
            kept = self._match(growing, bool(data or self.rows), restart)
            if whole < len(data):  # only now that the file is known to be one of ours
                logger.warning("The last line of %s was not written to its end. It is redone.", self.path)
                self._file.truncate(whole)
            self._replace(stored, kept)
            self._merged = len(kept) > len(stored)
            for part in parts:
                part.unlink()
        self._write_configuration()
        self._replace(kept, self._renew(kept))  # once nothing can be lost that is there
        if self.processes.count > 1:
            make_parts(self.path, self.processes.count, self._mark())

    def _check_marks(self, marks: Mapping[Path, str | None]) -> None:
        for part, mark in marks.items() if configuration_path(self.path).is_file() else ():
            if mark != self._mark():
                raise ValueError(
                    f"{part} has rows of another configuration than those of {self.path}. Move that file away."
                )

    def _lock(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+b")
        except OSError as error:
            raise ValueError(f"{self.path} can't be written: {error}. Name another output.") from None
        lock(self._file, self.path)

    def _put_in_order(self, cells: Sequence[Any], cell_of: Callable) -> None:
        """Puts the rows of all parts into the file."""
        place = {cell: number for number, cell in enumerate(cells)}
        with taken_parts(self.path) as parts:
            stored = parse(self.path.read_bytes(), self.path)[0]
            rows = with_parts(stored, [rows for _, rows in parts.values()])
            self._replace(stored, sorted(rows, key=lambda row: place.get(cell_of(row), -1)))
            for part in parts:
                part.unlink()

    def _replace(self, stored: Sequence[dict], rows: list[dict]) -> None:
        """Makes the file, which holds some rows, hold others: it appends where it can."""
        if rows[: len(stored)] == stored:
            self._write(rows[len(stored) :])
        else:
            with output_file(os.path.realpath(self.path)) as file:  # whatever ends this, no row that stays is lost
                file.writelines(map(as_line, rows))
            self._file.close()
            self._lock()
        self.rows = rows

    def _write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self._file.write("".join(map(as_line, rows)).encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def _mark(self) -> str:
        """What says in a part of which configuration its rows are: a hash of the file that has it."""
        return hashlib.sha256(configuration_path(self.path).read_bytes()).hexdigest()[:16]

    def _match(self, growing: Mapping[str, str], begun: bool, restart: bool) -> list[dict[str, Any]]:
        """The rows that stay. Refuses rows of another configuration, and files that are none of ours."""
        path, known, fault = configuration_path(self.path), cast(Any, None), None
        if os.path.lexists(path):
            with contextlib.suppress(OSError, ValueError):
                known = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(known, dict):
                fault = f"{path} is not the configuration of any rows"
            elif not self.rows and set(known) != set(self.configuration):
                fault = f"{path} was there before {self.path} and is no configuration of such rows"
        elif begun:
            fault = (
                f"{self.path}, or a part of it, is not empty, but {path.name}, which says of what configuration its "
                "rows are, is not beside it"
            )
        if fault is not None:
            raise ValueError(f"{fault}. Name another output, or move that file away.")
        if not self.rows:
            return []
        found = differences(known, self.configuration, growing)
        if found and (not restart or set(known).isdisjoint(self.configuration)):
            raise ValueError(
                f"{self.path} belongs to another configuration: {'; '.join(found)}. Name another output, or let this "
                "one start anew with `restart`."
            )
        kept, given = self.rows, self.configuration
        if found:
            fixed = [{key: value for key, value in one.items() if key not in growing} for one in (known, given)]
            changed = {
                column: {name for name, entry in given.get(key, {}).items() if known.get(key, {}).get(name) != entry}
                for key, column in growing.items()
            }
            kept = [row for row in kept if not any(row[column] in names for column, names in changed.items())]
            kept = [] if differences(*fixed) else kept
            logger.warning(
                "%d rows of %s are done again: %s.", len(self.rows) - len(kept), self.path, "; ".join(found)
            )
        for key in {*growing} & {*known, *given} if kept else ():
            given[key] = {**known.get(key, {}), **given.get(key, {})}
        return kept

    def _write_configuration(self) -> None:
        text = json.dumps(self.configuration, indent=2, ensure_ascii=False) + "\n"
        path = configuration_path(self.path)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            with output_file(path) as file:
                file.write(text)


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file and of the parts that several processes write beside it. A last line without its end,
    which a killed run leaves, is passed over. Raises `ValueError` if there is no such file, no row, or a line that is
    no JSON."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There are no results at {path}. Name a JSONL file that `evaluate` has written.")
    data = path.read_bytes()
    rows, whole = parse(data, path)
    rows = with_parts(rows, [read_part(part, part.read_bytes())[1] for part in find_parts(path)])
    if whole < len(data):
        logger.warning("The last line of %s was not written to its end. It is passed over.", path)
    if not rows:
        raise ValueError(f"{path} has no complete row. Let the run that writes it go on.")
    return rows


def read_configuration(path: str | Path) -> dict[str, Any]:
    """The configuration of a file of results. Raises `ValueError` if it can't be read, or names no objectives."""
    beside, found = configuration_path(path), None
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(beside.read_text(encoding="utf-8"))
    if not isinstance(found, dict) or not isinstance(found.get("objectives"), list):
        raise ValueError(f"{beside}, which says what {path} is, is missing or no configuration of results.")
    return found


def differences(known: Mapping[str, Any], given: Mapping[str, Any], growing: Iterable[str] = ()) -> list[str]:
    """What a configuration says otherwise than one that is known, in words; of `growing` keys the entries of both.
    What is missing counts as `None`."""
    found = []
    for key in sorted(set(known) | set(given)):
        old, new = known.get(key), given.get(key)
        if key in growing and not old and not new:
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            both = set(old) & set(new) if key in growing else set(old) | set(new)
            old, new = ({k: v for k, v in values.items() if k in both} for values in (old, new))
            found += [f"{key} {text}" for text in differences(old, new)]
        elif old != new:
            was = f"was {shorten(str(old), 120)}" if key in known else "is not recorded"
            found.append(f"{key} {was}, but is {shorten(str(new), 120) if key in given else 'gone'}")
    return found


def check_cells(rows: Sequence[Mapping[str, Any]], cell_of: Callable[[Mapping[str, Any]], Any], path: Path) -> list:
    """What rows are of. Raises `ValueError` for rows of another kind, and for two of the same cell."""
    seen: dict[Any, int] = {}
    for number, row in enumerate(rows, 1):
        try:
            first = seen.setdefault(cell_of(row), number)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else error
            raise ValueError(
                f"Line {number} of {path} is no row of this version: {reason}. Take that line out, or name another "
                "output."
            ) from None
        if first != number:
            raise ValueError(
                f"Lines {first} and {number} of {path} are of the same run and prompt. Take one of them out, or name "
                "another output."
            )
    return list(seen)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on, where they are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def write_run(path: str | Path, verb: str, arguments: Mapping[str, Any]) -> None:
    """Writes a run's resolved arguments, defaults and seeds included, and versions as YAML.

    Where `path` is of another verb, or a user's own, the file is `run.<verb>.yaml` in the place of `run.yaml`.

    Raises:
        ValueError: there is a file of somebody else under both names.
    """
    path, writer = Path(path), f"trl-parm {verb}"
    try:
        check_output(path, writer)
    except ValueError:
        path = path.with_suffix(f".{verb}{path.suffix}")
    with output_file(path, writer) as file:
        yaml.safe_dump({"verb": verb, "arguments": plain(arguments), "versions": versions()}, file, sort_keys=False)


def fingerprint(name: str) -> str | None:
    """A hash of the weights and configurations in a local folder, other than that of another training into it; `None`
    for a name on the Hub. Cards, to which results are added, change nothing of it."""
    if not os.path.isdir(name):  # unlike `Path.is_dir`, it takes any text
        return None
    digest, folder = hashlib.sha256(), Path(name)
    patterns = HASHED if (folder / "tokenizer.json").is_file() else (*HASHED, *VOCABULARIES)
    for path in sorted(path for pattern in patterns for path in folder.glob(pattern) if path.is_file()):
        if path.name == "adapter_config.json":
            digest.update(_adapter_settings(path))
            continue
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(WHOLE if size <= WHOLE else 2**20))
            if size > WHOLE:
                for part in range(1, 1024):
                    file.seek(size * part // 1024)
                    digest.update(file.read(2**12))
                file.seek(-(2**20), 2)
                digest.update(file.read())
    return digest.hexdigest()[:16]


def _adapter_settings(path: Path) -> bytes:
    """An adapter's configuration without its card. PEFT makes sets of modules, and saves them in any order."""
    content = path.read_bytes()
    try:
        settings = {key: value for key, value in json.loads(content).items() if key != "card"}
    except (ValueError, AttributeError):  # loading it will say so
        return content
    for key in ("target_modules", "exclude_modules"):
        if isinstance(settings.get(key), list):
            settings[key] = sorted(settings[key], key=str)
    return json.dumps(settings, sort_keys=True).encode()


def recorded(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What of the arguments of `from_pretrained` changes a model, and is for others to read: no access token."""
    return {key: value for key, value in kwargs.items() if key not in NOT_RECORDED}


def plain(value: Any) -> Any:
    """A value as YAML and JSON can hold it, without the tokens of access in arguments of `from_pretrained`."""
    if isinstance(value, Mapping):
        found = {str(key): plain(entry) for key, entry in value.items()}
        arguments = ("_kwargs", "engine_args")
        kwargs = {key: entry for key, entry in found.items() if key.endswith(arguments) and isinstance(entry, dict)}
        return {**found, **{key: {k: v for k, v in kwargs[key].items() if k not in SECRET} for key in kwargs}}
    if isinstance(value, list | tuple | set):
        return [plain(entry) for entry in (sorted(value, key=str) if isinstance(value, set) else value)]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
