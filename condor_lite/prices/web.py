"""What the sources on the web share: the connection, its limits, what goes wrong, and one-minute candles."""

from __future__ import annotations

import asyncio
import re
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
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
from condor_lite.config_sections import LIVE_TICK_S
from condor_lite.prices.grid import Point
from condor_lite.prices.source import LONGEST_PAUSE_S, SourceError, UnknownAsset

T = TypeVar("T")
Candles = Iterable[tuple[int, float | None]]
"""`(open_s, close)`; None where nothing was traded."""

Query = Mapping[str, str | int]
Request = tuple[str, Query]
"""Path and query."""

CANDLE_S = LIVE_TICK_S

TOO_MANY_S = 5.0
"""For which a source that wants fewer requests is left alone where it does not say how long."""

_TIMEOUT_S = 10.0
_MOST_BYTES = 2**20  # reading a hostile MiB holds the loop for 50 ms
_MOST_LIST_BYTES = 4 * 2**20  # Kraken's is half of that
_LONGEST_QUEUE_S = 45.0  # with the time-out less than the feed waits
_KEEP_ALIVE_S = 90.0  # so that the next minute finds the connection open
_PAUSES_S = {429: TOO_MANY_S, 418: 120.0}  # likewise
_OFFERS = 5
_QUOTED_CHARS = 120
_CERTIFICATE = "is a proxy in between? SSL_CERT_FILE names the authorities to trust"
_GZIP = 31  # zlib's name for it
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
    source's own clock says is still open. Raises ConfigError where `[feed]` lacks what the source needs.
    """

    name: str
    simulated = False
    latency_s = 2.0
    reach_s: int | None = None
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
        self.skew_s: float | None = None
        self.page_points = max(1, self.rows * CANDLE_S // feed.tick_s)
        self._symbols = {**self.symbols, **feed.symbols_at(self.name)}
        self._base = feed.base_url or self.base
        self._client = httpx.AsyncClient(
            timeout=_TIMEOUT_S,
            limits=httpx.Limits(keepalive_expiry=_KEEP_ALIVE_S),
            mounts=_DIRECT,
            headers={
                "User-Agent": f"condor-lite/{__version__}",
                "Accept-Encoding": "gzip",
                **self.headers(feed),
            },
        )
        self._free_at_s = 0.0
        self._silent_until_s = 0.0
        self._refused_with = 0

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
            now_s = time.time() if reply.now_s is None else reply.now_s
            known_s = until_s if reply.now_s is None else min(until_s, reply.now_s)
            candles = self._read(symbol, reply)
            if candles and all(open_s > now_s for open_s, _ in candles):
                raise SourceError(
                    f"{self}: {symbol}: all {len(candles)} candles lie in the future; are its times right?"
                )
            points += [
                (open_s + CANDLE_S, close)
                for open_s, close in candles
                if close is not None and first_s <= open_s <= last_s and open_s + CANDLE_S <= known_s
            ]
        return points

    def end_s(self, asset: str) -> int | None:
        """None: markets go on."""
        return None

    async def aclose(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    def _read(self, symbol: str, reply: _Reply) -> Sequence[tuple[int, float | None]]:
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
                reply = await self._get(self.offers_path, {}, _MOST_LIST_BYTES)
                self._check(reply)
                offers = near(asset, symbol, self.offered(reply.body))
            except (SourceError, msgspec.DecodeError):
                pass  # what is wrong is clear without them
        raise UnknownAsset(
            f'{self} does not know "{symbol}" for {asset}',
            offers=offers or tuple(self.symbols.values()),
        )

    # -- HTTP ------------------------------------------------------------------------------------------------

    async def _get(self, path: str, query: Query, most_bytes: int = _MOST_BYTES) -> _Reply:
        """One answer, whatever its status. Raises SourceError where there is none."""
        await self._take_turn()
        try:
            with anyio.fail_after(_TIMEOUT_S):
                async with self._client.stream("GET", self._base + path, params=query) as reply:
                    now_s = self._note_time(reply.headers)
                    body = await self._body(reply, most_bytes)
        except (httpx.TimeoutException, TimeoutError):
            raise SourceError(f"{self}: no answer within {_TIMEOUT_S:g} s") from None
        except httpx.ConnectError as error:
            hint = "is this machine online?" if self._base == self.base else "is feed.base_url right?"
            if "CERTIFICATE" in str(error):
                hint = _CERTIFICATE
            raise SourceError(f"{self.name}: can't connect to {self._base} ({error}); {hint}") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            reason = str(error) or type(error).__name__
            raise SourceError(f"{self}: the connection broke off ({reason})") from error
        retry_after_s = _retry_after_s(reply.headers.get("Retry-After"), now_s)
        retry_after_s = retry_after_s or _PAUSES_S.get(reply.status_code)
        if reply.status_code != httpx.codes.OK and retry_after_s is not None:
            self._silent_until_s = time.monotonic() + retry_after_s
            self._refused_with = reply.status_code
        return _Reply(reply.status_code, body, now_s, retry_after_s)

    async def _body(self, reply: httpx.Response, most_bytes: int) -> bytes:
        """What an answer says, unpacked piece by piece: a few bytes may stand for gigabytes."""
        packing = reply.headers.get("Content-Encoding", "identity").lower()
        if packing not in ("identity", "gzip"):
            raise SourceError(f'{self}: answered in "{packing}", which was not asked for')
        unpacker = zlib.decompressobj(_GZIP) if packing == "gzip" else None
        body = bytearray()
        try:
            async for part in reply.aiter_raw():
                body += unpacker.decompress(part, most_bytes + 1 - len(body)) if unpacker else part
                if len(body) > most_bytes:
                    raise SourceError(f"{self}: an answer of more than {most_bytes // 2**20} MiB")
        except zlib.error as error:
            raise SourceError(f"{self}: the answer can't be unpacked ({error})") from error
        return bytes(body)

    async def _take_turn(self) -> None:
        self._respect_silence()
        now_s = time.monotonic()
        at_s = max(self._free_at_s, now_s)
        if at_s - now_s > _LONGEST_QUEUE_S:
            allowed = f"allows {self.rate_per_s:g} requests a second"
            raise SourceError(f"{self} {allowed}, and too many wait; has it too many assets?")
        self._free_at_s = at_s + 1 / self.rate_per_s
        await asyncio.sleep(at_s - now_s)
        self._respect_silence()  # asked for by an answer that came meanwhile

    def _respect_silence(self) -> None:
        if (left_s := self._silent_until_s - time.monotonic()) > 0:
            raise SourceError(
                f"{self} asked to be left alone for {left_s:.0f} s more (HTTP {self._refused_with})",
                retry_after_s=left_s,
            )

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
    return min(max(wait_s, 0.0), LONGEST_PAUSE_S)


def _http_date(value: str | None) -> datetime | None:
    try:
        moment = parsedate_to_datetime(value or "")
    except ValueError:
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
