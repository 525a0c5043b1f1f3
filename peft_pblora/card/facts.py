# SPDX-License-Identifier: Apache-2.0
"""What a card says beyond the adapter's configuration, and what the Hub takes as metadata."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypedDict

from huggingface_hub import ModelCard, try_to_load_from_cache
from huggingface_hub.utils import HFValidationError, validate_repo_id


Table = Sequence[Sequence[Any]]
"""Rows of plain values, the head first."""


class CardFacts(TypedDict, total=False):
    """Plain JSON values, all of them optional.

    - `title`, and `tags` and `datasets`, ids on the Hub, for the metadata.
    - `license` of the adapter, `base_license` and `data_license`, each as on the Hub, such as `apache-2.0`.
    - `data`, `accuracies` and `measures`: tables; `training` and `versions`: rows of a name and a value.
    - `figure`: the name of a PNG beside the card, see [`add_results`]; `run`: the YAML that made the adapter.
    - `citations`: keys of [`CITATIONS`]; the adapter's own paper if not given.
    - `prompt`: what the sample answers; `None` leaves the sample out. `sample` itself is written while saving.
    """

    title: str
    tags: list[str]
    datasets: list[str]
    license: str
    base_license: str
    data_license: str
    data: Table
    training: Table
    accuracies: Table
    measures: Table
    figure: str
    run: str
    versions: Table
    citations: list[str]
    prompt: str | None
    sample: dict[str, Any]


def hub_id(name: str | None) -> str | None:
    """The name if it can be an id on the Hub and is no folder of this machine; the Hub refuses a card with others."""
    if not name or os.path.exists(name):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def all_tags(config: Any, given: Iterable[str]) -> list[str]:
    """Tags of the metadata: what the adapter is, its base on the Hub, and those that were given."""
    base = hub_id(getattr(config, "base_model_name_or_path", None))
    found = {tag for tag in given if not tag.startswith("base_model:")}
    if hasattr(config, "objectives"):
        found |= {"preference-conditioned", config.peft_type.value.lower()}
    return sorted(found | ({f"base_model:adapter:{base}"} if base else set()))


def versions(*packages: str) -> list[list[str]]:
    """Names and versions of what made an adapter, as far as it is installed."""
    found = []
    for package in ("trl-parm", "peft", "transformers", "torch", *packages):
        with suppress(PackageNotFoundError):
            found.append([package, version(package)])
    return found


def known_license(base: str | None) -> str | None:
    """The licence of a base model, as its own card on this machine says it; `None` if there is no such card."""
    if not base:
        return None
    card: Any = Path(base) / "README.md"
    if not os.path.isdir(base):
        card = try_to_load_from_cache(base, "README.md") if hub_id(base) else None
    if not isinstance(card, str | Path) or not os.path.isfile(card):
        return None
    try:
        return ModelCard.load(card).data.license
    except (OSError, ValueError):
        return None
