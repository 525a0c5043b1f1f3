# SPDX-License-Identifier: Apache-2.0
"""Two calls of `generate` that alternate, a token each.

They share a model, and inside a guided call its hooks decide which adapters act in a forward. That is state of the
model, so two forwards at once would act on each other. Here only one of the threads runs at any time, and it hands
over after each token: both texts grow side by side, and each call's time can be told from the other's.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria, TextStreamer


class Turns:
    """Lets threads run one at a time, one after the other in a circle.

    Args:
        players (`Iterable[str]`): Their names; the first begins.
    """

    def __init__(self, players: Iterable[str]) -> None:
        self._circle = deque(players)
        self._changed = threading.Condition()

    @contextmanager
    def playing(self, player: str) -> Iterator[None]:
        """Waits for the player's turn; after the block it is out of the circle."""
        self._wait(player)
        try:
            yield
        finally:
            with self._changed:
                self._circle.remove(player)
                self._changed.notify_all()

    def pass_on(self, player: str) -> None:
        """Ends the player's turn and waits for its next one."""
        with self._changed:
            self._circle.rotate(-1)
            self._changed.notify_all()
        self._wait(player)

    def _wait(self, player: str) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._circle[0] == player)


class TurnTaking(StoppingCriteria):
    """Passes the turn on after each token of a call of `generate`, and counts tokens and the call's own seconds.

    Args:
        turns ([`Turns`]): The circle.
        player (`str`): Which of its players the call is.
        stop (`threading.Event`): Ends the call when it is set.
    """

    def __init__(self, turns: Turns, player: str, stop: threading.Event) -> None:
        self.turns, self.player, self.stop = turns, player, stop
        self.tokens, self.seconds = 0, 0.0

    @contextmanager
    def playing(self) -> Iterator[None]:
        """For the time of the call of `generate`, which waits for its turn first."""
        with self.turns.playing(self.player):
            self._began = time.perf_counter()
            yield
            self._count()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.tokens += 1
        self._count()
        self.turns.pass_on(self.player)
        self._began = time.perf_counter()
        return torch.full((len(input_ids),), self.stop.is_set(), device=input_ids.device)

    def _count(self) -> None:
        self.seconds += time.perf_counter() - self._began


class CallbackStreamer(TextStreamer):
    """Calls a function with the text so far whenever whole words have been added to it.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The generating model's.
        on_text (`Callable[[str], None]`): Gets the whole text of the answer so far.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.text, self._on_text = "", on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        self._on_text(self.text)
