# SPDX-License-Identifier: Apache-2.0
"""From joint rows to padded batches, and how a batch is fed to a model: two rows for a pair, or one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .compat import pad
from .log_probs import Predictions


PROMPT, FIRST, SECOND, PADDING = 0, 1, 2, -1


@dataclass
class PreferenceCollator:
    """Pads joint rows into one batch of pairs with a label for each objective.

    Returns a dictionary with `input_ids` and `segments` of shape `(rows, length)`, `pair_labels` of shape
    `(pairs, k)` and `pair_ids` of shape `(pairs,)`. `segments` says what a token belongs to: 0 the prompt, 1 the first
    response, 2 the second, −1 padding. There are two rows for each pair, all first responses and then all second ones;
    with `share_prompt` one row holds prompt, first and second response. `pair_labels` is +1 where the first response
    is the better one for an objective, −1 where the second is, 0 where there is no label. The pairs of one joint row
    stand together.

    Args:
        pad_token_id (`int`): Id for padding.
        pad_to_multiple_of (`int`, *optional*): Round the length up.
        share_prompt (`bool`, *optional*, defaults to `False`): One row for each pair.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    share_prompt: bool = False

    def __call__(self, examples: Sequence[dict[str, list]]) -> dict[str, torch.Tensor]:
        pairs = [pair for example in examples for pair in example["pairs"]]
        if self.share_prompt:
            rows = [_row(pair, FIRST, SECOND) for pair in pairs]
        else:
            rows = [_row(pair, response) for response in (FIRST, SECOND) for pair in pairs]
        return {
            "input_ids": self._pad([ids for ids, _ in rows], self.pad_token_id),
            "segments": self._pad([segments for _, segments in rows], PADDING),
            "pair_labels": torch.tensor([pair["labels"] for pair in pairs], dtype=torch.float32),
            "pair_ids": torch.tensor([pair["pair_id"] for pair in pairs]),
        }

    def _pad(self, rows: list[torch.Tensor], value: int) -> torch.Tensor:
        return pad(rows, padding_value=value, padding_side="right", pad_to_multiple_of=self.pad_to_multiple_of)


def _row(pair: dict[str, Any], *responses: int) -> tuple[torch.Tensor, torch.Tensor]:
    parts = [(PROMPT, pair["prompt_ids"])]
    parts += [(response, pair["first_ids" if response == FIRST else "second_ids"]) for response in responses]
    ids = [token for _, tokens in parts for token in tokens]
    segments = [segment for segment, tokens in parts for _ in tokens]
    return torch.tensor(ids, dtype=torch.long), torch.tensor(segments, dtype=torch.long)


def separate_rows(batch: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], Predictions]:
    """What the model is fed, and what it predicts, where each response has a row of its own.

    The responses are numbered by row: first ones, then second ones.
    """
    ids, segments = batch["input_ids"], batch["segments"]
    inputs = {"input_ids": ids, "attention_mask": (segments != PADDING).long()}
    return inputs, Predictions.of_rows(ids, segments > PROMPT)


def shared_prompts(
    batch: dict[str, torch.Tensor], dtype: torch.dtype | None
) -> tuple[dict[str, torch.Tensor], Predictions]:
    """As [`separate_rows`] where one row holds `[prompt | first | second]`.

    Both responses start at the position after the prompt, and neither sees the other.

    Args:
        batch (`dict`): From a collator with `share_prompt=True`.
        dtype (`torch.dtype`, *optional*): Of an additive attention mask, as eager attention wants it; boolean if not
            given, as scaled dot product attention takes it.
    """
    ids, segments = batch["input_ids"], batch["segments"]
    prompts = (segments == PROMPT).sum(1)
    firsts = (segments == FIRST).sum(1)
    order = torch.arange(ids.shape[1], device=ids.device)
    positions = order - (segments == SECOND) * firsts[:, None]
    query, key = segments[:, :, None], segments[:, None, :]
    visible = (order[:, None] >= order) & (key != PADDING) & ~((query == SECOND) & (key == FIRST))
    visible |= torch.eye(len(order), dtype=torch.bool, device=ids.device)
    mask = visible[:, None]
    if dtype is not None:
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    rows, columns = (segments > PROMPT).nonzero(as_tuple=True)
    # The second response continues the prompt, not the first response.
    starts = (segments[rows, columns] == SECOND) & (columns == (prompts + firsts)[rows])
    predictors = torch.where(starts, prompts[rows], columns) - 1
    known = predictors >= 0
    rows, columns, predictors = rows[known], columns[known], predictors[known]
    groups = rows + (segments[rows, columns] == SECOND) * len(ids)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions.clamp(min=0)}
    return inputs, Predictions(rows, predictors, ids[rows, columns], groups, 2 * len(ids))
