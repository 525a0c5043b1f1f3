# SPDX-License-Identifier: Apache-2.0
"""The demo's models: a frozen base and one preference-conditioned adapter, on the base itself where that can be."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from peft_pblora import PreferenceConfig
from trl_parm.decoding import Vocabulary
from trl_parm.evaluation.models import same_model


Loaded = TypeVar("Loaded")
ADAPTER = "arm"
"""What the adapter is called inside its model."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Models:
    """What the demo decodes with.

    Attributes:
        base_name, arm_name (`str`): As they were given.
        base (`PreTrainedModel`): The frozen model that generates.
        arm (`PeftModel`): The reward model; its adapter acts where it is asked for by name, and nowhere else.
        objectives (`list[str]`): The adapter's, in its order.
        tokenizer (`PreTrainedTokenizerBase`): The base model's, with a pad token.
        arm_tokenizer (`PreTrainedTokenizerBase`): The reward model's.
        vocabulary (`Vocabulary` or `None`): Aligns the two, if they differ.
    """

    base_name: str
    arm_name: str
    base: PreTrainedModel
    arm: PeftModel
    objectives: list[str]
    tokenizer: PreTrainedTokenizerBase
    arm_tokenizer: PreTrainedTokenizerBase
    vocabulary: Vocabulary | None = None


def load_models(arm_name: str, base_name: str | None = None, dtype: str = "auto") -> Models:
    """Loads the demo's models, from folders or by ids on the Hub; to the GPU if there is one.

    The adapter is put on the base model if it was trained on it, or if the model that it was trained on can't be
    read: a folder of the machine where it was trained says nothing elsewhere. Otherwise that model is loaded too.

    Args:
        arm_name (`str`): The adapter.
        base_name (`str`, *optional*): The base model; the one that the adapter was trained on if not given.
        dtype (`str`, *optional*, defaults to `"auto"`): Of the weights; as they were saved if not given.

    Raises:
        ValueError: something is missing, can't be read or does not fit, or the adapter has no objectives; in one line.
    """
    config = _adapter_config(arm_name)
    trained_on = cast(str, config.base_model_name_or_path)
    base_name = base_name or trained_on
    base = _base(base_name, dtype)
    tokenizer = _tokenizer(base_name)
    backbone, arm_tokenizer, vocabulary = base, tokenizer, None
    if not same_model(trained_on, base_name) and _is_readable(trained_on):
        backbone, arm_tokenizer = _base(trained_on, dtype), _tokenizer(trained_on)
        arm_tokenizer.chat_template = tokenizer.chat_template  # it judges what the base model reads
        if _vocabulary_size(backbone) != _vocabulary_size(base):
            vocabulary = Vocabulary(tokenizer, arm_tokenizer)
    elif not same_model(trained_on, base_name):
        logger.warning("%s was trained on %s, which is not here: it acts on %s.", arm_name, trained_on, base_name)
    arm = _attach(backbone, arm_name, base_name)
    return Models(base_name, arm_name, base, arm, list(config.objectives), tokenizer, arm_tokenizer, vocabulary)


def _adapter_config(name: str) -> PreferenceConfig:
    config: Any = _read(PeftConfig.from_pretrained, name, "adapter")
    if not isinstance(config, PreferenceConfig) or not config.objectives:
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise ValueError(
            f"The adapter {name!r} has no objectives: it is of type {kind}. The demo needs a preference-conditioned "
            "one: PBLORA, SVDLORA or MOSLORA."
        )
    return config


def _base(name: str, dtype: str) -> PreTrainedModel:
    model = _read(AutoModelForCausalLM.from_pretrained, name, "model", dtype=dtype)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _tokenizer(name: str) -> PreTrainedTokenizerBase:
    tokenizer = _read(AutoTokenizer.from_pretrained, name, "tokenizer")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _attach(backbone: PreTrainedModel, name: str, base_name: str) -> PeftModel:
    try:
        arm = PeftModel.from_pretrained(backbone, name, adapter_name=ADAPTER)
    except (RuntimeError, ValueError, KeyError) as error:
        raise ValueError(f"The adapter {name!r} does not fit the model {base_name!r}: {one_line(error)}") from None
    cast(Any, arm.base_model).set_adapter([])  # an adapter that is active by itself would act in the base model too
    return arm.eval()


def _read(load: Callable[..., Loaded], name: str, what: str, **arguments: Any) -> Any:
    try:
        return load(name, **arguments)
    except (OSError, ValueError, KeyError) as error:
        logger.debug("%s", error)
        raise ValueError(
            f"There is no {what} to read at {name!r}: neither in a folder of this name nor on the Hub, as far as it "
            f"can be reached ({one_line(error, 120)})."
        ) from None


def _is_readable(name: str) -> bool:
    try:
        AutoConfig.from_pretrained(name)
    except (OSError, ValueError):
        return False
    return True


def one_line(error: BaseException, most: int = 300) -> str:
    """An error's message in one line, cut if it is long."""
    text = " ".join(str(error).split())
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def _vocabulary_size(model: Any) -> int:
    return model.get_output_embeddings().weight.shape[0]
