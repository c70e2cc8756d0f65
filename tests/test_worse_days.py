"""Days on which a source lies, floods, bans or drips, and on which the game is killed or set up anew."""

from __future__ import annotations

import asyncio
import gzip
import random
import re
import signal
import sqlite3
import ssl
import tracemalloc
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import anyio
import pytest
import zstandard
from structlog.testing import capture_logs

from condor_lite.clock import SteppedClock
from condor_lite.config import FeedConfig
from condor_lite.errors import StartError
from condor_lite.prices import online, web
from condor_lite.prices.feed import Feed
from condor_lite.prices.replay import ReplaySource
from condor_lite.prices.source import SourceError
from condor_lite.prices.sources import LIVE, live_source
from condor_lite.prices.synthetic import SyntheticSource
from condor_lite.prices.web import WebSource
from condor_lite.storage import repositories
from condor_lite.storage.database import Database
from tests.price_server import CUT, HANG, HTML, RESET, TRICKLE, Fault, PriceServer, http_date, price
from tests.program import program
from tests.stage import until
from tests.test_feed import (
    DAY_S,
    HOUR_S,
    LiveSource,
    configure,
    held,
    price_at,
    record,
    running,
    stored,
    told,
    until_history,
)
from tests.test_live_game import read
from tests.test_secure import STRANGER, pem, rsa_key

pytestmark = pytest.mark.anyio

T = 1_763_690_400


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SteppedClock:
    """The game's, the exchange's and this machine's."""
    stepped = SteppedClock(T + 5)
    monkeypatch.setattr(web, "time", SimpleNamespace(time=stepped.now, monotonic=stepped.now))
    return stepped


@pytest.fixture
async def server(clock: SteppedClock) -> AsyncIterator[PriceServer]:
    async with PriceServer(now=clock.now) as serving:
        yield serving


@pytest.fixture
async def db(tmp_path: Path) -> AsyncIterator[Database]:
    async with Database(tmp_path / "game.db") as opened:
        yield opened


def at(server: PriceServer, name: str = "coinbase", **feed: object) -> WebSource:
    made = live_source(name, replace(FeedConfig(api_key="secret"), base_url=server.url, **feed))  # type: ignore[arg-type]
    assert isinstance(made, WebSource)
    made.rate_per_s = 1e6
    return made


def right(asset: str, first_s: int, last_s: int) -> dict[int, float]:
    return {ts_s: price(asset, ts_s) for ts_s in range(first_s, last_s + 1, 60)}


# -- what an answer may be -----------------------------------------------------------------------------------


def packed(packing: str) -> Fault:
    """An answer of 64 MiB in a few hundred kB, or fewer."""
    blank = b" " * 2**26
    body = gzip.compress(blank, 1) if packing == "gzip" else zstandard.ZstdCompressor().compress(blank)
    return Fault(body=body, headers=(("Content-Encoding", packing),))


@pytest.mark.parametrize(("packing", "said"), [("gzip", "more than 1 MiB"), ("zstd", "was not asked for")])
async def test_an_answer_that_unpacks_to_much_is_not_unpacked(packing: str, said: str) -> None:
    async with PriceServer() as server:
        server.outage = packed(packing)
        source = at(server)
        tracemalloc.start()
        try:
            with pytest.raises(SourceError, match=said):
                await source.fetch("BTC", T - 3600, T, 60)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
            await source.aclose()
        assert peak < 2**24
        assert server.requests[0].headers["accept-encoding"] == "gzip"


async def test_a_packed_answer_is_read_and_one_that_is_broken_is_said_to_be(server: PriceServer) -> None:
    source = at(server, "crunchdao")
    body = gzip.compress(b'{"timestamp": [%d], "close": [7.5]}' % (T - 60))
    packing = (("Content-Encoding", "gzip"),)
    server.faults = [
        Fault(body=body, headers=packing),
        Fault(body=body[:-12], headers=packing),
        Fault(body=b"no gzip", headers=packing),
    ]
    assert await source.fetch("BTC", T - 3600, T, 60) == [(T, 7.5)]
    with pytest.raises(SourceError, match="no JSON, or cut short"):
        await source.fetch("BTC", T - 3600, T, 60)
    with pytest.raises(SourceError, match="can't be unpacked"):
        await source.fetch("BTC", T - 3600, T, 60)
    await source.aclose()


@pytest.mark.parametrize("name", ["coinbase", "kraken"])
async def test_ten_thousand_rows_that_nobody_asked_for_are_left_out(server: PriceServer, name: str) -> None:
    source = at(server, name)
    asked = sorted(await source.fetch("BTC", T - 3600, T, 60))
    server.order = lambda rows: rows * (1 + 10_000 // len(rows))
    points = await source.fetch("BTC", T - 3600, T, 60)
    assert len(points) > 9_000
    assert sorted(set(points)) == asked
    server.order = list
    own = server.opens
    server.opens = lambda symbol, first_s, last_s: own(symbol, first_s - 600_000, last_s)  # type: ignore[method-assign]
    assert sorted(await source.fetch("BTC", T - 3600, T, 60)) == asked
    await source.aclose()


async def test_an_answer_for_two_pairs_is_not_mixed_into_one_price(server: PriceServer) -> None:
    source = at(server, "kraken")
    row = b'[%d,"1","1","1","%d","1","1",1]'
    pairs = b'"XXBTZUSD":[%b],"XETHZUSD":[%b]' % (row % (T - 60, 95_000), row % (T - 120, 3_300))
    server.faults = [
        Fault(body=b'{"error":[],"result":{%b,"last":%d}}' % (pairs, T)),
        Fault(body=b'{"error":[],"result":{"last":1}}'),
    ]
    for count in (2, 0):
        with pytest.raises(SourceError, match=f"the answer has {count} pairs, where one was asked for"):
            await source.fetch("BTC", T - 3600, T, 60)
    await source.aclose()


async def test_an_answer_that_drips_is_given_up(server: PriceServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "_TIMEOUT_S", 0.2)
    source = at(server)
    server.faults = [TRICKLE]
    with pytest.raises(SourceError, match=r"no answer within 0\.2 s"):
        await source.fetch("BTC", T - 3600, T, 60)
    monkeypatch.undo()
    await source.aclose()


async def test_a_redirect_to_itself_is_not_followed(server: PriceServer) -> None:
    source = at(server)
    server.outage = Fault(302, headers=(("Location", "/products/BTC-USD/candles"),))
    with pytest.raises(SourceError, match="points elsewhere"):
        await source.fetch("BTC", T - 3600, T, 60)
    assert len(server.requests) == 1
    await source.aclose()


async def test_a_certificate_that_nobody_trusts_is_said_to_be(tmp_path: Path) -> None:
    key = rsa_key("models")
    (tmp_path / "crt").write_bytes(STRANGER.issue("elsewhere", key, ip="127.0.0.1"))
    (tmp_path / "key").write_bytes(pem(key))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tmp_path / "crt", tmp_path / "key")
    serving = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0, ssl=context)
    async with serving:
        port = serving.sockets[0].getsockname()[1]
        source = live_source("coinbase", FeedConfig(base_url=f"https://127.0.0.1:{port}"))
        with pytest.raises(SourceError, match=r"CERTIFICATE_VERIFY_FAILED.*SSL_CERT_FILE"):
            await source.fetch("BTC", T - 3600, T, 60)
        await source.aclose()


async def complaints(source: WebSource) -> list[str]:
    """What `check --online` says of BTC and of all of it."""
    looks, notes = await online.look([source], ["BTC"], 60, 180, web.time.time)
    return [*online.problems(looks), *notes]


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (Fault(429), r"asks for fewer requests \(HTTP 429\)"),
        (Fault(451), r"is blocked in your country; use another feed\.source \(HTTP 451\)"),
        (Fault(502, HTML.body), r"is in trouble \(HTTP 502\)"),
        (HTML, "answered with a web page; is there a proxy or a login in between"),
        (Fault(302), r"points elsewhere; set feed\.base_url to where it is now \(HTTP 302\)"),
        (CUT, "BTC-USD: the answer is no JSON, or cut short"),
        (RESET, "the connection broke off"),
        (HANG, r"no answer within 0\.2 s"),
        (TRICKLE, r"no answer within 0\.2 s"),
        (Fault(body=b'{"candles": []}'), "BTC-USD: the answer is not what it should be"),
    ],
    ids=lambda given: None if isinstance(given, str) else given.kind + str(given.status),
)
async def test_the_check_says_what_where_and_what_to_do(
    server: PriceServer, monkeypatch: pytest.MonkeyPatch, fault: Fault, said: str
) -> None:
    if fault in (HANG, TRICKLE):
        monkeypatch.setattr(web, "_TIMEOUT_S", 0.2)
    server.outage = fault
    problem, what_to_do = await complaints(at(server))
    assert re.match(f"BTC: coinbase at {server.url}:? {said}", problem)
    assert what_to_do == "what fails now may work later: try again, or name a second source in feed.source"


async def test_the_check_says_whose_prices_are_old_or_not_there_yet(server: PriceServer) -> None:
    assert await complaints(at(server)) == []
    server.shift_s = -HOUR_S
    problem, _ = await complaints(at(server))
    assert problem == (
        "BTC: the newest price of coinbase is 60 min old, more than feed.max_staleness (3m): rounds are "
        "skipped; is its market closed?"
    )
    server.shift_s = -DAY_S
    assert (await complaints(at(server)))[0] == (
        "BTC: coinbase has no price in the last 4 h; is its market closed?"
    )
    server.shift_s = DAY_S
    assert "candles lie in the future" in (await complaints(at(server)))[0]


# -- times that are not right --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(LIVE))
async def test_candles_of_the_future_are_said_to_be_and_those_of_the_past_are_no_news(
    server: PriceServer, name: str
) -> None:
    source = at(server, name)
    server.shift_s = DAY_S
    with pytest.raises(SourceError, match="candles lie in the future"):
        await source.fetch("BTC", T - 3600, T, 60)
    server.shift_s = -DAY_S
    assert await source.fetch("BTC", T - 3600, T, 60) == []
    await source.aclose()


@pytest.mark.parametrize("shift_s", [-DAY_S, -HOUR_S, DAY_S], ids=["yesterday", "an hour ago", "tomorrow"])
@pytest.mark.parametrize("name", ["coinbase", "kraken"])
async def test_while_a_source_s_times_are_wrong_nothing_comes_in_and_then_all_of_it(
    db: Database, clock: SteppedClock, server: PriceServer, name: str, shift_s: int
) -> None:
    source = at(server, name)
    feed = Feed(configure("BTC"), clock, db, source)
    await feed.start()
    async with running(feed):
        await clock.run_until(T + 600)
        server.shift_s = shift_s
        with capture_logs() as logs:
            await clock.run_until(T + 2400)
            (state,) = feed.states()
            assert state.stale
            assert state.newest_ts_s == T + 600 - 60
            assert len(logs) <= 1
        server.shift_s = 0
        await clock.run_until(T + 3000)
    assert not feed.states()[0].error
    assert await stored(db, "BTC") == held(feed, "BTC") == right("BTC", min(held(feed, "BTC")), T + 2940)
    await source.aclose()


async def test_a_source_whose_clock_jumps_to_and_fro_is_told_of_now_and_then(
    db: Database, clock: SteppedClock, server: PriceServer
) -> None:
    server.now = lambda: clock.now() - random.Random(int(clock.now())).choice([0, 10, 3600])
    source = at(server)
    feed = Feed(configure("BTC"), clock, db, source)
    with capture_logs() as logs:
        await feed.start()
        async with running(feed):
            await clock.run_until(T + HOUR_S)
            server.now = clock.now
            await clock.run_until(T + HOUR_S + 300)
    assert 1 <= told(logs, "clock_differs").count("clock_differs") <= 7
    assert len(logs) <= 18
    assert held(feed, "BTC") == right("BTC", min(held(feed, "BTC")), T + HOUR_S + 240)
    await source.aclose()


# -- an hour of 429 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, "-3", "999999999", http_date(T + 1800)])
async def test_after_an_hour_of_too_many_requests_the_game_heals(
    db: Database, clock: SteppedClock, server: PriceServer, value: str | None
) -> None:
    source = at(server)
    assets = ("BTC", "ETH")
    feed = Feed(configure(*assets, history_s=DAY_S), clock, db, source)
    await feed.start()
    server.requests.clear()
    server.outage = Fault(429, headers=(("Retry-After", value),) if value else ())
    with capture_logs() as logs:
        async with running(feed):
            await clock.run_until(T + HOUR_S)
            assert all(state.stale for state in feed.states())
            assert all("HTTP 429" in str(state.error) for state in feed.states())
            assert len(server.requests) <= 2 * 60 * len(assets) * 1.5, "asset and its history once a minute"
            server.outage = None
            await clock.run_until(T + 2 * HOUR_S + 300)
    assert 1 <= len(told(logs, "feed_failing", "history_failing")) <= 2 * len(assets)
    for asset in assets:
        assert held(feed, asset) == right(asset, min(held(feed, asset)), T + 2 * HOUR_S + 240)
        assert len(held(feed, asset)) >= 1440
    await source.aclose()


async def test_who_waits_for_a_turn_asks_nothing_once_the_source_wants_to_be_left_alone(
    server: PriceServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = at(server)
    source.rate_per_s = 2.0
    server.outage = Fault(429)
    errors: list[SourceError] = []

    async def turn_comes(in_s: float) -> None:
        """For all but the first: once that one was told to leave the source alone."""
        await until(lambda: not in_s or errors)

    monkeypatch.setattr(web, "asyncio", SimpleNamespace(sleep=turn_comes))

    async def ask(asset: str) -> None:
        try:
            await source.fetch(asset, T - 3600, T, 60)
        except SourceError as error:
            errors.append(error)

    async with anyio.create_task_group() as tasks:
        for asset in ("BTC", "ETH", "SOL"):
            tasks.start_soon(ask, asset)
    assert len(errors) == 3
    assert len(server.requests) == 1
    await source.aclose()


# -- days of it ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", ["always", "now and then"])
async def test_an_asset_that_fails_for_hours_costs_no_other_a_tick_and_the_log_few_lines(
    db: Database, fails: str
) -> None:
    rng = random.Random(1)
    end_s = T + 8 * HOUR_S

    def fault(asset: str, until_s: int) -> None:
        now_and_then = clock.now() < end_s and rng.random() < 0.5
        if asset == "ETH" and clock.now() > T + 65 and (fails == "always" or now_and_then):
            raise OSError("HTTP 500")

    clock = SteppedClock(T + 2)
    source = LiveSource(fault=fault)
    feed = Feed(configure("BTC", "ETH"), clock, db, source)
    await feed.start()
    ticks: Counter[str] = Counter()
    feed.subscribe(ticks.update)
    source.asked.clear()
    minutes = 8 * 60 + 1
    with capture_logs() as logs:
        async with running(feed):
            await clock.run_until(end_s + 100)  # longer than it ever waits before it tries again
    assert ticks["BTC"] == minutes
    assert len(logs) <= (1 if fails == "always" else 2 * 8 * HOUR_S // 600)
    asked = Counter(asset for asset, *_ in source.asked)
    assert asked["ETH"] <= 4 * minutes
    line = feed._lines["ETH"]
    assert max(len(line.supply.own), len(line.supply.differing), len(line.supply.rejected)) <= 60
    if fails == "always":
        assert feed.book.newest_s("ETH") == T + 60
    else:
        assert held(feed, "ETH") == {ts_s: price_at(ts_s) for ts_s in held(feed, "BTC")}


async def test_a_history_full_of_absurd_prices_is_told_of_in_a_line_a_page(db: Database) -> None:
    source = LiveSource(page_points=60, price=lambda ts_s: 1e9 if ts_s % 180 == 0 else price_at(ts_s))
    feed = Feed(configure("BTC", history_s=DAY_S), SteppedClock(T + 62), db, source)
    with capture_logs() as logs:
        await feed.start()
        async with running(feed):
            await until_history(feed)
    dropped = [entry for entry in logs if entry["event"] == "prices_dropped"]
    assert len(dropped) <= 24
    assert sum(entry["count"] for entry in dropped) == pytest.approx(480, abs=24)
    assert max(held(feed, "BTC").values()) < 1000


# -- set up anew ---------------------------------------------------------------------------------------------


async def test_an_asset_that_is_added_gets_its_history_while_the_others_go_on(db: Database) -> None:
    source = LiveSource(page_points=60)
    clock = SteppedClock(T + 2)
    feed = Feed(configure("BTC", history_s=DAY_S), clock, db, source)
    await feed.start()
    async with running(feed):
        await clock.run_until(T + 62)
    source.asked.clear()

    def fault(asset: str, until_s: int) -> None:
        if asset == "SOL" and until_s < T + 60 and clock.now() < T + 600:
            raise OSError("HTTP 500")

    source.fault = fault
    feed = Feed(configure("BTC", "SOL", history_s=DAY_S), clock, db, source)
    await feed.start()
    heard: Counter[str] = Counter()
    feed.subscribe(heard.update)
    async with running(feed):
        await clock.run_until(T + 572)
        assert heard["BTC"] == heard["SOL"] == 8, "ticks wait for nobody's history"
        assert feed.states()[1].history < 0.1
        await clock.run_until(T + 722)
    assert feed.states()[1].history == 1
    assert all(until_s > T for asset, _, until_s, _ in source.asked if asset == "BTC"), "nothing anew"
    assert (
        held(feed, "SOL").items() >= {ts_s: price_at(ts_s) for ts_s in range(T - DAY_S + 180, T, 60)}.items()
    )
    assert await stored(db, "SOL") == held(feed, "SOL")


async def test_an_asset_that_is_left_out_is_not_asked_for_and_its_prices_stay(db: Database) -> None:
    clock = SteppedClock(T + 2)
    source = LiveSource()
    await Feed(configure("BTC", "ETH"), clock, db, source).start()
    before = await stored(db, "ETH")
    source.asked.clear()
    feed = Feed(configure("BTC"), clock, db, source)
    await feed.start()
    async with running(feed):
        await clock.run_until(T + 602)
    assert {asset for asset, *_ in source.asked} == {"BTC"}
    assert await stored(db, "ETH") == before
    feed = Feed(configure("BTC", "ETH"), clock, db, source)
    await feed.start()
    async with running(feed):
        await clock.run_until(T + 662)
    assert held(feed, "ETH") == held(feed, "BTC"), "taken in again, nothing lacks"


@pytest.mark.parametrize("then", [["kraken"], ["kraken", "coinbase"]], ids=str)
async def test_another_live_source_goes_on_where_the_first_one_stopped(db: Database, then: list[str]) -> None:
    def level(name: str) -> Callable[[int], float]:
        return lambda ts_s: (2 if name == "kraken" else 1) * price_at(ts_s)

    def sources(names: list[str]) -> list[LiveSource]:
        return [LiveSource(name=name, price=level(name)) for name in names]

    clock = SteppedClock(T + 2)
    for names, until_s in ((["coinbase"], T + 302), (then, T + 602), (["coinbase", "kraken"], T + 902)):
        feed = Feed(configure("BTC"), clock, db, *sources(names))
        with capture_logs() as logs:
            await feed.start()
            async with running(feed):
                await clock.run_until(until_s)
        assert not told(logs, "price_differs", "price_revised", "feed_source_changed", "history_is_short")
        assert feed.states()[0].source == names[0]
    series, names = await db.read(repositories.load_series, "BTC", T, T + 900)
    assert series.source is not None
    assert [names[number] for number in series.source.tolist()] == ["coinbase"] * 6 + ["kraken"] * 5 + [
        "coinbase"
    ] * 5
    assert all(
        price == level(names[number])(ts_s)
        for ts_s, price, number in zip(
            series.ts_s.tolist(), series.price.tolist(), series.source.tolist(), strict=True
        )
    )


async def test_a_live_game_does_not_go_on_with_a_simulation(db: Database, tmp_path: Path) -> None:
    await Feed(configure("BTC"), SteppedClock(T + 2), db, LiveSource()).start()
    record(tmp_path, 300, "BTC")
    recorded = ReplaySource.load(tmp_path, ["BTC"], 60, HOUR_S)
    for source in (SyntheticSource(0), recorded):
        with pytest.raises(StartError, match=r"BTC prices are live \(exchange\).*another storage\.path"):
            await Feed(configure("BTC"), SteppedClock(T + 120), db, source).start()


# -- killed --------------------------------------------------------------------------------------------------

GAME = """
[[game.settings]]
assets = ["BTC", "ETH"]
horizon = "3m"
step = "1m"
interval = "2m"

[feed]
source = "coinbase"
history = "1d"

[scoring]
workers = 1
"""

MODEL = """
from pathlib import Path

from condor_lite.tracker import TrackerBase

class Steady(TrackerBase):
    def tick(self, data):
        super().tick(data)
        with Path(__file__).with_name("given").open("a") as file:
            print(*(len(points) for points in data.values()), file=file)

    def predict(self, asset, horizon, step):
        return [{"type": "builtin", "name": "norm", "params": {"loc": 0, "scale": 4e-4}}] * (horizon // step)
"""


async def test_killed_in_the_middle_of_its_history_it_goes_on_where_it_was(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(GAME)
    model = tmp_path / "models" / "steady"
    model.mkdir(parents=True)
    (model / "main.py").write_text(MODEL)
    given = model / "given"

    def points() -> dict[str, dict[int, float]]:
        found: dict[str, dict[int, float]] = {"BTC": {}, "ETH": {}}
        with suppress(sqlite3.OperationalError):  # before the first start has made the tables
            for asset, ts_s, value in read(tmp_path, "SELECT asset, ts_s, price FROM price"):
                found[asset][ts_s] = value
        return found

    def count() -> int:
        return sum(map(len, points().values()))

    async with PriceServer() as server:
        environ = {"CONDOR_LITE__FEED__BASE_URL": server.url, "CONDOR_LITE__ORCHESTRATOR__PORT": "0"}
        before = points()
        for enough in (600, 1_500):
            with program(tmp_path, **environ) as run:
                await asyncio.to_thread(run.until, lambda enough=enough: count() >= enough)
                await asyncio.to_thread(run.end, signal.SIGKILL)
            for request in server.requests:
                own = before[request.path.split("/")[2].removesuffix("-USD")]
                first_s, last_s = (
                    datetime.fromisoformat(request.query[name]).timestamp() for name in ("start", "end")
                )
                assert not own or first_s < min(own) or last_s + 1 >= max(own), "it is there already"
            server.requests.clear()
            now = points()
            assert all(now[asset].items() >= before[asset].items() for asset in before)
            before = now
        with program(tmp_path, **environ) as run:
            await asyncio.to_thread(run.until, lambda: given.exists() and "\n" in given.read_text())
            await asyncio.to_thread(run.until, lambda: count() >= 2 * 1440)  # no model waits for the storing
            assert await asyncio.to_thread(run.end) == 0
    for asset, by_time in points().items():
        assert by_time == right(asset, min(by_time), max(by_time))
    first = given.read_text().splitlines()[0].split()
    assert [int(number) >= 1440 for number in first] == [True, True], "models wait for all of the history"
