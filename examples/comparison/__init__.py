# SPDX-License-Identifier: Apache-2.0
"""The comparison of `reproduce_small.py`: every method trained and judged alike, in pieces that are kept."""
