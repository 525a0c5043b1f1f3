# SPDX-License-Identifier: Apache-2.0
"""Configurations of the preference-conditioned adapters."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import InitVar, dataclass, field, fields
from numbers import Integral, Real
from typing import Any, ClassVar, cast

import torch
from peft import PeftConfig, mapping

from .cores import Core, MoSLoraCore, PBLoraCore, SVDLoraCore
from .preference import as_preference, check_objectives


class PeftType(str):
    """The name of a method, in the place of a member of PEFT's closed enum `peft.PeftType`.

    PEFT only ever looks a type up in its registries, compares it, and reads `.value` or `str()`. Unlike an enum's
    member it can be unpickled in a process that knows nothing of the method yet.
    """

    @property
    def value(self) -> str:
        return str.__str__(self)

    name = value

    def __str__(self) -> str:
        return f"PeftType.{self.value}"


def _numbered(count: int) -> list[str]:
    """Names for objectives that have only a number."""
    return [f"objective_{i + 1}" for i in range(count)]


@dataclass
class PreferenceConfig(PeftConfig):
    """What every preference-conditioned adapter has in common; use a subclass such as [`PBLoraConfig`].

    Args:
        objectives (`list[str]`):
            Names of the objectives, in the order of the preference vector. They are stored in the adapter, so that
            `{"helpful": 0.7, "harmless": 0.3}` works wherever it travels.
        default_preference (`list[float]`, *optional*):
            The preference a freshly built or loaded model starts with. Uniform if not given.
        init_weights (`bool`, *optional*, defaults to `True`):
            Start as the identity (B is zero). `False` draws B at random, which is only useful in tests.
        bias (`str`, *optional*, defaults to `"none"`): `"none"`, `"all"`, or `"<method>_only"`.
        card (`dict`, *optional*):
            What the model card says beyond this configuration, see [`card.CardFacts`]; it travels with the adapter.
        target_modules, exclude_modules, modules_to_save, layers_to_transform, layers_pattern, fan_in_fan_out,
        lora_dropout (*optional*): As of [`peft.LoraConfig`].

    Raises:
        ValueError: values that contradict each other, are out of range or no numbers where these are needed, or
            `trainable_token_indices`, which TRL reads and these adapters do not support.
        RuntimeError: PEFT, or another package, has a method of this name.
    """

    method: ClassVar[PeftType | None] = None
    """The method's name in PEFT, given by [`register`], which also makes its tuner."""
    tuner_cls: ClassVar[Any] = None

    objectives: list[str] = field(default_factory=lambda: _numbered(2))
    default_preference: list[float] | None = None
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    modules_to_save: list[str] | None = None
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    card: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = cast(Any, self.method)
        owner = cast(Any, mapping.PEFT_TYPE_TO_CONFIG_MAPPING).get(self.method, type(self))
        if not isinstance(self, owner):
            raise RuntimeError(
                f"PEFT's method {self.method!r} belongs to {owner.__module__}.{owner.__name__}, not to "
                f"{type(self).__module__}. Use {owner.__name__}, or a PEFT version without a method of that name."
            )
        self.objectives = check_objectives(self.objectives)
        if self.default_preference is not None:
            self.default_preference = as_preference(self.default_preference, self.objectives).tolist()
        for name in ("target_modules", "exclude_modules"):
            if isinstance(modules := getattr(self, name), list):
                setattr(self, name, set(modules))
        if self.trainable_token_indices is not None:
            raise ValueError("`trainable_token_indices` is not supported by preference-conditioned adapters.")
        self._check_numbers()
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"`lora_dropout` is {self.lora_dropout}, but it must lie in [0, 1).")
        for name in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and getattr(self, name) is not None:
                raise ValueError(f"`{name}` cannot be used when `target_modules` is a str.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")
        with torch.device("meta"):  # without memory or random numbers
            self.check_core()
        if not 0 < abs(self.scaling) < math.inf:
            raise ValueError(
                f"The scaling is {self.scaling}, with which the adapter does nothing. Change `lora_alpha`."
            )

    def _check_numbers(self) -> None:
        """Raises `ValueError` for a rank or size that is no whole number, or another number that is none."""
        kinds: dict[Any, tuple[Any, str]] = {int: (Integral, "a whole number"), float: (Real, "a number")}
        for one in fields(self):
            kind, called = kinds.get(one.type, (object, ""))
            value = getattr(self, one.name)
            if called and (not isinstance(value, kind) or isinstance(value, bool)):
                raise ValueError(f"`{one.name}` is {value!r}, but it must be {called}.")

    @property
    def initial_preference(self) -> list[float]:
        """The preference a model starts with: `default_preference`, or uniform."""
        return self.default_preference or [1 / len(self.objectives)] * len(self.objectives)

    @staticmethod
    def rename_tensors(tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """Gives tensors of a file the names that they have here; ours keep theirs."""
        return tensors

    def check_core(self) -> None:
        """Raises `ValueError` for sizes that a core can't have."""
        self.build_core()

    def build_core(self) -> Core:
        """A fresh core, the module that computes W(α). Raises `ValueError` for sizes that it can't have."""
        raise NotImplementedError

    @property
    def scaling(self) -> float:
        """The factor s of ΔW(α) = s · B W(α) A."""
        raise NotImplementedError


@dataclass
class PBLoraConfig(PreferenceConfig):
    """Preference-aware bilinear LoRA (PARM, ICML 2025, arXiv 2505.06274).

        y = W0 x + s · B blockdiag(W1, reshape(α φ, r2, r2)) A x,   s = lora_alpha / r2

    Args:
        r1 (`int`, *optional*, defaults to 4): Rank of the preference-agnostic block; 0 leaves it out.
        r2 (`int`, *optional*, defaults to 4): Rank of the preference-aware block; 0 leaves it out.
        lora_alpha (`float`, *optional*, defaults to 8):
            The scaling s is `lora_alpha / r2` on both blocks, or `lora_alpha / r1` where `r2` is 0.
        disjoint_start (`bool`, *optional*, defaults to `False`):
            Start as k LoRAs side by side, with `r1=0`: φ_i is the identity on its own part of the r2 dimensions and
            zero elsewhere. Our own option; docs/training.md has what it did.

    The other arguments are those of [`PreferenceConfig`]. Adapters of the authors' code load as they are, with their
    order of the objectives, which they know by number only: `obj_num` and `pref_vec_init` stand for `objectives` and
    `default_preference`. Name them by setting `config.objectives` before loading, or by an entry `objectives` in their
    `adapter_config.json`. In their safety task the order is harmlessness, helpfulness.
    """

    r1: int = 4
    r2: int = 4
    lora_alpha: float = 8
    disjoint_start: bool = False
    # Keys of the authors' adapter_config.json, translated and not kept.
    obj_num: InitVar[int | None] = None
    pref_vec_init: InitVar[list[float] | None] = None

    def __post_init__(self, obj_num: int | None = None, pref_vec_init: list[float] | None = None) -> None:
        if obj_num is not None:
            if not isinstance(obj_num, Integral):
                raise ValueError(f"`obj_num` is {obj_num!r}, but it must be a whole number, of the objectives.")
            if self.objectives == _numbered(2):  # none were given
                self.objectives = _numbered(obj_num)
            if len(self.objectives) != obj_num:
                raise ValueError(
                    f"`objectives` names {list(self.objectives)}, but the adapter has `obj_num` {obj_num}. Name every "
                    "objective, in the adapter's order."
                )
            if pref_vec_init is not None and self.default_preference is None:
                try:
                    self.default_preference = as_preference(pref_vec_init, self.objectives).tolist()
                except (TypeError, ValueError) as error:
                    warnings.warn(f"The adapter's `pref_vec_init` is not used: {error}", stacklevel=3)
        super().__post_init__()

    @staticmethod
    def rename_tensors(tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """Also gives the authors' tensors our names, `pblora_adapter.A.weight` for `pblora_A`."""
        ours = {"A": "A.weight", "B": "B.weight", "W1": "core.W1", "W2": "core.W2"}
        renamed = {}
        for key, value in tensors.items():
            stem, _, part = key.removesuffix(".weight").rpartition(".pblora_")
            renamed[f"{stem}.pblora_adapter.{ours[part]}" if part in ours else key] = value
        return renamed

    def build_core(self) -> PBLoraCore:
        return PBLoraCore(len(self.objectives), self.r1, self.r2, self.disjoint_start)

    @property
    def scaling(self) -> float:
        return self.lora_alpha / (self.r2 or self.r1)


@dataclass
class SVDLoraConfig(PreferenceConfig):
    """SVD-LoRA (Panacea, NeurIPS 2024, arXiv 2402.02030).

        y = W0 x + s · B diag(σ_1..σ_r, c·α_1..c·α_k) A x,   s = lora_alpha / r

    Args:
        r (`int`, *optional*, defaults to 8): Number of preference-agnostic singular values; the rank is r + k.
        lora_alpha (`float`, *optional*, defaults to 16): The scaling s is `lora_alpha / r`, or itself where r is 0.

    The other arguments are those of [`PreferenceConfig`].
    """

    r: int = 8
    lora_alpha: float = 16

    def build_core(self) -> SVDLoraCore:
        return SVDLoraCore(len(self.objectives), self.r)

    @property
    def scaling(self) -> float:
        return self.lora_alpha / (self.r or 1)


@dataclass
class MoSLoraConfig(PreferenceConfig):
    """MoSLoRA (UniARM, arXiv 2602.09538), in our reading of the paper's description.

        y = W0 x + s · B [(1 + γ) ⊙ A x + δ],   [γ, δ] = M Σ_i α_i o_i,   s = lora_alpha / r

    The shift δ makes the map affine: merging carries it in the layer's bias, and so does the export to LoRA.

    Args:
        r (`int`, *optional*, defaults to 8): Rank.
        lora_alpha (`float`, *optional*, defaults to 16): The scaling s is `lora_alpha / r`.
        embedding_size (`int`, *optional*, defaults to 0):
            Size d of the learned objective embeddings o; 0 uses the preference itself, with which short trainings
            hardly learn to follow α: M's gradient is zero while B is, and what objectives that disagree ask of B
            cancels over α. The larger d, the faster M changes γ and δ, and the smaller the learning rate it bears.
        objective_descriptions (`dict[str, str]`, *optional*):
            A text for each objective, such as `{"helpful": "Answers the question in full."}`: o are frozen embeddings
            of these texts in the place of learned ones, as in UniARM. `objectives` are the keys if not given.
        objective_embeddings (`list[list[float]]`, *optional*):
            These embeddings, of shape `(k, d)`. [`embed_objectives`] makes them, and so does `PreferenceARMTrainer`;
            they are saved with the configuration, so that loading needs neither the texts' tokenizer nor model.

    The other arguments are those of [`PreferenceConfig`].

    Raises:
        ValueError: beside what [`PreferenceConfig`] raises, descriptions that are empty, missing or of no objective,
            embeddings that are not `(k, d)` finite numbers, or both kinds of embeddings.
    """

    r: int = 8
    lora_alpha: float = 16
    embedding_size: int = 0
    objective_descriptions: dict[str, str] | None = None
    objective_embeddings: list[list[float]] | None = None

    def __post_init__(self) -> None:
        if self.objective_descriptions is not None and self.objectives == _numbered(2):  # none were given
            self.objectives = list(self.objective_descriptions)
        super().__post_init__()
        if self.objective_descriptions is not None:
            texts = check_descriptions(self.objective_descriptions, self.objectives)
            self.objective_descriptions = {name: texts[name] for name in self.objectives}
        if self.embedding_size and (self.objective_descriptions or self.objective_embeddings) is not None:
            raise ValueError(
                f"`embedding_size` is {self.embedding_size}, the size of embeddings that are learned, but those of "
                "`objective_descriptions` are frozen and have the model's own size. Leave one of them out."
            )

    @property
    def lacks_embeddings(self) -> bool:
        """Whether descriptions are still to be embedded, see [`embed_objectives`]."""
        return self.objective_descriptions is not None and self.objective_embeddings is None

    def check_core(self) -> None:
        if self.objective_embeddings is not None:
            _check_embeddings(self.objective_embeddings, len(self.objectives))
        MoSLoraCore(len(self.objectives), self.r, self.embedding_size, self.objective_embeddings)

    def build_core(self) -> MoSLoraCore:
        if self.lacks_embeddings:
            raise ValueError(
                "`objective_descriptions` have no embeddings yet. Make the configuration with "
                "`embed_objectives(config, model, tokenizer)`, or give it to `PreferenceARMTrainer`, which does so."
            )
        return MoSLoraCore(len(self.objectives), self.r, self.embedding_size, self.objective_embeddings)

    @property
    def scaling(self) -> float:
        return self.lora_alpha / self.r


def check_descriptions(given: Any, objectives: list[str]) -> dict[str, str]:
    """The description of each objective. Raises `ValueError` unless there is a text for each, and for no other."""
    if not isinstance(given, Mapping) or set(given) != set(objectives):
        names = sorted(map(str, given)) if isinstance(given, Mapping) else given
        raise ValueError(
            f"`objective_descriptions` describes {names!r}, but the objectives are {objectives}. Give a mapping with "
            "a text for each of them."
        )
    for name, text in given.items():
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"The description of the objective {name!r} is {text!r}, but it must be a text.")
    return dict(given)


def _check_embeddings(given: Any, objectives: int) -> None:
    rows = given if isinstance(given, list) else []
    sizes = {len(row) for row in rows if isinstance(row, list)}
    numbers = [x for row in rows if isinstance(row, list) for x in row]
    whole = len(rows) == objectives and len(sizes) == 1 and sizes != {0} and all(isinstance(r, list) for r in rows)
    if not whole or not all(isinstance(x, int | float) and math.isfinite(x) for x in numbers):
        raise ValueError(
            f"`objective_embeddings` must be {objectives} lists of equally many finite numbers, one for each "
            "objective. Make them with `embed_objectives`."
        )
