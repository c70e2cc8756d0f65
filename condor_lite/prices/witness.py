"""What the sources of prices say of the machine's clock, which may be set wrong by years."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

import anyio
import structlog

from condor_lite.clock import LEAP_S, Clock, GameClock, LiveClock, machine_s
from condor_lite.config import Config
from condor_lite.prices.grid import Point
from condor_lite.prices.replay import ReplaySource
from condor_lite.prices.source import Source, newest_points
from condor_lite.storage.ahead import forget_ahead
from condor_lite.storage.database import Database

log = structlog.get_logger()

_LOOK_S = 2.0  # on the wall, as all here
_AGAIN_MOST_S = 20.0
_CONTRADICTED_S = 60.0  # a source's clock that is wrong itself is no reason to ask more often
_TIMEOUT_S = 15.0
_START_WAIT_S = 5.0

MEND_THE_CLOCK = (
    "Have the machine's clock kept by NTP. When it is right, the game goes on by itself within a minute; "
    "nothing need be done to the database."
)


def simulated_clock(config: Config, source: Source, stored_s: float | None) -> Clock:
    """A simulated game's time: it goes on where the game stopped, by itself, and never goes back."""
    start_s = machine_s() if config.game.speed == 1.0 or stored_s is None else stored_s
    if isinstance(source, ReplaySource):
        start_s = config.game.start_s or source.default_start_s
    return GameClock(max(start_s, stored_s or 0.0), config.game.speed)


class Witness:
    """Asks the sources whenever `clock` is in doubt, or a source's own clock contradicts it.

    It takes two to know the time. The machine's clock is right where a source has prices that are fresh by
    it, and, where the machine's says that it is earlier than the game has come, none that are later. A
    source's own clock (its `skew_s`) is right where it agrees with the machine's or with the game's, or where
    the source has prices that are fresh by it. Otherwise it stays unknown.

    `on_ahead` is called when the game has gone ahead of the time: by a machine's clock that was wrong from
    the start, before there was any witness.
    """

    def __init__(
        self, config: Config, clock: LiveClock, sources: Sequence[Source], on_ahead: Callable[[], None]
    ) -> None:
        self._clock = clock
        self._sources = sources
        self._assets = config.game.assets
        self._tick_s = config.feed.tick_s
        self._fresh_s = int(config.feed.max_staleness_s + LEAP_S)
        self._on_ahead = on_ahead
        self._known = False  # what time it is, by any source since the start

    async def confirm(self, db: Database) -> None:
        """Before anything goes by the clock: look, and set the game's time back where it is ahead."""
        with anyio.move_on_after(_START_WAIT_S):
            await self.look()
        if (ahead_s := self._clock.ahead_s) > LEAP_S:
            self._clock.go_back(await db.write(forget_ahead, self._clock.line_s))
            log.warning("clock_was_ahead", by_s=round(ahead_s), done="set back; rounds go on from now")
        if trouble := self._clock.trouble:
            log.warning("clock_wrong", what=trouble, do=MEND_THE_CLOCK)

    async def run(self) -> None:
        """Look until cancelled."""
        pause_s, looked_s = _LOOK_S, 0.0
        while True:
            await asyncio.sleep(pause_s)
            doubt = self._clock.doubt
            contradicted = time.monotonic() - looked_s > _CONTRADICTED_S and self._contradicted()
            if not doubt and not contradicted:
                pause_s = _LOOK_S
                continue
            if doubt and pause_s == _LOOK_S:
                log.warning("clock_in_doubt", what=doubt, meanwhile="no round is opened")
            looked_s, well = time.monotonic(), self._clock.trouble is None
            if await self.look():
                pause_s = _LOOK_S
                if not (well and self._clock.trouble is None):
                    log.warning("clock_known", what=self._clock.trouble or "the machine's clock is right")
            else:
                pause_s = min(2 * pause_s, _AGAIN_MOST_S)
            if self._clock.ahead_s > LEAP_S:
                self._on_ahead()

    async def look(self) -> bool:
        """Ask the sources, all at once, until one knows what time it is; whether one did."""
        known: list[float] = []

        async def ask(source: Source) -> None:
            for asset in self._assets:
                if (at_s := await self._said(source, asset)) is not None:
                    if not known:
                        known.append(at_s)
                        self._clock.told(at_s)
                        self._known = True
                    tasks.cancel_scope.cancel()
                    return

        async with anyio.create_task_group() as tasks:
            for source in self._sources:
                tasks.start_soon(ask, source)
        return bool(known)

    def _contradicted(self) -> bool:
        return any(
            source.skew_s is not None and not _agree(machine_s() + source.skew_s, self._clock.line_s)
            for source in self._sources
        )

    async def _said(self, source: Source, asset: str) -> float | None:
        """What time it is (epoch seconds), None where that can't be known from this."""
        before_s, skew_s = machine_s(), source.skew_s
        points = await self._fetched(source, asset, before_s)
        is_back = before_s < self._clock.line_s - LEAP_S
        ahead_s = source.skew_s or 0.0
        if points and not is_back:
            if ahead_s > LEAP_S and not self._known:
                # What was fresh long ago proves nothing against the source's own clock and later prices.
                later = await self._fetched(source, asset, machine_s() + ahead_s)
                if later and max(later)[0] > machine_s() + LEAP_S:
                    return machine_s() + ahead_s
            return machine_s()
        if source.skew_s is not None and (points is not None or source.skew_s != skew_s):
            at_s = machine_s() + source.skew_s
            if _agree(at_s, machine_s()) or _agree(at_s, self._clock.line_s):
                return at_s
            return machine_s() + source.skew_s if await self._fetched(source, asset, at_s) else None
        if points:  # asked for what is there, too: a source may refuse to say that it has nothing
            points = await self._fetched(source, asset, before_s + self._fresh_s + LEAP_S, 2 * self._fresh_s)
            return machine_s() if points and max(points)[0] <= before_s + LEAP_S else None
        return None

    async def _fetched(
        self, source: Source, asset: str, until_s: float, span_s: int | None = None
    ) -> list[Point] | None:
        """Newest points that are fresh at `until_s`, or of so long; None where the source can't be asked."""
        from_s, to_s = int(until_s) - (span_s or self._fresh_s), int(until_s)
        try:
            with anyio.fail_after(_TIMEOUT_S):
                return await newest_points(source, asset, from_s, to_s, self._tick_s)
        except Exception as error:  # an own feed may raise anything; the feed says what is wrong with it
            log.debug("no_witness", source=source.name, asset=asset, error=str(error))
            return None


def _agree(one_s: float, other_s: float) -> bool:
    return abs(one_s - other_s) <= LEAP_S
