# SPDX-License-Identifier: Apache-2.0
"""Sampling whose noise belongs to the prompt: not to the batch, the method, or what was decoded before."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


WARPERS = {
    "temperature": TemperatureLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
}
"""Settings of sampling, in the order in which `generate` applies them."""
NEUTRAL = {"temperature": (None, 1.0), "top_k": (None, 0), "top_p": (None, 1.0), "min_p": (None, 0.0)}
REFUSED = ("num_beams", "num_return_sequences", "assistant_model", "typical_p", "epsilon_cutoff", "eta_cutoff")


class RowSampling(LogitsProcessor):
    """Samples from the scores that it gets, with noise for each row: the last processor of a *greedy* `generate`.

        token = argmax_v log π(v) + g_v,   g_v = −log e_v,   e_v ~ Exp(1)

    is a draw from π (the Gumbel-max trick). The noise of a row at a step is a pure function of the row's seed and of
    how many tokens were generated. So a text does not depend on its batch, and methods that are compared on a prompt
    see the same noise, which makes their difference less noisy. It is drawn on the device of the scores; CPU and CUDA
    draw different numbers.

    Args:
        seeds (`Sequence[int]`): A seed for each row, from [`row_seed`].
        prompt_length (`int`): Columns of `input_ids` that are the prompt.
        **settings: `temperature`, `top_k`, `top_p` and `min_p`, each without effect if not given.

    Raises:
        ValueError: a setting out of its range; at a call, a batch of another size.
    """

    def __init__(self, seeds: Sequence[int], prompt_length: int, **settings: Any) -> None:
        self.seeds, self.prompt_length = list(seeds), prompt_length
        self.warpers = [
            warper(settings[name])
            for name, warper in WARPERS.items()
            if settings.get(name) not in NEUTRAL[name]
        ]  # fmt: skip

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if len(scores) != len(self.seeds):
            raise ValueError(f"There are {len(self.seeds)} seeds, but the batch has {len(scores)} rows.")
        for warper in self.warpers:
            scores = warper(input_ids, scores)
        step = input_ids.shape[1] - self.prompt_length
        return scores.float() + torch.stack([gumbel_noise(seed, step, scores) for seed in self.seeds])


def gumbel_noise(seed: int, step: int, like: torch.Tensor) -> torch.Tensor:
    """The noise of one row at one step, of shape `(vocab,)`, float32, on the device of scores `(rows, vocab)`."""
    generator = torch.Generator(like.device).manual_seed(row_seed(seed, step))
    noise = torch.empty(like.shape[-1], device=like.device).exponential_(generator=generator)
    # A zero would make infinite noise, and NaN where the score is −inf.
    return -noise.clamp(min=torch.finfo(noise.dtype).tiny).log()


def row_seed(seed: int, part: Any) -> int:
    """A seed below 2⁶³ for a part of a run, such as a prompt: a hash of what the part is, not of where it stands."""
    text = json.dumps([seed, part], sort_keys=True, ensure_ascii=False)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def split_settings(generation: Mapping[str, Any]) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Takes the settings of sampling out of the arguments of `generate`.

    Returns:
        `tuple` of the settings, or `None` without `do_sample=True`, and the other arguments.

    Raises:
        ValueError: settings without `do_sample=True`, or a mode of `generate` in which a row has no noise of its own.
    """
    refused = [name for name in REFUSED if generation.get(name) not in (None, 1, 1.0)]
    if refused:
        raise ValueError(
            f"{', '.join(refused)} can't be used here, where every prompt has one response and noise of its own. "
            f"Sampling knows {', '.join(WARPERS)}."
        )
    others = {name: value for name, value in generation.items() if name not in (*WARPERS, "do_sample")}
    settings = {name: generation[name] for name in WARPERS if generation.get(name) not in NEUTRAL[name]}
    if generation.get("do_sample"):
        return settings, others
    if settings:
        raise ValueError(f"{', '.join(settings)} act on sampling only. Pass `do_sample=True` too.")
    return None, others
