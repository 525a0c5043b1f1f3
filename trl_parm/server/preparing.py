# SPDX-License-Identifier: Apache-2.0
"""Requests as tasks of the engine: prompts as tokens, and room for what is to be written."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from jinja2 import TemplateError

from trl_parm.evaluation.control_tokens import check_escapes
from trl_parm.evaluation.decoding import GREEDY, acting_settings, prompt_ids
from trl_parm.evaluation.models import Models
from trl_parm.texts import PromptText

from .engine import Task
from .errors import wrong
from .lanes import Guidance
from .protocol import Request
from .texts import Settings, Text, choice_seed, token_text


COMPLETION_TOKENS = 16
"""OpenAI's default where the prompt is no chat."""
RAW = "{prompt}"
"""The template of a prompt that is no chat."""


@dataclass(frozen=True)
class Limits:
    """What a request may ask for.

    Attributes:
        prompt_tokens (`int` or `None`): Most tokens of a prompt, beside what the models have positions for.
        tokens (`int`): Most tokens of a text.
        texts (`int`): Most texts of a request.
        seconds (`float`): Most seconds that it takes, waiting included.
        body (`int`): Most bytes of its body.
    """

    prompt_tokens: int | None = None
    tokens: int = 1024
    texts: int = 16
    seconds: float = 600.0
    body: int = 2**20


class Preparing:
    """Makes tasks of requests; for any number of threads.

    Args:
        models ([`Models`]): The base model and its tokenizer.
        limits ([`Limits`]): What a request may ask for.
        template (`str`, *optional*): How the base model reads a chat's prompt; its chat template if not given.
        escape_control_tokens (`bool`, *optional*, defaults to `True`): Read control tokens in prompts as text.

    Raises:
        ValueError: control tokens are to be read as text, which this tokenizer or transformers can't do.
    """

    def __init__(
        self, models: Models, limits: Limits, template: str | None = None, escape_control_tokens: bool = True
    ) -> None:
        if escape_control_tokens:
            check_escapes(models.tokenizer)
        self.limits, self.template, self.escape = limits, template, escape_control_tokens
        self._base, self._tokenizer = models.base, models.tokenizer
        # A fast tokenizer may not be used by two threads at once: one for prompts, one for what is written.
        self._reading, self._lock = copy.deepcopy(models.tokenizer), threading.Lock()
        ends = models.base.generation_config.eos_token_id
        self._ends = frozenset([ends] if isinstance(ends, int) else ends or ())
        self._known = models.base.get_input_embeddings().num_embeddings

    def tasks(self, request: Request, tell: Callable[[Any], None], started: float) -> list[Task]:
        """A task for each prompt of a request. Raises [`RequestError`] for what is too long or can't be read."""
        with self._lock:
            return [self._task(request, i, tell, started) for i in range(len(request.prompts))]

    def token_text(self, token: int, before: int | None) -> tuple[str, list[int] | None]:
        """A token after another one, as text and as bytes."""
        with self._lock:
            return token_text(self._reading, token, before)

    def _task(self, request: Request, number: int, tell: Callable[[Any], None], started: float) -> Task:
        prompt, served, own = request.prompts[number], request.served, None
        param = "messages" if request.chat else "prompt"
        try:
            ids = self._ids(request, prompt)
            most = self._most(request, len(ids))
            text = "x" if _is_ids(prompt) else cast(PromptText, prompt)
            own = served.own_prompt(text, ids, request.weights, request.beta, self.escape)
        except (AttributeError, IndexError, KeyError, TemplateError, TypeError, ValueError) as error:
            raise wrong(param, f"The prompt can't be read: {error}") from None
        if not ids:
            raise wrong(param, "The prompt has no tokens, so that there is nothing to go on from.")
        if own is not None and _is_ids(prompt):
            raise wrong(param, "Guides of this model read prompts of their own. Give the prompt as text.")
        if own is not None:
            most = min(most, self._most(request, own[0].shape[1]))
        task = Task(
            Guidance(served, request.weights, request.beta, own), [], tell, started + self.limits.seconds, started
        )
        for i in range(number * request.n, (number + 1) * request.n):
            seed = choice_seed(request.seed, i)
            settings = Settings(
                most, request.sampling, seed, request.stop, self._ends, request.logprobs, not request.chat,
                self._processors(len(ids)),
            )  # fmt: skip
            task.texts.append(Text(task, i, ids, settings, self._tokenizer))
        return task

    def _ids(self, request: Request, prompt: Any) -> list[int]:
        if _is_ids(prompt):
            if max(prompt) >= self._known:
                raise wrong("prompt", f"`prompt` has the token {max(prompt)}, but there are {self._known}.")
            return prompt
        template = self.template if request.chat else RAW
        return prompt_ids(self._reading, [prompt], template, None, self.escape)[0]

    def _most(self, request: Request, length: int) -> int:
        """Most tokens of each text. Raises [`RequestError`] where prompt and text don't fit."""
        param = "messages" if request.chat else "prompt"
        positions, limits = request.served.positions, self.limits
        most = limits.prompt_tokens if limits.prompt_tokens is not None else positions
        if positions is not None:
            most = min(positions - 1, most if most is not None else positions)
        if most is not None and length > most:
            raise wrong(param, f"The prompt has {length} tokens, but at most {most} fit.", "context_length_exceeded")
        room = limits.tokens if positions is None else min(limits.tokens, positions - length)
        if request.max_tokens is not None and request.max_tokens > limits.tokens:
            raise wrong(
                "max_tokens",
                f"`max_tokens` is {request.max_tokens}, but this server writes at most {limits.tokens} tokens.",
            )
        if request.max_tokens is not None and request.max_tokens > room:
            raise wrong(
                "max_tokens",
                f"`max_tokens` is {request.max_tokens}, but at most {room} fit.",
                "context_length_exceeded",
            )
        return request.max_tokens or (room if request.chat else min(room, COMPLETION_TOKENS))

    def _processors(self, length: int) -> Any:
        """What the base model's generation config does to scores, as `generate` does it; `None` if nothing."""
        config: Any = self._base.generation_config
        if acting_settings(config) is None:
            return None
        config = copy.deepcopy(config)
        config.update(**GREEDY)
        base: Any = self._base
        base._prepare_special_tokens(config, True, device=base.device)
        return base._get_logits_processor(config, input_ids_seq_length=length, device=base.device)


def _is_ids(prompt: Any) -> bool:
    return isinstance(prompt, list) and isinstance(prompt[0], int)
