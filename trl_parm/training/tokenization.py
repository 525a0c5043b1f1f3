# SPDX-License-Identifier: Apache-2.0
"""From one data set of preference pairs, in any of TRL's formats, to token ids with a label for each objective."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, cast

from datasets import Dataset, Features, List, Value
from transformers import BatchEncoding, PreTrainedTokenizerBase
from transformers.utils import logging
from trl.data_utils import is_conversational

from .compat import common_prefix_length


logger = logging.get_logger(__name__)

COLUMNS = ("prompt_ids", "first_ids", "second_ids", "labels")
"""Columns of a tokenized pair: the prompt, the two responses, and +1, −1 or 0 for each objective."""
RANKED, LABELLED = ("chosen", "rejected"), ("response_0", "response_1")
FEATURES = Features({column: List(Value("int32")) for column in COLUMNS} | {"outcome": Value("string")})
OUTCOMES = {
    "cut": "lost the start of the prompt to fit into {max_length} tokens",
    "too long": "were left out, being longer than {max_length} tokens",
    "identical": "were left out, since both responses are the same",
    "unlabelled": "were left out, having no label for any objective",
}


class PairReader:
    """Turns one row of a data set into a tokenized pair.

    Two kinds of rows are known. *Ranked*: `chosen` and `rejected`, for the objective that the data set belongs to.
    *Labelled*: `response_0` and `response_1`, and for each objective a column that says which of them is better: 0 or
    1, −1 for a tie, `None` or NaN where the label is missing. Ties and missing labels add nothing to the loss.

    In both, `prompt` and responses are texts or lists of messages, or ids already (`prompt_ids`, and `_ids` after the
    names of the responses). A prompt inside `chosen` and `rejected` is found for messages only: in plain text the
    longest common beginning may end in the middle of a word.

    Args:
        name (`str`): Name of the data set, for messages.
        columns (`Sequence[str]`): Its columns.
        objectives (`Sequence[str]`): All objectives, in the order of the labels.
        label_columns (`Mapping[str, str]`): Objective → label column of a labelled data set.
        tokenizer (`PreTrainedTokenizerBase`): Plain text gets its end token appended; messages its chat template.

    Raises:
        ValueError: columns are missing.
    """

    def __init__(
        self,
        name: str,
        columns: Sequence[str],
        objectives: Sequence[str],
        label_columns: Mapping[str, str],
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self.name, self.objectives, self.tokenizer = name, list(objectives), tokenizer
        self.labelled = is_labelled(columns)
        self.responses = LABELLED if self.labelled else RANKED
        self.tokenized = f"{self.responses[0]}_ids" in columns
        self.label_columns = {o: c for o, c in label_columns.items() if c in columns} if self.labelled else {}
        self._check(columns, label_columns)

    @property
    def own_objectives(self) -> list[str]:
        """The objectives that this data set has labels for."""
        return list(self.label_columns) if self.labelled else [self.name]

    def __call__(self, row: dict[str, Any]) -> dict[str, list]:
        """Tokenizes a row. Raises `ValueError` for a label that is none, or a plain prompt that is not given."""
        return dict(zip(COLUMNS, (*self._ids(row), self._labels(row)), strict=True))

    def _check(self, columns: Sequence[str], label_columns: Mapping[str, str]) -> None:
        prompt = ["prompt_ids"] if self.tokenized else ["prompt"] if self.labelled else []
        wanted = [f"{r}_ids" if self.tokenized else r for r in self.responses] + prompt
        missing = [column for column in wanted if column not in columns]
        if missing:
            raise ValueError(
                f"The data set {self.name!r} lacks the columns {missing}; it has {sorted(columns)}. A preference data "
                "set needs `prompt`, `chosen` and `rejected`, or `prompt`, `response_0`, `response_1` and a column "
                "of labels for each objective."
            )
        if self.labelled and not self.label_columns:
            raise ValueError(
                f"The labelled data set {self.name!r} has no column with the labels of an objective; looked for "
                f"{sorted(label_columns.values())} in {sorted(columns)}. Name them, such as "
                "`label_columns={'helpful': 'better_response_id'}`."
            )
        if not self.labelled and self.name not in self.objectives:
            raise ValueError(
                f"The ranked data set {self.name!r} is not named by an objective; they are {self.objectives}."
            )

    def _labels(self, row: dict[str, Any]) -> list[int]:
        if not self.labelled:
            return [int(objective == self.name) for objective in self.objectives]
        return [self._label(row, self.label_columns.get(objective)) for objective in self.objectives]

    def _label(self, row: dict[str, Any], column: str | None) -> int:
        value = None if column is None else row[column]
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return 0
        if value not in (0, 1, -1):
            raise ValueError(
                f"A label in column {column!r} of the data set {self.name!r} is {value!r}, but it must be 0 or 1 (the "
                "better response), -1 (a tie) or None (missing)."
            )
        return {0: 1, 1: -1, -1: 0}[int(value)]

    def _ids(self, row: dict[str, Any]) -> tuple[list[int], list[int], list[int]]:
        first, second = self.responses
        if self.tokenized:
            return row["prompt_ids"], row[f"{first}_ids"], row[f"{second}_ids"]
        if "prompt" not in row:
            if not is_conversational(row):
                raise ValueError(
                    f"The data set {self.name!r} has plain texts without `prompt`. A prompt can be told from the "
                    "responses only in conversations; give a `prompt` column."
                )
            row = {**row, **self._split(row[first], row[second])}
        return tokenize_pair(row["prompt"], row[first], row[second], self.tokenizer, _template_kwargs(row))

    def _split(self, first: list[Any], second: list[Any]) -> dict[str, list]:
        """A conversation's prompt, which is the messages that both begin with, and the responses after it."""
        start = min(common_prefix_length(first, second), len(first) - 1, len(second) - 1)
        if start < 1:
            raise ValueError(
                f"Two conversations of the data set {self.name!r} don't begin with the same prompt and end in a "
                f"response each: {first} and {second}. Give a `prompt` column."
            )
        return dict(zip(("prompt", *self.responses), (first[:start], first[start:], second[start:]), strict=True))


class PairPreparer:
    """Tokenizes rows of one data set and makes them fit, see [`PairReader`] and [`fit`].

    Args:
        reader ([`PairReader`]): For the data set's format.
        max_length (`int`, *optional*): Most tokens of prompt and response together.
        cut_prompt (`bool`, *optional*, defaults to `False`): Cut the start of long prompts.
    """

    def __init__(self, reader: PairReader, max_length: int | None, cut_prompt: bool = False) -> None:
        self.reader, self.max_length, self.cut_prompt = reader, max_length, cut_prompt

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """The pair with its outcome: empty where nothing was done, a key of `OUTCOMES`, and no ids if left out."""
        pair = self.reader(row)
        fitted, outcome = fit(pair, self.max_length, self.cut_prompt)
        if not any(pair["labels"]):
            fitted, outcome = None, "unlabelled"
        return {**(fitted or {column: [] for column in COLUMNS}), "outcome": outcome or ""}

    def all(self, dataset: Dataset, num_proc: int | None = None) -> Dataset:
        """Prepares a whole data set. Raises `ValueError` if it is empty or nothing of it is left."""
        if len(dataset) == 0:
            raise ValueError(f"The data set {self.reader.name!r} is empty. Give it at least one pair.")
        prepared = dataset.map(
            self,
            remove_columns=dataset.column_names,
            features=FEATURES,
            num_proc=num_proc,
            desc=f"Tokenizing {self.reader.name}",
        )
        outcomes = prepared["outcome"][:]
        self.report(Counter(outcomes))
        kept = [i for i, outcome in enumerate(outcomes) if outcome in ("", "cut")]
        return prepared.select(kept).remove_columns("outcome")

    def report(self, outcomes: Counter[str]) -> None:
        """Says in one line what was left out or cut. Raises `ValueError` if nothing is left."""
        done = [
            f"{outcomes[name]} {text.format(max_length=self.max_length)}"
            for name, text in OUTCOMES.items()
            if outcomes[name]
        ]
        line = f"{self.reader.name}: of {sum(outcomes.values())} pairs {'; '.join(done)}."
        if not outcomes[""] + outcomes["cut"]:
            raise ValueError(f"No pair of the data set {self.reader.name!r} is left. {line}")
        if done:
            logger.warning(line)


def is_labelled(columns: Sequence[str]) -> bool:
    """Whether a data set with these columns has labels for each objective, rather than a chosen response."""
    return any(column.removesuffix("_ids") in LABELLED for column in columns)


def tokenize_pair(
    prompt: str | list,
    first: str | list,
    second: str | list,
    tokenizer: PreTrainedTokenizerBase,
    template_kwargs: dict,
) -> tuple[list[int], list[int], list[int]]:
    """Ids of the prompt and of both responses, each of which ends in the end token.

    The boundary is the longest prefix that the prompt shares with both texts: a tokenizer may merge the prompt's last
    token with the response's first.
    """
    if isinstance(prompt, list):
        ids = _template(tokenizer, prompt, add_generation_prompt=True, **template_kwargs)
        texts = [
            _template(tokenizer, prompt + cast(list, response), **template_kwargs) for response in (first, second)
        ]
    else:
        end = cast(str, tokenizer.eos_token)
        ids = tokenizer(prompt)["input_ids"]
        texts = [tokenizer(prompt + cast(str, r).removesuffix(end) + end)["input_ids"] for r in (first, second)]
    texts = [_end_at(text, cast(int | None, tokenizer.eos_token_id)) for text in texts]
    start = min(common_prefix_length(ids, text) for text in texts)
    return texts[0][:start], texts[0][start:], texts[1][start:]


def fit(pair: dict[str, list], max_length: int | None, cut_prompt: bool) -> tuple[dict[str, list] | None, str | None]:
    """Makes a pair fit, the same way for both responses, since a cut response would win by its length.

    Args:
        pair (`dict`): A tokenized pair.
        max_length (`int`, *optional*): Most tokens of prompt and response together.
        cut_prompt (`bool`): Cut the start of the prompt, instead of leaving the pair out.

    Returns:
        `tuple` of the pair, or `None` if it is left out, and what was done: `None`, `"cut"`, `"too long"` or
        `"identical"` (both responses are the same, so that there is nothing to learn).
    """
    if pair["first_ids"] == pair["second_ids"]:
        return None, "identical"
    longest = max(len(pair["first_ids"]), len(pair["second_ids"]))
    if max_length is None or len(pair["prompt_ids"]) + longest <= max_length:
        return pair, None
    room = max_length - longest
    if not cut_prompt or room < 1:
        return None, "too long"
    return {**pair, "prompt_ids": pair["prompt_ids"][-room:]}, "cut"


def _template_kwargs(row: Mapping[str, Any]) -> dict:
    kwargs = dict(row.get("chat_template_kwargs") or {})
    tools = row.get("tools")
    return {**kwargs, "tools": json.loads(tools) if isinstance(tools, str) else tools} if tools else kwargs


def _end_at(ids: list[int], end: int | None) -> list[int]:
    """Drops what a chat template writes after the last end token, which `generate` would never produce."""
    return ids[: len(ids) - ids[::-1].index(end)] if end in ids else ids


def _template(tokenizer: PreTrainedTokenizerBase, messages: list[dict], **kwargs: Any) -> list[int]:
    encoded = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **kwargs)
    return cast(BatchEncoding, encoded)["input_ids"]
