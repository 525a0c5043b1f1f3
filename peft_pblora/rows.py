# SPDX-License-Identifier: Apache-2.0
"""Several adapters in one forward, each on its own rows of the batch."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from .condition import Condition


Entry = tuple[str, slice, Condition | None]
"""An adapter by name, the rows on which it acts, and the α at which it acts there: its own one if there is none."""


class RowPlan:
    """Which adapters act on which rows of a batch.

    Args:
        entries (`Sequence[Entry]`): Adapters by name with their rows, which stand together, and their α; several may
            act on the same rows, and on rows that none names none acts.
        rows (`int`): Rows of the batch.
        tokens (`int`, *optional*): Tokens that the forward reads of every row, if they are all of one length.
        groups (`int`, *optional*):
            The slices count groups of rows, all of one size, of which the batch has so many; they count rows if not
            given. A plan in groups serves a batch of any size, and so does a forward that was compiled with it.
        folded (`bool`, *optional*, defaults to `False`):
            Whether the adapters were all folded ahead of this forward, see [`LowRankAdapter.fold_ahead`].

    Attributes:
        reshaped (`bool`): Whether a layer's input did not begin with rows and tokens, so that its shape alone does not
            say that it has them in their order.

    Raises:
        ValueError: a slice reaches beyond the rows, or has a step.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        rows: int,
        tokens: int | None = None,
        groups: int | None = None,
        folded: bool = False,
    ) -> None:
        self.entries, self.groups, self.folded, self.reshaped = entries, groups, folded, False
        # Numbers that change would be compiled in as constants, sizes of a tensor are not.
        self._sizes = torch.empty(rows, 0 if tokens is None else tokens, 0)
        self._knows_tokens = tokens is not None
        self._known: dict[torch.Size, list[Entry]] = {}  # by shape: most layers of a forward have one of a few
        for name, part, _ in entries:
            if part.step is not None or not 0 <= part.start <= part.stop <= (groups or rows):
                raise ValueError(
                    f"The adapter {name!r} is to act on {part}, but there are {groups or rows} "
                    f"{'groups of ' if groups else ''}rows. Give slices within them, without a step."
                )

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return self._sizes.shape[0]

    def slices(self, x: torch.Tensor) -> list[Entry]:
        """The adapters with their part of a layer's input, `(rows, ..., n)` or, as some models flatten it,
        `(rows * tokens, n)`. Raises `ValueError` as [`check`], unless all adapters act on all rows.
        """
        if torch.compiler.is_compiling():
            return self._slices(x)
        found = self._known.get(x.shape)
        if found is None:
            found = self._known[x.shape] = self._slices(x)
        return found

    def _slices(self, x: torch.Tensor) -> list[Entry]:
        units = self.groups or self.rows
        if all(part.stop - part.start == units for _, part, _ in self.entries):
            return [(name, slice(0, len(x)), condition) for name, _, condition in self.entries]
        self.check(x)
        size = len(x) // units
        return [(name, slice(size * p.start, size * p.stop), condition) for name, p, condition in self.entries]

    def check(self, x: torch.Tensor) -> None:
        """Raises `ValueError` unless the first dimension of x, as in [`slices`], is rows, or rows and tokens."""
        rows, tokens, length = self.rows, self._sizes.shape[1], len(x)
        if not torch.compiler.is_compiling() and (x.ndim < 3 or tuple(x.shape[:2]) != (rows, tokens)):
            self.reshaped = True
        flattened = length == rows * tokens if self._knows_tokens else length % rows == 0
        if x.ndim < 2 or length != rows and not (x.ndim == 2 and flattened):
            raise ValueError(
                f"A layer got an input of shape {tuple(x.shape)} in a batch of {rows} rows, of which it can't "
                "tell the rows apart. Adapt other layers, or let one adapter at one preference act on all rows."
            )

    def count(self, part: slice) -> int:
        """The rows of an entry."""
        return (part.stop - part.start) * (self.rows // self.groups if self.groups else 1)


class _Running(threading.local):
    def __init__(self) -> None:  # in every thread; PyTorch 2.11 would compile attributes of the class as the values
        self.plan: RowPlan | None = None
        self.gradients: bool | None = None  # whether they were enabled as the tuner was called, if it was


_running = _Running()


def current_plan() -> RowPlan | None:
    """The plan of the forward that runs now in this thread; `None` if adapters act as PEFT has it."""
    return _running.plan


def is_through_tuner() -> bool:
    """Whether the forward that runs now in this thread was called through the adapters' tuner, as `arm(...)` is."""
    return _running.gradients is not None


def may_be_repeated() -> bool:
    """Whether the backward of the forward that runs now in this thread may repeat it although it is without gradients,
    as reentrant gradient checkpointing does: unless the tuner itself was called without."""
    return _running.gradients is not False


@contextmanager
def through_tuner(gradients: bool) -> Iterator[None]:
    """For the time of a call of a `PeftModel`, see [`Condition`]; `gradients` is whether it may have a backward."""
    former, _running.gradients = _running.gradients, gradients
    try:
        yield
    finally:
        _running.gradients = former


@contextmanager
def acting(
    entries: Sequence[Entry],
    rows: int,
    tokens: int | None = None,
    groups: int | None = None,
    folded: bool = False,
) -> Iterator[RowPlan]:
    """In the block these adapters act on these rows and no others do, whatever is active or disabled in PEFT.

    It is for the forward of one model, in this thread alone; no layer is changed by it. Layers of other methods, such
    as PEFT's LoRA, know nothing of it. Arguments are as of [`RowPlan`].

    Raises:
        ValueError: as [`RowPlan`]; in the forward, an input whose rows can't be told apart, rows that are no multiple
            of an adapter's preferences, or a merged adapter.
    """
    former, _running.plan = _running.plan, RowPlan(entries, rows, tokens, groups, folded)
    try:
        yield _running.plan
    finally:
        _running.plan = former
