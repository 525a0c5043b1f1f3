# SPDX-License-Identifier: Apache-2.0
"""The only place that imports names which TRL does not promise to keep."""

from trl.data_utils import common_prefix_length
from trl.models.activation_offloading import get_act_offloading_ctx_manager
from trl.trainer.base_config import _BaseConfig as BaseConfig
from trl.trainer.base_trainer import _BaseTrainer as BaseTrainer
from trl.trainer.utils import create_model_from_path, disable_dropout_in_model, get_config_model_id, pad


__all__ = [
    "BaseConfig",
    "BaseTrainer",
    "common_prefix_length",
    "create_model_from_path",
    "disable_dropout_in_model",
    "get_act_offloading_ctx_manager",
    "get_config_model_id",
    "pad",
]
