# SPDX-License-Identifier: Apache-2.0
"""Arguments of commands: keys of a YAML file and flags, as fields of a dataclass, checked by type and range."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import re
from argparse import Action, ArgumentParser
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, field
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NoReturn, Union, cast, get_args, get_origin, get_type_hints

import yaml
from trl import TrlParser


Kinds = dict[Any, "Kinds"]
KINDS = {
    bool: "true or false", int: "a whole number", float: "a number", str: "a text", list: "a list", dict: "a mapping",
    NoneType: "nothing",
}  # fmt: skip
"""Types that an argument can have, as errors call them."""
POSITIVE = {
    "batch_size", "max_new_tokens", "max_prompt_length", "num_prompts", "num_answers", "grid_steps", "resamples",
    "html_prompts", "rank", "per_device_train_batch_size", "per_device_eval_batch_size",
    "gradient_accumulation_steps", "max_length", "pad_to_multiple_of", "dataset_num_proc",
}  # fmt: skip
"""Whole numbers that must be 1 or larger."""
CHOICES = {
    "dtype": ("auto", "float32", "bfloat16", "float16", "float64"),
    "engine": ("transformers", "vllm"),
}
RANGES = {
    **dict.fromkeys(POSITIVE, (1, math.inf)),
    **dict.fromkeys(("test_size", "validation_size", "tie_margin", "temperature", "learning_rate"), (0, math.inf)),
    **dict.fromkeys(("weight_decay", "max_grad_norm", "num_train_epochs", "top_k", "least_gap"), (0, math.inf)),
    "seed": (0, 2**32 - 1),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "port": (0, 65535),
}
"""The least and the largest value of a key, whatever verb has it."""


JSON: dict[str, Any] = {
    **dict.fromkeys(("label_columns", "ideal_losses", "adapter_kwargs", "model_init_kwargs"), dict | None),
    **dict.fromkeys(("train_preferences", "eval_preferences"), list[list | dict] | None),
    "beta": dict | float,
}
"""The types of arguments of training, which have a text among them for transformers' own parser."""


NOTHING = ("null", "~", "none")
"""Words of a flag, in any case, that mean `None`."""
NONE_IS_A_VALUE = ("report_to",)
"""Keys for which they are words like others."""


class Loader(yaml.SafeLoader):
    """PyYAML's, which reads numbers such as 1e-2 and 2.5E3 as YAML 1.2 does, not as texts."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"), list("-+.0123456789")
)


def option(default: Any, help: str) -> Any:
    """A field of a dataclass of arguments."""
    return field(default=default, metadata={"help": help})


class Parser(TrlParser):
    """TRL's parser: keys from a YAML file and from flags, which win. What is wrong is a `ValueError`.

    A field whose type has a list or a mapping in it takes JSON as a flag, see [`read`].
    """

    def __init__(self, classes: Sequence[type], **kwargs: Any) -> None:
        super().__init__(cast(Any, classes), allow_abbrev=False, **kwargs)
        hints = {name: hint for of in classes for name, hint in get_type_hints(of).items()}
        self.hints = {name: JSON.get(name, hint) if hint is not float else hint for name, hint in hints.items()}
        self.fields = {field.name: field for of in classes for field in dataclasses.fields(of)}

    @staticmethod
    def _parse_dataclass_field(parser: ArgumentParser, field: Field) -> None:
        kinds = _kinds(field.type)
        if not {list, dict} & set(kinds):
            return TrlParser._parse_dataclass_field(parser, field)
        flags = dict.fromkeys((f"--{field.name}", f"--{field.name.replace('_', '-')}"))
        several: dict[str, Any] = {"nargs": "+"} if list in kinds and str not in kinds else {}
        parser.add_argument(
            *flags, dest=field.name, default=_default(field), help=field.metadata.get("help", "JSON."), **several
        )

    def set_defaults_with_config(self, **config: Any) -> list[str]:
        self._refuse_unknown([str(key) for key in config if key not in self.fields])
        return super().set_defaults_with_config(**config)

    def parse_args_and_config(self, args: Any = None, **options: Any) -> Any:
        """As TRL's, but for how it reads the file."""
        words: list[str] = list(args or ())
        if "--config" in words:
            place = words.index("--config")
            config = _read_file(Path(words[place + 1]))
            variables = config.pop("env", None) or {}
            if not isinstance(variables, dict):
                raise ValueError(f"`env` is {variables!r}, but it must be a mapping of variables of the environment.")
            os.environ.update({str(name): str(value) for name, value in variables.items()})
            self.set_defaults_with_config(**config)
            del words[place : place + 2]
        return super().parse_args_and_config(words, **options)

    def _get_values(self, action: Action, arg_strings: list[str]) -> Any:
        """The value of a flag from its words."""
        allowed = NoneType in _kinds(self.hints.get(action.dest)) and action.dest not in NONE_IS_A_VALUE
        if allowed and len(arg_strings) == 1 and arg_strings[0].lower() in NOTHING:
            return None
        return super()._get_values(action, arg_strings)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, rest = super().parse_known_args(args, namespace)
        self._refuse_unknown([word.partition("=")[0].lstrip("-") for word in rest if word.startswith("--")])
        if rest:
            self.error(f"{rest[0]!r} belongs to no key. Quote a text with spaces in it")
        for name, value in vars(found).items():
            if name in self.fields and value is not _default(self.fields[name]):
                setattr(found, name, read(name, value, self.hints[name]))
        return found, rest

    def _refuse_unknown(self, names: Sequence[str]) -> None:
        if names:
            close = difflib.get_close_matches(names[0], self.fields, n=1)
            hint = f" Did you mean `{close[0]}`?" if close else f" `{self.prog} --help` lists them."
            raise ValueError(f"`{names[0]}` is no key of {self.prog}.{hint}")

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def parse(verb: str, classes: Any, argv: Sequence[str], description: str | None = None) -> Any:
    """The arguments of a verb from the words after it: an instance of a dataclass, or of each of a tuple of them.

    Raises:
        ValueError: unknown or missing arguments, one of another type or out of its range, or a configuration file that
            is no YAML mapping.
    """
    several = isinstance(classes, tuple)
    parser = Parser(classes if several else (classes,), prog=f"trl-parm {verb}", description=description)
    parser.add_argument("--config", help="A YAML file with any of these keys.")
    words = [word for given in argv for word in (given.split("=", 1) if given.startswith("--config=") else [given])]
    if words[-1:] == ["--config"]:
        raise ValueError("--config names no file.")
    if words.count("--config") > 1:
        raise ValueError("--config stands there twice. Put all keys into one file, or give them as flags.")
    try:
        found = parser.parse_args_and_config(words)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"The configuration file is no YAML: {error}") from None
    return found[: len(classes)] if several else found[0]


def read(name: str, value: Any, hint: Any) -> Any:
    """The value of an argument, as it stands in YAML or on a command line, as its type wants it.

    A text in JSON is what it stands for, where the type has lists or mappings. A single entry, or one vector of
    numbers, may stand for a list of one. A whole number may stand for any, and `False` for the word `no` of an
    enumeration; nothing else is converted.

    Raises:
        ValueError: it has another type, or is out of its range.
    """
    kinds = _kinds(hint)
    words = [word for kind in kinds if isinstance(kind, type) and issubclass(kind, Enum) for word in kind]
    if value is False and "no" in words:
        return "no"  # which is false in YAML 1.1
    if not all(kind in KINDS or dataclasses.is_dataclass(kind) for kind in (*kinds, *kinds.get(list, ()))):
        return value  # an enumeration, a path: not for us to judge
    if list in kinds and not (str in kinds and isinstance(value, str)):
        value = _as_list(name, value, kinds[list])
    elif {dict, list} & set(kinds):
        value = _decoded(name, value, kinds)
    if not _is(value, kinds):
        quoted = " Put a text that looks like something else into quotes." if str in kinds else ""
        raise ValueError(f"`{name}` is {value!r}, but it must be {_named(kinds)}.{quoted}")
    if name in CHOICES and value is not None and value not in CHOICES[name]:
        raise ValueError(f"`{name}` is {value!r}, but it must be one of {', '.join(CHOICES[name])}.")
    least, most = RANGES.get(name, (-math.inf, math.inf))
    if isinstance(value, int | float) and not least <= value <= most:
        allowed = f"{least} or larger" if most == math.inf else f"from {least} to {most}"
        raise ValueError(f"`{name}` is {value}, but it must be {allowed}.")
    return value


def check_fields(given: Mapping[str, Any], owner: Any, of: str) -> dict[str, Any]:
    """The settings of a mapping by the types that a dataclass or a function has for them; others stay as they are.

    Raises:
        ValueError: as [`read`], with what the mapping is `of` before it.
    """
    hints = get_type_hints(owner)
    try:
        return {name: read(name, value, hints[name]) if name in hints else value for name, value in given.items()}
    except ValueError as error:
        raise ValueError(f"{of}: {error}") from None


def required(arguments: Any, *names: str) -> None:
    """Raises `ValueError` unless these arguments were given."""
    missing = [name for name in names if getattr(arguments, name) in (None, "", [], {})]
    if missing:
        raise ValueError(f"{', '.join(missing)} must be given, in the configuration or as a flag.")


def _read_file(path: Path) -> dict[str, Any]:
    """The keys of a configuration file. Raises `ValueError` for a file that can't be read or is no mapping, a key that
    is no text, and one that is twice in a mapping, of which YAML would take the last."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"The configuration file {path} can't be read: {error.strerror}.") from None
    root = yaml.compose(text, Loader=Loader)
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{path} must contain a YAML mapping, of keys to values.")
    for key, _ in root.value:
        if not isinstance(key, yaml.ScalarNode) or not key.tag.endswith(":str"):
            raise ValueError(f"{path} has the key {key.value!r}, but a key must be a text.")
    for mapping in _mappings(root):
        keys = [(key.tag, key.value) for key, _ in mapping.value if isinstance(key, yaml.ScalarNode)]
        for (_, key), count in Counter(keys).items():
            if count > 1:
                where = "" if mapping is root else f" in the mapping that begins in line {mapping.start_mark.line + 1}"
                raise ValueError(f"{path} has the key `{key}` {count} times{where}. Give it once.")
    return yaml.load(text, Loader=Loader)


def _mappings(root: yaml.Node) -> Iterator[yaml.MappingNode]:
    """All mappings in a document, each once, whatever aliases there are to it."""
    nodes, seen = [root], set()
    while nodes:
        node = nodes.pop(0)
        if not isinstance(node, yaml.CollectionNode) or id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            yield node
        nodes += [part for entry in node.value for part in (entry if isinstance(entry, tuple) else (entry,))]


def _as_list(name: str, value: Any, entries: Kinds) -> list[Any] | None:
    """A list whose entries are of these kinds, from words of a command line or a value of YAML."""
    if value is None:
        return None
    words = [_decoded(name, word, entries) for word in (value if isinstance(value, list) else [value])]
    if len(words) == 1 and isinstance(words[0], list) and all(_is(entry, entries) for entry in words[0]):
        words = words[0]  # the whole list, in one word of JSON
    elif {list, dict} <= set(entries) and words and all(_is(word, {float: {}}) for word in words):
        words = [words]
    for word in words:
        if not _is(word, entries):
            raise ValueError(f"An entry of `{name}` is {word!r}, but it must be {_named(entries)}.")
    return words


def _decoded(name: str, value: Any, kinds: Kinds) -> Any:
    """What a text in JSON stands for; a text that is none stays one where it may."""
    text = value.strip() if isinstance(value, str) else ""
    if not text.startswith(("{", "[")) and float not in kinds:
        return value
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        if not text.startswith(("{", "[")) or (str in kinds and not (dict in kinds and text.startswith('{"'))):
            return value
        raise ValueError(f"`{name}` is {value!r}, which is no JSON: {error}.") from None
    return value if str in kinds and isinstance(found, dict) and dict not in kinds else found


def _kinds(hint: Any) -> Kinds:
    """The types that a hint allows, each with those of its entries."""
    if get_origin(hint) in (Union, UnionType):
        return {kind: entries for part in get_args(hint) for kind, entries in _kinds(part).items()}
    if dataclasses.is_dataclass(hint):
        return {dict: {}, str: {}, hint: {}}
    return {get_origin(hint) or hint: _kinds(get_args(hint)[0]) if get_origin(hint) is list else {}}


def _is(value: Any, kinds: Kinds) -> bool:
    if isinstance(value, bool):
        return bool in kinds
    whole = isinstance(value, int) and float in kinds
    return (whole or isinstance(value, tuple(kinds))) and not (isinstance(value, float) and not math.isfinite(value))


def _named(kinds: Kinds) -> str:
    """Kinds in words."""
    names = [text for kind, text in KINDS.items() if kind in kinds and kind is not NoneType]
    return " or ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)


def _default(field: Field) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return None if field.default is MISSING else field.default
