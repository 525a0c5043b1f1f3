# SPDX-License-Identifier: Apache-2.0
"""Weights of the base model in an adapter's file.

Beside an adapter of `lm_head` or `embed_tokens` PEFT saves that layer's own weight, since tokens may have been added,
and writes it over the model's wherever the adapter is loaded. But the adapter may guide this model, which then is
another one without the adapter too.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from .switch import backbone_of, changes_below


ROWS = 4096
"""How many rows of a weight are compared at a time."""


class Place(NamedTuple):
    """A parameter of a base model: its layer, with the adapters or without them, and its name there."""

    adapted: nn.Module
    layer: nn.Module
    name: str

    @property
    def weight(self) -> Any:
        """The parameter."""
        return self.layer._parameters[self.name]


class Kept(NamedTuple):
    """A parameter of a base model as it was."""

    place: Place
    weight: nn.Parameter
    values: torch.Tensor

    def put_back(self, values: torch.Tensor | None = None) -> None:
        """Makes it the model's again, with its values or others."""
        self.place.layer._parameters[self.place.name] = self.weight  # PEFT's `low_cpu_mem_usage` puts another there
        self.weight.data.copy_(self.values if values is None else values)


def keep_weights(model: nn.Module, config: PeftConfig, keys: Iterable[str]) -> dict[str, Kept]:
    """The parameters of a model over which PEFT might write tensors of an adapter's file, by the tensors' names.

    Raises `ValueError` if adapters are merged into one: PEFT would unmerge them as it adds another.
    """
    copied = tuple(getattr(config, "modules_to_save", None) or ())  # PEFT writes to copies of these
    found = {key: _find(model, key) for key in keys if not key.rpartition(".")[0].endswith(copied)}
    places = {key: place for key, place in found.items() if place is not None and not place.weight.is_meta}
    for key, place in places.items():
        if getattr(place.adapted, "merged", False):
            raise ValueError(
                f"The adapter's file has `{_name_below(key)}`, into which adapters of the model are merged. Call "
                "`unmerge_adapter()` first."
            )
    return {key: Kept(one, one.weight, one.weight.detach().to("cpu", copy=True)) for key, one in places.items()}


def weights_below(model: nn.Module, config: PeftConfig, keys: Iterable[str]) -> dict[str, Place]:
    """Of the tensors of an adapter's file those that are the base model's, in layers that it adapts, by their names.

    Trained biases are none, as a bias is unless it comes with the weight of the output layer, and neither are weights
    that the adapter's start has changed.
    """
    backbone: Any = backbone_of(model)
    changes = changes_below(config, backbone) or ""
    if changes and not changes.startswith("bias="):
        return {}
    head = backbone.get_output_embeddings() if hasattr(backbone, "get_output_embeddings") else None
    saved = head if getattr(config, "bias", "none") == "none" else None
    found = {key: _find(model, key) for key in keys if ".base_layer." in key}
    return {key: place for key, place in found.items() if place and (place.name != "bias" or place.adapted is saved)}


def without_base(model: nn.Module, config: PeftConfig, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of an adapter's file without those that are the base model's, see [`weights_below`].

    Where the last rows alone differ from the model's, those of tokens that were added, the file's are taken: such a
    weight stays, with the model's rows above them, and a warning says so.

    Raises:
        ValueError: it is the weight of another model, beyond a rounding to the two dtypes, or of another shape.
    """
    own = dict(tensors)
    for key, place in weights_below(model, config, tensors).items():
        theirs, ours = own.pop(key), place.weight.detach()
        if not _can_be_compared(theirs, ours):
            continue
        called = _name_below(key)
        if theirs.shape != ours.shape:
            raise ValueError(
                f"The adapter's file has a `{called}` of shape {tuple(theirs.shape)}, but the model's is "
                f"{tuple(ours.shape)}. If tokens were added, call `resize_token_embeddings({len(theirs)})` first."
            )
        differs = _rows_that_differ(theirs, ours)
        count = int(differs.sum())
        if 0 < count < len(differs) and bool(differs[-count:].all()):
            warnings.warn(
                f"The last {count} rows of `{called}` are the adapter's, those of tokens that were added.",
                stacklevel=1,  # said once by Python's default filter, wherever it is asked from
            )
            own[key] = torch.cat([ours[:-count], theirs[-count:].to(ours)])
        elif count:
            raise ValueError(
                f"The adapter's file has the `{called}` of the model that it was trained on, and {count} of "
                f"{len(differs)} rows are not this model's. Load it on the model that it was trained on."
            )
    return own


def _find(model: nn.Module, key: str) -> Place | None:
    """The parameter of a base model that a tensor of a file is called by, if there is one."""
    path, _, name = _name_below(key).rpartition(".")
    try:
        layer = adapted = backbone_of(model).get_submodule(path)
    except AttributeError:
        return None
    while isinstance(layer, BaseTunerLayer | AuxiliaryTrainingWrapper):
        layer = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer.original_module
    return Place(adapted, layer, name) if layer._parameters.get(name) is not None else None


def _name_below(key: str) -> str:
    return key.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _can_be_compared(*tensors: torch.Tensor) -> bool:
    """Whether all are whole and here: not quantised, sharded, or kept elsewhere by accelerate or DeepSpeed."""
    return all(
        type(x.data) is torch.Tensor and x.is_floating_point() and not x.is_meta and x.ndim > 0 and x.numel() > 0
        for x in tensors
    )


def _rows_that_differ(theirs: torch.Tensor, ours: torch.Tensor) -> torch.Tensor:
    """Which rows are others, and not the same numbers rounded to the two dtypes, as by merging and unmerging too."""
    differences, norms = [], []
    for a, b in zip(theirs.split(ROWS), ours.split(ROWS), strict=True):
        a, b = a.float().reshape(len(a), -1), b.to(a.device, torch.float32).reshape(len(b), -1)
        differences.append((a - b).norm(dim=1))
        norms.append(b.norm(dim=1))
    size = torch.cat(norms)
    rounding = 2 * max(torch.finfo(tensor.dtype).eps for tensor in (theirs, ours))
    return torch.cat(differences) > rounding * size.clamp(min=float(size.mean()))
