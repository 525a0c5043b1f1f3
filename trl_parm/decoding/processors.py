# SPDX-License-Identifier: Apache-2.0
"""The methods of the field as logits processors: each is one formula."""

from __future__ import annotations

import math

import torch
from transformers import PreTrainedModel

from peft_pblora.preference import Preference

from .language_model import LM
from .scorers import BASE, GuidedLogitsProcessor


class PARMLogitsProcessor(GuidedLogitsProcessor):
    """Guides a frozen model with one preference-aware autoregressive reward model (PARM, arXiv 2505.06274, eq. 5):

        log π(y_t) = log π_base(y_t) + 1/β · log π_ARM(y_t; α) − log Z

    Args:
        arm (`PreTrainedModel` or `PeftModel`): The reward model, with the base model's vocabulary.
        preference (`Mapping[str, float]`, `Sequence[float]` or `torch.Tensor`, *optional*):
            α on the simplex of the ARM's objectives. The preference set in the ARM if not given.
        beta (`float`, *optional*, defaults to 1.0): β > 0; the guidance strength is 1/β.
        prompt_attention_mask (`torch.Tensor` of shape `(batch, prompt)`, *optional*):
            Needed only where padding can't be told from the ids, see [`LM`].

    Raises:
        ValueError: β not positive and finite, or an invalid preference.

    Example:

    ```python
    guide = PARMLogitsProcessor(arm, {"helpful": 0.7, "harmless": 0.3}, beta=1.0)
    model.generate(**inputs, logits_processor=[guide])
    ```
    """

    def __init__(
        self,
        arm: PreTrainedModel,
        preference: Preference | None = None,
        beta: float = 1.0,
        prompt_attention_mask: torch.Tensor | None = None,
    ) -> None:
        guide = LM(arm, preference, prompt_attention_mask=prompt_attention_mask)
        super().__init__(BASE + guidance_strength(beta) * guide)


def guidance_strength(beta: float) -> float:
    """Returns 1/β. Raises `ValueError` unless β is a positive, finite number."""
    if not (isinstance(beta, int | float) and math.isfinite(beta) and beta > 0):
        raise ValueError(
            f"`beta` is {beta!r}, but it must be a positive, finite number. Guidance has strength 1/beta."
        )
    return 1.0 / beta
