"""The feed between a source and the game: history, ticks, gaps, failures, restarts."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import pytest
from structlog.testing import capture_logs

from condor_lite.clock import SteppedClock
from condor_lite.config import (
    BackupConfig,
    Config,
    FeedConfig,
    GameConfig,
    LogConfig,
    OrchestratorConfig,
    PredictConfig,
    ReportConfig,
    ScoringConfig,
    StorageConfig,
    WebhookConfig,
)
from condor_lite.errors import ConfigError, StartError, StorageUnavailable
from condor_lite.game.entities import Setting
from condor_lite.prices import intake, saving
from condor_lite.prices.book import PriceBook
from condor_lite.prices.feed import Feed
from condor_lite.prices.replay import ReplaySource
from condor_lite.prices.source import SourceError, UnknownAsset
from condor_lite.prices.sources import make_sources
from condor_lite.prices.synthetic import SyntheticSource
from condor_lite.storage import repositories
from condor_lite.storage.database import Database

pytestmark = pytest.mark.anyio

T = 1_763_690_400
HOUR_S = 3600
DAY_S = 86400


def configure(*assets: str, horizon_s: int = HOUR_S, **feed: object) -> Config:
    settings = tuple(Setting(asset, horizon_s, 60, 60) for asset in assets or ("BTC", "ETH"))
    feed_config = FeedConfig(**{"tick_s": 60, "history_s": 2 * HOUR_S, "max_staleness_s": 180} | feed)  # type: ignore[arg-type]
    return Config(
        GameConfig(settings),
        feed_config,
        OrchestratorConfig(),
        PredictConfig(),
        ScoringConfig(),
        StorageConfig(),
        BackupConfig(),
        WebhookConfig(),
        ReportConfig(),
        LogConfig(),
    )


def price_at(ts_s: int) -> float:
    return 100 + ts_s % 10_007 / 100


@dataclass
class LiveSource:
    """Answers like an exchange: newest first, after a wait. `fault(asset, until_s)` may raise or wait."""

    simulated: bool = False
    name: str = "exchange"
    latency_s: float = 1.0
    page_points: int = 300
    reach_s: int | None = None
    skew_s: float | None = None
    quiet: set[int] = field(default_factory=set)
    fault: Callable[[str, int], object] | None = None
    asked: list[tuple[str, int, int, int]] = field(default_factory=list)
    price: Callable[[int], float] = price_at

    async def fetch(self, asset: str, after_s: int, until_s: int, step_s: int) -> list[tuple[int, float]]:
        self.asked.append((asset, after_s, until_s, step_s))
        if not self.simulated:
            await asyncio.sleep(0)
        if self.fault is not None and asyncio.iscoroutine(waiting := self.fault(asset, until_s)):
            await waiting
        first_s = after_s // step_s * step_s + step_s
        times_s = [ts_s for ts_s in range(first_s, until_s + 1, step_s) if ts_s not in self.quiet]
        return [(ts_s, self.price(ts_s)) for ts_s in reversed(times_s)]

    def end_s(self, asset: str) -> int | None:
        return None

    async def aclose(self) -> None:
        pass


@pytest.fixture
async def db(tmp_path: Path) -> AsyncIterator[Database]:
    async with Database(tmp_path / "game.db") as opened:
        yield opened


@asynccontextmanager
async def running(feed: Feed) -> AsyncIterator[None]:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(feed.run)
        yield
        tasks.cancel_scope.cancel()


async def stored(db: Database, asset: str) -> dict[int, float]:
    ts_s, price = await db.read(repositories.load_prices, asset, 0, 2**40)
    return dict(zip(ts_s.tolist(), price.tolist(), strict=True))


def held(feed: Feed, asset: str) -> dict[int, float]:
    ts_s, price = feed.book.series(asset)
    return dict(zip(ts_s.tolist(), price.tolist(), strict=True))


# Start and ticks


async def test_the_history_is_there_after_the_start_and_stored(db: Database) -> None:
    feed = Feed(configure(), SteppedClock(T + 17), db, SyntheticSource(0))
    await feed.start()
    for asset in ("BTC", "ETH"):
        assert list(held(feed, asset)) == [T - 2 * HOUR_S + 60 * k for k in range(1, 121)]
        assert await stored(db, asset) == held(feed, asset)


async def test_every_tick_has_its_point_and_subscribers_hear_of_all_assets_at_once(db: Database) -> None:
    clock = SteppedClock(T)
    feed = Feed(configure(tick_s=5), clock, db, SyntheticSource(0))
    heard: list[tuple[float, frozenset[str], int | None]] = []
    feed.subscribe(lambda assets: heard.append((clock.now(), assets, feed.book.newest_s("ETH"))))
    await feed.start()
    async with running(feed):
        await clock.run_until(T + 60)
    ticks_s = range(T + 5, T + 61, 5)
    assert heard == [(ts_s, frozenset({"BTC", "ETH"}), ts_s) for ts_s in ticks_s]
    assert [ts_s for ts_s in await stored(db, "BTC") if ts_s > T] == list(ticks_s)


async def test_a_simulated_point_is_visible_before_anything_else_runs_in_that_tick(db: Database) -> None:
    clock = SteppedClock(T)
    feed = Feed(configure(), clock, db, SyntheticSource(0))
    await feed.start()
    seen: list[int | None] = []

    async def open_round() -> None:
        await clock.sleep_until(T + 60.005)
        seen.append(feed.book.newest_s("BTC"))

    async with running(feed), anyio.create_task_group() as tasks:
        tasks.start_soon(open_round)
        await clock.run_until(T + 61)
    assert seen == [T + 60]


async def test_a_late_loop_fetches_all_missed_ticks_at_once(db: Database) -> None:
    clock = SteppedClock(T)
    feed = Feed(configure(), clock, db, SyntheticSource(0))
    await feed.start()
    clock._now_s = T + 600.5
    changes: list[frozenset[str]] = []
    feed.subscribe(changes.append)
    async with running(feed):
        await clock.run_until(T + 601)
    assert len(changes) == 1
    assert [ts_s for ts_s in await stored(db, "BTC") if ts_s > T] == [T + 60 * k for k in range(1, 11)]


async def test_a_fine_tick_needs_only_minutes_of_history_but_for_the_last_hour(db: Database) -> None:
    feed = Feed(configure(tick_s=5, history_s=DAY_S), SteppedClock(T), db, SyntheticSource(0))
    await feed.start()
    times_s = list(held(feed, "BTC"))
    assert len(times_s) == 23 * 60 + 720
    assert len(feed.book.history(T)["BTC"][0]) == 1440


async def test_a_live_source_is_asked_once_the_candle_is_there_in_pages_it_can_answer(db: Database) -> None:
    clock = SteppedClock(T + 0.5)
    source = LiveSource(page_points=50)
    feed = Feed(configure("BTC"), clock, db, source)
    await feed.start()
    assert feed.book.newest_s("BTC") == T - 60, "the candle that has just closed is not out yet"
    async with running(feed):
        await clock.run_until(T + 0.9)
        assert feed.book.newest_s("BTC") == T - 60
        assert [(after_s, until_s) for _, after_s, until_s, _ in source.asked] == [
            (T - 60 - 3000, T - 60),
            (T - 60 - 6000, T - 60 - 3000),
            (T - 60 - 2 * HOUR_S, T - 60 - 6000),
        ]
        await clock.run_until(T + 1)
        assert feed.book.newest_s("BTC") == T
    assert len(held(feed, "BTC")) == 121


# Gaps


async def test_quiet_minutes_are_filled_when_a_later_point_shows_that_the_source_was_up(db: Database) -> None:
    clock = SteppedClock(T + 2)
    feed = Feed(configure("BTC"), clock, db, LiveSource(quiet={T + 60, T + 120}))
    await feed.start()
    async with running(feed):
        await clock.run_until(T + 130)
        assert feed.book.newest_s("BTC") == T
        await clock.run_until(T + 190)
    points = held(feed, "BTC")
    assert points[T + 60] == points[T + 120] == points[T] == price_at(T)
    assert points[T + 180] == price_at(T + 180)


async def test_a_symbol_that_stops_trading_for_an_hour_leaves_a_gap(db: Database) -> None:
    clock = SteppedClock(T + 2)
    quiet = set(range(T + 60, T + HOUR_S, 60))
    feed = Feed(configure("BTC"), clock, db, LiveSource(quiet=quiet))
    await feed.start()
    async with running(feed):
        await clock.run_until(T + HOUR_S - 1)
        (state,) = feed.states()
        assert state.stale
        assert state.age_s == HOUR_S - 1
        await clock.run_until(T + HOUR_S + 2)
    points = held(feed, "BTC")
    assert not quiet & points.keys()
    assert points[T + HOUR_S] == price_at(T + HOUR_S)
    assert not feed.states()[0].stale


async def test_bad_prices_are_not_let_in(db: Database) -> None:
    bad = {T + 60: float("nan"), T + 120: 0.0, T + 180: -1.0, T + 240: float("inf")}
    clock = SteppedClock(T + 2)
    source = LiveSource(price=lambda ts_s: bad.get(ts_s, price_at(ts_s)))
    feed = Feed(configure("BTC"), clock, db, source)
    await feed.start()
    with capture_logs() as logs:
        async with running(feed):
            await clock.run_until(T + 302)
    assert held(feed, "BTC")[T + 300] == price_at(T + 300)
    assert {held(feed, "BTC")[ts_s] for ts_s in bad} == {price_at(T)}
    rejected = [entry for entry in logs if entry["event"] == "prices_rejected"]
    assert [(entry["count"], entry["at_s"]) for entry in rejected] == [(1, ts_s) for ts_s in bad]


# Failures


async def test_one_asset_failing_stops_no_other_and_is_told_once(db: Database) -> None:
    down = True

    def fault(asset: str, until_s: int) -> None:
        if asset == "ETH" and down:
            raise OSError("connection refused")

    clock = SteppedClock(T + 2)
    source = LiveSource(fault=fault)
    feed = Feed(configure(), clock, db, source)
    with capture_logs() as logs:
        await feed.start()
        async with running(feed):
            await clock.run_until(T + 600)
            btc, eth = feed.states()
            assert (btc.newest_ts_s, btc.stale, btc.error) == (T + 540, False, None)
            assert (eth.newest_ts_s, eth.stale, eth.error) == (None, True, "connection refused")
            attempts = sum(asset == "ETH" for asset, *_ in source.asked)
            assert 8 <= attempts <= 25, "it backs off"
            down = False
            await clock.run_until(T + 700)
    told = [entry["event"] for entry in logs if entry.get("asset") == "ETH"]
    assert told == ["feed_failing", "feed_recovered"]
    assert list(held(feed, "ETH"))[-1] == T + 660
    assert all(price_at(ts_s) == price for ts_s, price in held(feed, "ETH").items())
    assert len(held(feed, "ETH")) >= 120, "the whole history is made up for"
    assert feed.states()[1].error is None


async def test_a_source_that_hangs_is_given_up_and_asked_again(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "_FETCH_TIMEOUT_S", 0.02)
    hanging = True

    def fault(asset: str, until_s: int) -> object:
        return asyncio.sleep(3600) if hanging and asset == "ETH" else None

    clock = SteppedClock(T + 2)
    feed = Feed(configure(), clock, db, LiveSource(fault=fault))
    await feed.start()
    assert [state.error for state in feed.states()] == [None, "no answer within 0.02 s"]
    hanging = False
    async with running(feed):
        await clock.run_until(T + 10)
    assert feed.book.newest_s("ETH") == T


async def test_an_outage_is_made_up_for_when_the_source_is_back(db: Database) -> None:
    def fault(asset: str, until_s: int) -> None:
        if T < until_s < T + HOUR_S:
            raise OSError("HTTP 500")

    clock = SteppedClock(T + 2)
    feed = Feed(configure("BTC"), clock, db, LiveSource(fault=fault))
    await feed.start()
    async with running(feed):
        await clock.run_until(T + HOUR_S + 120)
    assert all(held(feed, "BTC")[ts_s] == price_at(ts_s) for ts_s in range(T, T + HOUR_S + 61, 60))
    assert await stored(db, "BTC") == held(feed, "BTC")


async def test_a_database_that_can_not_be_written_delays_no_tick_and_loses_no_point(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SteppedClock(T)
    feed = Feed(configure("BTC"), clock, db, SyntheticSource(0))
    await feed.start()
    store, locked = repositories.add_prices, True

    def refuse(conn: sqlite3.Connection, *rest: object) -> int:
        if locked:
            raise StorageUnavailable("locked")
        return store(conn, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(saving.repositories, "add_prices", refuse)
    with capture_logs() as logs:
        async with running(feed):
            await clock.run_until(T + 600)
            assert feed.book.newest_s("BTC") == T + 600
            assert max(await stored(db, "BTC")) == T
            assert feed.prices_wait()
            locked = False
    assert [entry["event"] for entry in logs] == ["prices_not_stored"]
    assert max(await stored(db, "BTC")) == T + 600


async def test_prices_that_wait_for_days_take_little_room_and_are_not_lost(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "_RETRY_FIRST_S", 0.001)
    monkeypatch.setattr(saving, "_RETRY_MOST_S", 0.001)
    store, refused, full = repositories.add_prices, asyncio.Event(), True

    def refuse(conn: sqlite3.Connection, *rest: object) -> int:
        if full:
            loop.call_soon_threadsafe(refused.set)
            raise StorageUnavailable("the disk is full")
        return store(conn, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(saving.repositories, "add_prices", refuse)
    loop, clock = asyncio.get_running_loop(), SteppedClock(T)
    keep_s, ticks = 5 * DAY_S, 20_000
    saver = saving.Saver(clock, db, PriceBook(HOUR_S, 60), 60, keep_s)
    with capture_logs() as logs:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(saver.run)
            for number in range(ticks):
                ts_s = T + 60 * number
                saver.add("BTC", "one" if number % 10 else "two", [(ts_s, 1 / (number + 3))])
                if number % 1000 == 999:
                    await clock.run_until(ts_s)
                    for _ in range(2):  # the first one may have begun before
                        refused.clear()
                        await asyncio.wait_for(refused.wait(), 120)
            assert saver.waiting < keep_s / 60 + 5000
            full = False
            with anyio.fail_after(120):
                while saver.waiting:  # noqa: ASYNC110 - nobody is told
                    await asyncio.sleep(0.01)
            tasks.cancel_scope.cancel()
    assert told(logs, "prices_not_stored", "prices_stored_again") == [
        "prices_not_stored",
        "prices_stored_again",
    ]
    assert "prices_given_up" in {entry["event"] for entry in logs}
    kept = await stored(db, "BTC")
    first = ticks - keep_s // 60
    assert all(kept[T + 60 * number] == 1 / (number + 3) for number in range(first, ticks))
    series, names = await db.read(repositories.load_series, "BTC", T + 60 * (ticks - 10), T + 60 * ticks)
    assert series.source is not None
    assert [names[at] for at in series.source] == ["two", *["one"] * 9]


async def test_a_correction_that_was_stored_too_late_is_told(db: Database) -> None:
    clock = SteppedClock(T + 1)
    saver = saving.Saver(clock, db, PriceBook(HOUR_S, 60), 60, DAY_S)
    saver.add("BTC", "one", [(T, 100.0)])
    saver.revise("BTC", "one", [(T, 101.0)])
    await clock.run_until(T + 61)
    with capture_logs() as logs:
        await saver.save()
    assert await stored(db, "BTC") == {T: 100.0}
    assert [(entry["event"], entry["at_s"], entry["source_says"]) for entry in logs] == [
        ("price_differs", T, 101.0)
    ]


# A live source's good and bad days


def told(logs: list[Any], *events: str) -> list[str]:
    return [entry["event"] for entry in logs if entry["event"] in events]


async def test_the_history_comes_newest_first_while_the_game_runs(db: Database) -> None:
    clock = SteppedClock(T + 2)
    source = LiveSource(page_points=60)
    feed = Feed(configure("BTC", history_s=DAY_S), clock, db, source)
    await feed.start()
    assert list(held(feed, "BTC")) == [T - 3540 + 60 * k for k in range(60)]
    assert not feed.history_ready.is_set()
    assert feed.states()[0].history == pytest.approx(1 / 24)
    with capture_logs() as logs:
        async with running(feed):
            await clock.run_until(T + 3)
    assert [until_s for _, _, until_s, _ in source.asked] == [T - 3600 * k for k in range(24)]
    assert feed.history_ready.is_set()
    assert feed.states()[0].history == 1
    assert list(held(feed, "BTC")) == [T - DAY_S + 60 * k for k in range(1, 1441)]
    assert await stored(db, "BTC") == held(feed, "BTC")
    assert told(logs, "history", "history_complete")[-1] == "history_complete"


async def test_quiet_minutes_at_the_edge_of_a_page_of_the_past_are_filled(db: Database) -> None:
    quiet = {T - 3600, T - 3540, T - 3660}
    clock = SteppedClock(T + 2)
    feed = Feed(configure("BTC"), clock, db, LiveSource(page_points=60, quiet=quiet))
    await feed.start()
    async with running(feed):
        await clock.run_until(T + 3)
    points = held(feed, "BTC")
    assert {points[ts_s] for ts_s in quiet} == {price_at(T - 3720)}
    assert len(points) == 120


async def test_a_history_that_a_stop_interrupted_is_completed(db: Database) -> None:
    source = LiveSource(page_points=60, quiet={T - 3600})
    await Feed(configure("BTC", history_s=DAY_S), SteppedClock(T + 2), db, source).start()
    clock = SteppedClock(T + 302)
    feed = Feed(configure("BTC", history_s=DAY_S), clock, db, source)
    await feed.start()
    assert len(held(feed, "BTC")) == 65
    async with running(feed):
        await clock.run_until(T + 303)
    assert list(held(feed, "BTC")) == [T + 300 - DAY_S + 60 * k for k in range(1, 1441)]


async def test_models_wait_for_the_history_only_so_long(db: Database) -> None:
    def fault(asset: str, until_s: int) -> None:
        if until_s < T:
            raise SourceError("HTTP 500")

    clock = SteppedClock(T + 2)
    feed = Feed(configure("BTC"), clock, db, LiveSource(page_points=60, fault=fault))
    with capture_logs() as logs:
        await feed.start()
        async with running(feed):
            await clock.run_until(T + 119)
            assert not feed.history_ready.is_set()
            await clock.run_until(T + 130)
            assert feed.history_ready.is_set()
            assert feed.book.newest_s("BTC") == T + 120, "ticks go on meanwhile"
    assert told(logs, "history_failing") == ["history_failing"]


async def test_a_source_that_reaches_less_far_says_what_is_lacking(db: Database) -> None:
    clock = SteppedClock(T + 2)
    feed = Feed(
        configure("BTC", history_s=DAY_S), clock, db, LiveSource(page_points=720, reach_s=12 * HOUR_S)
    )
    await feed.start()
    with capture_logs() as logs:
        async with running(feed):
            await clock.run_until(T + 3)
    assert told(logs, "history_is_short") == ["history_is_short"]
    assert feed.history_ready.is_set()
    assert len(held(feed, "BTC")) == 720


async def test_a_fallback_gives_the_history_that_the_first_does_not_reach(db: Database) -> None:
    first = LiveSource(page_points=720, reach_s=12 * HOUR_S)
    second = LiveSource(name="other")
    clock = SteppedClock(T + 2)
    feed = Feed(configure("BTC", history_s=DAY_S), clock, db, first, second)
    await feed.start()
    async with running(feed):
        await clock.run_until(T + 3)
    series, names = await db.read(repositories.load_series, "BTC", 0, 2**40)
    assert len(series.ts_s) == 1440
    assert names == ("other", "exchange")


async def test_a_point_that_is_late_is_asked_for_again_within_the_tick(db: Database) -> None:
    clock = SteppedClock(T + 2)

    def fault(asset: str, until_s: int) -> None:
        source.quiet = {T + 60} if clock.now() < T + 67 else set()

    source = LiveSource(fault=fault)
    feed = Feed(configure("BTC"), clock, db, source)
    await feed.start()
    source.asked.clear()
    times_s: list[float] = []
    feed.subscribe(lambda assets: times_s.append(clock.now()))
    async with running(feed):
        await clock.run_until(T + 100)
    assert times_s == [T + 61 + 1 + 2 + 4]
    assert held(feed, "BTC")[T + 60] == price_at(T + 60)


async def test_a_source_that_asks_to_be_left_alone_is(db: Database) -> None:
    def fault(asset: str, until_s: int) -> None:
        if asset == "BTC" and until_s == T + 60:
            source.fault = None
            raise SourceError("HTTP 429", retry_after_s=30)

    clock = SteppedClock(T + 2)
    source = LiveSource()
    feed = Feed(configure(), clock, db, source)
    await feed.start()
    source.fault = fault
    async with running(feed):
        await clock.run_until(T + 90)
        assert (feed.book.newest_s("BTC"), feed.states()[0].error) == (T, "HTTP 429")
        await clock.run_until(T + 92)
    assert feed.book.newest_s("BTC") == feed.book.newest_s("ETH") == T + 60


async def test_a_correction_wins_only_before_it_can_have_been_scored(db: Database) -> None:
    clock = SteppedClock(T + 2)
    corrected = {T + 60: 555.0}

    def price(ts_s: int) -> float:
        seen_s = {T + 60: T + 110, T: T + 110}
        return corrected[ts_s] if ts_s in corrected and clock.now() > seen_s[ts_s] else price_at(ts_s)

    corrected[T] = 444.0
    feed = Feed(configure("BTC"), clock, db, LiveSource(price=price))
    await feed.start()
    with capture_logs() as logs:
        async with running(feed):
            await clock.run_until(T + 200)
    assert held(feed, "BTC")[T + 60] == 555.0
    assert held(feed, "BTC")[T] == price_at(T)
    assert await stored(db, "BTC") == held(feed, "BTC")
    assert told(logs, "price_revised", "price_differs") == ["price_differs", "price_revised"]
    (differs,) = [entry for entry in logs if entry["event"] == "price_differs"]
    assert (differs["stands"], differs["source_says"]) == (price_at(T), 444.0)


async def test_an_absurd_price_waits_for_another_that_confirms_it(db: Database) -> None:
    jumps = {T + 60: 10_000.0, **{T + 60 * k: 20_000.0 + k for k in range(4, 10)}}
    clock = SteppedClock(T + 2)
    source = LiveSource(price=lambda ts_s: jumps.get(ts_s, 150.0))
    feed = Feed(configure("BTC"), clock, db, source)
    await feed.start()
    with capture_logs() as logs:
        async with running(feed):
            await clock.run_until(T + 65)
            assert feed.book.newest_s("BTC") == T
            await clock.run_until(T + 125)
            assert held(feed, "BTC")[T + 60] == held(feed, "BTC")[T + 120] == 150.0
            await clock.run_until(T + 245)
            assert feed.book.newest_s("BTC") == T + 180
            await clock.run_until(T + 305)
    assert (held(feed, "BTC")[T + 240], held(feed, "BTC")[T + 300]) == (20_004.0, 20_005.0)
    assert told(logs, "price_quarantined", "prices_dropped") == [
        "price_quarantined",
        "prices_dropped",
        "price_quarantined",
    ]


@pytest.mark.parametrize("change_s", range(T - 4860, T - 4600, 60))
async def test_a_level_that_changed_at_the_edge_of_a_page_of_the_past_is_believed(
    db: Database, change_s: int
) -> None:
    def split(ts_s: int) -> float:
        return price_at(ts_s) * (100 if ts_s < change_s else 1)

    feed = Feed(configure("BTC"), SteppedClock(T + 2), db, LiveSource(page_points=40, price=split))
    await feed.start()
    async with running(feed):
        await until_history(feed)
    assert held(feed, "BTC") == {ts_s: split(ts_s) for ts_s in range(T - 2 * HOUR_S + 60, T + 1, 60)}


@pytest.mark.parametrize("spike_s", [T - 2 * HOUR_S + 60, *range(T - 4860, T - 4600, 60)])
async def test_a_spike_at_the_edge_of_a_page_of_the_past_is_left_out(db: Database, spike_s: int) -> None:
    source = LiveSource(page_points=40, price=lambda ts_s: 1e9 if ts_s == spike_s else price_at(ts_s))
    feed = Feed(configure("BTC"), SteppedClock(T + 2), db, source)
    await feed.start()
    async with running(feed):
        await until_history(feed)
    expected = {ts_s: price_at(ts_s) for ts_s in range(T - 2 * HOUR_S + 60, T + 1, 60)}
    before = expected.get(spike_s - 60)
    del expected[spike_s]
    if before is not None:  # as in a quiet minute
        expected[spike_s] = before
    assert held(feed, "BTC") == expected


@pytest.mark.parametrize("change_s", range(T + 3120, T + 3400, 60))
async def test_a_level_that_changed_at_the_edge_of_a_page_after_an_outage_is_believed(
    db: Database, change_s: int
) -> None:
    def fault(asset: str, until_s: int) -> None:
        if clock.now() < T + 5400:
            raise OSError("HTTP 500")

    def split(ts_s: int) -> float:
        return price_at(ts_s) * (100 if ts_s >= change_s else 1)

    clock = SteppedClock(T + 2)
    source = LiveSource(page_points=60, price=split)
    feed = Feed(configure("BTC"), clock, db, source)
    await feed.start()
    source.fault = fault
    async with running(feed):
        await clock.run_until(T + 5600)
    expected = {ts_s: split(ts_s) for ts_s in range(T, T + 5401, 60)}
    assert {ts_s: price for ts_s, price in held(feed, "BTC").items() if ts_s in expected} == expected


async def until_history(feed: Feed) -> None:
    with anyio.fail_after(60):
        await feed.history_ready.wait()


async def test_an_asset_that_no_source_knows_is_told_at_the_start(db: Database) -> None:
    def fault(asset: str, until_s: int) -> None:
        if asset == "ETH":
            raise UnknownAsset("exchange has no ETH", offers=["BTC-USD", "XRP-USD"])

    feed = Feed(configure(), SteppedClock(T), db, LiveSource(fault=fault))
    with pytest.raises(StartError, match=r"exchange has no ETH.*BTC-USD, XRP-USD.*\[feed\.symbols\]"):
        await feed.start()
    other = Feed(configure(), SteppedClock(T), db, LiveSource(fault=fault), LiveSource(name="other"))
    await other.start()
    assert [state.source for state in other.states()] == ["exchange", "other"]


async def test_an_asset_that_a_fallback_does_not_know_is_told_while_it_is_not_needed(db: Database) -> None:
    def stranger(asset: str, until_s: int) -> None:
        if asset == "ETH":
            raise UnknownAsset("other has no ETH")

    def outage(asset: str, until_s: int) -> None:
        raise OSError("HTTP 500")

    clock = SteppedClock(T + 2)
    first, second, third = (LiveSource(name=name) for name in ("first", "second", "third"))
    second.fault = stranger
    feed = Feed(configure(failover_after_s=300), clock, db, first, second, third)
    with capture_logs() as logs:
        await feed.start()
        async with running(feed):
            await clock.run_until(T + 3)
            warned = [
                (entry["asset"], entry["source"]) for entry in logs if entry["event"] == "asset_unknown"
            ]
            assert warned == [("ETH", "second")]
            first.fault = outage
            await clock.run_until(T + 600)
    assert [(state.asset, state.source) for state in feed.states()] == [("BTC", "second"), ("ETH", "third")]


async def test_a_clock_that_differs_is_told_once_and_waited_for(db: Database) -> None:
    clock = SteppedClock(T + 2)
    source = LiveSource(skew_s=-5.0)
    feed = Feed(configure("BTC"), clock, db, source)
    with capture_logs() as logs:
        await feed.start()
        async with running(feed):
            await clock.run_until(T + 65)
            assert feed.book.newest_s("BTC") == T, "by its own clock the candle is open"
            await clock.run_until(T + 66)
            assert feed.book.newest_s("BTC") == T + 60
            source.skew_s = 0.1
            await clock.run_until(T + 200)
    assert told(logs, "clock_differs", "clock_agrees_again") == ["clock_differs", "clock_agrees_again"]
    assert feed.states()[0].skew_s == 0.1


async def test_the_next_source_takes_over_and_gives_way(db: Database) -> None:
    clock = SteppedClock(T + 2)
    down = False

    def fault(asset: str, until_s: int) -> None:
        if down and asset == "BTC":
            raise SourceError("HTTP 500")

    first, second = LiveSource(fault=fault), LiveSource(name="other", price=lambda ts_s: 2 * price_at(ts_s))
    feed = Feed(configure(failover_after_s=300), clock, db, first, second)
    with capture_logs() as logs:
        await feed.start()
        assert not second.asked
        async with running(feed):
            down = True
            await clock.run_until(T + 299)
            assert [state.source for state in feed.states()] == ["exchange", "exchange"]
            await clock.run_until(T + 310)
            assert [state.source for state in feed.states()] == ["other", "exchange"]
            assert feed.book.newest_s("BTC") == T + 300
            await clock.run_until(T + 600)
            down = False
            await clock.run_until(T + 1205)
            assert [state.source for state in feed.states()] == ["exchange", "exchange"]
    series, names = await db.read(repositories.load_series, "BTC", T - 120, T + 1200)
    assert names == ("exchange", "other")
    assert series.source is not None
    by_source = dict(zip(series.ts_s.tolist(), series.source.tolist(), strict=True))
    assert len(by_source) == 23
    assert {by_source[T + 60 * k] for k in range(1, 10)} == {1}
    assert by_source[T + 1200] == 0
    prices = held(feed, "BTC")
    assert all(prices[ts_s] == (1 + number) * price_at(ts_s) for ts_s, number in by_source.items()), (
        "no price of one source is filled in for another"
    )
    assert told(logs, "feed_source_changed") == ["feed_source_changed"] * 2


async def test_a_silent_market_does_not_swing_between_sources(db: Database) -> None:
    clock = SteppedClock(T + 2)
    quiet = set(range(T + 60, T + 3 * HOUR_S, 60))
    sources = LiveSource(quiet=quiet), LiveSource(name="other", quiet=quiet)
    feed = Feed(configure("BTC"), clock, db, *sources)
    with capture_logs() as logs:
        await feed.start()
        async with running(feed):
            await clock.run_until(T + 3 * HOUR_S + 300)
    assert told(logs, "feed_source_changed") == ["feed_source_changed"] * 2, "there, and back with new prices"
    assert feed.book.newest_s("BTC") == T + 3 * HOUR_S + 240


async def test_no_source_is_asked_for_more_than_a_page(db: Database) -> None:
    clock = SteppedClock(T + 2)
    quiet = set(range(T + 60, T + HOUR_S, 60))
    sources = [LiveSource(name=name, quiet=quiet, page_points=5) for name in ("first", "second")]
    feed = Feed(configure("BTC"), clock, db, *sources)
    await feed.start()
    async with running(feed):
        await clock.run_until(T + HOUR_S + 300)
    assert feed.book.newest_s("BTC") == T + HOUR_S + 240
    for source in sources:
        assert source.asked
        assert max((until_s - after_s) / step_s for _, after_s, until_s, step_s in source.asked) <= 5


async def test_at_the_start_the_next_source_is_asked_at_once(db: Database) -> None:
    def fault(asset: str, until_s: int) -> None:
        raise SourceError("HTTP 451: blocked here")

    feed = Feed(configure("BTC"), SteppedClock(T + 2), db, LiveSource(fault=fault), LiveSource(name="other"))
    with capture_logs() as logs:
        await feed.start()
    assert [entry["source"] for entry in logs if entry["event"] == "feed_ready"] == ["other"]
    (state,) = feed.states()
    assert (state.source, state.newest_ts_s) == ("other", T)


async def test_a_simulated_game_does_not_go_on_with_live_prices(db: Database) -> None:
    await Feed(configure("BTC"), SteppedClock(T), db, SyntheticSource(0)).start()
    with pytest.raises(StartError, match=r"BTC prices are simulated.*another storage\.path"):
        await Feed(configure("BTC"), SteppedClock(T + 60), db, LiveSource()).start()


# Restarts


async def test_a_restart_goes_on_from_the_newest_stored_point(db: Database) -> None:
    source = LiveSource()
    await Feed(configure("BTC"), SteppedClock(T + 2), db, source).start()
    source.asked.clear()
    feed = Feed(configure("BTC"), SteppedClock(T + 602), db, source)
    await feed.start()
    again_s = (1 + 5) * 60
    assert source.asked == [("BTC", T - again_s, T + 600, 60)]
    assert len(held(feed, "BTC")) == 130
    assert await stored(db, "BTC") == held(feed, "BTC")


async def test_a_stored_price_stands_whatever_the_source_says_later(db: Database) -> None:
    await db.write(repositories.add_prices, "BTC", [(T - 60, 7.0), (T, 7.5)], "exchange", 0)
    clock = SteppedClock(T + 62)
    feed = Feed(configure("BTC"), clock, db, LiveSource())
    await feed.start()
    async with running(feed):
        await clock.run_until(T + 63)
    assert held(feed, "BTC") == await stored(db, "BTC")
    assert (held(feed, "BTC")[T - 60], held(feed, "BTC")[T]) == (7.0, 7.5)
    assert held(feed, "BTC")[T - 120] == price_at(T - 120), "the older history is completed"


async def test_a_stopped_simulated_game_has_the_gap_filled_as_if_it_had_run(db: Database) -> None:
    config = configure(tick_s=5, horizon_s=600)
    await Feed(config, SteppedClock(T), db, SyntheticSource(3)).start()
    feed = Feed(config, SteppedClock(T + 5 * HOUR_S + 2), db, SyntheticSource(3))
    await feed.start()
    points = held(feed, "BTC")
    path = dict(await SyntheticSource(3).fetch("BTC", T, T + 5 * HOUR_S, 5))
    assert points.items() >= {ts_s: path[ts_s] for ts_s in range(T + 5, T + 601, 5)}.items()
    assert points.items() >= {ts_s: path[ts_s] for ts_s in range(T + 60, T + 5 * HOUR_S, 60)}.items()
    assert feed.book.newest_s("BTC") == T + 5 * HOUR_S
    assert await stored(db, "BTC") == points


async def test_points_ahead_of_the_game_s_clock_are_not_shown(db: Database) -> None:
    clock = SteppedClock(T)
    feed = Feed(configure("BTC"), clock, db, SyntheticSource(0))
    await feed.start()
    async with running(feed):
        await clock.run_until(T + 600)
    before = Feed(configure("BTC"), SteppedClock(T + 300), db, SyntheticSource(0))
    await before.start()
    assert before.book.newest_s("BTC") == T + 300


async def test_a_game_does_not_go_on_with_another_simulation(db: Database) -> None:
    await Feed(configure(), SteppedClock(T), db, SyntheticSource(0)).start()
    with pytest.raises(StartError, match=r"game\.db.*feed\.seed = 1.*BTC.*another storage\.path"):
        await Feed(configure(), SteppedClock(T + 60), db, SyntheticSource(1)).start()


# Replay


def record(folder: Path, count: int, *assets: str) -> None:
    for asset in assets:
        rows = "".join(f"{T + 60 * k},{price_at(T + 60 * k)}\n" for k in range(count))
        (folder / f"{asset}.csv").write_text("timestamp,close\n" + rows, encoding="utf-8")


async def test_a_replay_ends_with_its_recording(db: Database, tmp_path: Path) -> None:
    record(tmp_path, 181, "BTC")
    record(tmp_path, 171, "ETH")
    source = ReplaySource.load(tmp_path, ["BTC", "ETH"], 60, 2 * HOUR_S)
    assert source.default_start_s == T + 2 * HOUR_S
    clock = SteppedClock(source.default_start_s)
    feed = Feed(configure(), clock, db, source)
    last_heard: list[tuple[float, frozenset[str], bool]] = []
    feed.subscribe(lambda assets: last_heard.append((clock.now(), assets, feed.finished)))
    await feed.start()
    assert not feed.finished
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(feed.run)
        await clock.run_until(T + 5 * HOUR_S)  # and `run` has returned: nothing is cancelled here
    assert feed.finished
    assert last_heard[-1] == (T + 3 * HOUR_S, frozenset({"BTC"}), True)
    assert len(last_heard) == 60
    for asset in ("BTC", "ETH"):
        assert await stored(db, asset) == {
            ts_s: price for ts_s, price in held(feed, asset).items() if price == price_at(ts_s)
        }
    assert feed.book.newest_s("ETH") == T + 170 * 60

    again = Feed(configure(), SteppedClock(T + 6 * HOUR_S), db, source)
    await again.start()
    assert again.finished


async def test_a_replayed_day_runs_as_fast_as_its_work(db: Database, tmp_path: Path) -> None:
    record(tmp_path, 26 * 60, "BTC", "ETH")
    source = ReplaySource.load(tmp_path, ["BTC", "ETH"], 60, HOUR_S)
    clock = SteppedClock(source.default_start_s, speed=600)
    feed = Feed(configure(history_s=HOUR_S), clock, db, source)
    await feed.start()
    async with running(feed):
        await clock.run_until(T + 10 * HOUR_S)
    assert list(held(feed, "BTC")) == [T + 60 * k for k in range(1, 601)]
    assert await stored(db, "ETH") == held(feed, "ETH")


# Making it


async def test_the_configured_source_is_made(tmp_path: Path) -> None:
    record(tmp_path, 10, "BTC")
    (synthetic,) = make_sources(configure(source=("synthetic",), seed=4))
    assert str(synthetic) == "synthetic prices with feed.seed = 4"
    (replay,) = make_sources(configure("BTC", source=("replay",), path=tmp_path))
    assert isinstance(replay, ReplaySource)
    with pytest.raises(ConfigError, match=r"ETH\.csv"):
        make_sources(configure("ETH", source=("replay",), path=tmp_path))
    live = make_sources(configure(source=("kraken", "coinbase")))
    assert [source.name for source in live] == ["kraken", "coinbase"]
    for source in live:
        await source.aclose()
