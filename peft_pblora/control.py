# SPDX-License-Identifier: Apache-2.0
"""Setting and reading the preference of a model's adapters."""

import contextlib
from collections.abc import Iterator

import torch
from peft import PeftModel
from torch import nn

from .condition import Condition
from .layer import preference_layers
from .model import PreferenceTuner
from .preference import Preference, as_preference


def set_preference(
    model: nn.Module,
    preference: Preference,
    adapter_name: str | None = None,
    normalize: bool = False,
    allow_off_simplex: bool = False,
) -> None:
    """Sets the preference α of a model's adapters, once for each adapter, however many layers it has.

    A loss that was computed before keeps its own α: its backward may come after. Under gradient checkpointing, which
    computes it once more then, that raises `RuntimeError`.

    Args:
        model (`nn.Module`): A model with preference-conditioned adapters, wrapped in a `PeftModel` or not.
        preference (`Mapping[str, float]`, `Sequence[float]` or `torch.Tensor`):
            Weights on the simplex, such as `{"helpful": 0.7, "harmless": 0.3}`, see [`as_preference`]; `(rows, k)` of
            them are one preference for each row of the batch.
        adapter_name (`str`, *optional*): The adapter to set; all preference-conditioned adapters if not given.
        normalize (`bool`, *optional*, defaults to `False`): Rescale to sum 1 instead of refusing.
        allow_off_simplex (`bool`, *optional*, defaults to `False`): As in [`as_preference`].

    Raises:
        ValueError: the model has no such adapter, it is merged, or the preference is not one of its objectives.
    """
    found = _conditions(model, adapter_name)
    valid = [as_preference(preference, one.objectives, normalize, allow_off_simplex) for _, one in found]
    for name, condition in found:
        if condition.merged:
            raise ValueError(f"Adapter {name!r} is merged at one preference. Call `unmerge_adapter()` to set another.")
    for (_, condition), value in zip(found, valid, strict=True):
        condition.set(value)


def get_preference(model: nn.Module, adapter_name: str | None = None) -> torch.Tensor:
    """Returns a copy of the preference of an adapter, the active one if `adapter_name` is not given.

    It is a float32 tensor of shape `(k,)` or `(rows, k)`. Raises `ValueError` if the model has no such adapter.
    """
    return find_adapter(model, adapter_name)[1].preference.clone()


def get_objectives(model: nn.Module, adapter_name: str | None = None) -> list[str]:
    """Returns the objective names of an adapter, in the order of its preference vector."""
    return list(find_adapter(model, adapter_name)[1].objectives)


@contextlib.contextmanager
def use_preference(
    model: nn.Module,
    preference: Preference,
    adapter_name: str | None = None,
    normalize: bool = False,
    allow_off_simplex: bool = False,
) -> Iterator[None]:
    """As [`set_preference`], for the time of a `with` block: the former ones come back after it, also on an error. An
    adapter that the block leaves merged stays at the preference that it was merged at."""
    former = [(one, one.preference.clone(), one.was_set) for _, one in _conditions(model, adapter_name)]
    set_preference(model, preference, adapter_name, normalize, allow_off_simplex)
    try:
        yield
    finally:
        for condition, old, was_set in former:
            if not condition.merged:
                condition.set(old)
                condition.was_set = was_set


def has_preference(model: nn.Module) -> bool:
    """Whether the model has a preference-conditioned adapter."""
    return any(_families(model))


def find_adapter(model: nn.Module, adapter_name: str | None = None) -> tuple[str, Condition]:
    """The adapter of this name, else an active one, with its condition. Raises `ValueError` if there is none."""
    found = _conditions(model, adapter_name)
    active: list[str] = []
    if len(found) > 1:
        tuner = getattr(model, "base_model", None)
        layers = (layer for layer in preference_layers(model) if layer.adapters)
        active = (tuner if isinstance(tuner, PreferenceTuner) else next(layers)).active_adapters
    return next((pair for pair in found if pair[0] in active), found[0])


def _conditions(model: nn.Module, adapter_name: str | None) -> list[tuple[str, Condition]]:
    """All adapters of a model, or the one of this name, with their conditions. A `PeftModel`'s layers stay unseen."""
    families = _families(model)
    found = [pair for family in families for pair in family.items() if adapter_name in (None, pair[0])]
    if not found:
        known = sorted({name for family in families for name in family})
        hint = "Make one with `get_peft_model(model, PBLoraConfig(objectives=[...]))`."
        which = f" {adapter_name!r}; it has {known}." if known else f". {hint}"
        raise ValueError(f"The model has no preference-conditioned adapter{which}")
    return found


def _families(model: nn.Module) -> list[dict[str, Condition]]:
    """The conditions by name, once for each part of the model that was given adapters by itself."""
    tuner = model.base_model if isinstance(model, PeftModel) else None
    if isinstance(tuner, PreferenceTuner):
        return [tuner.conditions, *(others for others in tuner.families if others is not tuner.conditions)]
    return list({id(layer.conditions): layer.conditions for layer in preference_layers(model)}.values())
