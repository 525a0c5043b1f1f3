# SPDX-License-Identifier: Apache-2.0
"""Base and guide on one set of weights.

PEFT puts an adapter into the model itself. So where a guide is an adapter on the very model that generates, the
model's own forward inside `generate` must run without it, and the guide's with it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from torch import nn

from .adapters import AdapterSwitch
from .guided import GuidedLogitsProcessor
from .running import running_generate


class SharedBackbone:
    """Hooks on a model with adapters that act in its own forward inside a guided `generate`, and nowhere else.

    There the adapters that guide are switched off; others, such as one that the base model was tuned with, stay as
    they are.

    Args:
        model (`nn.Module`): The model, below any `PeftModel`.
    """

    _of: weakref.WeakKeyDictionary[nn.Module, SharedBackbone] = weakref.WeakKeyDictionary()

    @classmethod
    def of(cls, model: nn.Module) -> SharedBackbone:
        """The one of this model, with the adapters that it has now."""
        shared = cls._of.get(model)
        if shared is None:
            shared = cls._of[model] = cls(model)
        shared.switch = AdapterSwitch(model)
        return shared

    def __init__(self, model: nn.Module) -> None:
        self.switch = AdapterSwitch(model)
        self._guides_run = False
        self._entered: list[ExitStack] = []
        model.register_forward_pre_hook(self._before, with_kwargs=True)
        model.register_forward_hook(self._after, with_kwargs=True, always_call=True)

    @contextmanager
    def guide(self, names: Sequence[str]) -> Iterator[None]:
        """For the time of a guide's forward, with these of the model's adapters."""
        former, self._guides_run = self._guides_run, True
        try:
            with self.switch.only(names):
                yield
        finally:
            self._guides_run = former

    def _before(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        stack = ExitStack()
        self._entered.append(stack)
        guiding = self._guiding(model)
        if guiding:
            stack.enter_context(self.switch.only([name for name in self.switch.active if name not in guiding]))

    def _after(self, model: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        self._entered.pop().close()

    def _guiding(self, model: nn.Module) -> set[str]:
        """The adapters that guide the running `generate` of this model."""
        call = None if self._guides_run else running_generate()
        if call is None or call.model is not model:
            return set()
        guides = (processor for processor in call.processors if isinstance(processor, GuidedLogitsProcessor))
        return {
            name
            for guide in guides
            for scorer in guide.formula.scorers()
            if getattr(scorer, "shared", None) is self
            for name in scorer.adapter_names
        }
