# SPDX-License-Identifier: Apache-2.0
"""Questions and their two answers, the base model's and the guided one's.

All models' work is done in one thread, one question after the other in the order they came: a preference is state of
the model, so that nobody's may change while somebody else's answer is written. Within a question the two calls of
`generate` alternate, see `turns`.
"""

from __future__ import annotations

import copy
import queue
import threading
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, cast

import torch
from transformers import BatchEncoding, LogitsProcessor

from peft_pblora import as_preference
from peft_pblora.switch import AdapterSwitch, backbone_of
from trl_parm.decoding import PARMLogitsProcessor, TokenRewards, token_rewards
from trl_parm.decoding.processors import guidance_strength
from trl_parm.evaluation.decoding import GREEDY
from trl_parm.evaluation.prompts import encode_prompts
from trl_parm.evaluation.sampling import RowSampling
from trl_parm.noise import row_seed

from .loading import ADAPTER, Models
from .measures import measures_of
from .questions import Answer, Question, Reply
from .turns import CallbackStreamer, Turns, TurnTaking


MOST_PROMPT_TOKENS = 1024
"""A longer prompt keeps everybody waiting: a small CPU reads some hundred tokens a second."""
MOST_NEW_TOKENS = 256
MOST_CHARACTERS = 20_000
TOP_K = 50


class Answering:
    """Answers questions with one set of models, for any number of threads that ask.

    Args:
        models ([`Models`]): The models.
    """

    def __init__(self, models: Models) -> None:
        self.models = models
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
        if not question.prompt or not question.prompt.strip():
            raise ValueError("The prompt is empty. Write something that the model can answer.")
        as_preference(question.weights, self.models.objectives, normalize=True)
        try:
            guidance_strength(question.beta)
        except ValueError:
            text = f"β is {question.beta}, but it must be a positive, finite number. Guidance has strength 1/β."
            raise ValueError(text) from None
        for name, value, least, most in (
            ("max new tokens", question.max_new_tokens, 1, MOST_NEW_TOKENS),
            ("temperature", question.temperature, 0, 5),
            ("seed", question.seed, 0, 2**53),
        ):
            if not isinstance(value, int | float) or not least <= value <= most:
                raise ValueError(f"The {name} is {value}, but it must be from {least} to {most}.")
        length = len(question.prompt)
        if length <= MOST_CHARACTERS:
            with self._tokenizing:
                inputs = encode_prompts(self._tokenizer, [question.prompt])
            tokens, most = cast(torch.Tensor, inputs["input_ids"]).shape[1], self._most_prompt_tokens(question)
            if tokens <= most:
                return inputs
            raise ValueError(f"The prompt has {tokens} tokens, but at most {most} fit. Shorten it.")
        raise ValueError(f"The prompt has {length} characters, but at most {MOST_CHARACTERS} fit. Shorten it.")

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

    def _follow(self, future: Future, replies: queue.Queue[Reply]) -> Iterator[Reply]:
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
                reply = Reply(ahead=self._ahead(future))
            if reply != last:
                yield reply
            last = reply

    def _ahead(self, future: Future) -> int:
        line = list(self._line)
        return line.index(future) if future in line else 0

    def _answer(
        self, question: Question, inputs: BatchEncoding, replies: queue.Queue[Reply], stop: threading.Event
    ) -> None:
        """Writes and judges both answers. Only one of these runs at any time."""
        inputs = inputs.to(self.models.base.device)
        writing = _Writing(self.models, question, inputs, replies, stop)
        reply = writing.run({"base": [], "guided": [self._guide(question)]})
        if not stop.is_set():
            base, guided = (self._judge(question, answer) for answer in (reply.base, reply.guided))
            replies.put(Reply(base, guided, done=True))

    def _guide(self, question: Question) -> PARMLogitsProcessor:
        models = self.models
        preference = as_preference(question.weights, models.objectives, normalize=True)
        return PARMLogitsProcessor(
            cast(Any, models.arm), preference, question.beta, adapter_name=ADAPTER, vocabulary=models.vocabulary
        )

    @torch.no_grad()
    def _judge(self, question: Question, answer: Answer) -> Answer:
        """The answer with the ARM's token rewards, and measured in each objective."""
        if not answer.text.strip():
            return answer
        objectives = self.models.objectives
        rewards = self._token_rewards(question.prompt, answer.text, question.weights)

        def log_ratio(objective: str) -> float:
            vertex = [float(objective == one) for one in objectives]
            judged = self._token_rewards(question.prompt, answer.text, vertex)
            return judged.total.log_ratio / len(judged)

        measured = tuple(measure(question.prompt, answer.text, log_ratio) for measure in self.measures)
        return replace(answer, rewards=rewards, measured=measured)

    def _token_rewards(self, prompt: str, text: str, weights: Any) -> TokenRewards:
        models, tokenizer = self.models, self.models.arm_tokenizer
        asked: Any = prompt if tokenizer.chat_template is None else [{"role": "user", "content": prompt}]
        preference = as_preference(weights, models.objectives, normalize=True)
        with AdapterSwitch.of(backbone_of(models.arm)).only([ADAPTER]):
            return token_rewards(cast(Any, models.arm), tokenizer, asked, text, preference)

    def _most_prompt_tokens(self, question: Question) -> int:
        context = getattr(self.models.base.config.get_text_config(), "max_position_embeddings", None)
        left = MOST_PROMPT_TOKENS if context is None else context - question.max_new_tokens
        return min(MOST_PROMPT_TOKENS, left)


class _Writing:
    """Two calls of `generate` for one question."""

    def __init__(
        self,
        models: Models,
        question: Question,
        inputs: BatchEncoding,
        replies: queue.Queue[Reply],
        stop: threading.Event,
    ) -> None:
        self.models, self.question, self.inputs, self.replies, self.stop = models, question, inputs, replies, stop
        self.answers = {"base": Answer(), "guided": Answer()}

    def run(self, processors: dict[str, list[LogitsProcessor]]) -> Reply:
        """Both answers, with the processors of each; they grow in `replies` meanwhile."""
        turns = Turns(processors)
        with ThreadPoolExecutor(len(processors), "generate") as pool:
            calls = [pool.submit(self._write, turns, name, own) for name, own in processors.items()]
        for call in calls:
            call.result()
        return self._reply()

    def _reply(self) -> Reply:
        return Reply(self.answers["base"], self.answers["guided"])

    def _write(self, turns: Turns, name: str, processors: list[LogitsProcessor]) -> None:
        turn = TurnTaking(turns, name, self.stop)

        def grow(text: str) -> None:
            self.answers[name] = Answer(text, turn.tokens, turn.seconds)
            self.replies.put(self._reply())

        try:
            with turn.playing():
                cast(Any, self.models.base).generate(
                    **self.inputs,
                    logits_processor=[*processors, *self._sampling()],
                    stopping_criteria=[turn],
                    streamer=CallbackStreamer(self.models.tokenizer, grow),
                    max_new_tokens=self.question.max_new_tokens,
                    pad_token_id=self.models.tokenizer.pad_token_id,
                    **GREEDY,
                )
        except BaseException:
            self.stop.set()  # one answer alone is none
            raise
        self.answers[name] = replace(self.answers[name], tokens=turn.tokens, seconds=turn.seconds)

    def _sampling(self) -> list[LogitsProcessor]:
        """Noise that is the question's own: both answers differ by guidance alone."""
        if self.question.temperature == 0:
            return []
        seed = row_seed(int(self.question.seed), self.question.prompt)
        length = cast(torch.Tensor, self.inputs["input_ids"]).shape[1]
        return [RowSampling([seed], length, temperature=float(self.question.temperature), top_k=TOP_K)]
