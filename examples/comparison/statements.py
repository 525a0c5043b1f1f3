# SPDX-License-Identifier: Apache-2.0
"""What holds, in sentences that are worked out from the tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trl_parm.evaluation.measures import SPREAD
from trl_parm.training.diagnosis import ALIKE

from .methods import DISJOINT, METHODS, UNTRAINED, methods_of
from .pooled import ABOVE_MINUS_ONE, ABOVE_ZERO, GENARM, PARM, PRODUCT, SHUFFLED, Budget
from .settings import BETA, RATE, SCALE, Settings, at_edge


STEERED = 0.9
"""A rank correlation from which a reward follows α."""
JUDGED = (PRODUCT, ABOVE_MINUS_ONE, ABOVE_ZERO)
JOINED = METHODS["from_loras"].title


def statements(budget: Budget) -> list[str]:
    """Sentences in Markdown about one budget of a task."""
    found = [
        against(budget, PARM, UNTRAINED, "the untrained control"),
        against(budget, PARM, GENARM, "GenARM") + halves(budget),
        steering(budget),
        against(budget, PARM, GENARM, "GenARM between vertices", [SPREAD.format(name) for name in budget.objectives]),
        # Whose front is the same set of points, so that its hypervolume says nothing.
        against(budget, PARM, SHUFFLED, "PARM with a permuted α", (PRODUCT,)) if SHUFFLED in budget.fronts else "",
        against(budget, DISJOINT, GENARM, "GenARM") if DISJOINT in budget.fronts else "",
        against(budget, JOINED, GENARM, "GenARM")
        + f" A token takes {with_range(*budget.relative_time(JOINED, GENARM))} of GenARM's time.",
        at_matched_kl(budget),
        others(budget),
        repetition(budget),
        diagnosis(budget),
        arithmetic(budget),
        seeds(budget),
    ]
    return [line for line in found if line]


def against(budget: Budget, method: str, minus: str, called: str, measures: Sequence[str] = JUDGED) -> str:
    """One method beside another: measures with their intervals, and what the intervals say."""
    rows = budget.difference(method, minus)
    parts = [f"{name} {interval(rows[name])} ({verdict(rows[name])})" for name in measures]
    return f"**{method} − {called}**: {', '.join(parts)}."


def halves(budget: Budget) -> str:
    """What PARM and GenARM keep in memory."""
    own, other = (budget.fronts[name].extra_parameters for name in (PARM, GENARM))
    return f" PARM has {own / other:.2f} of GenARM's parameters, and one guide row for {len(budget.objectives)}."


def steering(budget: Budget) -> str:
    """Rank correlations of α with its reward, of PARM, and which methods reach the aim for all objectives."""
    found = budget.correlations(PARM)
    own = ", ".join(
        f"{name} {mean:.2f} (single seeds {least:.2f} to {most:.2f})"
        for name, mean, least, most in zip(budget.objectives, found[0], found[1:].min(0), found[1:].max(0))
    )
    reached = [name for name in (PARM, *budget.compared()) if (budget.correlations(name)[0] > STEERED - 1e-6).all()]
    return (
        f"**Steering**: the rank correlation of α with its reward is {own} for PARM. It is {STEERED} or more for all "
        f"objectives of {', '.join(reached) or 'no method'}."
    )


def at_matched_kl(budget: Budget) -> str:
    """Other methods at the β with which they were to be as far from the base as PARM: those of the trainings that β
    was chosen with were, those of other seeds are about as far."""
    parts = []
    for name, near in budget.near_kl().items():
        row, own = budget.difference(PARM, near)[PRODUCT], "its own β" if near == name else f"KL {budget.kl(name):.2f}"
        at = "" if near == name else " at its own β"
        kl = with_range(budget.kl(near), *budget.kl_range(near))
        parts.append(f"{name} {interval(row)} ({verdict(row)}; KL {kl}, {own}{at})")
    kl = with_range(budget.kl(PARM), *budget.kl_range(PARM))
    head = f"**Near PARM's KL to the base**, {kl} a token over seeds, PARM's MIP minus that of "
    return head + "; ".join(parts) + "." if parts else ""


def at_policies_kl(settings: Settings, kinds: Sequence[str]) -> str:
    """PARM beside methods whose distance from the base can't be chosen, at theirs: by what was tried for β."""
    rows = sorted(settings.tried(BETA, "parm"), key=lambda row: row["kl"])
    parts = []
    for name, method in methods_of(kinds).items():
        for own in () if method.has_beta else settings.tried(BETA, name):
            parm = float(np.interp(own["kl"], [row["kl"] for row in rows], [-row["value"] for row in rows]))
            nearest = min(max(own["kl"], rows[0]["kl"]), rows[-1]["kl"])
            beyond = "" if nearest == own["kl"] else f" at KL {nearest:.2f}, the nearest that was tried"
            parts.append(f"{method.title} {-own['value']:.2f} at KL {own['kl']:.2f}, PARM {parm:.2f}{beyond}")
    return (
        "**At the KL of methods without β** PARM's MIP, between the β that were tried, on the prompts that β was "
        f"chosen with, and their seeds of training: {'; '.join(parts)}."
    )


def others(budget: Budget) -> str:
    """The other methods, by whether their measures are above PARM's."""
    lines = []
    for measure in (PRODUCT, ABOVE_ZERO):
        groups: dict[str, list[str]] = {}
        for name in budget.compared():
            row = budget.difference(name, PARM)[measure]
            groups.setdefault(verdict(row), []).append(f"{name} {interval(row)}")
        lines.append(f"{measure}: " + "; ".join(f"{key}: {', '.join(names)}" for key, names in groups.items()))
    return "**All methods relative to PARM**: " + ". ".join(lines) + "."


def repetition(budget: Budget) -> str:
    """How much answers of four words or more repeat themselves, which rewards may not see."""
    parts = []
    for name in (PARM, GENARM):
        of_label: dict[str, list[float]] = {}
        for row in budget.rows:
            if budget.names[row["method"]] == name and row["repetition"] is not None:
                of_label.setdefault(row["label"], []).append(row["repetition"])
        if not of_label:
            continue
        most, worst = max((float(np.mean(found)), label) for label, found in of_label.items())
        every = [value for found in of_label.values() for value in found]
        parts.append(f"{name} {np.mean(every):.1%}, at {worst} {most:.1%}")
    return f"**Repeated 4-grams**, their mean share in an answer: {'; '.join(parts)}." if parts else ""


def diagnosis(budget: Budget) -> str:
    """What the ARM does on held-out pairs, and where it is behind GenARM why, as far as that says it."""
    found = budget.mean_metric("parm", "vertex_correlation")
    if found is None:
        return ""
    gains = []
    for name in budget.objectives:
        own, apart, other = (budget.mean_metric(kind, f"{name}_gain") for kind in ("parm", "parm_disjoint", "genarm"))
        if own and other:
            beside = f"disjoint start {apart[0]:+.3f}, " if apart else ""
            gains.append(f"{name} {own[0]:+.3f} ({beside}GenARM's ARM {other[0]:+.3f})")
    apart = budget.mean_metric("parm_disjoint", "vertex_correlation")
    said = (
        "**On held-out pairs**, some of those that learning rates were chosen with, the changes that training made at "
        f"PARM's vertices correlate by {found[0]:.2f} "
        f"({found[1]:.2f} to {found[2]:.2f} over seeds; 1: α does nothing)"
        + (f", with a disjoint start by {apart[0]:.2f}" if apart else "")
        + f". The loss at an objective's vertex fell by {', '.join(gains)}."
    )
    behind = [name for name in JUDGED if budget.difference(PARM, GENARM)[name]["high"] < 0]
    if behind:
        said += f" PARM is behind GenARM in {' and '.join(behind)}; {reason(budget, found[0])}"
    return said


def reason(budget: Budget, correlation: float) -> str:
    """What held-out pairs show where PARM is behind GenARM."""
    parts, gain = [], budget.gain_difference("parm", "genarm")
    if gain is not None and gain[2] < 0:
        less = f"{-gain[0]:.2f} [{-gain[2]:.2f}, {-gain[1]:.2f}]"
        parts.append(f"its losses fell by {less} less than GenARM's, over seeds")
    parts += ["its vertices are alike"] if correlation > ALIKE else []
    return (" and ".join(parts) or "held-out pairs do not show why") + "."


def arithmetic(budget: Budget) -> str:
    """Which seeds were run with other arithmetic."""
    if len(budget.alike) == 1:
        return ""
    groups = " and ".join(f"{', '.join(map(str, group))}" for group in budget.alike)
    return (
        "**Arithmetic**: what no training changes, such as the base's answers, is not the same with the seeds "
        f"{groups}: something rounds otherwise, such as products in bfloat16 on another CPU. So answers share less "
        "noise, which makes intervals wider."
    )


def seeds(budget: Budget) -> str:
    """What intervals lack."""
    if len(budget.seeds) == 1 and not budget.partial:
        return "**One seed of training**: the intervals are over prompts and lack what another training would change."
    parts = []
    if budget.missing:
        listed = ", ".join(map(str, budget.missing))
        parts.append(f"of {len(budget.seeds) + len(budget.missing)} that were planned, {listed} were not run")
    for kind, there in budget.partial.items():
        titles = " and ".join(method.title for method in methods_of([kind]).values())
        parts.append(f"{titles} with {', '.join(map(str, there))} alone so far, and left out")
    return f"**Seeds**: {'; '.join(parts)}." if parts else ""


def edges(tried: Mapping[str, Sequence[Mapping[str, Any]]], what: str) -> str:
    """Which grids have their best at an edge, in words."""
    found = [name for name, rows in tried.items() if at_edge(rows)]
    word = {SCALE: "`lora_alpha`", RATE: "learning rate", BETA: "β"}[what]
    said = f"Each {word} lies inside the values that were tried."
    if found:
        said = (
            f"The {word} of {', '.join(found)} lies at an edge of the values that were tried: a better one may lie "
            "beyond."
        )
    strongest = [name for name, rows in tried.items() if what == BETA and min(rows, key=_value)["at"] == rows[0]["at"]]
    if more := [name for name in strongest if name not in found]:
        said += f" The largest MIP itself is at the strongest guidance that was tried of {', '.join(more)}."
    return said


def other_products(tried: Mapping[str, Sequence[Mapping[str, Any]]], products: str | None) -> str:
    """What is known to have been tried with another arithmetic than the pieces have."""
    others = {
        name: [f"{row['at']:g}" for row in rows if row.get("products", [products]) != [products]]
        for name, rows in tried.items()
    }
    listed = ", ".join(f"{name} at {', '.join(found)}" for name, found in others.items() if found)
    return f" On another CPU, whose products are not in {products}, were tried: {listed}." if listed else ""


def _value(row: Mapping[str, Any]) -> float:
    return row["value"]


def with_range(value: float, least: float, most: float) -> str:
    """A number with the least and the largest of what it is of."""
    return f"{value:.2f} ({least:.2f} to {most:.2f})"


def interval(row: Mapping[str, Any]) -> str:
    """A difference with its 95 % interval."""
    if math.isnan(row["low"]):
        return f"{row['value']:+.2f} (one prompt: no interval)"
    return f"{row['value']:+.2f} [{row['low']:.2f}, {row['high']:.2f}]"


def verdict(row: Mapping[str, Any]) -> str:
    if not row["differs"]:
        return "not told apart"
    return "higher" if row["value"] > 0 else "lower"
