# SPDX-License-Identifier: Apache-2.0
"""The methods that are compared: one function and one row of the table for each.

A function takes [`Models`] and the settings that a YAML file gives, loads what it needs, and returns the method: a
model for each [`Batch`] and its preference, see [`Run`].
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from peft_pblora import as_preference, get_objectives
from peft_pblora.config import PreferenceConfig
from peft_pblora.preference import Preference
from trl_parm import decoding as formulas
from trl_parm.algebra import Weight
from trl_parm.arguments import check_fields
from trl_parm.decoding import BASE, ClassifierReward, Guided, Rollout, Scorer, TextReward, rewarded_soup
from trl_parm.decoding.methods import check_divergence, guidance_strength
from trl_parm.identity import known_by
from trl_parm.preference_text import PreferenceText
from trl_parm.reward_models import ModelReward, RewardSource

from .decoding import ANY, SAME_OBJECTIVES, Batch, ModelAt, Run
from .engines import TRANSFORMERS, VLLM
from .models import (
    Guide,
    Models,
    adapter_config,
    backbone_name,
    canonical,
    check_readable,
    own_prompt,
    prompt_with_preference,
    read_config,
)


REVERSE_KL = "reverse_kl"
HERE = (TRANSFORMERS,)
"""The engines of methods that are no sums."""
MODELS = ("arm", "arms", "policies", "policy", "reference")
"""Settings that name models, one or one for each objective."""
OF_OBJECTIVES = ("arms", "policies", "rewards")
"""Settings with one for each objective."""


@dataclass(frozen=True)
class Method:
    """A row of the table of methods.

    Args:
        title (`str`): Its name in tables and figures, if no other is given.
        make (`Callable`): Takes [`Models`] and settings by keyword, and gives the model for each [`Batch`].
        control (`bool`, *optional*, defaults to `False`): Whether it has no preference.
        together (`str`, *optional*): Which preferences may be decoded in one batch, see [`Run`]. Where there is a
            model for each objective, those that leave the same ones out, which then cost nothing.
        extrapolates (`bool`, *optional*, defaults to `True`): Whether it has a meaning at weights off the simplex.
        engines (`tuple[str, ...]`, *optional*): What decodes it; vLLM does if it is, with some settings, a weighted
            sum of log-probabilities over one prompt.
    """

    title: str
    make: Callable[..., ModelAt]
    control: bool = False
    together: str | None = None
    extrapolates: bool = True
    engines: tuple[str, ...] = (TRANSFORMERS, VLLM)


@dataclass(frozen=True)
class Entry:
    """A method of a configuration, such as `{method: parm, name: PARM, arm: runs/arm, beta: 1.0}`."""

    name: str
    method: Method
    settings: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, given: Mapping[str, Any] | str) -> Entry:
        """From what stands in YAML. Raises `ValueError` for an unknown method, unknown or missing settings, neither or
        both of `arm` and `arms`, a wrong β or a wrong divergence."""
        settings = {"method": given} if isinstance(given, str) else dict(given)
        key = settings.pop("method", None)
        if not isinstance(key, str) or key not in METHODS:
            raise ValueError(f"A method is {key!r}, but it must be one of {', '.join(METHODS)}.")
        method = METHODS[key]
        name = settings.pop("name", method.title)
        _, *known = inspect.signature(method.make).parameters.values()
        allowed = [setting.name for setting in known]
        missing = [s.name for s in known if s.default is inspect.Parameter.empty and s.name not in settings]
        unknown = [setting for setting in settings if setting not in allowed]
        if missing or unknown:
            faults = [f"{verb} {', '.join(names)}" for verb, names in (("has no", missing), ("has", unknown)) if names]
            raise ValueError(
                f"The method {name!r} {' and '.join(faults)}. Its settings are {', '.join(allowed) or 'nothing'}."
            )
        if not isinstance(name, str):
            raise ValueError(f"The `name` of a method is {name!r}, but it must be a text.")
        settings = check_fields(settings, method.make, f"The method {name!r}")
        if {"arm", "arms"} <= set(allowed) and (settings.get("arm") is None) == (settings.get("arms") is None):
            raise ValueError(f"`{key}` needs either `arm`, a preference-aware one, or `arms`, one for each objective.")
        guidance_strength(settings.get("beta", 1.0))
        check_divergence(settings.get("divergence", REVERSE_KL), settings.get("order", 1.0))
        return cls(name, method, settings)

    def configuration(self, base: str | None = None) -> dict[str, Any]:
        """What its rows depend on beside the base model: its settings, and what its models and rewards are now."""
        found = {"make": self.method.make.__name__, **self.settings}
        found |= {name: with_fingerprints(found[name], base) for name in MODELS if name in found}
        if "rewards" in found:
            found["rewards"] = {
                name: RewardSource.of(r).configuration() for name, r in self.settings["rewards"].items()
            }
        return found

    def runs(self, preferences: Sequence[Preference], allow_off_simplex: bool = False) -> list[Run]:
        """One run for each preference, or one for a control."""
        if self.method.control:
            return [Run(self.name)]
        together = self.method.together
        return [Run(self.name, one, together=together, allow_off_simplex=allow_off_simplex) for one in preferences]

    def make(self, models: Models) -> ModelAt:
        """The method, with what it needs loaded by `models`."""
        return self.method.make(models, **self.settings)

    def check_engine(self, engine: str) -> None:
        """Raises `ValueError` for an engine that can't decode the method."""
        if engine not in self.method.engines:
            raise ValueError(
                f"The method {self.name!r} can't run on {engine}, which decodes weighted sums of log-probabilities "
                f"over one prompt alone. Use `engine: {' or '.join(self.method.engines)}` for it."
            )

    def check_models(self, objectives: Sequence[str], base: str) -> None:
        """Raises `ValueError` for a model or a reward without a configuration, or models that are for other objectives
        than these; it loads no weights."""
        for value in (self.settings[setting] for setting in MODELS if self.settings.get(setting) is not None):
            for name in value.values() if isinstance(value, Mapping) else [value]:
                check_readable(name, base)
        for source in map(RewardSource.of, self.settings.get("rewards", {}).values()):
            if source.is_model:
                read_config(source.source, "reward model")
        found = self.objectives()
        if found is not None and not self.method.control and set(found) != set(objectives):
            raise ValueError(
                f"The method {self.name!r} has models for {', '.join(found)}, but the objectives are "
                f"{', '.join(objectives)}. Both must be the same."
            )

    def objectives(self) -> list[str] | None:
        """Which its models are for, by their configurations; `None` where that does not matter.

        Raises:
            ValueError: an ARM without a preference where it needs one.
        """
        if found := next((self.settings[name] for name in OF_OBJECTIVES if self.settings.get(name) is not None), None):
            return list(found)
        arm = self.settings.get("arm")
        if arm is None or self.method.make is untrained_arm:
            return None
        if self.method.make is parm_prompt:
            return list(PreferenceText.load(arm).objectives)
        found = adapter_config(arm)
        if not isinstance(found, PreferenceConfig):
            raise ValueError(
                f"The method {self.name!r} needs an ARM with a preference, but {arm!r} is none: it is an adapter of "
                f"the kind {found.peft_type}."
            )
        return found.objectives

    def check_extrapolates(self, preferences: Sequence[Preference], objectives: Sequence[str]) -> None:
        """Raises `ValueError` for a preference off the simplex where the method has no meaning there."""
        mean = self.settings.get("divergence", REVERSE_KL) != REVERSE_KL  # of positive weights
        if self.method.control or (self.method.extrapolates and not mean):
            return
        for preference in preferences:
            try:
                as_preference(preference, objectives)
            except ValueError:
                weights = as_preference(preference, objectives, allow_off_simplex=True).tolist()
                raise ValueError(
                    f"The method {self.name!r} has no meaning at the weights {weights}, which are off the simplex. "
                    "Leave it or them out."
                ) from None


def with_fingerprints(value: Any, base: str | None = None) -> Any:
    """Names of models, each with a hash of its folder or its commit on the Hub beside it; of adapters those of their
    backbone too, unless that is the base model."""
    if isinstance(value, Mapping):
        return {key: with_fingerprints(entry, base) for key, entry in value.items()}
    found = known_by(value) if isinstance(value, str) else None
    if found is None:
        return value
    backbone = backbone_name(value)
    other = backbone is not None and (base is None or canonical(backbone) != canonical(base))
    return {"path": value, "fingerprint": found, **({"backbone": with_fingerprints(backbone)} if other else {})}


def base_model(models: Models) -> ModelAt:
    """The frozen base model alone: log π_base."""
    return lambda batch: models.base


def untrained_arm(models: Models, arm: str, beta: float = 1.0, template: str | None = None) -> ModelAt:
    """log π_base + 1/β · log π of the ARM's backbone: the sharpening of PARM and GenARM without any preference."""
    guide = models.guide(arm, template)
    return _guided(models, [guide], lambda batch: BASE + _strength(batch, beta) * guide.lm(untrained=True))


def parm(models: Models, arm: str, beta: float = 1.0, template: str | None = None) -> ModelAt:
    """log π_base + 1/β · log π_ARM(α), for every preference-conditioned adapter."""
    guide = models.guide(arm, template)
    return _guided(models, [guide], lambda batch: BASE + _strength(batch, beta) * guide.lm_at(batch))


def parm_prompt(models: Models, arm: str, beta: float = 1.0, template: str | None = None) -> ModelAt:
    """log π_base + 1/β · log π_ARM of prompts that begin with α as text: an ARM that was trained to read it there."""
    guide, text = models.guide(arm, template), PreferenceText.load(arm)

    def model_at(batch: Batch) -> tuple[Guided, dict[str, Any]]:
        formula = BASE + _strength(batch, beta) * guide.lm()
        return Guided(models.base, formula), prompt_with_preference(guide, batch, text) if batch.prompts else {}

    return model_at


def parm_shuffled(models: Models, arm: str, beta: float = 1.0, template: str | None = None) -> ModelAt:
    """PARM whose ARM gets a permuted α: each objective has the weight of the one after it, the last that of the first.

    A control: its strength and sharpening are PARM's, and it follows the preference no more than by chance.
    """
    guide = models.guide(arm, template)

    def formula(batch: Batch) -> Scorer:
        weights = cast(dict[str, float], batch.weights)  # one preference at a time
        values = list(weights.values())
        shifted = dict(zip(weights, values[1:] + values[:1], strict=True))
        return BASE + _strength(batch, beta) * guide.lm(shifted, allow_off_simplex=batch.allow_off_simplex)

    return _guided(models, [guide], formula)


def arm_alone(models: Models, arm: str, template: str | None = None) -> ModelAt:
    """log π_ARM(α): the ARM decodes alone, in the place of the base model whose vocabulary it has."""
    guide = models.guide(arm, template)
    return _guided(models, [guide], lambda batch: guide.lm_at(batch))


def genarm(models: Models, arms: dict[str, str], beta: float = 1.0, template: str | None = None) -> ModelAt:
    """log π_base + Σ α_i/β · log π_i."""
    guides = {objective: models.guide(name, template) for objective, name in arms.items()}

    def formula(batch: Batch) -> Scorer:
        return formulas.genarm(
            *_weighted(guides, batch), batch.beta_or(beta), allow_off_simplex=batch.allow_off_simplex
        )

    return _guided(models, guides.values(), formula)


def mod(
    models: Models,
    policies: dict[str, str],
    divergence: str = REVERSE_KL,
    order: float = 1.0,
    template: str | None = None,
) -> ModelAt:
    """Σ α_i · log π_i, or a power mean for other divergences."""
    guides = {objective: models.guide(name, template) for objective, name in policies.items()}

    def formula(batch: Batch) -> Scorer:
        scorers, weights = _weighted(guides, batch)
        return formulas.mod(scorers, weights, divergence, order, allow_off_simplex=batch.allow_off_simplex)

    return _guided(models, guides.values(), formula)


def mod_w2s(models: Models, policies: dict[str, str], reference: str, template: str | None = None) -> ModelAt:
    """log π_base + Σ α_i (log π_i − log π_ref), in our reading; the reference is mostly the policies' backbone."""
    guides = {objective: models.guide(name, template) for objective, name in policies.items()}
    untuned = models.guide(reference, template)

    def formula(batch: Batch) -> Scorer:
        scorers, weights = _weighted(guides, batch)
        return formulas.mod_w2s(scorers, untuned.lm(), weights, allow_off_simplex=batch.allow_off_simplex)

    return _guided(models, [*guides.values(), untuned], formula)


def cage(
    models: Models,
    arm: str | None = None,
    arms: dict[str, str] | None = None,
    tau: float = 0.1,
    k: int = 50,
    rounds: int = 5,
    template: str | None = None,
) -> ModelAt:
    """The equilibrium of objectives that pay for tokens: one ARM at its vertices, or an ARM for each objective."""
    guides = {objective: models.guide(name, template) for objective, name in (arms or {"": arm or ""}).items()}

    def formula(batch: Batch) -> Scorer:
        if arms is not None:
            return formulas.cage(*_weighted(guides, batch), tau, k, rounds)
        weights = cast(dict[str, float], batch.weights)  # one preference at a time
        principals = {one: guides[""].lm({other: float(other == one) for other in weights}) for one in weights}
        return formulas.cage(principals, list(weights.values()), tau, k, rounds)

    return _guided(models, guides.values(), formula)


def worst_case(
    models: Models,
    arm: str | None = None,
    arms: dict[str, str] | None = None,
    beta: float = 1.0,
    template: str | None = None,
) -> ModelAt:
    """PARM or GenARM at the weights that are worst for the decoder, at every token: it has no preference."""
    if arms is not None:
        guides = {objective: models.guide(name, template) for objective, name in arms.items()}
        scorers = {objective: guide.lm() for objective, guide in guides.items()}
    else:
        guides = {"": models.guide(arm or "", template)}
        objectives = get_objectives(guides[""].model, guides[""].adapter_name)
        scorers = {one: guides[""].lm({other: float(other == one) for other in objectives}) for one in objectives}
    return _guided(models, guides.values(), lambda batch: formulas.genarm(scorers, "worst_case", batch.beta_or(beta)))


def args(models: Models, rewards: dict[str, Any], weight: float = 1.5, k: int = 10, cached: bool = False) -> ModelAt:
    """log π_base + w · Σ α_i R_i on the k best tokens. `cached` lets a classifier read the base model's own tokens,
    each prefix once, where it has the same tokenizer and template."""
    return _search(models, rewards, weight, k, cached)


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
    return _search(models, rewards, weight, k, cached, Rollout(models.apart(policy), rollout_tokens))


def rewarded_soups(models: Models, policies: dict[str, str]) -> ModelAt:
    """The model with weights Σ α_i θ_i: of whole models, or of LoRAs on one backbone."""
    owner: Any = None
    if any(backbone_name(policy) for policy in policies.values()):
        adapters = {objective: models.adapter(policy) for objective, policy in policies.items()}
        owners = [model for model, _ in adapters.values()]
        for policy, one in zip(policies.values(), owners):
            models.check_tokens(policy, one)
        owner, named = owners[0], {objective: name for objective, (_, name) in adapters.items()}
        if any(other is not owner for other in owners):
            raise ValueError("The LoRAs of a soup need one backbone. Tune all of them from one model.")
    else:
        named = {objective: models.apart(policy) for objective, policy in policies.items()}
    made: dict[tuple, Any] = {}

    def model_at(batch: Batch) -> Any:
        weights = tuple(_ordered(batch, named))
        if weights not in made:
            made.clear()  # the soup before goes first
            if owner is not None:
                owner.base_model.set_adapter([])
            allow = batch.allow_off_simplex
            made[weights] = rewarded_soup(cast(dict, named), weights, owner, allow_off_simplex=allow)
        return made[weights]

    return model_at


METHODS = {
    "base": Method("Base", base_model, control=True),
    "untrained_arm": Method("Base × untrained ARM", untrained_arm, control=True),
    "parm": Method("PARM", parm, together=ANY),
    "parm_shuffled": Method("PARM, α permuted", parm_shuffled),
    "arm_alone": Method("ARM alone", arm_alone, together=ANY),
    "parm_prompt": Method("PARM, α in the prompt", parm_prompt, together=ANY, engines=HERE),
    "svd_lora": Method("SVD-LoRA", parm, together=ANY),
    "uniarm": Method("UniARM", parm, together=ANY),
    "genarm": Method("GenARM", genarm, together=SAME_OBJECTIVES),
    "mod": Method("MOD", mod, together=SAME_OBJECTIVES),
    "mod_w2s": Method("MOD-w2s", mod_w2s, together=SAME_OBJECTIVES),
    "cage": Method("CAGE", cage, extrapolates=False, engines=HERE),
    "worst_case": Method("Worst case", worst_case, control=True, engines=HERE),
    "args": Method("ARGS", args, together=SAME_OBJECTIVES, extrapolates=False, engines=HERE),
    "transfer_q": Method("Transfer-Q", transfer_q, together=SAME_OBJECTIVES, extrapolates=False, engines=HERE),
    "rewarded_soups": Method("Rewarded Soups", rewarded_soups),
}
"""All methods by the name that a configuration gives."""


def _guided(models: Models, guides: Iterable[Guide], formula: Callable[[Batch], Scorer]) -> ModelAt:
    """The base model by a formula of guides, and the prompt that they read in the place of its own."""
    return lambda batch: (Guided(models.base, formula(batch)), own_prompt(guides, batch))


def _strength(batch: Batch, beta: float) -> Weight:
    """1/β of a batch."""
    return guidance_strength(batch.beta_or(beta))


def _weighted(guides: Mapping[str, Guide], batch: Batch) -> tuple[dict[str, Scorer], list]:
    """log π of each guide, and α in their order."""
    return {objective: guide.lm() for objective, guide in guides.items()}, _ordered(batch, guides)


def _ordered(batch: Batch, models: Mapping[str, Any]) -> list:
    """α in the order of models by objective, or a list of those of all rows. Raises `ValueError` if they are not for
    the same objectives."""
    rows = batch.weights if isinstance(batch.weights, list) else [batch.weights]
    if set(rows[0]) != set(models):
        raise ValueError(
            f"A method has models for {', '.join(models)}, but the objectives are {', '.join(rows[0])}. Give "
            "one for each objective."
        )
    found = [[weights[objective] for objective in models] for weights in rows]
    return found if isinstance(batch.weights, list) else found[0]


def _search(
    models: Models, rewards: Mapping[str, Any], weight: float, k: int, cached: bool, rollout: Rollout | None = None
) -> ModelAt:
    judges: dict[str, Any] = {}
    for objective, given in rewards.items():
        source = RewardSource.of(given)
        reward = source.load()
        if isinstance(reward, ModelReward):
            models.keep(reward.model)
        if cached and (source.negate or not isinstance(reward, ModelReward)):
            kind = "a cost, minus its output" if source.negate else "a function"
            raise ValueError(f"`cached` is for classifiers, but the reward {source.source!r} is {kind}.")
        if cached:
            models.check_tokens(source.source, reward.model, reward.tokenizer)
        judges[objective] = ClassifierReward(reward.model, source.label) if cached else reward

    def model_at(batch: Batch) -> Guided:
        # Rewards of texts get the prompts as they are given, without the base model's template.
        judged = {
            objective: judge if cached else TextReward(judge, models.tokenizer, batch.prompts, objective)
            for objective, judge in judges.items()
        }
        return Guided(models.base, formulas.args(judged, _ordered(batch, judges), weight, k, rollout=rollout))

    return model_at
