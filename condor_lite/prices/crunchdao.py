"""CrunchDAO's price database, the Condor game's own source."""

from __future__ import annotations

from typing import ClassVar

import msgspec

from condor_lite.prices.source import SourceError
from condor_lite.prices.web import CANDLE_S, Candles, Request, WebSource, decoded, iso


class _Columns(msgspec.Struct):
    timestamp: list[int]
    close: list[float | None]


class CrunchdaoSource(WebSource):
    """One-minute closes of the assets of the Condor game, without a key."""

    name = "crunchdao"
    base = "https://pricedb.crunchdao.com"
    rate_per_s = 4.0
    rows = 5000
    symbols: ClassVar = {"BTC": "BTC", "ETH": "ETH", "SOL": "SOL", "XAU": "XAU"}

    def request(self, symbol: str, first_s: int, last_s: int) -> Request:
        # Whether `to` itself counts is not documented.
        times = {"from": iso(first_s), "to": iso(last_s + CANDLE_S)}
        return "/v1/prices", {"asset": symbol, **times, "columns": "close"}

    def candles(self, body: bytes) -> Candles:
        columns = decoded(body, _Columns)
        if len(columns.timestamp) != len(columns.close):
            counts = f"{len(columns.timestamp)} times and {len(columns.close)} closes"
            raise SourceError(f"{self}: the answer has {counts}")
        return zip(columns.timestamp, columns.close, strict=True)

    def is_unknown(self, status: int, body: bytes) -> bool:
        return status in (400, 404, 422) and b"asset" in body.lower()
