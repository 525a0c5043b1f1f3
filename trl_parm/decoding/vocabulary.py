# SPDX-License-Identifier: Apache-2.0
"""Two tokenizers of one family whose vocabularies differ in size or in extra tokens: aligned by token."""

from __future__ import annotations

from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase


PROBE = "The naïve café: 3.14 × 2 = 6.28?\n\tdef f(x): return x + 1  # 你好, Привет! 🙂"
"""A text that tokenizers of different families cut differently."""


class Vocabulary:
    """Maps the base model's tokens to the guide's, by what they stand for, and the guide's log-probabilities back.

    Needed where the two models' vocabularies differ in size, such as by a pad token that one of them got, or by padded
    embeddings. A token that the guide does not know gets no probability under guidance (log π = −inf), and is left out
    of what the guide reads. Added tokens with one id and two names, such as reserved ones that got one, are the same.

    Args:
        base (`PreTrainedTokenizerBase`): The base model's tokenizer.
        guide (`PreTrainedTokenizerBase`): The guiding model's tokenizer.

    Raises:
        ValueError: tokenizers of different families, or a guide that does not know the base model's end token.

    Example:

    ```python
    guide = PARMLogitsProcessor(arm, preference, vocabulary=Vocabulary(tokenizer, arm_tokenizer))
    ```
    """

    def __init__(self, base: PreTrainedTokenizerBase, guide: PreTrainedTokenizerBase) -> None:
        _check_family(base, guide, base.get_vocab(), guide.get_vocab())
        known = same_tokens(base, guide)
        if base.eos_token is not None and base.eos_token_id not in known:
            raise ValueError(
                f"The guide does not know the base model's end token {base.eos_token!r}, so that guided text would "
                "never end. Add it to the guide's tokenizer and embeddings."
            )
        ids = torch.full((max(base.get_vocab().values()) + 1,), -1)
        for ours, theirs in known.items():
            ids[ours] = theirs
        self.guide_ids = ids
        self.base_pad_token_id = cast(int | None, base.pad_token_id)
        self._maps: dict[tuple, torch.Tensor] = {}

    def to_guide(self, tokens: torch.Tensor, size: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The guide's ids of base tokens, and a mask that is 0 where the guide does not know one; the same shape. Of a
        guide with `size` embeddings it knows no further ones."""
        ids = self._map(len(self.guide_ids), tokens.device)
        known = tokens < len(ids)
        found = torch.where(known, ids[tokens.clamp(max=len(ids) - 1)], -1)
        found = found if size is None else found.masked_fill(found >= size, -1)
        return found.clamp(min=0), (found >= 0).long()

    def to_base(self, log_probs: torch.Tensor, size: int) -> torch.Tensor:
        """Log-probabilities `(rows, guide vocabulary)` in the base's order, `(rows, size)`; −inf where unknown."""
        ids = self._map(size, log_probs.device)
        unknown = (ids < 0) | (ids >= log_probs.shape[-1])
        return log_probs[..., ids.clamp(0, log_probs.shape[-1] - 1)].masked_fill(unknown, -torch.inf)

    def _map(self, size: int, device: torch.device) -> torch.Tensor:
        """`guide_ids` cut or filled up to a size: a model may have more or fewer embeddings than its tokenizer ids."""
        if (size, device) not in self._maps:
            ids = torch.full((size,), -1)
            known = min(size, len(self.guide_ids))
            ids[:known] = self.guide_ids[:known]
            self._maps[size, device] = ids.to(device)
        return self._maps[size, device]


def same_tokens(base: Any, guide: Any) -> dict[int, int]:
    """The guide's id of each of the base model's tokens that it knows, by its id: that of the same name, or the same
    id where both have an added token there whose name the other does not know."""
    ours, theirs = base.get_vocab(), guide.get_vocab()
    found = {number: theirs[token] for token, number in ours.items() if token in theirs}
    own = {number for token, number in guide.get_added_vocab().items() if token not in ours}
    renamed = (number for token, number in base.get_added_vocab().items() if token not in theirs and number in own)
    return found | {number: number for number in renamed}


def _check_family(base: Any, guide: Any, ours: dict[str, int], theirs: dict[str, int]) -> None:
    plain_ours = set(ours) - set(base.get_added_vocab())
    plain_theirs = set(theirs) - set(guide.get_added_vocab())
    differing = (plain_ours - set(theirs)) | (plain_theirs - set(ours))
    if differing:
        raise ValueError(
            f"The tokenizers are of different families: {len(differing)} of {len(plain_ours | plain_theirs)} tokens "
            f"are known to one of them only, such as {sorted(differing)[0]!r}. A guide must be trained with the base "
            "model's tokenizer."
        )
    pieces = [t.convert_ids_to_tokens(t(PROBE, add_special_tokens=False)["input_ids"]) for t in (base, guide)]
    if pieces[0] != pieces[1]:
        raise ValueError(
            "The tokenizers share their tokens, but cut text differently: "
            f"{pieces[0][:8]} and {pieces[1][:8]}. A guide must be trained with the base model's tokenizer."
        )
