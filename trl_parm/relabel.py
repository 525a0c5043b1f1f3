# SPDX-License-Identifier: Apache-2.0
"""From pairs of responses and reward models to the labelled data set that [`PreferenceARMTrainer`] takes."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from datasets import Dataset, DatasetDict
from transformers.utils import logging

from peft_pblora.output import check_output, file_name, output_file, remove_output
from peft_pblora.preference import check_columns, check_objectives

from .endpoint import Failure
from .processes import ALONE, Processes
from .records import Records
from .reward_models import RewardSource, reward_configuration
from .rewards import UNJUDGED, Reward, is_unjudged, score
from .shapes import CONTEXT, REPEATED, read_pair
from .texts import as_text, fill, prompt_key


logger = logging.get_logger(__name__)

WRITER = "relabel"
RESPONSES = ("response_0", "response_1")
SCORES = "scores.jsonl"
"""The file with all scores so far, from which a run that was killed goes on."""


def relabel(
    pairs: Dataset,
    rewards: Mapping[str, RewardSource | Reward],
    folder: str | Path,
    test_size: float = 0.1,
    validation_size: float = 0,
    tie_margin: float = 0.0,
    template: str | None = None,
    ranked: bool = False,
    seed: int = 0,
    batch_size: int = 32,
    restart: bool = False,
    on_start: Callable[[str], Any] = lambda objective: None,
    on_batch: Callable[[int], Any] = lambda pairs: None,
    processes: Processes = ALONE,
) -> DatasetDict:
    """Scores both responses of every pair with every reward model, and labels the better one (PARM, its `relabel.py`).

    The label of an objective is 0 or 1, the response with the higher reward, or −1 where the rewards are equal or
    differ by no more than the margin, or where a judge failed on one of them, whose score then is `None`. Reward
    models are loaded one after the other. The folder gets `scores.jsonl`, from which a run that was killed goes on,
    and which asks again where a judge failed, and in the end `train.jsonl`, `validation.jsonl` and `test.jsonl`, as
    far as they are not empty. Pairs of one prompt come into one split. Splits and ranked pairs of an earlier run that
    are not replaced are removed: their pairs may be in other splits now.

    Args:
        pairs (`Dataset`): `prompt`, `response_0` and `response_1`, as in PKU-SafeRLHF, or `prompt`, `chosen` and
            `rejected`, as in TRL: texts or messages, see [`trl_parm.shapes.read_pair`]. Messages may have their
            prompt in both responses. `tools` and `chat_template_kwargs` are handed on.
        rewards (`Mapping`): Objective → [`RewardSource`], or a function of prompts and responses; higher is better.
        folder (`str` or `Path`): Where to write.
        test_size, validation_size (`float`, *optional*): Pairs in these splits: a share below 1, or a number.
        tie_margin (`float`, *optional*, defaults to 0.0): How much rewards of a tie may differ, 0 or larger.
        template (`str`, *optional*): A text with `{prompt}` in it, for models without chat template: what training
            reads as the prompt. The prompt itself then is the column `raw_prompt`, for rewards and evaluation.
        ranked (`bool`, *optional*, defaults to `False`): Also write the training pairs of each objective as
            `ranked/<objective>.jsonl` (see [`peft_pblora.output.file_name`]), with `prompt`, `chosen` and `rejected`
            and without ties, as trainers of policies such as TRL's DPO take them.
        seed (`int`, *optional*, defaults to 0): Of the split.
        batch_size (`int`, *optional*, defaults to 32): Pairs that are scored and written at once.
        restart (`bool`, *optional*, defaults to `False`): Remove scores of other pairs, or of rewards that have
            changed, instead of refusing to go on.
        on_start (`Callable`, *optional*): Called with an objective before its reward model is loaded.
        on_batch (`Callable`, *optional*): Called with the number of pairs done, for progress bars.
        processes ([`Processes`], *optional*): Those that share the batches, each of which calls this with the same
            arguments and one folder. All get the splits, which the first one writes.

    Returns:
        `DatasetDict` with the splits; columns `prompt`, `response_0`, `response_1`, one of labels named like each
        objective, and its raw rewards `<objective>_score_0` and `<objective>_score_1`.

    Raises:
        ValueError: no pairs, missing columns, an objective that is called like a column, splits that are too large, a
            reward that is not finite, scores of another configuration, or a file in the place of a split, be it empty
            now, or of ranked pairs that was not written here.
    """
    told: Counter[str] = Counter()
    rows = [as_pair(cast(dict, row), number, told) for number, row in enumerate(pairs)]
    for repeats, count in told.items():
        logger.warning(f"Of {len(rows)} pairs {count} {REPEATED[repeats]}.")
    if not rows or not rewards:
        raise ValueError("There are no pairs, or no rewards. Give at least one of each.")
    check_columns(check_objectives(rewards), ("prompt", "raw_prompt", *RESPONSES), ("{}", "{}_score_0", "{}_score_1"))
    if tie_margin < 0:
        raise ValueError(f"`tie_margin` is {tie_margin}, but it must be 0 or larger.")
    written = [_as_text(row, template) if template is not None else row for row in rows]  # before anything is scored
    numbers = _split(rows, {"validation": validation_size, "test": test_size}, seed)
    folder = Path(folder)
    files = {name: folder / f"{name}.jsonl" for name, chosen in numbers.items() if chosen}
    ranked_files = {name: folder / "ranked" / f"{file_name(name)}.jsonl" for name in rewards if ranked}
    written_here = {*files.values(), *ranked_files.values()}
    splits_here = {folder / f"{name}.jsonl" for name in numbers}
    for path in sorted(written_here | splits_here):
        check_output(path, WRITER)  # before anything is scored
    configuration = {
        "pairs": hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16],
        "rewards": {name: reward_configuration(source) for name, source in rewards.items()},
    }
    processes.agree({"batch_size": batch_size})
    cells = {objective: [(objective, number) for number in range(len(rows))] for objective in rewards}
    growing = {"rewards": "objective"}
    with Records(folder / SCORES, configuration, growing, restart, _scored_cell, processes, _judged) as records:
        for objective, source in rewards.items():
            on_start(objective)
            # A copy, whose model is gone when the next one is loaded; it is not loaded if nothing is missing.
            reward = replace(source) if isinstance(source, RewardSource) else source
            for size, todo in records.missing(cells[objective], _cell, batch_size):
                if todo:
                    records.append(_scored(objective, reward, rows, todo))
                on_batch(size)
        records.gather([cell for of_objective in cells.values() for cell in of_objective], _cell)
        scores = {_cell(row): row["scores"] for row in records.rows}
    for number, row in enumerate(written):
        for objective in rewards:
            first, second = scores[objective, number]
            label = _label(first, second, tie_margin)
            row |= {objective: label, f"{objective}_score_0": first, f"{objective}_score_1": second}
    splits = {name: [written[i] for i in numbers[name]] for name in files}
    if processes.is_first:
        # First, since their pairs may be in other splits now.
        for path in sorted({*splits_here, *(folder / "ranked").glob("*.jsonl")} - written_here):
            remove_output(path, WRITER)
        for name, path in files.items():
            _write(path, splits[name])
        for objective, path in ranked_files.items():
            _write(path, as_ranked(splits["train"], objective))
    return DatasetDict({name: Dataset.from_list(chosen, on_mixed_types="use_json") for name, chosen in splits.items()})


def as_pair(row: Mapping[str, Any], number: int = 0, told: Counter[str] | None = None) -> dict[str, Any]:
    """A row in one of the known formats as `prompt`, `response_0` and `response_1`, with what goes to a chat template.

    `told` counts the pairs whose responses repeat the prompt, by the keys of [`trl_parm.shapes.REPEATED`].

    Raises:
        ValueError: as [`read_pair`], or a response that has no plain text for rewards to judge: it calls tools.
    """
    where = f"row {number} of the pairs"
    names = RESPONSES if RESPONSES[0] in row else ("chosen", "rejected")
    missing = [name for name in names if name not in row]
    if missing:
        raise ValueError(
            f"A pair lacks {', '.join(missing)}; it has {', '.join(row)}. Pairs need `prompt`, `response_0` and "
            "`response_1`, or `prompt`, `chosen` and `rejected`."
        )
    prompt, *responses, repeats = read_pair(row, names, where)
    for name, response in zip(names, responses):
        if not isinstance(response, str) and any(message.get("tool_calls") for message in response):
            raise ValueError(
                f"`{name}` of {where} calls tools, and rewards judge plain text. Leave such rows out, or give the "
                "calls as text."
            )
    context = {name: row[name] for name in CONTEXT if row.get(name) is not None}
    if repeats and told is not None:
        told[repeats] += 1
    return {**dict(zip(("prompt", *RESPONSES), (prompt, *responses))), **context}


def as_ranked(rows: Iterable[Mapping[str, Any]], objective: str) -> list[dict[str, Any]]:
    """Labelled rows as `prompt`, `chosen` and `rejected` of one objective; ties are left out."""
    return [
        {"prompt": row["prompt"], "chosen": row[RESPONSES[label]], "rejected": row[RESPONSES[1 - label]]}
        | {name: row[name] for name in CONTEXT if name in row}
        for row in rows
        if (label := row[objective]) >= 0
    ]


def agreement(data: Iterable[Mapping[str, Any]], objectives: Sequence[str]) -> list[dict[str, Any]]:
    """How the labels of objectives go together.

    Returns:
        `list[dict]`: For each objective `pairs`, `ties`, `unjudged`, the pairs on which a judge failed, and the share
        of pairs with both labels that each objective labels alike (1 with itself).
    """
    pairs, rows = list(data), []
    labels = np.array([[row[name] for name in objectives] for row in pairs])
    for name, own in zip(objectives, labels.T):
        unjudged = sum(None in (row[f"{name}_score_0"], row[f"{name}_score_1"]) for row in pairs)
        ties = int((own < 0).sum()) - unjudged
        found: dict[str, Any] = {"objective": name, "pairs": len(pairs), "ties": ties, "unjudged": unjudged}
        for other, others in zip(objectives, labels.T):
            both = (own >= 0) & (others >= 0)
            found[f"as {other}"] = float((own == others)[both].mean()) if both.any() else float("nan")
        rows.append(found)
    return rows


def _as_text(row: Mapping[str, Any], template: str) -> dict[str, Any]:
    """A pair of plain texts, with the prompt in its template, and as it was. Raises `ValueError` as [`fill`] does."""
    texts = {name: fill("{response}", response=row[name]) for name in RESPONSES}
    return {"prompt": fill(template, prompt=row["prompt"]), **texts, "raw_prompt": row["prompt"]}


def _cell(row: Mapping[str, Any]) -> tuple[str, int]:
    return row["objective"], row["row"]


def _scored_cell(row: Mapping[str, Any]) -> tuple[str, int]:
    """The cell of a row of a file, which must have its scores."""
    first, second = row["scores"]
    failed = is_unjudged({**row, row["objective"]: None}, row["objective"])
    if not all((failed and one is None) or math.isfinite(one) for one in (first, second)):
        raise TypeError("a score is not finite")
    return _cell(row)


def _judged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of scores without those on which a judge failed."""
    return [row for row in rows if UNJUDGED not in row]


def _scored(objective: str, reward: Reward, rows: list[dict[str, Any]], numbers: list[int]) -> list[dict[str, Any]]:
    """Rows of scores for the pairs of these numbers."""
    asked = [(number, name) for number in numbers for name in RESPONSES]
    prompts = [rows[number]["prompt"] for number, _ in asked]
    responses = [as_text(rows[number][name]) for number, name in asked]
    values = score(objective, reward, prompts, responses, [number for number, _ in asked], may_fail=True)
    pairs = zip(numbers, values[::2], values[1::2], strict=True)
    return [_score_row(objective, number, pair) for number, *pair in pairs]


def _score_row(objective: str, number: int, pair: list[Any]) -> dict[str, Any]:
    """A row of scores; where a judge failed there is none, and the row says why."""
    failed = next((one.reason for one in pair if isinstance(one, Failure)), None)
    scores = [None if isinstance(one, Failure) else one for one in pair]
    return {"objective": objective, "row": number, "scores": scores} | (
        {UNJUDGED: {objective: failed}} if failed is not None else {}
    )


def _label(first: float | None, second: float | None, tie_margin: float) -> int:
    """Which of two scores is higher; −1 for neither, also where a judge failed."""
    if first is None or second is None or abs(first - second) <= tie_margin:
        return -1
    return int(second > first)


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with output_file(path, WRITER) as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _split(rows: list[dict[str, Any]], sizes: Mapping[str, float], seed: int) -> dict[str, list[int]]:
    """Numbers of the rows of each split, prompts in random order, all rows of a prompt together."""
    by_prompt: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        by_prompt.setdefault(prompt_key(row["prompt"]), []).append(number)
    prompts = list(by_prompt)
    order = [by_prompt[prompts[i]] for i in np.random.default_rng(seed).permutation(len(prompts))]
    wanted = {name: round(size * len(rows)) if size < 1 else int(size) for name, size in sizes.items()}
    if min(wanted.values()) < 0 or sum(wanted.values()) >= len(rows):
        raise ValueError(
            f"`test_size` and `validation_size` ask for {sum(wanted.values())} of {len(rows)} pairs, which leaves "
            "none to train on. Give shares below 1, or smaller numbers."
        )
    numbers: dict[str, list[int]] = {name: [] for name in ("train", *wanted)}
    for group in order:
        name = next((name for name, size in wanted.items() if len(numbers[name]) < size), "train")
        numbers[name] += group
    if not numbers["train"]:
        raise ValueError(
            f"The {len(rows)} pairs have {len(prompts)} prompts, and those of one prompt stay together, so that the "
            f"splits {[name for name, size in wanted.items() if size]} leave none to train on. Set `test_size` and "
            "`validation_size` to 0, or give pairs of more prompts."
        )
    return {name: sorted(found) for name, found in numbers.items()}
