# SPDX-License-Identifier: Apache-2.0
"""What a judge or a policy of its own reads: the text once, and what may follow it as branches of one forward.

    text ── candidate 1, and what follows it
        └── candidate 2, and what follows it

Branches stand one after the other in the columns after the text. A mask lets each see the text and itself, and their
positions begin anew. Whether a model reads them as texts of their own is found out by looking, not by its name.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from peft_pblora.kv_cache import cache_argument
from peft_pblora.switch import backbone_of
from trl_parm.algebra import Step

from .adapters import Adapters
from .prefix import can_take_back, follow, rewindable_cache, turning_length
from .terms import check_evaluates


WINDOWS = ("sliding_window", "window_size", "attention_window", "attention_chunk_size", "local_attention")
"""Names in a configuration of attention that does not see the whole text, which is told by columns."""
TOLERANCE = 0.03
"""How far branches may be from texts of their own, at most, relative to them; less where a dtype is exact."""


class Prefix:
    """The tokens that a model of its own has read, addressed by themselves: what is shared is not read again.

    Args:
        model (`PreTrainedModel`): The model; its forwards are the caller's.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.tokens = torch.empty(0, 0, dtype=torch.long)
        self.cache = rewindable_cache(model)
        self.turning_length = turning_length(backbone_of(model))

    def align(self, tokens: torch.Tensor, mask: torch.Tensor) -> int:
        """Makes the cache hold a prefix of what is not masked of `tokens`, and returns its length: one token at least
        is left to feed."""
        text = tokens.masked_fill(mask == 0, -1)
        rows, shared = follow(self.tokens, text)
        kept = min(shared, tokens.shape[1] - 1)
        surplus = self.tokens.shape[1] - kept
        if kept == 0 or (surplus and not can_take_back(self.cache)):
            self.cache, kept = rewindable_cache(self.model), 0
        else:
            if rows is not None:
                self.cache.reorder_cache(cast(torch.LongTensor, rows))
            if surplus:
                self.cache.crop(-surplus)
        self.tokens = text
        return kept

    def turns(self, mask: torch.Tensor, further: int) -> bool:
        """Whether texts of this mask with so many tokens more are to be read whole, see [`turning_length`]."""
        most = self.turning_length
        return most is not None and int(mask.sum(1).max()) + further > most

    def repeated(self, rows: int, times: int) -> Cache:
        """A copy of the cache in which each of its rows stands so many times."""
        cache = copy.deepcopy(self.cache)
        cache.reorder_cache(cast(torch.LongTensor, torch.arange(rows).repeat_interleave(times)))
        return cache


class Classifier:
    """How a sequence classifier judges branches, for one call of `generate`: what it has read, and how it reads best.

    Args:
        model (`PreTrainedModel`): The classifier.
        pad_token_id (`int`): Its pad token.
    """

    def __init__(self, model: PreTrainedModel, pad_token_id: int) -> None:
        self.model, self.pad_token_id = model, pad_token_id
        self.prefix = Prefix(model)
        self.branches: bool | None = None if may_branch(model) and _head(model) is not None else False
        self._asked: list[torch.Tensor] = []
        self._answer = torch.empty(0)

    def scores(self, step: Step, candidates: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """All outputs for each candidate, `(rows, k, outputs)`. Objectives that are outputs of one model ask once.

        Args:
            step ([`Step`]): The prefixes.
            candidates, mask (`torch.Tensor` of shape `(rows, k, new)`): What may follow, padded on the right.
        """
        asked = [*step.text, candidates, mask]
        if len(self._asked) != len(asked) or not all(map(torch.equal, self._asked, asked)):
            check_evaluates(self.model)
            text, seen, new, new_mask = (x.to(self.model.device) for x in asked)
            new = new.masked_fill(new_mask == 0, self.pad_token_id)
            self._answer = self._read(text, seen, new, new_mask)
            self._asked = [x.clone() for x in asked]
        return self._answer

    def _read(self, text: torch.Tensor, seen: torch.Tensor, new: torch.Tensor, new_mask: torch.Tensor) -> torch.Tensor:
        if self.prefix.turns(seen, new.shape[2]):
            return self._as_whole_texts(text, seen, new, new_mask)
        kept = self.prefix.align(text, seen)
        if self.branches:
            return self._as_branches(self.prefix.cache, text[:, kept:], seen, new, new_mask)[1]
        read(self.model, text[:, kept:], seen, self.prefix.cache)
        found = self._as_texts(seen, new, new_mask)
        if self.branches is None and new.shape[1] > 1:
            self.branches = self._can_branch(text, seen, new[:, :2], new_mask[:, :2], found[:, :2])
        return found

    def _as_texts(self, seen: torch.Tensor, new: torch.Tensor, new_mask: torch.Tensor) -> torch.Tensor:
        """Scores of candidates that are read as texts of their own. A classifier chooses the last token that is no pad
        token, which is not the last one where a text ends in it, as where it is the end token too."""
        chosen = (torch.arange(new.shape[2], device=new.device) * (new != self.pad_token_id)).argmax(-1)
        head = _head(self.model)
        if head is None or torch.equal(chosen, _last(new_mask)):
            return self._apart(self.model, seen, new, new_mask).logits.view(*new.shape[:2], -1)
        return head(self._last_hidden(seen, new, new_mask))

    def _as_whole_texts(
        self, text: torch.Tensor, seen: torch.Tensor, new: torch.Tensor, new_mask: torch.Tensor
    ) -> torch.Tensor:
        """The same without anything that was read before, which was not by the factors of such long texts."""
        rows, k, _ = new.shape
        ids = torch.cat([text.repeat_interleave(k, 0), new.flatten(0, 1)], 1)
        mask = torch.cat([seen.repeat_interleave(k, 0), new_mask.flatten(0, 1).to(seen)], 1)
        head = _head(self.model)
        found = read(self.model if head is None else _backbone(self.model), ids, mask, rewindable_cache(self.model))
        if head is None:
            return found.logits.view(rows, k, -1)
        last = found.last_hidden_state[torch.arange(len(ids), device=ids.device), _last(mask)]
        return head(last).view(rows, k, -1)

    def _last_hidden(self, seen: torch.Tensor, new: torch.Tensor, new_mask: torch.Tensor) -> torch.Tensor:
        """Hidden states `(rows, k, hidden)` at the last tokens of candidates that are read as texts of their own."""
        hidden = self._apart(_backbone(self.model), seen, new, new_mask).last_hidden_state
        last = _last(new_mask).flatten()
        return hidden[torch.arange(len(hidden), device=hidden.device), last].view(*new.shape[:2], -1)

    def _apart(self, model: Any, seen: torch.Tensor, new: torch.Tensor, new_mask: torch.Tensor) -> Any:
        """What a model says of every candidate as a text of its own, on a copy of what was read of its prefix."""
        rows, k, _ = new.shape
        mask = torch.cat([seen.repeat_interleave(k, 0), new_mask.flatten(0, 1).to(seen)], 1)
        return read(model, new.flatten(0, 1), mask, self.prefix.repeated(rows, k))

    def _as_branches(
        self, cache: Cache, text: torch.Tensor, seen: torch.Tensor, new: torch.Tensor, new_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states `(rows, k, hidden)` and scores of candidates that are read together with the last of the
        text. The cache holds the text afterwards."""
        rows, k, length = new.shape
        hidden = read_branches(_backbone(self.model), cache, text, seen, new, new_mask).last_hidden_state
        cache.crop(-k * length)
        places = text.shape[1] + torch.arange(k, device=new.device) * length + _last(new_mask)
        hidden = hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1]))
        return hidden, cast(nn.Module, _head(self.model))(hidden)

    def _can_branch(
        self, text: torch.Tensor, seen: torch.Tensor, new: torch.Tensor, new_mask: torch.Tensor, scores: torch.Tensor
    ) -> bool:
        """Whether two candidates as branches have the hidden states and scores that they have as texts."""
        cache = copy.deepcopy(self.prefix.cache)
        cache.crop(-1)
        try:
            hidden, found = self._as_branches(cache, text[:, -1:], seen, new, new_mask)
        except Exception:  # whatever a model says to such a mask
            return False
        whole = self._last_hidden(seen, new, new_mask)
        return is_close(hidden, whole) and is_close(found, scores)


class Continuations:
    """How a policy goes on after candidates, greedily, for one call of `generate`: from what it has read of the text.

    Each is a text of its own: every token is one more forward, in which branches of one text would save little.

    Args:
        policy (`PreTrainedModel`): The policy.
        tokens (`int`): How many tokens after each candidate, at most.
        pad_token_id (`int`): What stands after an end.
        adapters (`Sequence[str]`, *optional*): Those of its adapters that act, also where they rest otherwise.
    """

    def __init__(self, policy: PreTrainedModel, tokens: int, pad_token_id: int, adapters: Sequence[str] = ()) -> None:
        self.policy, self.tokens, self.pad_token_id, self.adapters = policy, tokens, pad_token_id, adapters
        self.prefix = Prefix(policy)

    def decode(self, step: Step, candidates: torch.Tensor) -> torch.Tensor:
        """Candidates `(rows, k)` with what follows them, `(rows, k, 1 + tokens)`."""
        check_evaluates(self.policy)
        rows, k = candidates.shape
        text, seen = (x.to(self.policy.device) for x in step.text)
        whole = self.prefix.turns(seen, 1 + self.tokens)
        ids = torch.cat([text.repeat_interleave(k, 0), candidates.flatten()[:, None].to(text)], 1)
        mask = torch.cat([seen.repeat_interleave(k, 0), torch.ones_like(ids[:, :1])], 1)
        with Adapters(backbone_of(self.policy)).alone(self.adapters) if self.adapters else nullcontext():
            known: dict[str, Any] = {}
            if not whole:  # or its keys would be turned by the factors of shorter texts
                kept = self.prefix.align(text, seen)
                read(self.policy, text[:, kept:], seen, self.prefix.cache, logits_to_keep=1)
                known = cache_argument(self.policy, self.prefix.repeated(rows, k))
            texts = cast(Any, self.policy).generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=self.tokens, do_sample=False, num_beams=1,
                pad_token_id=self.pad_token_id, use_cache=not whole, return_dict_in_generate=False, **known,
            )[:, text.shape[1] :]  # fmt: skip
        padded = nn.functional.pad(texts, (0, 1 + self.tokens - texts.shape[1]), value=self.pad_token_id)
        return padded.view(rows, k, -1).to(candidates.device)


def may_branch(model: PreTrainedModel) -> bool:
    """Whether a model has nothing but attention to whole texts."""
    config: Any = model.config.get_text_config()
    layers = DynamicCache(config=config).layers
    windows = any(getattr(config, name, None) for name in WINDOWS)
    return not windows and all(type(layer) is DynamicLayer for layer in layers)


@torch.no_grad()
def read(model: Any, ids: torch.Tensor, mask: torch.Tensor, cache: Cache, **settings: Any) -> Any:
    """A model's output for the last tokens of the texts of a mask."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    return model(
        input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True,
        **cache_argument(model, cache), **settings,
    )  # fmt: skip


@torch.no_grad()
def read_branches(
    model: Any,
    cache: Cache,
    text: torch.Tensor,
    seen: torch.Tensor,
    new: torch.Tensor,
    new_mask: torch.Tensor,
    **settings: Any,
) -> Any:
    """A model's output for the last tokens of texts and k branches after each, in one forward.

    Args:
        model: The model.
        cache (`Cache`): What it has read of the texts; their last tokens and the branches are added.
        text (`torch.Tensor` of shape `(rows, last)`): The tokens of the texts that it has not.
        seen (`torch.Tensor` of shape `(rows, length)`): The mask of the whole texts.
        new, new_mask (`torch.Tensor` of shape `(rows, k, new)`): The branches, and 0 for padding on the right.

    Returns:
        The output, with positions `(rows, last + k · new)`.
    """
    rows, k, length = new.shape
    last, columns = text.shape[1], seen.shape[1]
    seen, new_mask = seen.bool(), new_mask.bool()
    allowed = torch.zeros(rows, last + k * length, columns + k * length, dtype=torch.bool, device=new.device)
    steps = torch.arange(columns, device=new.device)
    allowed[:, :last, :columns] = (steps <= steps[columns - last :, None]) & seen[:, None]
    allowed[:, last:, :columns] = seen[:, None]
    causal = torch.ones(length, length, dtype=torch.bool, device=new.device).tril()
    own = torch.eye(k, dtype=torch.bool, device=new.device)[:, None, :, None] & causal[:, None]
    allowed[:, last:, columns:] = own.reshape(k * length, k * length) & new_mask.flatten(1)[:, None]
    allowed.diagonal(offset=columns - last, dim1=1, dim2=2).fill_(True)  # padding sees itself, or nothing would be
    positions = (seen.long().cumsum(-1) - 1).clamp(min=0)
    after = positions[:, -1:, None] + 1 + torch.arange(length, device=new.device)
    return model(
        input_ids=torch.cat([text, new.flatten(1)], 1),
        attention_mask=additive(allowed, model.dtype),
        position_ids=torch.cat([positions[:, columns - last :], after.expand(-1, k, -1).flatten(1)], 1),
        use_cache=True,
        **cache_argument(model, cache),
        **settings,
    )


def additive(allowed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What attention adds to its scores, `(rows, 1, queries, keys)`, for what each query may see."""
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill(~allowed, torch.finfo(dtype).min)[:, None]


def is_close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two ways to compute something agree, as far as its dtype lets them."""
    allowed = min(TOLERANCE, torch.finfo(expected.dtype).eps ** 0.5)
    found, expected = found.float(), expected.float()
    return bool((found - expected).norm() <= allowed * expected.norm())


def _last(mask: torch.Tensor) -> torch.Tensor:
    """The column of the last token of each text that is not masked, `(..., columns)` → `(...)`."""
    return (torch.arange(mask.shape[-1], device=mask.device) * (mask != 0)).argmax(-1)


def _backbone(model: PreTrainedModel) -> Any:
    """The transformer of a classifier."""
    return getattr(model, model.base_model_prefix, None)


def _head(model: PreTrainedModel) -> nn.Module | None:
    """What a classifier applies to the hidden state of a text's last token, if that is a module of its own."""
    found = next((getattr(model, name) for name in ("score", "classifier") if hasattr(model, name)), None)
    return found if isinstance(found, nn.Module) and isinstance(_backbone(model), nn.Module) else None
