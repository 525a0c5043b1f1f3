# SPDX-License-Identifier: Apache-2.0
"""The score models of Safe-RLHF (arXiv 2310.12773), loaded without their package or any remote code."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers import initialization as init


NORMALIZED = {"reward": "affine", "cost": "scale", "critic": "identity"}
"""What the kinds of score models do to a score where their configuration says `do_normalize`."""
NEUTRAL = {"mean": 0.0, "var": 1.0}


class ScoreModel(PreTrainedModel):
    """A transformer with a linear `score_head`, whose score is that of the last token.

        score = W h_last + b;  with `do_normalize`: (score − mean) / std for rewards, score / std for costs

    Their checkpoints hold the transformer as a causal language model's would, `score_head.weight` and perhaps
    `score_head.bias`, and perhaps running moments `normalizer.mean` and `normalizer.var`; their configuration has the
    keys `score_dim`, `score_type` and `do_normalize`. Beaver's reward is higher for better texts, its cost for worse.

    Args:
        config (`PreTrainedConfig`): Of the transformer, with those keys.
    """

    _supports_sdpa = _supports_flash_attn = True
    _keep_in_fp32_modules_strict = {"normalizer"}
    _keys_to_ignore_on_load_missing = [r"score_head\.bias", r"normalizer\."]
    _keys_to_ignore_on_load_unexpected = [r"lm_head\.", r"normalizer\.count"]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        backbone: Any = AutoModel.from_config(config)
        self.base_model_prefix = backbone.base_model_prefix
        setattr(self, self.base_model_prefix, backbone)
        config.num_labels = getattr(config, "score_dim", 1)
        self.score_head = nn.Linear(config.get_text_config().hidden_size, config.num_labels)
        moments = {name: torch.zeros(config.num_labels) for name in NEUTRAL}
        self.normalizer = nn.ParameterDict({name: nn.Parameter(value, False) for name, value in moments.items()})
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """What a checkpoint lacks: no bias, and the moments that the configuration has."""
        super()._init_weights(module)
        for name, neutral in NEUTRAL.items() if module is self.normalizer else ():
            given = getattr(self.config, name, None)
            init.copy_(self.normalizer[name], torch.tensor(neutral if given is None else given))

    @classmethod
    def from_pretrained(cls, name: str, **kwargs: Any) -> ScoreModel:
        """Loads a checkpoint from a folder or the Hub.

        Raises:
            ValueError: a checkpoint without `score_head.weight`.
        """
        config: Any = AutoConfig.from_pretrained(name)
        found = super().from_pretrained(name, config=config, output_loading_info=True, **kwargs)
        model, missing = cast(Any, found)[0], cast(Any, found)[1]["missing_keys"]
        if "score_head.weight" in missing:
            raise ValueError(f"{name!r} is no score model of Safe-RLHF: its checkpoint has no `score_head.weight`.")
        return model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        """Scores of shape `(rows, scores)`, as `logits` of the answer, for texts padded on either side."""
        backbone = getattr(self, self.base_model_prefix)
        hidden = backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        places = torch.arange(attention_mask.shape[1], device=attention_mask.device)
        last = (attention_mask * places).argmax(-1).to(hidden.device)
        end = hidden[torch.arange(len(hidden), device=hidden.device), last]
        scores = self.score_head(end.to(self.score_head.weight)).float()
        kind = NORMALIZED[getattr(self.config, "score_type", "reward")]
        if getattr(self.config, "do_normalize", False) and kind != "identity":
            shift = self.normalizer["mean"].to(scores) if kind == "affine" else 0.0
            scores = (scores - shift) / (self.normalizer["var"].to(scores).sqrt() + 1e-8)
        return SimpleNamespace(logits=scores)
