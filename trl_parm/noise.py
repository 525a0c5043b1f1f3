# SPDX-License-Identifier: Apache-2.0
"""Sampling whose noise is a pure function: of a seed and of the number of the token, and of nothing else.

    token = argmax_v log π(v) + g_v,   g_v = −log e_v,   e_v ~ Exp(1)

is a draw from π (the Gumbel-max trick). So a text does not depend on its batch or on what was drawn before, methods
that are compared see the same noise, and all processes that hold a row draw the same token. It knows of tensors only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


def row_seed(seed: int, part: Any) -> int:
    """A seed below 2⁶³ for a part of a run, such as a prompt: a hash of what the part is, not of where it stands."""
    text = json.dumps([seed, part], sort_keys=True, ensure_ascii=False)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def gumbel_noise(seed: int, number: int, like: torch.Tensor) -> torch.Tensor:
    """The noise of one token, `(vocab,)`, float32, on the device of scores `(rows, vocab)`; CPU and CUDA differ."""
    generator = torch.Generator(like.device).manual_seed(row_seed(seed, number))
    noise = torch.empty(like.shape[-1], device=like.device).exponential_(generator=generator)
    # A zero would make infinite noise, and NaN where the score is −inf.
    return -noise.clamp(min=torch.finfo(noise.dtype).tiny).log()


@dataclass(frozen=True)
class Sampling:
    """The settings that sampling knows, which act in this order, as transformers' do.

    Args:
        temperature (`float`, *optional*, defaults to 1.0): Above 0.
        top_k (`int`, *optional*, defaults to 0): 0 keeps all tokens.
        top_p (`float`, *optional*, defaults to 1.0): Above 0; 1 keeps all tokens.
        min_p (`float`, *optional*, defaults to 0.0): In [0, 1]; 0 keeps all tokens.

    Raises:
        ValueError: a setting out of its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        whole = isinstance(self.top_k, int) and self.top_k >= 0
        for name, holds, allowed in (
            ("temperature", 0 < self.temperature < float("inf"), "positive and finite"),
            ("top_k", whole, "a whole number, 0 or larger"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
        ):
            if not holds:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}, but it must be {allowed}.")

    def warp(self, scores: torch.Tensor) -> torch.Tensor:
        """Log-probabilities `(rows, vocab)`, up to a constant, with −inf for what the settings take away."""
        if self.temperature != 1:
            scores = scores / self.temperature
        if self.top_k:
            least = torch.topk(scores, min(self.top_k, scores.shape[-1])).values[:, -1:]
            scores = scores.masked_fill(scores < least, -torch.inf)
        if self.top_p < 1:
            ascending, order = torch.sort(scores)
            rare = ascending.softmax(-1).cumsum(-1) <= 1 - self.top_p
            rare[:, -1] = False
            scores = scores.masked_fill(torch.empty_like(rare).scatter_(1, order, rare), -torch.inf)
        if self.min_p:
            p = scores.softmax(-1)
            scores = scores.masked_fill(p < self.min_p * p.amax(-1, keepdim=True), -torch.inf)
        return scores

    def noisy(self, scores: torch.Tensor, seeds: Sequence[int], numbers: Sequence[int]) -> torch.Tensor:
        """Scores `(rows, vocab)` whose largest entries are a sample of what the settings leave.

        Args:
            scores (`torch.Tensor` of shape `(rows, vocab)`): Log-probabilities up to a constant.
            seeds (`Sequence[int]`): The seed of each row.
            numbers (`Sequence[int]`): How many tokens each row has written.
        """
        tokens = list(zip(seeds, numbers, strict=True))
        noise = {token: gumbel_noise(*token, scores) for token in dict.fromkeys(tokens)}  # rows may share it
        return self.warp(scores).float() + torch.stack([noise[token] for token in tokens])
