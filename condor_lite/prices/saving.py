"""Prices on their way to the database: kept until they are stored, never waited for."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import structlog

from condor_lite.clock import Clock
from condor_lite.errors import StorageError
from condor_lite.prices.book import PriceBook
from condor_lite.prices.grid import Point
from condor_lite.prices.supply import TELL_AGAIN_S
from condor_lite.storage import repositories
from condor_lite.storage.database import Database

log = structlog.get_logger()

_RETRY_FIRST_S = 1.0
_RETRY_MOST_S = 5.0
_MARGIN_S = 1.0  # what a correction may take to be on disk
_NOT_STORED = (StorageError, sqlite3.Error, OSError)

_PORTION = 20_000  # points a transaction: other writers get their turn in between
_LOOSE = 1000  # batches that wait until they are packed
_PACK = 1000  # points that are packed for good

Points = list[Point] | npt.NDArray[np.float64]
"""Times and prices; packed, float64[k, 2], they take 16 bytes a point."""

Batch = tuple[str, str, Points]
Correction = tuple[str, str, list[Point]]
"""Asset, source, points."""


class Saver:
    """Stores new points, and corrects young ones, a transaction at a time.

    A point may be corrected while it is younger than `settle_s`: later a score may rest on it. The book
    follows the database there, so that both always say the same.

    While the database can't be written, points wait packed, and only those of the last `keep_s`: the database
    would keep no others.
    """

    def __init__(self, clock: Clock, db: Database, book: PriceBook, settle_s: float, keep_s: int) -> None:
        self._clock = clock
        self._db = db
        self._book = book
        self._settle_s = settle_s
        self._keep_s = keep_s
        self.failing = False
        """Whether points wait for a database that could not be written."""
        self._loose = 0
        self._new: list[Batch] = []
        self._revised: list[Correction] = []
        self._to_save = asyncio.Event()

    def add(self, asset: str, source: str, points: list[Point]) -> None:
        """Have points stored that are in the book."""
        self._new.append((asset, source, points))
        self._loose += 1
        self._to_save.set()

    def revise(self, asset: str, source: str, points: list[Point]) -> None:
        """Have points corrected that `source` gave before."""
        self._revised.append((asset, source, points))
        self._to_save.set()

    def may_revise(self, ts_s: int) -> bool:
        """Whether no score can rest on the point yet."""
        return self._clock.now() + _MARGIN_S < ts_s + self._settle_s

    @property
    def waiting(self) -> int:
        """How many points are not yet on disk."""
        return sum(len(points) for _, _, points in self._new)

    async def run(self) -> None:
        """Store what comes, until cancelled."""
        pause_s, told_s = _RETRY_FIRST_S, 0.0
        while True:
            await self._to_save.wait()
            self._to_save.clear()
            try:
                with self._clock.hold():
                    await self.save()
            except _NOT_STORED as error:
                if not told_s or time.monotonic() >= told_s + TELL_AGAIN_S:
                    told_s = time.monotonic()
                    log.error("prices_not_stored", error=str(error), waiting=self.waiting)
                self.failing = True
                self._pack()
                self._to_save.set()
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _RETRY_MOST_S)
                continue
            if self.failing:
                log.info("prices_stored_again")
            pause_s, told_s, self.failing = _RETRY_FIRST_S, 0.0, False

    async def save_last(self) -> None:
        """Store what is left; what can't be stored is fetched again by the next start."""
        try:
            await self.save()
        except _NOT_STORED as error:
            log.error(
                "prices_not_stored", error=str(error), lost=self.waiting, next_start="asks for them again"
            )

    async def save(self) -> None:
        """Store what is new, a portion a transaction. Kept for another attempt where that fails."""
        while self._new or self._revised:
            new, size = 0, 0
            while new < len(self._new) and size < _PORTION:
                size += len(self._new[new][2])
                new += 1
            self._revised = [
                (asset, source, young)
                for asset, source, points in self._revised
                if (young := self._in_time(asset, source, points))
            ]
            # A correction must find its point.
            revised = self._revised if new == len(self._new) else []
            changed = await self._db.write(self._store, self._new[:new], list(revised))
            del self._new[:new], revised[: len(changed)]
            for asset, source, points in changed:
                if points:
                    self._book.revise(asset, points)
                for ts_s, price in points:
                    log.info("price_revised", asset=asset, source=source, at_s=ts_s, price=price)

    def _pack(self) -> None:
        """Put small batches together, and forget what the database would not keep."""
        if self._loose < _LOOSE:
            return
        before, oldest_s = self.waiting, self._clock.now() - self._keep_s
        packed: list[Batch] = []
        small: dict[tuple[str, str], list[Points]] = {}
        for asset, source, points in self._new:
            if len(points) < _PACK:
                small.setdefault((asset, source), []).append(points)
            elif max(points[0][0], points[-1][0]) >= oldest_s:
                packed.append((asset, source, np.asarray(points, np.float64)))
        packed += [(*key, np.concatenate(batches, dtype=np.float64)) for key, batches in small.items()]
        self._new, self._loose = packed, 0
        if given_up := before - self.waiting:
            log.error("prices_given_up", count=given_up, why="older than storage.keep_prices")

    def _in_time(self, asset: str, source: str, points: Sequence[Point]) -> list[Point]:
        """Those that may be corrected. The others stand as they are, and that is told."""
        young = [point for point in points if self.may_revise(point[0])]
        for ts_s, price in points:
            if (ts_s, price) not in young:
                log.warning("price_differs", asset=asset, source=source, at_s=ts_s, source_says=price)
        return young

    def _store(
        self, conn: sqlite3.Connection, new: Sequence[Batch], revised: Sequence[Correction]
    ) -> list[Correction]:
        now_ms = int(self._clock.now() * 1000)
        for asset, source, points in new:
            repositories.add_prices(conn, asset, points, source, now_ms)
        return [
            (
                asset,
                source,
                repositories.revise_prices(conn, asset, self._in_time(asset, source, points), source),
            )
            for asset, source, points in revised
        ]
