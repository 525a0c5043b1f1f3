# SPDX-License-Identifier: Apache-2.0
"""Configuration of [`PreferenceARMTrainer`]."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers.utils import is_torch_bf16_gpu_available

from .compat import BaseConfig


@dataclass
class PreferenceARMConfig(BaseConfig):
    """Training arguments of an autoregressive reward model, beside all of `transformers.TrainingArguments`.

    Where a default differs from `TrainingArguments` it is the one of TRL's trainers (`logging_steps=10`,
    `gradient_checkpointing=True`, bf16 where the device has it and fp16 is not set) or of the authors' PARM script,
    as said below.

    Args:
        beta (`float` or `dict[str, float]`, *optional*, defaults to 0.01):
            β_i of the pair loss, positive; one for all objectives or one by name. The default is the one of PARM's
            safety task (arXiv 2505.06274).
        concentration (`float`, *optional*, defaults to 0.5):
            Dirichlet parameter of the preference that each step draws (PARM's safety task: 0.5).
        eval_preferences (`list`, *optional*):
            Preferences to evaluate at, each by name or as a vector. The vertices and the uniform vector if not given.
        max_length (`int`, *optional*, defaults to 1024):
            Most tokens of prompt and response together. Longer pairs are left out and counted in the log; a response
            is never cut, since summed log-probabilities would favour the cut one. `None` keeps all.
        learning_rate (`float`, *optional*, defaults to 5e-4): As in PARM and GenARM.
        model_init_kwargs (`dict`, *optional*): For `from_pretrained` where the trainer gets a model id.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Passed on to `from_pretrained`.
        pad_to_multiple_of (`int`, *optional*): Round batch lengths up.
    """

    _VALID_DICT_FIELDS = BaseConfig._VALID_DICT_FIELDS + ["model_init_kwargs"]

    learning_rate: float = field(default=5e-4, metadata={"help": "Initial learning rate of AdamW."})
    beta: Any = field(default=0.01, metadata={"help": "β_i of the pair loss: a number, or a mapping by objective."})
    concentration: float = field(default=0.5, metadata={"help": "Dirichlet parameter of the sampled preference."})
    eval_preferences: list[Any] | None = field(
        default=None, metadata={"help": "Preferences to evaluate at; vertices and uniform if not given."}
    )
    max_length: int | None = field(default=1024, metadata={"help": "Longer pairs are left out."})
    model_init_kwargs: dict | str | None = field(default=None, metadata={"help": "For from_pretrained."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Passed on to from_pretrained."})
    pad_to_multiple_of: int | None = field(default=None, metadata={"help": "Round batch lengths up."})

    def __post_init__(self) -> None:
        if self.bf16 is None and not self.fp16:
            # TRL's default of True is an error on a machine without a bf16 device.
            self.bf16 = self.use_cpu or is_torch_bf16_gpu_available()
        super().__post_init__()
        if self.concentration <= 0:
            raise ValueError(f"`concentration` is {self.concentration}, but it must be positive.")
        betas = self.beta.values() if isinstance(self.beta, dict) else [self.beta]
        if not all(beta > 0 for beta in betas):
            raise ValueError(f"`beta` is {self.beta}, but every β must be positive.")

    def betas(self, objectives: list[str]) -> list[float]:
        """β_i in the order of `objectives`. Raises `ValueError` if a mapping does not name exactly these."""
        if not isinstance(self.beta, dict):
            return [float(self.beta)] * len(objectives)
        if set(self.beta) != set(objectives):
            raise ValueError(f"`beta` names the objectives {sorted(self.beta)}, but they are {sorted(objectives)}.")
        return [float(self.beta[name]) for name in objectives]
