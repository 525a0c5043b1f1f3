# SPDX-License-Identifier: Apache-2.0
"""A language model as a term of a formula: data that says what is to be read, without any state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from typing import Any, cast

import torch
from peft import PeftModel
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from peft_pblora import as_preference, get_objectives
from peft_pblora.condition import Condition
from peft_pblora.control import has_preference
from peft_pblora.kv_cache import takes_cache
from peft_pblora.layer import preference_layers
from peft_pblora.preference import Preference
from peft_pblora.switch import AdapterSwitch, backbone_of, check_below
from trl_parm.algebra import Scorer, Step

from .vocabulary import Vocabulary


OTHERS = (
    "If the tokenizers of base and guide are of one family, pass `vocabulary=Vocabulary(base_tokenizer, "
    "guide_tokenizer)`. Where an assistant with a tokenizer of its own is what asks, use a guided model such as "
    "`PARM(base, ...)` in the place of a processor: it does not guide the assistant."
)
"""What to do about models of several vocabularies."""


@dataclass(frozen=True, eq=False, repr=False)
class LM(Scorer):
    """log π of a second language model given the tokens so far.

    It is frozen: nothing of the model changes when it is made, and what it says follows from its arguments and the
    model's weights. Two of them are equal, and run once in a formula, if their arguments are.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            A causal language model. It may be an adapter on the model that generates: the base model is then read
            without it. A model that others have put adapters into needs `adapter_name` or `disable_adapter`.
        preference (`Mapping[str, float]`, `Sequence[float]` or `torch.Tensor`, *optional*):
            The preference of the model's adapter; the one set in the model when it is read if not given. A tensor of
            shape `(rows, k)` holds one for each row of the batch; `generate` may repeat rows.
        adapter_name (`str`, *optional*): Which of the model's adapters to use; the active ones if not given.
        disable_adapter (`bool`, *optional*, defaults to `False`):
            Use the model without that adapter: for an ARM, the untrained ARM.
        vocabulary ([`Vocabulary`], *optional*): Aligns the tokens of two vocabularies that differ.
        shared_forward (`bool`, *optional*): Without effect since 0.2, see [`Guided`].
        allow_off_simplex (`bool`, *optional*, defaults to `False`): As in [`as_preference`].

    Attributes:
        adapter_names (`tuple[str, ...]`): The adapters that are meant.
        adapters (`tuple[str, ...]`): Those of them that act; none with `disable_adapter`.
        condition (`Condition` or `None`): The preference, if one was given, as adapters take it.
        backbone (`PreTrainedModel`): The transformer, below any `PeftModel`.

    Raises:
        ValueError: a model that is no causal language model with a key-value cache, one that others have put adapters
            into without a word on which is meant, an unknown adapter, or an invalid preference.
    """

    model: Any
    preference: Preference | None = None
    adapter_name: str | None = None
    disable_adapter: bool = False
    vocabulary: Vocabulary | None = None
    shared_forward: InitVar[bool | None] = None
    allow_off_simplex: bool = False
    adapter_names: tuple[str, ...] = field(init=False)
    condition: Condition | None = field(init=False, default=None)
    _key: tuple = field(init=False)

    def __post_init__(self, shared_forward: bool | None = None) -> None:
        check_guide(self.model, self.backbone)
        names = _named_adapters(self.model, self.adapter_name, self.disable_adapter)
        object.__setattr__(self, "adapter_names", names)
        if self.disable_adapter and not self.adapter_names:
            raise ValueError("`disable_adapter=True` needs a model with an adapter, but the guiding model has none.")
        if self.disable_adapter:
            check_below(self.model)
        α = None
        if self.preference is not None:
            objectives = self._objectives()
            # A copy, which nobody else can change.
            α = as_preference(self.preference, objectives, allow_off_simplex=self.allow_off_simplex).clone()
            object.__setattr__(self, "preference", α)
            object.__setattr__(self, "condition", Condition.fixed(objectives, α))
        values = None if α is None else (tuple(α.shape), *α.flatten().tolist())
        object.__setattr__(self, "_key", (id(self.backbone), self.adapters, values, id(self.vocabulary)))

    @property
    def backbone(self) -> Any:
        """The transformer, below any `PeftModel`."""
        return backbone_of(self.model)

    @property
    def adapters(self) -> tuple[str, ...]:
        """The adapters that act."""
        return () if self.disable_adapter else self.adapter_names

    @property
    def embeddings(self) -> int | None:
        """How many tokens the model can read, if its embeddings say so."""
        return getattr(self.backbone.get_input_embeddings(), "num_embeddings", None)

    @property
    def rows(self) -> int:
        """How many rows were given a preference of their own; 1 if all have the same."""
        α = self.preference
        return len(α) if isinstance(α, torch.Tensor) and α.ndim == 2 else 1

    @classmethod
    def of_base(cls, base: Any, adapters: Sequence[str]) -> LM:
        """The model that generates, or a policy, with these of its adapters; any architecture."""
        term = object.__new__(cls)
        key = id(backbone_of(base)), tuple(adapters), None, id(None)
        values = dict(
            model=base, preference=None, condition=None, adapter_name=None, disable_adapter=False, vocabulary=None
        )
        for name, value in (values | {"adapter_names": tuple(adapters), "_key": key}).items():
            object.__setattr__(term, name, value)
        return term

    def models(self) -> Iterator[Any]:
        yield self.model

    def row_counts(self) -> Iterator[int]:
        yield self.rows
        for layer in preference_layers(self.backbone) if self.preference is None else ():
            yield from (layer.adapter(name).condition.rows for name in self.adapters if name in layer.adapters)

    def __call__(self, step: Step) -> torch.Tensor:
        return step.answers[self]

    def log_probs(self, logits: torch.Tensor, size: int) -> torch.Tensor:
        """log π in the base model's vocabulary, of `size` tokens. Raises `ValueError` if that is another one."""
        found = torch.log_softmax(logits.float(), dim=-1)
        if self.vocabulary is not None:
            return self.vocabulary.to_base(found, size)
        if found.shape[-1] != size:
            raise ValueError(
                f"The guiding model has a vocabulary of {found.shape[-1]}, but the base model one of {size}. {OTHERS}"
            )
        return found

    def check_ids(self, ids: torch.Tensor) -> None:
        """Raises `ValueError` for tokens `(rows, length)` that the model has no embeddings for."""
        if self.embeddings is not None and bool((ids >= self.embeddings).any()):
            raise ValueError(
                f"The guiding model has a vocabulary of {self.embeddings}, but is to read the token {int(ids.max())}. "
                f"{OTHERS}"
            )

    def __reduce__(self) -> tuple:
        # The adapters that are meant stay the same, whatever is active in the copy's model.
        name = self.adapter_names[0] if len(self.adapter_names) == 1 else self.adapter_name
        off = self.disable_adapter or not self.adapter_names and bool(_adapters_put_into(self.model))
        given = self.model, self.preference, name, off, self.vocabulary
        return LM, (*given, None, self.allow_off_simplex)

    def _objectives(self) -> list[str]:
        if self.disable_adapter or not has_preference(self.model):
            raise ValueError(
                "`preference` was given, but the guiding model has no preference-conditioned adapter. Load one with "
                "`PeftModel.from_pretrained` after `import peft_pblora`, or leave `preference` out."
            )
        name = self.adapter_names[0] if len(self.adapter_names) == 1 else None
        return get_objectives(self.model, name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LM) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        name = getattr(self.model, "name_or_path", "") or type(self.model).__name__
        details = []
        if len(self.adapter_names) == 1 and self.adapter_names != ("default",):
            details.append(self.adapter_names[0])
        if self.disable_adapter:
            details.append("adapter off")
        if self.rows > 1:
            details.append(f"a preference for each of {self.rows} rows")
        elif self.condition is not None:
            named = zip(self.condition.objectives, self.condition.preference.flatten().tolist(), strict=True)
            details.append(", ".join(f"{objective}={weight:g}" for objective, weight in named))
        return f"LM({', '.join([name, *details])})"


def untuned(model: Any, **guide: Any) -> LM:
    """The model that others were tuned from: without the adapters, where they were put into it."""
    return LM(model, disable_adapter=bool(_adapters_put_into(model)), **guide)


def _named_adapters(model: Any, name: str | None, off: bool) -> tuple[str, ...]:
    """The adapter of this name; without a name, the active ones of a model, or those that a `PeftModel` is set to."""
    switch = AdapterSwitch.of(backbone_of(model))
    if name is not None:
        return tuple(switch.chosen(name))
    if found := _adapters_put_into(model):
        if off:
            return found
        raise ValueError(
            f"The guiding model is a {type(model).__name__} into which the adapters {list(found)} were put, so that "
            "it may be meant with them or without. Pass the `PeftModel`, name one with `adapter_name`, or pass "
            "`disable_adapter=True` to guide with the model without adapters."
        )
    known = switch.names
    # A processor makes adapters inactive in the layers; what a `PeftModel` is set to stays.
    active = model.active_adapters if isinstance(model, PeftModel) else switch.active
    found = tuple(name for name in active if name in known)
    if known and not found:
        raise ValueError(
            f"The guiding model has the adapters {known}, but none is active. Name one with `adapter_name`, or pass "
            "`disable_adapter=True` with any of them to guide with the model without adapters."
        )
    return found


def _adapters_put_into(model: Any) -> tuple[str, ...]:
    """The adapters of a model that knows nothing of them: a `PeftModel` has it, or they were put into its layers."""
    if isinstance(model, PeftModel) or getattr(model, "_hf_peft_config_loaded", False):
        return ()
    return tuple(AdapterSwitch.of(model).names)


def check_guide(model: Any, backbone: PreTrainedModel) -> None:
    """Raises `ValueError` unless a model, whose transformer is `backbone`, is a causal LM with a key-value cache."""
    if backbone.config.is_encoder_decoder:
        raise ValueError("The guiding model is an encoder-decoder model. Only causal language models can guide.")
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        raise ValueError("The guiding model is tuned by prompt learning. Only adapters on its layers can guide.")
    for name, config in getattr(backbone, "peft_config", {}).items():
        if getattr(config, "alora_invocation_tokens", None):
            raise ValueError(
                f"The guiding model has the adapter {name!r}, an activated LoRA, which acts after its invocation "
                "tokens alone, where `PeftModel` looks for them. Use an adapter that acts on the whole text."
            )
    if backbone.get_output_embeddings() is None:
        raise ValueError(f"The guiding model is a {type(backbone).__name__}, but it must be a causal language model.")
    layers = DynamicCache(config=backbone.config.get_text_config()).layers
    recurrent = layers and not any(isinstance(layer, CacheLayerMixin) for layer in layers)
    if recurrent or not takes_cache(backbone) or not cast(Any, backbone)._supports_default_dynamic_cache():
        raise ValueError(
            f"The guiding model is a {type(backbone).__name__}, which has no key-value cache of transformers' default "
            "kind. Use another transformer as the guide."
        )


def check_base(base: Any, adapters: Sequence[str]) -> None:
    """Raises `ValueError` for a base model with a tuned prompt, or an activated LoRA among the adapters that act: both
    act in a `PeftModel`'s own calls alone."""
    known = getattr(base, "peft_config", {})
    found = [name for name, config in known.items() if config.is_prompt_learning]
    found += [name for name in adapters if getattr(known.get(name), "alora_invocation_tokens", None)]
    if found:
        raise ValueError(
            f"The base model has the adapter {found[0]!r}, which is tuned by prompt learning or an activated LoRA, "
            "and would not act in a guided model. Use an adapter that acts on the whole text."
        )


def language_models(formula: Scorer, silent: bool = False) -> list[LM]:
    """The language models of a formula, each once; those of weight 0 only if the `silent` are wanted."""
    scorers = [*formula.scorers(), *(formula.silent() if silent else ())]
    return [scorer for scorer in dict.fromkeys(scorers) if isinstance(scorer, LM)]


def policies(formula: Scorer) -> list[LM]:
    """What a formula decodes further with, where it has adapters, each once."""
    found = (getattr(scorer, "policy", None) for scorer in (*formula.scorers(), *formula.silent()))
    return list(dict.fromkeys(term for term in found if term is not None and term.adapters))


def log_probs_of(answers: Mapping[LM, torch.Tensor], scores: torch.Tensor) -> dict[LM, torch.Tensor]:
    """What language models say by their logits: log π in the base model's vocabulary, where its `scores` are."""
    return {term: term.log_probs(logits, scores.shape[-1]).to(scores.device) for term, logits in answers.items()}


def check_formula(formula: Any) -> None:
    """Raises `TypeError` unless it is a scorer."""
    if not isinstance(formula, Scorer):
        raise TypeError(f"`formula` is a {type(formula).__name__}, but it must be a scorer such as BASE + LM(arm).")


def check_row_counts(formula: Scorer, prompts: int, others: Sequence[int] = ()) -> None:
    """Raises `ValueError` for anything that is given for other rows than the prompts: preferences, strengths and texts
    of a formula, or `others`, which are numbers of rows too."""
    for rows in (*formula.row_counts(), *others):
        if rows not in (1, prompts):
            raise ValueError(
                f"Preferences, strengths or prompts are given for {rows} rows, but the batch has {prompts}. Give one "
                "for each prompt, or one for all."
            )


def check_evaluates(model: Any) -> None:
    """Raises `ValueError` for a model in training mode: its dropout would act."""
    if model.training:
        raise ValueError(
            f"A {type(model).__name__} of the formula is in training mode, in which its dropout acts. Call "
            "`model.eval()` on it before it generates or guides."
        )
