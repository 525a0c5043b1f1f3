# SPDX-License-Identifier: Apache-2.0
"""What a result came from: versions, a run's resolved arguments, and which weights a folder held."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from peft_pblora.output import check_output, output_file


PACKAGES = (
    "trl-parm", "torch", "transformers", "peft", "trl", "datasets", "accelerate", "numpy", "scipy", "moocore",
)  # fmt: skip
HASHED = (
    "*.safetensors", "pytorch_model*.bin", "adapter_model.bin", "config.json", "adapter_config.json",
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
)  # fmt: skip
"""What a model's answers depend on; not what a trainer writes about itself."""
WHOLE = 64 * 2**20
"""Files up to this size are hashed as a whole, of larger ones the first and the last MiB."""


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on, where they are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def write_run(path: str | Path, verb: str, arguments: Mapping[str, Any]) -> None:
    """Writes a run's resolved arguments, seeds included, and versions as YAML, complete or not at all.

    Args:
        path (`str` or `Path`):
            The file, such as `run.yaml`. Where that is of another verb, or a user's own, it is `run.<verb>.yaml`.
        verb (`str`): What ran.
        arguments (`Mapping`): All arguments, defaults included.

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
    """A hash of the weights and configurations in a local folder; `None` for a name on the Hub.

    Two trainings into the same folder have different ones, so their results are not taken for each other's.
    """
    if not os.path.isdir(name):  # unlike `Path.is_dir`, it takes any text
        return None
    digest = hashlib.sha256()
    for path in sorted(path for pattern in HASHED for path in Path(name).glob(pattern)):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(WHOLE if size <= WHOLE else 2**20))
            if size > WHOLE:
                file.seek(-(2**20), 2)
                digest.update(file.read())
    return digest.hexdigest()[:16]


def plain(value: Any) -> Any:
    """A value as YAML and JSON can hold it."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(entry) for entry in (sorted(value, key=str) if isinstance(value, set) else value)]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
