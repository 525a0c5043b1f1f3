# SPDX-License-Identifier: Apache-2.0
"""A language model as a scorer, with a key-value cache that is addressed by the prefix.

`generate` may call a processor for any prefix: one token further, another beam order, rolled back, another batch.
So nothing here counts calls. Every call compares the tokens it gets with the tokens in the cache and feeds the
difference; what it returns is a function of the tokens alone.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import cast

import torch
from accelerate.utils import is_peft_model
from peft import PeftModel
from transformers import DynamicCache, PreTrainedModel

from peft_pblora import as_preference, get_objectives, set_preference
from peft_pblora.adapter import LowRankAdapter
from peft_pblora.control import active_adapter, has_preference
from peft_pblora.preference import Preference

from .scorers import Scorer


class LM(Scorer):
    """log π of a second language model given the tokens so far.

    Args:
        model (`PreTrainedModel` or `PeftModel`): A causal language model with the base model's vocabulary.
        preference (`Mapping[str, float]`, `Sequence[float]` or `torch.Tensor`, *optional*):
            The preference of the model's adapter, set before every forward; the one set in the model if not given.
        disable_adapter (`bool`, *optional*, defaults to `False`):
            Use the model without its adapter: for an ARM, the untrained ARM.
        prompt_attention_mask (`torch.Tensor` of shape `(batch, prompt)`, *optional*):
            The prompt's attention mask, since `generate` does not hand it to processors. Where it is not given, a
            leading run of pad tokens, beyond one that all rows share, counts as padding.

    Raises:
        ValueError: a preference for a model without such an adapter, or one off the simplex; at the first call, a
            vocabulary of another size or a batch that does not fit the mask.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        preference: Preference | None = None,
        disable_adapter: bool = False,
        prompt_attention_mask: torch.Tensor | None = None,
    ) -> None:
        if model.config.is_encoder_decoder:
            raise ValueError("The guiding model is an encoder-decoder model. Only causal language models can guide.")
        if disable_adapter and not is_peft_model(model):
            raise ValueError("`disable_adapter=True` needs a PeftModel, but the guiding model has no adapter.")
        self.model = model.eval()
        self.preference = None
        if preference is not None:
            self.preference = as_preference(preference, _objectives(model))
        self.disable_adapter = disable_adapter
        self.prompt_attention_mask = prompt_attention_mask
        self.pad_token_id = _pad_token_id(model)
        self._parameters = list(model.parameters())
        self._preference_of = active_adapter(model) if has_preference(model) else None
        self.reset()

    def reset(self) -> None:
        """Forgets all tokens. Only needed after changing the model behind PyTorch's back, such as through `.data`."""
        self._prefix: _Prefix | None = None
        self._built_with: tuple | None = None

    @torch.no_grad()
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if (state := self._model_state()) != self._built_with:
            self.reset()
            self._built_with = state
        tokens = input_ids.to(self.model.device)
        mask = self._attention_mask(tokens)
        kept = self._prefix.align(tokens, mask) if self._prefix else 0
        if kept < tokens.shape[1]:
            cache = self._prefix.cache if self._prefix and kept else self._empty_cache()
            self._prefix = _Prefix(tokens.clone(), mask, cache, self._forward(tokens, mask, kept, cache))
        log_probs = cast(_Prefix, self._prefix).log_probs
        if log_probs.shape[-1] != scores.shape[-1]:
            raise ValueError(
                f"The guiding model has a vocabulary of {log_probs.shape[-1]}, but the base model one of "
                f"{scores.shape[-1]}. Both must share one tokenizer."
            )
        return log_probs.to(scores.device)

    def _model_state(self) -> tuple:
        """What the cache depends on beside the tokens: the weights and the preference."""
        preference = self.preference
        if preference is None and self._preference_of is not None:
            preference = self._preference_of.preference
        weights = sum(parameter._version for parameter in self._parameters)
        return weights, None if preference is None else preference.tolist()

    def _preference_is_set(self) -> bool:
        """Whether the model has our preference already: setting it anew would cost a fold of every layer."""
        current = cast(LowRankAdapter, self._preference_of).preference
        return torch.equal(current, cast(torch.Tensor, self.preference).to(current.device))

    def _empty_cache(self) -> DynamicCache:
        return DynamicCache(config=self.model.config.get_text_config())

    def _forward(self, tokens: torch.Tensor, mask: torch.Tensor, kept: int, cache: DynamicCache) -> torch.Tensor:
        if self.preference is not None and not self._preference_is_set():
            set_preference(self.model, self.preference)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with cast(PeftModel, self.model).disable_adapter() if self.disable_adapter else nullcontext():
            logits = self.model(
                input_ids=tokens[:, kept:],
                attention_mask=mask,
                position_ids=positions[:, kept:],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits
        return torch.log_softmax(logits[:, -1].float(), dim=-1)

    def _attention_mask(self, tokens: torch.Tensor) -> torch.Tensor:
        mask = torch.ones_like(tokens)
        if self.prompt_attention_mask is not None:
            given = self.prompt_attention_mask.to(tokens)
            if len(tokens) % len(given) or given.shape[1] > tokens.shape[1]:
                raise ValueError(
                    f"`prompt_attention_mask` has shape {tuple(given.shape)}, which does not fit input ids of shape "
                    f"{tuple(tokens.shape)}. Make one processor for each batch of prompts."
                )
            mask[:, : given.shape[1]] = given.repeat_interleave(len(tokens) // len(given), dim=0)
        elif len(tokens) > 1 and self.pad_token_id is None:
            raise ValueError(
                "The guiding model names neither a pad token nor an end token, so padding in a batch can't be told. "
                "Set its `generation_config.pad_token_id`, or pass `prompt_attention_mask`."
            )
        elif len(tokens) > 1:
            padding = (tokens == self.pad_token_id).cumprod(-1)
            shared = padding.sum(-1).min()
            mask -= padding * (torch.arange(tokens.shape[1], device=tokens.device) >= shared) if shared else padding
        return mask

    def __repr__(self) -> str:
        name = getattr(self.model, "name_or_path", "") or type(self.model).__name__
        if self.disable_adapter:
            return f"LM({name}, adapter off)"
        if self.preference is None:
            return f"LM({name})"
        weights = dict(zip(_objectives(self.model), self.preference.tolist(), strict=True))
        return f"LM({name}, {', '.join(f'{k}={v:g}' for k, v in weights.items())})"


@dataclass
class _Prefix:
    """The tokens that a cache holds, and the log-probabilities of the token after them."""

    tokens: torch.Tensor
    mask: torch.Tensor
    cache: DynamicCache
    log_probs: torch.Tensor

    def align(self, tokens: torch.Tensor, mask: torch.Tensor) -> int:
        """Makes the cache hold a prefix of `tokens`, its rows in their order, and returns the prefix's length.

        It is the full length only where `log_probs` is the answer already; else at least one token is left to feed.
        """
        length = min(tokens.shape[1], self.tokens.shape[1])
        old = torch.where(self.mask[:, :length].bool(), self.tokens[:, :length], -1)
        new = torch.where(mask[:, :length].bool(), tokens[:, :length], -1)
        if not torch.equal(old, new):
            length = self._follow(old, new)
        if length == tokens.shape[1] == self.tokens.shape[1]:
            return length
        kept = min(length, tokens.shape[1] - 1)
        if 0 < kept < self.tokens.shape[1]:
            self.cache.crop(kept - self.tokens.shape[1])
        return kept

    def _follow(self, old: torch.Tensor, new: torch.Tensor) -> int:
        """Reorders the cache where every new row continues some cached row; else finds the prefix that all share."""
        matches = (new[:, None] == old[None]).all(-1)
        if not matches.any(1).all():
            return int((old == new).all(0).cumprod(0).sum()) if len(old) == len(new) else 0
        rows = matches.int().argmax(1)
        self.cache.reorder_cache(cast(torch.LongTensor, rows))
        self.tokens, self.mask, self.log_probs = (t[rows] for t in (self.tokens, self.mask, self.log_probs))
        return new.shape[1]


def _objectives(model: PreTrainedModel) -> list[str]:
    if not has_preference(model):
        raise ValueError(
            "`preference` was given, but the guiding model has no preference-conditioned adapter. Load one with "
            "`PeftModel.from_pretrained` after `import peft_pblora`, or leave `preference` out."
        )
    return get_objectives(model)


def _pad_token_id(model: PreTrainedModel) -> int | None:
    for config in (model.generation_config, model.config.get_text_config()):
        if getattr(config, "pad_token_id", None) is not None:
            return config.pad_token_id
    end = model.generation_config.eos_token_id
    return end[0] if isinstance(end, list) else end
