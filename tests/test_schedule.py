"""The grid: which rounds are due when, and until when answers are taken."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from condor_lite.game.entities import Setting
from condor_lite.game.schedule import bit_reversal_offset_s, deadline_s, due, next_due

HOURLY = Setting("BTC", 86400, 300, interval_s=3600)
GRIDS = st.builds(
    lambda interval_s, offset_s: Setting("BTC", 3600, 60, interval_s=interval_s, offset_s=offset_s),
    st.integers(1, 90_000),
    st.integers(0, 90_000),
)
TIMES = st.one_of(st.integers(0, 2_000_000_000), st.floats(0, 2e9))


def test_assets_are_spread_over_the_interval_by_bit_reversal():
    fractions = [bit_reversal_offset_s(place, 3600, 1) / 3600 for place in range(8)]
    assert fractions == [0, 0.5, 0.25, 0.75, 0.125, 0.625, 0.375, 0.875]


def test_offsets_are_rounded_down_to_the_tick():
    assert [bit_reversal_offset_s(place, 720, 60) for place in range(5)] == [0, 360, 180, 540, 60]


@given(st.integers(0, 10_000), st.integers(1, 90_000), st.integers(1, 3600))
def test_an_offset_is_a_tick_inside_the_interval(place, interval_s, tick_s):
    offset_s = bit_reversal_offset_s(place, interval_s, tick_s)
    assert 0 <= offset_s < interval_s
    assert offset_s % tick_s == 0


@pytest.mark.parametrize("wrong", [(-1, 60, 1), (0, 0, 1), (0, 60, 0)])
def test_an_offset_of_nonsense_is_refused(wrong):
    with pytest.raises(ValueError, match="must be"):
        bit_reversal_offset_s(*wrong)


def test_rounds_fall_on_multiples_of_the_interval_plus_the_offset():
    setting = Setting("ETH", 3600, 60, interval_s=720, offset_s=360)
    assert due(setting, 0, 2000) == [360, 1080, 1800]


def test_the_start_is_excluded_and_the_end_included():
    assert due(HOURLY, 3600, 7200) == [7200]
    assert due(HOURLY, 3599.5, 7199.5) == [3600]
    assert due(HOURLY, 7200, 7200) == []
    assert due(HOURLY, 7200, 3600) == []


def test_a_setting_that_is_no_longer_asked_is_never_due():
    assert due(Setting("BTC", 3600, 60), 0, 1e9) == []


@given(GRIDS, TIMES, st.floats(0, 1e6), st.floats(0, 1))
def test_no_round_is_lost_or_repeated_wherever_the_time_is_cut(setting, after_s, length_s, cut):
    until_s = after_s + length_s
    middle_s = after_s + cut * length_s
    whole = due(setting, after_s, until_s)
    assert due(setting, after_s, middle_s) + due(setting, middle_s, until_s) == whole
    assert all(after_s < at_s <= until_s for at_s in whole)
    assert all((at_s - setting.offset_s) % setting.interval_s == 0 for at_s in whole)
    assert abs(len(whole) - length_s / setting.interval_s) <= 1


@given(st.lists(GRIDS, min_size=1, max_size=5), TIMES)
def test_the_next_time_is_the_first_that_any_setting_is_due(grids, after_s):
    next_s = next_due(grids, after_s)
    assert next_s > after_s
    assert any(due(setting, after_s, next_s) == [next_s] for setting in grids)
    assert not any(due(setting, after_s, next_s - 1) for setting in grids)


def test_the_next_time_ignores_settings_that_are_not_asked():
    assert next_due([Setting("BTC", 3600, 60), HOURLY], 1) == 3600
    with pytest.raises(ValueError, match="nothing is ever due"):
        next_due([Setting("BTC", 3600, 60)], 0)


@pytest.mark.parametrize(
    ("zone", "day"),
    [("Europe/Berlin", (2026, 3, 29)), ("Europe/Berlin", (2026, 10, 25)), ("UTC", (2026, 12, 31))],
)
def test_clock_changes_and_midnight_shift_nothing(zone, day):
    noon = datetime(*day, 12, tzinfo=ZoneInfo(zone)).astimezone(UTC).timestamp()
    times = due(HOURLY, noon - 86400, noon + 86400)
    assert len(times) == 48
    assert {later - earlier for earlier, later in pairwise(times)} == {3600}


@pytest.mark.parametrize(
    ("step_s", "interval_s", "timeout_s", "allowed_s"),
    [(60, 720, 50.0, 50.0), (10, 20, 50.0, 10.0), (300, 60, 120.0, 60.0), (300, 0, 50.0, 50.0)],
)
def test_answers_are_taken_until_time_out_step_or_interval(step_s, interval_s, timeout_s, allowed_s):
    setting = Setting("BTC", 3600, step_s, interval_s=interval_s)
    assert math.isclose(deadline_s(1_000_000, setting, timeout_s), 1_000_000 + allowed_s)
