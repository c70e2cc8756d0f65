"""Retention and the nightly tidying of a real file, on a stepped clock."""

from __future__ import annotations

import itertools
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path

import anyio
import pytest

from condor_lite.clock import SteppedClock
from condor_lite.config import Config
from condor_lite.storage import repositories
from condor_lite.storage.database import Database
from condor_lite.storage.journal import Journal
from condor_lite.upkeep import Upkeep, next_night_s
from tests.stage import load

pytestmark = pytest.mark.anyio

DAY_S = 86400
MIDNIGHT_S = 1_700_006_400
SMALL_BYTES = 60_000  # of the log: what was forgotten since it was emptied
CONFIG = """
[[game.settings]]
assets = ["BTC"]
horizon = "1m"
step = "10s"
interval = "20s"
[feed]
tick = "5s"
history = "1h"
[storage]
keep_payloads = "1h"
keep_prices = "4h"
"""


@dataclass
class Kept:
    config: Config
    clock: SteppedClock
    db: Database
    journal: Journal

    @property
    def log_bytes(self) -> int:
        return Path(f"{self.db.path}-wal").stat().st_size

    async def prices(self, count: int, ago_s: int = 0) -> None:
        """So many prices, five seconds apart, up to now or so long ago."""
        now_s = int(self.clock.now()) - ago_s
        points = [(now_s - 5 * back, 1.0) for back in range(count)]
        await self.db.write(repositories.add_prices, "BTC", points, "synthetic", 0)

    async def count(self) -> int:
        return await self.db.read(lambda conn: int(conn.execute("SELECT count(*) FROM price").fetchone()[0]))


@asynccontextmanager
async def kept(folder: Path, start_s: float) -> AsyncIterator[Kept]:
    config = load(folder, CONFIG)
    clock = SteppedClock(start_s)
    async with Database(config.storage.path) as db, anyio.create_task_group() as tasks:
        journal = Journal(db)
        tasks.start_soon(journal.run)
        tasks.start_soon(Upkeep(config, clock, db, journal).run)
        yield Kept(config, clock, db, journal)
        tasks.cancel_scope.cancel()


async def test_what_is_old_goes_in_steps_that_answers_fit_between(tmp_path: Path) -> None:
    async with kept(tmp_path, MIDNIGHT_S) as one:
        await one.prices(4 * 3600 // 5 + 3000)
        sizes: list[int] = []

        def note(conn: sqlite3.Connection) -> None:
            sizes.append(conn.execute("SELECT count(*) FROM price").fetchone()[0])

        async def answers() -> None:
            while not sizes or sizes[-1] > 2941:
                await one.journal.write(note)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(answers)
            await one.clock.run_until(MIDNIGHT_S + 301)
        steps = [before - after for before, after in itertools.pairwise(sizes) if before != after]
        assert len(steps) > 5
        assert max(steps) <= 1000, "an answer waited for several steps"
        assert await one.count() < 2945


async def test_a_clock_that_is_far_ahead_makes_it_forget_nothing(tmp_path: Path) -> None:
    async with kept(tmp_path, MIDNIGHT_S) as one:
        await one.prices(100, ago_s=365 * DAY_S)
        await one.prices(50, ago_s=365 * DAY_S + 5 * 3600)
        await one.clock.run_until(MIDNIGHT_S + 301)
        assert await one.count() == 100


async def test_the_file_does_not_grow_while_the_feed_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steady_s = 0.0
    monkeypatch.setattr("condor_lite.upkeep.monotonic", lambda: steady_s)
    async with kept(tmp_path, MIDNIGHT_S) as one:
        await one.prices(100)
        await one.clock.run_until(MIDNIGHT_S + 301)
        steady_s = 5 * 3600.0
        await one.clock.run_until(MIDNIGHT_S + 4 * 3600 - 1000)
        assert await one.count() == 100, "by the game's clock they are not old"
        await one.clock.run_until(MIDNIGHT_S + 5 * 3600)
        assert await one.count() == 0


async def test_the_log_is_emptied_at_night(tmp_path: Path) -> None:
    async with kept(tmp_path, MIDNIGHT_S + 3600) as one:
        await one.prices(2500)
        await one.clock.run_until(MIDNIGHT_S + 3 * 3600 - 10)
        assert one.log_bytes > SMALL_BYTES
        await one.clock.run_until(MIDNIGHT_S + 3 * 3600 + 301)
        assert one.log_bytes < SMALL_BYTES
        await one.prices(2500)
        assert one.log_bytes > SMALL_BYTES
        await one.clock.run_until(MIDNIGHT_S + DAY_S + 3 * 3600 + 301)
        assert one.log_bytes < SMALL_BYTES


async def test_a_reader_in_the_way_holds_nobody_up_and_the_night_goes_on(tmp_path: Path) -> None:
    async with kept(tmp_path, MIDNIGHT_S + 3 * 3600 - 100) as one:
        await one.prices(2500)
        with closing(sqlite3.connect(one.db.path, isolation_level=None)) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT count(*) FROM price").fetchone()
            await one.prices(2600)
            await one.clock.run_until(MIDNIGHT_S + 3 * 3600 + 900)
            assert one.log_bytes > SMALL_BYTES
            await one.journal.write(lambda conn: conn.execute("SELECT 1").fetchone())
            reader.execute("ROLLBACK")
        await one.clock.run_until(MIDNIGHT_S + 3 * 3600 + 1300)
        assert one.log_bytes < SMALL_BYTES


def test_a_night_is_three_in_the_morning_utc() -> None:
    assert next_night_s(MIDNIGHT_S) == MIDNIGHT_S + 3 * 3600
    assert next_night_s(MIDNIGHT_S + 3 * 3600 - 0.5) == MIDNIGHT_S + 3 * 3600
    assert next_night_s(MIDNIGHT_S + 3 * 3600) == MIDNIGHT_S + DAY_S + 3 * 3600
