# SPDX-License-Identifier: Apache-2.0
"""What a model is, in a few letters that two runs can compare: its weights and loading, or the files of its name."""

from __future__ import annotations

import contextlib
import hashlib
import re
from typing import Any

import torch
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG
from torch import nn
from transformers.utils import CONFIG_NAME, cached_file, extract_commit_hash

from peft_pblora.switch import AdapterSwitch, backbone_of

from .records import fingerprint


def describe_model(model: Any) -> dict[str, Any]:
    """What a language model's log-probabilities depend on: its name, dtype, attention and, by a hash, its weights.
    Adapters on it are left out."""
    backbone: Any = backbone_of(model)
    return {
        "name": str(backbone.config._name_or_path),
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "attention": str(backbone.config._attn_implementation),
        "weights": hash_weights(backbone, adapters=False),
    }


def known_by(name: str) -> str | None:
    """What a model's name stands for now: a hash of the files in a local folder, or the commit of a name on the Hub,
    as far as that can be reached or is in the cache."""
    found = fingerprint(name)
    for file in (CONFIG_NAME, ADAPTER_CONFIG) if found is None else ():
        with contextlib.suppress(OSError, ValueError):
            found = found or extract_commit_hash(cached_file(name, file), None)
    return found


def hash_weights(model: nn.Module, adapters: bool = True) -> str:
    """A short hash of some values of each weight and buffer, or of those that belong to no adapter."""
    digest, tuned = hashlib.sha256(), AdapterSwitch.of(model).layers
    frozen = ("base_layer.", "original_module.")
    of_adapters = {id(p) for layer in tuned for name, p in layer.named_parameters() if not name.startswith(frozen)}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, torch.Tensor) and (adapters or id(tensor) not in of_adapters):
            name = name if adapters else re.sub(r"\.(base_layer|original_module)\b", "", name)
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            with contextlib.suppress(RuntimeError, NotImplementedError):  # of kinds that can't be cut, or are not here
                digest.update(values_of(tensor, 16))
    return digest.hexdigest()[:16]


def values_of(tensor: torch.Tensor, most: int | None = None) -> bytes:
    """A tensor's values, or some that are spread over it, as bytes."""
    values = tensor.detach().reshape(-1) if most is None else spread(tensor, most)
    return values.contiguous().cpu().view(torch.uint8).numpy().tobytes() if len(values) else b""


def spread(tensor: torch.Tensor, most: int) -> torch.Tensor:
    """About so many of a tensor's values, spread over it."""
    values = tensor.detach().reshape(-1)
    return values[:: max(1, len(values) // most)]


def short_hash(data: bytes) -> str:
    """16 letters of the SHA-256 of some bytes."""
    return hashlib.sha256(data).hexdigest()[:16]
