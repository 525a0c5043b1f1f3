# SPDX-License-Identifier: Apache-2.0
"""`trl-parm export`: an adapter at fixed preferences as plain LoRA, which serving engines load."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_parm.arguments import option, parse, required

from .common import OFF_SIMPLEX, grid, say, write_run


@dataclass
class ExportArguments:
    """Arguments of [`peft_pblora.save_as_lora`]."""

    adapter: str = option("", "The adapter: a folder or Hub id.")
    output_dir: str = option("", "Where the LoRAs go, each in a folder of its own.")
    preferences: list[list | dict] | None = option(None, "Vectors or mappings by objective, as JSON in a flag.")
    grid_steps: int | None = option(None, "A regular grid of so many steps instead.")
    vertices: bool = option(False, "One LoRA for each objective instead; weighted by α they are the adapter at α.")
    allow_off_simplex: bool = option(False, OFF_SIMPLEX)
    rank: int | None = option(None, "Pad to this rank, for engines that know certain ranks.")
    dtype: str = option("auto", "Of the backbone while it is loaded.")

    def __post_init__(self) -> None:
        required(self, "adapter", "output_dir")
        if self.vertices and (self.preferences or self.grid_steps is not None):
            raise ValueError("`vertices` names the preferences already. Leave out `preferences` and `grid_steps`.")
        if not (self.vertices or self.preferences or self.grid_steps is not None):
            raise ValueError(
                "Give `preferences`, points of the simplex, `grid_steps`, for a regular grid, or `vertices`, for one "
                "LoRA for each objective."
            )


def main(argv: list[str]) -> None:
    arguments: ExportArguments = parse("export", ExportArguments, argv, __doc__)
    import torch
    from transformers.utils import find_adapter_config_file

    from peft_pblora import get_objectives, load_adapter, save_as_lora

    if find_adapter_config_file(arguments.adapter) is None:
        raise ValueError(f"There is no adapter at {arguments.adapter!r}. Name a folder or an id on the Hub.")
    model: Any = load_adapter(None, arguments.adapter, dtype=arguments.dtype)
    objectives = get_objectives(model)
    chosen = torch.eye(len(objectives)).tolist() if arguments.vertices else arguments.preferences
    allow = arguments.allow_off_simplex
    preferences = torch.tensor(grid(chosen, arguments.grid_steps, objectives, allow))
    folders = save_as_lora(model, arguments.output_dir, preferences, rank=arguments.rank, allow_off_simplex=allow)
    write_run(Path(arguments.output_dir), "export", arguments)
    for folder in folders:
        say(str(folder))
