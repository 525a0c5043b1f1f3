# SPDX-License-Identifier: Apache-2.0
"""Sampling whose noise belongs to the prompt: not to the batch, the method, or what was decoded before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from transformers import LogitsProcessor

from trl_parm.noise import Sampling


SETTINGS = {setting.name: setting.default for setting in fields(Sampling)}
"""Settings of sampling, each with the value that has no effect."""
REFUSED = ("num_beams", "num_return_sequences", "assistant_model", "typical_p", "epsilon_cutoff", "eta_cutoff")


class RowSampling(LogitsProcessor):
    """Samples from the scores that it gets, with noise for each row (see [`trl_parm.noise`]): the last processor of a
    *greedy* `generate`. Methods that are compared on a prompt see the same noise, so that they differ less by chance.

    Args:
        seeds (`Sequence[int]`): A seed for each row, from [`row_seed`].
        prompt_length (`int`): Columns of `input_ids` that are the prompt.
        **settings: `temperature`, `top_k`, `top_p` and `min_p`, each without effect if not given.

    Raises:
        ValueError: a setting out of its range; at a call, a batch of another size.
    """

    def __init__(self, seeds: Sequence[int], prompt_length: int, **settings: Any) -> None:
        self.seeds, self.prompt_length, self.sampling = list(seeds), prompt_length, Sampling(**settings)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if len(scores) != len(self.seeds):
            raise ValueError(f"There are {len(self.seeds)} seeds, but the batch has {len(scores)} rows.")
        return self.sampling.noisy(scores, self.seeds, [input_ids.shape[1] - self.prompt_length] * len(scores))


def split_settings(generation: Mapping[str, Any]) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Takes the settings of sampling out of the arguments of `generate`.

    Returns:
        `tuple` of the settings, or `None` without `do_sample=True`, and the other arguments.

    Raises:
        ValueError: settings without `do_sample=True` or out of their range, or a mode of `generate` in which a row has
            no noise of its own.
    """
    refused = [name for name in REFUSED if generation.get(name) not in (None, 1, 1.0)]
    if refused:
        raise ValueError(
            f"{', '.join(refused)} can't be used here, where every prompt has one response and noise of its own. "
            f"Sampling knows {', '.join(SETTINGS)}."
        )
    others = {name: value for name, value in generation.items() if name not in (*SETTINGS, "do_sample")}
    settings = {name: generation[name] for name in SETTINGS if generation.get(name) not in (None, SETTINGS[name])}
    if generation.get("do_sample"):
        Sampling(**settings)
        return settings, others
    if settings:
        raise ValueError(f"{', '.join(settings)} act on sampling only. Pass `do_sample=True` too.")
    return None, others
