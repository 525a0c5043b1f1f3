# SPDX-License-Identifier: Apache-2.0
"""HTML of the page's parts. All text of visitors and models is escaped."""

from __future__ import annotations

import html
from collections.abc import Sequence

from .measures import Measure
from .questions import Answer, Entry, Reply


FULL_COLOUR = 0.9
"""Which quantile of the tokens' log-ratios has full colour: a single token would make all others pale."""
MOST_OF_PROMPT = 200


def card(title: str, note: str, answer: Answer, kind: str, measures: Sequence[Measure], scale: float | None) -> str:
    """An answer: its text as far as it is written; when it is done, with the tokens coloured and the measures.

    Args:
        title, note (`str`): Its heading and what stands beside it.
        answer ([`Answer`]): The answer.
        kind (`str`): `"base"` or `"guided"`, for the style.
        measures (`Sequence[Measure]`): What `answer.measured` holds.
        scale (`float`, *optional*): The log-ratio of full colour.
    """
    judged = " judged" if answer.rewards else ""
    text = answer.rewards.to_html(scale) if answer.rewards else html.escape(answer.text)
    values = zip(measures, answer.measured or (), strict=False)
    shown = "".join(f"<span>{html.escape(m.objective)} <b>{signed(value)}</b></span>" for m, value in values)
    return (
        f'<div class="parm-card {kind}{judged}" aria-live="polite">'
        f"<h3><span>{html.escape(title)}</span><small>{html.escape(note)}</small></h3>"
        f'<div class="text">{text}</div><div class="parm-values">{shown}</div></div>'
    )


def cards(reply: Reply, preference: str, measures: Sequence[Measure]) -> tuple[str, str]:
    """Both answers, their tokens coloured on one scale."""
    scale = colour_scale(reply)
    base, guided = reply.base, reply.guided
    if reply.done:  # an answer may be done without a word
        base, guided = (a if a.text.strip() else Answer("(it ended without a word)") for a in (base, guided))
    return (
        card("Base model", "frozen, unguided", base, "base", measures, scale),
        card("Guided", preference, guided, "guided", measures, scale),
    )


def colour_scale(reply: Reply) -> float | None:
    """The log-ratio of full colour: a high quantile of those of both answers."""
    ratios = [abs(token.log_ratio) for answer in (reply.base, reply.guided) for token in answer.rewards or ()]
    if not ratios:
        return None
    return sorted(ratios)[int(FULL_COLOUR * (len(ratios) - 1))] or None


def colour_legend(scale: float | None) -> str:
    """What the tokens' colours mean; nothing while none is coloured."""
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
    rows = []
    for number, entry in reversed(list(enumerate(entries, 1))):
        weights = ", ".join(f"{weight:.2f}" for weight in entry.weights)
        prompt = html.escape(entry.prompt[:MOST_OF_PROMPT])
        empty = [None] * len(objectives)
        changes = zip(entry.base or empty, entry.guided or empty, strict=True)
        cells = "".join(
            f'<td class="measure">{_signed_or_none(base)} → {_signed_or_none(guided)}</td>' for base, guided in changes
        )
        rows.append(
            f'<tr><td>{number}</td><td class="prompt" title="{prompt}">{prompt}</td><td>{weights}</td>'
            f"<td>{entry.beta:g}</td>{cells}</tr>"
        )
    head = f"<tr><th>#</th><th>prompt</th><th>α</th><th>β</th>{names}</tr>"
    return f'<div class="parm-table"><table>{head}{"".join(rows)}</table></div>'


def signed(value: float) -> str:
    """A number with two digits and a proper minus."""
    return f"{value:.2f}".replace("-", "−")


def _signed_or_none(value: float | None) -> str:
    return "–" if value is None else signed(value)
