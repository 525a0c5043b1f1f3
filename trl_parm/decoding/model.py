# SPDX-License-Identifier: Apache-2.0
"""A guided model is a model: guidance happens in its forward, and its state is the cache that `generate` carries."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from transformers import Cache, DynamicCache, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from peft_pblora.kv_cache import NAMES, cache_argument, cache_in
from peft_pblora.switch import AdapterSwitch, backbone_of, check_below
from trl_parm.algebra import Scorer, Step, guided_logits

from .adapters import Adapters, check_told_apart, resting
from .cache import GuidedCache
from .incoming import New
from .prefix import check_reorders
from .prompt import OwnPrompt, own_prompt
from .reading import holds_tensors, parts_of
from .terms import (
    LM,
    check_base,
    check_evaluates,
    check_formula,
    check_row_counts,
    language_models,
    log_probs_of,
    policies,
)


OURS = ("guide_input_ids", "guide_attention_mask", "prompt_length", "end_tokens")
"""Arguments of a guided model's `generate` and forward that its base model does not know."""
SEEN = ("input_ids", "attention_mask", "position_ids", "token_type_ids")
"""Inputs of the base model that guides see too, as far as they take them."""


class _OfBase:
    """What a guided model has from its base model."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type) -> Any:
        return self if instance is None else getattr(instance.backbone, self.name)


class Guided(GenerationMixin, nn.Module):
    """A frozen model whose next-token distribution is a formula: `generate`, `pipeline` and whatever else takes a
    model take it as they take the base model.

        log π(y_t) = formula(log π_base, log π_1, ...) − log Z

    Its forward runs one forward for each set of weights, over the rows of all terms that have these weights, and
    returns log π as logits. All state is in the cache that `generate` carries, so that beams, several sequences,
    drafts that are taken back and text that goes on are right without further ado. Nothing of the base model, the
    guides or their adapters is changed for longer than a forward, or for other threads than the one that calls.

    Temperature, top-k, top-p, repetition penalty and all other settings of `generate` act on the guided distribution,
    as they do on any model's, and beam search maximises its probability. Its `generation_config` is the base model's,
    unless it is given one of its own.

    Args:
        base (`PreTrainedModel` or `PeftModel`):
            The model that is guided. Where adapters of the formula lie on it, it is read without them; those of a
            policy stay on where it is this very model.
        formula ([`Scorer`]): For example `BASE + 0.5 * LM(arm)`.

    Raises:
        TypeError: something else than a scorer.
        ValueError: a model in training mode, a base model with a tuned prompt or an activated LoRA; at a call, a guide
            whose adapter is gone or merged, that has another vocabulary, or that can't see the prompt.

    Example:

    ```python
    guided = Guided(base, BASE + 2.0 * LM(arm, {"helpful": 0.7, "harmless": 0.3}))
    guided.generate(**inputs, max_new_tokens=64)
    ```
    """

    _supports_cache_class = True

    def __init__(self, base: Any, formula: Scorer) -> None:
        super().__init__()
        check_formula(formula)
        self.base, self.formula, self.training = base, formula, False
        scorers = set(formula.scorers())
        self.terms = language_models(formula)
        self._reads_base = len(self.terms) < len(scorers) or not scorers
        self._reads_text = any(scorer.reads_text for scorer in scorers)
        self._check_modes()
        if any(term.backbone is self.backbone for term in (*self.terms, *policies(formula))):
            check_below(self.backbone)
        if self._reads_base:
            self.own_term()  # which refuses what could not be read later on

    # What `generate` asks a model about itself: the base model knows.
    config: Any = _OfBase()
    device: Any = _OfBase()
    dtype: Any = _OfBase()
    generation_config: Any = _OfBase()
    main_input_name: Any = _OfBase()
    name_or_path: Any = _OfBase()
    _supports_default_dynamic_cache: Any = _OfBase()
    _optimize_model_for_decode: Any = _OfBase()
    _prepare_model_inputs: Any = _OfBase()
    _maybe_initialize_input_ids_for_generation: Any = _OfBase()
    _prepare_attention_mask_for_generation: Any = _OfBase()
    _prepare_position_ids_for_generation: Any = _OfBase()
    _update_model_kwargs_for_generation: Any = _OfBase()
    _maybe_prepare_encoder_kwargs_for_generation: Any = _OfBase()
    _prepare_decoder_input_ids_for_generation: Any = _OfBase()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base":  # while it is unpickled
                raise
            return getattr(self.backbone, name)

    @property
    def backbone(self) -> Any:
        """The transformer that generates, below any `PeftModel`."""
        return backbone_of(self.base)

    @property
    def _is_stateful(self) -> bool:
        """Whether text that was read can't be taken back, as drafts need it."""
        return any(
            getattr(model, "_is_stateful", False) for model in (self.backbone, *(t.backbone for t in self.terms))
        )

    @classmethod
    def can_generate(cls) -> bool:
        return True

    @torch.no_grad()
    def generate(self, inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As the base model's, with `guide_input_ids`, `guide_attention_mask` and `end_tokens` as of the forward."""
        self._check_modes()
        if kwargs.get("cache_implementation") == "paged":
            self.generate_batch()
        own = own_prompt(kwargs.get("guide_input_ids"), kwargs.get("guide_attention_mask"), self.terms)
        if own is not None:
            kwargs["guide_attention_mask"] = own[1]
        return super().generate(inputs, *args, **kwargs)

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: continuous batching knows neither guides nor their caches."""
        raise ValueError(
            'Continuous batching (`generate_batch`, `cache_implementation="paged"`) can\'t be guided. Use `generate` '
            "with the default cache or a static one."
        )

    def get_compiled_call(self, compile_config: Any) -> Any:
        """As the base model's: the forwards of all models are compiled, the formula between them is not."""
        return partial(self.forward, compile_config=compile_config)

    @torch.no_grad()
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        guide_input_ids: torch.Tensor | None = None,
        guide_attention_mask: torch.Tensor | None = None,
        prompt_length: int | None = None,
        text_mask: torch.Tensor | None = None,
        end_tokens: list[int] | None = None,
        compile_config: Any = None,
        **inputs: Any,
    ) -> Any:
        """The logits of the guided distribution, which are its log-probabilities.

        Args:
            input_ids, attention_mask, position_ids, use_cache, logits_to_keep: As in the base model's forward.
            guide_input_ids, guide_attention_mask (`torch.Tensor` of shape `(rows, columns)`, *optional*):
                The prompts that guides read in the place of the base model's, padded on the left. Without a mask,
                padding is told by a guide's pad token, if that is no end token.
            end_tokens (`list[int]`, *optional*):
                After one of these that `generate` has chosen, a row is not read any further, where caches allow it.
                Give `generate` the same as `eos_token_id`, for greedy decoding and sampling, without its cache.
            prompt_length (`int`, *optional*):
                How many leading columns of the text are the prompt, for which the guides' own prompts stand, and
                which rewards take for it. If not given, those of the first call with a cache; without one, rewards
                take the text before each position.
            text_mask, compile_config: What `generate` hands on between its steps.
            **inputs: Further inputs of the base model; the cache, under the name that its forward has for it, is a
                [`GuidedCache`].

        Returns:
            The base model's output, with logits of shape `(rows, positions, vocab)`, float32.

        Raises:
            ValueError: a model in training mode, a cache of another model, or one whose rows have left after
                `end_tokens`, inputs that a guide or a reward can't see, `labels`, or a guide that can't be read, see
                the class.
        """
        if inputs.get("labels") is not None:
            raise ValueError(
                "`labels` were given, but a guided model has no loss. Its `logits` are log-probabilities, of which "
                "you can take one."
            )
        cache = cache_in(inputs)
        self._check_modes()
        keeps = self.config.get_text_config().use_cache if use_cache is None else use_cache
        inputs = {name: value for name, value in inputs.items() if name not in NAMES and name != "return_dict"}
        text, mask, positions = input_ids, attention_mask if text_mask is None else text_mask, position_ids
        if text_mask is not None:
            inputs["attention_mask"] = attention_mask
        if self.config.is_encoder_decoder:
            inputs |= {"input_ids": input_ids, "attention_mask": attention_mask}
            text, mask, positions = inputs["decoder_input_ids"], None, None
        elif inputs.get("inputs_embeds") is not None:
            embeds = inputs["inputs_embeds"]
            text, inputs["input_ids"] = torch.zeros(len(embeds), 0, dtype=torch.long, device=embeds.device), None
        elif positions is not None and positions.ndim != 2:  # of images in the text, which a guide does not have
            positions, inputs["position_ids"] = None, positions
        text = cast(torch.Tensor, text)
        own = own_prompt(guide_input_ids, guide_attention_mask, self.terms)
        state = self._state(cache, keeps, own)
        self._check_inputs(state, inputs, own is not None)
        prompt = text.shape[1] if prompt_length is None else prompt_length
        if state.length and (prompt_length is None or state.own is not None):
            prompt = state.replaced
        new = New(text, mask, positions, own, prompt, state.length)
        if end_tokens and text.shape[1] == 1 and prompt_length is not None and state.length >= prompt_length:
            state.leave(torch.isin(text[:, 0], text.new_tensor(end_tokens)))
        else:
            state.check_whole()
        output, scores, answers = None, None, {}
        seen = {name: value for name, value in inputs.items() if name in SEEN and own is None}
        for part in state.parts:
            logits, found = part.read(new, inputs if part.is_base else seen, logits_to_keep, compile_config)
            if part.is_base:
                output, scores = found, logits[part.terms[0]]
            answers |= {term: logits[term] for term in part.guides}
        embeds = inputs.get("inputs_embeds")
        if not state.length:
            state.replaced = prompt
        state.note(text.shape[1] if embeds is None else embeds.shape[1], len(text), own, new.prompt)
        step = self._step(scores, answers)
        if output is None:
            output = CausalLMOutputWithPast()
        if self._reads_text:
            with self._policies_apart():
                output.logits = self._at_positions(step, state.write(text), mask, prompt, state.memory)
        else:
            output.logits = guided_logits(self.formula, step)
        if keeps or cache is not None:
            for name, value in cache_argument(self.backbone, state).items():
                setattr(output, name, value)
        return output

    def _step(self, scores: torch.Tensor | None, answers: dict[LM, torch.Tensor]) -> Step:
        """What the formula is evaluated on."""
        if scores is None:  # the guides' logits may be of another vocabulary
            like, head = next(iter(answers.values())), self.backbone.get_output_embeddings()
            size = like.shape[-1] if head is None else len(head.weight)
            scores = torch.zeros(*like.shape[:-1], size, device=self.device)
        return Step(scores, log_probs_of(answers, scores))

    def _at_positions(
        self, step: Step, text: torch.Tensor, mask: torch.Tensor | None, prompt: int, memory: dict[Any, Any]
    ) -> torch.Tensor:
        """The formula at one position after the other, each with the text up to it."""
        # The mask may cover embeddings before the text.
        mask = torch.ones_like(text) if mask is None else mask[:, mask.shape[1] - text.shape[1] :].to(text)
        count = step.scores.shape[1]
        found = []
        for i in range(count):
            length = max(0, text.shape[1] - count + 1 + i)
            answers = {term: value[:, i] for term, value in step.answers.items()}
            start = min(prompt, length)
            one = Step(step.scores[:, i], answers, text[:, :length], mask[:, :length], start, memory)
            found.append(guided_logits(self.formula, one))
        return torch.stack(found, 1)

    @contextmanager
    def _policies_apart(self) -> Iterator[None]:
        """Policies that are no `PeftModel` decode on without the adapters that guide, also where these were put into
        them."""
        found = (getattr(scorer, "policy", None) for scorer in self.formula.scorers())
        with ExitStack() as stack:
            for backbone in dict.fromkeys(term.backbone for term in found if term is not None and not term.adapters):
                own, guiding = self._adapters_on(backbone)
                if guiding:
                    stack.enter_context(Adapters(backbone).alone(own))
            yield

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        ours = {name: kwargs.pop(name) for name in OURS if name in kwargs}
        cache, ids = cache_in(kwargs), args[0] if args else kwargs["input_ids"]
        if isinstance(cache, GuidedCache) and 0 < cache.length < ids.shape[1]:
            if cache.turns(ids.shape[1]):
                again = {"next_sequence_length": None} if "next_sequence_length" in kwargs else {}
                kwargs |= {**dict.fromkeys(kwargs.keys() & {*NAMES}), **again}  # all of the text is read anew
            elif self._drafts_on_a_cache(kwargs, ids):
                kwargs["next_sequence_length"] = ids.shape[1] - cache.length
        inputs = self.backbone.prepare_inputs_for_generation(*args, **kwargs)
        if not self.config.is_encoder_decoder and inputs.get("attention_mask") is None:
            ours["text_mask"] = kwargs.get("attention_mask")  # a recurrent model needs it for the prompt alone
        return {**inputs, **ours}

    def _drafts_on_a_cache(self, kwargs: Mapping[str, Any], ids: torch.Tensor) -> bool:
        """Whether `generate` drafts for the first time in a call that goes on from a cache: transformers, in releases
        such as 5.24.0, then reads the whole text again, after the one in the cache."""
        if not kwargs.get("is_first_iteration") or kwargs.get("next_sequence_length", 0) is not None:
            return False
        mask = None if self.config.is_encoder_decoder else kwargs.get("attention_mask")
        return mask is None or mask.shape[1] == ids.shape[1]  # a longer one is of a call with new tokens alone

    def _assisted_decoding(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Drafts need all of a text that goes on from a cache. Raises `ValueError` for a part of it."""
        cache, mask = cache_in(kwargs), kwargs.get("attention_mask")
        if isinstance(cache, GuidedCache) and cache.length:
            partly = not self.config.is_encoder_decoder and mask is not None and mask.shape[1] > input_ids.shape[1]
            if partly or input_ids.shape[1] <= cache.length:
                raise ValueError(
                    f"The cache holds {cache.length} tokens and {input_ids.shape[1]} were given, but an assistant or "
                    "prompt lookup needs all of the text, with at least one token that is not in the cache. Pass the "
                    "sequences that `generate` has returned, with what is new after them."
                )
        return super()._assisted_decoding(input_ids, *args, **kwargs)

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        input_ids, model_kwargs = self.backbone._expand_inputs_for_generation(expand_size, *args, **kwargs)
        own, mask, cache = kwargs.get("guide_input_ids"), kwargs.get("attention_mask"), cache_in(kwargs)
        check_row_counts(self.formula, len(input_ids) // expand_size, [] if own is None else [len(own)])
        columns = input_ids.shape[1]
        if isinstance(cache, GuidedCache) and mask is not None and mask.shape[1] > columns:
            columns += cache.length  # the ids are only what is new
        model_kwargs.setdefault("prompt_length", columns)
        return input_ids, model_kwargs

    def _prepare_generation_config(self, *args: Any, **kwargs: Any) -> Any:
        model = super() if "generation_config" in vars(self) else self.backbone
        return model._prepare_generation_config(*args, **kwargs)

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        self.backbone._validate_model_kwargs({k: v for k, v in model_kwargs.items() if k not in OURS})

    def _get_candidate_generator(self, *args: Any, model_kwargs: dict[str, Any], **kwargs: Any) -> Any:
        if not isinstance(kwargs.get("assistant_model"), Guided):
            model_kwargs = {name: value for name, value in model_kwargs.items() if name not in OURS}
        return super()._get_candidate_generator(*args, model_kwargs=model_kwargs, **kwargs)

    def _valid_auto_compile_criteria(self, model_kwargs: dict[str, Any], generation_config: Any) -> bool:
        state = cache_in(model_kwargs)
        caches = [part.cache for part in state.parts] if isinstance(state, GuidedCache) else [state]
        if not all(cache is not None and cache.is_compileable for cache in caches):
            caches = [None]
        others = {name: value for name, value in model_kwargs.items() if name not in NAMES}
        return self.backbone._valid_auto_compile_criteria(
            {**others, **cache_argument(self.backbone, caches[0])}, generation_config
        )

    def _supports_logits_to_keep(self) -> bool:
        return True

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], mode: Any, batch_size: int, max_length: int
    ) -> None:
        given = cache_in(model_kwargs)
        if given is not None or generation_config.use_cache is False:
            own = own_prompt(model_kwargs.get("guide_input_ids"), model_kwargs.get("guide_attention_mask"))
            self._state(given, False, own)
            self.backbone._prepare_cache_for_generation(generation_config, model_kwargs, mode, batch_size, max_length)
            return
        own, embeds = model_kwargs.get("guide_input_ids"), model_kwargs.get("inputs_embeds")

        def new_cache(term: LM, copies: int) -> Cache:
            of_model = {name: value for name, value in model_kwargs.items() if name not in NAMES}
            length = max_length + (0 if own is None else own.shape[1])
            term.backbone._prepare_cache_for_generation(generation_config, of_model, mode, copies * batch_size, length)
            if cache_in(of_model) is None:
                raise ValueError(
                    f"A {type(term.backbone).__name__} has no cache that `generate` can carry. Pass `use_cache=False`."
                )
            return cache_in(of_model)

        state = self.new_cache(new_cache, own is not None)
        if embeds is not None:
            self._check_embedded(state, embeds, model_kwargs.get("attention_mask"), max_length)
        for part in state.parts if generation_config.num_beams > 1 else ():
            check_reorders(cast(Cache, part.cache))
        model_kwargs.update(cache_argument(self.backbone, state))

    def _check_embedded(
        self, state: GuidedCache, embeds: torch.Tensor, mask: torch.Tensor | None, max_length: int
    ) -> None:
        """Raises `ValueError` for a prompt of embeddings that may outgrow a [`turning_length`], where it would have to
        be read anew."""
        longest = embeds.shape[1] if mask is None else int((mask != 0).sum(1).max())
        for part in state.parts:
            most = part.turning_length
            if most is not None and longest <= most < max_length:
                raise ValueError(
                    f"A {type(part.model).__name__} turns its keys by other factors in texts of more than {most} "
                    "tokens, and has to read a text anew there, which `inputs_embeds` don't allow. Give `input_ids`, "
                    f"or fewer `max_new_tokens`: in all it may be {max_length} tokens."
                )

    def new_cache(self, make: Callable[[LM, int], Any], own_prompt: bool = False) -> GuidedCache:
        """An empty cache for this model.

        Args:
            make (`Callable`): Makes the cache of one set of weights, by a term that has them and the number of terms.
            own_prompt (`bool`, *optional*, defaults to `False`): Whether guides will read a prompt of their own.
        """
        return GuidedCache(self._parts(make, own_prompt), own_prompt)

    def _state(self, cache: Any, keeps: bool, own: OwnPrompt | None) -> GuidedCache:
        """What was read before: the cache, or a fresh one, which keeps nothing unless it is to."""
        if cache is None:
            return self.new_cache(_default_cache if keeps else lambda term, copies: None, own is not None)
        if not isinstance(cache, GuidedCache) or not cache.is_of(self.backbone, self.terms):
            raise ValueError(
                f"This {type(cache).__name__} was not made by a guided model with the same models, adapters and "
                "preferences. Leave the cache out, or pass the one that an earlier call of this model returned."
            )
        cache.check_own(own)
        return cache

    def _parts(self, new_cache: Any, own_prompt: bool) -> list[Any]:
        return parts_of(self.own_term() if self._reads_base else None, self.terms, own_prompt, new_cache)

    def own_term(self) -> LM:
        """The base model as a term: with its active adapters, but without those that guide, or of a policy, unless
        that is the same model. Raises `ValueError` as [`check_base`]."""
        own, _ = self._adapters_on(self.backbone)
        check_base(self.base, own)
        return LM.of_base(self.base, own)

    def _adapters_on(self, backbone: Any) -> tuple[list[str], set[str]]:
        """The adapters that act in a model by itself, without those that guide or are of a policy; and these."""
        guides = language_models(self.formula, silent=True)
        guides += [policy for policy in policies(self.formula) if policy.model is not self.base]
        guides = [term for term in guides if term.backbone is backbone]
        for term in guides:
            check_told_apart(term)
        guiding = {name for term in guides for name in term.adapter_names}
        return [name for name in resting(AdapterSwitch.of(backbone).layers) if name not in guiding], guiding

    def _check_modes(self) -> None:
        for model in (self.base, *(term.model for term in self.terms)):
            check_evaluates(model)

    def _check_inputs(self, state: GuidedCache, inputs: Mapping[str, Any], own_prompt: bool) -> None:
        """Raises `ValueError` for what the base model sees, and a guide or a reward does not."""
        others = [name for name, value in inputs.items() if name not in SEEN and holds_tensors(value)]
        if self.config.is_encoder_decoder:
            others = ["an encoder's input"]
        blind = [
            t
            for part in state.parts
            for t in part.terms
            if t in self.terms and not (part.is_base and others == ["inputs_embeds"])
        ]
        if others and blind and not own_prompt:
            raise ValueError(
                f"The base model is given {others[0]}, which {blind[0]!r} can't see. Give the guides a prompt of "
                "their own with `guide_input_ids`."
            )
        judges = [scorer for scorer in self.formula.scorers() if scorer.reads_prompt] if others else []
        if judges:
            raise ValueError(
                f"The base model is given {others[0]}, which {judges[0]!r} can't see. Give a reward of texts the "
                "`prompts`; others read the base model's text alone."
            )
        if self._reads_text and state.length and state.text is None:
            raise ValueError(
                f"This {type(state).__name__} was made without a scorer of texts, such as a reward, and has not kept "
                "what one would read. Leave it out."
            )


def _default_cache(term: LM, copies: int) -> Cache:
    return DynamicCache(config=term.backbone.config.get_text_config(decoder=True))
