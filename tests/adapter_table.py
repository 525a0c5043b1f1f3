# SPDX-License-Identifier: Apache-2.0
"""Every adapter: its settings, W(α) written out as a dense matrix, its scaling and parameters; a new one is a row."""

import itertools
from dataclasses import dataclass

import pytest
import torch
from conftest import tiny_llama
from peft import get_peft_model

from peft_pblora import MoSLoraConfig, PBLoraConfig, SVDLoraConfig
from peft_pblora.adapter import LowRankAdapter
from peft_pblora.condition import Condition


OBJECTIVES = ["helpful", "harmless", "humorous"]
FROZEN = [[0.1, -0.2, 0.3, 0.4, 0.5], [0.9, 0.0, -0.7, 0.2, 0.1], [0.0, 0.5, 0.5, -0.5, 0.3]]


def pblora_matrix(core, preference):
    """blockdiag(W1, Σ_i α_i mat(φ_i)), entry by entry."""
    matrix = torch.zeros(core.rank, core.rank, dtype=torch.float64)
    for i, j in itertools.product(range(core.r1), repeat=2):
        matrix[i, j] = core.W1[i, j]
    for i, j in itertools.product(range(core.r2), repeat=2):
        matrix[core.r1 + i, core.r1 + j] = sum(a * core.W2[n, i * core.r2 + j] for n, a in enumerate(preference))
    return matrix, torch.zeros(core.rank, dtype=torch.float64)


def svdlora_matrix(core, preference):
    """diag(σ_1..σ_r, c·α_1..c·α_k), entry by entry."""
    values = [*(core.sigma if core.sigma is not None else []), *(core.c[0] * a for a in preference)]
    matrix = torch.zeros(core.rank, core.rank, dtype=torch.float64)
    for i, value in enumerate(values):
        matrix[i, i] = value
    return matrix, torch.zeros(core.rank, dtype=torch.float64)


def moslora_matrix(core, preference):
    """diag(1 + γ) and δ with [γ, δ] = M Σ_i α_i o_i, entry by entry."""
    table = torch.eye(len(preference), dtype=torch.float64) if core.embeddings is None else core.embeddings
    mixed = [sum(a * table[n, d] for n, a in enumerate(preference)) for d in range(table.shape[1])]
    modulation = [sum(core.M[row, d] * value for d, value in enumerate(mixed)) for row in range(2 * core.rank)]
    matrix = torch.zeros(core.rank, core.rank, dtype=torch.float64)
    for i in range(core.rank):
        matrix[i, i] = 1 + modulation[i]
    return matrix, torch.stack(modulation[core.rank :])


@dataclass(frozen=True)
class Row:
    """An adapter in the table: how it is configured, its naive twin, its scaling and its parameters for (m, n)."""

    config: type
    settings: dict
    twin: callable
    scaling: float
    parameters: callable

    def settings_for(self, count: int) -> dict:
        """The settings for the first objectives, so many of them."""
        frozen = self.settings.get("objective_embeddings")
        return self.settings if frozen is None else {**self.settings, "objective_embeddings": frozen[:count]}


TABLE = {
    "pblora": Row(
        PBLoraConfig, {"r1": 2, "r2": 3, "lora_alpha": 6}, pblora_matrix, 2.0, lambda m, n: 5 * (m + n) + 4 + 27
    ),
    "pblora, r1=0": Row(
        PBLoraConfig, {"r1": 0, "r2": 3, "lora_alpha": 6}, pblora_matrix, 2.0, lambda m, n: 3 * (m + n) + 27
    ),
    "pblora, disjoint": Row(
        PBLoraConfig, {"r1": 0, "r2": 3, "lora_alpha": 6, "disjoint_start": True}, pblora_matrix, 2.0,
        lambda m, n: 3 * (m + n) + 27,
    ),
    "pblora, r2=0": Row(
        PBLoraConfig, {"r1": 2, "r2": 0, "lora_alpha": 6}, pblora_matrix, 3.0, lambda m, n: 2 * (m + n) + 4
    ),
    "svdlora": Row(SVDLoraConfig, {"r": 4, "lora_alpha": 6}, svdlora_matrix, 1.5, lambda m, n: 7 * (m + n) + 4 + 1),
    "svdlora, r=0": Row(SVDLoraConfig, {"r": 0, "lora_alpha": 6}, svdlora_matrix, 6.0, lambda m, n: 3 * (m + n) + 1),
    "moslora": Row(MoSLoraConfig, {"r": 4, "lora_alpha": 6}, moslora_matrix, 1.5, lambda m, n: 4 * (m + n) + 24),
    "moslora, embeddings": Row(
        MoSLoraConfig, {"r": 4, "lora_alpha": 6, "embedding_size": 2}, moslora_matrix, 1.5,
        lambda m, n: 4 * (m + n) + 16 + 6,
    ),
    "moslora, frozen embeddings": Row(
        MoSLoraConfig, {"r": 4, "lora_alpha": 6, "objective_embeddings": FROZEN}, moslora_matrix, 1.5,
        lambda m, n: 4 * (m + n) + 40,
    ),
}  # fmt: skip
every_adapter = pytest.mark.parametrize("row", TABLE.values(), ids=TABLE)


def make_adapter(row: Row, m: int, n: int, seed: int = 0) -> LowRankAdapter:
    torch.manual_seed(seed)
    config = row.config(objectives=OBJECTIVES, **row.settings)
    adapter = LowRankAdapter(
        n, m, config.build_core(), config.scaling, Condition(OBJECTIVES, config.initial_preference)
    )
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter)
    return adapter.double()


def make_model(row: Row, base=None, seed: int = 0, **changes):
    torch.manual_seed(seed)
    settings = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **row.settings, **changes}
    base = tiny_llama() if base is None else base
    model = get_peft_model(base, row.config(objectives=OBJECTIVES, **settings))
    for name, parameter in model.named_parameters():
        if ".B." in name or "core.M" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()
