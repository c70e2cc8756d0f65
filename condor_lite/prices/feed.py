"""Prices from a source into the book and the database: history first, then every tick as it settles.

A source only knows how to fetch a range of one asset. What all sources share is here and in the modules
beside: when to ask whom, the history in pages, the grid with its quiet ticks, retries, and one asset's
trouble kept from the others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import anyio
import structlog

from condor_lite.clock import Clock
from condor_lite.config import Config
from condor_lite.errors import StartError
from condor_lite.prices.book import PriceBook
from condor_lite.prices.grid import Span, missing, pieces
from condor_lite.prices.intake import Intake
from condor_lite.prices.past import Past
from condor_lite.prices.saving import Saver
from condor_lite.prices.source import Source, UnknownAsset
from condor_lite.prices.stored import bring_back
from condor_lite.prices.supply import Channel, Line, Supply
from condor_lite.prices.timing import Timing
from condor_lite.storage.database import Database

log = structlog.get_logger()

_FINE_S = 3600  # every tick is kept for at least this long before the game's start
_HISTORY_WAIT_S = 120.0  # for which models wait for all of the history
_AGAIN_TICKS = 5  # settled ones that are asked for again
_AGAIN_MOST_TICKS = 60
_PROBE_MOST_S = 300.0
_OFFERS = 8


@dataclass(frozen=True, slots=True)
class FeedState:
    """How one asset's feed is doing, on the game's clock; no price and no age before the first point."""

    asset: str
    source: str
    """The one in use."""
    newest_ts_s: int | None
    price: float | None
    age_s: float | None
    stale: bool
    count: int
    error: str | None = None
    """Why the last attempt failed, None when it did not."""
    history: float = 1.0
    """How much of `feed.history` is there, from 0 to 1."""
    skew_s: float | None = None
    """How far the source's clock is ahead of this machine's, where it says."""


class Feed:
    """Keeps `book` and the database up to date with `source`, or where that fails with its `fallbacks`."""

    def __init__(
        self, config: Config, clock: Clock, db: Database, source: Source, *fallbacks: Source
    ) -> None:
        self._clock = clock
        self._db = db
        self._source = source
        self._simulated = source.simulated
        self._tick_s = config.feed.tick_s
        self._history_s = config.feed.history_s
        self._max_staleness_s = config.feed.max_staleness_s
        self._failover_s = config.feed.failover_after_s
        settle_s = config.scoring.settle_delay_s
        self._timing = Timing(clock, self._tick_s, settle_s)
        self._fine_s = max(_FINE_S, *(setting.horizon_s for setting in config.game.settings))
        self.book = PriceBook(self._history_s, self._tick_s)
        self.history_ready = asyncio.Event()
        """Set once models can be given their history: all of it is there, or has been waited for."""
        channels = [Channel(each) for each in (source, *fallbacks)]
        self._lines = {
            asset: Line(asset, [Supply(channel) for channel in channels]) for asset in config.game.assets
        }
        again = min(-(-settle_s // self._tick_s) + _AGAIN_TICKS, _AGAIN_MOST_TICKS)
        again = min(again, *(channel.source.page_points // 2 for channel in channels))
        self._again_s = again * self._tick_s
        self._keep_s = max(config.storage.keep_prices_s, self._history_s)
        self._saver = Saver(clock, db, self.book, settle_s, self._keep_s)
        self._intake = Intake(clock, self.book, self._saver, self._again_s)
        self._past = Past(clock, db, self._intake, list(self._lines.values()), self._tick_s, self._history_s)
        self._callbacks: list[Callable[[frozenset[str]], None]] = []
        self._changed: set[str] = set()

    # -- for the others --------------------------------------------------------------------------------------

    def subscribe(self, callback: Callable[[frozenset[str]], None]) -> None:
        """Have `callback(assets)` called as soon as new points of `assets` can be read from the book."""
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

    def _state(self, line: Line) -> FeedState:
        last = self.book.last(line.asset)
        age_s = self._clock.now() - last[0] if last else None
        return FeedState(
            asset=line.asset,
            source=line.supply.source.name,
            newest_ts_s=last[0] if last else None,
            price=last[1] if last else None,
            age_s=age_s,
            stale=age_s is None or age_s > self._max_staleness_s,
            count=self.book.count(line.asset),
            error=line.supply.error,
            history=self._past.share(line),
            skew_s=line.supply.source.skew_s,
        )

    def prices_wait(self) -> bool:
        """Whether the database lacks prices that are at hand, as it could not be written."""
        return self._saver.failing

    # -- life ------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Read the stored points, then fetch and store the newest ones; `run` completes the history.

        A simulated source's history is complete at once. An asset whose sources fail is left for `run`.
        Raises StartError where no source knows an asset, and where the stored prices are not the source's.
        """
        for line in self._lines.values():
            until_s = self._timing.settled_s(line.supply)
            if await bring_back(self._db, self.book, line, until_s, self._tick_s, self._again_s):
                line.begun.set()
        with self._clock.hold():
            unknown: list[str] = []
            async with anyio.create_task_group() as tasks:
                for line in self._lines.values():
                    tasks.start_soon(self._begin, line, unknown)
            if unknown:
                raise StartError("\n".join(sorted(unknown)))
            await self._saver.save()
        for line in self._lines.values():
            self._plan(line)
        if self._past.done:
            self.history_ready.set()
        log.info(
            "feed_ready",
            source=" ".join(dict.fromkeys(line.supply.source.name for line in self._lines.values())),
            points=sum(self.book.count(asset) for asset in self._lines),
            failed=[line.asset for line in self._lines.values() if line.supply.error],
        )

    async def run(self) -> None:
        """Fetch each tick's points as they settle, until cancelled, or until a replay is over."""
        lines = list(self._lines.values())
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._saver.run, name="feed-saving")
                tasks.start_soon(self._complete_history, name="feed-history")
                for line in lines:
                    if len(line.supplies) > 1:
                        tasks.start_soon(self._probe, line, name=f"feed-probe-{line.asset}")
                async with anyio.create_task_group() as followers:
                    # A source that waits for nothing is asked for all assets at once: one tick for models.
                    for group in [lines] if self._simulated else [[line] for line in lines]:
                        followers.start_soon(self._follow, group, name=f"feed-{group[0].asset}")
                tasks.cancel_scope.cancel()
        finally:
            with anyio.CancelScope(shield=True):
                await self._saver.save_last()
        log.info("feed_finished", source=self._source.name)

    # -- start -----------------------------------------------------------------------------------------------

    async def _begin(self, line: Line, unknown: list[str]) -> None:
        """Fetch an asset's newest points from the first source that has them."""
        strangers: dict[Supply, UnknownAsset] = {}
        found: Supply | None = None
        for supply in line.supplies:
            try:
                await self._fetch_first(line, supply)
            except UnknownAsset as error:
                strangers[supply] = error
            except Exception as error:
                line.next_s = supply.failed(line.asset, error, self._clock.now())
            else:
                found = supply
                break
        if len(strangers) == len(line.supplies):
            unknown += [_unknown(line.asset, stranger) for stranger in strangers.values()]
            return
        for supply, stranger in strangers.items():
            _warn_of_unknown(line, supply, stranger)
        line.supplies = [supply for supply in line.supplies if supply not in strangers]
        line.delivered_s = self._clock.now()
        if found is not None:
            line.begun.set()
            if at := line.supplies.index(found):
                line.use(at, self._clock.now())
            line.next_s = self._timing.next_s(
                line, self.book.newest_s(line.asset), self._timing.settled_s(found)
            )

    async def _fetch_first(self, line: Line, supply: Supply) -> None:
        until_s, newest_s = self._timing.settled_s(supply), self.book.newest_s(line.asset)
        if newest_s is not None and newest_s < until_s and not self._simulated:
            # Rounds from before the stop are scored as soon as there is a later price: what they reach into
            # comes first.
            span = Span(newest_s, min(newest_s + self._fine_s, until_s), self._tick_s)
            await self._intake.ahead(line, supply, span)
        line.todo = self._missing(line, until_s)
        while line.todo and (self._simulated or line.todo[0].until_s == until_s):
            await self._past.page(line, supply)
            if not self._simulated:
                break

    def _plan(self, line: Line) -> None:
        """Leave the history to `run`; what follows the newest point is fetched with the next tick."""
        until_s = self._timing.settled_s(line.supply)
        todo = self._missing(line, until_s) if line.begun.is_set() else []
        line.todo = [span for span in todo if span.until_s < until_s]

    def _missing(self, line: Line, until_s: int) -> list[Span]:
        held_s, _ = self.book.series(line.asset)
        return missing(
            held_s,
            until_s,
            tick_s=self._tick_s,
            history_s=self._history_s,
            fine_s=self._fine_s,
            keep_s=self._keep_s,
        )

    async def _complete_history(self) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._open_gate, name="feed-history-wait")
            await self._past.run()
            self.history_ready.set()
            tasks.cancel_scope.cancel()

    async def _open_gate(self) -> None:
        await self._clock.sleep_until(self._clock.now() + _HISTORY_WAIT_S)
        self.history_ready.set()

    # -- every tick ------------------------------------------------------------------------------------------

    async def _follow(self, lines: Sequence[Line]) -> None:
        while not all(self._is_over(line.asset) for line in lines):
            await self._clock.sleep_until(min(line.next_s for line in lines if not self._is_over(line.asset)))
            with self._clock.hold():
                now_s = self._clock.now()
                changed = [
                    line.asset
                    for line in lines
                    if line.next_s <= now_s and not self._is_over(line.asset) and await self._ask(line)
                ]
            if changed:
                self._tell(changed)

    def _tell(self, changed: Sequence[str]) -> None:
        """Once for all assets whose points came together: subscribers wake every model."""
        if not self._changed:
            asyncio.get_running_loop().call_soon(self._tell_now)
        self._changed.update(changed)

    def _tell_now(self) -> None:
        changed = frozenset(self._changed)
        self._changed.clear()
        for callback in self._callbacks:
            callback(changed)

    async def _ask(self, line: Line) -> bool:
        """Fetch what lacks up to now; whether there are new points. Says when to ask again."""
        now_s = self._clock.now()
        if now_s >= line.fails_over_s(self._failover_s):
            line.use(line.at + 1, now_s)
        supply, before_s = line.supply, self.book.newest_s(line.asset)
        until_s = self._timing.settled_s(supply)
        if (next_s := supply.channel.not_before_s) <= now_s:
            try:
                await self._fetch_newest(line, supply, until_s)
            except Exception as error:
                next_s = supply.failed(line.asset, error, self._clock.now())
            else:
                supply.recovered(line.asset)
                next_s = self._timing.next_s(line, self.book.newest_s(line.asset), until_s)
        else:
            supply.error = supply.channel.refusal
        newest_s = self.book.newest_s(line.asset)
        if newest_s != before_s:
            line.delivered_s = self._clock.now()
            line.begun.set()
        if line.supply is supply:
            line.next_s = min(next_s, line.fails_over_s(self._failover_s))
        return newest_s != before_s

    async def _fetch_newest(self, line: Line, supply: Supply, until_s: int) -> None:
        newest_s = self.book.newest_s(line.asset)
        if newest_s is None:
            line.todo = self._missing(line, until_s)
            await self._past.page(line, supply)
            return
        spans = pieces(
            newest_s,
            until_s,
            tick_s=self._tick_s,
            fine_after_s=newest_s + self._fine_s,
            fine_from_s=until_s - self._fine_s,
        )
        for span in spans or [Span(newest_s, newest_s, self._tick_s)]:
            await self._intake.ahead(line, supply, span)

    def _is_over(self, asset: str) -> bool:
        end_s, newest_s = self.end_s(asset), self.book.newest_s(asset)
        return end_s is not None and newest_s is not None and newest_s >= end_s

    async def _probe(self, line: Line) -> None:
        """While another supply is in use, look whether one before it delivers again."""
        await self._meet_fallbacks(line)
        while True:
            await line.fallen_back.wait()
            pause_s = float(self._tick_s)
            while line.at:
                await self._clock.sleep_until(self._clock.now() + pause_s)
                pause_s = min(2 * pause_s, max(_PROBE_MOST_S, self._tick_s))
                with self._clock.hold():
                    await self._take_back(line)

    async def _meet_fallbacks(self, line: Line) -> None:
        """Find out now, and not in an outage, which of them do not have the asset."""
        for supply in line.supplies[line.at + 1 :]:
            until_s = self._timing.settled_s(supply)
            try:
                with self._clock.hold():
                    await self._intake.probe(
                        line, supply, Span(until_s - self._tick_s, until_s, self._tick_s)
                    )
            except UnknownAsset as error:
                _warn_of_unknown(line, supply, error)
                if line.supplies.index(supply) > line.at:
                    line.supplies.remove(supply)
            except Exception as error:
                supply.failed(line.asset, error, self._clock.now())

    async def _take_back(self, line: Line) -> None:
        for at, supply in enumerate(line.supplies[: line.at]):
            now_s = self._clock.now()
            if supply.channel.not_before_s > now_s:
                continue
            until_s = self._timing.settled_s(supply)
            newest_s = self.book.newest_s(line.asset) or until_s - self._tick_s
            page_s = supply.source.page_points * self._tick_s
            span = Span(max(newest_s - 1, until_s - page_s), until_s, self._tick_s)
            try:
                delivers = await self._intake.probe(line, supply, span)
            except Exception as error:
                supply.failed(line.asset, error, now_s)
                continue
            supply.recovered(line.asset)
            if delivers and at < line.at:
                line.use(at, self._clock.now())
                return


def _warn_of_unknown(line: Line, supply: Supply, error: UnknownAsset) -> None:
    log.warning("asset_unknown", asset=line.asset, source=supply.source.name, error=str(error))


def _unknown(asset: str, error: UnknownAsset) -> str:
    offers = ", ".join(error.offers[:_OFFERS])
    has = f"; it has, among others, {offers}" if offers else ""
    return f"feed: {error}{has}. Correct {asset} under [feed.symbols], or leave it out of the settings"
