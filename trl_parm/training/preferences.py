# SPDX-License-Identifier: Apache-2.0
"""Which preferences training sees: drawn by a counter-based generator, so there is no state to store."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from peft_pblora import as_preference, name_preference, sample_preferences


class PreferenceSampler:
    """Draws α for an optimisation step, or for each of its pairs, as a pure function of counters.

    A draw depends on the seed, the number of optimisation steps done, and, for a draw of its own for every pair, on
    the pair's number in its data. Nothing else enters: no rank, no position in a batch, no global generator. So all
    ranks and all micro-batches of a step share one preference, or each pair gets the same one whichever rank it falls
    to; resuming, another number of processes, and gradient accumulation change nothing.

    Args:
        seed (`int`): The run's seed.
        objectives (`Sequence[str]`): The k objective names.
        concentration (`float`): Parameter p of Dirichlet(p·1_k) (PARM, arXiv 2505.06274).
        choices (`Sequence[torch.Tensor]`, *optional*):
            What to draw from with equal chances, in the place of the Dirichlet distribution: one entry fixes α, one
            that is there twice is drawn twice as often.
    """

    def __init__(
        self, seed: int, objectives: Sequence[str], concentration: float, choices: Sequence[torch.Tensor] = ()
    ) -> None:
        self.seed, self.objectives, self.concentration, self.choices = seed, objectives, concentration, choices

    def for_step(self, step: int) -> torch.Tensor:
        """α of an optimisation step, shape `(k,)`, float32; `step` is the number of steps done before it."""
        return self._draw(self.seed, step)

    def for_pairs(self, step: int, pair_ids: torch.Tensor) -> torch.Tensor:
        """α of each pair of a step, shape `(pairs, k)`, float32, for ids of shape `(pairs,)`."""
        return torch.stack([self._draw(self.seed, step, number) for number in pair_ids.tolist()])

    def _draw(self, *counters: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(mix(*counters))
        if not self.choices:
            return sample_preferences(1, self.objectives, self.concentration, generator)[0]
        return self.choices[int(torch.randint(len(self.choices), (), generator=generator))]


def read_preferences(argument: str, given: Sequence, objectives: list[str]) -> list[tuple[str, torch.Tensor]]:
    """Preferences of an argument with their names. Raises `ValueError` and `TypeError` as [`as_preference`] does."""
    found = []
    for preference in given:
        try:
            found.append((name_preference(preference, objectives), as_preference(preference, objectives)))
        except (TypeError, ValueError) as error:
            raise type(error)(f"`{argument}` has {preference!r}. {error}") from None
    return found


def eval_preferences(given: Sequence | None, objectives: list[str]) -> dict[str, torch.Tensor]:
    """Preferences by name: the given ones, or the vertices and the uniform vector."""
    if given is None:
        given = torch.eye(len(objectives)).tolist()
        if len(objectives) > 1:
            given.append([1 / len(objectives)] * len(objectives))
    return dict(read_preferences("eval_preferences", given, objectives))


def mix(*counters: int) -> int:
    """Hashes integers to a seed below 2⁶³ with the finaliser of splitmix64, so that neighbours are unrelated."""
    mask = (1 << 64) - 1
    z = 0
    for counter in counters:
        z = (z + counter + 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        z ^= z >> 31
    return z >> 1
