"""Recorded prices: what a CSV may look like, what is refused, and where a game starts and ends."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import numpy as np
import pytest

from condor_lite.errors import ConfigError
from condor_lite.prices.replay import ReplaySource, read_recording
from tests.prices import recorded

T = 1_677_628_800  # 2023-03-01 00:00 UTC
HOUR_S = 3600


def write(folder: Path, text: str, asset: str = "BTC") -> Path:
    path = folder / f"{asset}.csv"
    path.write_text(text, encoding="utf-8")
    return path


def minutes(folder: Path, asset: str, first_s: int, count: int) -> None:
    rows = "".join(f"{first_s + 60 * k},{100 + k}\n" for k in range(count))
    write(folder, "timestamp,close\n" + rows, asset)


def rows(path: Path, tick_s: int = 60) -> list[tuple[int, float]]:
    recording = read_recording(path, tick_s)
    return list(zip(recording.ts_s.tolist(), recording.price.tolist(), strict=True))


def problems(path: Path, tick_s: int = 60) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read_recording(path, tick_s)
    return caught.value.problems


def test_rows_in_any_order_with_duplicates_and_more_columns(tmp_path: Path) -> None:
    lines = [
        f"{T + 60},1,2,3,10.5,7",
        f"{T + 120},1,2,3,11.5,7",
        f"{T + 120},1,2,3,11.5,7",
        f"{T},1,2,3,9.5,7",
    ]
    random.Random(1).shuffle(lines)
    path = write(
        tmp_path, "\ufeffTimestamp, open,high,low,Close,volume\r\n" + "\r\n".join(lines) + "\r\n\r\n"
    )
    assert rows(path) == [(T, 9.5), (T + 60, 10.5), (T + 120, 11.5)]


def test_of_two_prices_for_one_time_the_later_row_counts(tmp_path: Path) -> None:
    path = write(tmp_path, f"timestamp,close\n{T},1\n{T + 60},2\n{T},3\n")
    assert rows(path) == [(T, 3.0), (T + 60, 2.0)]


def test_times_as_numbers_and_iso(tmp_path: Path) -> None:
    stamps = [
        str(T),
        f"{T + 60}.0",
        "2023-03-01T00:02:00Z",
        "2023-03-01 00:03:00",
        "2023-03-01T01:04:00+01:00",
    ]
    path = write(tmp_path, "timestamp,close\n" + "".join(f"{stamp},1\n" for stamp in stamps))
    assert [ts_s for ts_s, _ in rows(path)] == [T + 60 * k for k in range(5)]


def test_finer_recordings_are_put_on_the_grid_without_looking_ahead(tmp_path: Path) -> None:
    text = "".join(f"{T + k},{100 + k}\n" for k in range(0, 150, 10))
    path = write(tmp_path, "timestamp,close\n" + text)
    assert rows(path) == [(T, 100.0), (T + 60, 160.0), (T + 120, 220.0)]
    off_grid = write(
        tmp_path, f"timestamp,close\n{T + 0.5},1\n{T + 59.2},2\n{T + 61},3\n{T + 119},4\n{T + 120},5\n"
    )
    assert rows(off_grid) == [(T + 60, 2.0), (T + 120, 5.0)]


def test_bad_rows_are_named_by_file_and_line(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        f"timestamp,close\n{T},1\nyesterday,1\n{T + 60},\n{T + 120},nan\n{T + 180},-3\n{T + 240}\n",
    )
    assert problems(path) == [
        f"{path}:3: timestamp 'yesterday' is neither Unix seconds nor an ISO time",
        f"{path}:4: close '' is not a number",
        f"{path}:5: close 'nan' is not a price above 0",
        f"{path}:6: close '-3' is not a price above 0",
        f"{path}:7: has 1 columns, the header 2",
    ]


def test_a_file_full_of_bad_rows_is_told_in_few_lines(tmp_path: Path) -> None:
    told = problems(write(tmp_path, "timestamp,close\n" + "x,1\n" * 1000))
    assert len(told) == 6
    assert told[-1].endswith("995 more bad rows")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the header has no timestamp and no close"),
        ("1677628860,23143.72\n", "the header has no timestamp and no close"),
        ("timestamp,price\n1677628860,1\n", ":1: the header has no close"),
        ("timestamp,close\n", "has no prices"),
        ("timestamp,close\n1677628860000,1\n", "milliseconds"),
        ("timestamp,close\n-5,1\n", "not a time after 1970"),
        ("timestamp,close\n1677628860,1\n1677628861,1e999\n", "not a price above 0"),
        ("timestamp,close\n1677628800,1\n1677629100,1\n1677629400,1\n", "coarser than feed.tick = 60 s"),
        ("timestamp,close\n1677628861,1\n1677628862,1\n", "shorter than feed.tick"),
    ],
)
def test_an_unusable_file_is_refused_with_the_reason(tmp_path: Path, text: str, said: str) -> None:
    (problem,) = problems(write(tmp_path, text))
    assert said in problem
    assert "BTC.csv" in problem


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "BTC.csv"
    path.write_bytes(b"\xff\xfe\x00")
    assert "can't be read" in problems(path)[0]
    assert "can't be read" in problems(tmp_path / "ETH.csv")[0]


def test_all_files_are_checked_at_once(tmp_path: Path) -> None:
    write(tmp_path, "timestamp,close\nx,1\n", "BTC")
    write(tmp_path, "", "ETH")
    with pytest.raises(ConfigError) as caught:
        ReplaySource.load(tmp_path, ["BTC", "ETH"], 60, HOUR_S)
    assert len(caught.value.problems) == 2


def test_points_are_known_from_their_time_on(tmp_path: Path) -> None:
    minutes(tmp_path, "BTC", T, 10)
    source = ReplaySource.load(tmp_path, ["BTC"], 60, HOUR_S)
    assert asyncio.run(source.fetch("BTC", T, T + 179, 60)) == [(T + 60, 101.0), (T + 120, 102.0)]
    assert asyncio.run(source.fetch("BTC", T + 540, T + 9999, 60)) == []
    assert source.end_s("BTC") == T + 540


def test_the_game_starts_after_the_history_that_all_assets_have(tmp_path: Path) -> None:
    minutes(tmp_path, "BTC", T, 300)
    minutes(tmp_path, "ETH", T + HOUR_S, 300)
    assert ReplaySource.load(tmp_path, ["BTC", "ETH"], 60, HOUR_S).default_start_s == T + 2 * HOUR_S
    a_third_s = (T + 299 * 60 - (T + HOUR_S)) // 3 // 60 * 60
    assert (
        ReplaySource.load(tmp_path, ["BTC", "ETH"], 60, 30 * 86400).default_start_s == T + HOUR_S + a_third_s
    )


def test_a_start_outside_of_the_recording_is_refused(tmp_path: Path) -> None:
    minutes(tmp_path, "BTC", T, 10)
    source = ReplaySource.load(tmp_path, ["BTC"], 60, HOUR_S)
    source.check_start(T)
    source.check_start(T + 539)
    for start_s in (T - 1, T + 540):
        with pytest.raises(ConfigError, match=r"from 2023-03-01T00:00:00Z to before 2023-03-01T00:09:00Z"):
            source.check_start(start_s)


def test_recordings_without_a_common_time_are_refused(tmp_path: Path) -> None:
    minutes(tmp_path, "BTC", T, 10)
    minutes(tmp_path, "ETH", T + HOUR_S, 10)
    with pytest.raises(ConfigError, match="no time in common"):
        ReplaySource.load(tmp_path, ["BTC", "ETH"], 60, HOUR_S)


def test_the_days_when_usdc_lost_its_peg() -> None:
    source = ReplaySource.load(recorded(), ["BTC", "USDC", "USDT"], 60, 30 * 86400)
    for asset in ("BTC", "USDC", "USDT"):
        points = asyncio.run(source.fetch(asset, 0, 2**40, 60))
        assert len(points) == 30_240
        assert np.all(np.diff([ts_s for ts_s, _ in points]) == 60)
    prices = [price for _, price in asyncio.run(source.fetch("USDC", 0, 2**40, 60))]
    assert 0.85 < min(prices) < 0.9
    assert source.default_start_s == T + 7 * 86400  # 21 days are shorter than the history: a third into them
