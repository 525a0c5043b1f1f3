# SPDX-License-Identifier: Apache-2.0
"""Arguments of commands: keys of a YAML file and flags, as fields of a dataclass."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import field
from typing import Any, NoReturn

import yaml
from trl import TrlParser


def option(default: Any, help: str) -> Any:
    """A field of a dataclass of arguments."""
    return field(default=default, metadata={"help": help})


class Parser(TrlParser):
    """TRL's parser: keys from a YAML file and from flags, which win. What is wrong is a `ValueError`."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def parse(verb: str, classes: Any, argv: Sequence[str], description: str | None = None) -> Any:
    """The arguments of a verb from the words after it: an instance of a dataclass, or of each of a tuple of them.

    Raises:
        ValueError: unknown or missing arguments, or a configuration file that is no YAML mapping.
    """
    several = isinstance(classes, tuple)
    parser = Parser(classes if several else (classes,), prog=f"trl-parm {verb}", description=description)
    parser.add_argument("--config", help="A YAML file with any of these keys.")
    words = [word for given in argv for word in (given.split("=", 1) if given.startswith("--config=") else [given])]
    if words[-1:] == ["--config"]:
        raise ValueError("--config names no file.")
    try:
        found = parser.parse_args_and_config(words)
    except yaml.YAMLError as error:
        raise ValueError(f"The configuration file is no YAML: {error}") from None
    return found[: len(classes)] if several else found[0]


def decoded(value: Any) -> Any:
    """A value in which every text that is JSON, as on a command line, is what it stands for.

    Raises `ValueError` for a text that begins like JSON but is none.
    """
    if isinstance(value, list | tuple):
        return [decoded(entry) for entry in value]
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            return json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"{value!r} is no JSON: {error}.") from None
    return value


def required(arguments: Any, *names: str) -> None:
    """Raises `ValueError` unless these arguments were given."""
    missing = [name for name in names if getattr(arguments, name) in (None, "", [], {})]
    if missing:
        raise ValueError(f"{', '.join(missing)} must be given, in the configuration or as a flag.")
