"""Recorded prices, played as if they arrived now: a CSV an asset with the columns `timestamp` and `close`."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from condor_lite.errors import ConfigError
from condor_lite.prices.grid import Point

_SHOWN = 5  # bad rows a file
_LATEST_S = 10_000_000_000  # year 2286; anything larger counts milliseconds


@dataclass(frozen=True, slots=True)
class Recording:
    """One asset's recorded prices on the grid of ticks: `ts_s` int64[k] ascending, `price` float64[k], k >=
    1."""

    ts_s: npt.NDArray[np.int64]
    price: npt.NDArray[np.float64]


class ReplaySource:
    """Plays recordings. Their points become known at their time, as on the day they were recorded."""

    name = "replay"
    simulated = True
    latency_s = 0.0
    page_points = 5_000
    reach_s: int | None = None
    skew_s: float | None = None

    def __init__(self, folder: Path, recordings: dict[str, Recording], tick_s: int, history_s: int) -> None:
        self._folder = folder
        self._recordings = recordings
        self._tick_s = tick_s
        self._history_s = history_s
        self._first_s = max(int(recording.ts_s[0]) for recording in recordings.values())
        self._last_s = min(int(recording.ts_s[-1]) for recording in recordings.values())
        if self._first_s >= self._last_s:
            raise ConfigError([f"feed.path: the recordings in {folder} have no time in common"])

    @classmethod
    def load(cls, folder: Path, assets: Sequence[str], tick_s: int, history_s: int) -> Self:
        """Read `<ASSET>.csv` of every asset. Raises ConfigError with the bad rows of all files."""
        recordings: dict[str, Recording] = {}
        problems: list[str] = []
        for asset in assets:
            try:
                recordings[asset] = read_recording(folder / f"{asset}.csv", tick_s)
            except ConfigError as error:
                problems += error.problems
        if problems:
            raise ConfigError(problems)
        return cls(folder, recordings, tick_s, history_s)

    def __str__(self) -> str:
        return f"the recording in {self._folder}"

    @property
    def default_start_s(self) -> int:
        """Where a game starts unless `game.start` says otherwise: after `feed.history` of what all assets
        have, or where that is shorter than `feed.history`, a third into it."""
        length_s = self._last_s - self._first_s
        into_s = self._history_s if self._history_s < length_s else length_s // 3
        return self._first_s + into_s // self._tick_s * self._tick_s

    def check_start(self, start_s: int) -> None:
        """Raises ConfigError where a game can't start at `start_s`."""
        if not self._first_s <= start_s < self._last_s:
            right = (
                f"must be from {_iso(self._first_s)} to before {_iso(self._last_s)}, what all assets recorded"
            )
            raise ConfigError([f"game.start = {_iso(start_s)}: {right}"])

    async def fetch(self, asset: str, after_s: int, until_s: int, step_s: int) -> list[Point]:
        """The recorded points in `(after_s, until_s]`, whatever `step_s` is."""
        recording = self._recordings[asset]
        first, end = np.searchsorted(recording.ts_s, (after_s, until_s), side="right")
        return list(zip(recording.ts_s[first:end].tolist(), recording.price[first:end].tolist(), strict=True))

    def end_s(self, asset: str) -> int | None:
        """The time of the last recorded point."""
        return int(self._recordings[asset].ts_s[-1])

    async def aclose(self) -> None:
        """Nothing to close."""


def read_recording(path: Path, tick_s: int) -> Recording:
    """Read one CSV with the columns `timestamp` and `close`; others are ignored.

    Times are Unix seconds or ISO 8601, UTC where they name no zone. Rows may come in any order; of several
    with the same time the last one counts. A price is put on the first grid time at which it was known, the
    last one in a tick stays. Raises ConfigError, each problem with file and line.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            prices = _read(path, file)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError([f"{path}: can't be read as CSV in UTF-8: {error}"]) from error
    if not prices:
        raise ConfigError([f"{path}: has no prices, only a header; record some first"])
    rows = sorted(prices.items())
    ts_s = np.array([row[0] for row in rows], np.int64)
    spacing_s = int(np.median(np.diff(ts_s))) if len(ts_s) > 1 else 0
    if spacing_s > tick_s:
        problem = f"{path}: has a price every {spacing_s} s, which is coarser than feed.tick = {tick_s} s"
        raise ConfigError([f"{problem}; set feed.tick to {spacing_s} s or a multiple of it"])
    grid_s = -(-ts_s // tick_s) * tick_s
    last = np.append(np.flatnonzero(np.diff(grid_s)), len(grid_s) - 1)
    if grid_s[-1] > ts_s[-1]:
        last = last[:-1]  # the recording stopped before that tick was over
    if not len(last):
        raise ConfigError([f"{path}: is shorter than feed.tick = {tick_s} s"])
    return Recording(grid_s[last], np.array([row[1] for row in rows])[last])


def _read(path: Path, file: Iterator[str]) -> dict[int, float]:
    reader = csv.reader(file)
    header = [name.strip().lower() for name in next(reader, [])]
    if lacking := [name for name in ("timestamp", "close") if name not in header]:
        raise ConfigError(
            [f"{path}:1: the header has no {' and no '.join(lacking)}; it must be: timestamp,close"]
        )
    at, close = header.index("timestamp"), header.index("close")
    prices: dict[int, float] = {}
    problems: list[str] = []
    for row in reader:
        if not row:
            continue
        try:
            prices[_time_s(row[at])] = _price(row[close])
        except ValueError as error:
            problems.append(f"{path}:{reader.line_num}: {error}")
        except IndexError:
            problems.append(f"{path}:{reader.line_num}: has {len(row)} columns, the header {len(header)}")
    if len(problems) > _SHOWN:
        problems[_SHOWN:] = [f"{path}: {len(problems) - _SHOWN} more bad rows"]
    if problems:
        raise ConfigError(problems)
    return prices


def _time_s(text: str) -> int:
    """The first whole second at which what is stamped `text` was known."""
    try:
        time_s = float(text)
    except ValueError:
        time_s = _iso_time_s(text)
    if not math.isfinite(time_s) or time_s <= 0:
        raise ValueError(f"timestamp {text!r} is not a time after 1970")
    if time_s >= _LATEST_S:
        raise ValueError(f"timestamp {text!r} is too large for seconds; are these milliseconds?")
    return math.ceil(time_s)


def _iso_time_s(text: str) -> float:
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        raise ValueError(f"timestamp {text!r} is neither Unix seconds nor an ISO time") from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _price(text: str) -> float:
    try:
        price = float(text)
    except ValueError:
        raise ValueError(f"close {text!r} is not a number") from None
    if not math.isfinite(price) or price <= 0:
        raise ValueError(f"close {text!r} is not a price above 0")
    return price


def _iso(time_s: int) -> str:
    return datetime.fromtimestamp(time_s, UTC).isoformat().replace("+00:00", "Z")
