# SPDX-License-Identifier: Apache-2.0
"""Adapters written by the authors' code: what their files call things."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch

from .preference import as_preference


TENSORS = {"A": "A.weight", "B": "B.weight", "W1": "core.W1", "W2": "core.W2"}


def rename_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gives the authors' tensors our names, `pblora_adapter.A.weight` for `pblora_A`; ours keep theirs."""
    renamed = {}
    for key, value in tensors.items():
        stem, _, part = key.removesuffix(".weight").rpartition(".pblora_")
        renamed[f"{stem}.pblora_adapter.{TENSORS[part]}" if part in TENSORS else key] = value
    return renamed


def number_objectives(count: int) -> list[str]:
    """Names for objectives that have only a number."""
    return [f"objective_{i + 1}" for i in range(count)]


def name_objectives(count: int, names: list[str]) -> list[str]:
    """The names that were given to an adapter of `count` objectives, or numbers if none were."""
    if names == number_objectives(2):
        return number_objectives(count)
    if len(names) != count:
        raise ValueError(
            f"`objectives` names {list(names)}, but the adapter has `obj_num` {count}. Name every objective, in the "
            "adapter's order."
        )
    return names


def starting_preference(preference: Any, objectives: list[str]) -> list[float] | None:
    """The authors' `pref_vec_init` as a default preference, or `None` and a warning if it is not on the simplex."""
    try:
        return as_preference(preference, objectives).tolist()
    except (TypeError, ValueError) as error:
        warnings.warn(f"The adapter's `pref_vec_init` is not used: {error}", stacklevel=4)
        return None
