# SPDX-License-Identifier: Apache-2.0
"""The algebra of decoding methods: a method is a formula over log-probabilities of the next token.

A scorer maps what is known of the next token, a [`Step`], to a number for each token. Sums and multiples of scorers
are scorers, so a method is written as its formula:

    BASE + 1 / beta * LM(arm, preference)          PARM, arXiv 2505.06274

Equal terms merge, so that a shared model runs once, and terms of weight 0 vanish, so that 0 · −inf never makes NaN.
Nothing is divided by the sum of the weights. It knows of tensors only, neither of models nor of `generate`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from numbers import Real
from typing import Any

import torch


Weight = float | torch.Tensor
"""A number, or a tensor of shape `(rows,)` with one for each prompt of a batch."""
LEAST_ORDER, MOST_ORDER = 1e-20, 1e20
"""Between these float32 can tell the orders of power means from 0 and from infinity."""


@dataclass(frozen=True)
class Step:
    """What a formula is evaluated on: the next token of every row, at one position or at several.

    Attributes:
        scores (`torch.Tensor` of shape `(rows, vocab)` or `(rows, positions, vocab)`):
            The base model's logits or log-probabilities.
        answers (`Mapping`): log π of each language model of the formula, of the shape of `scores`, float32.
        tokens, mask (`torch.Tensor` of shape `(rows, length)` or `None`):
            All tokens so far, and 1, or 0 for padding, of each. Only there if a scorer `reads_text`, and then for one
            position.
        prompt_length (`int`): Columns of `tokens` that are the prompt.
        memory (`dict`): What scorers of texts keep from one step to the next, such as what a judge has read. It must
            not change what they answer: steps may go back, or rows change places.
    """

    scores: torch.Tensor
    answers: Mapping[Any, torch.Tensor] = field(default_factory=dict)
    tokens: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    prompt_length: int = 0
    memory: dict[Any, Any] = field(default_factory=dict)

    @property
    def text(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and mask. Raises `ValueError` where they are not known."""
        if self.tokens is None or self.mask is None:
            raise ValueError("A scorer of texts was asked without any. Use `generate`, or leave the cache out.")
        return self.tokens, self.mask


class Scorer:
    """A term of a decoding formula. Subclasses define `__call__`; `+`, `-`, `*` and `/` are given.

    Attributes:
        reads_text (`bool`): Whether it needs the tokens of a step, beside the answers of language models.
        reads_prompt (`bool`): Whether it is refused where these don't show the base model's prompt.
    """

    reads_text = False
    reads_prompt: bool = False

    def __call__(self, step: Step) -> torch.Tensor:
        """Scores the next token of every row.

        Args:
            step ([`Step`]): What is known of it.

        Returns:
            `torch.Tensor` of the shape of `step.scores`, float32.
        """
        raise NotImplementedError

    def terms(self) -> list[tuple[Weight, Scorer]]:
        """The weighted terms that this scorer is the sum of."""
        return [(1.0, self)]

    def scorers(self) -> Iterator[Scorer]:
        """The scorers that this one is made of, down to those that are made of no others."""
        yield self

    def silent(self) -> Iterator[Scorer]:
        """The scorers of weight 0 below this one. They are never asked, but they are guides all the same."""
        yield from ()

    def models(self) -> Iterator[Any]:
        """The models that what it answers depends on, beside those of other scorers and the one that generates."""
        yield from ()

    def row_counts(self) -> Iterator[int]:
        """For how many rows each weight or preference of rows below this one is."""
        yield from ()

    def __add__(self, other: Scorer) -> Scorer:
        if not isinstance(other, Scorer):
            return NotImplemented
        return LinearCombination([*self._weighted(), *other._weighted()])

    def __sub__(self, other: Scorer) -> Scorer:
        return self + -1.0 * other if isinstance(other, Scorer) else NotImplemented

    def __mul__(self, weight: Weight) -> Scorer:
        if not isinstance(weight, Real | torch.Tensor):
            return NotImplemented
        weight = weight if isinstance(weight, torch.Tensor) else float(weight)
        if not torch.isfinite(torch.as_tensor(weight)).all():
            raise ValueError(f"A term's weight is {weight}, but it must be finite.")
        if isinstance(weight, torch.Tensor) and weight.ndim != 1:
            raise ValueError(f"A term's weight has shape {tuple(weight.shape)}, but it must be a number or (rows,).")
        for own, _ in self._weighted():
            _check_same_rows(weight, own)
        return LinearCombination([(weight * own, scorer) for own, scorer in self._weighted()])

    __rmul__ = __mul__
    __array_ufunc__ = None
    """A number or an array of numpy leaves multiplication to the scorer."""

    def __truediv__(self, divisor: Weight) -> Scorer:
        return self * (1 / divisor)

    def __neg__(self) -> Scorer:
        return self * -1.0

    def _weighted(self) -> list[tuple[Weight, Scorer]]:
        """The terms, and those of weight 0, which keep in mind who would guide."""
        return [*self.terms(), *((0.0, silent) for silent in self.silent())]


def of_rows(weight: Weight, values: torch.Tensor) -> torch.Tensor:
    """A weight in a shape that multiplies `values`, `(rows, ...)`: one of rows is repeated as `generate` repeats them.

    Raises:
        ValueError: weights of rows that the rows of `values` are no multiple of.
    """
    column, rows = torch.as_tensor(weight), len(values)
    if column.ndim and rows % len(column):
        raise ValueError(
            f"A term has weights for {len(column)} rows, but the batch has {rows}, which is no multiple. Give one for "
            "each prompt of the batch."
        )
    if column.ndim:
        column = column.repeat_interleave(rows // len(column))
    return column.to(values).view(-1, *[1] * (values.ndim - 1))


def _check_same_rows(one: Weight, other: Weight) -> None:
    """Raises `ValueError` for two weights of rows that are not of the same ones."""
    rows = [len(weight) for weight in (one, other) if isinstance(weight, torch.Tensor) and len(weight) > 1]
    if len(set(rows)) > 1:
        raise ValueError(
            f"A term has weights for {rows[0]} and for {rows[1]} rows, such as by `beta` and `preference`. Give each "
            "one for each prompt of the batch, or one for all."
        )


def _name(weight: Weight) -> str:
    return f"[{', '.join(f'{w:g}' for w in weight.tolist())}]" if isinstance(weight, torch.Tensor) else f"{weight:g}"


class Combination(Scorer):
    """Weighted scorers: those of a weight other than 0, and the silent ones."""

    def __init__(self, terms: list[tuple[Weight, Scorer]]) -> None:
        self._terms = [(weight, scorer) for weight, scorer in terms if torch.as_tensor(weight).any()]
        heard = {scorer for _, scorer in self._terms}
        self._silent = [scorer for _, scorer in terms if scorer not in heard]

    def scorers(self) -> Iterator[Scorer]:
        for _, scorer in self._terms:
            yield from scorer.scorers()

    def silent(self) -> Iterator[Scorer]:
        for scorer in self._silent:
            yield from scorer.scorers()
        for _, scorer in self._terms:
            yield from scorer.silent()

    def row_counts(self) -> Iterator[int]:
        for weight, scorer in self._terms:
            if isinstance(weight, torch.Tensor):
                yield len(weight)
            yield from scorer.row_counts()


class LinearCombination(Combination):
    """Σ_i w_i · scorer_i, made by the operators of [`Scorer`]: equal scorers merged, zero weights gone.

    A token that a scorer excludes (−inf), as one that a guide does not know, is excluded at a negative weight too.
    """

    def __init__(self, terms: list[tuple[Weight, Scorer]]) -> None:
        merged: dict[Scorer, Weight] = {}
        for weight, scorer in terms:
            former = merged.get(scorer, 0.0)
            _check_same_rows(former, weight)
            merged[scorer] = former + weight
        super().__init__([(weight, scorer) for scorer, weight in merged.items()])

    def terms(self) -> list[tuple[Weight, Scorer]]:
        return list(self._terms)

    def __call__(self, step: Step) -> torch.Tensor:
        total = None
        for weight, scorer in self._terms:
            values = scorer(step)
            if isinstance(weight, torch.Tensor):
                column = of_rows(weight, values)
                values = torch.where((column < 0) & (values == -torch.inf), torch.inf, values)
                values = torch.where(column == 0, torch.zeros_like(values), column * values)  # 0 · −inf is 0
                weight = 1.0
            elif weight < 0:
                values = values.masked_fill(values == -torch.inf, torch.inf)
            total = weight * values if total is None else total.add_(values, alpha=weight)
        return torch.zeros_like(step.scores, dtype=torch.float32) if total is None else total

    def __repr__(self) -> str:
        return " + ".join(f"{_name(weight)} * {scorer!r}" for weight, scorer in self._terms) or "0"


class PowerMean(Combination):
    """log of the weighted power mean of probabilities, (Σ_i w_i π_i^−a)^(−1/a), up to normalisation.

    a = 1 is the harmonic mean, MOD's combination for the forward KL divergence, and other a those for α-divergences
    (arXiv 2406.18853); a → 0 is the geometric mean, which sums of scorers are, and a → ∞ the [`Intersection`].

    Args:
        terms (`list[tuple[Weight, Scorer]]`):
            Weights, numbers or tensors of shape `(rows,)`, not negative and not all 0, of which their shares of the
            sum count, and scorers of log-probabilities.
        order (`float`, *optional*, defaults to 1.0): a > 0.

    Raises:
        ValueError: an order that is not positive, or a weight that is negative or not finite, or weights all 0.
    """

    def __init__(self, terms: list[tuple[Weight, Scorer]], order: float = 1.0) -> None:
        check_order(order)
        weights = [torch.as_tensor(weight, dtype=torch.float64) for weight, _ in terms]
        if any(not (weight.isfinite().all() and (weight >= 0).all()) for weight in weights):
            raise ValueError(f"The weights are {[weight for weight, _ in terms]}, but none may be negative.")
        counts: list[Weight] = [weight if weight.ndim else float(weight) for weight in weights]
        for one, other in combinations(counts, 2):
            _check_same_rows(one, other)
        total = sum(counts)
        if not torch.as_tensor(total).all():
            raise ValueError(
                f"The weights are {[weight for weight, _ in terms]}, but a mean needs one above 0, in every row."
            )
        super().__init__([(weight / total, scorer) for weight, (_, scorer) in zip(counts, terms, strict=True)])
        self.order = order

    def __call__(self, step: Step) -> torch.Tensor:
        found = [(weight, scorer(step)) for weight, scorer in self._terms]
        shares = [of_rows(weight, values) for weight, values in found]
        least = torch.stack([values.masked_fill(w == 0, torch.inf) for w, (_, values) in zip(shares, found)]).amin(0)
        # With d_i = log π_i − min_j log π_j it is min + −1/a log Σ w_i e^(−a d_i). That sum is 1 + Σ w_i (e^(−a d_i) −
        # 1): small orders need the second part alone, which a sum near 1 would lose; one near 0 needs the first.
        order = min(max(self.order, LEAST_ORDER), MOST_ORDER)
        below, total = torch.zeros_like(least), torch.zeros_like(least)
        for share, (_, values) in zip(shares, found):
            exponent = torch.where(share == 0, 0.0, -order * (values - least))
            below += share * torch.expm1(exponent)
            total += share * torch.exp(exponent)
        log = torch.where(below > -0.5, torch.log1p(below), torch.log(total))
        return torch.where(least == -torch.inf, least, least - log / order)

    def __repr__(self) -> str:
        terms = ", ".join(f"{_name(weight)} * {scorer!r}" for weight, scorer in self._terms)
        return f"PowerMean({terms}; order={self.order:g})"


def check_order(order: float) -> None:
    """Raises `ValueError` for an order that a [`PowerMean`] has not."""
    if not (isinstance(order, Real) and math.isfinite(order) and order > 0):
        raise ValueError(
            f"`order` is {order!r}, but it must be a positive, finite number. A sum of scorers is the limit for 0."
        )


class _Extreme(Scorer):
    """At each token the largest, or the smallest, of what some scorers of log-probabilities say."""

    def __init__(self, *scorers: Scorer) -> None:
        if len(scorers) < 2 or not all(isinstance(scorer, Scorer) for scorer in scorers):
            raise ValueError(
                f"{type(self).__name__} was given {list(scorers)}, but it needs two scorers or more, such as `BASE` "
                "and `LM(model)`."
            )
        self._scorers = list(dict.fromkeys(scorers))

    def scorers(self) -> Iterator[Scorer]:
        for scorer in self._scorers:
            yield from scorer.scorers()

    def silent(self) -> Iterator[Scorer]:
        for scorer in self._scorers:
            yield from scorer.silent()

    def row_counts(self) -> Iterator[int]:
        for scorer in self._scorers:
            yield from scorer.row_counts()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self._scorers))})"


class Union(_Extreme):
    """log max_i π_i: tokens that any of the distributions finds likely (of model arithmetic, arXiv 2311.14479).

    Args:
        *scorers (`Scorer`): Two or more scorers of log-probabilities, such as `BASE` and `LM(model)`.

    Raises:
        ValueError: fewer than two, or something else than scorers.
    """

    def __call__(self, step: Step) -> torch.Tensor:
        return torch.stack([scorer(step) for scorer in self._scorers]).amax(0)


class Intersection(_Extreme):
    """log min_i π_i: tokens that all of the distributions find likely (of model arithmetic, arXiv 2311.14479).

    Args and errors are as of [`Union`].
    """

    def __call__(self, step: Step) -> torch.Tensor:
        return torch.stack([scorer(step) for scorer in self._scorers]).amin(0)


class _Base(Scorer):
    """log π_base: the log-softmax of the model that generates."""

    def __call__(self, step: Step) -> torch.Tensor:
        return torch.log_softmax(step.scores.float(), dim=-1)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Base)  # one that was unpickled, too

    def __hash__(self) -> int:
        return hash(_Base)

    def __repr__(self) -> str:
        return "BASE"


BASE = _Base()
"""The model that generates."""


def sum_of(terms) -> Scorer:
    """Σ_i w_i · scorer_i for pairs of weight and scorer; nothing at all for none."""
    return sum((weight * scorer for weight, scorer in terms), start=LinearCombination([]))


def guided_logits(formula: Scorer, step: Step) -> torch.Tensor:
    """log π of the guided distribution, normalised, of the shape of `step.scores`, float32.

    Tokens that the base model excludes (a score of −inf) stay excluded.
    """
    guided = formula(step).masked_fill(step.scores == -torch.inf, -torch.inf)
    return torch.log_softmax(guided, dim=-1)
