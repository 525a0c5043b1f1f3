# SPDX-License-Identifier: Apache-2.0
"""Preferences α: one non-negative weight for each objective, summing to 1. This module knows nothing of models."""

import difflib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch


Preference = Mapping[str, float] | Sequence[float] | Sequence[Mapping[str, float]] | torch.Tensor

SUM_TOLERANCE = 1e-4
UNIFORM = "uniform"


def as_preference(
    preference: Preference, objectives: Sequence[str], normalize: bool = False, allow_off_simplex: bool = False
) -> torch.Tensor:
    """Checks a preference and brings it into its one internal form.

    Args:
        preference (`Mapping[str, float]`, `Sequence[float]` or `torch.Tensor`):
            Weights by objective name or in the order of `objectives`, or a tensor of shape `(k,)` or `(rows, k)` with
            one preference for each row of a batch. A sequence of mappings is one preference a row.
        objectives (`Sequence[str]`): The `k` objective names, in the adapter's order.
        normalize (`bool`, *optional*, defaults to `False`): Divide by the sum instead of refusing one other than 1.
        allow_off_simplex (`bool`, *optional*, defaults to `False`):
            Take any finite weights, negative ones too, which extrapolate beyond what an adapter was trained at.

    Returns:
        `torch.Tensor` of shape `(k,)` or `(rows, k)`, float32, on the CPU unless a tensor on a device came.

    Raises:
        ValueError: unknown or missing names, wrong length, negative or non-finite weights, or a sum other than 1.
        TypeError: anything that is not a preference, such as a string.
    """
    weights, k = _to_tensor(preference, objectives), len(objectives)
    if weights.ndim not in (1, 2) or weights.numel() == 0:
        raise ValueError(f"`preference` has shape {tuple(weights.shape)}. Give ({k},), or (rows, {k}) for one a row.")
    if weights.shape[-1] != k:
        raise ValueError(
            f"`preference` has {weights.shape[-1]} entries, but this adapter was trained for {k} objectives "
            f"({', '.join(objectives)})."
        )
    if not torch.isfinite(weights).all():
        raise ValueError(f"`preference` has a NaN or infinite weight: {weights.tolist()}. Give finite weights.")
    if allow_off_simplex and not normalize:
        return weights
    if (weights < 0).any():
        raise ValueError(
            f"`preference` has a negative weight: {weights.tolist()}. Weights must be 0 or larger, unless "
            "`allow_off_simplex=True` is passed, which extrapolates."
        )
    if normalize:
        if (weights.amax(-1) <= 0).any():
            raise ValueError("`preference` sums to 0 and can't be normalized. Give at least one positive weight.")
        weights = weights / weights.amax(-1, keepdim=True)  # so that the sum of huge weights is finite
        return weights / weights.sum(-1, keepdim=True)
    totals = weights.sum(-1)
    if ((totals - 1).abs() > SUM_TOLERANCE).any():
        raise ValueError(
            f"`preference` {weights.tolist()} sums to {totals.tolist()}, but the weights must sum to 1. "
            "Rescale it or pass `normalize=True`, or `allow_off_simplex=True` to extrapolate."
        )
    return weights


def name_preference(preference: Preference, objectives: Sequence[str], allow_off_simplex: bool = False) -> str:
    """The label of one preference: an objective's name at its vertex, `uniform`, or as `helpful=0.25,harmless=0.75`.

    Two preferences never have the same label: weights that are only nearly those of a vertex are written out, and so
    are uniform ones where an objective is called `uniform`. Raises `ValueError` for a preference for each row.
    """
    weights = as_preference(preference, objectives, allow_off_simplex=allow_off_simplex)
    if weights.ndim != 1:
        raise ValueError(f"`preference` of shape {tuple(weights.shape)} has no single name. Name its rows one by one.")
    if weights.count_nonzero() == 1 and weights.amax() == 1:
        return objectives[int(weights.argmax())]
    if UNIFORM not in objectives and (weights == torch.tensor(1 / len(objectives), dtype=torch.float32)).all():
        return UNIFORM
    return ",".join(f"{name}={_digits(value)}" for name, value in zip(objectives, weights.tolist(), strict=True))


def sample_preferences(
    n: int,
    objectives: Sequence[str],
    concentration: float | Sequence[float] = 1.0,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Draws preferences α ~ Dirichlet(concentration), as PARM does in training (arXiv 2505.06274, algorithm 1).

    Args:
        n (`int`): How many preferences, 1 or more.
        objectives (`Sequence[str]`): The `k` objective names.
        concentration (`float` or `Sequence[float]`, *optional*, defaults to 1.0):
            Dirichlet parameter, one for all objectives or one for each, positive. 1 is uniform on the simplex; below
            1 the draws lie near the vertices.
        generator (`torch.Generator`, *optional*): Source of randomness; torch's global one if not given.

    Returns:
        `torch.Tensor` of shape `(n, k)`, float32, rows on the simplex.

    Raises:
        ValueError: `n` that is no whole number or below 1, or a concentration that is not positive or has the wrong
            length.
    """
    k = len(objectives)
    if not isinstance(n, Integral) or n < 1:
        raise ValueError(f"`n` is {n}, but at least one preference must be drawn, a whole number of them.")
    try:
        shape = torch.as_tensor(concentration, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"`concentration` is {concentration!r}, but it must be a positive number, or a sequence of {k}."
        ) from None
    if shape.ndim > 1 or (shape.ndim == 1 and len(shape) != k):
        raise ValueError(f"`concentration` has shape {tuple(shape.shape)}, but there are {k} objectives.")
    if not (torch.isfinite(shape) & (shape > 0)).all():
        raise ValueError(f"`concentration` is {concentration}, but it must be positive and finite.")
    gammas = torch._standard_gamma(shape.expand(n, k).contiguous(), generator=generator)
    # For a tiny concentration every gamma of a row can underflow to 0: the limit is a random vertex.
    degenerate = gammas.sum(-1) == 0
    if degenerate.any():
        corner = torch.randint(k, (int(degenerate.sum()),), generator=generator)
        gammas[degenerate] = torch.nn.functional.one_hot(corner, k).to(gammas.dtype)
    return (gammas / gammas.sum(-1, keepdim=True)).float()


def preference_grid(objectives: Sequence[str], steps: int) -> torch.Tensor:
    """The regular grid on the simplex with `steps` intervals on each edge, in lexicographic order.

    Two objectives and `steps=10` give the papers' 11 points from `(0, 1)` to `(1, 0)`.

    Args:
        objectives (`Sequence[str]`): The `k` objective names.
        steps (`int`): Intervals on each edge, 1 or more. The grid has `C(steps + k - 1, k - 1)` points.

    Returns:
        `torch.Tensor` of shape `(points, k)`, float32.

    Raises:
        ValueError: `steps` that are no whole number, or below 1.
    """
    if not isinstance(steps, Integral) or steps < 1:
        raise ValueError(f"`steps` is {steps}, but the grid needs at least one interval, a whole number of them.")
    # A point is `steps` stars with bars between its parts.
    bars = itertools.combinations(range(steps + len(objectives) - 1), len(objectives) - 1)
    ends = torch.tensor([(-1, *places, steps + len(objectives) - 1) for places in bars])
    return (ends.diff(dim=1) - 1).float() / steps


def check_objectives(objectives: Iterable[str]) -> list[str]:
    """Returns the names as a list; raises `ValueError` unless they are distinct, non-empty strings of one line."""
    if isinstance(objectives, str):
        raise ValueError(f"`objectives` is the string {objectives!r}. Give a list of names, such as [{objectives!r}].")
    if not isinstance(objectives, Iterable):
        raise ValueError(f"`objectives` is {objectives!r}. Give a list of names, such as ['helpful', 'harmless'].")
    names = list(objectives)
    if not names or not all(isinstance(name, str) and name.strip() and name.isprintable() for name in names):
        raise ValueError(
            f"`objectives` is {names!r}, but it must be a list of one or more non-empty names, without line breaks or "
            "other characters that can't be seen."
        )
    if len(set(names)) != len(names):
        raise ValueError(f"`objectives` {names} has a name twice. Every objective needs its own name.")
    return names


def check_columns(objectives: Iterable[str], taken: Iterable[str], made: Sequence[str] = ("{}",)) -> None:
    """Raises `ValueError` if a column that an objective makes, as `made` with its name for `{}`, has another's name.

    `taken` are the columns that the table has without objectives.
    """
    owners = dict.fromkeys(taken, "the table itself")
    for objective in objectives:
        for column in (form.replace("{}", objective) for form in made):
            if column in owners:
                raise ValueError(
                    f"The objective {objective!r} would make a column that is called {column!r}, which is a column of "
                    f"{owners[column]} already. Name the objective otherwise."
                )
            owners[column] = f"the objective {objective!r}"


def _to_tensor(preference: Preference, objectives: Sequence[str]) -> torch.Tensor:
    if isinstance(preference, torch.Tensor):
        return preference.detach().to(torch.float32)
    if isinstance(preference, Mapping):
        return torch.tensor(_by_name(preference, objectives), dtype=torch.float32)
    if isinstance(preference, Sequence) and preference and isinstance(preference[0], Mapping):
        return torch.tensor([_by_name(row, objectives) for row in preference], dtype=torch.float32)
    try:
        return torch.as_tensor(preference, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"`preference` is {preference!r}. Give a mapping such as {{{objectives[0]!r}: 1.0, ...}}, a sequence of "
            f"{len(objectives)} numbers, or a tensor of shape ({len(objectives)},) or (rows, {len(objectives)})."
        ) from None


def _digits(value: float) -> str:
    """The shortest decimal that is this float32."""
    texts = (f"{value + 0.0:.{digits}g}" for digits in range(1, 10))
    return next(text for text in texts if torch.tensor(float(text), dtype=torch.float32).item() == value)


def _by_name(preference: Any, objectives: Sequence[str]) -> list[float]:
    if not isinstance(preference, Mapping):
        raise TypeError(f"`preference` mixes mappings with {preference!r}. Give one mapping for each row.")
    unknown = [name for name in preference if name not in objectives]
    if unknown:
        close = difflib.get_close_matches(str(unknown[0]), objectives, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"`preference` names {unknown}, but the objectives are {list(objectives)}.{hint}")
    missing = [name for name in objectives if name not in preference]
    if missing:
        raise ValueError(f"`preference` has no weight for {missing}. Name all of {list(objectives)}; it may be 0.")
    return [float(preference[name]) for name in objectives]
