"""A local HTTP server that answers like the live sources, on good days and on bad ones."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import format_datetime
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

import orjson

CANDLE_S = 60
LEVELS = {"BTC": 95_000.0, "ETH": 3_300.0, "SOL": 190.0, "XAU": 2_700.0, "PAXG": 2_690.0}

PRODUCTS = ("BTC-USD", "ETH-USD", "SOL-USD", "PAXG-USD", "BTC-EUR", "DOGE-USD")
PAIRS = {"XXBTZUSD": "XBTUSD", "XETHZUSD": "ETHUSD", "SOLUSD": "SOLUSD", "PAXGUSD": "PAXGUSD"}
TICKERS = ("BTCUSDT", "ETHUSDT", "SOLUSDT", "PAXGUSDT", "DOGEUSDT")
ASSETS = ("BTC", "ETH", "SOL", "XAU")
FEEDS = ("Crypto.BTC/USD", "Crypto.ETH/USD", "Crypto.SOL/USD", "Metal.XAU/USD")


def price(symbol: str, at_s: int) -> float:
    """The price of what `symbol` names at `at_s`: smooth, never the same twice in an hour."""
    asset = next((name for name in LEVELS if name in symbol.replace("XBT", "BTC")), "BTC")
    return round(LEVELS[asset] * (1 + 0.01 * math.sin(at_s / 4000) + 0.001 * math.sin(at_s / 170)), 4)


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong: a status with a body, or one of `hang`, `trickle`, `reset`, `cut`."""

    status: int = 200
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()
    kind: str = "answer"


HANG = Fault(kind="hang")
TRICKLE = Fault(kind="trickle")
RESET = Fault(kind="reset")
CUT = Fault(kind="cut")
HTML = Fault(body=b"<!DOCTYPE html><html><body>We are down for maintenance</body></html>")


@dataclass(frozen=True, slots=True)
class Request:
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    connection: int


@dataclass
class PriceServer:
    """Serves all sources at once, at `url`; `async with` it. What is set takes effect with the next request.

    `now` is its clock: what opened in the current minute comes out as a candle that is still open.
    """

    now: Callable[[], float] = time.time
    closes: dict[tuple[str, int], Any] = field(default_factory=dict)
    """(symbol, open_s) -> what stands for the close, also null, a string, 0 or nonsense."""
    silent: Callable[[str, int], bool] = lambda symbol, open_s: False
    """Whether nothing was traded in a minute."""
    order: Callable[[list[Any]], list[Any]] = list
    """What to do with the rows: shuffle or double them."""
    shift_s: int = 0
    """What the candles' times are ahead of the right ones."""
    faults: list[Fault] = field(default_factory=list)
    """One for each of the next requests."""
    outage: Fault | None = None
    """For every request, until it is taken away."""
    dated: bool = True
    requests: list[Request] = field(default_factory=list)
    port: int = 0

    async def __aenter__(self) -> Self:
        self._connections = 0
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        self._tasks: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self._over = asyncio.Event()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self._over.set()
        for writer in self._tasks.values():
            writer.transport.abort()
        await asyncio.gather(*self._tasks)
        await self._server.wait_closed()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    # -- HTTP ------------------------------------------------------------------------------------------------

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks[task] = writer
        self._connections += 1
        number = self._connections
        try:
            while not self._over.is_set() and (head := await reader.readuntil(b"\r\n\r\n")):
                if not await self._answer(_parsed(head, number), writer):
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            del self._tasks[task]
            writer.close()

    async def _answer(self, request: Request, writer: asyncio.StreamWriter) -> bool:
        self.requests.append(request)
        fault = self.outage or (self.faults.pop(0) if self.faults else None)
        date = http_date(self.now())  # first: in what it calls closed, nothing may be open yet
        if fault is None:
            status, answer = self.answer(request)
            body, headers = orjson.dumps(answer), ()
        else:
            status, body, headers = fault.status, fault.body, fault.headers
        if fault is HANG:
            await self._over.wait()
            return False
        if fault is TRICKLE:
            writer.write(b"HTTP/1.1 200 Status\r\nContent-Length: 1000000\r\n\r\n")
            while not self._over.is_set():
                writer.write(b" ")
                await writer.drain()
                await asyncio.sleep(0.01)
            return False
        if fault in (RESET, CUT):
            body = orjson.dumps(self.answer(request)[1])
        length = len(body) // 2 if fault is CUT else len(body)
        lines = [f"HTTP/1.1 {status} Status", "Content-Type: application/json", f"Content-Length: {length}"]
        if self.dated:
            lines.append(f"Date: {date}")
        lines += [f"{name}: {value}" for name, value in headers]
        sent = body[: len(body) // 2] if fault in (RESET, CUT) else body
        writer.write("\r\n".join([*lines, "", ""]).encode() + sent)
        await writer.drain()
        if fault is RESET:
            writer.transport.abort()
            return False
        return True

    # -- the sources -----------------------------------------------------------------------------------------

    def answer(self, request: Request) -> tuple[int, Any]:
        """Status and JSON of a good day."""
        query = request.query
        match request.path.split("/")[1:]:
            case ["products"]:
                return 200, [{"id": name, "status": "online"} for name in PRODUCTS]
            case ["products", symbol, "candles"]:
                return self._coinbase(symbol, query)
            case ["0", "public", "AssetPairs"]:
                pairs = {name: {"altname": altname, "fees": [[0, 0.26]]} for name, altname in PAIRS.items()}
                return 200, {"error": [], "result": pairs}
            case ["0", "public", "OHLC"]:
                return 200, self._kraken(query["pair"], int(query["since"]))
            case ["api", "v3", "ticker", "price"]:
                return 200, [{"symbol": name, "price": "1.00"} for name in TICKERS]
            case ["api", "v3", "klines"]:
                return self._binance(query)
            case ["v1", "prices"]:
                return self._crunchdao(query)
            case ["v1", "fixed_rate@200ms", "history"]:
                return self._pyth(query, request.headers)
            case ["own", symbol]:
                after_s, until_s = int(query["after"]), int(query["until"])
                ends = range(after_s // CANDLE_S * CANDLE_S + CANDLE_S, until_s + 1, CANDLE_S)
                return 200, [{"time": end_s, "price": price(symbol, end_s)} for end_s in ends]
        return 404, {"error": "no such path"}

    def opens(self, symbol: str, first_s: int, last_s: int) -> Iterable[int]:
        """The open times of the candles that there are, the open one included."""
        last_s = min(last_s, int(self.now()))
        return (
            open_s + self.shift_s
            for open_s in range(math.ceil(first_s / CANDLE_S) * CANDLE_S, last_s + 1, CANDLE_S)
            if not self.silent(symbol, open_s)
        )

    def close(self, symbol: str, open_s: int) -> Any:
        """The last price of the minute; of the open one, the newest."""
        at_s = min(open_s + CANDLE_S, int(self.now()))
        return self.closes.get((symbol, open_s), price(symbol, at_s))

    def _coinbase(self, symbol: str, query: dict[str, str]) -> tuple[int, Any]:
        if symbol not in PRODUCTS:
            return 404, {"message": "NotFound"}
        first_s, last_s = _moment_s(query["start"]), _moment_s(query["end"])
        if first_s >= last_s:
            return 400, {"message": "start must be before end"}
        if (last_s - first_s) // int(query["granularity"]) + 1 > 300:
            return 400, {"message": "granularity too small for the requested time range"}
        rows = []
        for open_s in self.opens(symbol, first_s, last_s):
            start, close = price(symbol, open_s), self.close(symbol, open_s)
            rows.append([open_s, start * 0.999, start * 1.001, start, close, 1.25])
        return 200, self.order(rows[::-1])

    def _kraken(self, symbol: str, since_s: int) -> Any:
        if symbol not in PAIRS.values():
            return {"error": ["EQuery:Unknown asset pair"]}
        newest_s = int(self.now()) // CANDLE_S * CANDLE_S
        first_s = max(newest_s - 719 * CANDLE_S, since_s)
        rows = []
        for open_s in self.opens(symbol, first_s, newest_s):
            start, close = _string(price(symbol, open_s)), self.close(symbol, open_s)
            rows.append([open_s, start, start, start, _string(close), start, "3.39243896", 23])
        name = next(name for name, altname in PAIRS.items() if altname == symbol)
        return {"error": [], "result": {name: self.order(rows), "last": newest_s - CANDLE_S}}

    def _binance(self, query: dict[str, str]) -> tuple[int, Any]:
        symbol = query["symbol"]
        if symbol not in TICKERS:
            return 400, {"code": -1121, "msg": "Invalid symbol."}
        first_s, last_s = int(query["startTime"]) // 1000, int(query["endTime"]) // 1000
        rows = []
        for open_s in list(self.opens(symbol, first_s, last_s))[: int(query["limit"])]:
            start, close = _string(price(symbol, open_s)), _string(self.close(symbol, open_s))
            end_ms = (open_s + CANDLE_S) * 1000 - 1
            rows.append(
                [open_s * 1000, start, start, start, close, "0.5", end_ms, "9.9", 7, "0.1", "0.2", "0"]
            )
        return 200, self.order(rows)

    def _crunchdao(self, query: dict[str, str]) -> tuple[int, Any]:
        asset = query["asset"]
        if asset not in ASSETS:
            return 404, {"detail": f"asset not found: {asset}"}
        opens = self.opens(asset, _moment_s(query["from"]), _moment_s(query["to"]) - 1)
        rows = self.order([(open_s, self.close(asset, open_s)) for open_s in opens])
        return 200, {"timestamp": [row[0] for row in rows], "close": [row[1] for row in rows]}

    def _pyth(self, query: dict[str, str], headers: dict[str, str]) -> tuple[int, Any]:
        if headers.get("authorization") != "Bearer secret":
            return 401, {"error": "no valid key"}
        symbol = query["symbol"]
        if symbol not in FEEDS:
            return 200, {"s": "error", "errmsg": f"Symbol not found: {symbol}"}
        opens = self.opens(symbol, int(query["from"]), int(query["to"]) - 1)
        rows = self.order([(open_s, self.close(symbol, open_s)) for open_s in opens])
        times, closes = [row[0] for row in rows], [row[1] for row in rows]
        return 200, {"s": "ok", "t": times, "o": closes, "h": closes, "l": closes, "c": closes, "v": closes}


def http_date(at_s: float) -> str:
    return format_datetime(datetime.fromtimestamp(int(at_s), UTC), usegmt=True)


def _parsed(head: bytes, connection: int) -> Request:
    first, *lines = head.decode().rstrip().split("\r\n")
    url = urlsplit(first.split(" ")[1])
    pairs = [line.partition(": ") for line in lines]
    headers = {name.lower(): value for name, _, value in pairs}
    query = {name: values[0] for name, values in parse_qs(url.query).items()}
    return Request(unquote(url.path), query, headers, connection)


def _moment_s(text: str) -> int:
    return int(datetime.fromisoformat(text).timestamp())


def _string(value: Any) -> Any:
    return f"{value:.4f}" if isinstance(value, float) else value
