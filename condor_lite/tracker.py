"""What a participant subclasses. Standard library only, so that a model starts fast and runs anywhere.

from condor_lite.tracker import TrackerBase

class MyModel(TrackerBase):
    def predict(self, asset, horizon, step):
        returns = self.prices.returns(asset, step, days=3)
        scale = max(1e-6, (sum(r * r for r in returns) / max(1, len(returns))) ** 0.5)
        density = {"type": "builtin", "name": "norm", "params": {"loc": 0.0, "scale": scale}}
        return self.flat(density, horizon, step)
"""

from __future__ import annotations

import abc
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from math import log, sqrt
from typing import Any

PriceData = Mapping[str, Sequence[Sequence[float]]]


class PriceStore:
    """The last `days` days of every asset's prices, oldest first. Times are epoch seconds UTC."""

    def __init__(self, days: float = 30) -> None:
        self.days = days
        self._times_s: dict[str, array[int]] = {}
        self._prices: dict[str, array[float]] = {}

    @property
    def assets(self) -> list[str]:
        """Every asset that has had a price."""
        return list(self._times_s)

    def add(self, data: PriceData) -> None:
        """Take in `{"BTC": [[ts, price], ...], ...}`. A time already known gets the new price."""
        for asset, points in data.items():
            if points:
                self._add_points(asset, points)

    def last(self, asset: str) -> tuple[int, float] | None:
        """The newest (time, price) of an asset; None without prices."""
        times_s = self._times_s.get(asset)
        return (times_s[-1], self._prices[asset][-1]) if times_s else None

    def series(self, asset: str, days: float | None = None) -> tuple[array[int], array[float]]:
        """Copies of the times and the prices, of the last `days` days or all; `numpy.asarray` takes them."""
        times_s, prices = self._times_s.get(asset, array("q")), self._prices.get(asset, array("d"))
        start = 0
        if days is not None and times_s:
            start = bisect_left(times_s, times_s[-1] - int(days * 86400))
        return times_s[start:], prices[start:]

    def returns(self, asset: str, step: int, days: float | None = None) -> list[float]:
        """Log returns between points at least `step` seconds apart, oldest first.

        Where the next point is further away than `step` (a gap, or a history coarser than the step), the
        return is scaled by sqrt(step / gap), as the moves of a random walk are.
        """
        times_s, prices = self.series(asset, days)
        if not times_s:
            return []
        found: list[float] = []
        since_s, price = times_s[0], prices[0]
        for time_s, later in zip(times_s, prices, strict=True):
            gap_s = time_s - since_s
            if gap_s >= step:
                found.append(log(later / price) if gap_s == step else log(later / price) * sqrt(step / gap_s))
                since_s, price = time_s, later
        return found

    def _add_points(self, asset: str, points: Sequence[Sequence[float]]) -> None:
        times_s = self._times_s.setdefault(asset, array("q"))
        prices = self._prices.setdefault(asset, array("d"))
        new_s = [int(point[0]) for point in points]
        if (not times_s or new_s[0] > times_s[-1]) and all(a < b for a, b in pairwise(new_s)):
            times_s.extend(new_s)
            prices.extend([point[1] for point in points])
        else:
            self._merge(times_s, prices, zip(new_s, (point[1] for point in points), strict=True))
        too_old = bisect_left(times_s, times_s[-1] - int(self.days * 86400))
        if too_old:
            del times_s[:too_old], prices[:too_old]

    @staticmethod
    def _merge(times_s: array[int], prices: array[float], points: Iterable[tuple[int, float]]) -> None:
        for time_s, price in points:
            place = bisect_left(times_s, time_s)
            if place < len(times_s) and times_s[place] == time_s:
                prices[place] = price
            else:
                times_s.insert(place, time_s)
                prices.insert(place, price)


class TrackerBase(abc.ABC):
    """A model. The game calls `tick` with new prices and `predict` when a round opens, one at a time."""

    @cached_property
    def prices(self) -> PriceStore:
        """The prices so far, up to 30 days; there even if a subclass calls no `super().__init__()`."""
        return PriceStore()

    def tick(self, data: PriceData) -> None:
        """New prices, `{"BTC": [[ts, price], ...], ...}`: at first the history, then whatever is new.

        The history has at most one point a minute; later ticks come as often as the game's feed. Override it
        to learn from each price, and call `super().tick(data)` if `self.prices` is to be kept.
        """
        self.prices.add(data)

    @abc.abstractmethod
    def predict(self, asset: str, horizon: int, step: int) -> list[dict[str, Any]]:
        """Answer with `horizon // step` densities; both are seconds.

        Density `k` (from 1) describes the log return over the segment from `(k - 1) * step` to `k * step`
        seconds after now. Each is a dict:
        `{"step": k * step, "type": "builtin", "name": "norm", "params": {"loc": 0.0, "scale": 0.001}}`.
        """

    @staticmethod
    def flat(density: Mapping[str, Any], horizon: int, step: int) -> list[dict[str, Any]]:
        """The same density for every segment."""
        return [{"step": k * step, **density} for k in range(1, horizon // step + 1)]
