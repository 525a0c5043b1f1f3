# SPDX-License-Identifier: Apache-2.0
"""The demo's models: a frozen base and one preference-conditioned adapter, on the base itself where that can be."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_pblora import PreferenceConfig
from peft_pblora.loading import named_base
from trl_parm.evaluation.models import Guide, adapter_config, canonical, is_readable
from trl_parm.evaluation.models import Models as Loader


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Models:
    """What the demo decodes with: the frozen base model that generates, its tokenizer with a pad token, and the reward
    model, whose adapter acts where it is asked for and nowhere else, with the adapter's objectives."""

    base_name: str
    arm_name: str
    base: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    arm: Guide
    objectives: list[str]


def load_models(arm_name: str, base_name: str | None = None, dtype: str = "auto") -> Models:
    """Loads the demo's models, from folders or by ids on the Hub; to the GPU if there is one.

    The adapter is put on the base model if it was trained on it, or if the model that it was trained on can't be
    read, or it names none: a folder of the machine where it was trained says nothing elsewhere. Otherwise that model
    is loaded too.

    Args:
        arm_name (`str`): The adapter.
        base_name (`str`, *optional*): The base model; the one that the adapter was trained on if not given, which it
            must name then.
        dtype (`str`, *optional*, defaults to `"auto"`): Of the weights; as they were saved if not given. On a CPU they
            are packed, see [`trl_parm.cpu.optimize_loaded`].

    Raises:
        ValueError: something is missing, can't be read or does not fit, or the adapter has no objectives; in one line.
    """
    config = adapter_config(arm_name)
    if not isinstance(config, PreferenceConfig) or not config.objectives:
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise ValueError(
            f"The adapter {arm_name!r} has no objectives: it is of type {kind}. The demo needs a "
            "preference-conditioned one: PBLORA, SVDLORA or MOSLORA."
        )
    base_name = base_name or named_base(arm_name, config, ", or give the base model (`--model`)")
    trained_on = backbone = config.base_model_name_or_path
    if not trained_on:
        logger.warning("%s names no base model: it acts on %s.", arm_name, base_name)
        backbone = base_name
    elif canonical(trained_on) != canonical(base_name) and not is_readable(trained_on):
        logger.warning("%s was trained on %s, which is not here: it acts on %s.", arm_name, trained_on, base_name)
        backbone = base_name
    models = Loader(base_name, dtype, optimize=True)
    arm = models.guide(arm_name, backbone=backbone)
    arm.tokenizer.chat_template = models.tokenizer.chat_template  # it judges what the base model reads
    return Models(base_name, arm_name, models.base, models.tokenizer, arm, list(config.objectives))
