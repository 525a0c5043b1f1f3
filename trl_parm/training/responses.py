# SPDX-License-Identifier: Apache-2.0
"""From a batch of pairs to log π of both responses of each, whichever way the batch is laid out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .collator import PADDING, PreferenceCollator, separate_rows, shared_prompts
from .config import PreferenceARMConfig
from .log_probs import Predictions, ResponseLogProbs


class Responses:
    """log π of the two responses of each pair.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The model, before it is wrapped for distribution.
        args ([`PreferenceARMConfig`]): Says whether prompts are shared and log-probabilities normalised.

    Raises:
        ValueError: `share_prompt` with a kind of attention that takes no mask, or with a window.
    """

    def __init__(self, model: Any, args: PreferenceARMConfig) -> None:
        self.share_prompt, self.length_normalized = args.share_prompt, args.length_normalized
        self.rows_per_pair = 1 if self.share_prompt else 2
        self._sums = ResponseLogProbs(model, chunked=not args.torch_compile)
        if self.share_prompt:
            self._mask_dtype = _mask_dtype(model)
            self._in_float32 = model.dtype == torch.float32 and not (args.bf16 or args.fp16)
            positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
            self._longest = min((n for n in (args.max_length, positions) if n), default=None)

    def log_probs(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """log π of the first and of the second response of each pair, summed, or the mean of a token.

        Args:
            model (`nn.Module`): The model, wrapped or not.
            batch (`dict`): From [`PreferenceCollator`].

        Returns:
            `tuple` of two `torch.Tensor` of shape `(pairs,)`, float32.
        """
        inputs, predictions = self._layout(batch, self.share_prompt)
        sums = self._sums(model, inputs, predictions)
        if self.length_normalized:
            sums = sums / predictions.lengths().to(sums).clamp(min=1)
        first, second = sums.chunk(2)
        return first, second

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
        training = model.training
        model.eval()
        try:
            separate = self._of_tokens(model, example, False, ids.device)
            shared = self._of_tokens(model, example, True, ids.device)
        finally:
            model.train(training)
        error = (shared - separate).abs().max().item()
        exact = self._in_float32 and ids.device.type == "cpu"
        if not error < (1e-3 if exact else 0.5):
            raise ValueError(
                f"With `share_prompt=True` the model's log-probabilities differ by {error:.2g} for a token from those "
                "with a row for each response: it does not follow mask and positions. Use `share_prompt=False`."
            )

    @torch.no_grad()
    def _of_tokens(self, model: nn.Module, example: dict[str, list], shared: bool, device: Any) -> torch.Tensor:
        batch = PreferenceCollator(0, share_prompt=shared)([example])
        inputs, predictions = self._layout({name: tensor.to(device) for name, tensor in batch.items()}, shared)
        tokens = torch.arange(len(predictions.targets), device=device)
        try:
            return self._sums(model, inputs, replace(predictions, groups=tokens, count=len(tokens)))
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            if not shared or isinstance(error, torch.OutOfMemoryError):
                raise
            raise ValueError(
                "`share_prompt=True` feeds a mask for each pair of tokens, which the model can't take: "
                f"{type(error).__name__}: {error}. Use `share_prompt=False`."
            ) from error

    def _layout(self, batch: dict[str, torch.Tensor], shared: bool) -> tuple[dict[str, torch.Tensor], Predictions]:
        return shared_prompts(batch, self._mask_dtype) if shared else separate_rows(batch)


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
