"""Pyth's price history: https://docs.pyth.network/api-reference/historical-prices/history"""

from __future__ import annotations

from typing import ClassVar

import msgspec

from condor_lite.config import FeedConfig
from condor_lite.errors import ConfigError
from condor_lite.prices.source import SourceError
from condor_lite.prices.web import CANDLE_S, Candles, Request, WebSource, decoded


class _Bars(msgspec.Struct):
    s: str
    t: list[int] = []
    c: list[float | None] = []
    errmsg: str | None = None


class PythSource(WebSource):
    """One-minute bars of Pyth's aggregated prices: crypto, metals, currencies and shares. With a key."""

    name = "pyth"
    base = "https://pyth.dourolabs.app"
    rate_per_s = 2.5  # 30 in 10 s are allowed
    rows = 1440
    symbols: ClassVar = {
        "BTC": "Crypto.BTC/USD",
        "ETH": "Crypto.ETH/USD",
        "SOL": "Crypto.SOL/USD",
        "XAU": "Metal.XAU/USD",
    }

    def headers(self, feed: FeedConfig) -> dict[str, str]:
        if not feed.api_key:
            raise ConfigError(
                [
                    'feed.api_key: must be set when feed.source = "pyth", best in the environment, as '
                    "CONDOR_LITE__FEED__API_KEY"
                ]
            )
        return {"Authorization": f"Bearer {feed.api_key}"}

    def request(self, symbol: str, first_s: int, last_s: int) -> Request:
        # Whether `to` itself counts is not documented; in TradingView's protocol, which this is, it does not.
        times = {"from": first_s, "to": last_s + CANDLE_S - 1}
        return "/v1/fixed_rate@200ms/history", {"symbol": symbol, "resolution": CANDLE_S // 60, **times}

    def candles(self, body: bytes) -> Candles:
        bars = decoded(body, _Bars)
        if bars.s == "no_data":
            return []
        if bars.s != "ok":
            raise SourceError(f"{self} refuses the request: {bars.errmsg or bars.s}")
        if len(bars.t) != len(bars.c):
            raise SourceError(f"{self}: the answer has {len(bars.t)} times and {len(bars.c)} closes")
        return zip(bars.t, bars.c, strict=True)

    def is_unknown(self, status: int, body: bytes) -> bool:
        said = body[:1000].lower()
        return b"symbol" in said and (b"errmsg" in said or status in (400, 404))
