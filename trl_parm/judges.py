# SPDX-License-Identifier: Apache-2.0
"""Language models as judges: a number for a response, or which of two responses is better."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from .endpoint import Endpoint, Failure
from .texts import PromptText, as_text, fill


SOURCE = "openai"
"""What stands as `source` of a reward that is a judge."""
NUMBER = re.compile(r"(?<![\w.])(?<!\d[eE][-+])[-+−]?\d+(?:\.\d+)?(?![\w]|\.\d)")
VERDICT = r"\[\[(A|B|C)\]\]"
"""Where an answer says A, B, or C for a tie, as in MT-Bench (Zheng et al. 2023, arXiv 2306.05685)."""
PAIR_TEMPLATE = (
    "Compare two answers of assistants to a user. Do not let their order or length influence you. After a short "
    "reason end with [[A]] if A is better, [[B]] if B is better, or [[C]] for a tie.\n\n[User]\n{prompt}\n\n"
    "[Answer A]\n{response_a}\n\n[Answer B]\n{response_b}"
)
OF_ENDPOINT = {setting.name for setting in fields(Endpoint)} - {"counted", "unread", "pause"}


@dataclass
class Judge:
    """A reward that a language model gives, read from its answer; higher is better. What fails is a [`Failure`].

    Args:
        endpoint ([`Endpoint`]): Who is asked.
        template (`str`): The question, with `{response}` and, unless responses are judged alone, `{prompt}`.
        pattern (`str`, *optional*): A regular expression whose group is the number, of which the last match counts. If
            not given, an answer must have exactly one number in it.
        least, most (`float`, *optional*): What a number must lie between.
        negate (`bool`, *optional*, defaults to `False`): Whether it is a cost.

    Raises:
        ValueError: a template without `{response}`, or a pattern without a group.
    """

    endpoint: Endpoint
    template: str
    pattern: str | None = None
    least: float | None = None
    most: float | None = None
    negate: bool = False
    is_model = True  # its errors are told as they are, see `score`

    def __post_init__(self) -> None:
        if "{response}" not in self.template:
            raise ValueError(f"The template {self.template!r} has no {{response}}, where the response belongs.")
        _check_pattern(self.pattern)

    @property
    def source(self) -> str:
        """Who it is, in words."""
        return f"{self.endpoint.model} at {self.endpoint.base_url}"

    def __call__(self, prompts: Sequence[PromptText], responses: Sequence[str]) -> list[Any]:
        asks_prompt = "{prompt}" in self.template
        questions = [
            fill(self.template, response=r, **({"prompt": as_text(p)} if asks_prompt else {}))
            for p, r in zip(prompts, responses, strict=True)
        ]
        return self.endpoint.ask(questions, self._number)

    def configuration(self) -> dict[str, Any]:
        """What its numbers depend on, as JSON."""
        own = {name: getattr(self, name) for name in ("template", "pattern", "least", "most", "negate")}
        return {"source": SOURCE, **self.endpoint.configuration(), **own}

    def _number(self, answer: str) -> float | Failure:
        found = NUMBER.findall(answer) if self.pattern is None else _groups(self.pattern, answer)[-1:]
        told = " ".join(answer.split())[:120]
        if len(found) != 1:
            return Failure(f"{len(found)} numbers in the answer {told!r}" if found else f"no number in {told!r}")
        try:
            value = float(found[0].replace("−", "-"))
        except ValueError:
            return Failure(f"{found[0]!r} is no number, in {told!r}")
        if not math.isfinite(value):
            return Failure(f"{value:g} is no finite number, in {told!r}")
        if (self.least is not None and value < self.least) or (self.most is not None and value > self.most):
            return Failure(f"{value:g} is out of range, in {told!r}")
        return -value if self.negate else value


@dataclass
class PairJudge:
    """Which of two responses a language model prefers, asked in both orders.

    Args:
        endpoint ([`Endpoint`]): Who is asked.
        template (`str`, *optional*): The question, with `{prompt}`, `{response_a}` and `{response_b}`.
        pattern (`str`, *optional*): A regular expression whose group is A, B, or anything else for a tie; the last
            match counts, and of several groups the first that has something.

    Raises:
        ValueError: a template that lacks one of these, or a pattern without a group.
    """

    endpoint: Endpoint
    template: str = PAIR_TEMPLATE
    pattern: str = VERDICT

    def __post_init__(self) -> None:
        for name in ("{prompt}", "{response_a}", "{response_b}"):
            if name not in self.template:
                raise ValueError(f"The template {self.template!r} has no {name}.")
        _check_pattern(self.pattern)

    def __call__(
        self, prompts: Sequence[PromptText], first: Sequence[str], second: Sequence[str]
    ) -> list[tuple[float | Failure, float | Failure]]:
        """How the first response does against the second, 1 for better, 0.5 for a tie, 0 for worse: asked with the
        first one as A, and as B."""
        pairs = list(zip(map(as_text, prompts), first, second, strict=True))
        questions = [self._question(*pair) for pair in pairs] + [self._question(p, b, a) for p, a, b in pairs]
        found = self.endpoint.ask(questions, self._verdict)
        straight, swapped = found[: len(pairs)], found[len(pairs) :]
        return [(s, w if isinstance(w, Failure) else 1 - w) for s, w in zip(straight, swapped, strict=True)]

    def _question(self, prompt: str, a: str, b: str) -> str:
        return fill(self.template, prompt=prompt, response_a=a, response_b=b)

    def _verdict(self, answer: str) -> float | Failure:
        found = _groups(self.pattern, answer)
        if not found:
            return Failure(f"no verdict in {' '.join(answer.split())[:120]!r}")
        return {"A": 1.0, "B": 0.0}.get(found[-1].strip().upper(), 0.5)


def judge_of(given: Mapping[str, Any], kind: type = Judge) -> Any:
    """A [`Judge`], or a [`PairJudge`], from what stands in YAML: `{source: openai, base_url: , model: , template: }`
    and their other arguments. Raises `ValueError` for keys that are unknown or missing."""
    own = {setting.name for setting in fields(kind)} - {"endpoint"}
    settings = {key: value for key, value in given.items() if key != "source"}
    unknown = [key for key in settings if key not in own | OF_ENDPOINT]
    needed = ["base_url", "model", *(["template"] if kind is Judge else [])]
    missing = [key for key in needed if not settings.get(key)]
    if given.get("source") != SOURCE or unknown or missing:
        raise ValueError(
            f"A judge is given as {dict(given)}, but it needs `source: {SOURCE}`, {', '.join(needed)}, and may have "
            f"{', '.join(sorted((own | OF_ENDPOINT) - set(needed)))}."
        )
    endpoint = Endpoint(**{key: value for key, value in settings.items() if key in OF_ENDPOINT})
    return kind(endpoint, **{key: value for key, value in settings.items() if key in own})


def _groups(pattern: str, answer: str) -> list[str]:
    """What the first group with something in it has, of each match of a pattern."""
    return [next(filter(None, match.groups()), "") for match in re.finditer(pattern, answer)]


def _check_pattern(pattern: str | None) -> None:
    try:
        if pattern is not None and not re.compile(pattern).groups:
            raise ValueError(f"`pattern` is {pattern!r}, but it needs a group, such as `Rating: (\\d+)`.")
    except re.error as error:
        raise ValueError(f"`pattern` is {pattern!r}, which is no regular expression: {error}.") from None
