# SPDX-License-Identifier: Apache-2.0
"""The methods of the field as logits processors: each is one formula."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from peft_pblora import as_preference
from peft_pblora.preference import Preference

from .guided import GuidedLogitsProcessor
from .language_model import LM
from .scorers import BASE, LinearCombination, PowerMean, Scorer, Weight


Models = Mapping[str, Any]
"""Objective → language model, name of an adapter of the model in `adapters_of`, or any scorer, such as [`BASE`]."""
Beta = float | Sequence[float] | torch.Tensor
DIVERGENCES = ("reverse_kl", "forward_kl", "alpha")


class PARMLogitsProcessor(GuidedLogitsProcessor):
    """Guides a frozen model with one preference-aware autoregressive reward model (PARM, arXiv 2505.06274, eq. 5):

        log π(y_t) = log π_base(y_t) + 1/β · log π_ARM(y_t; α) − log Z

    Args:
        arm (`PreTrainedModel` or `PeftModel`): The reward model; it may be an adapter on the model that generates.
        preference (`Mapping[str, float]`, `Sequence[float]` or `torch.Tensor`, *optional*):
            α on the simplex of the ARM's objectives, or of shape `(rows, k)` with one for each prompt of the batch;
            the preference set in the ARM if not given.
        beta (`float` or `torch.Tensor`, *optional*, defaults to 1.0):
            β > 0, or of shape `(rows,)` with one for each prompt; the guidance strength is 1/β.
        **guide: Further arguments of [`LM`]: `adapter_name`, `prompt`, `vocabulary`.

    Raises:
        ValueError: β not positive and finite, or an invalid preference; see also [`LM`].

    Example:

    ```python
    guide = PARMLogitsProcessor(arm, {"helpful": 0.7, "harmless": 0.3}, beta=1.0)
    model.generate(**inputs, logits_processor=[guide])
    ```
    """

    def __init__(
        self, arm: PreTrainedModel, preference: Preference | None = None, beta: Beta = 1.0, **guide: Any
    ) -> None:
        self._arm = LM(arm, preference, **guide)
        super().__init__(BASE + guidance_strength(beta) * self._arm)

    def set(self, preference: Preference | None = None, beta: Beta | None = None) -> None:
        """Changes α, β or both between two calls of `generate`, for any batch, touching no layer.

        Args:
            preference (`Preference`, *optional*): As in the class; unchanged if not given.
            beta (`float` or `torch.Tensor`, *optional*): As in the class; unchanged if not given.

        Raises:
            ValueError: as the class; nothing is changed then.
        """
        strength = self._strength() if beta is None else guidance_strength(beta)
        if preference is not None:
            self._arm.set_preference(preference)
        self.formula = BASE + strength * self._arm

    def _strength(self) -> Weight:
        return next(weight for weight, scorer in self.formula.terms() if scorer is self._arm)


class GenARMLogitsProcessor(GuidedLogitsProcessor):
    """Guides a frozen model with one autoregressive reward model for each objective (GenARM, arXiv 2410.08193):

        log π(y_t) = log π_base(y_t) + Σ_i α_i/β · log π_i(y_t) − log Z

    An objective of weight 0 costs no forward.

    Args:
        arms (`Mapping[str, PreTrainedModel]`):
            Objective → reward model, or the name of an adapter of the model `adapters_of`.
        preference (`Mapping[str, float]`, `Sequence[float]` or `torch.Tensor`):
            α, in the order of `arms`; or of shape `(rows, k)` with one for each prompt of the batch.
        beta (`float` or `torch.Tensor`, *optional*, defaults to 1.0): As in [`PARMLogitsProcessor`].
        adapters_of (`PeftModel`, *optional*): The model whose adapters `arms` names.
        **guide: Further arguments of [`LM`]: `prompt`, `vocabulary`.

    Raises:
        ValueError: no ARM, β not positive and finite, or an invalid preference; see also [`LM`].

    Example:

    ```python
    guide = GenARMLogitsProcessor({"helpful": helpful_arm, "harmless": harmless_arm}, [0.7, 0.3])
    guide = GenARMLogitsProcessor({"helpful": "adapter_1", "harmless": "adapter_2"}, [0.7, 0.3], adapters_of=arms)
    ```
    """

    def __init__(
        self,
        arms: Models,
        preference: Preference,
        beta: Beta = 1.0,
        adapters_of: PreTrainedModel | None = None,
        **guide: Any,
    ) -> None:
        strength = guidance_strength(beta)
        terms = _weighted_scorers("arms", arms, preference, adapters_of, guide)
        super().__init__(BASE + sum_of((strength * weight, arm) for weight, arm in terms))


class MODLogitsProcessor(GuidedLogitsProcessor):
    """Combines policies that were tuned for one objective each (MOD, NeurIPS 2024, arXiv 2406.18853):

        reverse KL:     log π = Σ_i α_i log π_i − log Z
        α-divergence:   log π = −1/a · log Σ_i α_i π_i^−a − log Z,   forward KL: a = 1

    The model that generates counts only if it is one of the policies: `{"helpful": BASE, "harmless": other}`.

    Args:
        policies (`Mapping[str, PreTrainedModel]`): Objective → policy, or [`BASE`].
        preference (`Mapping[str, float]`, `Sequence[float]` or `torch.Tensor`): α, in the order of `policies`.
        divergence (`str`, *optional*, defaults to `"reverse_kl"`): `"reverse_kl"`, `"forward_kl"` or `"alpha"`.
        order (`float`, *optional*, defaults to 1.0): a of `"alpha"`.
        adapters_of (`PeftModel`, *optional*): The model whose adapters `policies` names.
        **guide: Further arguments of [`LM`]: `prompt`, `vocabulary`.

    Raises:
        ValueError: no policy, an unknown divergence, or an invalid preference; see also [`LM`].
    """

    def __init__(
        self,
        policies: Models,
        preference: Preference,
        divergence: str = "reverse_kl",
        order: float = 1.0,
        adapters_of: PreTrainedModel | None = None,
        **guide: Any,
    ) -> None:
        if divergence not in DIVERGENCES:
            raise ValueError(f"`divergence` is {divergence!r}, but it must be one of {', '.join(DIVERGENCES)}.")
        terms = _weighted_scorers("policies", policies, preference, adapters_of, guide)
        if divergence == "reverse_kl":
            super().__init__(sum_of(terms))
        else:
            super().__init__(PowerMean(terms, 1.0 if divergence == "forward_kl" else order))


class MODWeakToStrongLogitsProcessor(GuidedLogitsProcessor):
    """Carries what small policies learned over to a large model (MOD-w2s in PARM's tables).

        log π = log π_base + Σ_i α_i (log π_i − log π_ref) − log Z

    The formula is our reading: the code is not public.

    Args:
        policies (`Mapping[str, PreTrainedModel]`): Objective → small policy.
        reference (`PreTrainedModel` or `Scorer`): The small model that they were tuned from; it runs once.
        preference (`Mapping[str, float]`, `Sequence[float]` or `torch.Tensor`): α, in the order of `policies`.
        adapters_of (`PeftModel`, *optional*): The model whose adapters `policies` names.
        **guide: Further arguments of [`LM`]: `prompt`, `vocabulary`.

    Raises:
        ValueError: no policy, or an invalid preference; see also [`LM`].
    """

    def __init__(
        self,
        policies: Models,
        reference: PreTrainedModel | Scorer,
        preference: Preference,
        adapters_of: PreTrainedModel | None = None,
        **guide: Any,
    ) -> None:
        untuned = reference if isinstance(reference, Scorer) else LM(reference, **guide)
        terms = _weighted_scorers("policies", policies, preference, adapters_of, guide)
        super().__init__(BASE + sum_of((weight, policy - untuned) for weight, policy in terms))


def sum_of(terms) -> Scorer:
    """Σ_i w_i · scorer_i for pairs of weight and scorer; nothing at all for none."""
    total: Scorer = LinearCombination([])
    for weight, scorer in terms:
        total = total + weight * scorer
    return total


def guidance_strength(beta: Beta) -> Weight:
    """Returns 1/β, a number or of shape `(rows,)`. Raises `ValueError` unless β is positive and finite."""
    rows = isinstance(beta, list | tuple | torch.Tensor)
    if rows or isinstance(beta, int | float):
        values = torch.as_tensor(beta, dtype=torch.float32)
        if values.ndim <= 1 and values.numel() and torch.isfinite(values).all() and (values > 0).all():
            return 1 / values if values.ndim else 1.0 / float(beta)  # pyright: ignore[reportArgumentType]
    raise ValueError(
        f"`beta` is {beta!r}, but it must be a positive, finite number, or one for each row. Guidance has strength "
        "1/beta."
    )


def objective_weights(argument: str, objectives: Sequence[str], preference: Preference) -> list[Weight]:
    """α_i of each objective: a number, or of shape `(rows,)`. Raises `ValueError` if there is no objective."""
    if not objectives:
        raise ValueError(f"`{argument}` is empty. Give a mapping from objective to model.")
    weights = as_preference(preference, list(objectives))
    return weights.tolist() if weights.ndim == 1 else list(weights.unbind(-1))


def _weighted_scorers(
    argument: str, models: Models, preference: Preference, adapters_of: Any, guide: dict[str, Any]
) -> list[tuple[Weight, Scorer]]:
    """The weight and the scorer of each objective."""
    weights = objective_weights(argument, list(models), preference)
    return [
        (weight, _scorer(argument, model, adapters_of, guide))
        for weight, model in zip(weights, models.values(), strict=True)
    ]


def _scorer(argument: str, model: Any, adapters_of: Any, guide: dict[str, Any]) -> Scorer:
    if isinstance(model, Scorer):
        return model
    if not isinstance(model, str):
        return LM(model, **guide)
    if adapters_of is None:
        raise ValueError(
            f"`{argument}` names the adapter {model!r}, but not of which model. Pass `adapters_of=peft_model`."
        )
    return LM(adapters_of, adapter_name=model, **guide)
