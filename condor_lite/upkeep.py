"""Looking after the file: what is old is forgotten, and every night the log is written back and emptied.

Both run on the game's clock. A service of its own, so that the file does not grow while scoring is down.
"""

from __future__ import annotations

import asyncio
import math
import sqlite3
from collections.abc import Iterable
from time import monotonic

import structlog

from condor_lite.clock import Clock
from condor_lite.config import Config
from condor_lite.storage import repositories, scores
from condor_lite.storage.database import Database
from condor_lite.storage.journal import Journal

log = structlog.get_logger()

_EVERY_S = 300.0  # on the wall
_ROWS = 100  # a step, or a round where it has more: a few milliseconds of the writer
_PAUSE_S = 0.01  # between steps, on the wall: others write then
_DAY_S = 86400
_NIGHT_S = 3 * 3600  # after midnight UTC


class Upkeep:
    """One game's upkeep. A step never holds the writer for long, and never goes before an answer."""

    def __init__(self, config: Config, clock: Clock, db: Database, journal: Journal) -> None:
        self._config = config
        self._clock = clock
        self._db = db
        self._journal = journal
        self._due_s = next_night_s(clock.now())
        self._newest = (-math.inf, 0.0)  # the newest price's time, and when that was seen first (monotonic)

    async def run(self) -> None:
        """Look after the file until cancelled."""
        while True:
            with self._clock.hold():
                await self.prune()
                if self._clock.now() >= self._due_s and not self._journal.waiting and await self._db.tidy():
                    self._due_s = next_night_s(self._clock.now())
                    log.debug("database_tidied")
            await self._clock.sleep_until(self._clock.now() + _EVERY_S * self._clock.speed)

    async def prune(self) -> None:
        """Forget what is older than the host wants to keep.

        Where the clock is far ahead of the newest price, by that, and the time that was seen to pass since.
        Otherwise a machine whose clock is set a year ahead for a moment would forget the whole game.
        """
        newest_s = await self._db.read(_newest_price_s, self._config.game.assets)
        steady_s = monotonic()
        if newest_s > self._newest[0]:  # in the end the newest price itself is forgotten
            self._newest = newest_s, steady_s
        newest_s, since_s = self._newest
        now_s = min(self._clock.now(), newest_s + (steady_s - since_s) * self._clock.speed)
        while await self._db.write(scores.prune, now_s, self._config.storage, _ROWS):
            await self._journal.flushed()
            await asyncio.sleep(_PAUSE_S)


def _newest_price_s(conn: sqlite3.Connection, assets: Iterable[str]) -> float:
    """0 where there is no price at all."""
    return max(repositories.newest_price_s(conn, asset) or 0 for asset in assets)


def next_night_s(now_s: float) -> float:
    """The first 03:00 UTC after `now_s`, epoch seconds."""
    return (math.floor((now_s - _NIGHT_S) / _DAY_S) + 1) * _DAY_S + _NIGHT_S
