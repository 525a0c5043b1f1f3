# SPDX-License-Identifier: Apache-2.0
"""The loss of an autoregressive reward model, as mathematics on log-probabilities. It knows nothing of models or data.

PARM (arXiv 2505.06274, section 3; GenARM, arXiv 2410.08193, eq. 8, is the case of one objective):

    l_i = −log σ( z_i β_i [log π(y1|x) − log π(y2|x)] ),  z_i = +1 where y1 is better for objective i, −1 where y2 is
    L   = Σ_i α_i l_i
"""

import torch
import torch.nn.functional as F


def pair_losses(margins: torch.Tensor, labels: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    """The loss of every pair for every objective.

    Args:
        margins (`torch.Tensor` of shape `(pairs,)`): log π(y1|x) − log π(y2|x), summed over response tokens.
        labels (`torch.Tensor` of shape `(pairs, k)`): +1 where y1 is the better one, −1 where y2 is, 0 for no label.
        beta (`torch.Tensor` of shape `(k,)`): β_i of each objective, positive.

    Returns:
        `torch.Tensor` of shape `(pairs, k)`, 0 where there is no label.
    """
    losses = -F.logsigmoid(labels * beta * margins[:, None])
    return torch.where(labels == 0, torch.zeros_like(losses), losses)


def objective_losses(losses: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean loss of each objective over the pairs that have a label for it; 0 where none has.

    Args:
        losses (`torch.Tensor` of shape `(pairs, k)`): From [`pair_losses`].
        labels (`torch.Tensor` of shape `(pairs, k)`).

    Returns:
        `torch.Tensor` of shape `(k,)`.
    """
    return losses.sum(0) / (labels != 0).sum(0).clamp(min=1)


def accuracies(margins: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Whether each labelled pair is ranked as labelled: 1, 0, or NaN where there is no label, shape `(pairs, k)`."""
    correct = (margins[:, None] * labels > 0).float()
    return torch.where(labels == 0, torch.full_like(correct, torch.nan), correct)
