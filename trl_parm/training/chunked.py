# SPDX-License-Identifier: Apache-2.0
"""log π of chosen tokens straight from hidden states, without a matrix of (tokens, vocabulary).

With a frozen output head only the gradient of the hidden states is wanted. It is computed where the logits are, chunk
by chunk in the forward, and kept in the size of the hidden states; the backward is one product with a vector.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


LOGITS_AT_ONCE = {"cpu": 2**22}
"""Most logits of a chunk by device; elsewhere 2²⁵, which is 128 MiB of float32."""


def token_log_probs(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
) -> torch.Tensor:
    """log_softmax(hidden @ weight.T + bias) at the targets.

    Args:
        hidden (`torch.Tensor` of shape `(tokens, size)`): Last hidden states; the only input that gets a gradient.
        weight (`torch.Tensor` of shape `(vocab, size)`): The output head's weight.
        bias (`torch.Tensor` of shape `(vocab,)`, *optional*): Its bias.
        targets (`torch.Tensor` of shape `(tokens,)`): Token ids.

    Returns:
        `torch.Tensor` of shape `(tokens,)`, float32.
    """
    return _TokenLogProbs.apply(hidden, weight, bias, targets)  # pyright: ignore[reportReturnType]


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets):
        dtype = hidden.dtype
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        size = max(1, LOGITS_AT_ONCE.get(hidden.device.type, 2**25) // weight.shape[0])
        gradients = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        log_probs = []
        for start in range(0, len(targets), size):
            chunk = slice(start, start + size)
            logits = F.linear(hidden[chunk].to(dtype), weight, bias).float()
            target = targets[chunk, None]
            normalizer = torch.logsumexp(logits, -1, keepdim=True)
            log_probs.append((logits.gather(-1, target) - normalizer)[:, 0])
            if gradients is not None:
                probabilities = logits.sub_(normalizer).exp_().to(dtype)
                gradients[chunk] = (weight[target[:, 0]] - probabilities @ weight).to(hidden.dtype)
        ctx.save_for_backward(gradients)
        return torch.cat(log_probs) if log_probs else hidden.new_zeros(0, dtype=torch.float32)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *outputs):
        (gradients,) = ctx.saved_tensors
        return gradients * outputs[0][:, None].to(gradients.dtype), None, None, None
