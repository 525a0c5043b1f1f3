# SPDX-License-Identifier: Apache-2.0
"""From a batch of pairs to log π of both responses of each, whichever way the batch is laid out."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .collator import FIRST, PADDING, PROMPT, SECOND, separate_rows, shared_prompts
from .config import PreferenceARMConfig
from .log_probs import ResponseLogProbs


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
        self._mask_dtype = None
        self._compared = False
        if self.share_prompt:
            self._mask_dtype = _mask_dtype(model)

    def log_probs(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """log π of the first and of the second response of each pair, summed, or the mean of a token.

        Args:
            model (`nn.Module`): The model, wrapped or not.
            batch (`dict`): From [`PreferenceCollator`].

        Returns:
            `tuple` of two `torch.Tensor` of shape `(pairs,)`, float32.

        Raises:
            ValueError: with shared prompts, the model gives other values than with two rows for a pair.
        """
        if self.share_prompt and not self._compared:
            self._compare(model, batch)
        layout = shared_prompts(batch, self._mask_dtype) if self.share_prompt else separate_rows(batch)
        first, second = self._log_probs(model, *layout).chunk(2)
        return first, second

    def _log_probs(self, model, inputs, predictions) -> torch.Tensor:
        sums = self._sums(model, inputs, predictions)
        return sums / predictions.lengths().to(sums).clamp(min=1) if self.length_normalized else sums

    def _compare(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> None:
        """Makes sure, once and on a real batch, that the model is a function of positions and mask alone."""
        self._compared = True
        training = model.training
        model.eval()
        with torch.no_grad():
            shared = self._log_probs(model, *shared_prompts(batch, self._mask_dtype))
            rows = [self._log_probs(model, *separate_rows(_only(batch, r))) for r in (FIRST, SECOND)]
        model.train(training)
        separate = torch.cat(rows)
        if not torch.allclose(shared, separate, rtol=0.02, atol=0.25):
            raise ValueError(
                f"With `share_prompt=True` the model gives log-probabilities {shared.tolist()}, but "
                f"{separate.tolist()} with a row for each response: it does not follow the attention mask. Use "
                "`share_prompt=False`."
            )


def _only(batch: dict[str, torch.Tensor], response: int) -> dict[str, torch.Tensor]:
    """A shared batch with one response of each pair, still one row each."""
    ids, segments = batch["input_ids"], batch["segments"]
    kept = (segments == PROMPT) | (segments == response)
    order = torch.argsort((~kept).int(), dim=1, stable=True)
    segments = torch.where(kept, segments, PADDING).gather(1, order)
    return {**batch, "input_ids": ids.gather(1, order), "segments": segments}


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
