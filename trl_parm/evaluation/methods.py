# SPDX-License-Identifier: Apache-2.0
"""The methods that are compared: one function and one row of the table for each.

A function takes [`Models`] and the settings that a YAML file gives, loads what it needs, and returns how to decode.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from transformers import LogitsProcessor

from trl_parm.decoding import (
    BASE,
    ARGSLogitsProcessor,
    ClassifierReward,
    GenARMLogitsProcessor,
    GuidedLogitsProcessor,
    MODLogitsProcessor,
    MODWeakToStrongLogitsProcessor,
    PARMLogitsProcessor,
    TextReward,
    TrajectoryReward,
    TransferQLogitsProcessor,
    rewarded_soup,
)
from trl_parm.decoding.processors import guidance_strength
from trl_parm.reward_models import ModelReward, RewardSource
from trl_parm.texts import as_text

from .decoding import Batch
from .models import Guide, Models, backbone_name, same_model


@dataclass(frozen=True)
class Decoding:
    """How a method decodes.

    Args:
        decoder (`Callable`, *optional*): Makes the processor for a [`Batch`].
        generator (`Callable`, *optional*): Makes the model that generates, for α by objective.
    """

    decoder: Callable[[Batch], LogitsProcessor] | None = None
    generator: Callable[[dict[str, float]], Any] | None = None


@dataclass(frozen=True)
class Method:
    """A row of the table of methods.

    Args:
        title (`str`): Its name in tables and figures, if no other is given.
        make (`Callable`): Takes [`Models`] and settings by keyword.
        control (`bool`, *optional*, defaults to `False`): Whether it has no preference.
    """

    title: str
    make: Callable[..., Decoding]
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


def base_model(models: Models) -> Decoding:
    """The frozen base model alone: log π_base."""
    return Decoding()


def untrained_arm(models: Models, arm: str, beta: float = 1.0, template: str | None = None) -> Decoding:
    """log π_base + 1/β · log π of the ARM's backbone: the sharpening of PARM and GenARM without any preference."""
    guide, strength = models.guide(arm, template), guidance_strength(beta)
    has_adapter = guide.adapter_name is not None
    return Decoding(lambda batch: GuidedLogitsProcessor(BASE + strength * guide.scorer(batch, has_adapter)))


def parm(models: Models, arm: str, beta: float = 1.0, template: str | None = None) -> Decoding:
    """log π_base + 1/β · log π_ARM(α), for every preference-conditioned adapter."""
    guide = models.guide(arm, template)
    return Decoding(lambda b: PARMLogitsProcessor(guide.model, cast(dict, b.weights), beta, **guide.arguments(b)))


def genarm(models: Models, arms: dict[str, str], beta: float = 1.0, template: str | None = None) -> Decoding:
    """log π_base + Σ α_i/β · log π_i."""
    guides = _guides(models, arms, template)
    return Decoding(lambda b: GenARMLogitsProcessor(_scorers(guides, b), _weights(b, guides), beta))


def mod(
    models: Models,
    policies: dict[str, str],
    divergence: str = "reverse_kl",
    order: float = 1.0,
    template: str | None = None,
) -> Decoding:
    """Σ α_i · log π_i, or a power mean for other divergences."""
    guides = _guides(models, policies, template)
    return Decoding(lambda b: MODLogitsProcessor(_scorers(guides, b), _weights(b, guides), divergence, order))


def mod_w2s(models: Models, policies: dict[str, str], reference: str, template: str | None = None) -> Decoding:
    """log π_base + Σ α_i (log π_i − log π_ref), in our reading; the reference is mostly the policies' backbone."""
    guides = _guides(models, policies, template)
    first = next(iter(policies.values()))
    backbone = backbone_name(first)
    below = guides[next(iter(policies))] if backbone and same_model(backbone, reference) else None
    own = models.guide(reference, template) if below is None else None

    def decoder(batch: Batch) -> LogitsProcessor:
        untuned = below.scorer(batch, disable_adapter=True) if below else cast(Guide, own).scorer(batch)
        return MODWeakToStrongLogitsProcessor(_scorers(guides, batch), untuned, _weights(batch, guides))

    return Decoding(decoder)


def args(models: Models, rewards: dict[str, Any], weight: float = 1.5, k: int = 10, cached: bool = False) -> Decoding:
    """log π_base + w · Σ α_i R_i on the k best tokens. `cached` lets a classifier read the base model's own tokens,
    each prefix once, where it has the same tokenizer and template."""
    judges = _judges(models, rewards, cached)

    def decoder(batch: Batch) -> LogitsProcessor:
        return ARGSLogitsProcessor(_trajectories(models, judges, batch), _weights(batch, judges), weight, k)

    return Decoding(decoder)


def transfer_q(
    models: Models,
    rewards: dict[str, Any],
    policy: str,
    weight: float = 1.0,
    k: int = 10,
    rollout_tokens: int = 20,
    cached: bool = False,
) -> Decoding:
    """As ARGS, of texts that the policy, a model aligned to some reward, has decoded further."""
    judges, aligned = _judges(models, rewards, cached), models.apart(policy)

    def decoder(batch: Batch) -> LogitsProcessor:
        judged = _trajectories(models, judges, batch)
        return TransferQLogitsProcessor(judged, aligned, _weights(batch, judges), weight, k, rollout_tokens)

    return Decoding(decoder)


def rewarded_soups(models: Models, policies: dict[str, str]) -> Decoding:
    """The model with weights Σ α_i θ_i: of whole models, or of LoRAs on one backbone."""
    if any(backbone_name(policy) for policy in policies.values()):
        found = {objective: models.adapter(policy) for objective, policy in policies.items()}
        owners = {id(owner): owner for owner, _ in found.values()}
        if len(owners) > 1:
            raise ValueError("The LoRAs of a soup need one backbone. Tune all of them from one model.")
        names = {objective: name for objective, (_, name) in found.items()}
        owner: Any = next(iter(owners.values()))

        def soup(weights: dict[str, float]) -> Any:
            owner.base_model.set_adapter([])  # the soup before, which goes
            return rewarded_soup(names, _ordered(weights, names), owner)

        return Decoding(generator=soup)
    wholes = {objective: models.apart(policy) for objective, policy in policies.items()}
    return Decoding(generator=lambda α: rewarded_soup(wholes, _ordered(α, wholes)))


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


def _scorers(guides: Mapping[str, Guide], batch: Batch) -> dict[str, Any]:
    return {objective: guide.scorer(batch) for objective, guide in guides.items()}


def _weights(batch: Batch, models: Mapping[str, Any]) -> list[float]:
    return _ordered(cast(dict, batch.weights), models)


def _ordered(weights: dict[str, float], models: Mapping[str, Any]) -> list[float]:
    """α in the order of models by objective. Raises `ValueError` if they are not for the same objectives."""
    if set(weights) != set(models):
        raise ValueError(
            f"A method has models for {', '.join(models)}, but the objectives are {', '.join(weights)}. Give one for "
            "each objective."
        )
    return [weights[objective] for objective in models]


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
        if isinstance(judge, TrajectoryReward):
            found[objective] = judge
            continue
        prompts: list[Any] = batch.prompts
        if not getattr(judge, "reads_messages", False):
            prompts = [as_text(prompt) for prompt in batch.prompts]
        found[objective] = TextReward(judge, models.tokenizer, prompts)
    return found
