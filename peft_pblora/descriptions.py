# SPDX-License-Identifier: Apache-2.0
"""Objectives as frozen embeddings of their descriptions, from the model that is adapted (UniARM, arXiv 2602.09538)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from peft.utils.integrations import gather_params_ctx
from transformers import PreTrainedTokenizerBase

from .config import MoSLoraConfig, check_descriptions


DIGITS = 6
"""Significant digits of an embedding's numbers in a configuration."""


def embed_objectives(
    config: MoSLoraConfig,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    more: Mapping[str, str] | None = None,
) -> MoSLoraConfig:
    """Returns a configuration with embeddings of its objectives' descriptions; the given one stays as it is.

        o_i = e / |e|,   e = the mean of the model's input embeddings over the tokens of the description of i

    What is pooled is our choice: the paper's is not known to us. Descriptions of the same words are close to each
    other, so that an adapter tells them apart slowly; choose words that differ. Embeddings that are there stay.

    Args:
        config ([`MoSLoraConfig`]): A configuration with `objective_descriptions`.
        model (`PreTrainedModel` or `PeftModel`): The model that is adapted.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        more (`Mapping[str, str]`, *optional*):
            Descriptions of further objectives, which come last. No weight of the adapter depends on how many there
            are, so that one that was trained for some of them loads with this configuration. Until it is trained
            further this is an experiment (docs/adapters.md measures it). They start at weight 0.

    Returns:
        [`MoSLoraConfig`]: To be given to `get_peft_model`, or to [`load_adapter`] as `config`.

    Raises:
        ValueError: no descriptions, a description without tokens or with one that the model has no embedding for, an
            objective that is there already, or embeddings of another size than the model's.

    Example:

    ```python
    config = MoSLoraConfig(objective_descriptions={"helpful": "Answers in full.", "harmless": "Does nobody any harm."})
    arm = get_peft_model(model, embed_objectives(config, model, tokenizer))
    ```
    """
    described = getattr(config, "objective_descriptions", None)
    if described is None:
        raise ValueError(
            "The configuration has no `objective_descriptions`. Give `MoSLoraConfig` one text an objective."
        )
    more = check_descriptions(more or {}, list(more or {}))
    if twice := sorted(set(more) & set(described)):
        raise ValueError(f"`more` has the objectives {twice}, which the adapter has already. Describe others.")
    known = config.objective_embeddings
    texts = more if known is not None else {**described, **more}
    found = [_embedding(name, text, model, tokenizer) for name, text in texts.items()]
    embeddings = [*(known or []), *found]
    if len({len(row) for row in embeddings}) > 1:
        raise ValueError(
            f"The model's embeddings have size {len(found[0])}, but those of the adapter {len(embeddings[0])}. Give "
            "the model that the adapter is for."
        )
    start = config.default_preference
    if more:
        start = [*config.initial_preference, *[0.0] * len(more)]
    return replace(
        copy.deepcopy(config),
        objectives=[*config.objectives, *more],
        objective_descriptions={**described, **more},
        objective_embeddings=embeddings,
        default_preference=start,
    )


def _embedding(name: str, text: str, model: Any, tokenizer: PreTrainedTokenizerBase) -> list[float]:
    ids: Any = tokenizer(text, add_special_tokens=False)["input_ids"]
    table = model.get_input_embeddings()
    size = getattr(table, "num_embeddings", None)
    if not ids or (size is not None and max(ids) >= size):
        fault = f"a token that the model, of {size} embeddings, does not know" if ids else "no tokens"
        raise ValueError(
            f"The description of {name!r}, {text!r}, has {fault}. Write another text, or give the model's tokenizer."
        )
    weight = table.weight
    with torch.no_grad(), gather_params_ctx(weight):
        mean = table(torch.tensor([ids], device=weight.device))[0].double().mean(0)
    if not mean.norm() > 0 or not torch.isfinite(mean).all():
        raise ValueError(f"The embedding of the description of {name!r} is {mean.norm()} long. Write another text.")
    return [float(f"{value:.{DIGITS}g}") for value in (mean / mean.norm()).tolist()]
