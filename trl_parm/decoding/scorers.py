# SPDX-License-Identifier: Apache-2.0
"""The algebra of decoding methods: a method is a linear combination of scorers.

A scorer maps `(input_ids, scores)` to log-probabilities of the next token, as a `LogitsProcessor` does. Sums and
multiples of scorers are scorers, so a method is written as its formula:

    BASE + 1 / beta * LM(arm, preference)          PARM, arXiv 2505.06274

Equal terms merge, so that a shared model runs once, and terms of weight 0 vanish, so that 0 · −inf never makes NaN.
Nothing is divided by the sum of the weights.
"""

from __future__ import annotations

import math

import torch
from transformers import LogitsProcessor


class Scorer:
    """A term of a decoding formula. Subclasses define `__call__`; `+`, `-`, `*` and `/` are given."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores the next token of every row.

        Args:
            input_ids (`torch.Tensor` of shape `(rows, length)`): All tokens so far, the prompt included.
            scores (`torch.Tensor` of shape `(rows, vocab)`): The base model's logits or log-probabilities.

        Returns:
            `torch.Tensor` of shape `(rows, vocab)`, float32.
        """
        raise NotImplementedError

    def terms(self) -> list[tuple[float, Scorer]]:
        """The weighted terms that this scorer is the sum of."""
        return [(1.0, self)]

    def __add__(self, other: Scorer) -> Scorer:
        return LinearCombination(self.terms() + other.terms()) if isinstance(other, Scorer) else NotImplemented

    def __sub__(self, other: Scorer) -> Scorer:
        return self + -1.0 * other if isinstance(other, Scorer) else NotImplemented

    def __mul__(self, weight: float) -> Scorer:
        if not isinstance(weight, int | float):
            return NotImplemented
        if not math.isfinite(weight):
            raise ValueError(f"A term's weight is {weight}, but it must be finite.")
        return LinearCombination([(weight * own, scorer) for own, scorer in self.terms()])

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Scorer:
        return self * (1 / divisor)

    def __neg__(self) -> Scorer:
        return self * -1.0


class LinearCombination(Scorer):
    """Σ_i w_i · scorer_i, made by the operators of [`Scorer`]: equal scorers merged, zero weights gone."""

    def __init__(self, terms: list[tuple[float, Scorer]]) -> None:
        merged: dict[Scorer, float] = {}
        for weight, scorer in terms:
            merged[scorer] = merged.get(scorer, 0.0) + weight
        self._terms = [(weight, scorer) for scorer, weight in merged.items() if weight != 0]

    def terms(self) -> list[tuple[float, Scorer]]:
        return list(self._terms)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(scores, dtype=torch.float32)
        for weight, scorer in self._terms:
            total = total + weight * scorer(input_ids, scores)
        return total

    def __repr__(self) -> str:
        return " + ".join(f"{weight:g} * {scorer!r}" for weight, scorer in self._terms) or "0"


class _Base(Scorer):
    """log π_base: the log-softmax of the scores that `generate` hands over."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(scores.float(), dim=-1)

    def __repr__(self) -> str:
        return "BASE"


BASE = _Base()
"""The model that generates."""


class GuidedLogitsProcessor(LogitsProcessor):
    """Makes `generate` decode from a formula: `model.generate(..., logits_processor=[GuidedLogitsProcessor(f)])`.

    Tokens that the base model excludes (a score of −inf) stay excluded. Temperature, top-k and top-p act on the
    guided distribution, since `generate` applies them after custom processors.

    Args:
        formula ([`Scorer`]): For example `BASE + 0.5 * LM(arm)`.
    """

    def __init__(self, formula: Scorer) -> None:
        if not isinstance(formula, Scorer):
            raise TypeError(
                f"`formula` is a {type(formula).__name__}, but it must be a scorer such as BASE + LM(arm)."
            )
        self.formula = formula

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        guided = self.formula(input_ids, scores)
        return guided.masked_fill(scores == -torch.inf, -torch.inf)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.formula!r})"
