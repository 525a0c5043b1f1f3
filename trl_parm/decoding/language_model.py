# SPDX-License-Identifier: Apache-2.0
"""A language model as a scorer, with a key-value cache that is addressed by the prefix.

`generate` may call a processor for any prefix: one token further, another beam order, rolled back, another batch.
So nothing here counts calls. Every call compares the tokens it gets with the tokens in the cache and feeds the
difference; what it returns is a function of the tokens alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, cast

import torch
from transformers import DynamicCache, PreTrainedModel

from peft_pblora import as_preference, set_preference
from peft_pblora.adapter import check_rows
from peft_pblora.condition import Condition
from peft_pblora.control import active_condition, has_preference
from peft_pblora.kv_cache import cache_argument
from peft_pblora.preference import Preference
from peft_pblora.switch import AdapterSwitch, backbone_of

from .backbone import SharedBackbone
from .guide_model import check_guide, rewindable_cache
from .prefix import Prefix, read, window_of
from .prompts import Prompt
from .reading import read_by_guide
from .scorers import Scorer
from .vocabulary import Vocabulary


_given: ContextVar[Mapping[LM, torch.Tensor]] = ContextVar("given", default=MappingProxyType({}))


@contextmanager
def given(logits: Mapping[LM, torch.Tensor]) -> Iterator[None]:
    """Meanwhile these language models are not run: their logits, of shape `(rows, vocab)`, are known."""
    token = _given.set(logits)
    try:
        yield
    finally:
        _given.reset(token)


class LM(Scorer):
    """log π of a second language model given the tokens so far.

    Two of them are equal, and run once in a formula, if their arguments are.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            A causal language model. It may be an adapter on the model that generates: inside `generate` that one then
            runs without it.
        preference (`Mapping[str, float]`, `Sequence[float]` or `torch.Tensor`, *optional*):
            The preference of the model's adapter, set before every forward; the one set in the model if not given. A
            tensor of shape `(rows, k)` holds one for each row of the batch; `generate` may repeat rows.
        adapter_name (`str`, *optional*): Which of the model's adapters to use; the active ones if not given.
        disable_adapter (`bool`, *optional*, defaults to `False`):
            Use the model without that adapter: for an ARM, the untrained ARM.
        prompt ([`Prompt`], *optional*): The guide's own prompts, or the padding where `generate` does not call.
        vocabulary ([`Vocabulary`], *optional*): Aligns the tokens of two vocabularies that differ.
        shared_forward (`bool`, *optional*, defaults to `True`):
            Where the guide is an adapter on the model that generates, let both run in one forward, see
            [`SharedBackbone`]. The answers are the same.

    Raises:
        ValueError: a model that is no causal language model with a key-value cache, an unknown adapter, or an invalid
            preference; at the first call, a vocabulary of another size or a batch that does not fit.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        preference: Preference | None = None,
        adapter_name: str | None = None,
        disable_adapter: bool = False,
        prompt: Prompt | None = None,
        vocabulary: Vocabulary | None = None,
        shared_forward: bool = True,
    ) -> None:
        backbone = backbone_of(model)
        check_guide(model, cast(PreTrainedModel, backbone))
        switch = AdapterSwitch.of(backbone)
        self.adapter_names = switch.chosen(adapter_name)
        if disable_adapter and not self.adapter_names:
            raise ValueError("`disable_adapter=True` needs a model with an adapter, but the guiding model has none.")
        self.model = model.eval()
        self.shared = SharedBackbone.of(backbone) if switch.layers else None
        self.shared_forward = shared_forward
        self.disable_adapter, self.prompt, self.vocabulary = disable_adapter, prompt, vocabulary
        self.acting_adapters = [] if disable_adapter else self.adapter_names
        self.preference = None
        self.condition: Condition | None = None
        if not disable_adapter and has_preference(model):
            self.condition = active_condition(model, adapter_name)
        self._version = 0
        if preference is not None:
            self.set_preference(preference)
        self._parameters = list(model.parameters())
        self._keeps_logits = cast(Any, backbone)._supports_logits_to_keep()
        self.reset()

    def set_preference(self, preference: Preference) -> None:
        """Changes the preference, touching no layer: the adapter follows at the next forward. Raises as the class."""
        self.preference = as_preference(preference, self._objectives())
        self._version += 1

    def reset(self) -> None:
        """Forgets all tokens. Only needed after changing the model behind PyTorch's back, such as through `.data`."""
        self._prefix: Prefix | None = None
        self._built_with: tuple | None = None

    @torch.no_grad()
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        logits = _given.get().get(self)
        if logits is None and self.shared:
            logits = self.shared.logits_of(self, input_ids)
        log_probs = None if logits is None else torch.log_softmax(logits.float(), dim=-1)
        if log_probs is None and self.shared:
            log_probs = self.shared.log_probs_of(self, input_ids)
        if log_probs is None:
            log_probs = self._log_probs(input_ids)
        if self.vocabulary is not None:
            log_probs = self.vocabulary.to_base(log_probs, scores.shape[-1])
        elif log_probs.shape[-1] != scores.shape[-1]:
            raise ValueError(
                f"The guiding model has a vocabulary of {log_probs.shape[-1]}, but the base model one of "
                f"{scores.shape[-1]}. If their tokenizers are of one family, pass "
                "`vocabulary=Vocabulary(base_tokenizer, guide_tokenizer)`."
            )
        return log_probs.to(scores.device)

    def _log_probs(self, input_ids: torch.Tensor) -> torch.Tensor:
        """log π of the next token in the guide's vocabulary, by forwards of its own."""
        if (state := self.state()) != self._built_with:
            self.reset()
            self._built_with = state
        tokens, mask = self.reads(input_ids)
        rows = None
        if self.preference is not None and self.preference.ndim == 2:
            rows = self.preference_rows(len(tokens))
        window = window_of(len(tokens))
        self._prefix = read(self._prefix, tokens, mask, self._forward, self.empty_cache, rows, window)
        return self._prefix.log_probs[tokens.shape[1]]

    @torch.no_grad()
    def of_tokens(self, tokens: torch.Tensor, last: int) -> torch.Tensor:
        """log π of each of the last tokens of one text given those before it, in one forward.

        Args:
            tokens (`torch.Tensor` of shape `(1, length)`): The guide's own tokens.
            last (`int`): How many, below `length`.

        Returns:
            `torch.Tensor` of shape `(last,)`, float32, on the CPU.
        """
        tokens = tokens.to(self.model.device)
        with self.as_asked():
            logits = self.model(input_ids=tokens).logits[0, -last - 1 : -1].float()
        return torch.log_softmax(logits, -1).gather(1, tokens[0, -last:, None])[:, 0].cpu()

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Any) -> torch.Tensor:
        """log π of the token after the last one, shape `(rows, vocab)`."""
        with self.as_asked():
            logits = self.feed(ids, mask, positions, cache)
        return torch.log_softmax(logits[:, -1].float(), dim=-1)

    def feed(
        self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Any, last: int = 1
    ) -> torch.Tensor:
        """A forward of the model, with whatever adapters act in it: logits of at least the `last` new tokens."""
        kept = {"logits_to_keep": last} if self._keeps_logits else {}
        return self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            **cache_argument(self.model, cache),
            **kept,
        ).logits

    def empty_cache(self) -> DynamicCache:
        """See [`rewindable_cache`]."""
        return rewindable_cache(self.model)

    def as_asked(self) -> AbstractContextManager:
        """Sets the preference, and lets the chosen adapter alone act for the time of a forward."""
        if self.preference is not None and not self._preference_is_set():
            set_preference(self.model, self.preference, self._adapter_name())
        return self.shared.guide(self.acting_adapters) if self.shared else nullcontext()

    def reads(self, input_ids: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """What the guide reads, tokens and mask of shape `(rows, length)`, for the base model's tokens.

        Args:
            input_ids (`torch.Tensor` of shape `(rows, columns)`): The base model's tokens.
            mask (`torch.Tensor` of shape `(rows, columns)`, *optional*): Its mask; found as [`attention_mask`] does
                if not given.

        Raises:
            ValueError: the batch does not fit the guide's prompts, or there is nothing to read.
        """
        return read_by_guide(self.model, input_ids, mask, self.prompt, self.vocabulary)

    def state(self) -> tuple:
        """What answers depend on beside the tokens: the weights and the preference."""
        weights = sum(parameter._version for parameter in self._parameters)
        return weights, self.condition.version if self.condition and self.preference is None else self._version

    def preference_rows(self, rows: int) -> torch.Tensor:
        """Which of our preferences each of `rows` rows has, shape `(rows,)`. `generate` repeats rows in place."""
        own = 1 if self.preference is None or self.preference.ndim == 1 else len(self.preference)
        check_rows(own, rows)
        return torch.arange(own).repeat_interleave(rows // own)

    def _preference_is_set(self) -> bool:
        """Whether the model has our preference already: setting it anew would cost a fold of every layer."""
        current = cast(Condition, self.condition).preference
        return torch.equal(current, cast(torch.Tensor, self.preference).to(current.device))

    def _adapter_name(self) -> str | None:
        return self.adapter_names[0] if len(self.adapter_names) == 1 else None

    def _objectives(self) -> list[str]:
        if self.condition is None:
            raise ValueError(
                "`preference` was given, but the guiding model has no preference-conditioned adapter. Load one with "
                "`PeftModel.from_pretrained` after `import peft_pblora`, or leave `preference` out."
            )
        return list(self.condition.objectives)

    def _key(self) -> tuple:
        preference = None if self.preference is None else tuple(self.preference.flatten().tolist())
        shape = None if self.preference is None else self.preference.shape
        identities = id(self.model), id(self.prompt), id(self.vocabulary)
        return (
            *identities,
            tuple(self.acting_adapters),
            bool(self.adapter_names),
            self.shared_forward,
            preference,
            shape,
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LM) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        name = getattr(self.model, "name_or_path", "") or type(self.model).__name__
        details = []
        if len(self.adapter_names) == 1 and self.adapter_names != ["default"]:
            details.append(self.adapter_names[0])
        if self.disable_adapter:
            details.append("adapter off")
        if self.preference is not None and self.preference.ndim == 2:
            details.append(f"a preference for each of {len(self.preference)} rows")
        elif self.preference is not None:
            named = zip(self._objectives(), self.preference.tolist(), strict=True)
            details.append(", ".join(f"{objective}={weight:g}" for objective, weight in named))
        return f"LM({', '.join([name, *details])})"
