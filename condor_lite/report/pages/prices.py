"""The prices: a chart for each asset, and how its feed is doing."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial

from condor_lite.prices.feed import FeedState
from condor_lite.report import params
from condor_lite.report.context import Context
from condor_lite.report.pages.common import FOR_S, show
from condor_lite.report.pages.picture import Points, with_gaps
from condor_lite.report.replies import Reply
from condor_lite.storage import pictures

_POINTS = 400
_MOST_CHARTS = 24
_HOUR_S = 3600


class Range(StrEnum):
    HOUR = "1h"
    SIX_HOURS = "6h"
    DAY = "1d"
    WEEK = "7d"

    @property
    def length_s(self) -> int:
        return {"1h": 1, "6h": 6, "1d": 24, "7d": 168}[self.value] * _HOUR_S


@dataclass(frozen=True, slots=True)
class PricesPageParams:
    range: Range = field(default=Range.HOUR, metadata=params.choice(Range))


@dataclass(frozen=True, slots=True)
class AssetPrices:
    """`change`: over the range, 0.01: 1 %. `ticks`: how many of the last hour's `wanted` ticks are stored."""

    state: FeedState
    path: Points
    range_s: int
    change: float | None
    low: float | None
    high: float | None
    ticks: int
    wanted: int

    @property
    def drawing(self) -> dict[str, object]:
        """What static/charts.js draws it from."""
        times, prices = zip(*self.path, strict=True) if self.path else ((), ())
        return {"t": times, "p": prices, "range": self.range_s}


async def page(context: Context, sent: PricesPageParams) -> Reply:
    """All assets' prices over one range of time."""
    return await context.remembered(("prices", sent.range), FOR_S, partial(_page, context, sent.range))


async def _page(context: Context, chosen: Range) -> Reply:
    feed = context.live.config.feed
    states = context.live.feeds()
    return await show(
        context,
        "prices.html",
        at="/prices",
        range=chosen,
        ranges=list(Range),
        assets=[await _asset(context, state, chosen) for state in states[:_MOST_CHARTS]],
        others=states[_MOST_CHARTS:],
        tick_s=feed.tick_s,
        max_staleness_s=feed.max_staleness_s,
    )


async def _asset(context: Context, state: FeedState, chosen: Range) -> AssetPrices:
    tick_s = context.live.config.feed.tick_s
    until_s = state.newest_ts_s
    found: list[tuple[int, float]] = []
    ticks = 0
    if until_s is not None:
        spacing_s = max(tick_s, -(-chosen.length_s // (_POINTS * tick_s)) * tick_s)
        points = chosen.length_s // spacing_s
        found = await pictures.price_path(context.readers, state.asset, until_s, spacing_s, points)
        ticks = await pictures.price_count(context.readers, state.asset, until_s - _HOUR_S, until_s)
    prices = [price for _, price in found]
    return AssetPrices(
        state=state,
        path=with_gaps(found),
        range_s=chosen.length_s,
        change=prices[-1] / prices[0] - 1 if prices else None,
        low=min(prices, default=None),
        high=max(prices, default=None),
        ticks=ticks,
        wanted=_HOUR_S // tick_s,
    )
