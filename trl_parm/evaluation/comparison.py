# SPDX-License-Identifier: Apache-2.0
"""Two methods, or two evaluations, prompt by prompt: differences of rewards, and which response wins."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trl_parm.endpoint import Failure
from trl_parm.rewards import is_unjudged

from .fronts import put_once, row_cell
from .metrics import bootstrap, mean_and_error


WINS, CONSISTENT = "wins by the judge", "judged alike in both orders"


@dataclass(frozen=True)
class Pairing:
    """Responses of two sides to the same prompts, at one preference.

    Attributes:
        method (`str`): Whose, or `A against B` for two methods.
        label (`str`): The preference.
        first, second (`list`): Rows of each side, prompt by prompt.
        alone (`int`): Prompts that only one side has.
    """

    method: str
    label: str
    first: list[Mapping[str, Any]]
    second: list[Mapping[str, Any]]
    alone: int

    @property
    def head(self) -> dict[str, Any]:
        """What its rows in a table begin with."""
        return {"method": self.method, "preference": self.label, "prompts": len(self.first)}


def pair_up(
    first: Iterable[Mapping[str, Any]],
    second: Iterable[Mapping[str, Any]],
    methods: tuple[str, str] | None = None,
) -> list[Pairing]:
    """Pairs the rows of two tables by method, preference and prompt.

    Args:
        first, second (`Iterable[Mapping]`): Rows of [`sweep`], whose preferences are in one order of the objectives.
        methods (`tuple[str, str]`, *optional*): A method of the first table and the one of the second that it is
            compared with; each with the one of its own name if not given.

    Returns:
        `list[Pairing]`: In the order of the first table. A control is paired with every preference of the other side.

    Raises:
        ValueError: a method that is not there, a row that is there twice, or nothing that both tables have.
    """
    tables = [_by_run(rows) for rows in (first, second)]
    for table, name in zip(tables, methods or ()):
        known = list(dict.fromkeys(method for method, _ in table))
        if name not in known:
            raise ValueError(f"There is no method {name!r}; there are {', '.join(known)}.")
    found = []
    for (method, weights), rows in tables[0].items():
        for (other, others_weights), others in tables[1].items():
            wanted = method == other if methods is None else (method, other) == methods
            same = weights == others_weights or (methods is not None and None in (weights, others_weights))
            shared = [key for key in rows if key in others]
            if wanted and same and shared:
                one = rows[shared[0]] if weights is not None else others[shared[0]]
                found.append(
                    Pairing(
                        method if methods is None else f"{method} against {other}",
                        one["label"],
                        [rows[key] for key in shared],
                        [others[key] for key in shared],
                        len(set(rows) ^ set(others)),
                    )
                )
    if not found:
        raise ValueError("The tables have no method at one preference and prompt in common, so there are no pairs.")
    return found


def compare(
    pairings: Sequence[Pairing], objectives: Sequence[str], resamples: int = 2000, seed: int = 0
) -> list[dict[str, Any]]:
    """How rewards of the first side differ from those of the second, on the same prompts.

    Args:
        pairings (`Sequence[Pairing]`): From [`pair_up`].
        objectives (`Sequence[str]`): The columns with rewards, each without the prompts on which its judge failed.
        resamples, seed (`int`, *optional*): Of the [`bootstrap`].

    Returns:
        `list[dict]` with `method`, `preference`, `prompts`, `reward`, the means `first` and `second`, their
        `difference` with the 95 % interval `low` and `high`, and `wins`, the share of prompts on which the first side
        has the higher reward, where equal ones count half.
    """
    rows = []
    for pairing in pairings:
        for name in objectives:
            values = np.array(
                [
                    (one[name], other[name])
                    for one, other in zip(pairing.first, pairing.second, strict=True)
                    if not (is_unjudged(one, name) or is_unjudged(other, name))
                ],
                dtype=float,
            )
            head = {**pairing.head, "prompts": len(values), "reward": name}
            if not len(values):
                rows.append({**head, **dict.fromkeys(("first", "second", "difference", "low", "high", "wins"))})
                continue
            difference, low, high = bootstrap(
                lambda means: means[:, 0] - means[:, 1], values, resamples, seed=seed, vectorized=True
            )
            first, second = values.mean(0).tolist()
            wins = float(np.mean((np.sign(values[:, 0] - values[:, 1]) + 1) / 2))
            rows.append(
                {**head, "first": first, "second": second, "difference": difference, "low": low, "high": high}
                | {"wins": wins}
            )
    return rows


def judge_pairs(
    pairings: Sequence[Pairing],
    judge: Callable[..., list[tuple[float | Failure, float | Failure]]],
    on_pairing: Callable[[Pairing], Any] = lambda pairing: None,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """How often the first side wins by a judge that sees both responses, in both orders.

    A response that wins in one order and loses in the other has half a win, so that a judge who prefers a place
    prefers nobody. Pairs of which one answer failed are left out and counted.

    Args:
        pairings (`Sequence[Pairing]`): From [`pair_up`].
        judge ([`PairJudge`]): Who is asked.
        on_pairing (`Callable`, *optional*): Called after each, for progress.
        resamples, seed (`int`, *optional*): Of the [`bootstrap`].

    Returns:
        The rates, `list[dict]` with `method`, `preference`, `prompts`, `wins by the judge` with its standard error and
        interval, `judged alike in both orders`, and `failed`; and every verdict, `list[dict]` with the prompt, both
        responses, and `as A`, `as B`: 1 where the first side won as A, or as B, 0 where it lost, 0.5 for a tie, or
        `None` with the reason as `unjudged`.
    """
    rates, verdicts = [], []
    for pairing in pairings:
        prompts = [row["prompt"] for row in pairing.first]
        responses = [[row["response"] for row in side] for side in (pairing.first, pairing.second)]
        found = judge(prompts, *responses)
        rates.append({**pairing.head, **_rate(found, resamples, seed)})
        for number, (straight, swapped) in enumerate(found):
            failed = next((one.reason for one in (straight, swapped) if isinstance(one, Failure)), None)
            told = [None if isinstance(one, Failure) else one for one in (straight, swapped)]
            verdicts.append(
                {"method": pairing.method, "preference": pairing.label, "prompt": prompts[number]}
                | {"first": responses[0][number], "second": responses[1][number]}
                | dict(zip(("as A", "as B"), told))
                | ({} if failed is None else {"unjudged": failed})
            )
        on_pairing(pairing)
    return rates, verdicts


def _rate(found: Sequence[tuple[Any, Any]], resamples: int, seed: int) -> dict[str, Any]:
    whole = [pair for pair in found if not any(isinstance(one, Failure) for one in pair)]
    failed = {"failed": len(found) - len(whole)}
    if not whole:
        return {"prompts": 0, WINS: None, "error": None, "low": None, "high": None, CONSISTENT: None, **failed}
    wins = [(straight + swapped) / 2 for straight, swapped in whole]
    _, low, high = bootstrap(lambda means: means[:, 0], np.array(wins)[:, None], resamples, seed=seed, vectorized=True)
    mean, error = mean_and_error(wins)
    alike = sum(straight == swapped for straight, swapped in whole) / len(whole)
    return {
        "prompts": len(whole), WINS: mean, "error": error, "low": low, "high": high, CONSISTENT: alike, **failed
    }  # fmt: skip


def _by_run(table: Iterable[Mapping[str, Any]]) -> dict[tuple, dict[str, Mapping[str, Any]]]:
    """The rows of each method and preference, by prompt."""
    found: dict[tuple, dict[str, Mapping[str, Any]]] = {}
    for row in table:
        put_once(found, row_cell(row), row)
    return found
