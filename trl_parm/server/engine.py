# SPDX-License-Identifier: Apache-2.0
"""Who is decoded when: one thread reads prompts and writes texts, whoever asks.

A turn of the thread reads at most so many tokens of prompts, and then writes one token of every text that has a row.
Texts get rows in the order in which they came. Where others wait, a text that has written so many tokens since it got
its row passes it on, and goes to the end of the line: its cache is dropped, and it is read again. So whoever waits as
number n for one of R rows gets it after at most ⌈n / R⌉ times so many steps, however long the others' texts are.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from .errors import RequestError
from .lanes import Guidance, Lane, Reading
from .metrics import Metrics
from .texts import Piece, Text, choose


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rows:
    """How much the engine does at once.

    Attributes:
        rows (`int`): Most texts that are decoded at once.
        waiting (`int`): Most texts that wait for a row.
        read_tokens (`int`): Most tokens of prompts that are read between two steps.
        turn_tokens (`int`): After so many tokens a text passes its row on, if others wait.
    """

    rows: int = 32
    waiting: int = 256
    read_tokens: int = 256
    turn_tokens: int = 128


@dataclass(eq=False)
class Task:
    """A prompt and the texts that are to follow it.

    Attributes:
        guidance ([`Guidance`]): By what they are written.
        texts (`list[Text]`): The texts.
        tell (`Callable`): Gets every piece, or an error, after which nothing follows. The engine's thread calls it.
        deadline (`float`): When it is too late, by `time.monotonic`.
        started (`float`): When it came.
        gone (`bool`): Whether its client went away.
    """

    guidance: Guidance
    texts: list[Text]
    tell: Callable[[Piece | Exception], None]
    deadline: float
    started: float
    gone: bool = False
    over: bool = False
    told: bool = False

    @property
    def model(self) -> str:
        """Its name."""
        return self.guidance.served.name


class Engine:
    """Decodes the texts of tasks, in a thread of its own.

    Args:
        rows ([`Rows`]): How much at once.
        metrics ([`Metrics`]): Where it counts.
    """

    def __init__(self, rows: Rows, metrics: Metrics) -> None:
        self.rows, self.metrics = rows, metrics
        self._wake = threading.Condition()
        self._queue: deque[tuple[Task, list[Text]]] = deque()  # changed under the condition alone
        self._open = True
        self._tasks: set[Task] = set()
        self._readings: list[tuple[Task, Reading]] = []
        self._lanes: dict[tuple, Lane] = {}
        self._running = 0  # rows that are taken, as the thread last counted them
        self._thread = threading.Thread(target=self._run, name="decoding", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether it takes tasks."""
        return self._open and self._thread.is_alive()

    def submit(self, tasks: Sequence[Task]) -> None:
        """Takes all of these tasks. Raises [`RequestError`] with status 503 if there is no room for them."""
        count = sum(len(task.texts) for task in tasks)
        with self._wake:
            if not self.is_alive:
                raise RequestError("The server is shutting down.", 503, "shutting_down")
            room = self.rows.waiting + self.rows.rows - self._running
            if sum(len(texts) for _, texts in self._queue) + count > room:
                raise RequestError(
                    f"The server is busy: {self.rows.waiting} texts may wait for a row, and there is no room for "
                    f"{count} more. Try again later.",
                    503, "overloaded",
                )  # fmt: skip
            for task in tasks:
                shared = task.guidance.served.joins
                self._queue.extend((task, part) for part in ([task.texts] if shared else [[t] for t in task.texts]))
            self._wake.notify()

    def leave(self, tasks: Sequence[Task]) -> None:
        """The client of these tasks went away: their rows are free from the next step on."""
        for task in tasks:
            task.gone = True

    def close(self) -> None:
        """Ends the thread after its step. What is left of tasks ends with an error."""
        with self._wake:
            self._open = False
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._open:
                self._turn()
                with self._wake:
                    self._wake.wait_for(lambda: not self._open or self._queue or self._tasks)
        finally:  # whatever happens, nobody waits for ever
            self._open = False
            self._end_all(RequestError("The server is shutting down.", 503, "shutting_down"))

    def _turn(self) -> None:
        self._drop()
        self._pass_rows_on()
        self._admit()
        joining = self._read()
        for key in dict.fromkeys([*self._lanes, *joining]):
            self._step(key, joining.get(key, []))
        self._running = self.rows.rows - self._free
        self.metrics.running.set(self._running)
        with self._wake:
            self.metrics.waiting.set(sum(len(texts) for _, texts in self._queue))

    @property
    def _free(self) -> int:
        """Rows that are free for others."""
        read = sum(len(reading.texts) for _, reading in self._readings)
        return self.rows.rows - read - sum(len(lane.staying) for lane in self._lanes.values())

    def _drop(self) -> None:
        """Ends tasks whose clients are gone, and those that took too long."""
        now = time.monotonic()
        with self._wake:
            tasks = self._tasks | {task for task, _ in self._queue}
        for task in tasks:
            if task.gone:
                self.metrics.client_gone(task.model)
                self._end(task)
            elif now > task.deadline:
                self._end(task, RequestError("The request took longer than the server allows.", 504, "timeout"))

    def _pass_rows_on(self) -> None:
        """Texts that have written long enough go to the end of the line, if that makes room for the first in it."""
        with self._wake:
            wanted = len(self._queue[0][1]) - self._free if self._queue else 0
        own = [(lane, text) for lane in self._lanes.values() for text in lane.staying]
        own = [(lane, text) for lane, text in own if text.stint >= self.rows.turn_tokens]
        for lane, text in sorted(own, key=lambda one: -one[1].stint)[:wanted] if 0 < wanted <= len(own) else ():
            lane.leaving.add(text)
            text.stint = 0
            self.metrics.turn_passed()
            with self._wake:
                self._queue.append((text.owner, [text]))

    def _admit(self) -> None:
        """Begins to read for those that wait, as long as there are rows for them."""
        while True:
            with self._wake:
                if not self._queue or len(self._queue[0][1]) > self._free:
                    return
                task, texts = self._queue.popleft()
            self._tasks.add(task)
            with self._failing(task):
                self._readings.append((task, Reading(texts, task.guidance)))
            self._running = self.rows.rows - self._free

    def _read(self) -> dict[tuple, list[tuple[Reading, list[Text]]]]:
        """Reads prompts, a part of each in turn. Returns, by their lanes, those that are read, with the texts that go
        on after their first tokens."""
        joining: dict[tuple, list[tuple[Reading, list[Text]]]] = {}
        left = self.rows.read_tokens
        for task, reading in list(self._readings):
            if left <= 0:
                break
            if task.over:  # since another of its prompts failed
                continue
            self._readings.remove((task, reading))
            with self._failing(task):
                start = time.monotonic()
                before, log_probs = reading.cache.length, reading.advance(left)
                left -= reading.cache.length - before
                if log_probs is None:
                    self._readings.append((task, reading))
                    continue
                self._write(reading.texts, log_probs.expand(len(reading.texts), -1), start)
                own = () if task.guidance.served.joins else (reading,)
                if going := [text for text in reading.texts if text.finished is None]:
                    joining.setdefault((*task.guidance.lane, *own), []).append((reading, going))
        return joining

    def _step(self, key: tuple, joining: list[tuple[Reading, list[Text]]]) -> None:
        """Lets texts leave and join a lane, and writes a token of each."""
        joining = [(reading, texts) for reading, texts in joining if not texts[0].owner.over]
        if key not in self._lanes:
            if not joining:
                return
            guidance = joining[0][0].guidance
            self._lanes[key] = Lane(guidance.served, guidance.own is not None)
        lane, start = self._lanes[key], time.monotonic()
        if joining:
            with self._failing(*{text.owner for _, texts in joining for text in texts}):
                lane.regroup(joining)
        with self._failing(*{text.owner for text in lane.staying}):
            if lane.leaving:
                lane.regroup([])
            if lane.texts:
                self._write(lane.texts, lane.step(), start)
                lane.leaving.update(text for text in lane.texts if text.finished is not None)
        if not lane.staying:
            del self._lanes[key]

    def _write(self, texts: list[Text], log_probs: torch.Tensor, start: float) -> None:
        """Chooses the next token of each text, and tells who asked."""
        pieces = [(text.owner, text.add(chosen)) for text, chosen in zip(texts, choose(log_probs, texts))]
        now = time.monotonic()
        self.metrics.wrote(texts[0].owner.guidance.served, len(texts), now - start)
        for task, piece in pieces:
            if not task.told:
                self.metrics.first_token(task.model, now - task.started)
                task.told = True
            task.tell(piece)
            if all(text.finished is not None for text in task.texts):
                self._end(task)

    def _end(self, task: Task, error: Exception | None = None) -> None:
        """Gives back what a task has, and tells it of an error."""
        if task.over:
            return
        task.over = True
        self._tasks.discard(task)
        self._readings = [(owner, reading) for owner, reading in self._readings if owner is not task]
        for lane in self._lanes.values():
            lane.leaving.update(text for text in lane.texts if text.owner is task)
        with self._wake:
            self._queue = deque((owner, texts) for owner, texts in self._queue if owner is not task)
        self.metrics.ended(task.model, time.monotonic() - task.started, len(task.texts[0].prompt))
        if error is not None:
            task.tell(error)

    def _end_all(self, error: Exception) -> None:
        with self._wake:
            tasks = self._tasks | {task for task, _ in self._queue}
        for task in tasks:
            self._end(task, error)

    @contextmanager
    def _failing(self, *tasks: Task) -> Iterator[None]:
        """What goes wrong meanwhile ends these tasks, and nobody else's."""
        try:
            yield
        except Exception as error:
            if isinstance(error, ValueError) and len(tasks) == 1:  # about what it asked for
                self._end(tasks[0], RequestError(str(error)))
                return
            logger.exception("Decoding failed")
            for task in tasks:
                self._end(task, RequestError("Decoding failed; the server's log says why.", 500, "decoding_failed"))
