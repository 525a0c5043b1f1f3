# SPDX-License-Identifier: Apache-2.0
"""Whether an ARM follows α, and is better than untrained for each objective: measured on held-out pairs, and in words.

What training changed of a pair is c(α) = Δ(α) − Δ_0, with Δ = log π(y1|x) − log π(y2|x) and Δ_0 that of the untrained
ARM. An ARM that ignores α makes the same change at every vertex.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import torch

from peft_pblora import PBLoraConfig, SVDLoraConfig

from .losses import ARMLoss, weighted


ALIKE = 0.9
"""Above this correlation of its changes at two vertices an ARM hardly follows α. In our experiments the correlation
was 0.95 after 30 steps, which is what the objectives share; runs of 200 steps that steered as well as any other had
0.80 or less."""


class VertexMetrics:
    """How alike the changes at the vertices are, and the gain of each objective at its own, over all pairs added.

    Args:
        objectives (`Sequence[str]`): The k objectives.
        preferences (`Sequence[torch.Tensor]`): The evaluation preferences, each of shape `(k,)`.
        arm_loss ([`ARMLoss`]): The loss of training.
    """

    def __init__(self, objectives: Sequence[str], preferences: Sequence[torch.Tensor], arm_loss: ARMLoss) -> None:
        self.objectives, self.arm_loss = objectives, arm_loss
        self.places = vertices_among(preferences, len(objectives))
        self._changes: list[torch.Tensor] = []
        self._losses: list[torch.Tensor] = []

    def add(
        self, labels: torch.Tensor, margins: torch.Tensor, weights: torch.Tensor, untrained: torch.Tensor | None
    ) -> None:
        """Adds a batch of pairs, as [`EvalMetrics.add`] takes them; nothing where a vertex, or Δ_0, is missing."""
        if untrained is None or self.places is None:
            return
        known = (labels != 0).any(1)
        own, before = margins[:, self.places], untrained[:, None]
        self._changes.append((own - before)[known].double().cpu())
        after = torch.stack([self.arm_loss.of_pairs(own[:, i], labels)[:, i] for i in range(len(self.objectives))], 1)
        rows = [after, self.arm_loss.of_pairs(untrained, labels), weighted((labels != 0).to(margins), weights)]
        self._losses.append(torch.stack(rows).double().cpu())

    def means(self) -> dict[str, float]:
        """By the names in docs/training.md; what is undefined, such as a correlation without a change, is left out."""
        if not self._changes:
            return {}
        found = _likeness(torch.cat(self._changes), self.objectives)
        for i, objective in enumerate(self.objectives):
            after, before, weight = torch.cat(self._losses, 1)[..., i]
            total = weight.sum()
            if total > 0:
                gains = before - after
                gain = (weight * gains).sum() / total
                found[f"{objective}_untrained_loss"] = ((weight * before).sum() / total).item()
                found[f"{objective}_gain"] = gain.item()
                found[f"{objective}_gain_error"] = ((weight * (gains - gain)).norm() / total).item()
        return found


def vertices_among(preferences: Sequence[torch.Tensor], k: int) -> list[int] | None:
    """Where the k vertices stand among preferences of shape `(k,)`; `None` unless all of them do."""
    places = [next((j for j, p in enumerate(preferences) if torch.equal(p.cpu(), v)), None) for v in torch.eye(k)]
    found = [place for place in places if place is not None]
    return found if len(found) == k else None


def vertex_correlation(first: torch.Tensor, second: torch.Tensor) -> float:
    """The correlation of two changes over pairs, Σ c_1 c_2 / √(Σ c_1² Σ c_2²), each of shape `(pairs,)`.

    It is Pearson's over every pair in both of its orders, so that it does not depend on which response comes first.
    NaN where one of the changes is zero for all pairs.
    """
    length = first.norm() * second.norm()
    return (first @ second / length).clamp(-1, 1).item() if length > 0 else float("nan")


def _likeness(changes: torch.Tensor, objectives: Sequence[str]) -> dict[str, float]:
    """How alike the changes of shape `(pairs, k)` are: of the two vertices that are most alike, and of all twos."""
    pairs = list(combinations(range(len(objectives)), 2))
    if not pairs:
        return {}
    found: dict[str, float] = {}
    distances = [(changes[:, i] - changes[:, j]).abs().mean().item() for i, j in pairs]
    correlations = {
        f"vertex_correlation@{objectives[i]},{objectives[j]}": value
        for i, j in pairs
        if (value := vertex_correlation(changes[:, i], changes[:, j])) == value
    }
    if correlations:
        found["vertex_correlation"] = max(correlations.values())
    found["vertex_distance"] = min(distances)
    return found | (correlations if len(pairs) > 1 else {})


def diagnose(metrics: Mapping[str, float], objectives: Sequence[str], config: Any, prefix: str = "eval_") -> str:
    """What the metrics of an evaluation say, as one paragraph, with what to try where something is wrong.

    Args:
        metrics (`Mapping[str, float]`): Of `PreferenceARMTrainer.evaluate`.
        objectives (`Sequence[str]`): The k objectives.
        config (`PeftConfig` or `None`): The adapter's, which decides what there is to try.
        prefix (`str`, *optional*, defaults to `"eval_"`): Of the metrics' names.

    Returns:
        `str`: Empty if nothing was measured.
    """
    said, faults = [], 0
    distance = metrics.get(f"{prefix}vertex_distance")
    if distance is not None:
        correlation = metrics.get(f"{prefix}vertex_correlation")
        if correlation is None or distance == 0:
            follows, text = False, "It ignores α: at two vertices every held-out pair has the same log-probabilities."
        else:
            follows = correlation <= ALIKE
            two = _most_alike(metrics, objectives, prefix)
            text = (
                f"It {'follows' if follows else 'hardly follows'} α: the changes that training made to held-out pairs "
                f"at {two} correlate by {correlation:.2f} (1: α does nothing; it should be below {ALIKE:g})."
            )
        faults += not follows
        said.append(text)
    for objective in objectives:
        gain, error = (metrics.get(f"{prefix}{objective}_{name}") for name in ("gain", "gain_error"))
        if gain is not None and error is not None and gain <= 0:
            before = metrics[f"{prefix}{objective}_untrained_loss"]
            place = f" at {objective} = 1" if len(objectives) > 1 else ""
            faults += 1
            said.append(
                f"For {objective} it is no better than untrained: the loss of held-out pairs{place} is "
                f"{before - gain:.4g}, untrained {before:.4g} (difference {-gain:.2g} ± {error:.2g})."
            )
    if faults:
        said.append(f"Try {_remedies(config)}. docs/training.md says what each has done in our experiments.")
    return " ".join(said)


def _most_alike(metrics: Mapping[str, float], objectives: Sequence[str], prefix: str) -> str:
    pairs = list(combinations(objectives, 2))
    name = f"{prefix}vertex_correlation@"
    first, second = max(pairs, key=lambda pair: metrics.get(name + ",".join(pair), -2.0))
    return f"{first} = 1 and {second} = 1"


def _remedies(config: Any) -> str:
    found = ["more steps", "another learning rate"]
    if isinstance(config, PBLoraConfig | SVDLoraConfig) and not getattr(config, "disjoint_start", False):
        found.append("a larger `lora_alpha` in the adapter's configuration, whose W(α) starts small")
    if getattr(config, "r1", 0) and getattr(config, "r2", 0):
        found.append("`r1` = 0 there, which leaves out what all preferences share")
    elif getattr(config, "embedding_size", None) == 0 and config.objective_embeddings is None:
        found.append("an `embedding_size` of 64 in the adapter's configuration")
    return ", ".join(found[:-1]) + ", or " + found[-1]
