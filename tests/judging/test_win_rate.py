import math

import pytest

from dpo_lightning.judging.win_rate import win_rate


def test_the_interval_is_wilsons():
    rate = win_rate(7, 3, 0)  # R: prop.test(7, 10, correct = FALSE)
    assert (rate.rate, rate.low, rate.high) == pytest.approx((0.7, 0.3967781, 0.8922087), abs=1e-7)
    assert not rate.decided and win_rate(70, 30, 0).decided and win_rate(30, 70, 0).decided


def test_a_tie_is_half_a_win_for_both():
    ours, theirs = win_rate(5, 2, 4), win_rate(2, 5, 4)
    assert ours.rate == 7 / 11 and ours.rate + theirs.rate == 1
    assert ours.low == pytest.approx(1 - theirs.high) and ours.ties == 4
    assert win_rate(0, 0, 9).rate == 0.5 and not win_rate(0, 0, 9).decided


def test_the_ends_stay_in_the_unit_interval():
    assert win_rate(20, 0, 0).high == pytest.approx(1) and 0.8 < win_rate(20, 0, 0).low < 1
    assert win_rate(0, 20, 0).low == pytest.approx(0)
    nothing = win_rate(0, 0, 0)
    assert math.isnan(nothing.rate) and (nothing.low, nothing.high) == (0, 1) and not nothing.decided
