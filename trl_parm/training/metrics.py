# SPDX-License-Identifier: Apache-2.0
"""What training and evaluation report, for each objective, in TRL's names."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .losses import accuracies


class TrainMetrics:
    """Sums of metrics since the last log, kept on the device: a mean is taken, over all processes, only in a log."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, name: str, values: torch.Tensor, known: torch.Tensor | None = None) -> None:
        """Adds the values, or those of them that are `known`, to the mean of this name."""
        known = torch.ones_like(values) if known is None else known.to(values)
        pair = torch.stack([torch.where(known > 0, values, 0.0).sum(), known.sum()]).detach()
        self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def add_pairs(
        self,
        objectives: Sequence[str],
        preference: torch.Tensor,
        first: torch.Tensor,
        second: torch.Tensor,
        losses: torch.Tensor,
        labels: torch.Tensor,
        beta: torch.Tensor,
    ) -> None:
        """Adds a batch of pairs.

        Args:
            preference (`torch.Tensor` of shape `(k,)` or `(pairs, k)`): α.
            first, second (`torch.Tensor` of shape `(pairs,)`): log π of the two responses.
            losses, labels (`torch.Tensor` of shape `(pairs, k)`): l of each pair, and its labels.
            beta (`torch.Tensor` of shape `(k,)`): β_i.
        """
        correct = accuracies(first - second, labels)
        for i, name in enumerate(objectives):
            label, known = labels[:, i], labels[:, i] != 0
            chosen = torch.where(label > 0, first, second)
            rejected = torch.where(label > 0, second, first)
            self.add(f"preference/{name}", preference[..., i])
            self.add(f"loss/{name}", losses[:, i], known)
            self.add(f"logps/chosen/{name}", chosen, known)
            self.add(f"logps/rejected/{name}", rejected, known)
            self.add(f"rewards/chosen/{name}", beta[i] * chosen, known)
            self.add(f"rewards/rejected/{name}", beta[i] * rejected, known)
            self.add(f"rewards/margins/{name}", beta[i] * (chosen - rejected), known)
            self.add(f"rewards/accuracies/{name}", correct[:, i], known)

    def pop_means(self, accelerator: Any) -> dict[str, float]:
        """The mean of each name over all processes since the last call; a name without any value is left out."""
        if not self._sums:
            return {}
        sums = accelerator.reduce(torch.stack([value.float() for value in self._sums.values()]), "sum").tolist()
        means = {name: total / count for name, (total, count) in zip(self._sums, sums, strict=True) if count}
        self._sums.clear()
        return means


class EvalMetrics:
    """Loss, accuracy and margin of every objective at every evaluation preference, pair by pair."""

    def __init__(self, objectives: Sequence[str]) -> None:
        self.objectives = objectives
        self._values: dict[str, list[float]] = defaultdict(list)

    def add(self, preference: str, known: torch.Tensor, values: Mapping[str, torch.Tensor]) -> None:
        """Adds kinds of values of shape `(pairs, k)`, where `known` says which pairs have a label."""
        for kind, value in values.items():
            for i, objective in enumerate(self.objectives):
                self._values[f"{objective}_{kind}@{preference}"] += value[:, i][known[:, i]].tolist()

    def means(self) -> dict[str, float]:
        """The mean over all pairs of each `<objective>_<kind>@<preference>`; those without any pair are left out."""
        return {name: sum(values) / len(values) for name, values in self._values.items() if values}

    def losses_at(self, preference: str) -> torch.Tensor:
        """l_i of each objective at an evaluation preference, shape `(k,)`; 0 where no pair has a label."""
        means = self.means()
        return torch.tensor([means.get(f"{objective}_loss@{preference}", 0.0) for objective in self.objectives])
