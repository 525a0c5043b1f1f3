# SPDX-License-Identifier: Apache-2.0
"""From what a user gives as preference data to batches: every optimisation step sees every data set and objective."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from pyarrow import ArrowInvalid
from transformers import PreTrainedTokenizerBase
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.utils import logging
from trl.trainer.utils import pad

from .config import ALONE, FILE_KINDS, PairData, PreferenceARMConfig, called
from .model import Limits
from .preferences import mix
from .tokenization import COLUMNS, OUTCOMES, WEIGHT, PairReader, is_kept, is_labelled


logger = logging.get_logger(__name__)

Pairs = Dataset | IterableDataset
"""One data set of pairs."""
PairSources = Mapping[str, Pairs | str] | Pairs | str
"""What a user gives: data sets by objective, or a single one, each also as a file or by its id on the Hub."""
FIRST_ROWS = 100
"""The rows of a stream that say which columns it has, where it does not say so itself."""
PROMPT, FIRST, SECOND, PADDING = 0, 1, 2, -1
"""What a token belongs to: one of the first three `COLUMNS`, or nothing."""


def name_sources(argument: str, given: PairSources | None, split: str) -> dict[str, Pairs]:
    """The data sets by name, loaded where they are named by a file or, of the `split`, by an id.

    Raises:
        ValueError: nothing was given, or the splits of one data set in the place of data sets by objective.
        TypeError: something else.
    """
    if given is None or (isinstance(given, Mapping) and not given):
        raise ValueError(f"`{argument}` is required: a mapping from objective name to preference data set.")
    if isinstance(given, DatasetDict | IterableDatasetDict) and set(given) & {"train", "test", "validation"}:
        raise ValueError(
            f"`{argument}` has the splits {sorted(given)} of one data set. Give one of them, or a mapping from "
            "objective name to data set."
        )
    sources = {}
    for name, data in (given if isinstance(given, Mapping) else {ALONE: given}).items():
        if isinstance(data, str):
            data = PairData(data, split="train" if Path(data).suffix in FILE_KINDS else split).load()
        if not isinstance(data, Dataset | IterableDataset):
            raise TypeError(
                f"`{argument}` has a {type(data).__name__}. Give a mapping such as {{'helpful': dataset, ...}} with "
                "one preference data set for each objective, or one data set with labels for every objective."
            )
        sources[str(name)] = data
    return sources


def objectives_of(sources: Mapping[str, Pairs], label_columns: Mapping[str, str] | None) -> list[str]:
    """The objectives of data for a model whose adapter names none: those with labels, then those with a data set.

    Raises:
        ValueError: labelled data without `label_columns`.
    """
    ranked = [name for name, data in sources.items() if not has_labels(name, data)]
    labels = list(label_columns or {}) if len(ranked) < len(sources) else []
    names = list(dict.fromkeys([*labels, *ranked]))
    if not names:
        raise ValueError(
            "The labelled data does not say which column belongs to the objective. Pass for example "
            "`label_columns={'helpful': 'better_response_id'}`."
        )
    return [name or "reward" for name in names]


def only_objective(sources: Mapping[str, Pairs], label_columns: Mapping[str, str] | None) -> list[str]:
    """The one objective of a model without a preference. Raises `ValueError` for several."""
    names = objectives_of(sources, label_columns)
    if len(names) > 1:
        raise ValueError(
            f"The model has no preference-conditioned adapter, but there are {len(names)} objectives "
            f"({', '.join(sorted(names))}). Pass `peft_config=PBLoraConfig(objectives=[...])`, or train on one "
            "objective."
        )
    return names


def join_sources(
    argument: str,
    sources: Mapping[str, Pairs],
    objectives: list[str],
    tokenizer: PreTrainedTokenizerBase,
    args: PreferenceARMConfig,
    limits: Limits,
    once: bool = False,
) -> JointPreferenceDataset | JointPreferenceStream:
    """The data sets of [`name_sources`], tokenized and zipped. With `once`, streams are read into memory.

    Raises:
        ValueError: the objectives of the data are not those of the adapter, a data set has no usable pair, no pair
            has a label for one of the objectives, or no data set has one of the `label_columns`.
    """
    if ALONE in sources:
        labelled = has_labels(argument, sources[ALONE])
        if len(objectives) > 1 and not labelled:
            raise ValueError(
                f"`{argument}` is one data set with `chosen` and `rejected`, but the adapter was made for "
                f"{objectives}. Give a mapping with one data set for each objective, or one with labels for all."
            )
        sources = {"pairs" if labelled else objectives[0]: sources[ALONE]}
    label_columns = cast(dict, args.label_columns) or {objective: objective for objective in objectives}
    cut_prompt = args.truncation_mode == "cut_prompt"
    longest = min((n for n in (args.max_length, limits.positions) if n is not None), default=None)
    if longest is not None and limits.reserved:
        longest = max(1, longest - limits.reserved)
    readers = [
        PairReader(
            name, columns_of(name, data), objectives, label_columns, tokenizer, longest, cut_prompt,
            args.append_end_token, args.weight_column, limits.vocabulary,
        )
        for name, data in sources.items()
    ]  # fmt: skip
    found = {objective for reader in readers for objective in reader.own_objectives}
    if found != set(objectives):
        missing = ", ".join(name for name in objectives if name not in found)
        remedies = [
            f"Give pairs for {missing} too" if missing else "Leave the others out",
            "name data sets and label columns as the adapter's objectives"
            if once
            else "give `PBLoraConfig(objectives=...)` the names of the data sets, or of the label columns",
        ]
        raise ValueError(
            f"`{argument}` has the objectives {sorted(found)}, but the adapter was made for {objectives}. "
            f"{', or '.join(remedies)}."
        )
    labelled = [reader for reader in readers if reader.labelled]
    unread = set(label_columns).difference(*(reader.own_objectives for reader in labelled))
    unread = {label_columns[objective] for objective in unread if label_columns[objective] != objective}
    if labelled and unread:
        _complain(
            f"`label_columns` names {sorted(unread)}, which no labelled data set of `{argument}` has. Name columns "
            "that are there, or leave these out.",
            once,
        )
    pairs = list(zip(readers, sources.values(), strict=True))
    if not once and any(isinstance(data, IterableDataset) for data in sources.values()):
        for reader, data in pairs:  # at least their first rows can be refused before anything is written
            first = next(iter(_readable(reader.name, data)), None)
            if first is None:
                reader.report(Counter())  # which refuses it
            reader(cast(dict, first))
        return JointPreferenceStream(pairs)
    with args.main_process_first(desc="tokenizing"):
        prepared = [
            reader.read(data if isinstance(data, Dataset) else _readable(reader.name, data), args.dataset_num_proc)
            for reader, data in pairs
        ]
    found = {objectives[i] for data in prepared for row in data["labels"] for i, label in enumerate(row) if label}
    if found != set(objectives):
        _complain(
            f"No pair of `{argument}` has a label for {sorted(set(objectives) - found)}: all are ties or missing. "
            "Give labels to at least one pair, or leave the objective out.",
            once,
        )
    return JointPreferenceDataset(prepared, once)


def _complain(message: str, once: bool) -> None:
    """Raises `ValueError`; of an evaluation, which changes no model, it only says so."""
    if not once:
        raise ValueError(message)
    logger.warning(message)


def join_evaluation(
    given: Any, objectives: list[str], tokenizer: PreTrainedTokenizerBase, args: PreferenceARMConfig, limits: Limits
) -> Any:
    """What evaluation iterates over: [`join_sources`] of the pairs, or of each of several evaluations by its name.

    What is joined already stays as it is.
    """
    if given is None or isinstance(given, JointPreferenceDataset):
        return given
    several = isinstance(given, Mapping) and any(
        isinstance(data, Mapping | JointPreferenceDataset) for data in given.values()
    )
    if not several:
        given = name_sources("eval_dataset", given, "test")
        ranked = not any(has_labels(name, data) for name, data in given.items())
        several = ranked and len(objectives) == 1 and not {ALONE, objectives[0]} & set(given)
    if several:
        given = {name: {} if data is None else data for name, data in given.items()}  # which is refused
        return {name: join_evaluation(data, objectives, tokenizer, args, limits) for name, data in given.items()}
    return join_sources("eval_dataset", given, objectives, tokenizer, args, limits, once=True)


def columns_of(name: str, data: Pairs) -> list[str]:
    """Column names, of a stream by its first rows. Raises `ValueError` for a stream without any."""
    first = () if data.column_names else islice(_readable(name, data), FIRST_ROWS)
    found = data.column_names or list(dict.fromkeys(column for row in first for column in row))
    if not found:
        raise ValueError(f"The {called(name)} is empty. Give it at least one pair.")
    return found


def has_labels(name: str, data: Pairs) -> bool:
    """Whether a data set has labels for each objective, rather than a chosen response."""
    return is_labelled(columns_of(name, data))


class JointPreferenceDataset(torch.utils.data.Dataset):
    """Zips data sets of pairs, so that every optimisation step sees every one of them.

    Row `i` is a list with one pair of each data set. The length is that of the longest; shorter ones start over, so an
    epoch visits every pair of the longest once and loses none of the others. With `once`, for evaluation, a pair that
    comes again loses its labels, so that every pair counts once.
    """

    def __init__(self, datasets: Sequence[Dataset], once: bool = False) -> None:
        self.datasets, self.once = list(datasets), once

    def __len__(self) -> int:
        return max(len(dataset) for dataset in self.datasets)

    def lengths(self) -> list[int]:
        """Tokens of the longest sequence of each row, for batches of similar lengths."""
        tokens = [
            [len(p) + max(len(a), len(b)) for p, a, b in zip(*(d[c][:] for c in COLUMNS[:3]))] for d in self.datasets
        ]
        return [max(lengths[i % len(lengths)] for lengths in tokens) for i in range(len(self))]

    def __getitem__(self, index: int) -> dict[str, list]:
        if index >= len(self):
            raise IndexError(index)  # which ends a loop over the rows
        pairs = []
        for number, dataset in enumerate(self.datasets):
            pair = {**dataset[index % len(dataset)], "pair_id": pair_id(number, index % len(dataset))}
            if self.once and index >= len(dataset):
                pair["labels"] = [0] * len(pair["labels"])
            pairs.append(pair)
        return {"pairs": pairs}


class SimilarLengths(LengthGroupedSampler):
    """Puts rows of similar lengths together, in another order each epoch, as a pure function of seed and epoch.

    The sampler of transformers draws from the global generator, which is elsewhere when a run resumes; and a resumed
    run of several processes does not tell a sampler its epoch. So this one asks `epoch` for it.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int, epoch: Callable[[], int]) -> None:
        super().__init__(batch_size, lengths=lengths)
        self.seed, self.epoch = seed, epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(mix(self.seed, self.epoch()))
        return super().__iter__()


class JointPreferenceStream(torch.utils.data.IterableDataset):
    """As [`JointPreferenceDataset`], for data sets of which at least one is a stream.

    It has no end: whatever has ended starts over, shuffled anew if it shuffles, and a batch goes on with the next
    pair. For transformers takes no step for what is left over at the end of data without a length, and counts batches
    from the very first one when a run resumes. What was left out or cut is reported at the end of the first pass.
    """

    def __init__(self, sources: list[tuple[PairReader, Pairs]]) -> None:
        self.sources = sources

    def __iter__(self) -> Iterator[dict[str, list]]:
        streams = [self._pairs(number) for number in range(len(self.sources))]
        while True:
            yield {"pairs": [next(stream) for stream in streams]}

    def _pairs(self, number: int) -> Iterator[dict[str, Any]]:
        reader, dataset = self.sources[number]
        for epoch in count():
            if isinstance(dataset, IterableDataset):
                dataset.set_epoch(epoch)
            outcomes: Counter[tuple[str, ...]] = Counter()
            kept, weight = 0, 0.0
            for i, row in enumerate(_readable(reader.name, dataset)):
                pair = reader(cast(dict, row), i)
                outcome = tuple(pair.pop(OUTCOMES))
                outcomes[outcome] += 1
                if is_kept(outcome):
                    yield {**pair, "pair_id": pair_id(number, kept)}
                    kept, weight = kept + 1, weight + pair.get(WEIGHT, 1.0)
            if epoch == 0 or not kept:
                reader.report(outcomes)
                reader.check_weights(weight)


def read_in_order(args: PreferenceARMConfig) -> None:
    """Sets the arguments so that the training process reads its streams itself, each pair once in a pass.

    Workers would read shards of their own of each stream, all of what is none, and number the pairs alike.
    """
    cast(Any, args.accelerator_config).dispatch_batches = False
    if args.dataloader_num_workers:
        logger.warning(
            f"Streams are read without workers, so that each pair comes once in a pass: `dataloader_num_workers` is "
            f"0 instead of {args.dataloader_num_workers}."
        )
        args.dataloader_num_workers, args.dataloader_prefetch_factor = 0, None
        args.dataloader_persistent_workers = False


def _readable(name: str, rows: Iterable[Any]) -> Iterator[Any]:
    """The rows of a data set. Raises `ValueError` where a file that it streams is damaged."""
    try:
        yield from rows
    except (ArrowInvalid, UnicodeDecodeError) as error:
        raise ValueError(f"The {called(name)} can't be read to its end: {error}. Mend that row.") from error


def pair_id(dataset: int, index: int) -> int:
    """A number of its own for each pair of a run."""
    return (dataset << 40) + index


@dataclass
class PreferenceCollator:
    """Pads joint rows into one batch of pairs with a label for each objective.

    Returns a dictionary with `input_ids` and `segments` of shape `(rows, length)`, `pair_labels` of shape
    `(pairs, k)` and `pair_ids` of shape `(pairs,)`. `segments` says what a token belongs to: 0 the prompt, 1 the first
    response, 2 the second, −1 padding. There are two rows for each pair, all first responses and then all second ones;
    with `share_prompt` one row holds prompt, first and second response. `pair_labels` is +1 where the first response
    is the better one for an objective, −1 where the second is, 0 where there is no label. `pair_weights` of shape
    `(pairs,)` is what they count for, where pairs have weights. The pairs of one joint row stand together.

    Args:
        pad_token_id (`int`): Id for padding.
        pad_to_multiple_of (`int`, *optional*): Round the length up.
        share_prompt (`bool`, *optional*, defaults to `False`): One row for each pair.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    share_prompt: bool = False

    def __call__(self, examples: Sequence[dict[str, list]]) -> dict[str, torch.Tensor]:
        pairs = [pair for example in examples for pair in example["pairs"]]
        kinds = [(PROMPT, FIRST, SECOND)] if self.share_prompt else [(PROMPT, FIRST), (PROMPT, SECOND)]
        rows = [[(part, pair[COLUMNS[part]]) for part in parts] for parts in kinds for pair in pairs]
        ids = [[token for _, tokens in row for token in tokens] for row in rows]
        segments = [[part for part, tokens in row for _ in tokens] for row in rows]
        weighted = any(WEIGHT in pair for pair in pairs)
        weights = {"pair_weights": torch.tensor([pair[WEIGHT] for pair in pairs])} if weighted else {}
        return {
            "input_ids": self._pad(ids, self.pad_token_id),
            "segments": self._pad(segments, PADDING),
            "pair_labels": torch.tensor([pair["labels"] for pair in pairs], dtype=torch.float32),
            "pair_ids": torch.tensor([pair["pair_id"] for pair in pairs]),
            **weights,
        }

    def _pad(self, rows: list[list[int]], value: int) -> torch.Tensor:
        tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
        return pad(tensors, padding_value=value, padding_side="right", pad_to_multiple_of=self.pad_to_multiple_of)


def with_texts(
    batch: Mapping[str, torch.Tensor], texts: Sequence[Sequence[int]], bos: int | None, pad_token_id: int
) -> dict[str, torch.Tensor]:
    """A batch of a [`PreferenceCollator`] whose prompts begin with a text, after a beginning-of-text token.

    Args:
        batch (`Mapping`): The batch, with one row or two for each pair.
        texts (`Sequence`): Token ids of one text for all pairs, or of one for each.
        bos (`int` or `None`): The beginning-of-text token.
        pad_token_id (`int`): Id for padding.
    """
    ids, segments = batch["input_ids"], batch["segments"]
    texts = [*texts] * (len(batch["pair_ids"]) // len(texts))
    own = pad([torch.tensor([*text]) for text in texts], padding_value=pad_token_id).to(ids)
    rows = torch.arange(len(ids), device=ids.device) % len(texts)
    own, lengths = own[rows], torch.tensor([len(text) for text in texts], device=ids.device)[rows, None]
    columns = torch.arange(ids.shape[1] + own.shape[1], device=ids.device).expand(len(ids), -1)
    start = (ids[:, :1] == (-1 if bos is None else bos)).long()
    written = (columns >= start) & (columns < start + lengths)
    beyond = columns >= ids.shape[1] + lengths
    former = torch.where(columns < start, columns, columns - lengths).clamp(0, ids.shape[1] - 1)
    of_text = own.gather(1, (columns - start).clamp(0, own.shape[1] - 1))
    found = {
        "input_ids": torch.where(written, of_text, ids.gather(1, former)).masked_fill(beyond, pad_token_id),
        "segments": segments.gather(1, former).masked_fill(written, PROMPT).masked_fill(beyond, PADDING),
    }
    return {**batch, **found}
