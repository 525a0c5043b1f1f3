# SPDX-License-Identifier: Apache-2.0
"""Exact sampling whose outcome is a function of the distribution, a seed and the number of the token.

The engine decodes greedily what it is given, so the token is drawn here: argmax(log π + G) with Gumbel noise G is
distributed as π. Temperature, top-k and top-p act before the noise, with transformers' own warpers, in the order of
`generate`. The noise is a function of the seed and of how many tokens are written, so every process that holds the
rows draws the same token, and so does a request that is computed again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper


def warp(scores: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """Temperature, top-k (0: all) and top-p (1: all) of log-probabilities of shape `(rows, vocab)`."""
    unused: Any = None  # they look at the scores alone
    scores = TemperatureLogitsWarper(float(temperature))(unused, scores)
    if top_k:
        scores = TopKLogitsWarper(top_k)(unused, scores)
    return TopPLogitsWarper(top_p)(unused, scores) if top_p < 1 else scores


def draw(scores: torch.Tensor, seeds: Sequence[int], written: Sequence[int]) -> torch.Tensor:
    """One token of each row's softmax.

    Args:
        scores (`torch.Tensor` of shape `(rows, vocab)`): Log-probabilities up to a constant.
        seeds (`Sequence[int]`): The seed of each row.
        written (`Sequence[int]`): How many tokens each row has written so far.

    Returns:
        `torch.Tensor` of shape `(rows,)`: token ids.
    """
    # float32 has too few small numbers for the smallest of 10^5 exponentials.
    noise = torch.empty(scores.shape, dtype=torch.float64, device=scores.device)
    generator = torch.Generator(device=scores.device)
    for row, key in zip(noise, zip(seeds, written, strict=True), strict=True):
        row.exponential_(generator=generator.manual_seed(_mixed(*key)))
    return (scores.double() - noise.log()).argmax(-1)


def _mixed(seed: int, written: int) -> int:
    """A seed for the noise of one token: neighbours must not share theirs, as seed + number would."""
    digest = hashlib.blake2b(f"{seed} {written}".encode(), digest_size=8).digest()
    # torch's CPU generator reads the lower 32 bits.
    return int.from_bytes(digest, "little") >> 1
