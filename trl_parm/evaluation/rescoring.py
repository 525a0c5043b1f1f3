# SPDX-License-Identifier: Apache-2.0
"""Other rewards for responses that are there already, without decoding them again."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset

from peft_pblora.preference import check_columns, check_objectives
from trl_parm.identity import short_hash
from trl_parm.records import Records, check_cells, read_configuration, read_rows
from trl_parm.reward_models import reward_configuration
from trl_parm.rewards import UNJUDGED, Reward, is_unjudged, score, with_failures

from .answers import with_all_columns
from .fronts import MEASURED, OF_OBJECTIVE, SUMMARY, row_cell


BEFORE = ("method", "preference", "label", "prompt", "response")
"""The columns before the rewards."""
DECODED = ("tokens", "seconds", "seed", "extra_parameters", "extra_bytes")
"""The columns after them."""
COLUMNS = (*BEFORE, *DECODED, *MEASURED, UNJUDGED)
"""Columns of a table of results beside the rewards."""

logger = logging.getLogger(__name__)


def rescore(
    results: str | Path,
    rewards: Mapping[str, Reward],
    output: str | Path,
    batch_size: int = 16,
    restart: bool = False,
    on_batch: Callable[[int], Any] = lambda rows: None,
) -> Dataset:
    """Scores the responses of a results file, and writes the rows with these rewards to another one.

    The rows are those of an evaluation with these rewards from the start. Rewards that are not named keep their
    numbers. Preferences weigh the objectives of the evaluation; of a further reward, that was none, there is a column
    more. The new file's configuration is that of the old one, with what the new rewards depend on, and `rescored`:
    which rewards, and a hash of the rows that were read.

    Args:
        results (`str` or `Path`): What `sweep`, `evaluate` or `trl-parm generate --output` has written. It is only
            read.
        rewards (`Mapping[str, Reward]`): Name → reward, higher is better; objectives of the file, or others.
        output (`str` or `Path`): A JSONL file for the rows, from which a run that was killed goes on, and which asks
            again where a judge failed.
        batch_size (`int`, *optional*, defaults to 16): Responses that are scored and written at once.
        restart (`bool`, *optional*, defaults to `False`): Remove the rows of another configuration from `output`,
            instead of refusing to go on.
        on_batch (`Callable`, *optional*): Called with the number of rows done, for progress bars.

    Returns:
        `datasets.Dataset` as of [`sweep`], in the order of the file.

    Raises:
        ValueError: no results, rows that are none or twice there, no rewards, one that is called like another column
            or returns something else than finite numbers, or an output that is `results` itself or of another
            configuration.
    """
    results, output = Path(results), Path(output)
    if output.resolve() == results.resolve():
        raise ValueError(f"`output` is {output}, which is what is read. Name another file.")
    if not rewards:
        raise ValueError("There are no rewards. Give at least one.")
    rows, known = read_rows(results), read_configuration(results)
    cells = check_cells(rows, row_cell, results)
    names = check_objectives(dict.fromkeys([*known["objectives"], *(known.get("rewards") or {}), *rewards]))
    check_columns(names, COLUMNS)
    check_columns(names, SUMMARY, OF_OBJECTIVE)
    answers = [[cell, row["response"]] for cell, row in zip(cells, rows)]
    configuration = {
        **known,
        "rewards": {**(known.get("rewards") or {}), **{name: reward_configuration(r) for name, r in rewards.items()}},
        "rescored": {"rewards": list(rewards), "rows": short_hash(json.dumps(answers).encode())},
    }
    renew = partial(ask_again, names=names, rewards=rewards)
    with Records(output, configuration, {}, restart, row_cell, renew=renew) as records:
        for size, todo in records.missing(cells, row_cell, batch_size):
            if todo:
                records.append(_scored([rows[i] for i in todo], names, rewards))
            on_batch(size)
        done = {row_cell(row): row for row in records.rows}
    return Dataset.from_list(with_all_columns(done[cell] for cell in cells), on_mixed_types="use_json")


def ask_again(rows: list[dict[str, Any]], names: list[str], rewards: Mapping[str, Reward]) -> list[dict[str, Any]]:
    """The rows, with new numbers of the rewards that failed on them. `names` are all columns of rewards, in order."""
    rows = list(rows)
    for name, reward in rewards.items():
        failed = [number for number, row in enumerate(rows) if is_unjudged(row, name)]
        if failed:
            logger.warning("The judge of %r failed on %d responses. It is asked again.", name, len(failed))
            for number, row in zip(failed, _scored([rows[i] for i in failed], names, {name: reward}), strict=True):
                rows[number] = row
    return rows


def _scored(rows: list[dict[str, Any]], names: list[str], rewards: Mapping[str, Reward]) -> list[dict[str, Any]]:
    """The rows with new rewards, their columns in the order of an evaluation."""
    prompts, responses = [row["prompt"] for row in rows], [row["response"] for row in rows]
    new = {name: score(name, reward, prompts, responses, may_fail=True) for name, reward in rewards.items()}
    found = []
    for i, row in enumerate(rows):
        values, failed = with_failures(new, i)
        before = {name: why for name, why in (row.get(UNJUDGED) or {}).items() if name not in rewards}
        reasons = before | failed.get(UNJUDGED, {})
        found.append({**row, **values, UNJUDGED: reasons})
    columns = (*BEFORE, *names, *DECODED, *MEASURED, UNJUDGED)
    return [{name: row[name] for name in columns if row.get(name, 0) != {} and name in row} for row in found]
