# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of responses under a causal language model."""

import torch
import torch.nn.functional as F
from torch import nn


def response_log_probs(
    model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor, completion_mask: torch.Tensor
) -> torch.Tensor:
    """Sums log π over the response tokens of each row, asking the model for the logits of those positions only.

    Args:
        model (`nn.Module`): A causal language model whose forward takes `logits_to_keep`.
        input_ids (`torch.Tensor` of shape `(rows, length)`): Prompt and response, padded on the right.
        attention_mask (`torch.Tensor` of shape `(rows, length)`): 1 for tokens, 0 for padding.
        completion_mask (`torch.Tensor` of shape `(rows, length)`): 1 for response tokens, the end token included.

    Returns:
        `torch.Tensor` of shape `(rows,)`, float32.
    """
    first = int(completion_mask.any(0).nonzero()[0]) - 1
    positions = torch.arange(first, input_ids.shape[1] - 1, device=input_ids.device)
    logits = model(
        input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=positions, use_cache=False
    ).logits
    targets = input_ids[:, first + 1 :]
    log_probs = [-F.cross_entropy(row.float(), target, reduction="none") for row, target in zip(logits, targets)]
    return (torch.stack(log_probs) * completion_mask[:, first + 1 :]).sum(-1)
