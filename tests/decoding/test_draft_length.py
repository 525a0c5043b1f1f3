# SPDX-License-Identifier: Apache-2.0
"""How many tokens are drafted: good drafts grow, bad ones cost little."""

import pytest

from trl_parm.decoding.speculative.draft_length import LONGEST_PAUSE, REMEASURE, DraftLength


def rounds(length: DraftLength, count: int, drafting: float, plain: float, accepted: float, window: float = 0.0):
    """Feeds times and acceptances to a controller; returns what it drafted."""
    drafted = []
    for _ in range(count):
        n = length.next()
        kept = n if accepted == 1 else 0
        if 0 < accepted < 1:
            kept = min(n, int(accepted / (1 - accepted)))
        length.record(n, kept, min(kept + 1, n), n * drafting, plain + n * window)
        drafted.append(n)
    return drafted


def test_good_drafts_grow_and_bad_ones_are_switched_off():
    assert rounds(DraftLength(8), 60, 0.05, 1.0, 1.0)[-5:] == [8] * 5
    assert rounds(DraftLength(4), 60, 0.05, 1.0, 1.0)[-1] == 4
    middling = rounds(DraftLength(8), 60, 0.1, 1.0, 0.7)[-10:]
    assert all(1 <= n <= 4 for n in middling)
    bad = rounds(DraftLength(8), 400, 0.3, 1.0, 0.0)
    assert sum(n > 0 for n in bad) <= 16
    dear = rounds(DraftLength(8), 400, 1.2, 1.0, 1.0)
    assert sum(n > 0 for n in dear) <= 16


@pytest.mark.parametrize(("count", "drafting", "window"), [(600, 0.3, 0.0), (96, 0.3, 0.15), (96, 0.1, 0.4)])
def test_drafting_that_never_fits_costs_less_than_a_twentieth(count, drafting, window):
    """Tokens whose drafts are always wrong: a draft costs a share of a step, and so does each in the window judged."""
    length, seconds, tokens = DraftLength(8), 0.0, 0
    while tokens < count:
        n = length.next()
        length.record(n, 0, min(1, n), n * drafting, 1.0 + n * window)
        seconds, tokens = seconds + n * (drafting + window) + 1.0, tokens + 1
    assert seconds < count / 0.95


def test_drafts_that_begin_to_fit_are_found():
    length = DraftLength(8)
    rounds(length, 60, 0.05, 1.0, 0.0, 0.05)
    assert rounds(length, 400, 0.05, 1.0, 1.0, 0.05).count(8) > 250


def test_pauses_grow_up_to_a_limit_and_plain_steps_are_timed_again():
    bad = rounds(DraftLength(8), 3000, 0.3, 1.0, 0.0)
    tries = [i for i in range(1, len(bad)) if bad[i] and not bad[i - 1]]
    gaps = [b - a for a, b in zip(tries, tries[1:])]
    assert gaps == sorted(gaps)
    assert gaps[-1] <= LONGEST_PAUSE + 2
    good = rounds(DraftLength(8), 3 * REMEASURE, 0.05, 1.0, 1.0)[2:]
    assert 1 <= sum(n == 0 for n in good) <= 3


def test_a_fixed_length_is_kept():
    assert rounds(DraftLength(8, fixed=5), 10, 9.0, 1.0, 0.0) == [0] + [5] * 9
