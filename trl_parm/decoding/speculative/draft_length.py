# SPDX-License-Identifier: Apache-2.0
"""How many tokens to draft: as many as make decoding fastest, none where drafting does not pay."""

from __future__ import annotations

from collections import deque
from statistics import median

from .sampling import expected_tokens


FIRST, AGAIN = 3, 1
"""Tokens of the first draft, and of the first one after a pause: that costs least where nothing has changed."""
RECENT = 7
"""Rounds whose times count: their median."""
MEMORY = 0.9
"""What a round's acceptances weigh after the next one."""
SHORTEST_PAUSE, LONGEST_PAUSE, LONGER = 8, 256, 4
"""Rounds without drafts before drafting is tried again, and by what they grow each time that it does not pay."""
LEAST_GAIN = 1.03
"""How much faster than plain decoding drafting has to be."""
REMEASURE = 64
"""Drafting rounds after which one without a draft is timed again."""


class DraftLength:
    """Chooses the number n of drafted tokens that maximises E[tokens of a round] / (time of a round).

    The expectation follows from the share of drafts that were accepted (arXiv 2211.17192, equation 1), the times are
    those of the last rounds. A round without a draft is plain decoding; it is chosen where no n is faster.

    Args:
        most (`int`): The largest n.
        fixed (`int`, *optional*): Always draft so many, measuring nothing.
    """

    def __init__(self, most: int, fixed: int | None = None) -> None:
        self.most, self.fixed = most, fixed
        self._rounds = self._pause = self._since_plain = 0
        self._next_pause = SHORTEST_PAUSE
        self._accepted = self._tried = 0.0
        self._drafting, self._verifying, self._plain = (deque[float](maxlen=RECENT) for _ in range(3))

    def next(self) -> int:
        """Tokens to draft in this round; the first one has none, since it reads the prompt."""
        if self._rounds == 0:
            return 0
        if self.fixed is not None:
            return self.fixed
        if not self._plain or self._pause > 0 or (self._verifying and self._since_plain >= REMEASURE):
            return 0
        if not self._verifying:
            return min(FIRST if self._next_pause == SHORTEST_PAUSE else AGAIN, self.most)
        return self._best()

    def record(self, drafted: int, accepted: int, tried: int, drafting: float, verifying: float) -> None:
        """Notes how a round went.

        Args:
            drafted (`int`): Tokens drafted for each row.
            accepted, tried (`int`): Over all rows, drafts accepted, and drafts that it was decided about.
            drafting, verifying (`float`): Seconds of the two parts of the round.
        """
        self._rounds += 1
        if self._rounds == 1 or self.fixed is not None:
            return
        if drafted == 0:
            self._plain.append(verifying)
            self._since_plain, self._pause = 0, max(0, self._pause - 1)
            return
        self._since_plain += 1
        self._accepted = MEMORY * self._accepted + accepted
        self._tried = MEMORY * self._tried + tried
        self._drafting.append(drafting / drafted)
        self._verifying.append(verifying)
        if len(self._verifying) < 2:
            return
        if self._gain(self._best()) >= LEAST_GAIN:
            self._next_pause = SHORTEST_PAUSE
            return
        self._pause, self._next_pause = self._next_pause, min(LONGER * self._next_pause, LONGEST_PAUSE)
        self._drafting.clear()
        self._verifying.clear()

    def _best(self) -> int:
        return max(range(1, self.most + 1), key=self._gain)

    def _gain(self, drafted: int) -> float:
        """How much faster than plain decoding."""
        acceptance = (self._accepted + 1) / (self._tried + 2)  # one draft of each kind is imagined before the first
        seconds = drafted * median(self._drafting) + median(self._verifying)
        return expected_tokens(acceptance, drafted) * median(self._plain) / seconds
