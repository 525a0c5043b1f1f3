# SPDX-License-Identifier: Apache-2.0
"""What a run leaves: rows, from which one that was killed goes on, and what they came from. Not what is in them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from textwrap import shorten
from types import MappingProxyType
from typing import IO, Any, cast

import yaml

from peft_pblora.output import check_output, output_file

from .preference_text import FILE as PREFERENCE_TEXT


PACKAGES = (
    "trl-parm", "torch", "transformers", "peft", "trl", "datasets", "accelerate", "numpy", "scipy", "moocore",
)  # fmt: skip
HASHED = (
    "*.safetensors", "pytorch_model*.bin", "adapter_model.bin", "config.json", "adapter_config.json",
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "*.gguf", "*.py",
    PREFERENCE_TEXT,
)  # fmt: skip
"""What a model's answers depend on; not what a trainer writes about itself."""
VOCABULARIES = ("*.model", "vocab.*", "merges.txt", "added_tokens.json", "special_tokens_map.json")
"""What a tokenizer depends on where there is no `tokenizer.json`."""
SECRET = ("token", "use_auth_token")
NOT_RECORDED = ("device_map", *SECRET)
"""Arguments of `from_pretrained` that change no model."""
WHOLE = 64 * 2**20
"""Files up to this size are hashed as a whole, of larger ones the first and the last MiB, and 4 KiB of each 1024th."""

logger = logging.getLogger(__name__)


class Records:
    """Rows in a JSONL file, with the configuration that they belong to in a file beside it.

    Rows are written as soon as they are there. What a kill left half-written is the last line at most; it is dropped.

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

    Raises:
        ValueError: rows of another configuration, or without one; rows that are not such rows, or twice there;
            anything else in one of the two files; a path that can't be written to; another process that writes this
            file.
    """

    def __init__(
        self,
        path: str | Path | None,
        configuration: Mapping[str, Any],
        growing: Mapping[str, str] = MappingProxyType({}),
        restart: bool = False,
        cell_of: Callable[[Mapping[str, Any]], Any] | None = None,
    ) -> None:
        self.rows: list[dict[str, Any]] = []
        self._file: Any = None
        if path is None:
            return
        self.path, self.configuration = Path(path), json.loads(json.dumps(configuration))
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+b")
        except OSError as error:
            raise ValueError(f"{self.path} can't be written: {error}. Name another output.") from None
        try:
            lock(self._file, self.path)
            self._file.seek(0)
            data = self._file.read()
            self.rows, whole = _parse(data, self.path)
            if cell_of is not None:
                check_cells(self.rows, cell_of, self.path)
            kept = self._match(growing, empty=not data, restart=restart)
            if len(kept) < len(self.rows):
                with output_file(os.path.realpath(self.path)) as file:  # whatever ends this, no row that stays is lost
                    file.writelines(map(_line, kept))
                self._file.close()
                self._file = self.path.open("a+b")
                lock(self._file, self.path)
                self.rows, whole = kept, len(data)
            if whole < len(data):  # only now that the file is known to be one of ours
                logger.warning("The last line of %s was not written to its end. It is redone.", self.path)
                self._file.truncate(whole)
            self._write_configuration()
        except BaseException:
            self._file.close()
            raise

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Writes rows, so that they survive whatever happens to the process or to the machine after this call."""
        rows = [dict(row) for row in rows]
        text = "".join(map(_line, rows))
        if self._file is not None:
            self._file.write(text.encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        self.rows += rows

    def missing(self, cells: Sequence[Any], cell_of: Callable, batch_size: int) -> Iterator[tuple[int, list[int]]]:
        """The size of each batch of cells, and the numbers of those in it that no row is of. Batches are cut as if
        nothing was there, so that they are those of one run."""
        done = set(map(cell_of, self.rows))
        for start in range(0, len(cells), batch_size):
            batch = range(start, min(start + batch_size, len(cells)))
            yield len(batch), [number for number in batch if cells[number] not in done]

    def __enter__(self) -> Records:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def _match(self, growing: Mapping[str, str], empty: bool, restart: bool) -> list[dict[str, Any]]:
        """The rows that stay. Refuses rows of another configuration, and files that are none of ours."""
        path, known, fault = configuration_path(self.path), cast(Any, None), None
        if os.path.lexists(path):
            with contextlib.suppress(OSError, ValueError):
                known = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(known, dict):
                fault = f"{path} is not the configuration of any rows"
            elif not self.rows and set(known) != set(self.configuration):
                fault = f"{path} was there before {self.path} and is no configuration of such rows"
        elif not empty:
            fault = (
                f"{self.path} is not empty, but {path.name}, which says of what configuration its rows are, is not "
                "beside it"
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
        for key in growing if kept else ():
            given[key] = {**known.get(key, {}), **given.get(key, {})}
        return kept

    def _write_configuration(self) -> None:
        text = json.dumps(self.configuration, indent=2, ensure_ascii=False) + "\n"
        path = configuration_path(self.path)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            with output_file(path) as file:
                file.write(text)


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file. A last line without its end, which a killed run leaves, is passed over. Raises
    `ValueError` if there is no such file, no row, or a line that is no JSON."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There are no results at {path}. Name a JSONL file that `evaluate` has written.")
    data = path.read_bytes()
    rows, whole = _parse(data, path)
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


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _parse(data: bytes, path: Path) -> tuple[list[dict[str, Any]], int]:
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


def differences(known: Mapping[str, Any], given: Mapping[str, Any], growing: Iterable[str] = ()) -> list[str]:
    """What a configuration says otherwise than one that is known, in words; of `growing` keys the entries of both.
    What is missing counts as `None`."""
    found = []
    for key in sorted(set(known) | set(given)):
        old, new = known.get(key), given.get(key)
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
    for a name on the Hub."""
    if not os.path.isdir(name):  # unlike `Path.is_dir`, it takes any text
        return None
    digest, folder = hashlib.sha256(), Path(name)
    patterns = HASHED if (folder / "tokenizer.json").is_file() else (*HASHED, *VOCABULARIES)
    for path in sorted(path for pattern in patterns for path in folder.glob(pattern) if path.is_file()):
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


def recorded(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What of the arguments of `from_pretrained` changes a model, and is for others to read: no access token."""
    return {key: value for key, value in kwargs.items() if key not in NOT_RECORDED}


def plain(value: Any) -> Any:
    """A value as YAML and JSON can hold it, without the tokens of access in arguments of `from_pretrained`."""
    if isinstance(value, Mapping):
        found = {str(key): plain(entry) for key, entry in value.items()}
        kwargs = {key: entry for key, entry in found.items() if key.endswith("_kwargs") and isinstance(entry, dict)}
        return {**found, **{key: {k: v for k, v in kwargs[key].items() if k not in SECRET} for key in kwargs}}
    if isinstance(value, list | tuple | set):
        return [plain(entry) for entry in (sorted(value, key=str) if isinstance(value, set) else value)]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
