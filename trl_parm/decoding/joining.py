# SPDX-License-Identifier: Apache-2.0
"""Texts that join a batch and leave it between two tokens: rows of several guided caches as one cache."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.nn.functional import pad
from transformers import Cache
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin, LinearAttentionLayer
from transformers.cache_utils import LinearAttentionAndFullAttentionLayer as HybridLayer

from .branches import is_close
from .cache import GuidedCache
from .model import Guided
from .prefix import rewindable_cache
from .prompt import OwnPrompt
from .reading import Part


STATES = ("conv_states", "recurrent_states")


@dataclass(frozen=True)
class Held:
    """Some texts of a cache.

    Attributes:
        cache ([`GuidedCache`]): Of the texts, padded on the left.
        rows (`list[int]`): Which rows of it; one may stand there several times.
        lengths (`list[int]`): How many tokens were read of each of these.
    """

    cache: GuidedCache
    rows: list[int]
    lengths: list[int]


def open_cache(guided: Guided, own_prompt: bool = False) -> GuidedCache:
    """An empty cache for texts that may be [`joined`] with others later on.

    Args:
        guided ([`Guided`]): The model that will read them.
        own_prompt (`bool`, *optional*, defaults to `False`): Whether its guides will read a prompt of their own.
    """
    return guided.new_cache(lambda term, copies: rewindable_cache(term.backbone), own_prompt)


@torch.no_grad()
def joined(guided: Guided, held: Sequence[Held], own_prompt: bool = False) -> GuidedCache:
    """One cache of texts of several, in this order, padded on the left to the longest.

    The caches were made by guided models whose formulas differ from each other in α and β alone. They are not changed.

    Args:
        guided ([`Guided`]): The model that will go on with them, with α and β of all of these rows.
        held (`Sequence[Held]`): The texts.
        own_prompt (`bool`, *optional*, defaults to `False`): As of [`open_cache`].

    Raises:
        ValueError: layers of a cache whose rows can't be put side by side, or texts on both sides of a
            [`turning_length`].
    """
    new = open_cache(guided, own_prompt)
    for number, part in enumerate(new.parts):
        _join_part(part, [(one.cache.parts[number], one) for one in held])
    new.note(max(length for one in held for length in one.lengths), sum(len(one.rows) for one in held))
    new.own = _joined_prompts(held) if own_prompt else None
    return new


@torch.no_grad()
def can_join(guided_at: Callable[[int], Guided]) -> bool:
    """Whether two texts of different lengths go on together as each does alone: found out by reading two short ones.

    Args:
        guided_at (`Callable`): Gives the model for so many rows, all at the same α and β.
    """
    one, two = guided_at(1), guided_at(2)
    known = one.backbone.get_input_embeddings().num_embeddings
    texts = [torch.arange(1, 1 + length, device=one.device)[None] % known for length in (5, 9)]
    caches = [open_cache(one) for _ in texts]
    last = torch.tensor([[2], [3]], device=one.device) % known
    for ids, cache in zip(texts, caches):
        read(one, cache, ids, [0])
    try:
        both = joined(two, [Held(cache, [0], [ids.shape[1]]) for ids, cache in zip(texts, caches)])
        found = read(two, both, last, [4, 0])
    except (IndexError, RuntimeError, TypeError, ValueError):  # whatever a model says to rows of several lengths
        return False
    expected = [read(one, cache, last[i : i + 1], [0]) for i, cache in enumerate(caches)]
    return is_close(found, torch.cat(expected))


@torch.no_grad()
def can_read_on(guided: Guided) -> bool:
    """Whether a text can be read in two parts, where several tokens follow others."""
    cache, ids = open_cache(guided), torch.ones(1, 4, dtype=torch.long, device=guided.device)
    read(guided, cache, ids, [0])
    try:
        read(guided, cache, ids, [0])
    except ValueError:  # of a model that forgets
        return False
    return True


def read(
    guided: Guided,
    cache: GuidedCache,
    ids: torch.Tensor,
    pads: Sequence[int],
    own: tuple[torch.Tensor, torch.Tensor] | None = None,
    prompt_length: int = 0,
) -> torch.Tensor:
    """Reads what comes next of some texts, and returns log π after it, `(rows, vocab)`.

    Args:
        guided ([`Guided`]), cache ([`GuidedCache`]): The model, and what it has read.
        ids (`torch.Tensor` of shape `(rows, new)`): The next tokens of each.
        pads (`Sequence[int]`): How many columns of padding each text has before it.
        own (`tuple`, *optional*): Ids and mask of the guides' own prompts; those that were read before count.
        prompt_length (`int`, *optional*): Columns of the text that these stand for, at the first call.
    """
    columns = torch.arange(cache.length + ids.shape[1], device=ids.device)
    mask = (columns >= torch.tensor(pads, device=ids.device)[:, None]).long()
    own = own if cache.own is None else cache.own
    given = {} if own is None else {"guide_input_ids": own[0], "guide_attention_mask": own[1]}
    if all(cache.is_linear):  # a recurrent model would take it for the mask of what is new, which has no padding
        given |= {"attention_mask": None, "text_mask": mask}
    else:
        given |= {"attention_mask": mask}
    output = guided(
        input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, prompt_length=prompt_length, **given
    )
    return output.logits[:, -1]


def _joined_prompts(held: Sequence[Held]) -> OwnPrompt:
    """The prompts of the guides' own that were read of texts, padded on the left to the longest."""
    found = [cast(OwnPrompt, one.cache.own) for one in held]
    width = max(ids.shape[1] for ids, _ in found)
    padded = [[pad(x[one.rows], (width - x.shape[1], 0)) for x in own] for one, own in zip(held, found)]
    return torch.cat([ids for ids, _ in padded]), torch.cat([mask for _, mask in padded])


def _join_part(part: Part, held: Sequence[tuple[Part, Held]]) -> None:
    masks = [_mask(old, one) for old, one in held]
    widths = [mask.shape[1] for mask in masks]
    width = max(columns - int(mask.any(0).int().argmax()) for columns, mask in zip(widths, masks))
    shifts = [width - columns for columns in widths]
    if held[0][0].mask is not None:
        part.mask = torch.cat([_shifted(mask[..., None], shift)[..., 0] for mask, shift in zip(masks, shifts)])
    part.longest, part.turned = max(old.longest for old, _ in held), held[0][0].turned
    if any(old.turned != part.turned for old, _ in held):
        raise ValueError(
            f"A {type(part.model).__name__} turns its keys by other factors in texts of more than "
            f"{part.turning_length} tokens: shorter and longer ones can't be put side by side."
        )
    kinds = len(part.terms)
    rows = [
        torch.tensor([[kind * old_rows + row for row in one.rows] for kind in range(kinds)])
        for old_rows, one in ((one.cache.rows, one) for _, one in held)
    ]
    caches = [cast(Cache, old.cache) for old, _ in held]
    cast(Cache, part.cache).layers = [
        _joined_layer([cache.layers[i] for cache in caches], rows, shifts) for i in range(len(caches[0].layers))
    ]


def _mask(old: Part, one: Held) -> torch.Tensor:
    """Of what a part has read of the texts, `(rows, columns)`."""
    if old.mask is not None:
        return old.mask[one.rows]
    return torch.arange(one.cache.length) >= one.cache.length - torch.tensor(one.lengths)[:, None]


def _joined_layer(layers: Sequence[Any], rows: Sequence[torch.Tensor], shifts: Sequence[int]) -> Any:
    """The layers of one place in several caches as one: keys and values shifted to one length, states as they are."""
    kind = type(layers[0])
    if kind not in (DynamicLayer, LinearAttentionLayer, HybridLayer):
        raise ValueError(f"Rows of a {kind.__name__} of several caches can't be put side by side.")
    new = copy.copy(layers[0])
    if isinstance(new, DynamicLayer) and new.is_initialized:
        new.keys, new.values = (
            _side_by_side([_shifted(getattr(layer, name), shift) for layer, shift in zip(layers, shifts)], rows)
            for name in ("keys", "values")
        )
    if isinstance(new, LinearAttentionCacheLayerMixin):
        for name in STATES:
            places = [getattr(layer, name) for layer in layers]
            whole = {
                i: None if x is None else _side_by_side([p[i] for p in places], rows) for i, x in places[0].items()
            }
            setattr(new, name, whole)
    return new


def _shifted(x: torch.Tensor, shift: int) -> torch.Tensor:
    """With so many columns of zeros more, or less, on the left: `(..., columns, n)`."""
    return pad(x, (0, 0, shift, 0))


def _side_by_side(found: Sequence[torch.Tensor], rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Rows of several tensors as one, term by term: `(terms · all rows, ...)`."""
    chosen = [x[own.to(x.device)] for x, own in zip(found, rows)]
    return torch.cat(chosen, 1).flatten(0, 1)
