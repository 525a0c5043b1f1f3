# SPDX-License-Identifier: Apache-2.0
"""The methods that are compared: one function and one row of the table for each.

A function takes [`Models`] and the settings that a YAML file gives, loads what it needs, and returns the method: a
model for each [`Batch`] and its preference, see [`Run`].
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from peft_pblora.switch import backbone_of
from trl_parm.decoding import (
    ARGS,
    BASE,
    MOD,
    ClassifierReward,
    GenARM,
    Guided,
    MODWeakToStrong,
    TextReward,
    TrajectoryReward,
    TransferQ,
    rewarded_soup,
)
from trl_parm.decoding.methods import guidance_strength
from trl_parm.reward_models import ModelReward, RewardSource
from trl_parm.texts import as_text

from .decoding import Batch, ModelAt
from .models import Guide, Models, backbone_name, own_prompt


@dataclass(frozen=True)
class Method:
    """A row of the table of methods.

    Args:
        title (`str`): Its name in tables and figures, if no other is given.
        make (`Callable`): Takes [`Models`] and settings by keyword, and gives the model for each [`Batch`].
        control (`bool`, *optional*, defaults to `False`): Whether it has no preference.
    """

    title: str
    make: Callable[..., ModelAt]
    control: bool = False

    def settings(self) -> dict[str, bool]:
        """The settings it takes, and whether each is required."""
        parameters = list(inspect.signature(self.make).parameters.values())[1:]
        return {p.name: p.default is inspect.Parameter.empty for p in parameters}

    def check(self, name: str, given: Mapping[str, Any]) -> None:
        """Raises `ValueError` for settings that are unknown or missing."""
        known = self.settings()
        unknown = [key for key in given if key not in known]
        missing = [key for key, required in known.items() if required and key not in given]
        if unknown or missing:
            faults = [f"has no {', '.join(missing)}"] if missing else []
            faults += [f"has {', '.join(unknown)}"] if unknown else []
            allowed = ", ".join(known) or "nothing"
            raise ValueError(f"The method {name!r} {' and '.join(faults)}. Its settings are {allowed}.")


def base_model(models: Models) -> ModelAt:
    """The frozen base model alone: log π_base."""
    return lambda batch: models.base


def untrained_arm(models: Models, arm: str, beta: float = 1.0, template: str | None = None) -> ModelAt:
    """log π_base + 1/β · log π of the ARM's backbone: the sharpening of PARM and GenARM without any preference."""
    guide, strength = models.guide(arm, template), guidance_strength(beta)
    formula = BASE + strength * guide.lm(untrained=True)
    return lambda batch: (Guided(models.base, formula), own_prompt([guide], batch))


def parm(models: Models, arm: str, beta: float = 1.0, template: str | None = None) -> ModelAt:
    """log π_base + 1/β · log π_ARM(α), for every preference-conditioned adapter."""
    guide, strength = models.guide(arm, template), guidance_strength(beta)
    return lambda b: (Guided(models.base, BASE + strength * guide.lm(b.weights)), own_prompt([guide], b))


def genarm(models: Models, arms: dict[str, str], beta: float = 1.0, template: str | None = None) -> ModelAt:
    """log π_base + Σ α_i/β · log π_i."""
    guides = _guides(models, arms, template)
    return lambda b: (GenARM(models.base, _lms(guides), _ordered(b, guides), beta), own_prompt(guides.values(), b))


def mod(
    models: Models,
    policies: dict[str, str],
    divergence: str = "reverse_kl",
    order: float = 1.0,
    template: str | None = None,
) -> ModelAt:
    """Σ α_i · log π_i, or a power mean for other divergences."""
    guides = _guides(models, policies, template)

    def model_at(batch: Batch) -> Any:
        combined = MOD(models.base, _lms(guides), _ordered(batch, guides), divergence, order)
        return combined, own_prompt(guides.values(), batch)

    return model_at


def mod_w2s(models: Models, policies: dict[str, str], reference: str, template: str | None = None) -> ModelAt:
    """log π_base + Σ α_i (log π_i − log π_ref), in our reading; the reference is mostly the policies' backbone."""
    guides = _guides(models, policies, template)
    untuned = models.guide(reference, template)

    def model_at(batch: Batch) -> Any:
        guided = MODWeakToStrong(models.base, _lms(guides), untuned.lm(), _ordered(batch, guides))
        return guided, own_prompt([*guides.values(), untuned], batch)

    return model_at


def args(models: Models, rewards: dict[str, Any], weight: float = 1.5, k: int = 10, cached: bool = False) -> ModelAt:
    """log π_base + w · Σ α_i R_i on the k best tokens. `cached` lets a classifier read the base model's own tokens,
    each prefix once, where it has the same tokenizer and template."""
    judges = _judges(models, rewards, cached)
    return lambda b: ARGS(models.base, _trajectories(models, judges, b), _ordered(b, judges), weight=weight, k=k)


def transfer_q(
    models: Models,
    rewards: dict[str, Any],
    policy: str,
    weight: float = 1.0,
    k: int = 10,
    rollout_tokens: int = 20,
    cached: bool = False,
) -> ModelAt:
    """As ARGS, of texts that the policy, a model aligned to some reward, has decoded further."""
    judges, aligned = _judges(models, rewards, cached), models.apart(policy)
    search = {"weight": weight, "k": k, "rollout_tokens": rollout_tokens}
    return lambda b: TransferQ(models.base, _trajectories(models, judges, b), aligned, _ordered(b, judges), **search)


def rewarded_soups(models: Models, policies: dict[str, str]) -> ModelAt:
    """The model with weights Σ α_i θ_i: of whole models, or of LoRAs on one backbone."""
    owner: Any = None
    named: dict[str, Any] = {}
    if any(backbone_name(policy) for policy in policies.values()):
        found = {objective: models.adapter(policy) for objective, policy in policies.items()}
        owner, named = next(iter(found.values()))[0], {objective: name for objective, (_, name) in found.items()}
        if any(other is not owner for other, _ in found.values()):
            raise ValueError("The LoRAs of a soup need one backbone. Tune all of them from one model.")
    else:
        named = {objective: models.apart(policy) for objective, policy in policies.items()}
    made: dict[tuple, Any] = {}

    def model_at(batch: Batch) -> Any:
        weights = _ordered(batch, named)
        if tuple(weights) not in made:
            made.clear()  # the soup before goes first
            if owner is not None:
                owner.base_model.set_adapter([])
            soup: Any = rewarded_soup(named, weights, owner)
            cast(Any, backbone_of(soup)).generation_config = models.base.generation_config
            made[tuple(weights)] = soup
        return made[tuple(weights)]

    return model_at


METHODS = {
    "base": Method("Base", base_model, control=True),
    "untrained_arm": Method("Base × untrained ARM", untrained_arm, control=True),
    "parm": Method("PARM", parm),
    "svd_lora": Method("SVD-LoRA", parm),
    "uniarm": Method("UniARM", parm),
    "genarm": Method("GenARM", genarm),
    "mod": Method("MOD", mod),
    "mod_w2s": Method("MOD-w2s", mod_w2s),
    "args": Method("ARGS", args),
    "transfer_q": Method("Transfer-Q", transfer_q),
    "rewarded_soups": Method("Rewarded Soups", rewarded_soups),
}
"""All methods by the name that a configuration gives."""


def _guides(models: Models, named: Mapping[str, str], template: str | None) -> dict[str, Guide]:
    return {objective: models.guide(name, template) for objective, name in named.items()}


def _lms(guides: Mapping[str, Guide]) -> dict[str, Any]:
    return {objective: guide.lm() for objective, guide in guides.items()}


def _ordered(batch: Batch, models: Mapping[str, Any]) -> list[float]:
    """α in the order of models by objective. Raises `ValueError` if they are not for the same objectives."""
    if set(batch.weights) != set(models):
        raise ValueError(
            f"A method has models for {', '.join(models)}, but the objectives are {', '.join(batch.weights)}. Give "
            "one for each objective."
        )
    return [batch.weights[objective] for objective in models]


def _judges(models: Models, rewards: Mapping[str, Any], cached: bool) -> dict[str, Any]:
    judges: dict[str, Any] = {}
    for objective, given in rewards.items():
        source = RewardSource.of(given)
        reward = source.load()
        if isinstance(reward, ModelReward):
            models.keep(reward.model)
        elif cached:
            raise ValueError(f"`cached` is for classifiers, but the reward {source.source!r} is a function.")
        judges[objective] = ClassifierReward(reward.model, source.label) if cached else reward
    return judges


def _trajectories(models: Models, judges: Mapping[str, Any], batch: Batch) -> dict[str, TrajectoryReward]:
    """Rewards that read texts get the prompts as they are given, without the base model's template."""
    found: dict[str, TrajectoryReward] = {}
    for objective, judge in judges.items():
        if not isinstance(judge, TrajectoryReward):
            reads_messages = getattr(judge, "reads_messages", False)
            prompts: list[Any] = [prompt if reads_messages else as_text(prompt) for prompt in batch.prompts]
            judge = TextReward(judge, models.tokenizer, prompts)
        found[objective] = judge
    return found
