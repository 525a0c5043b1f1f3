# SPDX-License-Identifier: Apache-2.0
"""The guided distribution, and the rows of coupled requests that it is written into. It knows no engine."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from trl_parm.algebra import BASE, Scorer, Step, Weight, guided_logits, sum_of
from trl_parm.noise import Sampling

from .families import Member


REMEDY = (
    "All requests of a family must run in every step of one engine together. Submit them with "
    "`trl_parm.serving.guided_generate` or `AsyncGuidance`, which admit a family only where the engine has room for "
    "all of it; see docs/serving.md."
)


def combine(
    base_logits: torch.Tensor,
    arm_logits: torch.Tensor | Sequence[torch.Tensor],
    strength: Weight | Sequence[Weight],
    base_strength: Weight = 1.0,
) -> torch.Tensor:
    """The guided log-probabilities (PARM, arXiv 2505.06274, eq. 5; GenARM, arXiv 2410.08193):

        log π = log π_base + Σ_i w_i · log π_i − log Z,   w = 1/β of PARM, α_i/β of GenARM

    Tokens that the base excludes (−inf) stay excluded, and a guide of strength 0 changes nothing.

    Args:
        base_logits (`torch.Tensor` of shape `(..., vocab)`): The base model's logits or log-probabilities.
        arm_logits (`torch.Tensor` of shape `(..., vocab)`, or a sequence of them): Those of the guide, or of each.
        strength (`float` or `torch.Tensor` of shape `(rows,)`, or a sequence of them): w of each guide.
        base_strength (`float` or `torch.Tensor` of shape `(rows,)`, *optional*, defaults to 1.0): Of log π_base, such
            as 0 where guides alone decide.

    Returns:
        `torch.Tensor` of shape `(..., vocab)`, float32.

    Raises:
        ValueError: shapes that differ, or not one strength for each guide.

    Example:

    ```python
    combine(base, arm, 1 / beta)
    combine(base, [helpful, harmless], [0.7 / beta, 0.3 / beta])
    ```
    """
    alone = isinstance(arm_logits, torch.Tensor)
    guides = [arm_logits] if alone else list(arm_logits)
    strengths = [strength] if alone else list(strength)  # pyright: ignore[reportArgumentType]
    if len(guides) != len(strengths):
        raise ValueError(f"There are {len(guides)} guides, but {len(strengths)} strengths. Give one for each guide.")
    for logits in guides:
        if logits.shape != base_logits.shape:
            shapes = tuple(base_logits.shape), tuple(logits.shape)
            raise ValueError(f"The base's logits have shape {shapes[0]}, a guide's {shapes[1]}.")
    answers = {_Guide(number): torch.log_softmax(logits.float(), -1) for number, logits in enumerate(guides)}
    return guided_logits(base_strength * BASE + sum_of(zip(strengths, answers)), Step(base_logits, answers))


@dataclass(frozen=True)
class _Guide(Scorer):
    """A guide that the engine has read."""

    number: int

    def __call__(self, step: Step) -> torch.Tensor:
        return step.answers[self]


@dataclass(frozen=True)
class Row:
    """A coupled request in this step: the row of its logits, how many tokens it has written, and the last if any."""

    index: int
    member: Member
    written: int
    last: int | None = None


def join(logits: torch.Tensor, rows: Iterable[Row]) -> torch.Tensor:
    """Writes the guided distribution of each family into all its rows of `(rows, vocab)`, in place, and returns them.

    Greedy families get log-probabilities. Where a family samples or is scored, the token is chosen here, and its rows
    get a number for it and −inf for all others: so every row has the same argmax, whatever the engine does with it.
    Raises `RuntimeError`, before anything is written, for a request whose partner is missing, has written another text
    or belongs to other settings.
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
        sampling = family.temperature, family.top_k, family.top_p, family.min_p
        alike[family.size, sampling, family.scored].append(members)
    for group in alike.values():
        at = torch.tensor([[row.index for row in members] for members in group], device=logits.device)
        logits[at] = _guided(logits, at, [members[0] for members in group])
    return logits


def _guided(logits: torch.Tensor, at: torch.Tensor, bases: Sequence[Row]) -> torch.Tensor:
    """What the rows of each family get, `(families, 1 or size, vocab)`. They are `at`, `(families, size)`."""
    families = [row.member.family for row in bases]
    strengths = torch.tensor([family.strengths for family in families])
    of_base = torch.tensor([family.base_strength for family in families])
    base = logits[at[:, 0]]
    scores = combine(base, [logits[rows] for rows in at.T[1:]], list(strengths.T), of_base)
    settings, choice = families[0], scores
    if settings.temperature:
        sampling = Sampling(settings.temperature, settings.top_k, settings.top_p, settings.min_p)
        choice = sampling.noisy(scores, [family.seed for family in families], [row.written for row in bases])
    elif not settings.scored:
        return scores[:, None]
    token = choice.argmax(-1, keepdim=True)
    found = [torch.zeros_like(scores)]
    if settings.scored:
        found = [scores, *[torch.log_softmax(base.float(), -1)] * (at.shape[1] - 1)]
    only = [torch.full_like(scores, -torch.inf).scatter_(1, token, own.gather(1, token)) for own in found]
    return torch.stack(only, 1)


def _check_together(rows: Sequence[Row]) -> None:
    family = rows[0].member.family
    roles = [row.member.role for row in rows]
    absent = [_name(role) for role in range(family.size) if role not in roles]
    if absent:
        wrong = f"{', '.join(absent)} missing"
    elif len(rows) > family.size:
        wrong = f"{len(rows)} requests for {family.size} roles"
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
