"""An exchange as a source of prices, at the wire between it and the feed: it has quiet and late minutes."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field

from condor_lite.clock import Clock

MINUTE_S = 60


def walk(seed: int, first_s: int, last_s: int, start: float = 20_000.0) -> dict[int, float]:
    """A price with all its digits for every minute from `first_s` to `last_s`."""
    rng = random.Random(seed)
    prices, level = {}, math.log(start)
    for ts_s in range(first_s, last_s + 1, MINUTE_S):
        level += rng.gauss(0, 4e-4)
        prices[ts_s] = math.exp(level)
    return prices


@dataclass
class Exchange:
    """Knows the price of every minute, and shows it once that is over by `clock`, or later.

    `late_s` says by (asset, time) how much later; `fault(asset)` may raise, wait, or return what stands in
    for the answer.
    """

    clock: Clock
    prices: dict[str, dict[int, float]]
    name: str = "exchange"
    simulated: bool = False
    latency_s: float = 2.0
    page_points: int = 300
    reach_s: int | None = None
    skew_s: float | None = None
    late_s: dict[tuple[str, int], float] = field(default_factory=dict)
    fault: Callable[[str], Awaitable[list[tuple[int, float]] | None]] | None = None

    async def fetch(self, asset: str, after_s: int, until_s: int, step_s: int) -> list[tuple[int, float]]:
        await asyncio.sleep(0)
        if self.fault is not None and (wrong := await self.fault(asset)) is not None:
            return wrong
        prices, now_s = self.prices[asset], self.clock.now()
        times_s: Iterable[int] = range(until_s // MINUTE_S * MINUTE_S, after_s, -MINUTE_S)
        return [
            (ts_s, prices[ts_s])
            for ts_s in times_s
            if ts_s in prices and ts_s + self.late_s.get((asset, ts_s), 0.0) <= now_s
        ]

    def end_s(self, asset: str) -> int | None:
        return None

    async def aclose(self) -> None:
        pass
