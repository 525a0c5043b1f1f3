# SPDX-License-Identifier: Apache-2.0
"""From one data set of preference pairs, in any of TRL's formats, to token ids with a label for each objective."""

from __future__ import annotations

import inspect
import math
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import tokenizers
import transformers
import trl
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging
from trl.data_utils import common_prefix_length

from trl_parm import shapes, templates, texts
from trl_parm.identity import short_hash
from trl_parm.shapes import REPEATED, read_context, read_pair
from trl_parm.templates import tokenize_chat, without_end


logger = logging.get_logger(__name__)

COLUMNS = ("prompt_ids", "first_ids", "second_ids", "labels")
"""Columns of a tokenized pair: the prompt, the two responses, and +1, −1 or 0 for each objective."""
WEIGHT, OUTCOMES = "weight", "outcomes"
LEAST_WEIGHT, MOST_WEIGHT = 2.0**-126, 1e30
"""Between these float32 has all digits of a weight, and of what a step adds up."""
"""Further columns: what the pair counts for in the loss, where that was asked for, and what became of it."""
RANKED, LABELLED = ("chosen", "rejected"), ("response_0", "response_1")
KEPT = {
    "cut": "lost the start of the prompt to fit into {max_length} tokens",
    **REPEATED,
    "merged": "lost the end of the prompt, which the tokenizer or its template writes otherwise before a response",
    "endless": "have a response without end token, so that its end is not learned; `append_end_token=True` appends it",
}
"""What is said of pairs that stay."""
LEFT_OUT = {
    "too long": "were left out, being longer than {max_length} tokens",
    "identical": "were left out, since both responses are the same",
    "unlabelled": "were left out, having no label for any objective",
}
"""What is said of pairs that don't."""


class PairReader:
    """Turns the rows of one data set into tokenized pairs.

    Two kinds of rows are known. *Ranked*: `chosen` and `rejected`, for the objective that the data set belongs to.
    *Labelled*: `response_0` and `response_1`, and for each objective a column that says which of them is better: 0 or
    1, −1 for a tie, `None` or NaN where the label is missing. Ties and missing labels add nothing to the loss.

    In both, `prompt` and responses are texts or lists of messages, see [`trl_parm.shapes.read_pair`], or ids already
    (`prompt_ids`, and `_ids` after the names of the responses). A prompt inside the responses is found for messages
    only: in plain text the longest common beginning may end in the middle of a word.

    Args:
        name (`str`): Name of the data set, for messages.
        columns (`Sequence[str]`): Its columns, of a stream those that are known; later rows may have more.
        objectives (`Sequence[str]`): All objectives, in the order of the labels.
        label_columns (`Mapping[str, str]`): Objective → label column of a labelled data set.
        tokenizer (`PreTrainedTokenizerBase`): Plain text gets its end token appended; messages its chat template.
        max_length (`int`, *optional*): Most tokens of prompt and response together; longer pairs are left out.
        cut_prompt (`bool`, *optional*, defaults to `False`): Cut the start of their prompts instead.
        append_end_token (`bool`, *optional*, defaults to `False`): To responses that have none.
        weight_column (`str`, *optional*): The column of what a pair counts for.
        vocabulary (`int`, *optional*): How many tokens the model has embeddings for.

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
        append_end_token: bool = False,
        weight_column: str | None = None,
        vocabulary: int | None = None,
    ) -> None:
        self.name, self.objectives, self.tokenizer = name, list(objectives), tokenizer
        self.max_length, self.cut_prompt, self.append_end_token = max_length, cut_prompt, append_end_token
        self.weight_column, self.vocabulary = weight_column, vocabulary
        self.special = frozenset(tokenizer.all_special_ids)
        self.read_by = _code()  # `datasets` keeps pairs by what is pickled here, which names the class alone
        self.labelled = is_labelled(columns)
        self.responses = LABELLED if self.labelled else RANKED
        self.tokenized = f"{self.responses[0]}_ids" in columns
        self.label_columns = dict(label_columns)
        self.own_objectives = [o for o, c in label_columns.items() if c in columns] if self.labelled else [name]
        # The prompt of a conversation may stand in its responses.
        wanted = [f"{c}_ids" for c in ("prompt", *self.responses)] if self.tokenized else [*self.responses]
        missing = [column for column in wanted if column not in columns]
        if missing:
            raise ValueError(
                f"The data set {name!r} lacks the columns {missing}; it has {sorted(columns)}. A preference data set "
                "needs `prompt`, `chosen` and `rejected`, or `prompt`, `response_0`, `response_1` and a column of "
                "labels for each objective."
            )
        if not self.own_objectives:
            raise ValueError(
                f"The labelled data set {name!r} has no column with the labels of an objective; looked for "
                f"{sorted(label_columns.values())} in {sorted(columns)}. Name them, such as "
                "`label_columns={'helpful': 'better_response_id'}`."
            )
        if weight_column is not None and weight_column not in columns:
            raise ValueError(
                f"The data set {name!r} lacks the `weight_column` {weight_column!r}; it has {sorted(columns)}. Give "
                "every data set one, of ones where all pairs count alike."
            )

    @property
    def features(self) -> Features:
        """Columns of a pair."""
        found: dict[str, Any] = {column: List(Value("int32")) for column in COLUMNS}
        found[OUTCOMES] = List(Value("string"))
        return Features(found | ({WEIGHT: Value("float32")} if self.weight_column else {}))

    def __call__(self, row: Mapping[str, Any], number: int = 0) -> dict[str, Any]:
        """The pair of a row, with its outcomes, keys of `KEPT` and `LEFT_OUT`. One that is left out has no ids.

        Both responses are treated alike: a cut one would win by its length. `number` is the row's, for messages.

        Raises:
            ValueError: a label that is none, a prompt that is not given, a part that is no text, an id that the model
                has no embedding for, a weight that is not 0 or larger.
        """
        where = f"row {number} of the data set {self.name!r}"
        prompt, first, second, outcomes = self._ids(row, where)
        labels = [self._label(row, objective, where) for objective in self.objectives]
        longest = max(len(first), len(second))
        if not any(labels):
            outcomes = ["unlabelled"]
        elif first == second:
            outcomes = ["identical"]
        elif self.max_length is not None and len(prompt) + longest > self.max_length:
            if self.cut_prompt and longest < self.max_length:
                prompt = prompt[longest - self.max_length :]
                outcomes.append("cut")
            else:
                outcomes = ["too long"]
        columns = (prompt, first, second, labels) if is_kept(outcomes) else ([], [], [], [])
        pair = {**dict(zip(COLUMNS, columns, strict=True)), OUTCOMES: outcomes}
        return {**pair, WEIGHT: self._weight(row, where)} if self.weight_column else pair

    def read(self, rows: Dataset | Iterable[Mapping[str, Any]], num_proc: int | None = None) -> Dataset:
        """The pairs of a whole data set, or of the rows of a stream, that are not left out.

        Raises `ValueError` if there is none.
        """
        if not isinstance(rows, Dataset):
            pairs = Dataset.from_list([self(row, number) for number, row in enumerate(rows)], features=self.features)
        elif len(rows) == 0:
            self.report(Counter())  # which refuses it; there would be no column of outcomes
        else:
            pairs = rows.map(
                self,
                with_indices=True,
                remove_columns=rows.column_names,
                features=self.features,
                num_proc=num_proc,
                desc=f"Tokenizing {self.name}",
            )
        outcomes = pairs[OUTCOMES][:]
        kept = pairs.select([i for i, found in enumerate(outcomes) if is_kept(found)]).remove_columns(OUTCOMES)
        self.report(Counter(map(tuple, outcomes)))
        if self.weight_column:
            self.check_weights(sum(kept[WEIGHT][:]))
        return kept

    def report(self, outcomes: Counter[tuple[str, ...]]) -> None:
        """Says in one line what was left out or done to pairs, from how many had which outcomes.

        Raises `ValueError` if there are none, or none left.
        """
        if not outcomes:
            raise ValueError(f"The data set {self.name!r} is empty. Give it at least one pair.")
        counts: Counter[str] = Counter()
        for of_pair, number in outcomes.items():
            counts.update(dict.fromkeys(of_pair, number))
        done = [
            f"{counts[name]} {text.format(max_length=self.max_length)}"
            for name, text in {**KEPT, **LEFT_OUT}.items()
            if counts[name]
        ]
        line = f"{self.name}: of {outcomes.total()} pairs {'; '.join(done)}."
        if not any(map(is_kept, outcomes)):
            raise ValueError(f"No pair of the data set {self.name!r} is left. {line}")
        if done:
            logger.warning(line)

    def check_weights(self, total: float) -> None:
        """Raises `ValueError` if the weights of all pairs are 0."""
        if not total:
            raise ValueError(
                f"All weights in column {self.weight_column!r} of the data set {self.name!r} are 0, for which those "
                f"below {LEAST_WEIGHT:.2g} are taken, so that nothing would be learned from it. Give a positive "
                "weight to at least one pair, or leave the data set out."
            )

    def _weight(self, row: Mapping[str, Any], where: str) -> float:
        value = row.get(cast(str, self.weight_column))
        if not isinstance(value, int | float) or not 0 <= value <= MOST_WEIGHT:
            raise ValueError(
                f"The weight in column {self.weight_column!r} of {where} is {value!r}, but it must be a number, 0 or "
                f"larger, up to {MOST_WEIGHT:g}. Only ratios of weights matter; a pair of weight 0 adds nothing to "
                "the loss."
            )
        return float(value) if value >= LEAST_WEIGHT else 0.0

    def _label(self, row: Mapping[str, Any], objective: str, where: str) -> int:
        if not self.labelled:
            return int(objective == self.name)
        column = self.label_columns.get(objective)
        value = None if column is None else row.get(column)
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return 0
        if value not in (0, 1, -1):
            raise ValueError(
                f"The label in column {column!r} of {where} is {value!r}, but it must be 0 or 1 (the better "
                "response), -1 (a tie) or None (missing)."
            )
        return {0: 1, 1: -1, -1: 0}[int(value)]

    def _ids(self, row: Mapping[str, Any], where: str) -> tuple[list[int], list[int], list[int], list[str]]:
        """Ids of the prompt and of both responses, and what is to be said of them.

        A response ends in the end token, or, where ids were given, in what a template writes after it.
        """
        if self.tokenized:
            prompt, *responses = (self._given(row, name, where) for name in ("prompt", *self.responses))
            notes = []
        else:
            prompt, responses, notes = self._tokenize(row, where)
        end = [cast(int, self.tokenizer.eos_token_id)]
        found = [*prompt, *responses[0], *responses[1], *(end if self.append_end_token else [])]
        if self.vocabulary is not None and found and not 0 <= min(found) <= max(found) < self.vocabulary:
            wrong = next(token for token in found if not 0 <= token < self.vocabulary)
            raise ValueError(
                f"The token id {wrong} in {where} is none of the model's, which has embeddings for {self.vocabulary} "
                "tokens. Give the model's own tokenizer, or call `model.resize_token_embeddings`."
            )
        ended = [end in (response[-1:], self._ended(response)[-1:]) for response in responses]
        if not all(ended) and self.append_end_token:
            responses = [response if done else response + end for response, done in zip(responses, ended)]
        elif not all(ended):
            notes.append("endless")
        return prompt, responses[0], responses[1], notes

    def _given(self, row: Mapping[str, Any], name: str, where: str) -> list[int]:
        ids = row.get(f"{name}_ids")
        if not isinstance(ids, list) or not all(isinstance(token, int) for token in ids):
            raise ValueError(f"`{name}_ids` of {where} is {str(ids)[:80]}, but it must be a list of token ids.")
        return ids

    def _tokenize(self, row: Mapping[str, Any], where: str) -> tuple[list[int], list[list[int]], list[str]]:
        """The boundary is the longest prefix that the prompt shares with both texts: a tokenizer may merge the
        prompt's last token with the response's first."""
        prompt, *responses, repeats = read_pair(row, self.responses, where)
        notes = [repeats] if repeats else []
        if isinstance(prompt, str):
            end = cast(str, self.tokenizer.eos_token)
            texts = [self._of_text(prompt + response.removesuffix(end) + end) for response in responses]
            ids = without_end(self.tokenizer, prompt, self._of_text(prompt))
        else:
            kwargs = read_context(row, where)
            texts = [tokenize_chat(self.tokenizer, prompt + response, where, **kwargs) for response in responses]
            ids = tokenize_chat(self.tokenizer, prompt, where, add_generation_prompt=True, **kwargs)
        start = min(common_prefix_length(ids, text) for text in texts)
        if start < len(ids):
            notes.append("merged")
        return texts[0][:start], [self._ended(text[start:]) for text in texts], notes

    def _of_text(self, text: str) -> list[int]:
        return cast(list[int], self.tokenizer(text)["input_ids"])

    def _ended(self, response: list[int]) -> list[int]:
        """A response up to the end token of its last turn: what a template or a tokenizer writes after that,
        `generate` would never produce."""
        for place, token in enumerate(response):
            if token == self.tokenizer.eos_token_id:
                rest = [other for other in response[place:] if other not in self.special]
                if not cast(str, self.tokenizer.decode(rest)).strip():
                    return response[: place + 1]
        return response


def _code() -> list[str]:
    """What decides the tokens of a pair beside its reader: a hash of the code that reads it, and versions."""
    sources = map(inspect.getsource, (sys.modules[__name__], shapes, templates, texts))
    versions = [package.__version__ for package in (tokenizers, transformers, trl)]
    return [short_hash("".join(sources).encode()), *versions]


def is_kept(outcomes: Sequence[str]) -> bool:
    """Whether a pair with these outcomes stays."""
    return all(outcome in KEPT for outcome in outcomes)


def is_labelled(columns: Sequence[str]) -> bool:
    """Whether a data set with these columns has labels for each objective, rather than a chosen response."""
    return any(column.removesuffix("_ids") in LABELLED for column in columns)
