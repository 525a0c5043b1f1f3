# SPDX-License-Identifier: Apache-2.0
"""HTML of the page's parts, which stand in `markup.html`. All text of visitors and models is escaped there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment

from .measures import Measure
from .questions import Reply


FULL_COLOUR = 0.9
"""Which quantile of the tokens' log-ratios has full colour: a single token would make all others pale."""


def _signed(value: float | None) -> str:
    """Two digits and a proper minus; a dash for none."""
    return "–" if value is None else f"{value:.2f}".replace("-", "−")


def _short(value: float) -> str:
    return f"{value:.3g}".replace("-", "−") if abs(value) > 1e-9 else "0"


_environment = Environment(autoescape=True)
_environment.filters |= {"number": format, "signed": _signed, "short": _short}
_environment.globals["zip"] = zip
PARTS: Any = _environment.from_string(Path(__file__).with_name("markup.html").read_text(encoding="utf-8")).module
"""The macros as functions, of which some need nothing else."""
head, status, cost, table, explained = PARTS.head, PARTS.status, PARTS.cost, PARTS.table, PARTS.explained


def cards(reply: Reply, preference: str, measures: Sequence[Measure]) -> list[str]:
    """Both answers, their tokens coloured on one scale."""
    scale = _colour_scale(reply)
    return [
        PARTS.card("base", "Base model", "frozen, unguided", reply.base, reply.done, measures, scale),
        PARTS.card("guided", "Guided", preference, reply.guided, reply.done, measures, scale),
    ]


def colour_legend(reply: Reply) -> str:
    """What the tokens' colours mean; nothing while none is coloured."""
    return PARTS.colour_legend(_colour_scale(reply))


def _colour_scale(reply: Reply) -> float | None:
    """The log-ratio of full colour: a high quantile of those of both answers."""
    ratios = [abs(token.log_ratio) for answer in (reply.base, reply.guided) for token in answer.rewards or ()]
    return sorted(ratios)[int(FULL_COLOUR * (len(ratios) - 1))] or None if ratios else None
