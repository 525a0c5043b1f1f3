# SPDX-License-Identifier: Apache-2.0
"""Questions and their two answers, the base model's and the guided one's.

All models' work is done in one thread, one question after the other in the order they came. The two answers of a
question are two rows of one batch, in one call of `generate`: guidance has the weight 0 in the first.
"""

from __future__ import annotations

import copy
import math
import queue
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, cast

import torch
from transformers import BatchEncoding, StoppingCriteria

from peft_pblora import as_preference
from peft_pblora.switch import backbone_of
from trl_parm.decoding import BASE, Guided, TokenRewards, token_rewards
from trl_parm.decoding.methods import guidance_strength
from trl_parm.evaluation.control_tokens import check_escapes
from trl_parm.evaluation.decoding import GREEDY, RowSampling, encode_prompts, text_length
from trl_parm.evaluation.models import positions_of
from trl_parm.noise import row_seed
from trl_parm.rewards import score
from trl_parm.templates import response_text

from .loading import Models
from .measures import measures_of
from .questions import Answer, Question, Reply


MOST_PROMPT_TOKENS = 1024
"""A longer prompt keeps everybody waiting: a small CPU reads some hundred tokens a second."""
MOST_NEW_TOKENS = 256
MOST_CHARACTERS = 20_000
TOP_K = 50
TIMED = 4
"""Tokens after which it is known what a token takes: the two answers are written together, so each is timed apart."""


class Answering:
    """Answers questions with one set of models, for any number of threads that ask.

    Args:
        models ([`Models`]): The models.
        escape_control_tokens (`bool`, *optional*, defaults to `False`): Read the text of a control token as text.

    Raises:
        ValueError: control tokens are to be read as text, which this transformers can't do.
    """

    def __init__(self, models: Models, escape_control_tokens: bool = False) -> None:
        if escape_control_tokens:
            check_escapes(models.tokenizer)
        self.models, self.escape_control_tokens = models, escape_control_tokens
        self.measures = measures_of(models.objectives)
        # A fast tokenizer may not be used by two threads at once, and the worker uses the models' own.
        self._tokenizer, self._tokenizing = copy.deepcopy(models.tokenizer), threading.Lock()
        self._worker = ThreadPoolExecutor(1, "answering")
        self._line: dict[Future, threading.Event] = {}

    def close(self) -> None:
        """Takes no more questions, drops those that wait and stops the one at work."""
        for stop in list(self._line.values()):
            stop.set()
        self._worker.shutdown(cancel_futures=True)

    def check(self, question: Question) -> BatchEncoding:
        """What the base model reads.

        Raises:
            ValueError: an empty prompt or too long a one, or a number out of its range.
        """
        prompt, beta = question.prompt, question.beta
        if not prompt or not prompt.strip():
            raise ValueError("The prompt is empty. Write something that the model can answer.")
        self._preference(question)
        for name, value, least, most in (
            ("β", beta, 1e-6, 1e6),  # its inverse is the strength of guidance, which must be finite in float32 too
            ("max new tokens", question.max_new_tokens, 1, MOST_NEW_TOKENS),
            ("temperature", question.temperature, 0, 5),
            ("seed", question.seed, 0, 2**53),
        ):
            if not (isinstance(value, int | float) and least <= value <= most):
                raise ValueError(f"The {name} is {value}, but it must be from {least} to {most}.")
        if len(prompt) > MOST_CHARACTERS:
            raise ValueError(
                f"The prompt has {len(prompt)} characters, but at most {MOST_CHARACTERS} fit. Shorten it."
            )
        with self._tokenizing:
            inputs = encode_prompts(self._tokenizer, [prompt], escape_control_tokens=self.escape_control_tokens)
        tokens = cast(torch.Tensor, inputs["input_ids"]).shape[1]
        known = [positions_of(model.config) for model in (self.models.base, backbone_of(self.models.arm.model))]
        context = min((count for count in known if count), default=math.inf)
        most = min(MOST_PROMPT_TOKENS, context - question.max_new_tokens)
        if most < 1:
            raise ValueError(
                f"The max new tokens are {question.max_new_tokens}, but all that fits is {context} tokens."
            )
        if tokens > most:
            raise ValueError(f"The prompt has {tokens} tokens, but at most {most} fit. Shorten it.")
        return inputs

    def ask(self, question: Question) -> Generator[Reply]:
        """Yields both answers as they grow. A caller that closes this iterator stops them.

        Raises:
            ValueError: as [`check`](Answering.check), before anything is decoded.
        """
        inputs = self.check(question)
        replies: queue.Queue[Reply] = queue.Queue()
        stop = threading.Event()
        future = self._worker.submit(self._answer, question, inputs, replies, stop)
        self._line[future] = stop
        future.add_done_callback(self._line.pop)
        try:
            yield from self._follow(future, replies)
        finally:
            stop.set()
            future.cancel()

    def _follow(self, future: Future, replies: queue.Queue[Reply]) -> Generator[Reply]:
        """The newest reply each time; before the first one, the question's place in the line."""
        last = None
        while last is None or not last.done:
            try:
                reply = replies.get(timeout=0.1)
                while not replies.empty():
                    reply = replies.get()
            except queue.Empty:
                if future.done() and replies.empty():
                    future.result()  # raises what went wrong
                    return
                if last is not None and not last.ahead:
                    continue
                line = list(self._line)
                reply = Reply(ahead=line.index(future) if future in line else 0)
            if reply != last:
                yield reply
            last = reply

    def _answer(
        self, question: Question, inputs: BatchEncoding, replies: queue.Queue[Reply], stop: threading.Event
    ) -> None:
        """Writes, judges and times both answers. Only one of these runs at any time."""
        inputs = inputs.to(self.models.base.device)
        watch = _Watch(inputs, stop, lambda rows: replies.put(Reply(self._written(rows[0]), self._written(rows[1]))))
        shares = (0.0, 1.0)
        rows = self._generate(question, inputs, shares, watch, question.max_new_tokens)
        answers = [self._written(row, whole=True) for row in rows]
        if not stop.is_set():
            answers = [self._judge(question, inputs, answer, row) for answer, row in zip(answers, rows, strict=True)]
            base, guided = (self._timed(question, inputs, share, answer) for share, answer in zip(shares, answers))
            replies.put(Reply(base, guided, done=True))

    def _guided(self, question: Question, shares: tuple[float, ...]) -> Guided:
        """The base model with this share of its guidance in each row."""
        strengths = guidance_strength(question.beta) * torch.tensor(shares)
        return Guided(self.models.base, BASE + strengths * self.models.arm.lm(self._preference(question)))

    def _preference(self, question: Question) -> torch.Tensor:
        return as_preference(question.weights, self.models.objectives, normalize=True)

    def _generate(
        self, question: Question, inputs: BatchEncoding, shares: tuple[float, ...], watch: _Watch, most: int
    ) -> torch.Tensor:
        """The new tokens of a row for each share, `(rows, new)`, whose noise is the same: guidance alone differs."""
        rows, noise = len(shares), []
        if question.temperature:
            seeds = [row_seed(question.seed, question.prompt)] * rows
            noise = [RowSampling(seeds, watch.length, temperature=question.temperature, top_k=TOP_K)]
        output: Any = self._guided(question, shares).generate(
            **{name: cast(torch.Tensor, value).repeat(rows, 1) for name, value in inputs.items()},
            logits_processor=noise,
            stopping_criteria=[watch],
            max_new_tokens=most,
            pad_token_id=self.models.tokenizer.pad_token_id,
            **GREEDY,
        )
        return output[:, watch.length :]

    def _written(self, tokens: torch.Tensor, whole: bool = False) -> Answer:
        """The answer of one row, without the beginning of a character if there is more to come."""
        length = text_length(tokens, self.models.base.generation_config.eos_token_id)
        text = cast(str, self.models.tokenizer.decode(tokens[:length], skip_special_tokens=True))
        return Answer(text if whole else text.rstrip("�"), length)

    def _timed(self, question: Question, inputs: BatchEncoding, share: float, answer: Answer) -> Answer:
        """The answer with what it would have taken alone, by its first tokens."""
        watch, start = _Watch(inputs, threading.Event(), lambda tokens: None), time.perf_counter()
        self._generate(question, inputs, (share,), watch, min(TIMED, answer.tokens))
        first, steps = watch.times[0] - start, watch.times[-1] - watch.times[0]
        return replace(answer, seconds=first + steps / max(1, len(watch.times) - 1) * (answer.tokens - 1))

    @torch.no_grad()
    def _judge(self, question: Question, inputs: BatchEncoding, answer: Answer, tokens: torch.Tensor) -> Answer:
        """The answer with the ARM's token rewards, and measured in each objective."""
        if not answer.text.strip():
            return answer
        prompt, prompt_ids = question.prompt, cast(torch.Tensor, inputs["input_ids"])[0].tolist()
        text = response_text(self.models.tokenizer, prompt_ids, tokens[: answer.tokens].tolist())
        rewards = self._token_rewards(prompt, text, self._preference(question))
        measured = []
        for measure, vertex in zip(self.measures, torch.eye(len(self.measures)), strict=True):
            if measure.reward is not None:
                measured.append(score(measure.objective, measure.reward, [prompt], [answer.text])[0])
            else:
                judged = self._token_rewards(prompt, text, vertex)
                measured.append(judged.total.log_ratio / len(judged))
        return replace(answer, rewards=rewards, measured=tuple(measured))

    def _token_rewards(self, prompt: str, text: str, preference: torch.Tensor) -> TokenRewards:
        arm = self.models.arm
        asked: Any = prompt if arm.tokenizer.chat_template is None else [{"role": "user", "content": prompt}]
        if self.escape_control_tokens:
            asked = encode_prompts(arm.tokenizer, [prompt], escape_control_tokens=True)["input_ids"][0].tolist()
        return token_rewards(arm.model, arm.tokenizer, asked, text, preference, adapter_name=arm.adapter_name)


class _Watch(StoppingCriteria):
    """Sees the new tokens of a call of `generate`, `(rows, new)`, as they come, and ends it when it is told to."""

    def __init__(self, inputs: BatchEncoding, stop: threading.Event, on_tokens: Callable[[torch.Tensor], Any]) -> None:
        self.length, self.stop, self.on_tokens = cast(torch.Tensor, inputs["input_ids"]).shape[1], stop, on_tokens
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        self.on_tokens(input_ids[:, self.length :])
        return torch.full((len(input_ids),), self.stop.is_set(), device=input_ids.device)
