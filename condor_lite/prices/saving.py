"""Prices on their way to the database: kept until they are stored, never waited for."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Sequence

import structlog

from condor_lite.clock import Clock
from condor_lite.errors import StorageError
from condor_lite.prices.book import PriceBook
from condor_lite.prices.grid import Point
from condor_lite.storage import repositories
from condor_lite.storage.database import Database

log = structlog.get_logger()

_RETRY_FIRST_S = 1.0
_RETRY_MOST_S = 60.0
_MARGIN_S = 1.0  # what a correction may take to be on disk
_NOT_STORED = (StorageError, sqlite3.Error, OSError)

Batch = tuple[str, str, list[Point]]
"""Asset, source, points."""


class Saver:
    """Stores new points, and corrects young ones, a transaction at a time.

    A point may be corrected while it is younger than `settle_s`: later a score may rest on it. The book
    follows the database there, so that both always say the same.
    """

    def __init__(self, clock: Clock, db: Database, book: PriceBook, settle_s: float) -> None:
        self._clock = clock
        self._db = db
        self._book = book
        self._settle_s = settle_s
        self._new: list[Batch] = []
        self._revised: list[Batch] = []
        self._to_save = asyncio.Event()

    def add(self, asset: str, source: str, points: list[Point]) -> None:
        """Have points stored that are in the book."""
        self._new.append((asset, source, points))
        self._to_save.set()

    def revise(self, asset: str, source: str, points: list[Point]) -> None:
        """Have points corrected that `source` gave before."""
        self._revised.append((asset, source, points))
        self._to_save.set()

    def may_revise(self, ts_s: int) -> bool:
        """Whether no score can rest on the point yet."""
        return self._clock.now() + _MARGIN_S < ts_s + self._settle_s

    async def run(self) -> None:
        """Store what comes, until cancelled."""
        pause_s, failing = _RETRY_FIRST_S, False
        while True:
            await self._to_save.wait()
            self._to_save.clear()
            try:
                with self._clock.hold():
                    await self.save()
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

    async def save_last(self) -> None:
        """Store what is left; what can't be stored is fetched again by the next start."""
        try:
            await self.save()
        except _NOT_STORED as error:
            log.error("prices_not_stored", error=str(error))

    async def save(self) -> None:
        """Store what is new, in one transaction. Kept for another attempt where that fails."""
        new, revised = list(self._new), list(self._revised)
        if not (new or revised):
            return
        changed = await self._db.write(self._store, new, revised)
        del self._new[: len(new)], self._revised[: len(revised)]
        for asset, source, points in changed:
            if points:
                self._book.revise(asset, points)
            for ts_s, price in points:
                log.info("price_revised", asset=asset, source=source, at_s=ts_s, price=price)

    def _store(self, conn: sqlite3.Connection, new: Sequence[Batch], revised: Sequence[Batch]) -> list[Batch]:
        now_ms = int(self._clock.now() * 1000)
        for asset, source, points in new:
            repositories.add_prices(conn, asset, points, source, now_ms)
        changed: list[Batch] = []
        for asset, source, points in revised:
            young = [point for point in points if self.may_revise(point[0])]
            changed.append((asset, source, repositories.revise_prices(conn, asset, young, source)))
        return changed
