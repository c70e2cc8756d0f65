"""The edges of SCORING.md: half of the segments, midnight, days on which clocks change, missing segments."""

from __future__ import annotations

import time
from datetime import datetime
from zoneinfo import ZoneInfo

import numpy as np
import pytest

from condor_lite.game.density import Limits, decode
from condor_lite.game.entities import Setting, Window
from condor_lite.game.outcome import Realised, Series, realise
from condor_lite.game.schedule import due
from condor_lite.game.scoring import Rules, score
from condor_lite.game.windows import window_start_s

MINUTES = Setting("BTC", 600, 60, interval_s=300)
MIDNIGHT_S = 1_700_006_400  # 2023-11-15T00:00:00Z
# The hours around which clocks change, there and back again, in places that do it at different times.
CHANGES = [
    int(datetime(*day, tzinfo=ZoneInfo(zone)).timestamp())
    for zone, *days in (
        ("Europe/Berlin", (2026, 3, 29), (2026, 10, 25)),
        ("America/New_York", (2026, 3, 8), (2026, 11, 1)),
        ("Australia/Lord_Howe", (2026, 4, 5), (2026, 10, 4)),
    )
    for day in days
]


def outcome(at_s: int, missing: tuple[int, ...] = ()) -> Realised:
    """Ten segments of a minute with a price at each end but those `missing`; the price rises by 1 bp each."""
    ends = [at for at in range(11) if at not in missing]
    series = Series(
        np.array([at_s + 60 * at for at in ends], np.int64), np.array([100.0 * 1.0001**at for at in ends])
    )
    return realise(series, MINUTES, at_s, 60, "log_return")


@pytest.mark.parametrize("zone", ["UTC", "Europe/Berlin", "America/New_York", "Asia/Kathmandu"])
@pytest.mark.parametrize("at_s", CHANGES)
def test_windows_are_whole_hours_of_utc_wherever_clocks_change(
    zone: str, at_s: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        for hours in range(-30, 31):
            now_s = at_s + hours * 3600 + 1799
            for window in Window:
                start_s = window_start_s(window, now_s)
                assert start_s % 3600 == 0
                assert window.hours * 3600 <= now_s - start_s < (window.hours + 1) * 3600
            assert len(due(MINUTES, now_s, now_s + 86400)) == 288
    finally:
        monkeypatch.undo()
        time.tzset()


def test_a_round_across_midnight_is_like_any_other() -> None:
    across, midday = outcome(MIDNIGHT_S - 300), outcome(MIDNIGHT_S - 43_200)
    assert across.resolved == 10
    assert across.increments == pytest.approx(midday.increments, rel=1e-12)
    assert across.no_move == pytest.approx(midday.no_move)


def test_a_missing_price_costs_the_two_segments_that_it_bounds() -> None:
    one = outcome(MIDNIGHT_S, missing=(4,))
    assert np.flatnonzero(np.isnan(one.increments)).tolist() == [3, 4]
    assert one.resolved == 8


def test_half_of_the_segments_are_enough_and_fewer_are_not() -> None:
    exactly = outcome(MIDNIGHT_S, missing=(1, 3, 10))
    assert (exactly.resolved, exactly.void_reason) == (5, None)
    fewer = outcome(MIDNIGHT_S, missing=(1, 3, 6))
    assert fewer.resolved == 4
    assert str(fewer.void_reason).startswith("prices resolve only 4 of 10 segments")


def test_a_missing_segment_is_left_out_for_every_model_alike() -> None:
    whole, gap = outcome(MIDNIGHT_S), outcome(MIDNIGHT_S, missing=(4,))
    rules = Rules()
    for scale in (1e-4, 1e-3):
        body = b'[{"type":"builtin","name":"norm","params":{"scale":%b}}]' % str(scale).encode()
        answer = b"[" + b",".join([body[1:-1]] * 10) + b"]"
        densities = decode(answer, MINUTES, Limits(16, 2048))
        with_all, without = score([(densities, whole), (densities, gap)], rules)
        assert np.isnan(without.values[[3, 4]]).all()
        # Each increment is the same here, and so is each segment's score: the mean does not change.
        assert without.raw == pytest.approx(with_all.raw, rel=1e-9)


def test_a_price_that_did_not_change_resolves_its_segment() -> None:
    series = Series(MIDNIGHT_S + 60 * np.arange(11, dtype=np.int64), np.full(11, 100.0))
    still = realise(series, MINUTES, MIDNIGHT_S, 60, "log_return")
    assert (still.resolved, still.no_move) == (10, 0.0)
    assert (still.increments == 0).all()
