# SPDX-License-Identifier: Apache-2.0
"""Gradient checkpointing with a preference that changes: what would give wrong gradients is refused."""

import torch


class PendingForwards:
    """Which preferences the forwards had whose backward is still to come.

    Gradient checkpointing repeats a forward in backward. With another preference it would compute other activations
    than the loss came from, and gradients that are wrong without any error, so that is refused.
    """

    def __init__(self) -> None:
        self.versions: set[int] = set()
        self.repeated = False

    def check(self, version: int) -> None:
        """Notes a forward at the preference of this version, or raises `RuntimeError` for a wrong repetition."""
        if torch._C._current_graph_task_id() == -1:
            if self.repeated:
                self.versions.clear()
                self.repeated = False
            if len(self.versions) < 2:
                self.versions.add(version)
        elif self.versions - {version}:
            raise RuntimeError(
                "The preference was changed between a forward and its backward, but gradient checkpointing repeats "
                "the forward in backward. Set the preference before the forward and leave it until backward is "
                "done; with several preferences in one step, run backward for each before the next forward."
            )
        else:
            self.repeated = True
