# SPDX-License-Identifier: Apache-2.0
"""Model cards: a function of an adapter's configuration and of facts, such as data and measures, in its field `card`.

No save writes a card by itself: [`write_card`], [`add_results`], [`push_to_hub`] and a trainer do.
"""

from .citations import ADAPTER_PAPERS, CITATIONS
from .files import TEMPLATE, add_results, exported_card, hub_id, push_to_hub, save_card, write_card
from .text import FOLDER, MARK, PROMPT, CardFacts, Table, render


__all__ = [
    "ADAPTER_PAPERS", "CITATIONS", "CardFacts", "FOLDER", "MARK", "PROMPT", "TEMPLATE", "Table", "add_results",
    "exported_card", "hub_id", "push_to_hub", "render", "save_card", "write_card",
]  # fmt: skip
