"""The history, newest first: the game starts before all of it is there."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Sequence

import anyio
import structlog

from condor_lite.clock import Clock
from condor_lite.prices.grid import Point, Span
from condor_lite.prices.intake import Intake
from condor_lite.prices.supply import TELL_AGAIN_S, Line, Supply
from condor_lite.storage import repositories
from condor_lite.storage.database import Database

log = structlog.get_logger()

_AT_ONCE = 4  # assets; the newest prices of all others come in between
_TOLD_STEPS = 10


class Past:
    """Fetches what the lines have to do of the history. `history_s` is what all of it is."""

    def __init__(
        self,
        clock: Clock,
        db: Database,
        intake: Intake,
        lines: Sequence[Line],
        tick_s: int,
        history_s: int,
    ) -> None:
        self._clock = clock
        self._db = db
        self._intake = intake
        self._lines = lines
        self._tick_s = tick_s
        self._history_s = history_s
        self._told = -1
        self._turns = anyio.CapacityLimiter(_AT_ONCE)

    def share(self, line: Line) -> float:
        """How much of an asset's history is there, from 0 to 1."""
        if not line.begun.is_set():
            return 0.0
        lacking_s = sum(span.until_s - span.after_s for span in line.todo)
        return max(0.0, 1.0 - lacking_s / self._history_s)

    @property
    def done(self) -> bool:
        """Whether all of it is there."""
        return all(line.begun.is_set() and not line.todo for line in self._lines)

    async def run(self) -> None:
        """Fetch all that is to be done, a few assets at a time."""
        if self.done:
            return
        self._tell()
        async with anyio.create_task_group() as tasks:
            for line in self._lines:
                tasks.start_soon(self._fill, line, name=f"history-{line.asset}")
        log.info("history_complete", points=sum(self._intake.book.count(line.asset) for line in self._lines))

    async def page(self, line: Line, supply: Supply) -> None:
        """Fetch the newest page of what is to be done for an asset."""
        span = line.todo[0]
        after_s = max(span.after_s, span.until_s - supply.source.page_points * span.step_s)
        if supply.source.reach_s is not None:
            after_s = max(after_s, int(self._clock.now()) - supply.source.reach_s)
        page = Span(after_s, span.until_s, span.step_s)
        if line.next_page == (page.until_s, supply):
            above = line.above
        else:
            above = await self._db.read(_own, line.asset, page.until_s + self._tick_s, supply.source.name)
        below = None
        if page.after_s == span.after_s:
            below = await self._db.read(_own, line.asset, page.after_s, supply.source.name)
        line.above, ends_s = await self._intake.back(line, supply, page, below, above)
        line.next_page = (ends_s, supply)
        line.todo[:1] = [Span(span.after_s, ends_s, span.step_s)] if ends_s > span.after_s else []

    async def _fill(self, line: Line) -> None:
        await line.begun.wait()
        failures, told_at_s = 0, -math.inf
        while line.todo:
            now_s = self._clock.now()
            supply = line.reaching(line.todo[0].until_s, int(now_s))
            if supply is None:
                log.warning("history_is_short", asset=line.asset, have=f"{self.share(line):.0%}")
                line.todo.clear()
                break
            await self._clock.sleep_until(supply.channel.not_before_s)
            try:
                async with self._turns:
                    with self._clock.hold():
                        await self.page(line, supply)
            except Exception as error:
                if not failures and now_s >= told_at_s + TELL_AGAIN_S:
                    told_at_s = now_s
                    log.warning(
                        "history_failing", asset=line.asset, source=supply.source.name, error=str(error)
                    )
                await self._clock.sleep_until(supply.channel.retry_s(error, failures, self._clock.now()))
                failures += 1
            else:
                failures = 0
                self._tell()

    def _tell(self) -> None:
        step = int(sum(map(self.share, self._lines)) / len(self._lines) * _TOLD_STEPS)
        if step > self._told:
            self._told = step
            log.info("history", have=f"{step / _TOLD_STEPS:.0%}")


def _own(conn: sqlite3.Connection, asset: str, ts_s: int, source: str) -> Point | None:
    """The stored point of that time, if this source gave it."""
    series, names = repositories.load_series(conn, asset, ts_s, ts_s)
    return (ts_s, float(series.price[0])) if names == (source,) else None
