"""Kraken: https://docs.kraken.com/api-reference/market-data/get-ohlc-data"""

from __future__ import annotations

from typing import ClassVar

import msgspec

from condor_lite.prices.source import SourceError
from condor_lite.prices.web import CANDLE_S, TOO_MANY_S, Candles, Request, WebSource, decoded

_TOO_MANY = ("rate limit", "too many requests", "throttled")


class _Candle(msgspec.Struct, array_like=True):
    time: int
    open: float | None
    high: float | None
    low: float | None
    close: float | None


class _Answer(msgspec.Struct):
    error: list[str]
    result: dict[str, msgspec.Raw] = {}


class KrakenSource(WebSource):
    """The newest 720 one-minute candles of Kraken, without a key. The last of them is still open."""

    name = "kraken"
    base = "https://api.kraken.com"
    rate_per_s = 1.0
    rows = 720
    reach_s = 719 * CANDLE_S
    symbols: ClassVar = {"BTC": "XBTUSD", "ETH": "ETHUSD", "SOL": "SOLUSD"}
    gold_stand_in = "PAXGUSD"
    offers_path = "/0/public/AssetPairs"

    def request(self, symbol: str, first_s: int, last_s: int) -> Request:
        # Whether `since` itself counts has changed over time.
        return "/0/public/OHLC", {"pair": symbol, "interval": CANDLE_S // 60, "since": first_s - CANDLE_S}

    def candles(self, body: bytes) -> Candles:
        answer = decoded(body, _Answer)
        if answer.error:
            said = ", ".join(answer.error)
            pause_s = TOO_MANY_S if any(word in said.lower() for word in _TOO_MANY) else None
            raise SourceError(f"{self} refuses the request: {said}", retry_after_s=pause_s)
        pairs = answer.result.keys() - {"last"}
        if len(pairs) != 1:
            raise SourceError(f"{self}: the answer has {len(pairs)} pairs, where one was asked for")
        return ((row.time, row.close) for row in decoded(bytes(answer.result[pairs.pop()]), list[_Candle]))

    def is_unknown(self, status: int, body: bytes) -> bool:
        return b"EQuery:Unknown asset pair" in body

    def offered(self, body: bytes) -> list[str]:
        pairs = decoded(body, _Answer).result
        return [
            str(decoded(bytes(raw), dict[str, object]).get("altname", pair)) for pair, raw in pairs.items()
        ]
