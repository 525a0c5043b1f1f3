# SPDX-License-Identifier: Apache-2.0
"""Objectives as principals of one agent, the base model: the equilibrium of what each of them pays for tokens."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from peft_pblora import get_objectives
from peft_pblora.preference import Preference
from trl_parm.algebra import BASE, Combination, Scorer, Step, Weight, of_rows

from .methods import Models, objective_weights, scorer_of
from .model import Guided
from .processor import MethodLogitsProcessor
from .terms import LM, untuned


MOST = 20.0
"""Largest log-ratio of a reward, in nats, either way, which has no bound of its own."""
HALVINGS = 40
TOLERANCE = 1e-3
"""By how much payments may move in the last round before a warning says so, in nats of the agent's scores."""


def best_response(scores: torch.Tensor, values: torch.Tensor, tau: float) -> torch.Tensor:
    """What a principal pays for each candidate, given what the others pay (CAGE, arXiv 2605.13875, eq. 1):

        max_y  π(y) · (q − y),   0 ≤ y ≤ q,   π(y) = softmax(scores + y/τ)

    It keeps one margin c of all candidates that it pays for, y = max(0, q − c), with c = τ + π(y) · min(q, c): where
    the derivative is zero the margin is the utility plus τ. The c is found by halving.

    Args:
        scores (`torch.Tensor` of shape `(..., candidates)`): log π_base + what the others pay, by τ.
        values (`torch.Tensor` of shape `(..., candidates)`): q, 0 or larger.
        tau (`float`): τ, positive.

    Returns:
        `torch.Tensor` of the shape of `values`: y.
    """
    low = values.new_full((*values.shape[:-1], 1), tau)
    high = low + values.amax(-1, keepdim=True)
    for _ in range(HALVINGS):
        margin = (low + high) / 2
        π = torch.softmax(scores + (values - margin).clamp(min=0) / tau, -1)
        too_small = tau + (π * torch.minimum(values, margin)).sum(-1, keepdim=True) > margin
        low, high = torch.where(too_small, margin, low), torch.where(too_small, high, margin)
    return (values - (low + high) / 2).clamp(min=0)


def common_agency(
    base: torch.Tensor, values: torch.Tensor, tau: float, rounds: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The payments of all principals after some rounds of best responses to those of the round before (Jacobi; CAGE,
    arXiv 2605.13875, algorithm 1).

    Args:
        base (`torch.Tensor` of shape `(..., candidates)`): log π_base, up to a constant.
        values (`torch.Tensor` of shape `(principals, ..., candidates)`): α_i q_i, 0 or larger.
        tau (`float`): τ, positive.
        rounds (`int`): Most rounds.

    Returns:
        `tuple` of Σ_i y_i, `(..., candidates)`, and by how much a payment has moved in the last round, at most.
    """
    paid = torch.zeros_like(values)
    moved = values.new_zeros(())
    for _ in range(rounds):
        others = paid.sum(0) - paid
        new = torch.stack([best_response(base + o / tau, q, tau) for o, q in zip(others, values, strict=True)])
        moved, paid = (new - paid).abs().max(), new
    return paid.sum(0), moved


class CommonAgency(Combination):
    """log π of an agent that principals pay: log π_base + Σ_i y_i/τ on the base model's likeliest tokens.

    Made by [`cage`], which has the arguments.
    """

    def __init__(self, principals: list[tuple[Weight, Scorer]], tau: float, k: int, rounds: int) -> None:
        super().__init__(principals)
        self.tau, self.k, self.rounds = tau, k, rounds

    def scorers(self) -> Iterator[Scorer]:
        yield BASE
        yield from super().scorers()

    def __call__(self, step: Step) -> torch.Tensor:
        whole, rewards = BASE(step), [(weight, reward(step)) for weight, reward in self._terms]
        for weight, reward in rewards:  # a token that a principal excludes is no candidate
            whole = whole.masked_fill((reward == -torch.inf) & (of_rows(weight, reward) > 0), -torch.inf)
        base, candidates = whole.topk(min(self.k, whole.shape[-1]), -1)
        values = []
        for weight, reward in rewards:
            own = torch.nan_to_num(reward.gather(-1, candidates), nan=-MOST).clamp(-MOST, MOST)
            least = own.masked_fill(base == -torch.inf, MOST).amin(-1, keepdim=True)
            values.append(of_rows(weight, own) * (own - least).masked_fill(base == -torch.inf, 0.0))
        payment, moved = common_agency(base, torch.stack(values), self.tau, self.rounds)
        if moved / self.tau > TOLERANCE:
            warnings.warn(  # without what differs from token to token, so that it is shown once
                f"After {self.rounds} rounds payments still move by more than {TOLERANCE:g} nats, so that "
                "CAGE decodes from the last round, not from an equilibrium. More `rounds` may find one.",
                stacklevel=2,
            )
        return torch.full_like(whole, -torch.inf).scatter(-1, candidates, base + payment / self.tau)

    def __repr__(self) -> str:
        terms = ", ".join(repr(scorer) for _, scorer in self._terms)
        return f"CommonAgency({terms}; tau={self.tau:g}, k={self.k}, rounds={self.rounds})"


def cage(
    arm: PreTrainedModel | Models,
    preference: Preference,
    tau: float = 0.1,
    k: int = 50,
    rounds: int = 5,
    reference: PreTrainedModel | Scorer | None = None,
    adapters_of: PreTrainedModel | None = None,
    **guide: Any,
) -> Scorer:
    """Objectives that compete for the tokens of one agent (CAGE, arXiv 2605.13875):

        π = softmax(log π_base + Σ_i y_i/τ),   y_i = argmax_y π(y) · (α_i q_i − y),   0 ≤ y ≤ α_i q_i

    where every y_i is the best answer to the others. q_i is what the reward model of objective i, a PARM at its vertex
    or an ARM of its own, says more than the reference does, log π_i − log π_ref, above the least of the candidates
    (our reading, as is the limit of 20 nats). Tokens beyond the `k` likeliest are excluded, and so are those that a
    reward model with α_i > 0 excludes, such as ones that it does not know.

    Args:
        arm (`PeftModel` or `Mapping[str, PreTrainedModel]`):
            A preference-aware reward model, or one for each objective, as in [`genarm`].
        preference (`Mapping[str, float]`, `Sequence[float]` or `torch.Tensor`):
            α, in the order of the objectives, or of shape `(rows, k)` with one for each prompt of the batch.
        tau (`float`, *optional*, defaults to 0.1): τ, positive: how dear it is to move the agent.
        k (`int`, *optional*, defaults to 50): Candidates, 2 or more.
        rounds (`int`, *optional*, defaults to 5): Of the principals' answers to each other, 1 or more.
        reference (`PreTrainedModel` or `Scorer`, *optional*): π_ref; each ARM without its adapter if not given.
        adapters_of (`PeftModel`, *optional*): The model whose adapters a mapping names.
        **guide: Further arguments of [`LM`]: `adapter_name`, `vocabulary`.

    Returns:
        [`Scorer`]: The formula.

    Raises:
        ValueError: fewer than two objectives, a setting out of its range, an invalid preference, or ARMs without
            adapters and no `reference`; see also [`LM`].
    """
    for name, value, least in (("k", k, 2), ("rounds", rounds, 1)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"`{name}` is {value!r}, but it must be a whole number, {least} or larger.")
    if isinstance(tau, bool) or not (isinstance(tau, int | float) and 0 < tau < float("inf")):
        raise ValueError(f"`tau` is {tau!r}, but it must be a positive, finite number.")
    if guide.get("allow_off_simplex"):
        raise ValueError("A game takes weights on the simplex alone. Leave `allow_off_simplex` out.")
    if reference is not None and not isinstance(reference, Scorer):
        reference = untuned(reference, **{name: value for name, value in guide.items() if name != "adapter_name"})
    if isinstance(arm, Mapping):
        objectives = list(arm)
        paying = [scorer_of("arm", one, adapters_of, guide) for one in arm.values()]
    else:
        objectives = get_objectives(arm, guide.get("adapter_name"))
        vertices = torch.eye(len(objectives)).tolist()
        paying = [LM(arm, vertex, **guide) for vertex in vertices]
    if len(objectives) < 2:
        raise ValueError(
            f"`arm` has {len(objectives)} objectives, but a game needs two or more. Use `parm` or `genarm`."
        )
    weights = objective_weights("arm", objectives, preference)
    untrained = [_untrained(scorer) if reference is None else reference for scorer in paying]
    principals = [(weight, own - other) for weight, own, other in zip(weights, paying, untrained, strict=True)]
    return CommonAgency(principals, float(tau), k, rounds)


def _untrained(scorer: Scorer) -> Scorer:
    if not isinstance(scorer, LM) or not scorer.adapters:
        raise ValueError(
            f"{scorer!r} has no adapter that could be left out, so it is not known what it was trained from. Give "
            "`reference`, that model."
        )
    name = scorer.adapters[0] if len(scorer.adapters) == 1 else None
    return LM(scorer.model, adapter_name=name, disable_adapter=True, vocabulary=scorer.vocabulary)


class CAGE(Guided):
    """A base model whose tokens objectives compete for: `CAGE(base, ...)` with the arguments of [`cage`].

    Example:

    ```python
    CAGE(base, arm, {"helpful": 0.7, "harmless": 0.3}).generate(**inputs, max_new_tokens=64)
    ```
    """

    def __init__(self, base: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(base, cage(*args, **kwargs))


class CAGELogitsProcessor(MethodLogitsProcessor):
    """CAGE as a logits processor; the arguments are those of [`cage`] and [`GuidedLogitsProcessor`]."""

    method = staticmethod(cage)
