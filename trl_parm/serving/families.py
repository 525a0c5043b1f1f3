# SPDX-License-Identifier: Apache-2.0
"""What coupled requests carry: the family they belong to, in the engine's free-form arguments of a request.

The values are numbers, texts and lists of numbers under keys that begin with `guidance_`, which `extra_args` of
`SamplingParams` takes as they are, and `vllm_xargs` of the server too.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any


PREFIX = "guidance_"
# The token of a coupled request is chosen by the processor; these would change it afterwards, in one row or in a row
# at a time, or make one request of the family wait.
ENGINE_SETTINGS = {
    "n": 1,
    "temperature": 0.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "structured_outputs": None,
    "thinking_token_budget": None,
}


@dataclass(frozen=True)
class Family:
    """The requests that write one text together: the base model's, which has role 0, and one for each guide.

    Args:
        name (`str`): Unique among the requests that run.
        strengths (`tuple[float, ...]`): w_i ≠ 0 of each guide; none for the base model alone.
        temperature (`float`, *optional*, defaults to 0.0): 0 decodes greedily.
        top_k (`int`, *optional*, defaults to 0): 0 keeps all tokens.
        top_p (`float`, *optional*, defaults to 1.0): 1 keeps all tokens.
        seed (`int`, *optional*, defaults to 0): Of the sampling, in [0, 2^63).
        min_p (`float`, *optional*, defaults to 0.0): 0 keeps all tokens.
        base_strength (`float`, *optional*, defaults to 1.0): Of the base model; 0 where it is only read along.
        scored (`bool`, *optional*, defaults to `False`): Whether a row's only logit is the log-probability of the
            chosen token, before temperature: log π in the base model's row, log π_base in those of guides.

    Raises:
        ValueError: a value of the wrong type or out of range.
    """

    name: str
    strengths: tuple[float, ...]
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    min_p: float = 0.0
    base_strength: float = 1.0
    scored: bool = False

    def __post_init__(self) -> None:
        named = isinstance(self.name, str) and self.name != ""
        listed = isinstance(self.strengths, list | tuple)
        acting = listed and all(_real(weight) and weight != 0 for weight in self.strengths)
        reads = _real(self.base_strength) and (self.base_strength != 0 or bool(acting and self.strengths))
        # log π_base is what a guide's row says.
        told = self.scored is False or (self.scored is True and (bool(self.strengths) or self.base_strength == 1))
        for name, holds, allowed in (
            ("name", named, "a text that is not empty"),
            ("strengths", acting, "a list of numbers other than 0, one for each guide"),
            ("base_strength", reads, "a number, and not 0 where there is no guide"),
            ("temperature", _real(self.temperature) and self.temperature >= 0, "a number that is 0 or more"),
            ("top_k", _whole(self.top_k) and self.top_k >= 0, "a whole number that is 0 or more"),
            ("top_p", _real(self.top_p) and 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", _real(self.min_p) and 0 <= self.min_p <= 1, "in [0, 1]"),
            ("seed", _whole(self.seed) and 0 <= self.seed < 2**63, "a whole number in [0, 2^63)"),
            ("scored", told, "false; or true, with guides or a base_strength of 1"),
        ):
            if not holds:
                raise ValueError(f"`{PREFIX}{name}` is {getattr(self, name)!r}, but it must be {allowed}.")
        object.__setattr__(self, "strengths", tuple(float(weight) for weight in self.strengths))

    @property
    def size(self) -> int:
        """The number of requests."""
        return 1 + len(self.strengths)


@dataclass(frozen=True)
class Member:
    """One request of a family: role 0 is the base model's, role i that of guide i."""

    family: Family
    role: int

    def extra_args(self) -> dict[str, Any]:
        """What the request has to carry."""
        values = {**asdict(self.family), "strengths": list(self.family.strengths), "role": self.role}
        return {f"{PREFIX}{name}": value for name, value in values.items()}

    @classmethod
    def of(cls, params: Any) -> Member | None:
        """The member that a request's `SamplingParams` describe, or None if they describe an ordinary request.

        Raises:
            ValueError: an argument of guidance that is missing, unknown or invalid, or a setting of the engine's that
                would tear the family apart.
        """
        given = {k.removeprefix(PREFIX): v for k, v in (params.extra_args or {}).items() if k.startswith(PREFIX)}
        if not given:
            return None
        needed, known = {"name", "strengths", "role"}, {*Family.__dataclass_fields__, "role"}
        wrong = [f"{PREFIX}{name} is missing" for name in sorted(needed - given.keys())]
        wrong += [f"{PREFIX}{name} is unknown" for name in sorted(given.keys() - known)]
        if wrong:
            raise ValueError(f"A coupled request needs other arguments: {', '.join(wrong)}.")
        role = given.pop("role")
        family = Family(**given)
        if not _whole(role) or not 0 <= role < family.size:
            raise ValueError(
                f"`{PREFIX}role` is {role!r}, but it must be 0 for the base model or the number of a guide, at most "
                f"{family.size - 1}."
            )
        for name, wanted in ENGINE_SETTINGS.items():
            value = getattr(params, name, wanted)
            if value != wanted:
                raise ValueError(
                    f"A coupled request has `{name}`={value!r}, but it must be {wanted!r}: the logits processor "
                    f"chooses the token, and samples with the `{PREFIX}` arguments temperature, top_k, top_p, min_p "
                    "and seed."
                )
        return cls(family, role)


def _real(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
