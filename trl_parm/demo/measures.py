# SPDX-License-Identifier: Apache-2.0
"""What an answer is worth in each objective: a reward that knows nothing of the ARM where there is one by that name.

Otherwise it is the ARM's own opinion, which shows what guidance optimises but not whether that is what you want.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

from trl_parm.rewards import Reward, brevity, conciseness, positivity


REWARDS: dict[str, tuple[Reward, str]] = {
    "positive": (positivity, "VADER's compound sentiment, −1 to 1"),
    "concise": (conciseness, "minus the mean number of words in a sentence"),
    "brief": (brevity, "minus the number of words"),
}
"""Objective → its reward, and what that is."""
LOG_RATIO = "the ARM's own log-ratio per token, log π_ARM − log π_ref with all weight on it"


@dataclass(frozen=True)
class Measure:
    """How answers are measured in one objective, higher is better: by a reward, or `None` for the ARM's log-ratio."""

    objective: str
    title: str
    reward: Reward | None


def measures_of(objectives: Sequence[str]) -> list[Measure]:
    """One measure for each objective, in their order."""
    found = []
    for objective in objectives:
        reward, title = REWARDS.get(objective, (None, LOG_RATIO))
        if reward is positivity and importlib.util.find_spec("vaderSentiment") is None:
            reward, title = None, f"{LOG_RATIO} (vaderSentiment is not installed)"
        found.append(Measure(objective, title, reward))
    return found
