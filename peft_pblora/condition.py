# SPDX-License-Identifier: Apache-2.0
"""The preference of an adapter: one object, which all of the adapter's layers share."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

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
        pending (`list[torch.Tensor]`): Different α of forwards without gradients, as in reentrant gradient
            checkpointing, whose backward may still be to come; two tell enough.
    """

    def __init__(self, objectives: Sequence[str], preference: Sequence[float]) -> None:
        self.objectives = list(objectives)
        self.preference = torch.tensor(preference, dtype=torch.float32, device="cpu")
        self.version = self.merged = 0
        self.was_set = self.aside = False
        self.pending: list[torch.Tensor] = []
        self._backward, self._repeats = -1, False  # the last one by its number, and whether it repeated a forward
        self._seen: list[torch.Tensor] = []  # different α in it

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
        """Sets α, of shape `(k,)` or `(rows, k)`. It must be valid already.

        It is a new tensor each time: graphs keep the one that they were made with until their backward.
        """
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

    def note_forward(self, may_be_repeated: bool) -> None:
        """Notes a forward in training, before it. Gradient checkpointing repeats forwards in backward, where another
        preference would give wrong gradients without any error.

        Args:
            may_be_repeated (`bool`): Whether a backward may repeat it although it is without gradients.

        Raises:
            RuntimeError: it is repeated now, in the backward of a forward at another preference.
        """
        if torch._C._current_graph_task_id() != -1:
            self._note_backward(self.preference, *self.pending, repeats=True)
            return
        if self._repeats:
            self.pending, self._repeats = [], False
        if may_be_repeated and not torch.is_grad_enabled() and len(self.pending) < 2:
            _add_new(self.pending, self.preference)

    def note_graph(self, output: torch.Tensor) -> None:
        """Notes the output of a forward in training: its backward will tell at which preference it was."""
        if output.requires_grad and torch._C._current_graph_task_id() == -1:
            preference = self.preference
            output.register_hook(lambda _: self._note_backward(preference))

    def _note_backward(self, *preferences: torch.Tensor, repeats: bool = False) -> None:
        """Notes that the backward which runs now is of forwards at these α, or repeats one."""
        backward = torch._C._current_graph_task_id()
        if backward != self._backward:
            self._backward, self._seen, self._repeats = backward, [], False
        for preference in preferences:
            _add_new(self._seen, preference)
        self._repeats |= repeats
        if self._repeats and len(self._seen) > 1:
            self.pending = []
            raise RuntimeError(
                "The preference was changed between a forward and its backward, where gradient checkpointing repeats "
                "the forward. With several preferences in one step, run backward for each before the next forward. "
                "With reentrant checkpointing, call `model.train()` after a forward that is left without a backward."
            )


@contextmanager
def staying_aside(conditions: Iterable[Condition]) -> Iterator[None]:
    """Those that are aside are so after the block too: in it PEFT sets active adapters anew, as nobody asked for."""
    aside = [condition for condition in conditions if condition.aside]
    try:
        yield
    finally:
        for condition in aside:
            condition.aside = True


def _add_new(known: list[torch.Tensor], preference: torch.Tensor) -> None:
    """Adds an α to different ones, unless it is one of them."""
    if not any(one is preference or one.shape == preference.shape and one.equal(preference) for one in known):
        known.append(preference)
