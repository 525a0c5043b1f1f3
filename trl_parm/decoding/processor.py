# SPDX-License-Identifier: Apache-2.0
"""The front door: a formula as a logits processor for any model's `generate`.

`generate` hands a processor the tokens and the scores of the model that generates, and nothing else. So the guides
have a cache of their own here, which is addressed by the tokens it holds: every call compares the tokens it gets with
those, and feeds the difference. What it returns is a function of the tokens alone, in every mode of `generate`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from itertools import chain
from operator import attrgetter, is_
from typing import Any, cast

import torch
from transformers import LogitsProcessor

from peft_pblora.preference import Preference
from peft_pblora.switch import check_below
from trl_parm.algebra import Scorer, Step, guided_logits

from .adapters import check_aside, step_aside
from .cache import GuidedCache
from .incoming import New
from .methods import Beta, genarm, mod, mod_w2s, parm
from .prefix import can_take_back, follow, rewindable_cache
from .prompt import Prompt, end_tokens, told_by_pad_token
from .reading import parts_of
from .terms import LM, check_evaluates, check_formula, check_row_counts, language_models, log_probs_of, policies
from .trajectories import TextReward


WINDOW = 32
"""How many positions of a single text are remembered: a draft asks for them, and its verification once more."""


class GuidedLogitsProcessor(LogitsProcessor):
    """Makes `generate` decode from a formula: `model.generate(..., logits_processor=[GuidedLogitsProcessor(f)])`.

    It returns log π of the guided distribution. Tokens that the base model excludes (a score of −inf) stay excluded.
    Temperature, top-k and top-p act on the guided distribution, since `generate` applies them after custom processors;
    a repetition penalty acts on the base model alone. [`Guided`], whose `generate` knows more, is faster where guides
    are adapters on the base model, and has all settings act on the guided distribution.

    An adapter that guides must not act in the model that generates, which may have the same weights. So **when the
    processor is made, the adapter steps aside**: calls of the model below, `base(...)`, are the base model then, those
    of the `PeftModel`, `arm(...)`, are the ARM as before. (An adapter of another kind than ours, such as PEFT's LoRA,
    becomes inactive in both.) `arm.set_adapter(name)` takes it back, and the processor then refuses to guide.

    Padding is told as `generate` tells it without a mask: by a pad token that is no end token. Where rows begin
    with an end token, which tokenizers may pad with, pass `prompt=Prompt(inputs)` with the mask, unless it is a BOS of
    all rows. Where no pad token is known pass that, or `pad_token_id`, unless all rows begin with one token, such as a
    BOS: prompts of one length without a BOS need it too. In continuous batching transformers asks no processor, and
    says nothing: use `generate`.

    Args:
        formula ([`Scorer`]): For example `BASE + 0.5 * LM(arm)`.
        prompt ([`Prompt`], *optional*): The mask of the prompts, or the guides' own; the processor then serves this
            batch only.
        pad_token_id (`int`, *optional*): The base model's pad token; the first guide's if not given.

    Raises:
        TypeError: something else than a scorer.
        ValueError: preferences or strengths for another number of rows than `prompt` has; at a call, a model in
            training mode, padding that can't be told, a guide or a reward that sees no prompt, or a guide whose
            adapter is gone, merged or active.
        NotImplementedError: at a call with the last token of every row alone.
    """

    reads_apart = True
    """To `PeftModel.generate`: the model below is to be read without the adapters that guide it."""

    def __init__(self, formula: Scorer, prompt: Prompt | None = None, pad_token_id: int | None = None) -> None:
        check_formula(formula)
        if prompt is not None and prompt.rows is not None:
            check_row_counts(formula, prompt.rows)
        pads = [scorer.pad_token_id for scorer in formula.scorers() if hasattr(scorer, "pad_token_id")]
        self.formula, self.prompt = formula, prompt
        self.pad_token_id = next((pad for pad in [pad_token_id, *pads] if pad is not None), None)
        self._ends: set[int] = set()
        guides = [*language_models(formula, silent=True), *policies(formula)]
        for term in guides:
            check_below(term.model)  # it may be the model that generates
        self._aside = [(term, step_aside(term)) for term in guides]
        self.reset()

    def reset(self) -> None:
        """Forgets all tokens. Only needed after changing frozen weights of a guide behind PyTorch's back, as by
        `.data`, or any weights between two tokens of one text by a fused optimizer."""
        self._lock = threading.Lock()
        self._prefix: _Prefix | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.ndim != 2:
            raise NotImplementedError(
                f"Guidance needs all tokens of every row, of shape (rows, length), but got {tuple(input_ids.shape)}: "
                "continuous batching passes the last ones alone. Use `generate`."
            )
        terms = language_models(self.formula)
        for term, layer in self._aside:
            check_evaluates(term.model)
            check_aside(term, layer)
        with self._lock, torch.no_grad():
            if self._prefix is None or not self._prefix.serves(terms):
                scorers = list(self.formula.scorers())
                reads = bool(terms) or any(scorer.reads_text for scorer in scorers)
                models = [model for scorer in scorers for model in scorer.models()]
                ends = {end for scorer in scorers for end in _end_tokens(scorer)}
                if any(scorer.reads_text and not getattr(scorer, "reads_text_alone", False) for scorer in scorers):
                    ends |= self._ends
                judges = [scorer for scorer in scorers if scorer.reads_prompt]
                self._prefix = _Prefix(terms, self.prompt, self.pad_token_id, ends, reads, judges, _Weights(models))
            try:
                answers = self._prefix.read(input_ids)
                found, prefix = log_probs_of(answers, scores), self._prefix
                step = Step(scores, found, input_ids, prefix.mask, prefix.prompt_length, prefix.state.memory)
                return guided_logits(self.formula, step)
            except BaseException:  # as of an interrupt in a forward, after which caches may hold a part of its tokens
                self._prefix = None
                raise

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_prefix")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.reset()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.formula!r})"


class PARMLogitsProcessor(GuidedLogitsProcessor):
    """PARM as a logits processor; the arguments are those of [`parm`] and [`GuidedLogitsProcessor`].

    Example:

    ```python
    guide = PARMLogitsProcessor(arm, {"helpful": 0.7, "harmless": 0.3}, beta=1.0)
    model.generate(**inputs, logits_processor=[guide])
    ```
    """

    def __init__(
        self,
        arm: Any,
        preference: Preference | None = None,
        beta: Beta = 1.0,
        prompt: Prompt | None = None,
        pad_token_id: int | None = None,
        **guide: Any,
    ) -> None:
        self._arguments = {"arm": arm, "preference": preference, "beta": beta, **guide}
        super().__init__(parm(**self._arguments), prompt, pad_token_id)

    def set(self, preference: Preference | None = None, beta: Beta | None = None) -> None:
        """Changes α, β or both between two calls of `generate`, for any batch.

        Args:
            preference (`Preference`, *optional*): As in the class; unchanged if not given.
            beta (`float` or `torch.Tensor`, *optional*): As in the class; unchanged if not given.

        Raises:
            ValueError: as the class; nothing is changed then.
        """
        given = {"preference": preference, "beta": beta}
        arguments = self._arguments | {name: value for name, value in given.items() if value is not None}
        formula = parm(**arguments)
        if self.prompt is not None and self.prompt.rows is not None:
            check_row_counts(formula, self.prompt.rows)
        self.formula, self._arguments = formula, arguments
        layer = self._aside[0][1]  # all terms are of one adapter
        self._aside = [(term, layer) for term in language_models(self.formula, silent=True)]


class MethodLogitsProcessor(GuidedLogitsProcessor):
    """A method as a logits processor: what it takes beside `prompt` and `pad_token_id` are the method's arguments."""

    method: Callable[..., Scorer]

    def __init__(self, *args: Any, prompt: Prompt | None = None, pad_token_id: int | None = None, **kwargs: Any):
        tokenizer = kwargs.get("tokenizer")
        if pad_token_id is None:
            pad_token_id = getattr(tokenizer, "pad_token_id", None)
        super().__init__(self.method(*args, **kwargs), prompt, pad_token_id)
        self._ends = {getattr(tokenizer, "eos_token_id", None)} - {None}


class GenARMLogitsProcessor(MethodLogitsProcessor):
    """GenARM as a logits processor; the arguments are those of [`genarm`] and [`GuidedLogitsProcessor`]."""

    method = staticmethod(genarm)


class MODLogitsProcessor(MethodLogitsProcessor):
    """MOD as a logits processor; the arguments are those of [`mod`] and [`GuidedLogitsProcessor`]."""

    method = staticmethod(mod)


class MODWeakToStrongLogitsProcessor(MethodLogitsProcessor):
    """MOD-w2s as a logits processor; the arguments are those of [`mod_w2s`] and [`GuidedLogitsProcessor`]."""

    method = staticmethod(mod_w2s)


class _Weights:
    """The parameters of some models as they were when it was made: what was changed since then, or put in the place of
    another, is noticed, as far as PyTorch notes it. It is asked at every token.

    Args:
        models (`Iterable[nn.Module]`): The models.
    """

    def __init__(self, models: Iterable[Any]) -> None:
        modules = dict.fromkeys(module for model in models for module in model.modules())
        self._holders = [held for module in modules for held in (module._parameters, module._modules) if held]
        self._found = self._now()
        self._counted = [x for x in self._found if isinstance(x, torch.Tensor) and not x.is_inference()]
        self._versions = self._count()
        self._trained = self._train()

    def are_current(self) -> bool:
        """Whether they are the same, with the same values."""
        now = self._now()
        return len(now) == len(self._found) and all(map(is_, now, self._found)) and self._versions == self._count()

    @property
    def may_have_changed(self) -> bool:
        """Whether they may have other values all the same: steps of fused optimizers are not noted. So it is where one
        requires a gradient, now or when it was made."""
        return self._trained or self._train()

    def _now(self) -> list[Any]:
        return list(chain.from_iterable(map(dict.values, self._holders)))

    def _train(self) -> bool:
        return any(x.requires_grad for x in self._counted)

    def _count(self) -> int:
        return sum(map(attrgetter("_version"), self._counted))


class _Prefix:
    """What guides have read: the tokens of a call of `generate`, and the answers after some of their prefixes.

    Assisted decoding asks for the positions of a drafted window twice, once while it drafts and once while it
    verifies, and takes back what it rejects. It has one text, so remembering a window of positions costs little.

    Attributes:
        mask (`torch.Tensor` of shape `(rows, length)`): Of the tokens that were asked for last.
        prompt_length (`int`): Columns that the call began with.
    """

    def __init__(
        self,
        terms: list[LM],
        prompt: Prompt | None,
        pad_token_id: int | None,
        ends: set[int],
        reads: bool,
        judges: list[Scorer],
        weights: _Weights,
    ) -> None:
        self.terms, self.prompt, self.pad_token_id, self._ends = terms, prompt, pad_token_id, ends
        self._reads, self._judges, self.weights = reads, judges, weights
        self._own = None if prompt is None else prompt.own_of(terms)
        self.prompt_length = self._begun = 0
        self.tokens = torch.empty(0, 0, dtype=torch.long)

    def serves(self, terms: list[LM]) -> bool:
        """Whether it is one of these terms, and nothing that their answers depend on has changed."""
        current = len(self.tokens) == 0 or all(part.is_current for part in self.state.parts)
        return self.terms == terms and current and self.weights.are_current()

    def read(self, tokens: torch.Tensor) -> dict[LM, torch.Tensor]:
        """The logits of every term after all of the tokens, `(rows, vocab)`."""
        length = tokens.shape[1]
        if not self._goes_on(tokens) or not self._follow(tokens):
            self._begin(tokens)
        new_columns = length - self.prompt_length
        self.mask = torch.cat([self.prompt_mask, torch.ones_like(tokens[:, length - new_columns :])], 1)
        if length in self.answers:
            return self.answers[length]
        if self.state.turns(length):
            self._open(tokens)
        kept = self.state.length
        mask = None if bool(self.mask.all()) else self.mask
        answers: dict[LM, torch.Tensor] = {}
        for part in self.state.parts:
            logits, _ = part.read(New(tokens[:, kept:], mask, None, self._own, self.prompt_length, kept), {}, 1)
            answers |= {term: value[:, -1] for term, value in logits.items()}
        self.state.note(length - kept, len(tokens))
        recent = sorted(self.answers)[-WINDOW:] if len(tokens) == 1 else []
        self.answers = {n: self.answers[n] for n in recent} | {length: answers}
        self.tokens = tokens.clone()
        return answers

    def _goes_on(self, tokens: torch.Tensor) -> bool:
        """Whether these are tokens of the same call: of the same prompts, at most one token longer than before. What a
        call begins with may be that of the next one, before which weights were trained."""
        start, held = self.prompt_length, self.tokens.shape[1]
        return (
            len(self.tokens) == len(tokens) > 0
            and start <= tokens.shape[1] <= held + 1
            and torch.equal(tokens[:, :start], self.tokens[:, :start])
            and not (tokens.shape[1] <= self._begun and self.weights.may_have_changed)
        )

    def _begin(self, tokens: torch.Tensor) -> None:
        """Forgets all but what it is of. Raises `ValueError` where guides would see no prompt, or padding as text."""
        given = self.prompt.mask(tokens) if self.prompt is not None else None
        own, start = self._own, tokens.shape[1]
        if self.prompt is not None:
            start = min(start, cast(int, self.prompt.length))
        mask = torch.ones_like(tokens) if given is None else given
        reads = self._reads if own is None else self._judges and start > 1  # more than what a decoder begins with
        if given is None and reads:
            mask = self._told_by_pad_token(tokens)
        if self.terms and own is None and not mask.any():
            raise ValueError(
                "The guides have nothing to read: with `inputs_embeds`, or an encoder-decoder base model, they can't "
                "see the prompt. Give them one with `prompt=Prompt(inputs, guide=...)`."
            )
        for judge in self._judges:
            _check_seen(judge, tokens[:, :start], mask[:, :start])
        for term in self.terms if own is None else ():
            _check_text(term, tokens[:, :start])
        self.prompt_length, self.prompt_mask = start, mask[:, :start]
        self._begun = tokens.shape[1]
        self.answers: dict[int, dict[LM, torch.Tensor]] = {}
        self._open(tokens)

    def _open(self, tokens: torch.Tensor) -> None:
        """Caches that hold nothing of the text."""
        own = self._own is not None
        self.state = GuidedCache(parts_of(None, self.terms, own, lambda term, copies: rewindable_cache(term.backbone)))
        self.tokens = tokens[:, :0]

    def _follow(self, tokens: torch.Tensor) -> bool:
        """Makes the caches hold a prefix of the tokens, their rows in the tokens' order; `False` if they can't."""
        length = tokens.shape[1]
        rows, shared = follow(self.tokens, tokens, self._alike(len(tokens)))
        if rows is None and shared == length and length in self.answers:
            return True  # of a draft that is verified, more may have been read
        if rows is not None:
            self.state.reorder_cache(rows)
            self.tokens, self.answers = self.tokens[rows], {}
        self.answers = {n: answer for n, answer in self.answers.items() if n <= shared}
        kept = min(shared, length - 1)
        if kept < self.state.length:
            if kept < (1 if self._own is None else self.prompt_length) or not can_take_back(self.state):
                return False
            self.state.crop(kept - self.state.length)
            self.tokens = self.tokens[:, :kept]
        return True

    def _alike(self, rows: int) -> torch.Tensor:
        """Which rows may go on from which, `(rows, rows)`: those of one padding and of the same preferences, and of
        one prompt where it is the guides' own."""
        alike = (self.prompt_mask[:, None] == self.prompt_mask[None]).all(-1)
        own = [] if self._own is None else [len(self._own[0])]
        for different in own + [part.rows_of(term) for part in self.state.parts for term in part.terms]:
            number = torch.arange(rows, device=alike.device) // max(1, rows // different)
            alike &= number[:, None] == number[None]
        return alike

    def _told_by_pad_token(self, tokens: torch.Tensor) -> torch.Tensor:
        """The mask that `generate` finds where none is given. Raises `ValueError` where it may have got another."""
        pad = self.pad_token_id
        for term in self.terms:
            config = term.backbone.generation_config
            known = term.vocabulary.base_pad_token_id if term.vocabulary is not None else config.pad_token_id
            pad = known if pad is None else pad
        other = "or use a guided model such as `PARM(model, arm, ...)`, which `generate` tells."
        if pad is None:
            other = "or `pad_token_id`, such as `tokenizer.pad_token_id`."
        return told_by_pad_token(tokens, pad, self._ends, f"Pass `prompt=Prompt(inputs)`, which has the mask, {other}")


def _end_tokens(scorer: Any) -> set[int]:
    """The end tokens of a scorer's models, as the base model has them."""
    found = {end for model in scorer.models() for end in end_tokens(model)}
    vocabulary = getattr(scorer, "vocabulary", None)
    if vocabulary is None:
        return found
    return {ours for end in found for ours in (vocabulary.guide_ids == end).nonzero()[:, 0].tolist()}


def _check_seen(judge: Any, tokens: torch.Tensor, mask: torch.Tensor) -> None:
    """Raises `ValueError` where a scorer of texts sees no prompt: nothing at all, or no text in the one token that an
    encoder-decoder model's answer begins with."""
    reward = getattr(judge, "reward", None)
    seen = not isinstance(reward, TextReward) or tokens.shape[1] > 1 or reward.prompts or reward.has_text(tokens, mask)
    if not (seen and mask.any()):
        raise ValueError(
            f"{judge!r} has no prompt to read, which `inputs_embeds` and encoder-decoder base models do not show. "
            "Give a reward of texts the `prompts`, `['']` for an empty one; others read the base model's text alone."
        )


def _check_text(term: LM, tokens: torch.Tensor) -> None:
    """Raises `ValueError` for tokens that stand for something else than text, which a processor does not get."""
    for kind in ("image", "video", "audio"):
        token = getattr(term.backbone.config, f"{kind}_token_id", None)
        if token is not None and term.vocabulary is None and bool((tokens == token).any()):
            raise ValueError(
                f"The prompt has {kind} tokens, but a processor gets no {kind}, so that {term!r} can't see it. Give "
                "the guides a prompt of their own with `prompt=Prompt(inputs, guide=...)`."
            )
