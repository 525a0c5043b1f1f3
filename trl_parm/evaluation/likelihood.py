# SPDX-License-Identifier: Apache-2.0
"""How likely answers are: under the method that decoded them, and under the base model alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import LogitsProcessor

from peft_pblora.switch import AdapterSwitch, backbone_of
from trl_parm.decoding import Guided


LOGITS_AT_ONCE = 2**25
"""Most logits of the base model that are held at once, 128 MiB of float32."""


class ChosenLogProbs(LogitsProcessor):
    """Notes the log-probability of each token that `generate` chooses, by the scores that it gets and leaves alone.

    The first processor of a call: what comes after it, such as a temperature or noise, is not in these scores.
    """

    def __init__(self) -> None:
        self._last: torch.Tensor | None = None
        self._found: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._note(input_ids[:, -1])
        self._last = scores.float().log_softmax(-1)
        return scores

    def of(self, tokens: torch.Tensor) -> torch.Tensor:
        """log π of the new tokens, all that were chosen, shape `(rows, new)`."""
        self._note(tokens[:, -1])
        self._last = None
        return torch.stack(self._found, 1)

    def _note(self, tokens: torch.Tensor) -> None:
        if self._last is not None:
            self._found.append(self._last.gather(-1, tokens[:, None].to(self._last.device))[:, 0])


@torch.no_grad()
def base_log_probs(
    base: Any, prompts: Sequence[torch.Tensor], responses: Sequence[torch.Tensor], adapters: Sequence[str] = ()
) -> list[float]:
    """Σ log π_base of each response, in one forward for a few rows.

    Args:
        base (`PreTrainedModel`): The base model; other adapters on it than `adapters` rest.
        prompts, responses (`Sequence[torch.Tensor]`): Tokens of each row, without padding.
        adapters (`Sequence[str]`): Adapters that are the base model's own.
    """
    sums: list[float] = []
    longest = max(len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True))
    size = max(1, LOGITS_AT_ONCE // (longest * base.config.get_text_config().vocab_size))
    with AdapterSwitch.of(backbone_of(base)).only(list(adapters)):
        for start in range(0, len(prompts), size):
            few = list(zip(prompts[start : start + size], responses[start : start + size], strict=True))
            # Padded on the right, which no token before it sees.
            ids = torch.nn.utils.rnn.pad_sequence([torch.cat(pair) for pair in few], batch_first=True)
            mask = torch.nn.utils.rnn.pad_sequence(
                [torch.ones_like(torch.cat(pair)) for pair in few], batch_first=True
            )
            logits = base(input_ids=ids, attention_mask=mask, use_cache=False).logits
            for row, (prompt, response) in zip(logits, few, strict=True):
                scores = row[len(prompt) - 1 : len(prompt) - 1 + len(response)].float().log_softmax(-1)
                sums.append(scores.gather(-1, response[:, None].to(scores.device)).sum().item())
    return sums


def own_adapters(model: Any, base: Any) -> list[str]:
    """Adapters that belong to the base model in a method's model, and don't guide."""
    if isinstance(model, Guided) and model.backbone is backbone_of(base):
        return list(model.own_term().adapter_names)
    return AdapterSwitch.of(model).active if model is base else []
