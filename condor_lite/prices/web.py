"""What the sources on the web share: the connection, its limits, what goes wrong, and one-minute candles."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from difflib import get_close_matches
from email.utils import parsedate_to_datetime
from typing import ClassVar, NoReturn, TypeVar

import anyio
import httpx
import msgspec

from condor_lite import __version__
from condor_lite.config import FeedConfig
from condor_lite.config_values import shown_duration
from condor_lite.errors import ConfigError
from condor_lite.prices.grid import Point
from condor_lite.prices.source import SourceError, UnknownAsset

T = TypeVar("T")
Candles = Iterable[tuple[int, float | None]]
"""`(open_s, close)`; None where nothing was traded."""

Request = tuple[str, Mapping[str, str | int]]
"""Path and query."""

CANDLE_S = 60

_TIMEOUT_S = 10.0
_MOST_BYTES = 4 * 2**20
_LONGEST_QUEUE_S = 45.0  # with the time-out less than the feed waits
_KEEP_ALIVE_S = 90.0  # so that the next minute finds the connection open
_LONGEST_PAUSE_S = 86400.0
_BAN_S = 120.0
_OFFERS = 5
_QUOTED_CHARS = 120
_SKEW_WEIGHT = 0.2
_SKEW_JUMP_S = 2.0  # more is somebody setting a clock, no noise
_DIRECT: Mapping[str, None] = {f"all://{host}": None for host in ("127.0.0.1", "localhost", "[::1]")}


@dataclass(frozen=True, slots=True)
class _Reply:
    status: int
    body: bytes
    now_s: float | None
    """The source's own time, in whole seconds."""
    retry_after_s: float | None


class WebSource:
    """A source of one-minute candles over HTTP. A subclass knows its paths and shapes, and nothing else.

    Its candles stand at their open time; `fetch` gives each close at the candle's end, and none that the
    source's own clock says is still open. Raises ConfigError where `[feed]` does not fit the source.
    """

    name: str
    simulated = False
    latency_s = 2.0
    reach_s: int | None = None
    candle_s = CANDLE_S
    """What `feed.tick` must be a multiple of."""
    base: ClassVar[str]
    rate_per_s: float
    """Requests a second, evenly spaced."""
    rows: ClassVar[int]
    """The most candles that one request is answered with."""
    symbols: ClassVar[Mapping[str, str]]
    gold_stand_in: ClassVar[str | None] = None
    """What it has instead of gold, where it has none."""
    offers_path: ClassVar[str | None] = None

    def __init__(self, feed: FeedConfig) -> None:
        if feed.tick_s % self.candle_s:
            raise ConfigError(
                [
                    f'feed.tick = "{shown_duration(feed.tick_s)}": {self.name} gives one price a minute; '
                    f'must be a multiple of "{self.candle_s}s"'
                ]
            )
        self.skew_s: float | None = None
        self.page_points = max(1, self.rows * self.candle_s // feed.tick_s)
        self._symbols = {**self.symbols, **feed.symbols_at(self.name)}
        self._base = feed.base_url or self.base
        self._client = httpx.AsyncClient(
            timeout=_TIMEOUT_S,
            limits=httpx.Limits(keepalive_expiry=_KEEP_ALIVE_S),
            mounts=_DIRECT,
            headers={"User-Agent": f"condor-lite/{__version__}", **self.headers(feed)},
        )
        self._free_at_s = 0.0
        self._silent_until_s = 0.0

    def __str__(self) -> str:
        return self.name if self._base == self.base else f"{self.name} at {self._base}"

    # -- what a subclass knows -------------------------------------------------------------------------------

    def headers(self, feed: FeedConfig) -> dict[str, str]:
        """Sent with every request."""
        return {}

    def request(self, symbol: str, first_s: int, last_s: int) -> Request:
        """What to ask for the candles that opened from `first_s` to `last_s`, at most `rows`."""
        raise NotImplementedError

    def candles(self, body: bytes) -> Candles:
        """The candles in an answer, in any order. Raises SourceError or msgspec's errors."""
        raise NotImplementedError

    def is_unknown(self, status: int, body: bytes) -> bool:
        """Whether an answer says that there is no such symbol."""
        raise NotImplementedError

    def offered(self, body: bytes) -> list[str]:
        """The symbols in the answer to `offers_path`."""
        raise NotImplementedError

    # -- what the feed asks ----------------------------------------------------------------------------------

    def symbol(self, asset: str) -> str:
        """What the source calls `asset`. Raises UnknownAsset where nobody said."""
        try:
            return self._symbols[asset]
        except KeyError:
            if asset == "XAU" and self.gold_stand_in:
                hint = f'it trades no gold, only a token of it: XAU = "{self.gold_stand_in}" would price that'
            else:
                hint = f'say what it is called there, {asset} = "..."'
            raise UnknownAsset(
                f"{self.name} has no symbol for {asset}, unless [feed.symbols] names it: {hint}",
                offers=tuple(self.symbols.values()),
            ) from None

    async def fetch(self, asset: str, after_s: int, until_s: int, step_s: int) -> list[Point]:
        """The closes of the candles that ended in `(after_s, until_s]`, whatever `step_s` is."""
        symbol = self.symbol(asset)
        points: list[Point] = []
        end_s = until_s // CANDLE_S * CANDLE_S
        for first_s in range(after_s // CANDLE_S * CANDLE_S, end_s, self.rows * CANDLE_S):
            last_s = min(first_s + self.rows * CANDLE_S, end_s) - CANDLE_S
            path, query = self.request(symbol, first_s, last_s)
            reply = await self._get(path, query)
            if self.is_unknown(reply.status, reply.body):
                await self._raise_unknown(asset, symbol)
            known_s = until_s if reply.now_s is None else min(until_s, reply.now_s)
            points += [
                (open_s + CANDLE_S, close)
                for open_s, close in self._read(symbol, reply)
                if close is not None and first_s <= open_s <= last_s and open_s + CANDLE_S <= known_s
            ]
        return points

    def end_s(self, asset: str) -> int | None:
        """None: markets go on."""
        return None

    async def aclose(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    def _read(self, symbol: str, reply: _Reply) -> Candles:
        self._check(reply)
        try:
            return list(self.candles(reply.body))
        except msgspec.ValidationError as error:
            raise SourceError(f"{self}: {symbol}: the answer is not what it should be: {error}") from error
        except msgspec.DecodeError as error:
            raise SourceError(f"{self}: {symbol}: the answer is no JSON, or cut short: {error}") from error

    async def _raise_unknown(self, asset: str, symbol: str) -> NoReturn:
        offers: list[str] = []
        if self.offers_path is not None:
            try:
                reply = await self._get(self.offers_path, {})
                self._check(reply)
                offers = near(asset, symbol, self.offered(reply.body))
            except (SourceError, msgspec.DecodeError):
                pass  # what is wrong is clear without them
        raise UnknownAsset(
            f'{self} does not know "{symbol}" for {asset}',
            offers=offers or tuple(self.symbols.values()),
        )

    # -- HTTP ------------------------------------------------------------------------------------------------

    async def _get(self, path: str, query: Mapping[str, str | int]) -> _Reply:
        """One answer, whatever its status. Raises SourceError where there is none."""
        await self._take_turn()
        try:
            with anyio.fail_after(_TIMEOUT_S):
                async with self._client.stream("GET", self._base + path, params=query) as reply:
                    now_s = self._note_time(reply.headers)
                    body = bytearray()
                    async for part in reply.aiter_bytes():
                        body += part
                        if len(body) > _MOST_BYTES:
                            raise SourceError(f"{self}: an answer of more than {_MOST_BYTES // 2**20} MiB")
        except (httpx.TimeoutException, TimeoutError):
            raise SourceError(f"{self}: no answer within {_TIMEOUT_S:g} s") from None
        except httpx.ConnectError as error:
            raise SourceError(f"{self}: can't connect to {self._base} ({error})") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            reason = str(error) or type(error).__name__
            raise SourceError(f"{self}: the connection broke off ({reason})") from error
        retry_after_s = _retry_after_s(reply.headers.get("Retry-After"), now_s)
        if reply.status_code == httpx.codes.IM_A_TEAPOT:
            retry_after_s = retry_after_s or _BAN_S
        if reply.status_code != httpx.codes.OK and retry_after_s is not None:
            self._silent_until_s = asyncio.get_running_loop().time() + retry_after_s
        return _Reply(reply.status_code, bytes(body), now_s, retry_after_s)

    async def _take_turn(self) -> None:
        now_s = asyncio.get_running_loop().time()
        if (left_s := self._silent_until_s - now_s) > 0:
            raise SourceError(f"{self} asked to be left alone for {left_s:.0f} s more", retry_after_s=left_s)
        at_s = max(self._free_at_s, now_s)
        if at_s - now_s > _LONGEST_QUEUE_S:
            allowed = f"allows {self.rate_per_s:g} requests a second"
            raise SourceError(f"{self} {allowed}, and too many wait; has it too many assets?")
        self._free_at_s = at_s + 1 / self.rate_per_s
        await asyncio.sleep(at_s - now_s)

    def _check(self, reply: _Reply) -> None:
        """Raise SourceError where the answer is no candles."""
        status = reply.status
        if status == httpx.codes.OK:
            if reply.body.lstrip()[:1] == b"<":
                raise SourceError(
                    f"{self}: answered with a web page; is there a proxy or a login in between?"
                )
            return
        said = re.sub(r"\s+", " ", reply.body[: 4 * _QUOTED_CHARS].decode(errors="replace")).strip()
        said = "" if said.startswith("<") else said[:_QUOTED_CHARS]
        match status:
            case 429:
                reason = "asks for fewer requests"
            case 418:
                reason = "has banned this address for a while: it was asked too often"
            case 451:
                reason = "is blocked in your country; use another feed.source"
            case 401 | 403:
                reason = "refuses access; check feed.api_key, or use another feed.source"
            case _ if status >= 500:
                reason = "is in trouble"
            case _ if 300 <= status < 400:
                reason = "points elsewhere; set feed.base_url to where it is now"
            case _:
                reason = "refuses the request"
        detail = f": {said}" if said else ""
        raise SourceError(f"{self} {reason} (HTTP {status}){detail}", retry_after_s=reply.retry_after_s)

    def _note_time(self, headers: httpx.Headers) -> float | None:
        moment = _http_date(headers.get("Date"))
        if moment is None:
            return None
        now_s = moment.timestamp()
        skew_s = now_s + 0.5 - time.time()  # a Date is cut off to whole seconds
        if self.skew_s is None or abs(skew_s - self.skew_s) > _SKEW_JUMP_S:
            self.skew_s = skew_s
        else:
            self.skew_s += _SKEW_WEIGHT * (skew_s - self.skew_s)
        return now_s


def decoded(body: bytes, kind: type[T]) -> T:
    """JSON as `kind`. Numbers may come as strings, rows may be longer than asked for; nothing else bends."""
    return msgspec.json.decode(body, type=kind, strict=False)


def iso(time_s: int) -> str:
    """`2026-11-21T08:00:00Z`."""
    return datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def near(asset: str, symbol: str, offered: Iterable[str]) -> list[str]:
    """The few of `offered` that may be meant: those that begin with the asset's name, then similar ones."""
    names = sorted(set(offered), key=lambda name: (len(name), name))
    of_asset = [name for name in names if name.upper().startswith(asset.upper())]
    similar = get_close_matches(symbol, names, n=_OFFERS, cutoff=0.7)
    return list(dict.fromkeys([*of_asset[:_OFFERS], *similar]))[:_OFFERS]


def _retry_after_s(value: str | None, now_s: float | None) -> float | None:
    """Seconds from `Retry-After`: a number of them, or a date on the source's own clock."""
    if value is None:
        return None
    if value.strip().isdecimal():
        wait_s = float(value)
    elif (moment := _http_date(value)) is not None:
        wait_s = moment.timestamp() - (time.time() if now_s is None else now_s)
    else:
        return None
    return min(max(wait_s, 0.0), _LONGEST_PAUSE_S)


def _http_date(value: str | None) -> datetime | None:
    try:
        moment = parsedate_to_datetime(value or "")
    except ValueError:
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
