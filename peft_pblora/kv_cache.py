# SPDX-License-Identifier: Apache-2.0
"""What forwards call their cache: `cache` in new releases of transformers, `past_key_values` before, and Mamba's
`cache_params`."""

import inspect
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from torch import nn

from .switch import backbone_of


NAMES = ("cache", "past_key_values", "cache_params")


def cache_argument(model: nn.Module, cache: Any) -> dict[str, Any]:
    """A cache as the keyword argument of a model's forward or `generate`. Raises `ValueError` if it takes none."""
    kind = type(backbone_of(model))
    name = _name(kind)
    if name is None:
        raise ValueError(f"A {kind.__name__} takes no key-value cache. Use a transformer.")
    return {name: cache}


def cache_in(arguments: Mapping[str, Any]) -> Any:
    """The cache among a forward's keyword arguments, or `None`."""
    return next((arguments[name] for name in NAMES if arguments.get(name) is not None), None)


def takes_cache(model: nn.Module) -> bool:
    """Whether a model's forward has an argument for a key-value cache."""
    return _name(type(backbone_of(model))) is not None


@lru_cache(maxsize=64)
def _name(kind: type[nn.Module]) -> str | None:
    parameters = inspect.signature(kind.forward).parameters
    return next((name for name in NAMES if name in parameters), None)
