# SPDX-License-Identifier: Apache-2.0
"""The score models of Safe-RLHF (arXiv 2310.12773), loaded without their package or any remote code."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.utils import logging


FILES = ("model.safetensors", "pytorch_model.bin")
NORMALIZED = {"reward": "affine", "cost": "scale", "critic": "identity"}
"""What the kinds of score models do to a score where their configuration says `do_normalize`."""


class ScoreModel(nn.Module):
    """A transformer with a linear `score_head`, whose score is that of the last token.

        score = W h_last + b;  with `do_normalize`: (score − mean) / std for rewards, score / std for costs

    Their checkpoints hold the transformer as a causal language model's would, `score_head.weight` and perhaps
    `score_head.bias`, and perhaps running moments `normalizer.mean` and `normalizer.var`; their configuration has the
    keys `score_dim`, `score_type` and `do_normalize`. Beaver's reward is higher for better texts, its cost for worse.

    Args:
        backbone (`PreTrainedModel`): The transformer without head.
        head (`nn.Linear`): Its scores.
        mean, var (`torch.Tensor` of shape `(scores,)`, *optional*): Moments for normalisation.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        head: nn.Linear,
        mean: torch.Tensor | None = None,
        var: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.backbone, self.score_head = backbone, head
        self.config: Any = backbone.config
        self.config.num_labels = head.out_features
        self.mean, self.var = mean, var

    @classmethod
    def from_pretrained(cls, name: str, **kwargs: Any) -> ScoreModel:
        """Loads a checkpoint from a folder or the Hub.

        Raises:
            ValueError: a checkpoint without `score_head.weight`.
        """
        config = AutoConfig.from_pretrained(name)
        tensors = _read_tensors(name, ("score_head.", "normalizer."))
        weight, bias = tensors.get("score_head.weight"), tensors.get("score_head.bias")
        if weight is None:
            raise ValueError(f"{name!r} is no score model of Safe-RLHF: its checkpoint has no `score_head.weight`.")
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # which would list the head as unexpected
        try:
            backbone = AutoModel.from_pretrained(name, **kwargs)
        finally:
            logging.set_verbosity(verbosity)
        head = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        head.weight.data = weight.to(backbone.dtype)
        if bias is not None:
            head.bias.data = bias.to(backbone.dtype)
        return cls(backbone, head.to(backbone.device), *_moments(config, tensors))

    @property
    def device(self) -> torch.device:
        return self.score_head.weight.device

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        """Scores of shape `(rows, scores)`, as `logits` of the answer, for texts padded on either side."""
        hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        places = torch.arange(attention_mask.shape[1], device=attention_mask.device)
        last = (attention_mask * places).argmax(-1).to(hidden.device)
        end = hidden[torch.arange(len(hidden), device=hidden.device), last]
        scores = self.score_head(end.to(self.score_head.weight)).float()
        if self.mean is not None and self.var is not None:
            kind = NORMALIZED[getattr(self.config, "score_type", "reward")]
            scale = self.var.to(scores).sqrt() + 1e-8
            shift = self.mean.to(scores) if kind == "affine" else 0.0
            scores = scores if kind == "identity" else (scores - shift) / scale
        return SimpleNamespace(logits=scores)


def _moments(config: Any, tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Mean and variance, of the checkpoint or else of the configuration; `None` where scores are raw."""
    if not getattr(config, "do_normalize", False):
        return None, None
    found = []
    for name, neutral in (("mean", 0.0), ("var", 1.0)):
        value = tensors.get(f"normalizer.{name}")
        given = getattr(config, name, None)
        found.append(torch.tensor(neutral if given is None else given) if value is None else value)
    return found[0], found[1]


def _read_tensors(name: str, prefixes: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, in one file or in shards, whose names begin so."""
    for file in FILES:
        index = _find(name, f"{file}.index.json")
        if index is not None:
            shards = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
            names = sorted({shard for key, shard in shards.items() if key.startswith(prefixes)})
            paths = [_find(name, shard) for shard in names]
        else:
            paths = [_find(name, file)]
        if all(paths) and paths:
            return {key: value for path in paths for key, value in _read_file(str(path), prefixes).items()}
    return {}


def _find(name: str, file: str) -> str | None:
    """The path of a checkpoint's file, downloaded if need be; `None` if there is none."""
    if Path(name).is_dir():
        path = Path(name) / file
        return str(path) if path.exists() else None
    try:
        return hf_hub_download(name, file)
    except EntryNotFoundError:
        return None


def _read_file(path: str, prefixes: tuple[str, ...]) -> dict[str, torch.Tensor]:
    if path.endswith(".safetensors"):
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys() if key.startswith(prefixes)}  # noqa: SIM118
    tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return {key: value.clone() for key, value in tensors.items() if key.startswith(prefixes)}
