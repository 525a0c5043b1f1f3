# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of responses under a causal language model, computed for response tokens only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .chunked import token_log_probs


@dataclass
class Predictions:
    """Which tokens of a batch are predicted where, and which of them are summed together.

    Args:
        rows, positions (`torch.Tensor` of shape `(tokens,)`): Where the model predicts the token.
        targets (`torch.Tensor` of shape `(tokens,)`): The token's id.
        groups (`torch.Tensor` of shape `(tokens,)`): The response that the token belongs to.
        count (`int`): Number of responses.
    """

    rows: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    groups: torch.Tensor
    count: int

    @classmethod
    def of_rows(cls, input_ids: torch.Tensor, completion_mask: torch.Tensor) -> Predictions:
        """One response in each row, marked in `completion_mask`; a first token that nothing precedes is left out."""
        rows, columns = completion_mask[:, 1:].nonzero(as_tuple=True)
        return cls(rows, columns, input_ids[rows, columns + 1], rows, len(input_ids))

    def sum(self, log_probs: torch.Tensor) -> torch.Tensor:
        """Sums `(tokens,)` values by response, to shape `(count,)`."""
        return log_probs.new_zeros(self.count).index_add(0, self.groups.to(log_probs.device), log_probs)

    def lengths(self) -> torch.Tensor:
        """Predicted tokens of each response, shape `(count,)`."""
        return torch.bincount(self.groups, minlength=self.count)


class ResponseLogProbs:
    """Sums log π over the tokens of each response, never holding a float32 tensor of (rows, tokens, vocabulary).

    Where the model's output head is a frozen linear layer and nothing follows it, hooks take its input and give back
    the sums, so that logits exist for a chunk of response tokens at a time. The model is called as it is, so that
    whatever wraps it (adapters, DDP, FSDP) works. Otherwise the model returns the logits of the response positions
    and their log-softmax is taken, and repeated in backward, chunk by chunk.

    Args:
        model (`nn.Module`): A causal language model, with or without adapters, before it is wrapped for distribution.
        chunked (`bool`, *optional*, defaults to `True`): Whether the hooks may be used.
    """

    def __init__(self, model: nn.Module, chunked: bool = True) -> None:
        self.head = _frozen_head(model) if chunked else None
        self._checked = False

    def __call__(self, model: nn.Module, inputs: dict[str, Any], predictions: Predictions) -> torch.Tensor:
        """Sums log π of each response.

        Args:
            model (`nn.Module`): The model, wrapped or not.
            inputs (`dict`): `input_ids`, `attention_mask` and whatever else its forward takes.
            predictions ([`Predictions`]): The tokens.

        Returns:
            `torch.Tensor` of shape `(predictions.count,)`, float32.
        """
        if self.head is not None:
            with _answering_head(self.head, predictions) as answers:
                sums = model(**inputs, use_cache=False).logits[:, 0, 0].float()
            if self._checked or torch.equal(sums.detach(), answers[0]):
                self._checked = True
                return sums
            # The model scales or caps its logits after the head.
            self.head = None
        return self._from_logits(model, inputs, predictions)

    def _from_logits(self, model: nn.Module, inputs: dict[str, Any], predictions: Predictions) -> torch.Tensor:
        first, last = predictions.positions.min(), predictions.positions.max()
        keep = torch.arange(int(first), int(last) + 1, device=predictions.positions.device)
        logits = model(**inputs, use_cache=False, logits_to_keep=keep).logits
        rows, positions, targets = (
            t.to(logits.device).split(256)
            for t in (predictions.rows, predictions.positions - first, predictions.targets)
        )
        chunks = [
            checkpoint(_log_softmax_at, logits, *chunk, use_reentrant=False)
            for chunk in zip(rows, positions, targets, strict=True)
        ]
        return predictions.sum(torch.cat(cast(list[torch.Tensor], chunks)))


def _log_softmax_at(logits, rows, positions, targets) -> torch.Tensor:
    return -F.cross_entropy(logits[rows, positions].float(), targets, reduction="none")


def _frozen_head(model: nn.Module) -> nn.Linear | None:
    """The output head if it is a plain linear layer that is not trained, and whole in this process."""
    head = cast(Any, model).get_output_embeddings()
    if type(head) is not nn.Linear or any(p.requires_grad or hasattr(p, "ds_id") for p in head.parameters()):
        return None
    return head


@contextmanager
def _answering_head(head: nn.Linear, predictions: Predictions) -> Iterator[list[torch.Tensor]]:
    """Lets the head return the log-probabilities of responses, of shape `(count, 1, 1)`, in the place of logits."""
    inputs: list[torch.Tensor] = []
    answers: list[torch.Tensor] = []

    def take(module: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        inputs.append(args[0])
        return (args[0][:, :0],)

    def answer(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        at = predictions.rows.to(output.device), predictions.positions.to(output.device)
        weight, bias = cast(nn.Linear, module).weight, cast(nn.Linear, module).bias
        values = token_log_probs(inputs.pop()[at], weight, bias, predictions.targets.to(output.device))
        sums = predictions.sum(values)
        answers.append(sums.detach())
        return sums[:, None, None]

    handles = [head.register_forward_pre_hook(take), head.register_forward_hook(answer)]
    try:
        yield answers
    finally:
        for handle in handles:
            handle.remove()
