# SPDX-License-Identifier: Apache-2.0
"""Sliders that stay on the simplex, in hundredths, so that what they show sums to 1 exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence


def uniform(k: int) -> list[float]:
    """Where k sliders start: `[0.34, 0.33, 0.33]` for three."""
    return [share / 100 for share in _split(100, [1.0] * k)]


def rescale(weights: Sequence[float | None], moved: int) -> list[float]:
    """The weights after one slider was moved: the others share what it leaves, as they stood to each other.

    Where they all stood at 0 they share evenly. An only slider stays at 1.

    Args:
        weights (`Sequence[float]` of length k):
            What the sliders say; a value outside of [0, 1] counts as the nearest one in it, an empty field as 0.
        moved (`int`): Which one was moved.

    Returns:
        `list[float]` of length k: hundredths, none negative, with the sum 1.

    Example:

    ```python
    >>> from trl_parm.demo.simplex import rescale
    >>> rescale([0.5, 0.3, 0.1], moved=0)
    [0.5, 0.38, 0.12]

    ```
    """
    if len(weights) == 1:
        return [1.0]
    others = [min(1.0, max(0.0, w)) if w is not None and math.isfinite(w) else 0.0 for w in weights]
    kept = round(others.pop(moved) * 100)
    shares = _split(100 - kept, others if any(others) else [1.0] * len(others))
    shares.insert(moved, kept)
    return [share / 100 for share in shares]


def _split(total: int, weights: Sequence[float]) -> list[int]:
    """Whole shares of a total in proportion to weights, by the largest remainders."""
    exact = [total * w / sum(weights) for w in weights]
    shares = [math.floor(x) for x in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: shares[i] - exact[i])
    for i in by_remainder[: total - sum(shares)]:
        shares[i] += 1
    return shares
