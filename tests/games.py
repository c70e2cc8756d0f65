"""Whole games on stepped time: every part of them real, with models of this process or of their own."""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np

from condor_lite.clock import SteppedClock
from condor_lite.config import Config
from condor_lite.supervisor import Game, playing
from tests.fleet import ModelServer, Orchestrator, answers_well, normals, success
from tests.fleet.model import Behaviour, CallRequest, Wire
from tests.stage import until

REMOTE = """
[[game.settings]]
assets = ["BTC", "ETH"]
horizon = "10m"
step = "1m"
interval = "2m"

[feed]
history = "2h"

[orchestrator]
mode = "remote"
port = {port}

[report]
port = 0

[scoring]
workers = 1
"""


def as_wide_as(sigma: float) -> Behaviour:
    async def behaviour(model: ModelServer, request: CallRequest) -> Wire:
        if request.methodName == "tick":
            return await answers_well(model, request)
        return success(normals(request, sigma))

    return behaviour


@asynccontextmanager
async def orchestrated(*models: ModelServer) -> AsyncIterator[Orchestrator]:
    """An orchestrator that has announced these models."""
    orchestrator = Orchestrator()
    await orchestrator.start()
    try:
        for model in models:
            await model.start()
        await orchestrator.announce(*models)
        yield orchestrator
    finally:
        for model in models:
            await model.stop()
        await orchestrator.stop()


def ready(game: Game) -> int:
    """How many models are connected and have their history."""
    return sum(known.lane is not None and known.lane.ready for known in game.predict.participants.values())


@asynccontextmanager
async def joined(config: Config, clock: SteppedClock, models: int) -> AsyncIterator[Game]:
    """A running game with so many models."""
    async with playing(config, clock) as game:
        await until(lambda: ready(game) == models)
        yield game


async def settle(game: Game, clock: SteppedClock, until_s: float) -> None:
    """Play until then, with all that happened stored and scored."""
    await clock.run_until(until_s)
    await game.journal.flushed()
    await game.score.finish()


def window_scores(db: sqlite3.Connection) -> dict[str, float]:
    """Every model's overall score from nothing but the rounds' rows, by SCORING.md's formula."""
    sums: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    rounds = dict(db.execute("SELECT asset, count(*) FROM round WHERE status = 'scored' GROUP BY asset"))
    rows = db.execute(
        "SELECT asset, model_id, median - counted, no_move FROM score JOIN round_score USING (round_no)"
        " JOIN round USING (round_no) JOIN model USING (model_no)"
    )
    for asset, model_id, gain, no_move in rows:
        sums[model_id, asset].append((gain, no_move))
    by_model: dict[str, list[float]] = defaultdict(list)
    for (model_id, asset), terms in sums.items():
        n = len(terms)
        gain, no_move = (sum(column) for column in zip(*terms, strict=True))
        by_model[model_id].append(100 * 8 * n / (7 * n + rounds[asset]) * gain / no_move)
    return {model_id: float(np.mean(scores)) for model_id, scores in by_model.items()}
