# SPDX-License-Identifier: Apache-2.0
"""What training and evaluation report, for each objective, in TRL's names."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from itertools import combinations
from typing import Any

import torch

from .diagnosis import VertexMetrics, vertices_among
from .losses import ARMLoss, accuracies, count_labels, weighted


class TrainMetrics:
    """Sums of metrics since the last log, kept on the device: a mean is taken, over all processes, only in a log."""

    def __init__(self, objectives: Sequence[str], beta: torch.Tensor) -> None:
        self.objectives, self.beta = objectives, beta.tolist()
        self._sums: dict[str, torch.Tensor] = {}

    def add(
        self,
        preference: torch.Tensor,
        log_probs: torch.Tensor,
        losses: torch.Tensor,
        labels: torch.Tensor,
        weights: torch.Tensor | None = None,
    ) -> None:
        """Adds a batch of pairs.

        Args:
            preference (`torch.Tensor` of shape `(k,)` or `(pairs, k)`): α.
            log_probs (`torch.Tensor` of shape `(2, pairs)`): log π of the two responses.
            losses, labels (`torch.Tensor` of shape `(pairs, k)`): l of each pair, and its labels.
            weights (`torch.Tensor` of shape `(pairs,)`, *optional*): What each pair counts for in the mean of losses.
        """
        first, second = log_probs
        correct, counted = accuracies(first - second, labels), labels.any(1)
        for i, (name, beta) in enumerate(zip(self.objectives, self.beta, strict=True)):
            label, known = labels[:, i], labels[:, i] != 0
            chosen = torch.where(label > 0, first, second)
            rejected = torch.where(label > 0, second, first)
            self._add(f"preference/{name}", preference[..., i].expand(len(labels)), counted)
            self._add(f"loss/{name}", losses[:, i], weighted(known[:, None].float(), weights)[:, 0])
            self._add(f"logps/chosen/{name}", chosen, known)
            self._add(f"logps/rejected/{name}", rejected, known)
            self._add(f"rewards/chosen/{name}", beta * chosen, known)
            self._add(f"rewards/rejected/{name}", beta * rejected, known)
            self._add(f"rewards/margins/{name}", beta * (chosen - rejected), known)
            self._add(f"rewards/accuracies/{name}", correct[:, i], known)

    def _add(self, name: str, values: torch.Tensor, known: torch.Tensor) -> None:
        """Adds values to the mean of this name, each as often as it is `known`."""
        known = known.to(values)
        pair = torch.stack([torch.where(known > 0, values * known, 0.0).sum(), known.sum()]).detach()
        self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def pop_means(self, accelerator: Any) -> dict[str, float]:
        """The mean of each name over all processes since the last call; a name without any value is left out."""
        if not self._sums:
            return {}
        sums = accelerator.reduce(torch.stack([value.float() for value in self._sums.values()]), "sum").tolist()
        means = {name: total / count for name, (total, count) in zip(self._sums, sums, strict=True) if count}
        self.clear()
        return means

    def clear(self) -> None:
        """Forgets what was added since the last log."""
        self._sums.clear()

    def state(self) -> dict[str, list[float]]:
        """Name → sum and count of this process since the last log, as JSON holds them."""
        return {name: pair.tolist() for name, pair in self._sums.items()}

    def load_state(self, state: Mapping[str, Sequence[float]], device: torch.device) -> None:
        """Goes on from what [`state`] gave."""
        self._sums = {name: torch.tensor(pair, device=device) for name, pair in state.items()}


class EvalMetrics:
    """Loss, accuracy and margin of every objective at every evaluation preference, and the loss of them all.

    That loss aggregates the l_i as in training, each over all pairs of its objective, without the global term, and is
    the mean over the evaluation preferences: it does not depend on how the pairs fall into batches. An objective
    without any labelled pair adds nothing to it. Where the vertices are among those preferences, [`VertexMetrics`]
    come with them.

    Args:
        objectives (`Sequence[str]`): The k objectives.
        preferences (`Mapping[str, torch.Tensor]`): Name → evaluation preference of shape `(k,)`.
        arm_loss ([`ARMLoss`]): The loss of training.
    """

    def __init__(self, objectives: Sequence[str], preferences: Mapping[str, torch.Tensor], arm_loss: ARMLoss) -> None:
        self.objectives, self.preferences, self.arm_loss = objectives, preferences, arm_loss
        self._values: dict[str, list[float]] = defaultdict(list)
        self._weights = torch.zeros(len(objectives), dtype=torch.float64)
        self._vertices = VertexMetrics(objectives, list(preferences.values()), arm_loss)

    def add(
        self,
        labels: torch.Tensor,
        margins: torch.Tensor,
        weights: torch.Tensor,
        untrained: torch.Tensor | None = None,
    ) -> None:
        """Adds a batch of pairs.

        Args:
            labels (`torch.Tensor` of shape `(pairs, k)`): Their labels.
            margins (`torch.Tensor` of shape `(pairs, preferences)`): log π(y1|x) − log π(y2|x) at each preference.
            weights (`torch.Tensor` of shape `(pairs,)`): What each pair counts for in the losses.
            untrained (`torch.Tensor` of shape `(pairs,)`, *optional*): The same without the adapter.
        """
        self._weights += count_labels(labels, weights)[:-1].double().cpu()
        self._vertices.add(labels, margins, weights, untrained)
        for name, margin in zip(self.preferences, margins.unbind(-1), strict=True):
            values = {
                "loss": weighted(self.arm_loss.of_pairs(margin, labels), weights),
                "accuracy": accuracies(margin, labels),
                "margin": margin[:, None] * labels,
            }
            if untrained is not None:
                values["ratio_accuracy"] = accuracies(margin - untrained, labels)
            for kind, value in values.items():
                for i, objective in enumerate(self.objectives):
                    self._values[f"{objective}_{kind}@{name}"] += value[labels[:, i] != 0, i].tolist()

    def means(self) -> dict[str, float]:
        """`loss`, the mean of each `<objective>_<kind>@<preference>` with any labelled pair, and those of vertices."""
        counts = {name: float(len(values)) for name, values in self._values.items()}
        for objective, weight in zip(self.objectives, self._weights.tolist(), strict=True):
            counts |= {f"{objective}_loss@{name}": weight for name in self.preferences}
        means = {name: sum(values) / counts[name] for name, values in self._values.items() if counts[name]}
        labels, ones = (self._weights > 0).float()[None], torch.ones(len(self.objectives) + 1)
        losses = []
        for name, preference in self.preferences.items():
            known = torch.tensor([[means.get(f"{objective}_loss@{name}", 0.0) for objective in self.objectives]])
            losses.append(self.arm_loss.aggregate(known, labels, preference, ones))
        return {**means, **self._vertices.means(), "loss": torch.stack(losses).mean().item()}


def is_better_larger(name: str) -> bool:
    """Whether the larger value of a metric is the better one, by its name; not of losses, errors and correlations of
    vertices, at whatever preference."""
    return not name.partition("@")[0].endswith(("loss", "vertex_correlation", "gain_error"))


def check_metric(
    name: str, objectives: Sequence[str], preferences: Mapping[str, torch.Tensor], untrained: bool
) -> None:
    """Raises `ValueError` for a metric that no evaluation reports, before a run is trained that is to be judged by it.

    Args:
        name (`str`): As `metric_for_best_model` has it, with or without `eval_` and the name of an evaluation.
        objectives (`Sequence[str]`): The k objectives.
        preferences (`Mapping[str, torch.Tensor]`): Name → evaluation preference of shape `(k,)`.
        untrained (`bool`): Whether there is an untrained model to compare with, as below an adapter.
    """
    at_preferences = ["loss", "accuracy", "margin", *(["ratio_accuracy"] if untrained else [])]
    known = ["loss", *(f"{o}_{kind}@{p}" for o in objectives for kind in at_preferences for p in preferences)]
    if untrained and vertices_among(list(preferences.values()), len(objectives)) is not None:
        known += [f"{o}_{kind}" for o in objectives for kind in ("untrained_loss", "gain", "gain_error")]
        known += ["vertex_correlation", "vertex_distance"] if len(objectives) > 1 else []
        pairs = combinations(objectives, 2) if len(objectives) > 2 else ()
        known += [f"vertex_correlation@{one},{other}" for one, other in pairs]
    if not any(name == one or name.endswith(f"_{one}") for one in known):
        like = get_close_matches(name.removeprefix("eval_"), known, n=3) or known
        raise ValueError(
            f"`metric_for_best_model` is {name!r}, but no evaluation of this run reports that. Take such as "
            f"{', '.join(like)}."
        )
