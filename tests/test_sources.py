"""The live sources against a local server that answers as they do, on good days and on bad ones."""

from __future__ import annotations

import math
import random
import socket
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from condor_lite import __version__
from condor_lite.config import FeedConfig
from condor_lite.errors import ConfigError
from condor_lite.prices import web
from condor_lite.prices.source import SourceError, UnknownAsset
from condor_lite.prices.sources import LIVE, live_source
from condor_lite.prices.web import WebSource
from tests.price_server import CUT, HANG, HTML, RESET, Fault, PriceServer, http_date, price

pytestmark = pytest.mark.anyio

NOW_S = 1_700_002_815.0
MINUTE_S = 1_700_002_800  # the one that is open
FEED = FeedConfig(api_key="secret")
NAMES = sorted(LIVE)
README = (Path(__file__).parent.parent / "README.md").read_text()


@pytest.fixture
async def server() -> AsyncIterator[PriceServer]:
    async with PriceServer(now=lambda: NOW_S) as serving:
        yield serving


@pytest.fixture(params=NAMES)
async def source(request: pytest.FixtureRequest, server: PriceServer) -> AsyncIterator[WebSource]:
    made = make(request.param, server)
    yield made
    await made.aclose()


def make(name: str, server: PriceServer, **feed: object) -> WebSource:
    made = live_source(name, replace(FEED, base_url=server.url, **feed))
    assert isinstance(made, WebSource)
    made.rate_per_s = 1e6
    return made


def expected(symbol: str, after_s: int, until_s: int) -> list[tuple[int, float]]:
    ends = range(after_s // 60 * 60 + 60, until_s + 1, 60)
    return [(end_s, price(symbol, end_s)) for end_s in ends]


async def hour(source: WebSource, until_s: int = MINUTE_S) -> list[tuple[int, float]]:
    return sorted(await source.fetch("BTC", until_s - 3600, until_s, 60))


# -- good days -----------------------------------------------------------------------------------------------


async def test_closes_stand_at_the_end_of_their_candles(source: WebSource) -> None:
    assert await hour(source) == expected("BTC", MINUTE_S - 3600, MINUTE_S)


async def test_a_range_off_the_minute_has_just_the_candles_that_ended_in_it(source: WebSource) -> None:
    points = sorted(await source.fetch("ETH", MINUTE_S - 150, MINUTE_S - 1, 60))
    assert points == expected("ETH", MINUTE_S - 150, MINUTE_S - 1)
    assert [ts_s for ts_s, _ in points] == [MINUTE_S - 120, MINUTE_S - 60]


async def test_a_single_candle_can_be_asked_for(source: WebSource) -> None:
    points = await source.fetch("BTC", MINUTE_S - 60, MINUTE_S, 60)
    assert points == expected("BTC", MINUTE_S - 60, MINUTE_S)


async def test_an_empty_range_asks_for_nothing(source: WebSource, server: PriceServer) -> None:
    assert await source.fetch("BTC", MINUTE_S - 30, MINUTE_S - 1, 60) == []
    assert not server.requests


async def test_the_open_candle_never_comes_out(source: WebSource, server: PriceServer) -> None:
    # Our clock is ahead: the minute that it takes for over is still open at the source.
    points = await source.fetch("BTC", MINUTE_S - 120, MINUTE_S + 60, 60)
    assert max(points)[0] == MINUTE_S
    server.now = lambda: MINUTE_S + 60.0
    points = await source.fetch("BTC", MINUTE_S - 120, MINUTE_S + 60, 60)
    assert max(points) == (MINUTE_S + 60, price("BTC", MINUTE_S + 60))


async def test_minutes_without_trades_are_left_out(source: WebSource, server: PriceServer) -> None:
    stopped = range(MINUTE_S - 3000, MINUTE_S - 600)
    server.silent = lambda symbol, open_s: open_s in stopped
    points = await hour(source)
    assert len(points) == 20
    assert not [ts_s for ts_s, _ in points if ts_s - 60 in stopped]


async def test_a_day_comes_in_requests_of_what_the_source_allows(server: PriceServer) -> None:
    for name in set(NAMES) - {"kraken"}:
        server.requests.clear()
        source = make(name, server)
        points = sorted(await source.fetch("BTC", MINUTE_S - 86400, MINUTE_S, 60))
        assert points == expected("BTC", MINUTE_S - 86400, MINUTE_S)
        assert len(server.requests) == math.ceil(1440 / source.rows)
        assert len({request.connection for request in server.requests}) == 1
        await source.aclose()


async def test_kraken_reaches_as_far_back_as_it_says(server: PriceServer) -> None:
    source = make("kraken", server)
    assert source.reach_s is not None
    points = sorted(await source.fetch("BTC", MINUTE_S - 86400, MINUTE_S, 60))
    assert points == expected("BTC", MINUTE_S - source.reach_s, MINUTE_S)
    await source.aclose()


async def test_a_page_is_one_request_also_for_longer_ticks(server: PriceServer) -> None:
    source = make("coinbase", server, tick_s=300)
    after_s = MINUTE_S - source.page_points * 300
    points = dict(await source.fetch("BTC", after_s, MINUTE_S, 300))
    assert len(server.requests) == 1
    assert all(points[at_s] == price("BTC", at_s) for at_s in range(after_s + 300, MINUTE_S + 1, 300))
    await source.aclose()


async def test_each_says_who_it_is(source: WebSource, server: PriceServer) -> None:
    await hour(source)
    (request,) = server.requests
    assert request.headers["user-agent"] == f"condor-lite/{__version__}"
    assert request.headers.get("authorization") == ("Bearer secret" if source.name == "pyth" else None)


async def test_a_proxy_of_the_environment_is_not_asked_for_this_machine(
    server: PriceServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    source = make("binance", server)
    assert await hour(source)
    await source.aclose()


async def test_requests_keep_their_distance(server: PriceServer) -> None:
    source = make("coinbase", server)
    source.rate_per_s = 50.0
    begun_s = time.monotonic()
    for _ in range(6):
        await hour(source)
    assert time.monotonic() - begun_s >= 5 / 50
    await source.aclose()


async def test_a_queue_that_is_too_long_is_said_to_be(server: PriceServer) -> None:
    source = make("kraken", server)
    source.rate_per_s = 0.01
    assert await hour(source)
    with pytest.raises(SourceError, match=r"allows 0\.01 requests a second, and too many wait"):
        await hour(source)
    await source.aclose()


@pytest.mark.parametrize(
    "moment",
    [
        datetime(2016, 12, 31, 23, 59, tzinfo=UTC),  # with a leap second at its end
        datetime(2026, 3, 29, 1, 0, tzinfo=UTC),  # Europe's clocks go forward
        datetime(2026, 11, 1, 6, 0, tzinfo=UTC),  # America's go back
        datetime(2028, 2, 29, 0, 0, tzinfo=UTC),
    ],
    ids=str,
)
async def test_no_calendar_shifts_a_minute(
    source: WebSource, server: PriceServer, moment: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    try:
        at_s = int(moment.timestamp())
        server.now = lambda: at_s + 1800.0
        assert await hour(source, at_s + 1800) == expected("BTC", at_s - 1800, at_s + 1800)
    finally:
        monkeypatch.undo()
        time.tzset()


# -- what the rows may be ------------------------------------------------------------------------------------


async def test_order_and_doubles_do_not_matter(source: WebSource, server: PriceServer) -> None:
    server.order = lambda rows: random.Random(1).sample(rows + rows[:7], len(rows) + 7)
    assert dict(await hour(source)) == dict(expected("BTC", MINUTE_S - 3600, MINUTE_S))


@pytest.mark.parametrize(("close", "read"), [("95000.5", 95000.5), (95000, 95000.0), (0, 0.0), (-1.5, -1.5)])
async def test_a_close_may_be_any_number(
    source: WebSource, server: PriceServer, close: object, read: float
) -> None:
    server.closes[(source.symbol("BTC"), MINUTE_S - 120)] = close
    assert dict(await hour(source))[MINUTE_S - 60] == read  # the feed judges it


async def test_a_close_of_null_is_no_point(source: WebSource, server: PriceServer) -> None:
    server.closes[(source.symbol("BTC"), MINUTE_S - 120)] = None
    points = dict(await hour(source))
    assert len(points) == 59
    assert MINUTE_S - 60 not in points


@pytest.mark.parametrize("close", ["cheap", True, [1.0], {"usd": 1}, ""], ids=repr)
async def test_a_row_of_another_shape_is_named(source: WebSource, server: PriceServer, close: object) -> None:
    server.closes[(source.symbol("BTC"), MINUTE_S - 120)] = close
    with pytest.raises(SourceError, match=r"the answer is not what it should be: .*\[\d+\]"):
        await hour(source)


async def test_times_in_another_unit_give_no_points(source: WebSource, server: PriceServer) -> None:
    server.silent = lambda symbol, open_s: True
    assert await hour(source) == []


@pytest.mark.parametrize("body", [b"[[1,2", b'{"error":[],"result"', b"", b"NaN", b"\xff\xfe"])
async def test_broken_json_is_said_to_be(source: WebSource, server: PriceServer, body: bytes) -> None:
    server.outage = Fault(body=body)
    with pytest.raises(SourceError, match=r"no JSON, or cut short|got `(array|object)`"):
        await hour(source)


@pytest.mark.parametrize("body", [b"[1]", b'{"t":[{}],"s":"ok"}', b'"ok"', b"null", b"[[1]]", b"17"])
async def test_json_of_another_shape_is_said_to_be(
    source: WebSource, server: PriceServer, body: bytes
) -> None:
    server.outage = Fault(body=body)
    with pytest.raises(SourceError, match=r"the answer is not what it should be|the answer has"):
        await hour(source)


@pytest.mark.parametrize("name", ["crunchdao", "pyth"])
async def test_columns_of_different_length_are_refused(server: PriceServer, name: str) -> None:
    source = make(name, server)
    server.outage = Fault(body=b'{"s":"ok","timestamp":[1,2],"close":[1],"t":[1,2],"c":[1]}')
    with pytest.raises(SourceError, match="2 times and 1 closes"):
        await hour(source)
    await source.aclose()


# -- what may go wrong ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (429, "asks for fewer requests"),
        (418, "has banned this address"),
        (451, "is blocked in your country; use another feed.source"),
        (403, "refuses access"),
        (500, "is in trouble"),
        (503, "is in trouble"),
        (302, "points elsewhere"),
        (405, "refuses the request"),
    ],
)
async def test_a_status_is_put_into_words(
    source: WebSource, server: PriceServer, status: int, said: str
) -> None:
    server.faults = [
        Fault(status, b'{"message": "no\\n such\tluck"}', (("Location", "http://other.example/"),))
    ]
    with pytest.raises(SourceError, match=said) as caught:
        await hour(source)
    assert not isinstance(caught.value, UnknownAsset)
    assert f"HTTP {status}" in str(caught.value)
    assert str(caught.value).startswith(f"{source.name} at {server.url} ")
    assert "\n" not in str(caught.value)
    assert caught.value.retry_after_s == {418: 120, 429: 5}.get(status)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("value", "wait_s"),
    [
        ("7", 7),
        (http_date(NOW_S + 30), 30),
        ("9" * 400, 3600),
        (http_date(NOW_S + 1e8), 3600),
        *((value, None) for value in ("soon", "-3", "", "1e9", http_date(NOW_S - 30))),
    ],
)
@pytest.mark.parametrize("status", [429, 503])
async def test_retry_after_is_seconds_or_a_date_on_the_sources_clock(
    server: PriceServer, status: int, value: str, wait_s: float | None
) -> None:
    source = make("coinbase", server)
    server.faults = [Fault(status, headers=(("Retry-After", value),))]
    with pytest.raises(SourceError) as caught:
        await hour(source)
    assert caught.value.retry_after_s == (wait_s or (5 if status == 429 else None))
    await source.aclose()


async def test_a_source_that_wants_to_be_left_alone_is(
    source: WebSource, server: PriceServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "time", SimpleNamespace(time=lambda: NOW_S, monotonic=lambda: 50.0))
    server.faults = [Fault(429, headers=(("Retry-After", "40"),))]
    with pytest.raises(SourceError):
        await hour(source)
    with pytest.raises(SourceError, match=r"left alone for 40 s more \(HTTP 429\)") as caught:
        await source.fetch("ETH", MINUTE_S - 60, MINUTE_S, 60)
    assert caught.value.retry_after_s == 40
    assert len(server.requests) == 1


async def test_a_web_page_is_not_taken_for_prices(source: WebSource, server: PriceServer) -> None:
    server.faults = [HTML, Fault(502, HTML.body)]
    with pytest.raises(SourceError, match="answered with a web page"):
        await hour(source)
    with pytest.raises(SourceError, match=r"is in trouble \(HTTP 502\)$"):
        await hour(source)


async def test_a_reset_in_the_middle_of_a_body(source: WebSource, server: PriceServer) -> None:
    server.faults = [RESET]
    with pytest.raises(SourceError, match="the connection broke off"):
        await hour(source)
    assert len(await hour(source)) == 60


async def test_a_body_that_is_cut_short(source: WebSource, server: PriceServer) -> None:
    server.faults = [CUT]
    with pytest.raises(SourceError, match="no JSON, or cut short"):
        await hour(source)
    assert len(await hour(source)) == 60


async def test_a_hung_connection_is_given_up(
    source: WebSource, server: PriceServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "_TIMEOUT_S", 0.2)
    server.faults = [HANG]
    with pytest.raises(SourceError, match=r"no answer within 0\.2 s"):
        await hour(source)
    monkeypatch.undo()
    assert len(await hour(source)) == 60


async def test_a_body_without_end_is_not_read(server: PriceServer) -> None:
    source = make("kraken", server)
    server.faults = [Fault(body=b" " * (web._MOST_BYTES + 1))]
    with pytest.raises(SourceError, match="more than 1 MiB"):
        await hour(source)
    await source.aclose()


@pytest.mark.parametrize("host", ["127.0.0.1", "nowhere.invalid"])
async def test_nobody_there(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    known = socket.getaddrinfo

    def look_up(name: bytes | str, *more: Any, **options: Any) -> Any:
        """As a name server says that answers, and at once."""
        if name in ("nowhere.invalid", b"nowhere.invalid"):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return known(name, *more, **options)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        url = f"http://{host}:{unheard.getsockname()[1]}"
        source = live_source("coinbase", replace(FEED, base_url=url))
        with pytest.raises(SourceError, match=f"coinbase: can't connect to {url} .*base_url"):
            await source.fetch("BTC", MINUTE_S - 60, MINUTE_S, 60)
        await source.aclose()


async def test_kraken_says_what_is_wrong_with_status_200(server: PriceServer) -> None:
    source = make("kraken", server)
    server.faults = [Fault(body=b'{"error":["EGeneral:Too many requests"]}')]
    with pytest.raises(SourceError, match="refuses the request: EGeneral:Too many requests") as caught:
        await hour(source)
    assert caught.value.retry_after_s == 5
    server.faults = [Fault(body=b'{"error":["EService:Unavailable"]}')]
    with pytest.raises(SourceError, match="EService:Unavailable") as caught:
        await hour(source)
    assert caught.value.retry_after_s is None
    await source.aclose()


async def test_pyth_says_what_is_wrong_with_status_200(server: PriceServer) -> None:
    source = make("pyth", server)
    server.faults = [Fault(body=b'{"s":"error","errmsg":"range too long"}'), Fault(body=b'{"s":"no_data"}')]
    with pytest.raises(SourceError, match="refuses the request: range too long"):
        await hour(source)
    assert await hour(source) == []
    await source.aclose()


# -- clocks --------------------------------------------------------------------------------------------------


async def test_the_sources_clock_is_compared_with_ours(
    source: WebSource, server: PriceServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours_s = NOW_S + 0.9
    monkeypatch.setattr(web, "time", SimpleNamespace(time=lambda: ours_s, monotonic=time.monotonic))
    assert source.skew_s is None
    server.dated = False
    assert len(await hour(source)) == 60
    assert source.skew_s is None
    server.dated = True
    for ahead_s in (-30.0, 0.0, 45.0):
        server.now = lambda ahead_s=ahead_s: ours_s + ahead_s
        for _ in range(5):
            await hour(source)
        assert source.skew_s == pytest.approx(ahead_s, abs=0.5), "a Date is of whole seconds"


# -- symbols -------------------------------------------------------------------------------------------------


async def test_every_source_has_the_assets_of_the_game_as_far_as_it_trades_them(server: PriceServer) -> None:
    for name in NAMES:
        source = make(name, server)
        for asset in ("BTC", "ETH", "SOL", *(["XAU"] if name in ("crunchdao", "pyth") else [])):
            assert await source.fetch(asset, MINUTE_S - 60, MINUTE_S, 60) == expected(
                asset, MINUTE_S - 60, MINUTE_S
            )
        await source.aclose()


@pytest.mark.parametrize(
    ("name", "stand_in"), [("coinbase", "PAXG-USD"), ("kraken", "PAXGUSD"), ("binance", "PAXGUSDT")]
)
async def test_gold_is_not_silently_a_token_of_it(server: PriceServer, name: str, stand_in: str) -> None:
    source = make(name, server)
    with pytest.raises(
        UnknownAsset, match=f'{name} has no symbol for XAU, .*only a token of it: XAU = "{stand_in}"'
    ):
        await source.fetch("XAU", MINUTE_S - 60, MINUTE_S, 60)
    assert not server.requests
    await source.aclose()
    source = make(name, server, symbols={"XAU": stand_in})
    assert await source.fetch("XAU", MINUTE_S - 60, MINUTE_S, 60) == expected("PAXG", MINUTE_S - 60, MINUTE_S)
    await source.aclose()


async def test_two_sources_may_call_an_asset_differently(server: PriceServer) -> None:
    symbols = {"BTC": "BTC-EUR", "kraken": {"BTC": "XBTUSD"}}
    for name, symbol in (("coinbase", "BTC-EUR"), ("kraken", "XBTUSD")):
        source = make(name, server, symbols=symbols)
        assert source.symbol("BTC") == symbol
        assert await hour(source)
        await source.aclose()


@pytest.mark.parametrize(
    ("name", "symbol", "offer"),
    [
        ("coinbase", "BTC-USB", "BTC-USD"),
        ("coinbase", "DOGE-USDC", "DOGE-USD"),
        ("kraken", "BTCUSD", "XBTUSD"),
        ("binance", "DOGEUSD", "DOGEUSDT"),
        ("crunchdao", "BITCOIN", "BTC"),
        ("pyth", "BTC/USD", "Crypto.BTC/USD"),
    ],
)
async def test_an_unknown_symbol_comes_with_what_is_there(
    server: PriceServer, name: str, symbol: str, offer: str
) -> None:
    source = make(name, server, symbols={"BTC": symbol})
    with pytest.raises(UnknownAsset) as caught:
        await hour(source)
    assert f'does not know "{symbol}" for BTC' in str(caught.value)
    assert offer in caught.value.offers
    assert len(caught.value.offers) <= 5
    await source.aclose()


async def test_an_unknown_symbol_is_said_to_be_also_where_the_list_fails(server: PriceServer) -> None:
    source = make("coinbase", server, symbols={"BTC": "BTC/USD"})
    server.faults = [Fault(404, b'{"message":"NotFound"}'), HTML]
    with pytest.raises(UnknownAsset, match='does not know "BTC/USD"'):
        await hour(source)
    assert server.requests[0].path == "/products/BTC/USD/candles"
    await source.aclose()


async def test_a_wrong_address_is_no_unknown_symbol(source: WebSource, server: PriceServer) -> None:
    server.faults = [Fault(404, b"<html>nginx</html>")]
    with pytest.raises(SourceError, match="HTTP 404") as caught:
        await hour(source)
    assert not isinstance(caught.value, UnknownAsset)


# -- making one ----------------------------------------------------------------------------------------------


def test_pyth_needs_a_key() -> None:
    with pytest.raises(ConfigError, match=r"feed\.api_key: must be set"):
        live_source("pyth", replace(FEED, api_key=""))


def own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str, name: str = "own_prices:make") -> str:
    (tmp_path / "own_prices.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_prices", raising=False)
    return name


GOOD = """
from condor_lite.prices.source import Source

class Own(Source):
    name = "own"
    async def fetch(self, asset, after_s, until_s, step_s):
        return []

def make(feed):
    return Own()
"""


@pytest.mark.parametrize(
    ("code", "name", "said"),
    [
        (
            GOOD,
            "no_such_module:make",
            "there is no module no_such_module; put no_such_module.py beside the config",
        ),
        ("import no_such_library", "own_prices:make", "own_prices can't be imported: ModuleNotFoundError"),
        ("1 / 0", "own_prices:make", "own_prices can't be imported: ZeroDivisionError"),
        (GOOD, "own_prices:makes", r"own_prices has nothing of this name; write a function makes\(feed\)"),
        ("make = 7", "own_prices:make", "own_prices has make, but can't call it"),
        ("def make(): pass", "own_prices:make", r"make\(feed\) failed: TypeError"),
        ("def make(feed): pass", "own_prices:make", r"\(NoneType\) needs `async def fetch"),
        (GOOD.replace("async ", ""), "own_prices:make", r"\(Own\) needs `async def fetch"),
        (GOOD.replace('name = "own"', "page_points = 0"), "own_prices:make", "needs `name`, a string"),
        (
            GOOD.replace('name = "own"', 'name = ""; page_points = 0'),
            "own_prices:make",
            "needs `page_points`",
        ),
        (GOOD.replace("(Source)", ""), "own_prices:make", "needs a method `aclose`"),
    ],
)
def test_what_is_wrong_with_an_own_feed_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str, name: str, said: str
) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        live_source(own(monkeypatch, tmp_path, code, name), FEED)
    assert all(problem.startswith(f'feed.source = "{name}": ') for problem in caught.value.problems)


def test_an_own_feed_may_complain_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code = "from condor_lite.errors import ConfigError as E\ndef make(feed): raise E(['feed.api_key: mine'])"
    with pytest.raises(ConfigError, match=r"^feed\.api_key: mine$"):
        live_source(own(monkeypatch, tmp_path, code), FEED)


async def test_the_own_feed_of_the_readme_works(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, server: PriceServer
) -> None:
    code = README.split("### A feed of your own")[1].split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) <= 15
    source = live_source(
        own(monkeypatch, tmp_path, code, "own_prices:source"), replace(FEED, base_url=f"{server.url}/own")
    )
    assert (source.name, source.simulated) == ("my_prices", False)
    assert await source.fetch("BTC", MINUTE_S - 600, MINUTE_S, 60) == expected(
        "BTC", MINUTE_S - 600, MINUTE_S
    )
    assert source.end_s("BTC") is None
    await source.aclose()
