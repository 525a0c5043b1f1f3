# SPDX-License-Identifier: Apache-2.0
"""HTML of the page's parts. All text of visitors and models is escaped."""

from __future__ import annotations

import html
from collections.abc import Sequence

from .measures import Measure
from .questions import Entry, Reply


FULL_COLOUR = 0.9
"""Which quantile of the tokens' log-ratios has full colour: a single token would make all others pale."""
MOST_OF_PROMPT = 200


def cards(reply: Reply, preference: str, measures: Sequence[Measure]) -> list[str]:
    """Both answers as far as they are written; once judged, with tokens coloured on one scale and measures."""
    scale = colour_scale(reply)
    found = []
    for kind, title, note, answer in (
        ("base", "Base model", "frozen, unguided", reply.base),
        ("guided", "Guided", preference, reply.guided),
    ):
        ended_empty = reply.done and not answer.text.strip()
        text = html.escape(answer.text) if not ended_empty else "(it ended without a word)"
        values = zip(measures, answer.measured or (), strict=False)
        shown = "".join(f"<span>{html.escape(m.objective)} <b>{signed(value)}</b></span>" for m, value in values)
        found.append(
            f'<div class="parm-card {kind}{" judged" if answer.rewards else ""}" aria-live="polite">'
            f"<h3><span>{title}</span><small>{html.escape(note)}</small></h3>"
            f'<div class="text">{answer.rewards.to_html(scale) if answer.rewards else text}</div>'
            f'<div class="parm-values">{shown}</div></div>'
        )
    return found


def colour_scale(reply: Reply) -> float | None:
    """The log-ratio of full colour: a high quantile of those of both answers."""
    ratios = [abs(token.log_ratio) for answer in (reply.base, reply.guided) for token in answer.rewards or ()]
    return sorted(ratios)[int(FULL_COLOUR * (len(ratios) - 1))] or None if ratios else None


def colour_legend(reply: Reply) -> str:
    """What the tokens' colours mean; nothing while none is coloured."""
    scale = colour_scale(reply)
    if scale is None:
        return ""
    colours = "linear-gradient(90deg, #ff6e64, #fff, #5a96ff)"
    return (
        f'<div class="parm-legend"><span>−{scale:.2f} <span class="parm-bar" style="background: {colours}"></span> '
        f"+{scale:.2f}</span><span>log π_ARM − log π_ref of each token at your "
        "preference: the ARM favours blue ones. Point at one for its numbers.</span></div>"
    )


def cost(reply: Reply) -> str:
    """Tokens a second of both answers, the time of a token as bars, and what part of a guided one's is guidance."""
    base, guided = reply.base.speed, reply.guided.speed
    if not base or not guided:
        return ""
    ratio = base / guided
    share = f"guidance is {1 - 1 / ratio:.0%} of its time" if ratio > 1 else "guidance cost nothing here"
    unit = 40 / max(1.0, ratio)
    extra = f'<i class="extra" style="width: {unit * (ratio - 1):.1f}%"></i>' if ratio > 1 else ""
    return (
        f'<div class="parm-cost"><div class="bar"><span>base</span><i style="width: {unit:.1f}%"></i>'
        f"<span><b>{base:.1f}</b> tokens/s</span></div>"
        f'<div class="bar"><span>guided</span><i style="width: {unit * min(1.0, ratio):.1f}%"></i>{extra}'
        f"<span><b>{guided:.1f}</b> tokens/s</span></div>"
        f"<div>A guided token takes <b>{ratio:.2f} ×</b> the time of a base token: {share}.</div></div>"
    )


def status(text: str, error: bool = False) -> str:
    """The line that says what happens."""
    role = "alert" if error else "status"
    return f'<div class="parm-status{" error" if error else ""}" role="{role}">{html.escape(text)}</div>'


def explained(measures: Sequence[Measure]) -> str:
    """What the picture's axes are."""
    by_title: dict[str, list[str]] = {}
    for m in measures:
        by_title.setdefault(m.title, []).append(f"<b>{html.escape(m.objective)}</b>")
    items = "; ".join(f"{', '.join(names)}: {html.escape(title)}" for title, names in by_title.items())
    own = any(m.reward is None for m in measures)
    note = " The log-ratio is what guidance itself raises, so it is no independent judge." if own else ""
    return f'<div class="parm-note">{items}. Higher is better.{note}</div>'


def table(entries: Sequence[Entry], objectives: Sequence[str]) -> str:
    """The session's answers as a table, the newest first: what the base model's answer measures → the guided one's."""
    if not entries:
        return ""
    names = "".join(f"<th>{html.escape(name)}</th>" for name in objectives)
    empty = [None] * len(objectives)
    rows = []
    for number, entry in enumerate(entries, 1):
        weights = ", ".join(f"{weight:.2f}" for weight in entry.weights)
        prompt = html.escape(entry.prompt[:MOST_OF_PROMPT])
        changes = zip(entry.base or empty, entry.guided or empty, strict=True)
        cells = "".join(f'<td class="measure">{signed(base)} → {signed(guided)}</td>' for base, guided in changes)
        rows.append(
            f'<tr><td>{number}</td><td class="prompt" title="{prompt}">{prompt}</td><td>{weights}</td>'
            f"<td>{entry.beta:g}</td>{cells}</tr>"
        )
    head = f"<tr><th>#</th><th>prompt</th><th>α</th><th>β</th>{names}</tr>"
    return f'<div class="parm-table"><table>{head}{"".join(reversed(rows))}</table></div>'


def signed(value: float | None) -> str:
    """A number with two digits and a proper minus; a dash for none."""
    return "–" if value is None else f"{value:.2f}".replace("-", "−")
