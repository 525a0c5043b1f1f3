# SPDX-License-Identifier: Apache-2.0
"""What the results of a function depend on, as JSON that two runs can compare. It computes none of them."""

from __future__ import annotations

import ast
import builtins
import contextlib
import dis
import functools
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from datetime import date, time, timedelta
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from .identity import hash_weights, short_hash, values_of


PLAIN = (
    bool | int | float | complex | None | str | bytes | Path | Enum | re.Pattern | range | slice | date | time
    | timedelta | Decimal | Fraction | np.generic | torch.dtype | torch.device
)  # fmt: skip
"""What is told by its `repr`."""
INSTALLED = ("site-packages", "dist-packages")
CHANGING = (
    "add", "append", "appendleft", "clear", "discard", "extend", "insert", "pop", "popitem", "remove", "setdefault",
    "update",
)  # fmt: skip
"""Methods that change a container."""
STATE = "not hashed: it changes when the function is called"


def describe_function(function: Callable) -> dict[str, Any]:
    """What a function's numbers depend on, as far as it can be told from outside.

    Args:
        function (`Callable`): A function, a method, an object that can be called, or one of `functools`.

    Returns:
        `dict` with `function`, its name, and `parts`: the hash of its source, and of all functions, classes and
        modules of the same project that its code names, directly or through others; the version of each installed
        package among them; and what its closures, defaults and global names hold, short values as they are, others
        by a hash. What its own code changes, such as a counter, and what has no source or no value that can be
        hashed, such as a function that was typed in or is written in C, is in `parts` as `"not hashed: ..."`.
    """
    inner = inspect.unwrap(function.func if isinstance(function, functools.partial) else function)
    parts = _Parts(getattr(inner, "__module__", None) or type(inner).__module__)
    name = parts.name(function)
    parts.add(name, function)
    return {"function": name, "parts": dict(sorted(parts.found.items()))}


class _Parts:
    """Collects what code depends on. `home` is the module of the function that is described."""

    def __init__(self, home: str) -> None:
        self.home = home.partition(".")[0]
        self.found: dict[str, str] = {}
        self._seen: dict[int, Any] = {}  # the objects too, so that no other one gets their number

    @staticmethod
    def name(found: Any) -> str:
        """How a function, class or object is called in the record."""
        if isinstance(found, functools.partial):
            return f"partial of {_Parts.name(found.func)}"
        if not hasattr(found, "__qualname__"):
            found = type(found)
        return f"{getattr(found, '__module__', None) or ''}:{found.__qualname__}"

    def add(self, name: str, value: Any) -> str:
        """Notes a value under a name, and all that it depends on. Returns a text that stands for it in others."""
        if isinstance(value, PLAIN):
            return repr(value)
        if isinstance(value, np.ndarray) and value.dtype.hasobject:
            value = value.tolist()
        if isinstance(value, torch.Tensor | np.ndarray):
            data = values_of(value) if isinstance(value, torch.Tensor) else value.tobytes()
            return f"{type(value).__name__} {value.dtype} {tuple(value.shape)} {short_hash(data)}"
        if id(value) in self._seen:
            return self.name(value) if callable(value) else type(value).__name__
        self._seen[id(value)] = value
        if isinstance(value, Mapping):
            texts = [f"{key!r}: {self.add(f'{name}[{key!r}]', entry)}" for key, entry in value.items()]
            return f"{{{', '.join(texts)}}}"
        if isinstance(value, Sequence | Set):
            texts = [self.add(f"{name}[{i}]", entry) for i, entry in enumerate(value)]
            return f"{type(value).__name__}({', '.join(sorted(texts) if isinstance(value, Set) else texts)})"
        if isinstance(value, ModuleType):
            self._module(value)
            return value.__name__
        if isinstance(value, nn.Module):
            self.add(self.name(type(value)), type(value))
            return f"{self.name(value)} {hash_weights(value)}"
        self._code(name, value)
        return self.name(value) if callable(value) else f"a {self.name(type(value))}"

    def _code(self, name: str, value: Any) -> None:
        """Notes a function, class, method or object by what it is made of."""
        if isinstance(value, functools.partial):
            self._note(
                name, [self.add(f"{name}.{i}", v) for i, v in enumerate((value.func, value.args, value.keywords))]
            )
        elif isinstance(value, MethodType):
            self.add(self.name(value.__func__), value.__func__)
            self.add(f"{name}.self", value.__self__)
        elif self._is_installed(getattr(value, "__module__", None) or type(value).__module__):
            if not isinstance(value, FunctionType | type | BuiltinFunctionType):
                self.found[name] = f"not hashed: a {self.name(type(value))}"
        elif isinstance(value, FunctionType):  # whose name may be that of another one, which it wraps
            own = f"{value.__globals__.get('__name__', '')}:{value.__code__.co_qualname}"
            self._source(own, value.__code__)
            self._references(own, value)
        elif isinstance(value, type):
            self._source(self.name(value), value)
            changing = set[str]().union(*map(_changed, _methods(value)))
            for key, member in vars(value).items():
                inner = _function_of(member)
                if isinstance(inner, FunctionType):
                    self._references(self.name(inner), inner)
                elif _is_value(member) and not key.startswith("__"):  # of which the source may say a name only
                    own = f"{self.name(value)}.{key}"
                    self._note(own, STATE if key in changing else self.add(own, member))
            for base in value.__bases__:
                self.add(self.name(base), base)
        elif hasattr(value, "__wrapped__"):  # of functools.cache
            self.add(self.name(value.__wrapped__), value.__wrapped__)
        elif isinstance(value, BuiltinFunctionType) or not hasattr(value, "__dict__"):
            self.found[name] = f"not hashed: a {self.name(type(value))}"
        else:
            self.add(self.name(type(value)), type(value))
            changing = set[str]().union(*map(_changed, _methods(type(value))))
            texts = {k: STATE if k in changing else self.add(f"{name}.{k}", v) for k, v in vars(value).items()}
            self._note(name, [f"{key}={text}" for key, text in texts.items()])

    def _references(self, name: str, function: FunctionType) -> None:
        """What a function's code names: global names, imports, its closure and defaults."""
        values = {key: function.__globals__[key] for key in _globals(function.__code__) if key in function.__globals__}
        for key, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
            with contextlib.suppress(ValueError):  # it is not filled yet
                values[key] = cell.cell_contents
        parameters = inspect.signature(function, follow_wrapped=False).parameters.values()
        values |= {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
        changing = set().union(*map(_changed, _codes(function.__code__)))
        for key, value in values.items():
            if getattr(builtins, key, self) is value:
                continue
            if key in changing:  # a counter, or a store of earlier results
                self.found[f"{name}.{key}"] = STATE
                continue
            text = self.add(f"{name}.{key}", value)
            if not isinstance(value, ModuleType | FunctionType | MethodType | BuiltinFunctionType | type):
                self._note(f"{name}.{key}", text)
        package = function.__globals__.get("__package__") or ""
        for module in _imports(function.__code__, package):
            self._imported(module)

    def _imported(self, name: str) -> None:
        """A module that a function imports when it is called."""
        if not self._is_installed(name):
            try:
                self.add(name, importlib.import_module(name))
            except Exception as error:  # it may be asked for only where it works
                self.found[name] = f"not hashed: {error}"

    def _module(self, module: ModuleType) -> None:
        if self._is_installed(module.__name__):
            return
        file = getattr(module, "__file__", None)
        self.found[module.__name__] = (
            short_hash(Path(file).read_bytes())
            if file and Path(file).is_file()
            else "not hashed: a module without a file"
        )
        for value in list(vars(module).values()):
            if isinstance(value, ModuleType | FunctionType | type):
                self.add(self.name(value) if callable(value) else value.__name__, value)

    def _is_installed(self, module: str) -> bool:
        """Whether a module belongs to Python or to an installed package, whose version is noted then."""
        top = module.partition(".")[0]
        if top in (self.home, "__main__"):
            return False
        if top in sys.stdlib_module_names:
            return True
        loaded: Any = sys.modules.get(top)
        spec = getattr(loaded, "__spec__", None) or (importlib.util.find_spec(top) if loaded is None else None)
        places = [str(getattr(loaded, "__file__", None) or getattr(spec, "origin", None) or "")]
        places += list(getattr(spec, "submodule_search_locations", None) or ())
        if not any(part in INSTALLED for place in places for part in Path(place).parts):
            return spec is None and loaded is None  # what is nowhere is nobody's own
        for package in _distributions().get(top, [top]):
            try:
                self.found[package] = version(package)
            except PackageNotFoundError:
                self.found[package] = "not hashed: a package without a version"
        return True

    def _source(self, name: str, value: CodeType | type) -> None:
        try:
            self.found[name] = short_hash(inspect.getsource(value).encode())
        except (OSError, TypeError):
            self.found[name] = "not hashed: it has no source, as where it was typed in"

    def _note(self, name: str, value: str | Sequence[str]) -> None:
        text = value if isinstance(value, str) else ", ".join(value)
        text = text if len(text) <= 60 else short_hash(text.encode())
        while self.found.get(name, text) != text:  # of two functions that one function made
            name += "'"
        self.found[name] = text


def _function_of(member: Any) -> Any:
    """The function of a method, a property or the like, as a class holds it."""
    if isinstance(member, functools.partial):
        return member
    for name in ("__func__", "fget", "func", "__wrapped__"):
        if not isinstance(member, FunctionType):
            member = getattr(member, name, member)
    return member


def _is_value(member: Any) -> bool:
    """Whether what a class holds is a value, rather than a slot or what else only describes its instances."""
    held = PLAIN | Mapping | Sequence | Set | torch.Tensor | np.ndarray
    return isinstance(member, held) or hasattr(member, "__dict__") and not hasattr(type(member), "__get__")


def _codes(code: CodeType) -> Iterator[CodeType]:
    """A code object, and those of the functions and comprehensions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _methods(kind: type) -> Iterator[CodeType]:
    """The code of a class, other than what makes an instance."""
    for name, member in ((n, m) for base in kind.__mro__ for n, m in vars(base).items()):
        if isinstance(member, FunctionType) and name not in ("__init__", "__post_init__", "__setstate__"):
            yield from _codes(member.__code__)


def _changed(code: CodeType) -> set[str]:
    """Names of variables and attributes that code sets, or calls a method of that changes a container."""
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("PRECALL", "CACHE", "PUSH_NULL")]
    found = {step.argval for step in steps if step.opname in ("STORE_GLOBAL", "STORE_DEREF", "STORE_ATTR")}
    for i, step in enumerate(steps):
        if step.opname in ("LOAD_ATTR", "LOAD_METHOD") and step.argval in CHANGING:
            found.add(steps[i - 1].argval)
    if any(step.opname in ("STORE_SUBSCR", "DELETE_SUBSCR") for step in steps):
        found |= _stored_into(code)
    return {name for name in found if isinstance(name, str)}


def _stored_into(code: CodeType) -> set[str]:
    """Names of variables and attributes that code sets or deletes an entry of, by its source: the steps before a store
    do not say which name is the container and which are of the key. None where there is no source."""
    lines, found = {line for *_, line in code.co_lines()}, set[str]()
    with contextlib.suppress(OSError, TypeError, SyntaxError):
        for node in ast.walk(_tree("".join(inspect.findsource(code)[0]))):
            if isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load) and node.lineno in lines:
                container: ast.expr = node
                while isinstance(container, ast.Subscript):
                    container = container.value
                if isinstance(container, ast.Name | ast.Attribute):
                    found.add(container.id if isinstance(container, ast.Name) else container.attr)
    return found


@functools.lru_cache(8)
def _tree(source: str) -> ast.AST:
    return ast.parse(source)


def _globals(code: CodeType) -> list[str]:
    loads = (i.argval for part in _codes(code) for i in dis.get_instructions(part) if i.opname == "LOAD_GLOBAL")
    return list(dict.fromkeys(loads))


def _imports(code: CodeType, package: str) -> Iterator[str]:
    """Full names of the modules that code imports."""
    for part in _codes(code):
        steps = list(dis.get_instructions(part))
        for i, step in enumerate(steps):
            if step.opname == "IMPORT_NAME":
                level = steps[i - 2].argval  # as the two constants before it say: how far up, and which names
                yield importlib.util.resolve_name("." * level + step.argval, package) if level else step.argval


@functools.cache
def _distributions() -> Mapping[str, list[str]]:
    return packages_distributions()
