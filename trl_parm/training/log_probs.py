# SPDX-License-Identifier: Apache-2.0
"""log π of the responses of a batch under a causal language model.

Only the tokens of responses get logits, and never a float32 matrix of (rows, tokens, vocabulary).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from trl_parm.cpu import PackedLinear

from .config import PreferenceARMConfig
from .data import PADDING, PreferenceCollator
from .layout import Predictions, dense_places, separate_rows, shared_prompts
from .model import in_evaluation, limits_of


LOGITS_AT_ONCE = {"cpu": 2**22}
"""Most logits of a chunk by device; elsewhere 2²⁵, which is 128 MiB of float32."""


class Responses:
    """log π of the two responses of each pair under a model, which is given before it is wrapped for distribution.

    Raises:
        ValueError: `share_prompt` with a kind of attention that takes no mask, or with a window.
    """

    def __init__(self, model: Any, args: PreferenceARMConfig) -> None:
        self.share_prompt, self.length_normalized = args.share_prompt, args.length_normalized
        self.rows_per_pair = 1 if self.share_prompt else 2
        self._sums = ResponseLogProbs(model, chunked=not args.torch_compile)
        self._packs = self.share_prompt and args.preference_per == "step" and not args.torch_compile
        if self.share_prompt:
            self._mask_dtype = _mask_dtype(model)
            self._width, self._multiple = model.config.get_text_config().hidden_size, args.pad_to_multiple_of or 1
            self._in_float32 = model.dtype == torch.float32 and not (args.bf16 or args.fp16)
            self._longest = min((n for n in (args.max_length, limits_of(model).positions) if n), default=None)

    def log_probs(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """log π of both responses of each pair of a [`PreferenceCollator`]'s batch, summed, or the mean of a token.

        Returns:
            `torch.Tensor` of shape `(2, pairs)`, float32.
        """
        inputs, predictions = self._layout(batch, self.share_prompt)
        sums = self._sums(model, inputs, predictions)
        if self.length_normalized:
            sums = sums / predictions.lengths().to(sums).clamp(min=1)
        return sums.unflatten(0, (2, -1))

    def check_shared_prompts(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> None:
        """Makes sure that the model is a function of positions and mask alone, so that prompts can be shared.

        It reads a pair of tokens from the batch, as long as training may meet one, in one row and in two.

        Raises:
            ValueError: the results differ, or the model can't be fed that way.
        """
        ids = batch["input_ids"][batch["segments"] != PADDING]
        length = (self._longest or batch["input_ids"].shape[1]) // 2
        drawn = torch.randint(len(ids), (3, length), generator=torch.Generator().manual_seed(0)).to(ids.device)
        pair = dict(zip(("prompt_ids", "first_ids", "second_ids"), ids[drawn].tolist(), strict=True))
        example = {"pairs": [{**pair, "labels": [], "pair_id": 0}]}
        with in_evaluation(model), torch.no_grad():
            try:
                separate = self._of_tokens(model, example, False, ids.device)
                shared = self._of_tokens(model, example, True, ids.device)
            except torch.OutOfMemoryError:
                raise
            except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
                raise ValueError(
                    "`share_prompt=True` feeds a mask for each pair of tokens, which the model can't take: "
                    f"{type(error).__name__}: {error}. Use `share_prompt=False`."
                ) from error
        error = (shared - separate).abs().max().item()
        exact = self._in_float32 and ids.device.type == "cpu"
        if not error < (1e-3 if exact else 0.5):
            raise ValueError(
                f"With `share_prompt=True` the model's log-probabilities differ by {error:.2g} for a token from those "
                "with a row for each response: it does not follow mask and positions. Use `share_prompt=False`."
            )

    def _of_tokens(self, model: nn.Module, example: dict[str, list], shared: bool, device: Any) -> torch.Tensor:
        batch = PreferenceCollator(0, share_prompt=shared)([example])
        inputs, predictions = self._layout({name: tensor.to(device) for name, tensor in batch.items()}, shared)
        tokens = torch.arange(len(predictions.targets), device=device)
        return self._sums(model, inputs, replace(predictions, groups=tokens, count=len(tokens)))

    def _layout(self, batch: dict[str, torch.Tensor], shared: bool) -> tuple[dict[str, torch.Tensor], Predictions]:
        if not shared:
            return separate_rows(batch)
        places = None
        if self._packs:
            places = dense_places(batch, self._width, self._longest, self._multiple)
        return shared_prompts(batch, self._mask_dtype, places)


class ResponseLogProbs:
    """Sums log π over the tokens of each response, never holding a float32 tensor of (rows, tokens, vocabulary).

    Where the model's output head is a frozen linear layer and nothing follows it, hooks take its input and give back
    the sums, so that logits exist for a chunk of response tokens at a time. The model is called as it is, so that
    whatever wraps it (adapters, DDP, FSDP) works. Otherwise the model returns the logits of the response positions
    and their log-softmax is taken, and repeated in backward, chunk by chunk; `chunked=False` always does so.
    """

    def __init__(self, model: nn.Module, chunked: bool = True) -> None:
        self.head = _frozen_head(model) if chunked else None
        self._checked = False

    def __call__(self, model: nn.Module, inputs: dict[str, Any], predictions: Predictions) -> torch.Tensor:
        """log π of each response under the model, wrapped or not, shape `(predictions.count,)`, float32."""
        if self.head is not None:
            with _answering_head(self.head, predictions) as answers:
                logits = model(**inputs, use_cache=False).logits.float()
            if self._checked or torch.equal(logits.detach(), answers[0]):
                self._checked = True
                return logits.flatten()[: predictions.count]
            # The model scales, caps, masks or cuts its logits after the head.
            self.head = None
        return self._from_logits(model, inputs, predictions)

    def _from_logits(self, model: nn.Module, inputs: dict[str, Any], predictions: Predictions) -> torch.Tensor:
        first, last = predictions.positions.min(), predictions.positions.max()
        keep = torch.arange(int(first), int(last) + 1, device=predictions.positions.device)
        logits = model(**inputs, use_cache=False, logits_to_keep=keep).logits
        length = inputs["input_ids"].shape[1]
        if logits.shape[1] == length:  # also of a model that does not know `logits_to_keep`
            first = 0
        elif logits.shape[1] != len(keep):
            raise ValueError(
                f"The model gave logits for {logits.shape[1]} positions, but it was asked for {len(keep)} of {length} "
                "by `logits_to_keep`. Its forward must give those, or all."
            )
        rows, positions, targets = (
            t.to(logits.device).split(256)
            for t in (predictions.rows, predictions.positions - first, predictions.targets)
        )
        chunks = [
            checkpoint(_log_softmax_at, logits, *chunk, use_reentrant=False)
            for chunk in zip(rows, positions, targets, strict=True)
        ]
        return predictions.sum(torch.cat(cast(list[torch.Tensor], chunks)))


class _TokenLogProbs(torch.autograd.Function):
    """log_softmax(hidden @ weight.T + bias) at the targets, shape `(tokens,)`, float32.

    Its arguments are hidden states `(tokens, size)`, the only ones that get a gradient, weight `(vocab, size)`, bias
    `(vocab,)` or `None`, targets `(tokens,)`, and the dtype of products, that of the hidden states if `None`.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, dtype=None):
        dtype = dtype or hidden.dtype
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        size = max(1, LOGITS_AT_ONCE.get(hidden.device.type, 2**25) // weight.shape[0])
        gradients = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        log_probs = []
        for start in range(0, len(targets), size):
            chunk = slice(start, start + size)
            logits = F.linear(hidden[chunk].to(dtype), weight, bias)
            every = torch.log_softmax(logits, -1, dtype=torch.float32)
            target = targets[chunk, None]
            log_probs.append(every.gather(-1, target)[:, 0])
            if gradients is not None:
                probabilities = every.exp_().to(dtype)
                gradients[chunk] = (weight[target[:, 0]] - probabilities @ weight).to(hidden.dtype)
        ctx.save_for_backward(gradients)
        return torch.cat(log_probs) if log_probs else hidden.new_zeros(0, dtype=torch.float32)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *outputs):
        (gradients,) = ctx.saved_tensors
        return gradients * outputs[0][:, None].to(gradients.dtype), None, None, None, None


token_log_probs: Any = _TokenLogProbs.apply


def _mask_dtype(model: Any) -> torch.dtype | None:
    config = model.config.get_text_config()
    attention = config._attn_implementation
    if attention not in ("sdpa", "eager"):
        raise ValueError(
            f"`share_prompt=True` needs attention that takes a mask, but the model uses {attention!r}. Load it with "
            "`attn_implementation='sdpa'`."
        )
    layers = getattr(config, "layer_types", None) or ["full_attention"]
    if set(layers) != {"full_attention"} or (
        getattr(config, "sliding_window", None) and not hasattr(config, "layer_types")
    ):
        raise ValueError(
            f"`share_prompt=True` needs attention to all tokens, but the model has {sorted(set(layers))} with a "
            f"window of {getattr(config, 'sliding_window', None)}. Use `share_prompt=False`."
        )
    return model.dtype if attention == "eager" else None


def _log_softmax_at(logits, rows, positions, targets) -> torch.Tensor:
    return -F.cross_entropy(logits[rows, positions].float(), targets, reduction="none")


def _frozen_head(model: nn.Module) -> nn.Linear | None:
    """The output head if it is a plain linear layer that is not trained, and whole in this process."""
    head = cast(Any, model).get_output_embeddings()
    if type(head) not in (nn.Linear, PackedLinear) or any(
        p.requires_grad or hasattr(p, "ds_id") for p in head.parameters()
    ):
        return None
    return head


@contextmanager
def _answering_head(head: nn.Linear, predictions: Predictions) -> Iterator[list[torch.Tensor]]:
    """Lets the head return the log-probabilities of responses in the place of logits, as few as fill the vocabulary.

    They stand there again and again, so that it shows whether the model changes the logits of any token.
    """
    inputs: list[torch.Tensor] = []
    answers: list[torch.Tensor] = []

    def take(module: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        inputs.append(args[0])
        return (args[0][:, :0],)

    def answer(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        at = predictions.rows.to(output.device), predictions.positions.to(output.device)
        weight, bias, dtype = cast(Any, module).weight, module.bias, getattr(module, "dtype", None)
        values = token_log_probs(inputs.pop()[at], weight, bias, predictions.targets.to(output.device), dtype)
        sums = predictions.sum(values)
        size = math.ceil(len(sums) / len(weight)) * len(weight)
        filled = sums.repeat(math.ceil(size / len(sums)))[:size].view(1, -1, len(weight))
        answers.append(filled.detach().clone())  # the model may write into what it gets
        return filled

    handles = [head.register_forward_pre_hook(take), head.register_forward_hook(answer)]
    try:
        yield answers
    finally:
        for handle in handles:
            handle.remove()
