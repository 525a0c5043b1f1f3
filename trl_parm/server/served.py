# SPDX-License-Identifier: Apache-2.0
"""The models that requests can name: the base model, and methods of a configuration of `evaluate`."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from transformers import BatchEncoding

from peft_pblora import as_preference
from peft_pblora.preference import SUM_TOLERANCE
from peft_pblora.switch import backbone_of
from trl_parm.decoding import BASE, Guided
from trl_parm.decoding.joining import can_join, can_read_on
from trl_parm.decoding.prefix import turning_length
from trl_parm.evaluation.decoding import ANY, SAME_OBJECTIVES, Batch, ModelAt
from trl_parm.evaluation.methods import Entry, rewarded_soups
from trl_parm.evaluation.models import Models, positions_of
from trl_parm.texts import PromptText

from .errors import RequestError


BASE_NAME = "base"
"""The unguided base model, whatever else is served."""
LEAST_WEIGHT = 1e-30
OwnPrompt = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Served:
    """A model that requests can name.

    Attributes:
        name (`str`): By which they do.
        model_at (`Callable`): The method, see [`ModelAt`](trl_parm.evaluation.decoding.ModelAt).
        objectives (`tuple[str, ...]`): Of its preferences; none for a model that has no preference.
        preference (`dict[str, float]`): Of requests that have none.
        beta (`float` or `None`): The same for β; `None` where there is no β.
        together (`str` or `None`): Which preferences may share a batch, see [`Run`](trl_parm.evaluation.decoding.Run).
        joins (`bool`): Whether texts can join others in one batch. Where not, each is decoded alone.
        in_parts (`bool`): Whether it can read a prompt in parts.
        positions (`int` or `None`): Most tokens of a text, by the configurations of its models.
    """

    name: str
    model_at: ModelAt
    objectives: tuple[str, ...] = ()
    preference: Mapping[str, float] | None = None
    beta: float | None = None
    together: str | None = None
    joins: bool = True
    in_parts: bool = True
    positions: int | None = None

    @property
    def is_guided(self) -> bool:
        """Whether it is more than the base model."""
        return self.name != BASE_NAME

    def guided(self, weights: Sequence[Mapping[str, float]], betas: Sequence[float | None]) -> Guided:
        """The model for rows at these preferences and β."""
        return self._made([dict(own) for own in weights], list(betas))[0]

    def own_prompt(
        self, prompt: PromptText, ids: list[int], weights: Mapping[str, float], beta: float | None, escape: bool
    ) -> OwnPrompt | None:
        """What its guides read in the place of the base model's prompt, if they do. Raises `ValueError`."""
        arguments = self._made([dict(weights)], [beta], [prompt], ids, escape)[1]
        own = arguments.get("guide_input_ids"), arguments.get("guide_attention_mask")
        return None if own[0] is None else cast(OwnPrompt, own)

    def lane(self, weights: Mapping[str, float], beta: float | None, own_prompt: bool) -> tuple:
        """Texts of one lane can be decoded in one batch."""
        if self.together == ANY:
            shared: Any = ()
        elif self.together == SAME_OBJECTIVES:
            shared = tuple(weights[objective] > 0 for objective in self.objectives)
        else:
            shared = (*(weights[objective] for objective in self.objectives), beta)
        return self.name, shared, own_prompt

    def _made(
        self,
        weights: list[dict[str, float]],
        betas: list[Any],
        prompts: Sequence[PromptText] = (),
        ids: Sequence[int] = (),
        escape: bool = False,
    ) -> tuple[Guided, dict[str, Any]]:
        read = torch.tensor([list(ids)], dtype=torch.long)
        inputs = BatchEncoding({"input_ids": read, "attention_mask": torch.ones_like(read)})
        α, named, beta = None, cast(Any, weights), None if betas[0] is None else torch.tensor(betas)
        if self.together is None:
            named, beta = weights[0], betas[0]
        if self.objectives:
            α = as_preference(named, self.objectives)
        found = self.model_at(Batch(α, list(prompts), inputs, named, escape, beta=beta))
        model, arguments = found if isinstance(found, tuple) else (found, {})
        return model if isinstance(model, Guided) else Guided(model, BASE), arguments


class Catalogue:
    """All models that are served.

    Args:
        served (`Sequence[Served]`): The models; the first is that of requests that name none.
    """

    def __init__(self, served: Sequence[Served]) -> None:
        self._served = {one.name: one for one in served}

    def __iter__(self) -> Iterator[Served]:
        return iter(self._served.values())

    def named(self, name: Any) -> Served:
        """A model by its name, or the first if none is given. Raises [`RequestError`] with status 404."""
        if name is None:
            return next(iter(self))
        if not isinstance(name, str) or name not in self._served:
            close = difflib.get_close_matches(str(name), self._served, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise RequestError(
                f"There is no model {str(name)[:80]!r}. Served are {', '.join(self._served)}.{hint}",
                404, "model_not_found", "model",
            )  # fmt: skip
        return self._served[name]


def load_served(
    models: Models, methods: Sequence[Mapping[str, Any] | str], preference: Mapping[str, float] | None = None
) -> Catalogue:
    """Loads the base model and all methods, and tries each on two short texts.

    Args:
        models ([`Models`]): Loads models by name.
        methods (`Sequence`): As a configuration of `evaluate` has them. A method is served by its `name`, or the name
            of the method itself, and the base model as `"base"`.
        preference (`Mapping[str, float]`, *optional*): Of requests without one; all objectives alike if not given.

    Raises:
        ValueError: a method that can't be served, two of one name, or a preference that belongs to none of them.
    """
    entries = {BASE_NAME: Entry.of({"method": "base", "name": BASE_NAME})}
    for given in methods:
        settings = {"method": given} if isinstance(given, str) else dict(given)
        settings.setdefault("name", cast(str, settings.get("method")))
        entry = Entry.of(settings)
        if "rewards" in entry.settings or entry.method.make is rewarded_soups:
            raise ValueError(
                f"The method {entry.name!r} can't be served: its weights change with the preference, or its rewards "
                "judge whole texts. Serve methods whose terms are language models, such as parm, genarm and mod."
            )
        if entry.name in entries:
            raise ValueError(f"Two models are called {entry.name!r}. Give each method a `name` of its own.")
        entries[entry.name] = entry
    objectives = {n: () if e.method.control else tuple(e.objectives() or ()) for n, e in entries.items()}
    if preference is not None and set(preference) not in [set(found) for found in objectives.values()]:
        known = "; ".join(", ".join(found) for found in objectives.values() if found) or "none"
        raise ValueError(f"`preference` names {', '.join(preference)}, but the objectives served are {known}.")
    found = [_load(models, entry, objectives[name], preference) for name, entry in entries.items()]
    return Catalogue([*found[1:], found[0]])


def checked_weights(preference: Mapping[str, float] | Sequence[float], objectives: Sequence[str]) -> dict[str, float]:
    """A preference by objective. Raises `ValueError` or `TypeError` for one that is none, in words for a client.

    Weights so small that float32 can't tell their guidance from none, at any β, are none: else such a text would be in
    one lane with texts that have another formula.
    """
    α = as_preference(preference, objectives, allow_off_simplex=True)  # names and their number before their sum
    values = list(preference.values()) if isinstance(preference, Mapping) else list(preference)
    total = sum(values)
    if (α < 0).any() or abs(total - 1) > SUM_TOLERANCE:
        raise ValueError(f"`preference` has the weights {values}, but they must be 0 or larger and must sum to 1.")
    if abs(total - 1) > SUM_TOLERANCE / 100:  # in float32 it might be just beyond the tolerance
        values = [value / total for value in values]
    names = preference if isinstance(preference, Mapping) else objectives
    named = dict(zip(names, values, strict=True))
    return {o: float(named[o]) if named[o] >= LEAST_WEIGHT else 0.0 for o in objectives}


def _load(models: Models, entry: Entry, objectives: tuple[str, ...], preference: Mapping[str, float] | None) -> Served:
    if models.base.config.is_encoder_decoder:
        raise ValueError(f"The base model is a {type(models.base).__name__}, but only decoders can be served.")
    weights = uniform = dict.fromkeys(objectives, 1 / len(objectives)) if objectives else None
    if preference is not None and set(preference) == set(objectives):
        weights = checked_weights(preference, objectives)
    β = inspect.signature(entry.method.make).parameters.get("beta")
    beta = None if β is None else float(entry.settings.get("beta", β.default))
    model_at = entry.method.make(models, **entry.settings)
    served = Served(entry.name, model_at, objectives, weights, beta, entry.method.together)
    one = served.guided([uniform or {}], [beta])  # at a vertex it would lack guides
    joins = can_join(lambda rows: served.guided([uniform or {}] * rows, [beta] * rows))
    used = [backbone_of(model) for model in (models.base, *(term.model for term in one.terms))]
    # Beyond its turning length a model would have to read all texts of a batch anew.
    known = [count for model in used for count in (positions_of(model.config), turning_length(model))]
    positions = min((count for count in known if count is not None), default=None)
    return replace(served, joins=joins, in_parts=can_read_on(one), positions=positions)
