# SPDX-License-Identifier: Apache-2.0
"""Processes as threads, so that what several do together can be tested fast, also where one of them dies."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from trl_parm.processes import Processes


class Left(BaseException):
    """Ends a process that waits for one that has died, as a launcher does."""


class Meeting:
    """What stands in the place of a process group: a value of each, round by round."""

    def __init__(self) -> None:
        self.condition, self.rounds, self.dead = threading.Condition(), defaultdict(dict), False

    def gather(self, turn: int, number: int, count: int, value: Any) -> list[Any]:
        with self.condition:
            found = self.rounds[turn]
            found[number] = value
            self.condition.notify_all()
            self.condition.wait_for(lambda: len(found) == count or self.dead, timeout=60)
            if len(found) < count:
                raise Left
            return [found[i] for i in range(count)]

    def end(self) -> None:
        with self.condition:
            self.dead = True
            self.condition.notify_all()


@dataclass(frozen=True)
class Thread(Processes):
    """One of several threads that take themselves for processes."""

    meeting: Any = None
    turns: list = field(default_factory=list)

    def gather(self, value: Any) -> list[Any]:
        self.turns.append(value)
        return self.meeting.gather(len(self.turns), self.number, self.count, value)


def together(count: int, work: Callable[[Processes], Any]) -> list[Any]:
    """What each of several threads has returned, or the error that it has raised."""
    meeting, found = Meeting(), [None] * count

    def run(number: int) -> None:
        try:
            found[number] = work(Thread(number, count, count, meeting))
        except BaseException as error:
            found[number] = error
            meeting.end()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def results(found: list[Any]) -> list[Any]:
    """What all have returned. Raises the first error, and not that of who waited in vain."""
    errors = [one for one in found if isinstance(one, BaseException)]
    for error in sorted(errors, key=lambda error: isinstance(error, Left)):
        raise error
    return found
