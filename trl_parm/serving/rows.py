# SPDX-License-Identifier: Apache-2.0
"""Joins the rows of coupled requests in one step of an engine. It knows no engine."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from trl_parm.noise import Sampling

from .distribution import combine
from .families import Member


REMEDY = (
    "All requests of a family must run in every step of one engine together. Submit them with "
    "`trl_parm.serving.guided_generate` or `AsyncGuidance`, which admit a family only where the engine has room for "
    "all of it; see docs/serving.md."
)


@dataclass(frozen=True)
class Row:
    """A coupled request in this step: the row of its logits, and what it has written so far.

    `last` is its last token, None if it has written none.
    """

    index: int
    member: Member
    written: int
    last: int | None = None


def join(logits: torch.Tensor, rows: Iterable[Row]) -> torch.Tensor:
    """Writes the guided distribution of each family into all its rows, in place, after all of them are checked.

    Greedy families get log-probabilities up to a constant. Where the family samples, the token is drawn here, and the
    rows get 0 for it and −inf for all others: so every row has the same argmax, whatever the engine does with it.

    Args:
        logits (`torch.Tensor` of shape `(rows, vocab)`, float32): All rows of the step.
        rows (`Iterable[Row]`): The coupled ones.

    Returns:
        `torch.Tensor` of shape `(rows, vocab)`: `logits`.

    Raises:
        RuntimeError: a request whose partner is missing, has written another text or belongs to other settings.
    """
    families: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        families[row.member.family.name].append(row)
    # Families of the same settings are joined in one go.
    alike: dict[tuple, list[list[Row]]] = defaultdict(list)
    for members in families.values():
        members.sort(key=lambda row: row.member.role)
        _check_together(members)
        family = members[0].member.family
        alike[family.size, family.temperature, family.top_k, family.top_p].append(members)
    for group in alike.values():
        at = torch.tensor([[row.index for row in members] for members in group], device=logits.device)
        logits[at] = _guided(logits, at, group)[:, None]
    return logits


def _guided(logits: torch.Tensor, at: torch.Tensor, group: Sequence[Sequence[Row]]) -> torch.Tensor:
    """What all rows of each family get, of shape `(families, vocab)`."""
    families = [members[0].member.family for members in group]
    strengths = torch.tensor([family.strengths for family in families])
    scores = combine(logits[at[:, 0]], [logits[rows] for rows in at.T[1:]], list(strengths.T))
    family = families[0]
    if family.temperature == 0:
        return scores
    seeds, written = [family.seed for family in families], [members[0].written for members in group]
    tokens = Sampling(family.temperature, family.top_k, family.top_p).noisy(scores, seeds, written).argmax(-1)
    return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)


def _check_together(rows: Sequence[Row]) -> None:
    family = rows[0].member.family
    if [row.member.role for row in rows] != list(range(family.size)):
        present = {row.member.role for row in rows}
        absent = ", ".join(_name(role) for role in range(family.size) if role not in present)
        wrong = f"{absent} missing" if absent else f"{len(rows)} requests for {family.size} roles"
    elif len({row.member.family for row in rows}) > 1:
        wrong = "requests with different settings"
    elif len({(row.written, row.last) for row in rows}) > 1:
        texts = (
            f"{_name(row.member.role)} has written {row.written} tokens"
            + ("" if row.last is None else f", the last {row.last}")
            for row in rows
        )
        wrong = f"its requests are out of step ({'; '.join(texts)})"
    else:
        return
    raise RuntimeError(
        f"The family {family.name!r} of coupled requests can't be guided in this step: {wrong}. {REMEDY}"
    )


def _name(role: int) -> str:
    return f"guide {role}" if role else "the base"
