# SPDX-License-Identifier: Apache-2.0
"""Model cards: what an adapter is, how to use it, and what it was made from.

A card is made from the adapter's configuration alone. What the configuration can't know, such as data and measures,
are the facts in its field `card`, which is saved and loaded with the adapter.
"""

from .citations import ADAPTER_PAPERS, CITATIONS
from .facts import CardFacts, Table, hub_id, versions
from .writing import FOLDER, add_results, exported_card, place_of_card, refresh_facts, render, store_card, write_card


__all__ = [
    "ADAPTER_PAPERS",
    "CITATIONS",
    "CardFacts",
    "FOLDER",
    "Table",
    "add_results",
    "exported_card",
    "hub_id",
    "place_of_card",
    "refresh_facts",
    "render",
    "store_card",
    "versions",
    "write_card",
]
