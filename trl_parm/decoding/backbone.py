# SPDX-License-Identifier: Apache-2.0
"""Base and guides on one set of weights: in one forward where that can be, else one after the other.

PEFT puts an adapter into the model itself. So where a guide is an adapter on the very model that generates, the
model's own forward inside `generate` must run without it, and the guide's with it. Both read the same weights, which
is what decoding spends its time on: so the model's forward takes rows [base | guide 1 | guide 2 | ...] at once, with
each adapter acting on its own rows. The guides then have their answers before they are asked.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import Cache, DynamicCache, StaticCache
from transformers.utils import logging

from peft_pblora.kv_cache import cache_in
from peft_pblora.switch import AdapterSwitch

from .guided import GuidedLogitsProcessor
from .joint import JointCache, JointRows
from .joint_forward import PER_ROW, JointForward
from .joint_lm import JointLM
from .joint_static import JointStaticCache, holds_plain_attention
from .rows import RowAdapters
from .running import GenerateCall, guided_generate, running_generate


if TYPE_CHECKING:
    from .language_model import LM


logger = logging.get_logger(__name__)


class SharedBackbone:
    """Hooks on a model with adapters that act in its own forward inside a guided `generate`, and nowhere else.

    There the adapters that guide are kept out of the base model's rows; others, such as one that the base model was
    tuned with, stay as they are.

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
        shared.switch = AdapterSwitch.of(model)
        shared.row_adapters.attach(shared.switch)
        return shared

    def __init__(self, model: nn.Module) -> None:
        self.switch = AdapterSwitch.of(model)
        self.row_adapters = RowAdapters()
        self._guides_run = False
        self._joint: weakref.ref[JointRows] | None = None
        self._states: list[tuple] = []
        self._family: JointLM | None = None
        self._answered: tuple[weakref.ref[torch.Tensor], dict[LM, torch.Tensor]] | None = None
        self._entered: list[tuple[ExitStack, JointForward | None]] = []
        model.register_forward_pre_hook(self._before, with_kwargs=True)
        model.register_forward_hook(self._after, with_kwargs=True, always_call=True)

    @contextmanager
    def guide(self, names: Sequence[str]) -> Iterator[None]:
        """For the time of a guide's own forward, with these of the model's adapters."""
        self._check_merged(names)
        with self._apart(), self.switch.only(names):
            yield

    @contextmanager
    def rows(self, plan: Sequence[tuple[str, slice]], rows: int) -> Iterator[None]:
        """For the time of a forward of several guides of so many rows, with these adapters on these of them."""
        with self._apart(), self.row_adapters.acting(plan, rows):
            yield

    @contextmanager
    def _apart(self) -> Iterator[None]:
        """For the time of a forward that is not the base model's own, even inside its `generate`."""
        former, self._guides_run = self._guides_run, True
        try:
            yield
        finally:
            self._guides_run = former

    def logits_of(self, guide: LM, input_ids: torch.Tensor) -> torch.Tensor | None:
        """What the last joint forward says of a guide after these tokens, or `None`: then it has to run itself."""
        cache = self._joint() if self._joint else None
        return cache.logits_of(guide, input_ids) if isinstance(cache, JointRows) else None

    def log_probs_of(self, guide: LM, input_ids: torch.Tensor) -> torch.Tensor | None:
        """log π of a guide after these tokens from one forward of all guides of this model, or `None` if it is alone.

        For guides beside the base model: adapters on a small model, or where base and guides can't have one forward.
        """
        known = self._answered and self._answered[0]() is input_ids and guide in self._answered[1]
        if not known or self._family is None or self._family.is_outdated:
            call = guided_generate(GuidedLogitsProcessor)
            guides = self._guides(call) if call is not None else []
            if guide not in guides or len(guides) < 2 or self.obstacle(guides) is not None:
                return None
            if self._family is None or self._family.members != guides:
                self._family = JointLM(guides)
            self._answered = weakref.ref(input_ids), self._family.log_probs(input_ids)
        return cast(Any, self._answered)[1][guide]

    # What follows looks at the stack and changes what acts in the model, once for each forward. A compiled forward
    # finds it done, so that there is nothing in its graph that a new token or another preference would change.
    @torch.compiler.disable
    def _before(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        stack, forward = ExitStack(), None
        self._entered.append((stack, forward))
        call = None if self._guides_run else running_generate()
        if call is not None and call.model is not model:
            call = None
        guides = self._guides(call) if call is not None else []
        guiding = self._guiding(call) if call is not None else set()
        if guiding:
            self._check_merged(self._own_adapters(guiding) if self._any_merged() else [])
        if guides and call is not None:
            forward = self._join(call, guides, args, kwargs)
        cache = cache_in(kwargs)
        if forward is None and isinstance(cache, JointRows) and any(g.shared is self for g in cast(Any, cache.groups)):
            cache.release(_batch(args, kwargs))
        if forward is not None:
            compiled = isinstance(forward.cache, JointStaticCache)
            activations = forward.activations(cast(Any, model).dtype) if compiled else None
            joint = self.row_adapters.acting(forward.plan, forward.rows, forward.groups, activations)
            stack.enter_context(joint)
            kwargs = forward.kwargs
        elif guiding:
            stack.enter_context(self.switch.only(self._own_adapters(guiding)))
        self._entered[-1] = stack, forward
        return args, kwargs

    @torch.compiler.disable
    def _after(self, model: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        stack, forward = self._entered.pop()
        stack.close()
        if forward is None or output is None:
            return output
        self._joint = weakref.ref(forward.cache)
        return forward.split(output)

    def _guides(self, call: GenerateCall) -> list[LM]:
        """The guides of a call of `generate` that are adapters on this model, those of one adapter together."""
        processors = (p for p in call.processors if isinstance(p, GuidedLogitsProcessor))
        scorers = (scorer for processor in processors for scorer in processor.formula.scorers())
        guides = dict.fromkeys(s for s in scorers if getattr(s, "shared", None) is self)
        return sorted(cast(Any, guides), key=lambda guide: guide.acting_adapters)

    def _guiding(self, call: GenerateCall) -> set[str]:
        """The adapters of this model that guide a call of `generate`, those of weight 0 included."""
        formulas = [p.formula for p in call.processors if isinstance(p, GuidedLogitsProcessor)]
        scorers: Any = (scorer for formula in formulas for scorer in (*formula.scorers(), *formula.silent()))
        return {name for s in scorers if getattr(s, "shared", None) is self for name in s.adapter_names}

    def _own_adapters(self, guiding: set[str]) -> list[str]:
        """The active adapters that belong to the base model."""
        return [name for name in self.switch.active if name not in guiding]

    def _any_merged(self) -> bool:
        return any(layer.__dict__.get("merged_adapters") for layer in self.switch.layers)

    def _check_merged(self, names: Sequence[str]) -> None:
        """Raises `ValueError` where a forward with these adapters would be one with what is merged instead."""
        if self._any_merged() and set(self.switch.merged) != set(names):
            merged = " and ".join(repr(name) for name in self.switch.merged)
            wanted = "with " + " and ".join(repr(name) for name in names) if names else "without it"
            raise ValueError(
                f"The adapter {merged} is merged into the weights, so the model can't run {wanted}. Call "
                "`unmerge_adapter()`, or guide with a merged copy of the model or an adapter from "
                "`peft_pblora.save_as_lora`."
            )

    def _join(self, call: GenerateCall, guides: list[LM], args: tuple, kwargs: dict) -> JointForward | None:
        """The joint forward in the place of the base model's own, if there can be one."""
        cache, states = cache_in(kwargs), [guide.state() for guide in guides]
        if isinstance(cache, JointRows) and cache.tokens.numel():
            goes_on = list(cache.groups) == guides and self._states == states and _plain(kwargs)
            return JointForward(cache, kwargs) if goes_on else None
        if isinstance(cache, Cache) and cache.get_seq_length() > 0:
            return None
        reason = self._obstacle(call, guides, args, kwargs)
        if reason is not None:
            logger.warning_once(f"The guides run beside the base model, not in one forward with it: {reason}.")
            return None
        self._states = states
        return JointForward.first(guides, kwargs, _prompt(call, kwargs))

    def _obstacle(self, call: GenerateCall, guides: list[LM], args: tuple, kwargs: dict) -> str | None:
        """Why base and guides can't have one forward, or `None` if they can."""
        cache = cache_in(kwargs)
        known = type(cache) in (DynamicCache, JointCache) or isinstance(cache, Cache) and holds_plain_attention(cache)
        if not known or not kwargs.get("use_cache", True):
            return "it needs the default cache or a static one"
        if args or not _plain(kwargs):
            return "it needs token ids, and a mask of two dimensions"
        if call.assistant_model is not None:
            return "an assistant asks the guides for every drafted token anyway"
        if any(guide.prompt is not None or guide.vocabulary is not None for guide in guides):
            return "a guide has a prompt or a vocabulary of its own"
        if own := self._own_adapters(self._guiding(call)):
            return f"the base model has an adapter of its own ({', '.join(own)})"
        return self.obstacle(guides)

    def obstacle(self, guides: Sequence[LM]) -> str | None:
        """Why guides of this model can't have one forward, or `None` if they can."""
        names = [name for guide in guides for name in guide.acting_adapters]
        following = [name for guide in guides if guide.preference is None for name in guide.acting_adapters]
        if not all(guide.shared_forward for guide in guides):
            return "it was switched off with `shared_forward=False`"
        if any(len(guide.acting_adapters) > 1 for guide in guides):
            return "a guide has several active adapters"
        if any(names.count(name) > 1 for name in following):
            return "guides of one adapter need a preference each"
        return self.row_adapters.obstacle(self.switch, names)


def _plain(kwargs: dict) -> bool:
    """Whether a forward has nothing but what can be repeated for every guide.

    For a static cache `generate` has made masks of four dimensions already, and one for each kind of layer if there
    are several.
    """
    tensors = {name: value for name, value in kwargs.items() if isinstance(value, torch.Tensor) and value.ndim}
    if isinstance(cache_in(kwargs), StaticCache):
        tensors.pop("attention_mask", None)
    return "input_ids" in tensors and all(name in PER_ROW and t.ndim == 2 for name, t in tensors.items())


def _prompt(call: GenerateCall, kwargs: dict) -> torch.Tensor | None:
    """All that tells the rows of a prompt apart, shape `(rows, columns)`, if a forward reads all of it."""
    ids, mask = kwargs["input_ids"], call.attention_mask
    if len(ids) == 1 or ids.shape[1] != call.prompt_length:
        return None
    others = [kwargs.get(name) for name in ("position_ids", "token_type_ids")]
    parts = [ids, *(other for other in others if other is not None and len(other) == len(ids))]
    if mask is not None:
        parts.append(mask.repeat_interleave(len(ids) // len(mask), dim=0).to(ids))
    return torch.cat(parts, 1)


def _batch(args: tuple, kwargs: dict) -> int:
    """Rows that a forward gets."""
    inputs = (args[0] if args else None, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
    return len(next(one for one in inputs if one is not None))
