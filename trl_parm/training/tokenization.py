# SPDX-License-Identifier: Apache-2.0
"""From one data set of preference pairs, in any of TRL's formats, to token ids with a label for each objective."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, cast

from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging
from trl.data_utils import _tokenize, common_prefix_length, is_conversational


logger = logging.get_logger(__name__)

COLUMNS = ("prompt_ids", "first_ids", "second_ids", "labels")
"""Columns of a tokenized pair: the prompt, the two responses, and +1, −1 or 0 for each objective."""
RANKED, LABELLED = ("chosen", "rejected"), ("response_0", "response_1")
FEATURES = Features({column: List(Value("int32")) for column in COLUMNS} | {"outcome": Value("string")})
KEPT = ("", "cut")
"""Outcomes of pairs that stay."""
OUTCOMES = {
    "cut": "lost the start of the prompt to fit into {max_length} tokens",
    "too long": "were left out, being longer than {max_length} tokens",
    "identical": "were left out, since both responses are the same",
    "unlabelled": "were left out, having no label for any objective",
}


class PairReader:
    """Turns the rows of one data set into tokenized pairs.

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
        max_length (`int`, *optional*): Most tokens of prompt and response together; longer pairs are left out.
        cut_prompt (`bool`, *optional*, defaults to `False`): Cut the start of their prompts instead.

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
        max_length: int | None = None,
        cut_prompt: bool = False,
    ) -> None:
        self.name, self.objectives, self.tokenizer = name, list(objectives), tokenizer
        self.max_length, self.cut_prompt = max_length, cut_prompt
        self.labelled = is_labelled(columns)
        self.responses = LABELLED if self.labelled else RANKED
        self.tokenized = f"{self.responses[0]}_ids" in columns
        self.label_columns = {o: c for o, c in label_columns.items() if c in columns}
        wanted = [f"{column}_ids" if self.tokenized else column for column in ("prompt", *self.responses)]
        # The prompt of a conversation may stand in its responses.
        missing = [c for c in wanted if c not in columns and (c != "prompt" or self.labelled)]
        if missing:
            raise ValueError(
                f"The data set {name!r} lacks the columns {missing}; it has {sorted(columns)}. A preference data set "
                "needs `prompt`, `chosen` and `rejected`, or `prompt`, `response_0`, `response_1` and a column of "
                "labels for each objective."
            )
        if self.labelled and not self.label_columns:
            raise ValueError(
                f"The labelled data set {name!r} has no column with the labels of an objective; looked for "
                f"{sorted(label_columns.values())} in {sorted(columns)}. Name them, such as "
                "`label_columns={'helpful': 'better_response_id'}`."
            )

    @property
    def own_objectives(self) -> list[str]:
        """The objectives that this data set has labels for."""
        return list(self.label_columns) if self.labelled else [self.name]

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The pair of a row, with its outcome: empty, or a key of `OUTCOMES`. One that is left out has no ids.

        Both responses are treated alike: a cut one would win by its length.

        Raises:
            ValueError: a label that is none, or a prompt that is not given.
        """
        prompt, first, second = self._ids(row)
        labels = [self._label(row, objective) for objective in self.objectives]
        longest = max(len(first), len(second))
        outcome = ""
        if not any(labels):
            outcome = "unlabelled"
        elif first == second:
            outcome = "identical"
        elif self.max_length is not None and len(prompt) + longest > self.max_length:
            outcome = "cut" if self.cut_prompt and longest < self.max_length else "too long"
        if outcome == "cut":
            prompt = prompt[longest - cast(int, self.max_length) :]
        columns = (prompt, first, second, labels) if outcome in KEPT else ([], [], [], [])
        return {**dict(zip(COLUMNS, columns, strict=True)), "outcome": outcome}

    def read(self, dataset: Dataset, num_proc: int | None = None) -> Dataset:
        """The pairs of a whole data set that are not left out. Raises `ValueError` if there is none."""
        if len(dataset) == 0:
            self.report(Counter())  # which refuses it; there would be no column of outcomes
        pairs = dataset.map(
            self,
            remove_columns=dataset.column_names,
            features=FEATURES,
            num_proc=num_proc,
            desc=f"Tokenizing {self.name}",
        )
        outcomes = pairs["outcome"][:]
        self.report(Counter(outcomes))
        return pairs.select([i for i, o in enumerate(outcomes) if o in KEPT]).remove_columns("outcome")

    def report(self, outcomes: Counter[str]) -> None:
        """Says in one line what was left out or cut. Raises `ValueError` if there was nothing, or nothing is left."""
        if not outcomes:
            raise ValueError(f"The data set {self.name!r} is empty. Give it at least one pair.")
        done = [
            f"{outcomes[name]} {text.format(max_length=self.max_length)}"
            for name, text in OUTCOMES.items()
            if outcomes[name]
        ]
        line = f"{self.name}: of {sum(outcomes.values())} pairs {'; '.join(done)}."
        if not any(outcomes[name] for name in KEPT):
            raise ValueError(f"No pair of the data set {self.name!r} is left. {line}")
        if done:
            logger.warning(line)

    def _label(self, row: Mapping[str, Any], objective: str) -> int:
        if not self.labelled:
            return int(objective == self.name)
        column = self.label_columns.get(objective)
        value = None if column is None else row[column]
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return 0
        if value not in (0, 1, -1):
            raise ValueError(
                f"A label in column {column!r} of the data set {self.name!r} is {value!r}, but it must be 0 or 1 (the "
                "better response), -1 (a tie) or None (missing)."
            )
        return {0: 1, 1: -1, -1: 0}[int(value)]

    def _ids(self, row: Mapping[str, Any]) -> tuple[list[int], list[int], list[int]]:
        """Ids of the prompt and of both responses, each of which ends in the end token.

        The boundary is the longest prefix that the prompt shares with both texts: a tokenizer may merge the prompt's
        last token with the response's first.
        """
        first, second = (row[f"{name}_ids" if self.tokenized else name] for name in self.responses)
        if self.tokenized:
            return row["prompt_ids"], first, second
        if "prompt" in row:
            prompt = row["prompt"]
        else:
            prompt, first, second = self._split(row, first, second)
        tools, kwargs = row.get("tools"), dict(row.get("chat_template_kwargs") or {})
        if tools:
            kwargs["tools"] = json.loads(tools) if isinstance(tools, str) else tools
        end, end_id = cast(str, self.tokenizer.eos_token), cast(int, self.tokenizer.eos_token_id)
        texts = []
        for response in (first, second):
            text = prompt + (response if isinstance(prompt, list) else response.removesuffix(end) + end)
            ids = _tokenize(self.tokenizer, text, **kwargs)["input_ids"]
            # What a chat template writes after the last end token, `generate` would never produce.
            texts.append(ids[: len(ids) - ids[::-1].index(end_id)] if end_id in ids else ids)
        ids = _tokenize(self.tokenizer, prompt, add_generation_prompt=True, **kwargs)["input_ids"]
        start = min(common_prefix_length(ids, text) for text in texts)
        return texts[0][:start], texts[0][start:], texts[1][start:]

    def _split(self, row: Mapping[str, Any], first: list[Any], second: list[Any]) -> tuple[list, list, list]:
        """A conversation's prompt, which is the messages that both begin with, and the responses after it."""
        if not is_conversational(cast(dict, row)):
            raise ValueError(
                f"The data set {self.name!r} has plain texts without `prompt`. A prompt can be told from the "
                "responses only in conversations; give a `prompt` column."
            )
        start = min(common_prefix_length(first, second), len(first) - 1, len(second) - 1)
        if start < 1:
            raise ValueError(
                f"Two conversations of the data set {self.name!r} don't begin with the same prompt and end in a "
                f"response each: {first} and {second}. Give a `prompt` column."
            )
        return first[:start], first[start:], second[start:]


def is_labelled(columns: Sequence[str]) -> bool:
    """Whether a data set with these columns has labels for each objective, rather than a chosen response."""
    return any(column.removesuffix("_ids") in LABELLED for column in columns)
