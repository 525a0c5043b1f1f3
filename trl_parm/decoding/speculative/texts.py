# SPDX-License-Identifier: Apache-2.0
"""A batch of texts that grow at their own pace."""

from __future__ import annotations

import torch


class Texts:
    """Prompts, padded as `generate` pads them, and what has been written after each.

    Args:
        prompt (`torch.Tensor` of shape `(rows, columns)`): Token ids.
        mask (`torch.Tensor` of shape `(rows, columns)`): 1 for tokens, 0 for padding.
    """

    def __init__(self, prompt: torch.Tensor, mask: torch.Tensor) -> None:
        self.prompt, self.mask = prompt, mask.to(torch.long)
        self.new = prompt.new_zeros(len(prompt), 0)
        self.lengths = prompt.new_zeros(len(prompt))

    def __len__(self) -> int:
        return len(self.prompt)

    def extended(self, tokens: torch.Tensor, counts: torch.Tensor | None = None) -> Texts:
        """These texts with more at the end of each: the first `counts` of `tokens`, or all of them.

        Args:
            tokens (`torch.Tensor` of shape `(rows, n)`): Token ids.
            counts (`torch.Tensor` of shape `(rows,)`, *optional*): How many of them each row gets.
        """
        if counts is None:
            counts = torch.full_like(self.lengths, tokens.shape[1])
        longer = Texts(self.prompt, self.mask)
        longer.lengths = self.lengths + counts
        places = self.lengths[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        room = tokens.new_zeros(len(tokens), tokens.shape[1])
        longer.new = torch.cat([self.new, room], 1).scatter(1, places, tokens)[:, : int(longer.lengths.max())]
        return longer

    def only_prompts_of(self, rows: torch.Tensor) -> Texts:
        """These texts without what the given rows, `(rows,)` of bool, have written."""
        shorter = Texts(self.prompt, self.mask)
        shorter.new, shorter.lengths = self.new, torch.where(rows, 0, self.lengths)
        return shorter

    def after(self, prompt: torch.Tensor, mask: torch.Tensor) -> Texts:
        """These texts after other prompts, of which `generate` may have repeated the rows."""
        repeats = len(self) // len(prompt)
        other = Texts(*(part.to(self.prompt.device).repeat_interleave(repeats, 0) for part in (prompt, mask)))
        other.new, other.lengths = self.new, self.lengths
        return other

    def padded(self, token: int = 0) -> torch.Tensor:
        """Ids of shape `(rows, columns + longest)`: short rows end in `token`."""
        new = torch.where(self._written(), self.new, token)
        return torch.cat([self.prompt, new], 1)

    def padded_mask(self) -> torch.Tensor:
        """The mask of [`Texts.padded`]: 1 for tokens, 0 for padding."""
        return torch.cat([self.mask, self._written().to(self.mask)], 1)

    def ending_together(self, length: int) -> torch.Tensor:
        """Ids of shape `(rows, columns + length)` in which every row ends at the last column.

        Rows that are shorter repeat their first token on the left, which `generate` makes padding where rows are
        padded at all; longer ones are cut there.
        """
        width = self.prompt.shape[1] + length
        places = self.lengths[:, None] - length + torch.arange(width, device=self.prompt.device)
        return self.padded().gather(1, places.clamp(min=0))

    def row(self, row: int, length: int) -> torch.Tensor:
        """Ids of shape `(1, columns + length)`: a row with the first `length` of its new tokens."""
        return torch.cat([self.prompt[row], self.new[row, :length]])[None]

    def _written(self) -> torch.Tensor:
        return torch.arange(self.new.shape[1], device=self.new.device) < self.lengths[:, None]


def left_aligned(tokens: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Moves what is not masked to the left, in its order, and counts it: `(rows, columns)` and `(rows,)`."""
    order = (mask == 0).to(torch.uint8).argsort(dim=1, stable=True)
    return tokens.gather(1, order), (mask != 0).sum(1)
