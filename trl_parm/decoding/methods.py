# SPDX-License-Identifier: Apache-2.0
"""The methods of the field that are formulas of language models: each as a formula and as a guided model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, cast

import numpy as np
import torch
from transformers import PreTrainedModel

from peft_pblora import as_preference, get_objectives
from peft_pblora.preference import Preference
from trl_parm.algebra import BASE, PowerMean, Scorer, Weight, check_order, sum_of

from .model import Guided
from .terms import LM, untuned
from .worst_case import WORST_CASE, WorstCase


Models = Mapping[str, Any]
"""Objective → language model, name of an adapter of the model in `adapters_of`, or any scorer, such as [`BASE`]."""
Beta = float | Sequence[float] | torch.Tensor | np.ndarray
DIVERGENCES = ("reverse_kl", "forward_kl", "alpha")


def parm(arm: PreTrainedModel, preference: Preference | str | None = None, beta: Beta = 1.0, **guide: Any) -> Scorer:
    """One preference-aware autoregressive reward model (PARM, arXiv 2505.06274, eq. 5):

        log π(y_t) = log π_base(y_t) + 1/β · log π_ARM(y_t; α) − log Z

    Args:
        arm (`PreTrainedModel` or `PeftModel`): The reward model; it may be an adapter on the model that generates.
        preference (`Mapping[str, float]`, `Sequence[float]` or `torch.Tensor`, *optional*):
            α on the simplex of the ARM's objectives, or of shape `(rows, k)` with one for each prompt of the batch;
            the preference set in the ARM if not given. `"worst_case"` weighs the ARM's vertices, at every token, as is
            worst for the decoder ([`WorstCase`]).
        beta (`float` or `torch.Tensor`, *optional*, defaults to 1.0):
            β > 0, or of shape `(rows,)` with one for each prompt; the guidance strength is 1/β.
        **guide: Further arguments of [`LM`]: `adapter_name`, `vocabulary`, `allow_off_simplex`.

    Returns:
        [`Scorer`]: The formula.

    Raises:
        ValueError: β not positive and finite, or an invalid preference; see also [`LM`].
    """
    strength = guidance_strength(beta)
    if isinstance(preference, str) and preference == WORST_CASE:
        vertices = torch.eye(len(get_objectives(arm, guide.get("adapter_name")))).tolist()
        return WorstCase([(strength, LM(arm, vertex, **guide)) for vertex in vertices])
    return BASE + strength * LM(arm, cast(Preference | None, preference), **guide)


def genarm(
    arms: Models,
    preference: Preference | str,
    beta: Beta = 1.0,
    adapters_of: PreTrainedModel | None = None,
    **guide: Any,
) -> Scorer:
    """One autoregressive reward model for each objective (GenARM, arXiv 2410.08193):

        log π(y_t) = log π_base(y_t) + Σ_i α_i/β · log π_i(y_t) − log Z

    An objective of weight 0 costs no forward.

    Args:
        arms (`Mapping[str, PreTrainedModel]`):
            Objective → reward model, or the name of an adapter of the model `adapters_of`.
        preference (`Mapping[str, float]`, `Sequence[float]` or `torch.Tensor`):
            α, in the order of `arms`; or of shape `(rows, k)` with one for each prompt of the batch. `"worst_case"`
            as in [`parm`].
        beta (`float` or `torch.Tensor`, *optional*, defaults to 1.0): As in [`parm`].
        adapters_of (`PeftModel`, *optional*): The model whose adapters `arms` names.
        **guide: Further arguments of [`LM`]: `vocabulary`, `allow_off_simplex`.

    Returns:
        [`Scorer`]: The formula.

    Raises:
        ValueError: no ARM, β not positive and finite, or an invalid preference; see also [`LM`].
    """
    strength = guidance_strength(beta)
    if isinstance(preference, str) and preference == WORST_CASE:
        objective_weights("arms", list(arms), [1 / max(1, len(arms))] * len(arms))  # there must be some
        return WorstCase([(strength, scorer_of("arms", arm, adapters_of, guide)) for arm in arms.values()])
    terms = _weighted_scorers("arms", arms, cast(Preference, preference), adapters_of, guide)
    return BASE + strength * sum_of(terms)


def mod(
    policies: Models,
    preference: Preference,
    divergence: str = "reverse_kl",
    order: float = 1.0,
    adapters_of: PreTrainedModel | None = None,
    **guide: Any,
) -> Scorer:
    """Policies that were tuned for one objective each (MOD, NeurIPS 2024, arXiv 2406.18853):

        reverse KL:     log π = Σ_i α_i log π_i − log Z
        α-divergence:   log π = −1/a · log Σ_i α_i π_i^−a − log Z,   forward KL: a = 1

    The model that generates counts only if it is one of the policies: `{"helpful": BASE, "harmless": other}`.

    Args:
        policies (`Mapping[str, PreTrainedModel]`): Objective → policy, or [`BASE`].
        preference (`Mapping[str, float]`, `Sequence[float]` or `torch.Tensor`): α, in the order of `policies`.
        divergence (`str`, *optional*, defaults to `"reverse_kl"`): `"reverse_kl"`, `"forward_kl"` or `"alpha"`.
        order (`float`, *optional*, defaults to 1.0): a > 0 of `"alpha"`; others have none.
        adapters_of (`PeftModel`, *optional*): The model whose adapters `policies` names.
        **guide: Further arguments of [`LM`]: `vocabulary`, `allow_off_simplex`.

    Returns:
        [`Scorer`]: The formula.

    Raises:
        ValueError: no policy, an unknown divergence, one without `order` or an order that is not positive, or an
            invalid preference, for a mean one off the simplex too; see also [`LM`].
    """
    check_divergence(divergence, order)
    terms = _weighted_scorers("policies", policies, preference, adapters_of, guide)
    if divergence == "reverse_kl":
        return sum_of(terms)
    try:
        as_preference(preference, list(policies))
    except ValueError:
        weights = as_preference(preference, list(policies), allow_off_simplex=True).tolist()
        raise ValueError(
            f"`divergence` is {divergence!r}, whose mean has no meaning at the weights {weights}, off the simplex. "
            "Give weights on it, or leave `divergence` out."
        ) from None
    return PowerMean(terms, order)


def mod_w2s(
    policies: Models,
    reference: PreTrainedModel | Scorer,
    preference: Preference,
    adapters_of: PreTrainedModel | None = None,
    **guide: Any,
) -> Scorer:
    """What small policies learned, carried over to a large model (MOD-w2s in PARM's tables).

        log π = log π_base + Σ_i α_i (log π_i − log π_ref) − log Z

    The formula is our reading: the code is not public.

    Args:
        policies (`Mapping[str, PreTrainedModel]`): Objective → small policy.
        reference (`PreTrainedModel` or `Scorer`): The small model that they were tuned from; it runs once.
        preference (`Mapping[str, float]`, `Sequence[float]` or `torch.Tensor`): α, in the order of `policies`.
        adapters_of (`PeftModel`, *optional*): The model whose adapters `policies` names.
        **guide: Further arguments of [`LM`]: `vocabulary`, `allow_off_simplex`.

    Returns:
        [`Scorer`]: The formula.

    Raises:
        ValueError: no policy, or an invalid preference; see also [`LM`].
    """
    before = reference if isinstance(reference, Scorer) else untuned(reference, **guide)
    terms = _weighted_scorers("policies", policies, preference, adapters_of, guide)
    return BASE + sum_of((weight, policy - before) for weight, policy in terms)


class PARM(Guided):
    """A base model guided by one preference-aware reward model; the formula and its arguments are those of [`parm`].

    Args:
        base (`PreTrainedModel`): The frozen model.
        arm, preference, beta, **guide: As in [`parm`].

    Example:

    ```python
    guided = PARM(base, arm, {"helpful": 0.7, "harmless": 0.3}, beta=1.0)
    guided.generate(**inputs, max_new_tokens=64)
    ```
    """

    def __init__(
        self, base: Any, arm: Any, preference: Preference | str | None = None, beta: Beta = 1.0, **guide: Any
    ) -> None:
        super().__init__(base, parm(arm, preference, beta, **guide))


class GenARM(Guided):
    """A base model guided by one reward model for each objective: `GenARM(base, ...)`, arguments as of [`genarm`].

    Example:

    ```python
    GenARM(base, {"helpful": helpful_arm, "harmless": harmless_arm}, [0.7, 0.3])
    GenARM(base, {"helpful": "adapter_1", "harmless": "adapter_2"}, [0.7, 0.3], adapters_of=arms)
    ```
    """

    def __init__(self, base: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(base, genarm(*args, **kwargs))


class MOD(Guided):
    """A combination of policies, of which the base model may be one: `MOD(base, ...)`, arguments as of [`mod`]."""

    def __init__(self, base: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(base, mod(*args, **kwargs))


class MODWeakToStrong(Guided):
    """A base model that small policies guide: `MODWeakToStrong(base, ...)` with the arguments of [`mod_w2s`]."""

    def __init__(self, base: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(base, mod_w2s(*args, **kwargs))


def guidance_strength(beta: Beta) -> Weight:
    """Returns 1/β, a number or of shape `(rows,)`. Raises `ValueError` unless β is positive and finite."""
    rows = isinstance(beta, list | tuple | torch.Tensor | np.ndarray)
    if rows or (isinstance(beta, Real) and not isinstance(beta, bool)):
        values = torch.as_tensor(beta if rows else float(beta), dtype=torch.float32)
        if values.ndim <= 1 and values.numel() and torch.isfinite(values).all() and (values > 0).all():
            return 1 / values if values.ndim else 1.0 / float(beta)  # pyright: ignore[reportArgumentType]
    raise ValueError(
        f"`beta` is {beta!r}, but it must be a positive, finite number, or one for each row. Guidance has strength "
        "1/beta."
    )


def check_divergence(divergence: str, order: float) -> None:
    """Raises `ValueError` for an unknown divergence of [`mod`], or an order that it has not."""
    if divergence not in DIVERGENCES:
        raise ValueError(f"`divergence` is {divergence!r}, but it must be one of {', '.join(DIVERGENCES)}.")
    if order != 1 and divergence != "alpha":
        raise ValueError(
            f'`order` is {order}, but `divergence` is {divergence!r}, which has none. Pass `divergence="alpha"` too, '
            "or leave `order` out."
        )
    check_order(order)


def objective_weights(
    argument: str, objectives: Sequence[str], preference: Preference, allow_off_simplex: bool = False
) -> list[Weight]:
    """α_i of each objective: a number, or of shape `(rows,)`. Raises `ValueError` if there is no objective."""
    if not objectives:
        raise ValueError(f"`{argument}` is empty. Give a mapping from objective to model.")
    weights = as_preference(preference, list(objectives), allow_off_simplex=allow_off_simplex)
    return weights.tolist() if weights.ndim == 1 else list(weights.clone().unbind(-1))  # nobody else's


def _weighted_scorers(
    argument: str, models: Models, preference: Preference, adapters_of: Any, guide: dict[str, Any]
) -> list[tuple[Weight, Scorer]]:
    """The weight and the scorer of each objective."""
    weights = objective_weights(argument, list(models), preference, guide.get("allow_off_simplex", False))
    return [
        (weight, scorer_of(argument, model, adapters_of, guide))
        for weight, model in zip(weights, models.values(), strict=True)
    ]


def scorer_of(argument: str, model: Any, adapters_of: Any, guide: dict[str, Any]) -> Scorer:
    """A scorer as it is, or log π of a model or of the adapter of `adapters_of` that has this name."""
    if isinstance(model, Scorer):
        return model
    if not isinstance(model, str):
        return LM(model, **guide)
    if adapters_of is None:
        raise ValueError(
            f"`{argument}` names the adapter {model!r}, but not of which model. Pass `adapters_of=peft_model`."
        )
    return LM(adapters_of, adapter_name=model, **guide)
