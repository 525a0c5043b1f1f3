# SPDX-License-Identifier: Apache-2.0
"""Which adapters of a model act in a forward, and on which rows of its batch."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from peft_pblora.condition import Condition
from peft_pblora.layer import PreferenceLinear
from peft_pblora.rows import Entry, RowPlan, acting, current_plan
from peft_pblora.switch import AdapterSwitch

from .terms import LM


_switching = threading.RLock()
"""Held while adapters of PEFT's are switched, which all threads see."""


class Adapters:
    """The adapters of a model as they are now.

    Ours act on rows by a plan that only the calling thread sees. PEFT's LoRAs add what is theirs by hooks that last
    for one forward. Other adapters act on all rows of a forward or on none.

    Args:
        model (`nn.Module`): The model, below any `PeftModel`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.switch = AdapterSwitch.of(model)
        layers = self.switch.layers
        self.ours: list[Any] = [layer for layer in layers if isinstance(layer, PreferenceLinear)]
        self.loras = [layer for layer in layers if isinstance(layer, LoraLinear)]
        self.others = AdapterSwitch([layer for layer in layers if not isinstance(layer, PreferenceLinear)])
        self._mergeable = [layer for layer in layers if hasattr(layer, "merged_adapters")]
        wanted = set(layers)
        self._places = {
            child: (parent, name)
            for parent in model.modules()
            for name, child in parent._modules.items()
            if child in wanted
        }

    def stamp(self, terms: Sequence[LM]) -> list[Any]:
        """What tells that an adapter of these terms was replaced, unloaded or merged, or the preference that is set in
        it changed, see [`same_stamp`]."""
        found: list[Any] = [*self.switch.merged]
        for term in terms:
            for name in term.adapters:
                layer = self._first_with(name)
                parent, place = self._places.get(layer, (None, ""))
                if parent is None or parent._modules.get(place) is not layer:
                    found.append("gone")
                elif isinstance(layer, PreferenceLinear):
                    adapter = layer.adapter(name)
                    found += [adapter, None if term.preference is not None else adapter.condition.version]
                else:
                    containers = [getattr(layer, container, {}) for container in layer.adapter_layer_names]
                    own = [container[name] for container in containers if name in container] or [layer]
                    scaling = getattr(layer, "scaling", None)
                    found += [*own, scaling.get(name) if isinstance(scaling, dict) else None]
        return found

    def _first_with(self, name: str) -> Any:
        """The first layer that has an adapter of this name, or `None`."""
        return next((layer for layer in self.switch.layers if name in _adapters_of(layer)), None)

    def conditions(self, term: LM) -> dict[str, Condition]:
        """The preferences of a term, by its adapters that have one: its own, or those that are set in the model."""
        found = {}
        for name in term.adapters:
            layer = next((layer for layer in self.ours if name in layer.adapters), None)
            if layer is not None:
                found[name] = layer.adapter(name).condition if term.condition is None else term.condition
        return found

    def check(self, term: LM) -> None:
        """Raises `ValueError` where a term can't be read any more: its adapter is gone, or others are merged."""
        for name in term.adapters:
            if self._first_with(name) is None:
                raise ValueError(
                    f"The adapter {name!r} of {term!r} is no longer in the model, which has {self.switch.names}. Make "
                    "the guide anew."
                )
            layer = next((layer for layer in self.ours if name in layer.adapters), None)
            if term.condition is not None and layer is not None:
                own = layer.adapter(name).condition.objectives
                if own != term.condition.objectives:
                    raise ValueError(
                        f"The preference of {term!r} is of {term.condition.objectives}, but the adapter {name!r} has "
                        f"the objectives {own}. Name the adapter that is meant with `adapter_name`, or make the guide "
                        "anew."
                    )
        if not any(layer.merged_adapters for layer in self._mergeable):
            return
        merged = self.switch.merged
        if set(merged) != set(term.adapters):
            wanted = "with " + " and ".join(map(repr, term.adapters)) if term.adapters else "without it"
            raise ValueError(
                f"The adapter {' and '.join(map(repr, merged))} is merged into the weights, so the model can't run "
                f"{wanted}. Call `unmerge_adapter()`, or guide with a merged copy of the model or an adapter from "
                "`peft_pblora.save_as_lora`."
            )
        wanted = None if term.condition is None else term.condition.preference.cpu()
        for layer in self.ours if wanted is not None else ():
            for name, α in layer.merged_preference.items():
                if wanted is not None and not (α.shape == wanted.shape and torch.equal(α.cpu(), wanted)):
                    raise ValueError(
                        f"The adapter {name!r} is merged into the weights at the preference {α.tolist()}, so it can't "
                        f"guide at {wanted.tolist()}. Call `unmerge_adapter()`."
                    )

    def check_evaluates(self, term: LM, on_rows: bool) -> None:
        """Raises `ValueError` if a dropout of an adapter of a term would act, as where it was added to a model that
        evaluates. A LoRA that acts on rows has none."""
        for layer in self.switch.layers:
            if on_rows and isinstance(layer, LoraLinear):
                continue
            for name in term.adapters:
                own = [m for path, m in layer.named_modules() if isinstance(m, _DropoutNd) and name in path.split(".")]
                if any(dropout.training and dropout.p for dropout in own):
                    raise ValueError(
                        f"The adapter {name!r} of {term!r} is in training mode, in which its dropout acts. Call "
                        "`model.eval()` before it generates or guides."
                    )

    def act_on_rows(self, names: Sequence[str]) -> bool:
        """Whether these adapters can act on some rows of a forward, and on others not."""
        for layer in self.switch.layers:
            has = [name for name in names if name in _adapters_of(layer)]
            if has and not isinstance(layer, PreferenceLinear | LoraLinear):
                return False
            if any(name in getattr(layer, "lora_variant", ()) for name in has):
                return False
        return not self.switch.merged

    @contextmanager
    def acting(
        self,
        entries: Sequence[Entry],
        rows: int,
        tokens: int,
        groups: int | None,
        ahead: torch.Tensor | None,
        on_rows: bool = True,
    ) -> Iterator[RowPlan | None]:
        """For the time of a forward in this thread, these adapters act on these rows, and no others do.

        Args:
            entries (`Sequence[Entry]`):
                Adapters with their rows, or groups of rows, and α; all rows for what can't act on some, see
                [`act_on_rows`].
            rows, tokens (`int`): Rows of the forward's batch, and tokens of each.
            groups (`int`, *optional*): How many groups of rows there are, if entries count those.
            ahead (`torch.Tensor`, *optional*):
                Something like what layers get, if the forward is compiled: adapters are folded ahead of it.
            on_rows (`bool`, *optional*, defaults to `True`): Whether these adapters can all act on some rows.

        Returns:
            The plan; `None` where they are merged, so that there is nothing to plan.

        Raises:
            ValueError: in the forward, from a layer in whose input rows can't be told apart.
        """
        planned = dict.fromkeys(name for name, _, _ in entries)
        if not on_rows and self.switch.merged:
            with self.alone(list(planned)):
                yield None
            return
        if ahead is not None:
            size = rows // groups if groups else 1
            for layer in self.ours:
                for name, part, condition in entries:
                    if name in layer.adapters:
                        layer.adapter(name).fold_ahead(ahead[: size * (part.stop - part.start)], condition)
        with ExitStack() as stack:
            plan = stack.enter_context(acting(entries, rows, tokens, groups, folded=ahead is not None))
            adding = [layer for layer in self.loras if on_rows and any(name in layer.lora_A for name in planned)]
            if self.others.layers:  # their switches and hooks are seen by all threads
                stack.enter_context(_switching)
                if not on_rows:
                    stack.enter_context(self.others.only(list(planned)))
                elif any(layer.active_adapters and not layer._disable_adapters for layer in self.others.layers):
                    stack.enter_context(self.others.only([]))
                for layer in adding:
                    stack.callback(layer.register_forward_hook(_add_to_rows).remove)
            yield plan

    @contextmanager
    def alone(self, names: Sequence[str]) -> Iterator[None]:
        """For the time of a forward these adapters act on all rows, and no others do."""
        with _switching, self.switch.only(names):
            yield


def same_stamp(former: list[Any], now: list[Any]) -> bool:
    """Whether two stamps have the same values, and the same modules and tensors, not ones that are alike."""
    return len(former) == len(now) and all(
        a is b or not isinstance(a, nn.Module | torch.Tensor) and a == b for a, b in zip(former, now)
    )


def step_aside(term: LM) -> nn.Module | None:
    """Makes the adapters that guide inactive in their model, so that it generates without them.

    Our adapters then act in calls of their `PeftModel` only, see [`Condition`]; others are made inactive, until
    `set_adapter`. No weight, gradient or other adapter is touched.

    Returns:
        `nn.Module`: A layer that has them, see [`check_aside`]; `None` if there is none.
    """
    check_told_apart(term)
    layers = [
        layer for layer in AdapterSwitch.of(term.backbone).layers if set(term.adapter_names) & set(_adapters_of(layer))
    ]
    for layer in layers:
        if isinstance(layer, PreferenceLinear):
            for name in term.adapter_names:
                layer.adapter(name).condition.aside = True
        elif set(term.adapter_names) & set(layer.active_adapters):
            layer._active_adapter = [name for name in layer.active_adapters if name not in term.adapter_names]
    return layers[0] if layers else None


def check_told_apart(term: LM) -> None:
    """Raises `ValueError` if adapters of two methods have one of a guide's names: what guides can't be told from what
    the model that generates has of its own."""
    found: dict[str, set[str]] = {}
    for layer in AdapterSwitch.of(term.backbone).layers:
        for name in set(term.adapter_names) & set(_adapters_of(layer)):
            if isinstance(layer, BaseTunerLayer) and not isinstance(layer, TrainableTokensLayer):  # a part of a LoRA
                found.setdefault(name, set()).add(layer.adapter_layer_names[0])
    for name, prefixes in found.items():
        if len(prefixes) > 1:
            raise ValueError(
                f"The model has an adapter {name!r} of each of {len(prefixes)} methods, of which one may be the guide "
                "and another one the base model's own. Load one of them under another name, or merge the base model's."
            )


def check_aside(term: LM, layer: Any) -> None:
    """Raises `ValueError` if an adapter that guides is active again, or merged: the model that generates might be the
    guide."""
    if layer is not None and set(term.adapter_names) & set(getattr(layer, "merged_adapters", ())):
        raise ValueError(
            f"The adapter {term.adapter_names[0]!r} is merged into the weights, so that a model with these weights "
            "would not generate as the base model. Call `unmerge_adapter()`, guide with a copy after "
            "`merge_and_unload()`, or use a guided model such as `PARM(model, arm, ...)`."
        )
    if layer is not None and set(term.adapter_names) & set(resting([layer])):
        raise ValueError(
            f"The adapter {term.adapter_names[0]!r} was made active, or replaced, after the processor was made, so "
            "that a model with these weights would not generate as the base model. Make the processor anew, or use a "
            "guided model such as `PARM(model, arm, ...)`, which leaves adapters as they are."
        )


def resting(layers: Sequence[Any]) -> list[str]:
    """The adapters that act in a model by itself, as far as these of its layers tell."""
    found: dict[str, None] = {}
    with _switching:  # another thread's forward may have switched them
        for layer in layers:
            for name in () if layer._disable_adapters else layer.active_adapters:
                if name in _adapters_of(layer) and not (
                    isinstance(layer, PreferenceLinear) and layer.adapter(name).condition.aside
                ):
                    found[name] = None
    return list(found)


def _add_to_rows(layer: Any, args: tuple, output: torch.Tensor) -> None:
    """Adds what LoRAs add to their rows, in the place of PEFT's layer, in which none is active meanwhile."""
    plan = current_plan()
    for name, rows, _ in plan.slices(output) if plan is not None else ():
        if name in layer.lora_A._modules:
            low, up = layer.lora_A[name], layer.lora_B[name]
            added = up(low(layer._cast_input_dtype(args[0][rows], low.weight.dtype)))
            output[rows].add_(added, alpha=layer.scaling[name])


def _adapters_of(layer: nn.Module) -> Any:
    if isinstance(layer, PreferenceLinear):
        return layer.adapters
    if isinstance(layer, LoraLinear):
        return layer.lora_A
    return layer._get_available_adapters() if isinstance(layer, BaseTunerLayer) else getattr(layer, "_adapters", ())
