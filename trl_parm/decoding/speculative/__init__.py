# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding of a guided distribution, for batches."""

from .decoding import SpeculativeDecoding


__all__ = ["SpeculativeDecoding"]
