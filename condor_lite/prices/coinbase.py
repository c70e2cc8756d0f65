"""Coinbase Exchange: https://docs.cdp.coinbase.com/api-reference/exchange-api"""

from __future__ import annotations

from typing import ClassVar
from urllib.parse import quote

import msgspec

from condor_lite.prices.web import CANDLE_S, Candles, Request, WebSource, decoded, iso


class _Candle(msgspec.Struct, array_like=True):
    time: int
    low: float | None
    high: float | None
    open: float | None
    close: float | None


class _Product(msgspec.Struct):
    id: str


class CoinbaseSource(WebSource):
    """One-minute candles of Coinbase Exchange, without a key."""

    name = "coinbase"
    base = "https://api.exchange.coinbase.com"
    rate_per_s = 8.0  # 10 are allowed
    rows = 300
    symbols: ClassVar = {"BTC": "BTC-USD", "ETH": "ETH-USD", "SOL": "SOL-USD"}
    gold_stand_in = "PAXG-USD"
    offers_path = "/products"

    def request(self, symbol: str, first_s: int, last_s: int) -> Request:
        # It refuses a range of no length; of what opens before `end`, it gives all.
        times = {"start": iso(first_s), "end": iso(last_s + CANDLE_S - 1)}
        return f"/products/{quote(symbol, safe='')}/candles", {"granularity": CANDLE_S, **times}

    def candles(self, body: bytes) -> Candles:
        return ((row.time, row.close) for row in decoded(body, list[_Candle]))

    def is_unknown(self, status: int, body: bytes) -> bool:
        return status == 404 and b"NotFound" in body

    def offered(self, body: bytes) -> list[str]:
        return [product.id for product in decoded(body, list[_Product])]
