# SPDX-License-Identifier: Apache-2.0
"""From preference data sets to batches: one data set for each objective, one joint row for each optimisation step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from datasets import Dataset
from transformers import BatchEncoding, PreTrainedTokenizerBase
from transformers.utils import logging
from trl.data_utils import is_conversational

from .compat import common_prefix_length, pad


logger = logging.get_logger(__name__)

COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")


def tokenize_pairs(
    dataset: Dataset, objective: str, tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> Dataset:
    """Turns a preference data set into token ids and drops pairs longer than `max_length`.

    A cut response is never compared with an uncut one, since summed log-probabilities would prefer the shorter, so
    too long pairs are left out as a whole. How many is logged in one line.

    Args:
        dataset (`datasets.Dataset`):
            Columns `prompt`, `chosen`, `rejected`, as text or as lists of messages; or already the ids
            `prompt_ids`, `chosen_ids`, `rejected_ids`.
        objective (`str`): The objective's name, for messages.
        tokenizer (`PreTrainedTokenizerBase`): Plain text gets its end token appended; messages its chat template.
        max_length (`int`, *optional*): Most tokens of prompt and response together.

    Returns:
        `datasets.Dataset` with the columns `prompt_ids`, `chosen_ids`, `rejected_ids`.

    Raises:
        ValueError: missing columns, no rows, or no row left.
    """
    if len(dataset) == 0:
        raise ValueError(f"The data set of objective {objective!r} is empty. Give it at least one pair.")
    if not set(COLUMNS) <= set(dataset.column_names):
        missing = [name for name in ("prompt", "chosen", "rejected") if name not in dataset.column_names]
        if missing:
            raise ValueError(
                f"The data set of objective {objective!r} lacks the columns {missing}; it has {dataset.column_names}. "
                "A preference data set needs `prompt`, `chosen` and `rejected`."
            )
        dataset = dataset.map(
            _tokenize_pair,
            fn_kwargs={"tokenizer": tokenizer},
            remove_columns=dataset.column_names,
            desc=f"Tokenizing {objective}",
        )
    kept = dataset.filter(_fits, fn_kwargs={"max_length": max_length}) if max_length else dataset
    if len(kept) < len(dataset):
        logger.warning(
            f"{objective}: {len(dataset) - len(kept)} of {len(dataset)} pairs are longer than {max_length} tokens "
            "and were left out."
        )
    if len(kept) == 0:
        raise ValueError(
            f"No pair of objective {objective!r} fits into `max_length`={max_length} tokens. Raise `max_length`."
        )
    return kept.select_columns(list(COLUMNS))


class JointPreferenceDataset(torch.utils.data.Dataset):
    """Zips the data sets of all objectives, so that every optimisation step sees every objective.

    Row `i` holds one pair of each objective. The length is that of the longest data set; shorter ones start over, so
    an epoch visits every pair of the longest once and loses none of the others.

    Args:
        datasets (`Mapping[str, Dataset]`): Objective name → tokenized data set.
        once (`bool`, *optional*, defaults to `False`):
            For evaluation: a pair that comes again, since its data set is shorter, is marked `repeated`, and the
            collator gives it no label. So every pair counts once.
    """

    def __init__(self, datasets: Mapping[str, Dataset], once: bool = False) -> None:
        self.datasets, self.once = dict(datasets), once

    def __len__(self) -> int:
        return max(len(dataset) for dataset in self.datasets.values())

    def __getitem__(self, index: int) -> dict[str, dict[str, Any]]:
        return {
            name: {**dataset[index % len(dataset)], "repeated": self.once and index >= len(dataset)}
            for name, dataset in self.datasets.items()
        }


@dataclass
class PreferenceCollator:
    """Pads joint rows into one batch of pairs with a label for each objective.

    Returns a dictionary with `input_ids`, `attention_mask` and `completion_mask` of shape `(2 * pairs, length)`, the
    chosen responses first and the rejected ones after them, and `pair_labels` of shape `(pairs, k)`: +1 where the
    first response is the better one for an objective, −1 where the second is, 0 where the pair has no label. The
    pairs of one joint row stand together, in the order of `objectives`.

    Args:
        pad_token_id (`int`): Id for padding.
        objectives (`Sequence[str]`): The k names, in the adapter's order.
        pad_to_multiple_of (`int`, *optional*): Round the length up.
    """

    pad_token_id: int
    objectives: Sequence[str]
    pad_to_multiple_of: int | None = None

    def __call__(self, examples: list[dict[str, dict[str, Any]]]) -> dict[str, torch.Tensor]:
        pairs = [example[name] for example in examples for name in self.objectives]
        labels = torch.eye(len(self.objectives)).repeat(len(examples), 1)
        labels[torch.tensor([pair.get("repeated", False) for pair in pairs])] = 0
        prompts = [torch.tensor(pair["prompt_ids"]) for pair in pairs] * 2
        responses = [torch.tensor(pair[key]) for key in ("chosen_ids", "rejected_ids") for pair in pairs]
        rows = list(zip(prompts, responses, strict=True))
        return {
            "input_ids": self._pad([torch.cat(row) for row in rows], self.pad_token_id),
            "attention_mask": self._pad([torch.ones(len(p) + len(r), dtype=torch.long) for p, r in rows], 0),
            "completion_mask": self._pad([torch.cat([torch.zeros_like(p), torch.ones_like(r)]) for p, r in rows], 0),
            "pair_labels": labels,
        }

    def _pad(self, rows: list[torch.Tensor], value: int) -> torch.Tensor:
        return pad(rows, padding_value=value, padding_side="right", pad_to_multiple_of=self.pad_to_multiple_of)


def _tokenize_pair(example: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    if is_conversational(example):
        prompt = _template(tokenizer, example["prompt"], add_generation_prompt=True)
        chosen = _template(tokenizer, example["prompt"] + example["chosen"])
        rejected = _template(tokenizer, example["prompt"] + example["rejected"])
    else:
        prompt = tokenizer(example["prompt"])["input_ids"]
        end = tokenizer.eos_token
        chosen = tokenizer(example["prompt"] + example["chosen"].removesuffix(end) + end)["input_ids"]
        rejected = tokenizer(example["prompt"] + example["rejected"].removesuffix(end) + end)["input_ids"]
    chosen, rejected = (_end_at(ids, cast(int | None, tokenizer.eos_token_id)) for ids in (chosen, rejected))
    start = min(common_prefix_length(prompt, chosen), common_prefix_length(prompt, rejected))
    return {"prompt_ids": chosen[:start], "chosen_ids": chosen[start:], "rejected_ids": rejected[start:]}


def _end_at(ids: list[int], end: int | None) -> list[int]:
    """Drops what a chat template writes after the last end token, which `generate` would never produce."""
    return ids[: len(ids) - ids[::-1].index(end)] if end in ids else ids


def _template(tokenizer: PreTrainedTokenizerBase, messages: list[dict], **kwargs: Any) -> list[int]:
    encoded = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **kwargs)
    return cast(BatchEncoding, encoded)["input_ids"]


def _fits(example: dict[str, list[int]], max_length: int) -> bool:
    longest = max(len(example["chosen_ids"]), len(example["rejected_ids"]))
    return len(example["prompt_ids"]) + longest <= max_length
