"""Binance's public market data: https://developers.binance.com/docs/binance-spot-api-docs/rest-api"""

from __future__ import annotations

from typing import ClassVar

import msgspec

from condor_lite.prices.web import Candles, Request, WebSource, decoded


class _Candle(msgspec.Struct, array_like=True):
    open_ms: int
    open: float | None
    high: float | None
    low: float | None
    close: float | None


class _Ticker(msgspec.Struct):
    symbol: str


class BinanceSource(WebSource):
    """One-minute candles of Binance, without a key; blocked in some countries."""

    name = "binance"
    base = "https://data-api.binance.vision"
    rate_per_s = 10.0
    rows = 1000
    symbols: ClassVar = {"BTC": "BTCUSDT", "ETH": "ETHUSDT", "SOL": "SOLUSDT"}
    gold_stand_in = "PAXGUSDT"
    offers_path = "/api/v3/ticker/price"  # every symbol; exchangeInfo has them too, in many MB

    def request(self, symbol: str, first_s: int, last_s: int) -> Request:
        times = {"startTime": first_s * 1000, "endTime": last_s * 1000}
        return "/api/v3/klines", {"symbol": symbol, "interval": "1m", **times, "limit": self.rows}

    def candles(self, body: bytes) -> Candles:
        return ((row.open_ms // 1000, row.close) for row in decoded(body, list[_Candle]))

    def is_unknown(self, status: int, body: bytes) -> bool:
        return status == 400 and b"-1121" in body

    def offered(self, body: bytes) -> list[str]:
        return [ticker.symbol for ticker in decoded(body, list[_Ticker])]
