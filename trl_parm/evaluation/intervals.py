# SPDX-License-Identifier: Apache-2.0
"""How far a measure can be trusted: bootstrap intervals over prompts. Mathematics only."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class Interval(NamedTuple):
    """An estimate and its confidence interval."""

    estimate: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.estimate:.2f} [{self.low:.2f}, {self.high:.2f}]"


def bootstrap(
    statistic: Callable[[np.ndarray], float],
    rewards: ArrayLike,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """The symmetric bootstrap interval of a function of mean rewards, over prompts (Hall, JRSS B 1988).

        t ± q,   t = statistic(mean), q the quantile of |t* − t| over resampled prompts

    All preferences and methods in `rewards` are resampled together, prompt by prompt, so what they share cancels. The
    hypervolume of noisy means is too large, and that of resampled means even more so: of percentile intervals, which
    lie too high, only two thirds hold the true value of a simulated front with 24 prompts, of these 96 %
    (`tests/test_measures.py`). Where no point lies above the reference point, they still tell how near one comes.

    Args:
        statistic (`Callable`): Maps mean rewards, of the shape of `rewards` without its first axis, to a number.
        rewards (`ArrayLike` of shape `(prompts, ...)`): Rewards of each prompt.
        resamples (`int`, *optional*, defaults to 2000): How often the prompts are drawn again.
        confidence (`float`, *optional*, defaults to 0.95): In (0, 1).
        seed (`int`, *optional*, defaults to 0): Of the draws; intervals of one seed use the same draws.

    Returns:
        [`Interval`]: The estimate and its interval, NaN for a single prompt.

    Raises:
        ValueError: no prompts, values that are not finite, a confidence outside of (0, 1), or no resamples.
    """
    values = np.asarray(rewards, dtype=float)
    if values.ndim < 2 or values.size == 0 or not np.isfinite(values).all():
        raise ValueError(f"`rewards` has shape {values.shape}, but it needs (prompts, ...) and finite values.")
    if not 0 < confidence < 1 or resamples < 1:
        raise ValueError(f"`confidence` is {confidence}, `resamples` {resamples}. Give one in (0, 1), and 1 or more.")
    estimate, prompts = float(statistic(values.mean(0))), len(values)
    if prompts == 1:
        return Interval(estimate, math.nan, math.nan)
    shares = np.random.default_rng(seed).multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples) / prompts
    means = np.tensordot(shares, values, axes=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of resamples; those of the estimate are the user's
        drawn = np.array([statistic(mean) for mean in means])
    reach = float(np.quantile(np.abs(drawn - estimate), confidence))
    return Interval(estimate, estimate - reach, estimate + reach)
