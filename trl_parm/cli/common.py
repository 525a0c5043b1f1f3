# SPDX-License-Identifier: Apache-2.0
"""What all verbs share: reading arguments, data and preferences, progress, and what is written beside results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

import yaml
from trl import TrlParser


if TYPE_CHECKING:
    from datasets import Dataset


RUN_FILE = "run.yaml"


class Parser(TrlParser):
    """TRL's parser: keys from a YAML file and from flags, which win. What is wrong is a `ValueError`."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def parse(verb: str, classes: Any, argv: Sequence[str], description: str | None = None) -> Any:
    """The arguments of a verb.

    Args:
        verb (`str`): The verb.
        classes (`type` or `tuple`): A dataclass, or several.
        argv (`Sequence[str]`): The words after the verb.
        description (`str`, *optional*): For `--help`.

    Returns:
        An instance of the class, or a tuple of several.

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

    Raises:
        ValueError: a text that begins like JSON but is none.
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


def progress(total: int, unit: str) -> Any:
    """A progress bar; none where standard error is not a terminal."""
    from tqdm import tqdm

    return tqdm(total=total, unit=unit, disable=None, dynamic_ncols=True)


def say(text: str) -> None:
    """A line on standard output, at once."""
    from tqdm import tqdm

    tqdm.write(text)


def write_run(folder: str | Path, verb: str, arguments: Any) -> None:
    """Writes the resolved arguments, seeds and versions beside results."""
    from trl_parm import records

    records.write_run(Path(folder) / RUN_FILE, verb, asdict(arguments))


def load_data(given: Any) -> Dataset:
    """A data set by what stands in YAML: a path, or a mapping with the keys of [`PairData`]."""
    from trl_parm.training.config import ARMArguments

    entry: Any = {"path": given} if isinstance(given, str) else given
    return cast(Any, ARMArguments("", train_data=[entry]).train_data[0].load())


def load_rewards(given: Mapping[str, Any]) -> dict[str, Any]:
    """Objective → [`RewardSource`], whose models are not loaded yet, and whose functions are there."""
    from trl_parm.reward_models import RewardSource

    if not isinstance(given, Mapping):
        raise ValueError(f"`rewards` is {given!r}, but it must map each objective to a reward.")
    sources = {name: RewardSource.of(source) for name, source in given.items()}
    for source in sources.values():
        if not source.is_model:
            source.load()
    return sources


def grid(preferences: Any, steps: int | None, objectives: list[str]) -> list[list[float]]:
    """The preferences that are given, or the regular grid of so many steps.

    Raises:
        ValueError: neither is given, or a preference is off the simplex.
    """
    from peft_pblora import as_preference, preference_grid

    if preferences:
        return [as_preference(preference, objectives).tolist() for preference in preferences]
    if steps is None:
        raise ValueError("Give `preferences`, points of the simplex, or `grid_steps`, for a regular grid.")
    return preference_grid(objectives, steps).tolist()
