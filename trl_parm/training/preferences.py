# SPDX-License-Identifier: Apache-2.0
"""Which preference each training step sees: drawn by a counter-based generator, so there is no state to store."""

from collections.abc import Sequence

import torch

from peft_pblora import sample_preferences


def step_preference(seed: int, step: int, objectives: Sequence[str], concentration: float) -> torch.Tensor:
    """α of one optimisation step, a pure function of `(seed, step)`.

    All ranks and all micro-batches of a step share it, so neither resuming nor the number of processes nor gradient
    accumulation changes the sequence, and torch's global generator is left alone.

    Args:
        seed (`int`): The run's seed.
        step (`int`): Number of optimisation steps done before this one.
        objectives (`Sequence[str]`): The k objective names.
        concentration (`float`): Dirichlet parameter.

    Returns:
        `torch.Tensor` of shape `(k,)`, float32.
    """
    generator = torch.Generator().manual_seed(_mix(seed, step))
    return sample_preferences(1, objectives, concentration, generator)[0]


def _mix(seed: int, step: int) -> int:
    """splitmix64 of the pair: nearby seeds and steps give unrelated generators."""
    mask = (1 << 64) - 1
    z = (seed * 0x9E3779B97F4A7C15 + step * 0xD1B54A32D192ED03 + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return (z ^ (z >> 31)) >> 1
