# SPDX-License-Identifier: Apache-2.0
"""The preference of an adapter: one object, which all of the adapter's layers share."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch


class Condition:
    """The preference α that an adapter is at, in all of its layers at once.

    It is no module, and α a plain float32 tensor: neither parameter nor buffer. So α is not trained, not saved, not
    broadcast over by DDP, not sharded by FSDP, and follows the weights to their device but not to their dtype. A copy
    of a model has a condition of its own.

    Args:
        objectives (`Sequence[str]`): Names of the k objectives.
        preference (`Sequence[float]`): The preference to start with, of length k.

    Attributes:
        preference (`torch.Tensor` of shape `(k,)` or `(rows, k)`): α, or one for each row of the batch.
        version (`int`): How often it was set.
        was_set (`bool`): Whether somebody chose it, or was told that nobody did.
        merged (`int`): Layers into whose weights the adapter is merged at this preference.
        aside (`bool`): Whether the adapter acts only in calls of its `PeftModel`, not in those of the model below it,
            which then is the base model. A logits processor that guides with the adapter sets it; `set_adapter` takes
            it back. While the model trains it is without effect.
        pending (`set[int]`): Versions of which there were forwards whose backward is still to come; two tell enough.
    """

    def __init__(self, objectives: Sequence[str], preference: Sequence[float]) -> None:
        self.objectives = list(objectives)
        self.preference = torch.tensor(preference, dtype=torch.float32, device="cpu")
        self.version = self.merged = 0
        self.was_set = self.aside = self._repeated = False
        self.pending: set[int] = set()

    @classmethod
    def fixed(cls, objectives: Sequence[str], preference: torch.Tensor) -> Condition:
        """One that somebody chose already, at α of shape `(k,)` or `(rows, k)`."""
        condition = cls(objectives, [])
        condition.preference, condition.was_set = preference.clone(), True
        return condition

    @property
    def rows(self) -> int:
        """How many rows of a batch are told apart: 1 where all have the same preference."""
        return len(self.preference) if self.preference.ndim == 2 else 1

    def set(self, preference: torch.Tensor) -> None:
        """Sets α, of shape `(k,)` or `(rows, k)`, in place where the shape allows it. It must be valid already."""
        if self.preference.shape == preference.shape and not self.preference.is_inference():
            self.preference.copy_(preference)
        else:
            # A tensor made in inference mode could never take part in training afterwards.
            with torch.inference_mode(False):
                self.preference = preference.to(self.preference.device, torch.float32, copy=True)
        self.was_set = True
        self.version += 1

    def to(self, device: torch.device | str | int) -> Condition:
        """Moves α to a device where weights are; to `meta`, where none are, it does not follow.

        Returns itself: accelerate, where it keeps weights elsewhere, hands on what this returns.
        """
        if torch.device(device).type != "meta":
            self.preference = self.preference.to(device)
        return self

    def say_default(self) -> None:
        """Says, once for an adapter and once in a process by Python's default filter, that nobody chose α."""
        self.was_set = True
        if len(self.objectives) > 1:
            weights = ", ".join(f"{o}={w:g}" for o, w in zip(self.objectives, self.preference.tolist(), strict=True))
            warnings.warn(
                f"No preference was set, so the adapter uses its default ({weights}). Choose one with "
                "`peft_pblora.set_preference(model, ...)`.",
                stacklevel=2,
            )

    def note_forward(self) -> None:
        """Notes a forward in training. Gradient checkpointing repeats it in backward, where another preference would
        give wrong gradients without any error: that raises `RuntimeError`.
        """
        if torch._C._current_graph_task_id() == -1:
            if self._repeated:
                self.pending, self._repeated = set(), False
            if len(self.pending) < 2:
                self.pending.add(self.version)
        elif self.pending - {self.version}:
            raise RuntimeError(
                "The preference was changed between a forward and its backward, where gradient checkpointing repeats "
                "the forward. With several preferences in one step, run backward for each before the next forward."
            )
        else:
            self._repeated = True
