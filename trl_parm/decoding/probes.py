# SPDX-License-Identifier: Apache-2.0
"""What a model can do, found out by looking: short texts that are read, and where tensors are kept."""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from peft_pblora.kv_cache import cache_argument
from trl_parm.cpu import PackedLinear

from .adapters import Adapters
from .branches import is_close, may_branch


TOKENS = 16
"""Length of the texts in which the order of tokens is looked at."""


@torch.no_grad()
def goes_on(model: Any, adapters: Adapters) -> bool:
    """Whether a model reads a text in two parts as it reads it in one: some with linear attention forget their state
    where several tokens follow."""
    config = model.config.get_text_config(decoder=True)
    cache = DynamicCache(config=config)
    if not any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers):
        return True
    ids = torch.arange(8, device=model.device)[None] % model.get_input_embeddings().num_embeddings
    with adapters.acting([], 1, ids.shape[1], None, None):
        whole = model(input_ids=ids, use_cache=False).logits[:, -1].float()
        for part in (ids[:, :5], ids[:, 5:]):
            later = model(input_ids=part, use_cache=True, **cache_argument(model, cache)).logits
    error = (later[:, -1].float() - whole).norm() / whole.norm()
    return bool(error < torch.finfo(model.dtype).eps ** 0.5)


@torch.no_grad()
def sees_over_padding(model: Any, adapters: Adapters) -> bool:
    """Whether padding within a text changes nothing: positions count tokens, not columns, and nothing but attention
    to the whole text tells one from the other."""
    taken = inspect.signature(type(model).forward).parameters
    if model.config.is_encoder_decoder or not may_branch(model) or not {"attention_mask", "use_cache"} <= set(taken):
        return False
    ids = torch.arange(1, TOKENS, device=model.device)[None] % model.get_input_embeddings().num_embeddings
    padded = torch.cat([ids[:, :4], torch.zeros_like(ids[:, :5]), ids[:, 4:]], 1)
    mask = torch.ones_like(padded)
    mask[:, 4:9] = 0
    given = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    given = {name: value for name, value in given.items() if name in taken}
    found = []
    for text, more in ((ids, {}), (padded, given)):
        with adapters.acting([], 1, text.shape[1], None, None):
            found.append(model(input_ids=text, use_cache=False, **more).logits[:, -1])
    return is_close(found[1], found[0])


@torch.no_grad()
def check_order(model: Any, adapters: Adapters) -> None:
    """Raises `ValueError` for a layer with adapters to which tokens come in an order of their own, such as an expert's
    of a mixture: two texts that change places must change places in every layer's input."""
    layers: list[Any] = [*adapters.ours, *adapters.loras]
    vocabulary = model.get_input_embeddings().num_embeddings
    texts = torch.randint(vocabulary, (2, TOKENS), generator=torch.Generator().manual_seed(0)).to(model.device)
    inputs: dict[nn.Module, list[torch.Tensor]] = {layer: [] for layer in layers}
    with ExitStack() as stack:
        for layer in layers:
            hook = layer.register_forward_pre_hook(lambda layer, args: inputs[layer].append(args[0]))
            stack.callback(hook.remove)
        for ids in (texts, texts.flip(0)):
            with adapters.acting([], 2, TOKENS, None, None):
                model(input_ids=ids, use_cache=False)
    for layer, found in inputs.items():
        same = len(found) == 2 and found[0].shape == found[1].shape and found[0].numel() % 2 == 0
        if not same or not torch.allclose(
            found[0].reshape(2, -1), found[1].reshape(2, -1).flip(0), atol=1e-2 * float(found[0].abs().max())
        ):
            raise ValueError(
                f"A {type(layer).__name__} of this {type(model).__name__} gets tokens of several rows in an order of "
                "its own, as experts of a mixture do, so that an adapter can't act on some rows. Adapt other layers, "
                "or give the guide weights of its own."
            )


def tensors_on_modules(model: Any, rows: int) -> dict[tuple[int, str], torch.Tensor]:
    """Attributes of a model's modules, beside parameters and buffers, that have so many rows; packed copies of weights
    are none of them, nor are vectors, such as rotary frequencies, of which there may be as many by chance."""
    return {
        (id(module), name): value
        for module in model.modules()
        if not isinstance(module, PackedLinear)
        for name, value in vars(module).items()
        if isinstance(value, torch.Tensor) and value.ndim > 1 and len(value) == rows
    }
