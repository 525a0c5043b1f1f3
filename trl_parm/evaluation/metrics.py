# SPDX-License-Identifier: Apache-2.0
"""Measures of a Pareto front, and how far they can be trusted. Rewards are always maximised; a cost enters as −cost.

Mathematics only.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import ArrayLike

from trl_parm.extras import require


def hypervolume(points: ArrayLike, reference: ArrayLike) -> float:
    """The volume that the points dominate above the reference point.

    The order of methods depends on the reference point, so it is always an argument: print it beside the value.

    Args:
        points (`ArrayLike` of shape `(n, k)`): Mean rewards of n preferences, higher is better.
        reference (`ArrayLike` of shape `(k,)`): A point that good points dominate.

    Returns:
        `float`, 0 or larger, in units of the product of the rewards.

    Raises:
        ValueError: no points, NaN, or a reference point of another length.
        ImportError: the extra `eval` is not installed.

    Example:

    ```python
    >>> from trl_parm import hypervolume
    >>> hypervolume([[1.0, 3.0], [2.0, 1.0]], reference=[0.0, 0.0])
    4.0

    ```
    """
    require("eval", "`hypervolume`", "moocore")
    import moocore

    points, reference = _finite(points, "points", 2), _finite(reference, "reference", 1)
    if points.shape[1] != len(reference):
        raise ValueError(f"`points` have {points.shape[1]} objectives, but `reference` has {len(reference)}.")
    volume = float(moocore.hypervolume(points, ref=reference, maximise=True))
    _warn_of_none(volume, reference)
    return volume


def hypervolumes(points: np.ndarray, reference: ArrayLike) -> np.ndarray:
    """[`hypervolume`] of many sets of points, `(sets, n, k)`; of two objectives all at once, as the area below the
    staircase from the best point in the first objective to the worst one."""
    points, reference = _finite(points, "points", 3), _finite(reference, "reference", 1)
    if points.shape[2] != 2:
        require("eval", "`hypervolume`", "moocore")
        import moocore

        volumes = np.array([moocore.hypervolume(each, ref=reference, maximise=True) for each in points])
    else:
        above = np.maximum(points - reference, 0)
        order = (-above[..., 0]).argsort(1)
        first, second = np.take_along_axis(above, order[..., None], 1).transpose(2, 0, 1)
        widths = first - np.pad(first[:, 1:], ((0, 0), (0, 1)))
        volumes = (widths * np.maximum.accumulate(second, 1)).sum(1)
    _warn_of_none(volumes.min(), reference)
    return volumes


def _warn_of_none(volume: float, reference: np.ndarray) -> None:
    if volume == 0:
        warnings.warn(
            f"No point lies above the reference point {reference.tolist()}: the hypervolume is 0.", stacklevel=3
        )


def mean_inner_product(preferences: ArrayLike, rewards: ArrayLike) -> float:
    """MIP = (1/N) Σ_j α_j · R(α_j): how well the rewards follow the preferences (PARM, arXiv 2505.06274, section 4).

    Args:
        preferences (`ArrayLike` of shape `(n, k)`): The preferences α_j.
        rewards (`ArrayLike` of shape `(n, k)`): Mean raw rewards of the responses decoded with α_j, higher is better.

    Returns:
        `float`, in the units of the rewards.

    Raises:
        ValueError: shapes that differ, or NaN.
    """
    preferences, rewards = _pairs(preferences, rewards)
    return float((preferences * rewards).sum(-1).mean())


def pareto_front(points: ArrayLike) -> np.ndarray:
    """Which points no other point dominates (at least as good in all objectives, better in one).

    Args:
        points (`ArrayLike` of shape `(n, k)`): Rewards, higher is better.

    Returns:
        `np.ndarray` of shape `(n,)`, bool. Of equal points all are kept.

    Raises:
        ValueError: no points, or NaN.
        ImportError: the extra `eval` is not installed.
    """
    require("eval", "`pareto_front`", "moocore")
    import moocore

    return np.asarray(moocore.is_nondominated(_finite(points, "points", 2), maximise=True, keep_weakly=True))


def rank_correlations(preferences: ArrayLike, rewards: ArrayLike) -> np.ndarray:
    """Spearman's rank correlation of α_i with reward i, for each objective: how evenly the preference moves rewards.

    1 means that more weight always brings more of its reward; three or more objectives may trade among themselves.

    Args:
        preferences (`ArrayLike` of shape `(n, k)`): The preferences.
        rewards (`ArrayLike` of shape `(n, k)`): Their mean rewards, higher is better.

    Returns:
        `np.ndarray` of shape `(k,)`, in [−1, 1]; NaN where weights or rewards do not vary.

    Raises:
        ValueError: shapes that differ, or NaN.
        ImportError: the extra `eval` is not installed.
    """
    require("eval", "`rank_correlations`", "scipy")
    from scipy.stats import ConstantInputWarning, spearmanr

    preferences, rewards = _pairs(preferences, rewards)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstantInputWarning)
        return np.array([cast(Any, spearmanr(a, r)).statistic for a, r in zip(preferences.T, rewards.T, strict=True)])


class Interval(NamedTuple):
    """An estimate and its confidence interval, whose ends are NaN where one prompt allows none."""

    estimate: float
    low: float
    high: float

    def __str__(self) -> str:
        estimate, low, high = (round(value, 2) + 0.0 for value in self)  # without the sign of −0
        if math.isnan(low):
            return f"{estimate:.2f} (one prompt: no interval)"
        return f"{estimate:.2f} [{low:.2f}, {high:.2f}]"


def bootstrap(
    statistic: Callable[[np.ndarray], Any],
    rewards: ArrayLike,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
    vectorized: bool = False,
) -> Interval:
    """The symmetric bootstrap interval of a function of mean rewards, over prompts (Hall, JRSS B 1988).

        t ± q,   t = statistic(mean), q the quantile of |t* − t| over resampled prompts

    All preferences and methods in `rewards` are resampled together, prompt by prompt, so what they share cancels. The
    hypervolume of noisy means is too large, that of resampled means even more so: percentile intervals lie too high.

    Args:
        statistic (`Callable`): Maps mean rewards, of the shape of `rewards` without its first axis, to a number.
        rewards (`ArrayLike` of shape `(prompts, ...)`): Rewards of each prompt.
        resamples (`int`, *optional*, defaults to 2000): How often the prompts are drawn again.
        confidence (`float`, *optional*, defaults to 0.95): In (0, 1).
        seed (`int`, *optional*, defaults to 0): Of the draws; intervals of one seed use the same draws.
        vectorized (`bool`, *optional*, defaults to `False`): Whether `statistic` takes many mean rewards at once, with
            an axis in front for them, and gives as many numbers: much faster, as in `scipy.stats.bootstrap`.

    Returns:
        [`Interval`]: The estimate and its interval, NaN for a single prompt.

    Raises:
        ValueError: no prompts, values that are not finite, a confidence outside of (0, 1), no resamples, or a
            vectorized statistic that does not give a number for each.
    """
    values = np.asarray(rewards, dtype=float)
    if values.ndim < 2 or values.size == 0 or not np.isfinite(values).all():
        raise ValueError(f"`rewards` has shape {values.shape}, but it needs (prompts, ...) and finite values.")
    if not 0 < confidence < 1 or resamples < 1:
        raise ValueError(f"`confidence` is {confidence}, `resamples` {resamples}. Give one in (0, 1), and 1 or more.")
    of = _of_many(statistic, vectorized)
    estimate, prompts = float(of(values.mean(0)[None])[0]), len(values)
    if prompts == 1:
        return Interval(estimate, math.nan, math.nan)
    means = np.tensordot(_shares(seed, prompts, resamples), values, axes=1)
    reach = float(np.quantile(np.abs(_quietly(of, means) - estimate), confidence))
    return Interval(estimate, estimate - reach, estimate + reach)


def seed_bootstrap(
    statistic: Callable[[np.ndarray], Any],
    rewards: ArrayLike,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
    vectorized: bool = False,
) -> Interval:
    """The symmetric interval of a measure's mean over training seeds, for other prompts *and* other seeds.

        t ± √(q² + u²),   t = (1/S) Σ_s f_s,   f_s = statistic(mean over prompts of rewards[s])

    q is the quantile of |t* − t| over resampled prompts, the same for all seeds, as in [`bootstrap`]; u is Student's,
    t_{S−1} · sd(f_s) / √S. Resampling seeds too would be too narrow where they are few: a resample of three varies
    less than three new ones, and has no tails. With one seed it is [`bootstrap`], which knows nothing of training.

    Args:
        statistic, resamples, confidence, seed, vectorized: As for [`bootstrap`].
        rewards (`ArrayLike` of shape `(seeds, prompts, ...)`): Rewards by training seed and prompt.

    Returns:
        [`Interval`]: The estimate and its interval, NaN for a single prompt.

    Raises:
        ValueError: as of [`bootstrap`].
    """
    values = np.asarray(rewards, dtype=float)
    if values.ndim < 3 or values.size == 0 or not np.isfinite(values).all():
        raise ValueError(f"`rewards` has shape {values.shape}, but it needs (seeds, prompts, ...) and finite values.")
    seeds, prompts = values.shape[:2]
    if seeds == 1:
        return bootstrap(statistic, values[0], resamples, confidence, seed, vectorized)
    if not 0 < confidence < 1 or resamples < 1:
        raise ValueError(f"`confidence` is {confidence}, `resamples` {resamples}. Give one in (0, 1), and 1 or more.")
    require("eval", "`seed_bootstrap`", "scipy")
    from scipy.stats import t as student

    of = _of_many(statistic, vectorized)
    found = of(values.mean(1))
    estimate = float(np.mean(found))
    if prompts == 1:
        return Interval(estimate, math.nan, math.nan)
    shares = _shares(seed, prompts, resamples)
    drawn = np.mean([_quietly(of, np.tensordot(shares, of_seed, axes=1)) for of_seed in values], 0)
    of_prompts = float(np.quantile(np.abs(drawn - estimate), confidence))
    of_seeds = student.ppf((1 + confidence) / 2, seeds - 1) * np.std(found, ddof=1) / math.sqrt(seeds)
    reach = float(np.hypot(of_prompts, of_seeds))
    return Interval(estimate, estimate - reach, estimate + reach)


def spread(preferences: ArrayLike, rewards: ArrayLike, objective: int) -> float:
    """How far the preference moves a reward: at its own vertex, minus its mean at the others.

    Args:
        preferences (`ArrayLike` of shape `(n, k)`): The preferences, all vertices among them.
        rewards (`ArrayLike` of shape `(n, k)`): Their mean rewards, higher is better.
        objective (`int`): Which one.

    Raises:
        ValueError: shapes that differ, NaN, a single objective, or vertices that are missing.
    """
    preferences, rewards = _pairs(preferences, rewards)
    places = vertices(preferences)
    if places is None or len(places) < 2:
        raise ValueError(
            f"A spread needs the vertices of two or more objectives, but there are {preferences.tolist()}."
        )
    others = [place for i, place in enumerate(places) if i != objective]
    return float(rewards[places[objective], objective] - rewards[others, objective].mean())


def vertices(preferences: ArrayLike) -> list[int] | None:
    """Where each objective's vertex is among preferences of shape `(n, k)`; `None` if one is missing."""
    array = np.asarray(preferences, dtype=float)
    found = [np.flatnonzero(np.abs(array - vertex).max(1) < 1e-6) for vertex in np.eye(array.shape[1])]
    return [int(places[0]) for places in found] if all(len(places) for places in found) else None


@functools.lru_cache(maxsize=4)  # a table of measures asks for the same ones again and again
def _shares(seed: int, count: int, resamples: int) -> np.ndarray:
    """What each of some things counts for in each resample, shape `(resamples, count)`, rows of sum 1."""
    shares = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples) / count
    shares.flags.writeable = False
    return shares


def _of_many(statistic: Callable[[np.ndarray], Any], vectorized: bool) -> Callable[[np.ndarray], np.ndarray]:
    def of(means: np.ndarray) -> np.ndarray:
        found = np.asarray(statistic(means) if vectorized else [statistic(mean) for mean in means], dtype=float)
        if found.shape != (len(means),):
            raise ValueError(
                f"Of {len(means)} mean rewards the statistic gives an array of shape {found.shape}, but it needs "
                f"({len(means)},): a number for each. One that takes them one by one is not `vectorized`."
            )
        return found

    return of


def _quietly(statistic: Callable[[np.ndarray], np.ndarray], means: np.ndarray) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of resamples; those of the estimate are the user's
        return statistic(means)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error (NaN for a single value)."""
    array = np.asarray(values, dtype=float)
    error = array.std(ddof=1) / np.sqrt(len(array)) if len(array) > 1 else np.nan
    return float(array.mean()), float(error)


def _pairs(preferences: ArrayLike, rewards: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    preferences, rewards = _finite(preferences, "preferences", 2), _finite(rewards, "rewards", 2)
    if preferences.shape != rewards.shape:
        raise ValueError(f"`preferences` have shape {preferences.shape}, but `rewards` {rewards.shape}.")
    return preferences, rewards


def _finite(values: ArrayLike, name: str, ndim: int) -> np.ndarray:
    array = np.asarray(values, dtype=float)
    if array.ndim != ndim or array.size == 0:
        raise ValueError(f"`{name}` has shape {array.shape}, but it needs {ndim} dimension(s) and at least one entry.")
    if not np.isfinite(array).all():
        raise ValueError(f"`{name}` has NaN or infinite values. Find out where they come from before measuring.")
    return array
