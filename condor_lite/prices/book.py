"""The prices in memory: what models are fed from, and how old they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt

from condor_lite.prices.grid import Point, history_step_s

Times = npt.NDArray[np.int64]
Prices = npt.NDArray[np.float64]

KEEP_S = 86400
_FEWEST = 1024


class PriceBook:
    """All recent points of every asset, ascending in time; a price stands unless it is revised.

    Holds every tick of the last `keep_s`, and `history_s` before that at the resolution of `history()`, so
    its memory is bounded whatever the tick. One thread adds; any thread may read.
    """

    def __init__(self, history_s: int, tick_s: int, keep_s: int = KEEP_S) -> None:
        self.span_s = history_s + keep_s
        """How far back it reaches."""
        self._history_s = history_s
        self._step_s = history_step_s(tick_s)
        self._keep_s = keep_s
        self._columns: dict[str, _Column] = {}

    def add(self, asset: str, points: Iterable[Point]) -> list[Point]:
        """Take in `points`, in any order; return the new ones, ascending. A price that is there stands."""
        wanted = sorted(dict(points).items())
        if not wanted:
            return []
        column = self._columns.get(asset) or _Column()
        newest_s = column.newest_s
        if newest_s is None or wanted[0][0] > newest_s:
            added = wanted
            column.append(added)
        else:
            held_s, _ = column.read()
            places = np.searchsorted(held_s, [ts_s for ts_s, _ in wanted])
            added = [
                point
                for point, place in zip(wanted, places.tolist(), strict=True)
                if place == len(held_s) or held_s[place] != point[0]
            ]
            if added:
                column.merge(added)
        if column.is_due:
            column.keep(self._kept(column.read()[0]))
        self._columns[asset] = column
        return added

    def revise(self, asset: str, points: Iterable[Point]) -> None:
        """Give points that are held new prices."""
        if column := self._columns.get(asset):
            column.revise(points)

    def _kept(self, ts_s: Times) -> npt.NDArray[np.bool_]:
        newest_s = ts_s[-1]
        kept: npt.NDArray[np.bool_] = (ts_s >= newest_s - self.span_s) & (ts_s % self._step_s == 0)
        kept |= ts_s >= newest_s - self._keep_s
        return kept

    def newest_s(self, asset: str) -> int | None:
        """The time of the newest point, None where there is none."""
        column = self._columns.get(asset)
        return column.newest_s if column else None

    def last(self, asset: str) -> Point | None:
        """The newest point."""
        column = self._columns.get(asset)
        return column.last if column else None

    def count(self, asset: str) -> int:
        """How many points are held."""
        return len(self.series(asset)[0])

    def series(self, asset: str) -> tuple[Times, Prices]:
        """Every point held: times int64[k] ascending, prices float64[k]. Read-only, and as of now."""
        column = self._columns.get(asset)
        return column.read() if column else _Column().read()

    def since(self, watermark: Mapping[str, int], until_s: int) -> dict[str, list[Point]]:
        """Per asset the points with `watermark[asset] < ts <= until_s`; an asset without any is left out.

        An asset that `watermark` does not name is given from the start.
        """
        found: dict[str, list[Point]] = {}
        for asset, column in list(self._columns.items()):
            ts_s, price = column.read()
            after_s = watermark.get(asset)
            first = 0 if after_s is None else int(np.searchsorted(ts_s, after_s, side="right"))
            end = int(np.searchsorted(ts_s, until_s, side="right"))
            if first < end:
                found[asset] = _points(ts_s[first:end], price[first:end])
        return found

    def history(self, until_s: int) -> dict[str, tuple[Times, Prices]]:
        """Per asset the last `history_s` up to `until_s`, at the tick's resolution but never finer than one
        minute.

        The newest point is there in any case, so that nothing lies between the history and the tick after it.
        """
        found: dict[str, tuple[Times, Prices]] = {}
        for asset, column in list(self._columns.items()):
            ts_s, price = column.read()
            first = int(np.searchsorted(ts_s, until_s - self._history_s, side="right"))
            end = int(np.searchsorted(ts_s, until_s, side="right"))
            if first == end:
                continue
            ts_s, price = ts_s[first:end], price[first:end]
            wanted = ts_s % self._step_s == 0
            wanted[-1] = True
            found[asset] = ts_s[wanted], price[wanted]
        return found


class _Column:
    """One asset's points in arrays that grow at the end.

    What is below `_used` is never written again, so that a view taken by another thread stays as it was;
    whatever else changes makes new arrays, and swaps in all at once.
    """

    def __init__(self) -> None:
        self._data: tuple[Times, Prices, int] = (np.empty(_FEWEST, np.int64), np.empty(_FEWEST), 0)
        self._thin_from = _FEWEST

    @property
    def is_due(self) -> bool:
        """Whether so much has come since the last `keep` that another one is worth its copy."""
        return self._data[2] > self._thin_from

    @property
    def newest_s(self) -> int | None:
        ts_s, _, used = self._data
        return int(ts_s[used - 1]) if used else None

    @property
    def last(self) -> Point | None:
        ts_s, price, used = self._data
        return (int(ts_s[used - 1]), float(price[used - 1])) if used else None

    def read(self) -> tuple[Times, Prices]:
        ts_s, price, used = self._data
        ts_s, price = ts_s[:used], price[:used]
        ts_s.flags.writeable = price.flags.writeable = False
        return ts_s, price

    def append(self, points: list[Point]) -> None:
        ts_s, price, used = self._data
        end = used + len(points)
        if end > len(ts_s):
            self._replace(ts_s[:used], price[:used], end + end // 4)
            ts_s, price, used = self._data
        ts_s[used:end] = [point[0] for point in points]
        price[used:end] = [point[1] for point in points]
        self._data = (ts_s, price, end)

    def merge(self, points: list[Point]) -> None:
        held_s, held = self.read()
        ts_s = np.concatenate([held_s, np.array([point[0] for point in points], np.int64)])
        price = np.concatenate([held, np.array([point[1] for point in points])])
        order = np.argsort(ts_s)
        self._replace(ts_s[order], price[order], len(ts_s))

    def revise(self, points: Iterable[Point]) -> None:
        held_s, held = self.read()
        price = held.copy()
        for ts_s, new in points:
            place = int(np.searchsorted(held_s, ts_s))
            if place < len(held_s) and held_s[place] == ts_s:
                price[place] = new
        self._replace(held_s, price, len(self._data[0]))

    def keep(self, wanted: npt.NDArray[np.bool_]) -> None:
        ts_s, price = self.read()
        kept = int(wanted.sum())
        self._thin_from = kept + max(_FEWEST, kept // 4)
        self._replace(ts_s[wanted], price[wanted], self._thin_from + 1)

    def _replace(self, ts_s: Times, price: Prices, capacity: int) -> None:
        used = len(ts_s)
        new_ts_s, new_price = np.empty(max(capacity, _FEWEST), np.int64), np.empty(max(capacity, _FEWEST))
        new_ts_s[:used], new_price[:used] = ts_s, price
        self._data = (new_ts_s, new_price, used)


def _points(ts_s: Times, price: Prices) -> list[Point]:
    return list(zip(ts_s.tolist(), price.tolist(), strict=True))
