# SPDX-License-Identifier: Apache-2.0
"""The loss that a configuration asks for, put together from [`losses`]."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .config import PreferenceARMConfig
from .losses import global_loss, objective_losses, pair_losses, tchebycheff


class ARMLoss:
    """The loss of a batch of pairs: Σ_i α_i l_i, or another aggregation, and UniARM's global term.

    Args:
        args ([`PreferenceARMConfig`]): β_i, kind of loss, aggregation.
        objectives (`list[str]`): The k objectives.
    """

    def __init__(self, args: PreferenceARMConfig, objectives: list[str]) -> None:
        self.args = args
        self.beta = torch.tensor(args.by_objective("beta", objectives))
        self.ideal = torch.tensor(args.by_objective("ideal_losses", objectives))

    def of_pairs(self, margins: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """l of each pair for each objective, shape `(pairs, k)`, from margins `(pairs,)` and labels `(pairs, k)`."""
        args, beta = self.args, self.beta.to(margins)
        return pair_losses(margins, labels, beta, args.target_margin, args.label_smoothing, args.loss_type == "hinge")

    def distances(self, losses: torch.Tensor, labels: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """What these pairs add to l_i − z*_i of a step, shape `(k,)`; arguments as for `aggregate`."""
        return objective_losses(losses - self.ideal.to(losses) * (labels != 0), counts[:-1].to(losses))

    def aggregate(
        self,
        losses: torch.Tensor,
        labels: torch.Tensor,
        preference: torch.Tensor,
        counts: torch.Tensor,
        whole: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """One number from the losses of pairs.

        Args:
            losses (`torch.Tensor` of shape `(pairs, k)`): From `of_pairs`.
            labels (`torch.Tensor` of shape `(pairs, k)`): Their labels.
            preference (`torch.Tensor` of shape `(k,)` or `(pairs, k)`): α.
            counts (`torch.Tensor` of shape `(k + 1,)`): From [`count_labels`], of the whole optimisation step.
            whole (`Callable`, *optional*):
                From the `distances` of these pairs to those of the whole step, where the step has more pairs.
        """
        preference = preference.to(losses)
        if self.args.aggregation == "tchebycheff":
            distances = self.distances(losses, labels, counts)
            return tchebycheff(distances, preference, whole and whole(distances.detach()))
        counts = counts[:-1].to(losses)
        if preference.ndim == 2:
            return objective_losses(losses, counts, preference).sum()
        return (preference * objective_losses(losses, counts)).sum()

    def __call__(
        self,
        margins: torch.Tensor,
        labels: torch.Tensor,
        preference: torch.Tensor,
        counts: torch.Tensor,
        whole: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of a batch with its global term, and that of each pair, shape `(pairs, k)`."""
        losses = self.of_pairs(margins, labels)
        total = self.aggregate(losses, labels, preference, counts, whole)
        if self.args.global_weight:
            beta, preference = self.beta.to(margins), preference.to(margins)
            total = total + self.args.global_weight * global_loss(margins, labels, beta, preference, counts[-1])
        return total, losses


def count_labels(labels: torch.Tensor) -> torch.Tensor:
    """Labelled pairs of each objective and, last, pairs with any label, shape `(k + 1,)`, of labels `(pairs, k)`."""
    known = labels != 0
    return torch.cat([known.sum(0), known.any(1).sum()[None]]).float()
