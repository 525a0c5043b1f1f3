# SPDX-License-Identifier: Apache-2.0
"""Decoding for the objective that fares worst: the weights are chosen at every token, against the decoder."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch

from trl_parm.algebra import BASE, Combination, Scorer, Step, of_rows


WORST_CASE = "worst_case"
HALVINGS, IN_FLOAT64 = 40, 60
ROUNDS = 100
TOLERANCE = 1e-4
MOST_GAP = 1e-2
"""By how much expected values may differ after the last round before a warning says so, in nats."""
BELOW = 1e4
"""How far below all others the value of a token lies that a guide excludes, in nats: it would be minus infinity."""
LARGE = 1e3
"""Values from which on weights in float32 are too coarse, in nats, as with a small β."""


def worst_weights(
    base: torch.Tensor, values: torch.Tensor, rounds: int = ROUNDS, tolerance: float = TOLERANCE
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights at which the decoder gains least (RMOD, arXiv 2503.08796, of values of tokens):

        min_{w on the simplex}  log Σ_v π_base(v) exp(Σ_i w_i V_i(v))

    It is convex. Weight moves between the two objectives whose expected values differ most, as far as it pays, until
    all that have weight have the same; two objectives need one round.

    Args:
        base (`torch.Tensor` of shape `(..., vocab)`): log π_base, up to a constant.
        values (`torch.Tensor` of shape `(k, ..., vocab)`): V_i.
        rounds (`int`, *optional*, defaults to 100): Most rounds, 1 or more.
        tolerance (`float`, *optional*, defaults to 1e-4): Of expected values, in nats.

    Returns:
        `tuple` of w, of shape `(k, ...)`, after `rounds` the last one, and by how much the expected values of
        objectives with weight differ from the least one, at most.
    """
    weights = torch.full_like(values[..., 0], 1 / len(values))

    def expected(weights: torch.Tensor) -> torch.Tensor:
        π = torch.softmax(base + (weights[..., None] * values).sum(0), -1)
        return (π * values).sum(-1)

    for left in range(rounds, -1, -1):
        found = expected(weights)
        best = found.masked_fill(weights <= 0, -torch.inf).argmax(0, keepdim=True)
        worst = found.argmin(0, keepdim=True)
        gap = (found.gather(0, best) - found.gather(0, worst)).max()
        if gap < tolerance or not left:
            break
        low, high = torch.zeros_like(weights[:1]), weights.gather(0, best)
        for _ in range(IN_FLOAT64 if weights.dtype == torch.float64 else HALVINGS):
            moved = (low + high) / 2
            found = expected(weights.scatter_add(0, best, -moved).scatter_add(0, worst, moved))
            more = found.gather(0, worst) < found.gather(0, best)
            low, high = torch.where(more, moved, low), torch.where(more, high, moved)
        # To the very end where that is best, so that a weight can be 0.
        moved = torch.where(high == weights.gather(0, best), high, low)
        weights = weights.scatter_add(0, best, -moved).scatter_add(0, worst, moved).clamp(min=0)
    return weights, gap


class WorstCase(Combination):
    """log π_base + Σ_i w_i V_i with the [`worst_weights`] of each token; V_i are weighted scorers.

    Made by [`parm`] and [`genarm`] with `preference="worst_case"`.
    """

    def scorers(self) -> Iterator[Scorer]:
        yield BASE
        yield from super().scorers()

    def __call__(self, step: Step) -> torch.Tensor:
        base, values = BASE(step), []
        for weight, scorer in self._terms:
            own = scorer(step)
            values.append(of_rows(weight, own) * own)
        stacked, largest = _without_infinities(torch.stack(values))
        if large := largest > LARGE and stacked.device.type != "mps":  # which has no float64
            base, stacked = base.double(), stacked.double()
        weights, gap = worst_weights(base, stacked)
        if gap > MOST_GAP:
            warnings.warn(  # without what differs from token to token, so that it is shown once
                f"After {ROUNDS} rounds the expected values of objectives still differ by more than {MOST_GAP:g} "
                "nats, so that the last weights are not quite the worst ones.",
                stacklevel=2,
            )
        found = base + (weights[..., None] * stacked).sum(0)
        return torch.log_softmax(found, -1).float() if large else found

    def __repr__(self) -> str:
        return f"WorstCase({', '.join(repr(scorer) for _, scorer in self._terms)})"


def _without_infinities(values: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The values, with one far beyond all others of a row for an infinite one, and how large the largest other is."""
    finite = ~values.isinf()
    known = values.where(finite, 0.0)
    lowest, highest = known.amin(-1, keepdim=True), known.amax(-1, keepdim=True)
    bounded = torch.where(values < 0, lowest - BELOW, highest + BELOW)
    return torch.where(finite, values, bounded), known.abs().max().item()
