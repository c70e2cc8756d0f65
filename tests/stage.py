"""A stage for the predict loop: a real database, feed, client library and models; time is stepped."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import anyio

from condor_lite import config as configuration
from condor_lite.clock import SteppedClock
from condor_lite.config import Config
from condor_lite.game.entities import Round
from condor_lite.predict import PredictLoop
from condor_lite.prices.feed import Feed
from condor_lite.prices.source import Source
from condor_lite.prices.sources import make_sources
from condor_lite.storage.database import Database
from condor_lite.storage.journal import Journal
from tests.fleet import ModelServer, Orchestrator
from tests.program import LIMIT_S

START_S = 1_700_002_800  # a full hour

CONFIG = """
[[game.settings]]
assets = ["BTC", "ETH"]
horizon = "1m"
step = "10s"
interval = "20s"

[feed]
tick = "5s"
history = "1h"

[predict]
timeout = "5s"
max_consecutive_failures = 3
max_consecutive_timeouts = 3

[orchestrator]
mode = "remote"
"""


def within(limit: str, text: str = CONFIG) -> str:
    """The config with another `predict.timeout`: a short one where somebody is to be late."""
    changed = text.replace('timeout = "5s"', f'timeout = "{limit}"')
    assert changed != text, f"it has no predict.timeout to be {limit}"
    return changed


def load(folder: Path, text: str = CONFIG, **environ: str) -> Config:
    path = folder / "config.toml"
    path.write_text(text)
    return configuration.load(path, environ)


async def until(happened: Callable[[], Any], what: Callable[[], object] = lambda: None) -> None:
    """Wait for something outside of the game's time; `what()` tells where it stands if it never comes."""
    until_s = time.monotonic() + LIMIT_S
    while not happened():
        if time.monotonic() > until_s:
            raise TimeoutError(f"it did not happen in {LIMIT_S:.0f} s: {what()}")
        await asyncio.sleep(0.005)


@dataclass
class Stage:
    config: Config
    clock: SteppedClock
    db: Database
    journal: Journal
    feed: Feed
    predict: PredictLoop
    orchestrator: Orchestrator
    closed: list[Round]
    models: list[ModelServer] = field(default_factory=list)

    async def join(self, *models: ModelServer) -> None:
        """Start, announce and connect models."""
        for model in models:
            await model.start()
            self.models.append(model)
        await self.orchestrator.announce(*models)
        await until(lambda: all(self.ready(model.model_id) for model in models), self.standing)

    def standing(self) -> dict[str, object]:
        """Who is being connected and who was refused, and why: what a wait in vain is explained by."""
        fleet = self.predict.fleet
        refused = {model_id: refused.reason for model_id, refused in fleet.refused.items()}
        return {"connecting": [*fleet.connecting], "refused": refused}

    def ready(self, model_id: str) -> bool:
        known = self.predict.participants.get(model_id)
        return known is not None and known.lane is not None and known.lane.ready

    async def play(self, seconds: float) -> None:
        """Let so much of the game's time pass, with all that belongs to it stored."""
        await self.clock.run_until(self.clock.now() + seconds)
        await self.journal.flushed()

    async def rows(self, sql: str, *parameters: Any) -> list[tuple[Any, ...]]:
        def fetch(connection: sqlite3.Connection) -> list[tuple[Any, ...]]:
            return [tuple(row) for row in connection.execute(sql, parameters)]

        return await self.db.read(fetch)

    async def answers(self) -> dict[tuple[str, int], tuple[str, str | None]]:
        """By (model_id, scheduled_at): status and detail."""
        rows = await self.rows(
            "SELECT model_id, scheduled_at_s, prediction.status, detail FROM prediction"
            " JOIN round USING (round_no) JOIN model USING (model_no)"
        )
        return {(model_id, at_s): (status, detail) for model_id, at_s, status, detail in rows}


@asynccontextmanager
async def staged(
    folder: Path,
    text: str = CONFIG,
    start_s: float = START_S + 1,
    timeout_s: float | None = None,
    live: Callable[[SteppedClock], Source] | None = None,
    make_journal: Callable[[Database], Journal] = Journal,
) -> AsyncIterator[Stage]:
    """A running predict loop without models; they `join`. `timeout_s` may be shorter than a config allows.

    `live` makes the source of its prices, in place of the configured one.
    """
    config = load(folder, text)
    if timeout_s is not None:
        config = replace(config, predict=replace(config.predict, timeout_s=timeout_s))
    orchestrator = Orchestrator()
    await orchestrator.start()
    clock = SteppedClock(start_s)
    closed: list[Round] = []
    try:
        async with Database(config.storage.path) as db:
            journal = make_journal(db)
            (source,) = [live(clock)] if live else make_sources(config)
            feed = Feed(config, clock, db, source)
            await feed.start()
            predict = PredictLoop(config, clock, db, journal, feed, orchestrator.port, closed.append)
            stage = Stage(config, clock, db, journal, feed, predict, orchestrator, closed)
            async with anyio.create_task_group() as tasks:
                for run in (journal.run, predict.fleet.run, feed.run, predict.run):
                    tasks.start_soon(run)
                await until(lambda: predict.fleet.connected)
                try:
                    yield stage
                finally:
                    tasks.cancel_scope.cancel()
                    with anyio.CancelScope(shield=True):
                        for model in stage.models:
                            await model.stop()
            await source.aclose()
    finally:
        await orchestrator.stop()
