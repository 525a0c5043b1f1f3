# SPDX-License-Identifier: Apache-2.0
"""The loss of an autoregressive reward model, as mathematics on log-probabilities. It knows nothing of models or data.

PARM (arXiv 2505.06274, section 3; GenARM, arXiv 2410.08193, eq. 8, is the case of one objective):

    l_i = −log σ( z_i β_i [log π(y1|x) − log π(y2|x)] ),  z_i = +1 where y1 is better for objective i, −1 where y2 is
    L   = Σ_i α_i l_i

Every reduction takes the number of labelled pairs, or the sum of their weights, of the whole optimisation step, so
that gradient accumulation and several processes add up to the loss of one big batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F


def pair_losses(
    margins: torch.Tensor,
    labels: torch.Tensor,
    beta: torch.Tensor,
    target_margin: float = 0.0,
    label_smoothing: float = 0.0,
    hinge: bool = False,
) -> torch.Tensor:
    """The loss of every pair for every objective.

    Args:
        margins (`torch.Tensor` of shape `(pairs,)`): log π(y1|x) − log π(y2|x), over response tokens.
        labels (`torch.Tensor` of shape `(pairs, k)`): +1 where y1 is the better one, −1 where y2 is, 0 for no label.
        beta (`torch.Tensor` of shape `(k,)`): β_i of each objective, positive.
        target_margin (`float`, *optional*, defaults to 0.0): γ, subtracted from z_i β_i · margin.
        label_smoothing (`float`, *optional*, defaults to 0.0): ε in [0, 0.5), the probability that a label is wrong.
        hinge (`bool`, *optional*, defaults to `False`): max(0, 1 − u) in the place of −log σ(u).

    Returns:
        `torch.Tensor` of shape `(pairs, k)`, 0 where there is no label.
    """
    signed = labels * beta * margins[:, None]
    losses = (1 - label_smoothing) * _penalty(signed - target_margin, hinge)
    if label_smoothing:
        losses = losses + label_smoothing * _penalty(-signed - target_margin, hinge)
    return torch.where(labels == 0, torch.zeros_like(losses), losses)


def objective_losses(
    losses: torch.Tensor, counts: torch.Tensor, preference: torch.Tensor | None = None
) -> torch.Tensor:
    """l_i of each objective: the sum over pairs by the number of labelled ones; 0 where none is labelled.

    Args:
        losses (`torch.Tensor` of shape `(pairs, k)`): From [`pair_losses`].
        counts (`torch.Tensor` of shape `(k,)`):
            Labelled pairs of each objective in the whole optimisation step, divided by the number of processes.
        preference (`torch.Tensor` of shape `(pairs, k)`, *optional*):
            A preference for each pair; then the result is α_i l_i with the α of each pair inside the sum.

    Returns:
        `torch.Tensor` of shape `(k,)`.
    """
    weighted = losses if preference is None else preference * losses
    return _mean(weighted.sum(0), counts)


def tchebycheff(distances: torch.Tensor, preference: torch.Tensor, whole: torch.Tensor | None = None) -> torch.Tensor:
    """The weighted Tchebycheff aggregation max_i α_i |l_i − z*_i| (Panacea, arXiv 2402.02030).

    A maximum is not the sum of the maxima of parts. With the distances of the `whole` step, which say where the
    maximum is and with which sign, the results of its parts add up to it.

    Args:
        distances (`torch.Tensor` of shape `(k,)`): l_i − z*_i, or what a part of the step adds to it.
        preference (`torch.Tensor` of shape `(k,)`): α.
        whole (`torch.Tensor` of shape `(k,)`, *optional*): l_i − z*_i of the whole step; `distances` if not given.
    """
    whole = distances.detach() if whole is None else whole
    largest = (preference * whole.abs()).argmax()
    return preference[largest] * whole[largest].sign() * distances[largest]


def global_loss(
    margins: torch.Tensor,
    labels: torch.Tensor,
    beta: torch.Tensor,
    preference: torch.Tensor,
    count: torch.Tensor,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """UniARM's global term (arXiv 2602.09538) in our reading of the paper's description.

        l_global = mean over pairs of |c| · −log σ( β sign(c) Δ ),  c = Σ_i α_i z_i,  Δ = log π(y1) − log π(y2)

    where β is the preference-weighted mean Σ_i α_i β_i.

    Args:
        margins (`torch.Tensor` of shape `(pairs,)`): Δ.
        labels (`torch.Tensor` of shape `(pairs, k)`): z_i, 0 for no label.
        beta (`torch.Tensor` of shape `(k,)`): β_i.
        preference (`torch.Tensor` of shape `(k,)` or `(pairs, k)`): α.
        count (`torch.Tensor` of shape `()`): Pairs with any label in the whole optimisation step, or their weights.
        weights (`torch.Tensor` of shape `(pairs,)`, *optional*): What each pair counts for.
    """
    weight = (preference * labels).sum(-1)
    strength = (preference * beta).sum(-1)
    losses = weight.abs() * -F.logsigmoid(strength * weight.sign() * margins)
    return _mean((losses if weights is None else weights * losses).sum(), count)


def accuracies(margins: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Whether each labelled pair is ranked as labelled: 1, 0, or NaN where there is no label, shape `(pairs, k)`."""
    correct = (margins[:, None] * labels > 0).float()
    return torch.where(labels == 0, torch.full_like(correct, torch.nan), correct)


def _mean(total: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """A sum by its number of pairs, or their weights, however small they are; 0 without any, as the sum is."""
    count = count.to(total)
    return total / torch.where(count < torch.finfo(count.dtype).tiny, 1.0, count)


def _penalty(u: torch.Tensor, hinge: bool) -> torch.Tensor:
    return F.relu(1 - u) if hinge else -F.logsigmoid(u)


@dataclass
class ARMLoss:
    """The loss of a batch of pairs: Σ_i α_i l_i, or [`tchebycheff`], and λ times [`global_loss`].

    Args:
        beta, ideal (`torch.Tensor` of shape `(k,)`): β_i and z*_i.
        target_margin, label_smoothing, hinge: As for [`pair_losses`].
        by_maximum (`bool`, *optional*, defaults to `False`): [`tchebycheff`] in the place of the sum.
        global_weight (`float`, *optional*, defaults to 0.0): λ.
    """

    beta: torch.Tensor
    ideal: torch.Tensor
    target_margin: float = 0.0
    label_smoothing: float = 0.0
    hinge: bool = False
    by_maximum: bool = False
    global_weight: float = 0.0

    def of_pairs(self, margins: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """l of each pair for each objective, shape `(pairs, k)`, from margins `(pairs,)` and labels `(pairs, k)`."""
        beta = self.beta.to(margins)
        return pair_losses(margins, labels, beta, self.target_margin, self.label_smoothing, self.hinge)

    def distances(
        self, losses: torch.Tensor, labels: torch.Tensor, counts: torch.Tensor, weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What these pairs add to l_i − z*_i of a step, shape `(k,)`; arguments as for `aggregate`."""
        distances = losses - self.ideal.to(losses) * (labels != 0)
        return objective_losses(weighted(distances, weights), counts[:-1].to(losses))

    def aggregate(
        self,
        losses: torch.Tensor,
        labels: torch.Tensor,
        preference: torch.Tensor,
        counts: torch.Tensor,
        whole: Callable[[torch.Tensor], torch.Tensor] | None = None,
        weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One number from the losses of pairs.

        Args:
            losses, labels (`torch.Tensor` of shape `(pairs, k)`): From `of_pairs`, and what it was given.
            preference (`torch.Tensor` of shape `(k,)` or `(pairs, k)`): α.
            counts (`torch.Tensor` of shape `(k + 1,)`): From [`count_labels`], of the whole optimisation step.
            whole (`Callable`, *optional*):
                From the `distances` of these pairs to those of the whole step, where the step has more pairs.
            weights (`torch.Tensor` of shape `(pairs,)`, *optional*): What each pair counts for, in `counts` too.
        """
        preference = preference.to(losses)
        if self.by_maximum:
            distances = self.distances(losses, labels, counts, weights)
            return tchebycheff(distances, preference, whole and whole(distances.detach()))
        losses, counts = weighted(losses, weights), counts[:-1].to(losses)
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
        weights: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of a batch with its global term, and that of each pair, shape `(pairs, k)`."""
        losses = self.of_pairs(margins, labels)
        total = self.aggregate(losses, labels, preference, counts, whole, weights)
        if self.global_weight:
            beta, preference = self.beta.to(margins), preference.to(margins)
            total = total + self.global_weight * global_loss(margins, labels, beta, preference, counts[-1], weights)
        return total, losses


def weighted(values: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """Values of pairs, shape `(pairs, k)`, times what each pair counts for, shape `(pairs,)`; 1 if not given."""
    return values if weights is None else values * weights.to(values)[:, None]


def count_labels(labels: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Labelled pairs of each objective and, last, pairs with any label, shape `(k + 1,)`, of labels `(pairs, k)`.

    With weights of shape `(pairs,)` it is their sums in the place of numbers.
    """
    known = labels != 0
    return weighted(torch.cat([known, known.any(1, keepdim=True)], 1).float(), weights).sum(0)
