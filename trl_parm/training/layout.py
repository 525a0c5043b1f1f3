# SPDX-License-Identifier: Apache-2.0
"""How a batch of pairs is fed to a causal language model, and where it then predicts the tokens of the responses."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .data import FIRST, PADDING, PROMPT, SECOND


def separate_rows(batch: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], Predictions]:
    """What the model is fed, and what it predicts, where each response has a row of its own.

    The responses are numbered by row: first ones, then second ones. A first token that nothing precedes is left out.
    """
    ids, segments = batch["input_ids"], batch["segments"]
    inputs = {"input_ids": ids, "attention_mask": (segments != PADDING).long()}
    rows, positions = (segments[:, 1:] > PROMPT).nonzero(as_tuple=True)
    return inputs, Predictions(rows, positions, ids[rows, positions + 1], rows, len(ids))


def shared_prompts(
    batch: dict[str, torch.Tensor], dtype: torch.dtype | None, places: Places | None = None
) -> tuple[dict[str, torch.Tensor], Predictions]:
    """As [`separate_rows`] where `[prompt | first | second]` of a pair stand in one row, with other pairs or alone.

    Both responses start at the position after the prompt, and neither sees the other, nor another pair. The attention
    mask is additive and of a `dtype`, as eager attention wants it, or boolean, as scaled dot product attention takes
    it. Without `places` every pair has a row of its own.
    """
    ids, segments = batch["input_ids"], batch["segments"]
    count, length = ids.shape
    prompts = (segments == PROMPT).sum(1)
    firsts = (segments == FIRST).sum(1)
    order = torch.arange(length, device=ids.device)
    positions = (order - (segments == SECOND) * firsts[:, None]).clamp(min=0)
    numbers = torch.arange(count, device=ids.device)
    places = places or Places(numbers, torch.zeros_like(numbers), count, length)
    pairs = places.fill(numbers[:, None].expand_as(ids), segments, -1)
    parts = places.fill(segments, segments, PADDING)
    order = torch.arange(places.length, device=ids.device)
    query, key = parts[:, :, None], parts[:, None, :]
    visible = (pairs[:, :, None] == pairs[:, None, :]) | (order < places.common)
    visible &= (order[:, None] >= order) & (key != PADDING) & ~((query == SECOND) & (key == FIRST))
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
    groups = rows + (segments[rows, columns] == SECOND) * count
    inputs = {
        "input_ids": places.fill(ids, segments), "attention_mask": mask,
        "position_ids": places.fill(positions, segments),
    }  # fmt: skip
    return inputs, Predictions(*places.of(rows, predictors), ids[rows, columns], groups, 2 * count)


@dataclass
class Places:
    """Where each pair stands among the rows that a model is fed.

    Args:
        rows, starts (`torch.Tensor` of shape `(pairs,)`): The row of a pair, and the column at which it begins, or
            what it has not in common with all others.
        count, length (`int`): Rows, and columns of each.
        common (`int`, *optional*, defaults to 0): Columns at the start of each row that belong to all of its pairs.
    """

    rows: torch.Tensor
    starts: torch.Tensor
    count: int
    length: int
    common: int = 0

    def of(self, pairs: torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows and columns at which columns of pairs stand."""
        own = self.starts[pairs] + columns - self.common
        return self.rows[pairs], torch.where(columns < self.common, columns, own)

    def fill(self, values: torch.Tensor, segments: torch.Tensor, padding: int = 0) -> torch.Tensor:
        """Puts values of pairs, `(pairs, columns)`, where their tokens stand, `(count, length)`."""
        pairs, columns = (segments != PADDING).nonzero(as_tuple=True)
        filled = values.new_full((self.count, self.length), padding)
        filled[self.of(pairs, columns)] = values[pairs, columns]
        return filled


def dense_places(batch: dict[str, torch.Tensor], width: int, longest: int | None = None, multiple: int = 1) -> Places:
    """Places of pairs in few rows with little padding, where the start that all prompts have in common, as chat
    templates make it, is read once in a row.

    Longer pairs come first, each in the shortest row. There are as many rows as cost least, where attention to `width`
    tokens costs as much as the linear layers of one.

    Args:
        batch (`dict`): Of a [`PreferenceCollator`] with `share_prompt`.
        width (`int`): The model's hidden size.
        longest (`int`, *optional*): Most columns of a row of several pairs.
        multiple (`int`, *optional*, defaults to 1): Round the length up.
    """
    ids, segments = batch["input_ids"], batch["segments"]
    alike = ((ids == ids[0]) & (segments == PROMPT)).all(0)
    common = int(alike.cumprod(0).sum()) if len(ids) > 1 else 0
    lengths = [length - common for length in (segments != PADDING).sum(1).tolist()]
    fits, costs = [_balanced(lengths, rows) for rows in range(1, len(lengths) + 1)], []
    for _, _, used in fits:
        length = common + max(used)
        length += -length % multiple
        allowed = longest is None or length <= longest or len(used) == len(lengths)
        costs.append(len(used) * length * (1 + length / width) if allowed else float("inf"))
    rows, starts, used = fits[costs.index(min(costs))]
    length = common + max(used)
    rows, starts = torch.tensor([rows, starts], device=ids.device)
    return Places(rows, common + starts, len(used), length + -length % multiple, common)


def _balanced(lengths: list[int], count: int) -> tuple[list[int], list[int], list[int]]:
    """Row and first column of each part in `count` rows of about one length, and the columns of each row."""
    rows, starts, used = [0] * len(lengths), [0] * len(lengths), [0] * count
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = used.index(min(used))
        rows[number], starts[number] = row, used[row]
        used[row] += lengths[number]
    return rows, starts, used


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

    def sum(self, log_probs: torch.Tensor) -> torch.Tensor:
        """Sums `(tokens,)` values by response, to shape `(count,)`."""
        return log_probs.new_zeros(self.count).index_add(0, self.groups.to(log_probs.device), log_probs)

    def lengths(self) -> torch.Tensor:
        """Predicted tokens of each response, shape `(count,)`."""
        return torch.bincount(self.groups, minlength=self.count)
