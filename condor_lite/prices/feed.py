"""Prices from a source into the book and the database: history first, then every tick as it settles.

A source only knows how to fetch a range of one asset. What all sources share is here: the history in pages,
resuming from the stored points, the grid with its quiet ticks, retries, and one asset's trouble kept from
the others.
"""

from __future__ import annotations

import asyncio
import math
import random
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import anyio
import structlog

from condor_lite.clock import Clock
from condor_lite.config import Config
from condor_lite.errors import ConfigError, StartError, StorageError
from condor_lite.prices.book import PriceBook
from condor_lite.prices.grid import QUIET_S, Point, Span, missing_head, missing_tail, on_grid
from condor_lite.prices.replay import ReplaySource
from condor_lite.prices.source import Source
from condor_lite.prices.sources import live_source
from condor_lite.prices.synthetic import SyntheticSource
from condor_lite.storage import repositories
from condor_lite.storage.database import Database

log = structlog.get_logger()

_FETCH_TIMEOUT_S = 20.0
_RETRY_FIRST_S = 1.0
_RETRY_MOST_S = 60.0
_FINE_S = 3600  # every tick is kept for at least this long before the game's start
_EARLY_S = 0.001  # what a clock's rounding may wake us too early
_NOT_STORED = (StorageError, sqlite3.Error, OSError)
_SAME_PRICE = 1e-6  # relative; less is another processor's rounding


def make_source(config: Config) -> Source:
    """The source that `feed.source` names. Raises ConfigError where it can't be used."""
    feed = config.feed
    if feed.source == ("synthetic",):
        return SyntheticSource(feed.seed)
    if feed.source == ("replay",):
        if feed.path is None:
            raise ConfigError(['feed.path: must name the folder of <ASSET>.csv when feed.source = "replay"'])
        source = ReplaySource.load(feed.path, config.game.assets, feed.tick_s, feed.history_s)
        if config.game.start_s is not None:
            source.check_start(config.game.start_s)
        return source
    return live_source(feed.source[0], feed)


@dataclass(frozen=True, slots=True)
class FeedState:
    """How one asset's feed is doing, on the game's clock; no price and no age before the first point."""

    asset: str
    source: str
    newest_ts_s: int | None
    price: float | None
    age_s: float | None
    stale: bool
    count: int
    error: str | None = None
    """Why the last attempt failed, None when it did not."""


@dataclass(slots=True)
class _Line:
    """What the feed knows of one asset beside its points."""

    asset: str
    next_s: float = 0.0
    """When to ask again, game time."""
    failures: int = 0
    error: str | None = None


class Feed:
    """Keeps `book` and the database up to date with `source`."""

    def __init__(
        self, config: Config, clock: Clock, db: Database, source: Source, book: PriceBook | None = None
    ) -> None:
        self._clock = clock
        self._db = db
        self._source = source
        self._tick_s = config.feed.tick_s
        self._history_s = config.feed.history_s
        self._max_staleness_s = config.feed.max_staleness_s
        self._fine_s = max(_FINE_S, *(setting.horizon_s for setting in config.game.settings))
        self._keep_s = max(config.storage.keep_prices_s, self._history_s)
        self.book = book or PriceBook(self._history_s, self._tick_s)
        self._lines = {asset: _Line(asset) for asset in config.game.assets}
        self._callbacks: list[Callable[[frozenset[str]], None]] = []
        self._unsaved: list[tuple[str, list[Point]]] = []
        self._to_save = asyncio.Event()

    # -- for the others --------------------------------------------------------------------------------------

    def subscribe(self, callback: Callable[[frozenset[str]], None]) -> None:
        """Have `callback(assets)` called right after new points of `assets` can be read from the book."""
        self._callbacks.append(callback)

    def end_s(self, asset: str) -> int | None:
        """The time of the last price there will ever be, None for a source without end."""
        end_s = self._source.end_s(asset)
        return None if end_s is None else end_s // self._tick_s * self._tick_s

    @property
    def finished(self) -> bool:
        """Whether every point that there will ever be is in the book: a replay is over."""
        return all(self._is_over(asset) for asset in self._lines)

    def states(self) -> list[FeedState]:
        """How each asset's feed is doing now."""
        return [self._state(line) for line in self._lines.values()]

    def _state(self, line: _Line) -> FeedState:
        last = self.book.last(line.asset)
        age_s = self._clock.now() - last[0] if last else None
        return FeedState(
            asset=line.asset,
            source=self._source.name,
            newest_ts_s=last[0] if last else None,
            price=last[1] if last else None,
            age_s=age_s,
            stale=age_s is None or age_s > self._max_staleness_s,
            count=self.book.count(line.asset),
            error=line.error,
        )

    # -- life ------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Read the stored points, then fetch and store what the history lacks.

        An asset whose source fails is left for `run`. Raises StartError where the stored prices are not the
        simulated source's.
        """
        now_s = self._settled_s()
        for asset in self._lines:
            newest_s = await self._db.read(repositories.newest_price_s, asset)
            from_s = now_s - self.book.span_s if newest_s is None else min(now_s - self.book.span_s, newest_s)
            # Stored points that lie ahead of a clock that was set back come again in their time.
            stored = await self._db.read(repositories.load_prices, asset, from_s, now_s)
            self.book.add(asset, zip(stored[0].tolist(), stored[1].tolist(), strict=True))
            if self._source.simulated:
                await self._check_same(asset)
        with self._clock.hold():
            async with anyio.create_task_group() as tasks:
                for line in self._lines.values():
                    tasks.start_soon(self._catch_up, line, True)
            await self._save()
        log.info(
            "feed_ready",
            source=self._source.name,
            points=sum(self.book.count(asset) for asset in self._lines),
            failed=[line.asset for line in self._lines.values() if line.error],
        )

    async def run(self) -> None:
        """Fetch each tick's points as they settle, until cancelled, or until a replay is over."""
        lines = list(self._lines.values())
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._keep_saving, name="feed-saving")
                async with anyio.create_task_group() as followers:
                    # A source that waits for nothing is asked for all assets at once: one tick for models.
                    for group in [lines] if self._source.simulated else [[line] for line in lines]:
                        followers.start_soon(self._follow, group, name=f"feed-{group[0].asset}")
                tasks.cancel_scope.cancel()
        finally:
            with anyio.CancelScope(shield=True):
                await self._save_last()
        log.info("feed_finished", source=self._source.name)

    async def _follow(self, lines: Sequence[_Line]) -> None:
        while not all(self._is_over(line.asset) for line in lines):
            await self._clock.sleep_until(min(line.next_s for line in lines if not self._is_over(line.asset)))
            with self._clock.hold():
                now_s = self._clock.now()
                changed = [
                    line.asset
                    for line in lines
                    if line.next_s <= now_s and not self._is_over(line.asset) and await self._catch_up(line)
                ]
                if changed:
                    for callback in self._callbacks:
                        callback(frozenset(changed))

    # -- fetching --------------------------------------------------------------------------------------------

    def _settled_s(self) -> int:
        """The newest grid time whose price can be had."""
        at_s = self._clock.now() - self._source.latency_s * self._clock.speed + _EARLY_S
        return math.floor(at_s / self._tick_s) * self._tick_s

    def _is_over(self, asset: str) -> bool:
        end_s, newest_s = self.end_s(asset), self.book.newest_s(asset)
        return end_s is not None and newest_s is not None and newest_s >= end_s

    async def _catch_up(self, line: _Line, with_head: bool = False) -> bool:
        """Fetch all that `line`'s asset lacks; whether there are new points. Says when to ask again."""
        asset, until_s = line.asset, self._settled_s()
        grid = {"tick_s": self._tick_s, "history_s": self._history_s}
        spans = missing_tail(
            self.book.newest_s(asset), until_s, fine_s=self._fine_s, keep_s=self._keep_s, **grid
        )
        if with_head:
            ts_s, _ = self.book.series(asset)
            spans = missing_head(int(ts_s[0]) if len(ts_s) else None, until_s, **grid) + spans
        before = self.book.newest_s(asset)
        try:
            for span in spans:
                await self._fetch(asset, span)
        except Exception as error:
            self._failed(line, error)
        else:
            self._recovered(line)
            line.next_s = until_s + self._tick_s + self._source.latency_s * self._clock.speed
        return self.book.newest_s(asset) != before

    async def _fetch(self, asset: str, span: Span) -> None:
        """Bring `span` into the book, page by page."""
        after_s, last = span.after_s, self.book.last(asset)
        if last is not None and last[0] > after_s:
            last = None  # a piece of the past
        while after_s < span.until_s:
            until_s = min(after_s + self._source.page_points * span.step_s, span.until_s)
            page = Span(after_s, until_s, span.step_s)
            with anyio.fail_after(_FETCH_TIMEOUT_S):
                points = await self._source.fetch(asset, after_s, until_s, span.step_s)
            points = self._sound(asset, points, page)
            if added := self.book.add(asset, on_grid(points, page, last)):
                self._unsaved.append((asset, added))
                self._to_save.set()
            last = max(points, default=last)
            after_s = until_s
            if after_s < span.until_s:
                await asyncio.sleep(0)  # a long history is many pages

    def _sound(self, asset: str, points: list[Point], page: Span) -> list[Point]:
        inside = [point for point in points if page.after_s < point[0] <= page.until_s]
        sound = [point for point in inside if point[1] > 0 and math.isfinite(point[1])]
        if rejected := len(inside) - len(sound):
            log.warning("prices_rejected", asset=asset, source=self._source.name, count=rejected)
        return sound

    def _failed(self, line: _Line, error: Exception) -> None:
        message = (
            f"no answer within {_FETCH_TIMEOUT_S:g} s" if isinstance(error, TimeoutError) else str(error)
        )
        if not line.failures:
            log.warning(
                "feed_failing",
                asset=line.asset,
                source=self._source.name,
                error=message or type(error).__name__,
            )
        pause_s = min(_RETRY_FIRST_S * 2.0**line.failures, _RETRY_MOST_S) * random.uniform(0.75, 1.25)
        line.failures = min(line.failures + 1, 30)
        line.error = message or type(error).__name__
        line.next_s = self._clock.now() + pause_s * self._clock.speed

    def _recovered(self, line: _Line) -> None:
        if line.failures:
            log.info("feed_recovered", asset=line.asset, source=self._source.name)
        line.failures, line.error = 0, None

    async def _check_same(self, asset: str) -> None:
        """A game must not go on with prices that come from another simulation."""
        stored = self.book.last(asset)
        if stored is None:
            return
        points = await self._source.fetch(asset, stored[0] - QUIET_S, stored[0], self._tick_s)
        price = max(points)[1] if points else None
        if price is None or not math.isclose(price, stored[1], rel_tol=_SAME_PRICE):
            there = "has no price" if price is None else f"has {price:.9g}"
            raise StartError(
                f"{self._db.path}: its prices are not those of {self._source}, which {there} for {asset} at "
                f"{stored[0]} where {stored[1]:.9g} is stored. Go back to the feed that this game was played "
                "with, or start a new game with another storage.path"
            )

    # -- storing ---------------------------------------------------------------------------------------------

    async def _keep_saving(self) -> None:
        pause_s, failing = _RETRY_FIRST_S, False
        while True:
            await self._to_save.wait()
            self._to_save.clear()
            try:
                with self._clock.hold():
                    await self._save()
            except _NOT_STORED as error:
                if not failing:
                    log.error("prices_not_stored", error=str(error))
                failing = True
                self._to_save.set()
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _RETRY_MOST_S)
                continue
            if failing:
                log.info("prices_stored_again")
            pause_s, failing = _RETRY_FIRST_S, False

    async def _save_last(self) -> None:
        try:
            await self._save()
        except _NOT_STORED as error:
            log.error("prices_not_stored", error=str(error))  # the next start fetches them again

    async def _save(self) -> None:
        """Store what is new, in one transaction. Kept for another attempt where that fails."""
        if batches := list(self._unsaved):
            await self._db.write(_store, batches, self._source.name, int(self._clock.now() * 1000))
            del self._unsaved[: len(batches)]


def _store(
    conn: sqlite3.Connection, batches: list[tuple[str, list[Point]]], source: str, ingested_at_ms: int
) -> None:
    for asset, points in batches:
        repositories.add_prices(conn, asset, points, source, ingested_at_ms)
