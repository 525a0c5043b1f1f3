# SPDX-License-Identifier: Apache-2.0
"""The table of an evaluation: a row for each run and prompt, in batches of which some are done. Not how."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast

from datasets import Dataset

from peft_pblora.preference import check_columns, check_objectives
from trl_parm.processes import Processes
from trl_parm.records import Records
from trl_parm.rewards import is_unjudged
from trl_parm.shapes import read_text
from trl_parm.texts import PromptText, prompt_key

from .answering import Answering
from .answers import with_all_columns
from .decoding import SAME_OBJECTIVES, Run
from .engines import Engine
from .fronts import OF_OBJECTIVE, SUMMARY, check_scores, row_cell
from .rescoring import COLUMNS, DECODED, ask_again


class Table:
    """A row for each run and prompt.

    Args:
        answering ([`Answering`]): What makes rows.
        runs, prompts, batch_size, on_batch: As in [`sweep`].
        positions (`int`, *optional*): How many the base model has.

    Attributes:
        lengths (`list[int]`): Tokens of each prompt.

    Raises:
        ValueError: as [`sweep`].
    """

    def __init__(
        self,
        answering: Answering,
        runs: Sequence[Run],
        prompts: Sequence[PromptText],
        batch_size: int = 16,
        on_batch: Callable[[Run], Any] = lambda run: None,
        positions: int | None = None,
    ) -> None:
        self.answering, self.objectives, self.runs = answering, answering.objectives, list(runs)
        self.prompts = [read_text(prompt, f"row {number} of `prompts`") for number, prompt in enumerate(prompts)]
        self.keys = list(map(prompt_key, self.prompts))
        self.batch_size, self.on_batch = batch_size, on_batch
        if not self.prompts:
            raise ValueError("`prompts` is empty. Give at least one prompt.")
        self.lengths = answering.check_lengths(self.prompts, positions)
        for prompt in _repeated(self.keys):
            raise ValueError(f"The prompt {prompt[:80]!r} is given twice. Give each prompt once.")
        self._check_names()

    def open(self, path: Any, configuration: Mapping[str, Any], restart: bool, processes: Processes) -> Records:
        """What is there of the table, with judges asked again where they failed, and takes what is new, see
        [`Records`]; processes must have one table."""
        runs = [(run.method, run.weights(self.objectives), run.together) for run in self.runs]
        processes.agree({"prompts": self.keys, "methods or preferences": runs, "batch_size": self.batch_size})
        whole = {**self.answering.configuration, **configuration}
        renew = partial(ask_again, names=self.objectives, rewards=self.answering.judges)
        return Records(path, whole, {"methods": "method"}, restart, self._stored, processes, renew)

    def fill(self, records: Records, runs: Sequence[Run], load: Callable[[], tuple[Engine, Sequence[Run]]]) -> None:
        """Decodes what the records lack of some runs, and only then loads an engine and their method."""
        batches = [batch for group in self._together(runs) for batch in self._batches(records, runs, group)]
        engine, runs = load() if any(todo for _, _, todo in batches) else (cast(Any, None), runs)
        for group, prompts, todo in batches:
            if todo:
                records.append(self.answering.rows([(runs[number], self.prompts[i]) for number, i in todo], engine))
            # As often for each run as there are batches of its prompts alone.
            ends = sum(i % self.batch_size == self.batch_size - 1 or i == len(self.prompts) - 1 for i in prompts)
            for number in group:
                for _ in range(ends):
                    self.on_batch(runs[number])

    def data(self, records: Records) -> Dataset:
        """The rows of all runs, when all processes have filled in theirs."""
        order = [(run, i) for group in self._together(self.runs) for run, i in self._pairs(group)]
        cells = [self._cells(run) for run in self.runs]
        records.gather([cells[run][i] for run, i in order], row_cell)
        done = {row_cell(row): row for row in records.rows}
        rows = [dict(done[cell]) for of_run in cells for cell in of_run]
        return Dataset.from_list(with_all_columns(rows), on_mixed_types="use_json")  # texts and conversations

    def _check_names(self) -> None:
        if self.objectives:  # none are needed where nothing is scored
            check_objectives(self.objectives)
        for name in (run.method for run in self.runs):
            if not (isinstance(name, str) and name.strip() and name.isprintable()):
                raise ValueError(f"The name of a method is {name!r}, but it must be a text of one line, in quotes.")
        check_columns(self.objectives, COLUMNS)
        check_columns(self.objectives, SUMMARY, OF_OBJECTIVE)  # what the table is summed up to
        for method, weights in _repeated((run.method, run.weights(self.objectives)) for run in self.runs):
            raise ValueError(f"The method {method!r} is given twice at the preference {weights}. Give each run once.")

    def _stored(self, row: Mapping[str, Any]) -> tuple:
        """The cell of a row in a file, which must have all columns."""
        judged = [name for name in self.answering.judges if not is_unjudged(row, name)]
        check_scores(row, (*judged, *DECODED))
        return row_cell(row)

    def _together(self, runs: Sequence[Run]) -> list[list[int]]:
        """The numbers of runs that share batches."""
        groups: dict[Any, list[int]] = {}
        for number, run in enumerate(runs):
            kind: Any = run.together
            if kind == SAME_OBJECTIVES:
                kind = kind, tuple(weight != 0 for weight in run.weights(self.objectives) or ())
            groups.setdefault(number if kind is None else (run.method, kind), []).append(number)
        size = self.batch_size
        return [group[start : start + size] for group in groups.values() for start in range(0, len(group), size)]

    def _chunks(self, group: list[int]) -> list[range]:
        """The prompts of each batch of a group of runs. No batch has more pairs than its size."""
        count = max(1, self.batch_size // len(group))
        return [range(start, min(start + count, len(self.prompts))) for start in range(0, len(self.prompts), count)]

    def _pairs(self, group: list[int]) -> list[tuple[int, int]]:
        """The pairs of run and prompt of a group, in the order in which they are decoded."""
        return [(number, i) for chunk in self._chunks(group) for number in group for i in chunk]

    def _batches(
        self, records: Records, runs: Sequence[Run], group: list[int]
    ) -> Iterator[tuple[list[int], range, list[tuple[int, int]]]]:
        """Of a group of runs, for each batch: the group, the prompts, and the pairs of run and prompt that no row is
        of, and that this process is to do."""
        chunks, pairs = self._chunks(group), self._pairs(group)
        cells = {number: self._cells(runs[number]) for number in group}
        size = len(chunks[0]) * len(group)
        done = records.missing([cells[number][i] for number, i in pairs], row_cell, size)
        for chunk, (_, todo) in zip(chunks, done, strict=True):
            yield group, chunk, [pairs[i] for i in todo]

    def _cells(self, run: Run) -> list[tuple]:
        weights = run.weights(self.objectives)
        return [(run.method, weights, key) for key in self.keys]


def _repeated(values: Iterable[Any]) -> list[Any]:
    return [value for value, count in Counter(values).items() if count > 1]
