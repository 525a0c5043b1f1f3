# SPDX-License-Identifier: Apache-2.0
"""From preference data sets to joint rows: every optimisation step sees every data set, and so every objective."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from datasets import Dataset, Features, IterableDataset, List, Value
from transformers.trainer_pt_utils import get_length_grouped_indices
from transformers.utils import logging

from .preferences import mix
from .tokenization import COLUMNS, PairReader, fit


logger = logging.get_logger(__name__)

FEATURES = Features({column: List(Value("int32")) for column in COLUMNS} | {"outcome": Value("string")})
OUTCOMES = {
    "cut": "lost the start of the prompt to fit into {max_length} tokens",
    "too long": "were left out, being longer than {max_length} tokens",
    "identical": "were left out, since both responses are the same",
    "unlabelled": "were left out, having no label for any objective",
}


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


class JointPreferenceDataset(torch.utils.data.Dataset):
    """Zips data sets of pairs, so that every optimisation step sees every one of them.

    Row `i` is a list with one pair of each data set. The length is that of the longest; shorter ones start over, so an
    epoch visits every pair of the longest once and loses none of the others.

    Args:
        datasets (`Sequence[Dataset]`): Prepared data sets.
        once (`bool`, *optional*, defaults to `False`):
            For evaluation: a pair that comes again, since its data set is shorter, loses its labels. So every pair
            counts once.
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
        pairs = []
        for number, dataset in enumerate(self.datasets):
            pair = {**dataset[index % len(dataset)], "pair_id": pair_id(number, index % len(dataset))}
            if self.once and index >= len(dataset):
                pair["labels"] = [0] * len(pair["labels"])
            pairs.append(pair)
        return {"pairs": pairs}


class SimilarLengths(torch.utils.data.Sampler[int]):
    """Puts rows of similar lengths together, in another order each epoch, as a pure function of seed and epoch.

    The sampler of transformers draws from the global generator, which is elsewhere when a run resumes; and a resumed
    run of several processes does not tell a sampler its epoch. So this one asks for it.

    Args:
        lengths (`Sequence[int]`): Of the rows.
        batch_size (`int`): Rows that should be alike.
        seed (`int`): The run's seed.
        epoch (`Callable[[], int]`): Gives the epoch that begins, or goes on.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, epoch: Callable[[], int]) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = list(lengths), batch_size, seed, epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(mix(self.seed, self.epoch()))
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))


class JointPreferenceStream(torch.utils.data.IterableDataset):
    """As [`JointPreferenceDataset`], for data sets of which at least one is a stream.

    An epoch ends when every stream has ended once; those that end earlier start over. What was left out or cut is
    reported when a stream ends for the first time.

    Args:
        sources (`Sequence[tuple[PairPreparer, Dataset | IterableDataset]]`): Each with its preparer, unprepared.
    """

    def __init__(self, sources: Sequence[tuple[PairPreparer, Dataset | IterableDataset]]) -> None:
        self.sources = list(sources)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Reshuffles streams that shuffle."""
        self.epoch = epoch
        for _, dataset in self.sources:
            if isinstance(dataset, IterableDataset):
                dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, list]]:
        ended = [False] * len(self.sources)
        streams = [self._pairs(number, ended) for number in range(len(self.sources))]
        while True:
            # A stream notices its end when it is asked for the pair after its last.
            pairs = [next(stream) for stream in streams]
            if all(ended):
                return
            yield {"pairs": pairs}

    def _pairs(self, number: int, ended: list[bool]) -> Iterator[dict[str, Any]]:
        preparer, dataset = self.sources[number]
        while True:
            outcomes: Counter[str] = Counter()
            for row in dataset:
                pair = preparer(cast(dict, row))
                outcome = pair.pop("outcome")
                outcomes[outcome] += 1
                if outcome in ("", "cut"):
                    yield {**pair, "pair_id": pair_id(number, outcomes[""] + outcomes["cut"] - 1)}
            if not outcomes:
                raise ValueError(f"The data set {preparer.reader.name!r} is empty. Give it at least one pair.")
            if not ended[number]:
                preparer.report(outcomes)
            ended[number] = True


def pair_id(dataset: int, index: int) -> int:
    """A number of its own for each pair of a run."""
    return (dataset << 40) + index
