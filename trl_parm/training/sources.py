# SPDX-License-Identifier: Apache-2.0
"""What a user may give as `train_dataset` and `eval_dataset`, brought into one form."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from transformers import PreTrainedTokenizerBase

from .arguments import FILE_KINDS, PairData
from .config import PreferenceARMConfig
from .data import JointPreferenceDataset, JointPreferenceStream, PairPreparer
from .tokenization import PairReader, is_labelled


Pairs = Dataset | IterableDataset
"""One data set of pairs."""
PairSources = Mapping[str, Pairs | str] | Pairs | str
"""What a user gives: data sets by objective, or a single one, each also as a file or by its id on the Hub."""
ALONE = ""
"""The name of a data set that was given without one."""


def name_sources(argument: str, given: PairSources | None, split: str) -> dict[str, Pairs]:
    """The data sets by name, loaded where they are named by a file or an id.

    Args:
        argument (`str`): `"train_dataset"` or `"eval_dataset"`, for messages.
        given (`PairSources`): What the user gave.
        split (`str`): The split to load.

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
    named = given if isinstance(given, Mapping) else {ALONE: given}
    return {str(name): _load(argument, data, split) for name, data in named.items()}


def only_objective(sources: Mapping[str, Pairs], label_columns: Mapping[str, str] | None) -> list[str]:
    """The one objective of a model without a preference-conditioned adapter. Raises `ValueError` for several."""
    labelled = [is_labelled(columns_of(data)) for data in sources.values()]
    names = [name for name, has_labels in zip(sources, labelled, strict=True) if not has_labels]
    names += list(label_columns or {}) if any(labelled) else []
    if len(set(names)) > 1:
        raise ValueError(
            f"The model has no preference-conditioned adapter, but there are {len(names)} objectives "
            f"({', '.join(names)}). Pass `peft_config=PBLoraConfig(objectives=[...])`, or train on one objective."
        )
    if not names:
        raise ValueError(
            "The labelled data does not say which column belongs to the objective. Pass for example "
            "`label_columns={'helpful': 'better_response_id'}`."
        )
    return [names[0] or "reward"]


def join_sources(
    argument: str,
    sources: Mapping[str, Pairs],
    objectives: list[str],
    tokenizer: PreTrainedTokenizerBase,
    args: PreferenceARMConfig,
    once: bool = False,
) -> JointPreferenceDataset | JointPreferenceStream:
    """Tokenizes the data sets and zips them.

    Args:
        argument (`str`): `"train_dataset"` or `"eval_dataset"`, for messages.
        sources (`Mapping[str, Pairs]`): From [`name_sources`].
        objectives (`list[str]`): All objectives.
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer.
        args ([`PreferenceARMConfig`]): Lengths and label columns.
        once (`bool`, *optional*, defaults to `False`): For evaluation; a stream is then read into memory.

    Raises:
        ValueError: the objectives of the data are not those of the adapter, or a data set has no usable pair.
    """
    sources = _with_names(argument, sources, objectives)
    label_columns = cast(dict, args.label_columns) or {objective: objective for objective in objectives}
    preparers = {
        name: PairPreparer(
            PairReader(name, columns_of(data), objectives, label_columns, tokenizer),
            args.max_length,
            args.truncation_mode == "cut_prompt",
        )
        for name, data in sources.items()
    }
    found = {objective for preparer in preparers.values() for objective in preparer.reader.own_objectives}
    if found != set(objectives):
        raise ValueError(_differing_objectives(argument, found, objectives))
    if once:
        sources = {name: Dataset.from_list(list(d)) if _is_stream(d) else d for name, d in sources.items()}
    if any(_is_stream(data) for data in sources.values()):
        return JointPreferenceStream([(preparers[name], data) for name, data in sources.items()])
    with args.main_process_first(desc="tokenizing"):
        return JointPreferenceDataset(
            [preparers[name].all(cast(Dataset, data), args.dataset_num_proc) for name, data in sources.items()], once
        )


def join_evaluation(
    given: Any, objectives: list[str], tokenizer: PreTrainedTokenizerBase, args: PreferenceARMConfig
) -> Any:
    """What evaluation iterates over: [`join_sources`] of the pairs, or of each of several evaluations by its name."""
    if given is None:
        return None
    if isinstance(given, Mapping) and any(isinstance(data, Mapping) for data in given.values()):
        return {name: join_evaluation(data, objectives, tokenizer, args) for name, data in given.items()}
    sources = name_sources("eval_dataset", given, "test")
    ranked = not any(is_labelled(columns_of(data)) for data in sources.values())
    if ranked and ALONE not in sources and len(objectives) == 1 and objectives[0] not in sources:
        return {name: join_evaluation(data, objectives, tokenizer, args) for name, data in sources.items()}
    return join_sources("eval_dataset", sources, objectives, tokenizer, args, once=True)


def columns_of(data: Pairs) -> list[str]:
    """Column names, of a stream by its first row."""
    return data.column_names or list(next(iter(data), {}))


def _is_stream(data: Pairs) -> bool:
    return isinstance(data, IterableDataset)


def _load(argument: str, data: Any, split: str) -> Pairs:
    if isinstance(data, str):
        return PairData(data, split="train" if Path(data).suffix in FILE_KINDS else split).load()
    if not isinstance(data, Dataset | IterableDataset):
        raise TypeError(
            f"`{argument}` has a {type(data).__name__}. Give a mapping such as {{'helpful': dataset, ...}} with one "
            "preference data set for each objective, or one data set with labels for every objective."
        )
    return data


def _with_names(argument: str, sources: Mapping[str, Pairs], objectives: list[str]) -> dict[str, Pairs]:
    if ALONE not in sources:
        wrong = [
            name for name, data in sources.items() if name not in objectives and not is_labelled(columns_of(data))
        ]
        if wrong:
            raise ValueError(_differing_objectives(argument, set(sources), objectives))
        return dict(sources)
    data = sources[ALONE]
    if is_labelled(columns_of(data)):
        return {"pairs": data}
    if len(objectives) > 1:
        raise ValueError(
            f"`{argument}` is one data set with `chosen` and `rejected`, but the adapter was made for {objectives}. "
            "Give a mapping with one data set for each objective, or one with labels for all."
        )
    return {objectives[0]: data}


def _differing_objectives(argument: str, found: set[str], objectives: list[str]) -> str:
    return (
        f"`{argument}` has the objectives {sorted(found)}, but the adapter was made for {objectives}. Give "
        "`PBLoraConfig(objectives=...)` the names of the data sets, or of the label columns."
    )
