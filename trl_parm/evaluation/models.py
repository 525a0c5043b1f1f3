# SPDX-License-Identifier: Apache-2.0
"""The base model, and beside it the models of one method at a time: adapters share a backbone where they can."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from textwrap import shorten
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BatchEncoding,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import find_adapter_config_file

from peft_pblora import load_adapter
from peft_pblora.loading import named_base
from peft_pblora.preference import Preference
from peft_pblora.switch import AdapterSwitch, backbone_of, changes_below
from trl_parm.cpu import optimize_loaded, products_of
from trl_parm.decoding import LM, Prompt, Vocabulary
from trl_parm.decoding.vocabulary import same_tokens
from trl_parm.identity import short_hash
from trl_parm.loading import load_whole
from trl_parm.preference_text import PreferenceText
from trl_parm.processes import Processes
from trl_parm.records import plain, recorded
from trl_parm.texts import PromptText

from .decoding import Batch, ModelAt, Run, encode_prompts
from .engines import TRANSFORMERS, Decoding, Engine, Transformers


Make = Callable[[Any], ModelAt]
"""Makes a method of [`Models`], from which it has what it needs."""
CHAT = "chat"


@dataclass(frozen=True)
class Guide:
    """A language model that guides, policy or reward model.

    Attributes:
        model (`PreTrainedModel` or `PeftModel`): The model.
        adapter_name (`str` or `None`): Which of its adapters is meant.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        vocabulary ([`Vocabulary`] or `None`): Where its vocabulary is not the base model's.
        template (`str` or `None`): Where it reads prompts otherwise than the base model: a text with `{prompt}`, or
            `"chat"` for the chat template of its own tokenizer.
    """

    model: Any
    adapter_name: str | None
    tokenizer: PreTrainedTokenizerBase
    vocabulary: Vocabulary | None
    template: str | None = None

    def lm(self, preference: Preference | None = None, untrained: bool = False, allow_off_simplex: bool = False) -> LM:
        """log π of this model, or of its backbone alone."""
        adapters = AdapterSwitch.of(backbone_of(self.model)).names  # also policies on a base model that is a guide too
        name = self.adapter_name or next(iter(adapters), None)
        alone = bool(adapters) and (untrained or self.adapter_name is None)
        return LM(
            self.model,
            preference,
            name,
            disable_adapter=alone,
            vocabulary=self.vocabulary,
            allow_off_simplex=allow_off_simplex,
        )

    def lm_at(self, batch: Batch) -> LM:
        """log π of this model at the preferences of a batch."""
        return self.lm(batch.weights, allow_off_simplex=batch.allow_off_simplex)

    def read(self, batch: Batch) -> BatchEncoding:
        """Prompts as it reads them by itself."""
        template = None if self.template == CHAT else self.template
        return encode_prompts(
            self.tokenizer, batch.prompts, template, batch.max_prompt_length, batch.escape_control_tokens
        )

    def check_room(self, inputs: Mapping[str, Any]) -> None:
        """Raises `ValueError` for prompts `input_ids` that fill all of its positions."""
        positions, length = positions_of(self.model.config), inputs["input_ids"].shape[1]
        if positions is not None and length >= positions:
            raise ValueError(
                f"A prompt has {length} tokens as a guide reads it, which has {positions} positions. Leave it out, or "
                "set `max_prompt_length`, which keeps the end of a prompt."
            )


def own_prompt(guides: Iterable[Guide], batch: Batch) -> dict[str, Any]:
    """What guides read in the place of the base model's prompts, as arguments of a guided model's `generate`; nothing
    for a batch without prompts. Raises `ValueError` for guides that would read different tokens, or that have no
    positions for them."""
    guides = list(guides) if batch.prompts else []
    found = [guide.read(batch) for guide in guides if guide.template is not None]
    if any(one["input_ids"].tolist() != found[0]["input_ids"].tolist() for one in found):
        raise ValueError(
            "The guides of a method share one prompt, but their tokenizers make different tokens of it. Use guides of "
            "one tokenizer, and a `template` with {prompt}."
        )
    for guide in guides:
        guide.check_room(found[0] if found else batch.inputs)
    return Prompt(batch.inputs, guide=found[0]).arguments if found else {}


def prompt_with_preference(guide: Guide, batch: Batch, text: PreferenceText) -> dict[str, Any]:
    """As [`own_prompt`], of prompts that begin with the preference of each row: the base model's where the guide reads
    those, or else its own. Raises `ValueError` for preferences over other objectives than the text's too."""
    own = guide.read(batch) if guide.template is not None or guide.vocabulary is not None else None
    allow = batch.allow_off_simplex
    found = Prompt.with_preference(batch.inputs, batch.weights, text, guide.tokenizer, own, allow).arguments
    guide.check_room({"input_ids": found["guide_input_ids"]})
    return found


def positions_of(config: Any) -> int | None:
    """How many positions a model has, by its configuration."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


class Models:
    """Loads models by name, a folder or an id on the Hub, and forgets those of a method when it is done.

    An adapter is put on the base model itself if it was trained on it, and adapters of one kind share a backbone, so
    that guides run in one forward with the base or with each other.

    Args:
        base (`str`): The frozen base model.
        dtype (`str`, *optional*, defaults to `"auto"`): Of all weights but adapters; as they were saved if not given.
        optimize (`bool`, *optional*, defaults to `False`): Pack models that are on a CPU, see [`optimize_loaded`].
        **kwargs: Further arguments of `from_pretrained`, such as `device_map`. Without it models go to the GPU if
            there is one.
    """

    engine_name = TRANSFORMERS

    def __init__(self, base: str, dtype: str = "auto", optimize: bool = False, **kwargs: Any) -> None:
        self.name, self.optimize, self.kwargs = base, optimize, {"dtype": dtype, **kwargs}
        self._whole: dict[str, PreTrainedModel] = {}
        self._adapted: dict[tuple[str, str], PeftModel] = {}
        self._beside: list[torch.nn.Module] = []
        self._vocabularies: list[tuple[dict[str, int], Vocabulary]] = []

    @cached_property
    def base(self) -> PreTrainedModel:
        """The base model, loaded when it is first needed."""
        model = self._load(self.name)
        self._own = {id(parameter) for parameter in model.parameters()}
        return model

    @cached_property
    def engine(self) -> Engine:
        """What decodes."""
        return Transformers(self.base)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base model's tokenizer, with a pad token."""
        return _tokenizer(self.name)

    @cached_property
    def generation_config(self) -> GenerationConfig:
        """The base model's, without its weights."""
        try:
            return GenerationConfig.from_pretrained(self.name)
        except OSError:
            return GenerationConfig.from_model_config(self.config)

    @property
    def loading(self) -> dict[str, Any]:
        """What answers depend on beside the weights, as JSON: arguments, and products in bfloat16."""
        lowered = self.optimize and not torch.cuda.is_available() and products_of(self.kwargs["dtype"]) == "bfloat16"
        told = {"attn_implementation": None, **self.kwargs} | ({"products": "bfloat16"} if lowered else {})
        return plain(recorded(told))

    @cached_property
    def config(self) -> PretrainedConfig:
        """The base model's, without its weights."""
        return read_config(self.name)

    @property
    def positions(self) -> int | None:
        """How many positions the base model has, if it says so."""
        return positions_of(self.config)

    def guide(self, name: str, template: str | None = None, backbone: str | None = None) -> Guide:
        """A model that guides the base model: a whole one, or an adapter, see `adapter`."""
        backbone = backbone or backbone_name(name)
        model, adapter_name = self.adapter(name, backbone) if backbone else (self.whole(name), None)
        tokenizer = _tokenizer(name, backbone)
        vocabulary = None if self._is_base(backbone or name) else self._vocabulary(model, tokenizer)
        return Guide(model, adapter_name, tokenizer, vocabulary, template)

    def check_tokens(self, name: str, model: Any, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Raises `ValueError` for a model that is to read the base model's tokens as they are, and has others."""
        backbone = backbone_name(name)
        if self._is_base(backbone or name):
            return
        if tokenizer is None:
            try:
                tokenizer = _tokenizer(name, backbone)
            except ValueError:  # it brings none, and so no other one
                tokenizer = self.tokenizer
        sizes = [len(one.get_input_embeddings().weight) for one in cast(Any, (self.base, model))]
        other = other_tokens(self.tokenizer, tokenizer, *sizes)
        if other:
            raise ValueError(
                f"The model {name!r} reads the tokens of the base model {self.name!r} as they are, but {len(other)} "
                f"of them are others there or unknown, such as {other[0][1]!r}. Use a model with the base model's "
                "tokenizer."
            )

    def _is_base(self, name: str) -> bool:
        return canonical(name) == canonical(self.name)

    def _vocabulary(self, model: Any, tokenizer: PreTrainedTokenizerBase) -> Vocabulary | None:
        """What aligns a guide's tokens with the base model's, the same for the same tokens; `None` for equal ones."""
        size, theirs = (len(one.get_output_embeddings().weight) for one in cast(Any, (self.base, model)))
        orders = ((self.tokenizer, tokenizer), (tokenizer, self.tokenizer))
        if size == theirs and not any(other_tokens(*order, size, size) for order in orders):
            return None
        known = tokenizer.get_vocab()
        found = next((vocabulary for tokens, vocabulary in self._vocabularies if tokens == known), None)
        if found is None:
            found = Vocabulary(self.tokenizer, tokenizer)
            self._vocabularies.append((known, found))
        return found

    def adapter(self, name: str, backbone: str | None = None) -> tuple[PeftModel, str]:
        """An adapter, and its name in its model: on the backbone that is named, or the one that it was trained on,
        which may be the base model. None is active by itself: it must not act in the base model.

        Raises:
            ValueError: an adapter or a backbone that can't be read, or that do not fit.
        """
        config = adapter_config(name)
        backbone = backbone or named_base(name, config)
        loaded = canonical(self.name), *self._whole
        if canonical(backbone) not in loaded:
            _check_backbone(name, backbone)
        alone = changes_below(config, self.whole(backbone))
        key = canonical(backbone), name if alone else str(config.peft_type)
        # A backbone takes adapters of one kind that leave it as it is; others get one of their own.
        taken = alone or any(home == key[0] for home, _ in self._adapted)
        below = self._load(backbone) if taken and key not in self._adapted else self.whole(backbone)
        # Where dots would mean submodules, and some names are those of methods; one for each adapter.
        inside = f"{name.replace('.', '_')}~{short_hash(canonical(name).encode())}"
        on = self._adapted.get(key, below)
        try:
            if inside not in getattr(on, "peft_config", ()):
                self._adapted[key] = load_adapter(on, name, inside)
        except (RuntimeError, ValueError, KeyError) as error:
            reason = shorten(str(error), 400, placeholder="…")
            raise ValueError(f"The adapter {name!r} does not fit the model {backbone!r}: {reason}") from error
        model = self._adapted[key].eval()
        cast(Any, model.base_model).set_adapter([])
        return model, inside

    def whole(self, name: str) -> PreTrainedModel:
        """A whole model, loaded once for a method: the base model, or another by its name."""
        key = canonical(name)
        if self._is_base(name):
            return self.base
        if key not in self._whole:
            self._whole[key] = self._load(name)
        return self._whole[key]

    def apart(self, name: str) -> PreTrainedModel:
        """A model with a backbone of its own, which decodes while the base model does; an adapter is active. Raises
        `ValueError` for one with other tokens."""
        backbone = backbone_name(name)
        model: Any = self._load(backbone or name)
        self.check_tokens(name, model)
        if backbone:
            model = load_adapter(model, name)
        return cast(PreTrainedModel, self.keep(model.eval()))

    def keep(self, model: Any) -> Any:
        """Counts a model that a method keeps in memory, such as a reward model, and returns it."""
        self._beside.append(model)
        return model

    def check(
        self, how: Decoding, methods: Sequence[tuple[Make, Sequence[Run]]], prompts: Mapping[int, PromptText],
        processes: Processes,
    ) -> None:  # fmt: skip
        """Checks an evaluation before anything is loaded or written.

        Args:
            how ([`Decoding`]): What is the same for all texts.
            methods (`Sequence`): What makes each method, and its runs.
            prompts (`Mapping[int, PromptText]`): Prompts, the longest among them, by how many tokens they have.
            processes ([`Processes`]): Those that share the work.

        Raises:
            ValueError: what can't be decoded as it is asked for.
        """
        processes.check_devices(self.kwargs)

    def load(self, how: Decoding, make: Make, runs: Sequence[Run]) -> tuple[Engine, list[Run]]:
        """The engine, and the runs of a method, which is loaded now."""
        engine, model = self.engine, make(self)
        parameters, size = self.extra()
        return engine, [replace(run, model=model, extra_parameters=parameters, extra_bytes=size) for run in runs]

    def extra(self) -> tuple[int, int]:
        """How many parameters, and bytes of them, are in memory beside those of the base model."""
        models = [*self._adapted.values(), *self._whole.values(), *self._beside]
        found = {id(p): p for model in models for p in model.parameters() if id(p) not in self._own}
        return sum(p.numel() for p in found.values()), sum(p.numel() * p.element_size() for p in found.values())

    @contextmanager
    def borrowed(self) -> Iterator[None]:
        """For the time of one method: afterwards what it loaded is gone, and the base model as it was."""
        try:
            yield
        finally:
            for model in self._adapted.values():
                cast(Any, model).unload()
            for held in (self._adapted, self._whole, self._beside):
                held.clear()
            if torch.cuda.is_available():
                gc.collect()  # what refers to itself goes now, before the next method needs its memory
                torch.cuda.empty_cache()

    def _load(self, name: str) -> PreTrainedModel:
        if backbone := backbone_name(name):
            return cast(PreTrainedModel, load_adapter(self._load(backbone), name).get_base_model().eval())
        load = partial(_read, AutoModelForCausalLM.from_pretrained, what="model")
        model = load_whole(load, name, **self.kwargs)
        if "device_map" not in self.kwargs and torch.cuda.is_available():
            model.to("cuda")
        return optimize_loaded(model.eval(), self.kwargs["dtype"]) if self.optimize else model.eval()


def backbone_name(name: str) -> str | None:
    """The model that an adapter was trained on, or `None` for a whole model. Raises `ValueError` for an adapter that
    names none, or that can't be read."""
    if _read(find_adapter_config_file, name, "model") is None:
        return None
    return named_base(name, adapter_config(name))


def adapter_config(name: str) -> PeftConfig:
    """The configuration of an adapter. Raises `ValueError` if there is none to read."""
    return _read(PeftConfig.from_pretrained, name, "adapter")


def check_readable(name: str, base: str) -> None:
    """Raises `ValueError` for a model without a configuration, or an adapter on such a one; it loads no weights."""
    backbone = backbone_name(name)
    if backbone is None:
        read_config(name)
    elif canonical(backbone) != canonical(base):
        _check_backbone(name, backbone)


def read_config(name: str, what: str = "model") -> PretrainedConfig:
    """The configuration of a whole model. Raises `ValueError` if there is none to read."""
    return _read(AutoConfig.from_pretrained, name, what)


def canonical(name: str) -> str:
    """One name for a model that has several: of a folder its whole path."""
    return str(Path(name).resolve()) if Path(name).exists() else name


def other_tokens(
    base: PreTrainedTokenizerBase, guide: PreTrainedTokenizerBase, size: int, guide_size: int
) -> list[tuple[int, str]]:
    """The tokens of a model with `size` embeddings, by id, that another model has not at the same id."""
    known = same_tokens(base, guide)
    ours = ((number, token) for token, number in base.get_vocab().items() if number < size)
    return sorted((number, token) for number, token in ours if known.get(number) != number or number >= guide_size)


def is_readable(name: str) -> bool:
    """Whether there is a model of this name, in a folder or on the Hub as far as it can be reached."""
    try:
        AutoConfig.from_pretrained(name)
    except (OSError, ValueError):
        return False
    return True


def _check_backbone(adapter: str, backbone: str) -> None:
    if not is_readable(backbone):
        raise ValueError(
            f"The adapter {adapter!r} was trained on {backbone!r}, as `base_model_name_or_path` in its "
            "adapter_config.json says, and there is no such model, neither in a folder, seen from here, nor on "
            "the Hub as far as it can be reached. Start where that folder is, or write there which model it is."
        )


def _read(load: Callable[..., Any], name: str, what: str, **arguments: Any) -> Any:
    try:
        return load(name, **arguments)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"There is no {what} to read at {name!r}: neither in a folder of this name nor on the Hub, as far as it "
            f"can be reached ({shorten(str(error), 120, placeholder='…')})."
        ) from error


def _tokenizer(name: str, backbone: str | None = None) -> PreTrainedTokenizerBase:
    """A model's tokenizer, or that of an adapter, which may have the one of its backbone."""
    try:
        tokenizer = _read(AutoTokenizer.from_pretrained, name, "tokenizer")
    except ValueError:
        if backbone is None:
            raise
        return _tokenizer(backbone)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
