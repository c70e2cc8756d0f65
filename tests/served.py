"""A served game: the report over a real port, on a real database file with one small game in it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import anyio
import httpx
import numpy as np
import orjson

from condor_lite import config as configuration
from condor_lite.backup import BackupState
from condor_lite.clock import SteppedClock
from condor_lite.config import Config
from condor_lite.game.density import Limits, decode
from condor_lite.game.entities import (
    Answer,
    AnswerStatus,
    Leaderboard,
    ModelInfo,
    Round,
    RoundStatus,
    VoidRound,
)
from condor_lite.game.outcome import Series, realise
from condor_lite.game.rounds import score_round
from condor_lite.game.scoring import BUILT_IN, Rules, score
from condor_lite.game.windows import WindowSums
from condor_lite.news import News
from condor_lite.prices.feed import FeedState
from condor_lite.report import server
from condor_lite.report.answers import moment
from condor_lite.report.api import create_app
from condor_lite.report.live import Live, Problem, ServiceState, Vitals
from condor_lite.report.stream import Stream
from condor_lite.storage import repositories, scores
from condor_lite.storage.database import Database

START_S = 1_700_002_800  # a full hour
NOW_S = START_S + 1000
BTC_ROUND = f"BTC-60-10-{START_S}"
VOID_ROUND = f"BTC-60-10-{START_S + 40}"
CLOSED_ROUND = f"BTC-60-10-{START_S + 80}"
OPEN_ROUND = f"BTC-60-10-{NOW_S - 20}"


EVIL = "<script>alert(1)</script>"

CONFIG = """
[game]
name = "Tiny & small"

[[game.settings]]
assets = ["BTC", "ETH"]
horizon = "1m"
step = "10s"
interval = "20s"
weight = 3

[[game.settings]]
assets = ["BTC"]
horizon = "2m"
step = "1m"
interval = "1m"

[feed]
tick = "10s"

[storage]
path = "condor.db"
"""

ALPHA = ModelInfo("1", "alpha", "p-alice", "alice", "1_a")
BETA = ModelInfo("b/2", EVIL, "p-bob", "bob", "2_a")
BENCH = ModelInfo("bench", "plain", "host", "the host", "b_a", benchmark=True)
NEW = ModelInfo("new", "newcomer", "p-alice", "alice", "n_a")


def normals(n: int, scale: float) -> bytes:
    density = {"type": "builtin", "name": "norm", "params": {"loc": 0.0, "scale": scale}}
    return orjson.dumps([density] * n)


def points(n: int) -> bytes:
    return orjson.dumps([{"type": "discrete", "points": {"-0.001": 0.5, "0.001": 0.5}}] * n)


@dataclass
class Game:
    """A served game: its database, what the report knows of it, and a client."""

    db: Database
    live: Live
    config: Config
    client: httpx.AsyncClient
    server: server.Server
    stream: Stream
    problems: list[str] = field(default_factory=list)
    connected: set[str] = field(default_factory=set)

    async def get(self, path: str, status: int = 200, **params: Any) -> Any:
        answer = await self.client.get(path, params=params or None)
        assert answer.status_code == status, answer.text
        assert answer.headers["content-type"] == "application/json"
        return orjson.loads(answer.content)  # refuses NaN and Infinity

    async def error(self, path: str, status: int, **params: Any) -> str:
        body = await self.get(path, status, **params)
        assert set(body) == {"error", "detail"}
        assert all(isinstance(text, str) and text for text in body.values())
        return str(body["detail"])


def load(folder: Path, extra: str = "") -> Config:
    (folder / "config.toml").write_text(CONFIG + extra)
    return configuration.load(folder / "config.toml", {})


@asynccontextmanager
async def serve(folder: Path, extra: str = "", **more: Any) -> AsyncIterator[Game]:
    config = load(folder, extra)
    problems: list[str] = []
    connected = {"1", "bench"}
    states = [
        FeedState("BTC", "synthetic", NOW_S - 5, 101.5, 5.0, False, 10),
        FeedState("ETH", "synthetic", None, None, None, True, 0),
    ]
    live = Live(
        config=config,
        clock=SteppedClock(NOW_S),
        started_at_s=START_S - 100.5,
        problems=lambda: [Problem(what, "wait") for what in problems],
        feeds=lambda: states,
        connected=lambda: connected,
        vitals=lambda: Vitals(
            [ServiceState("predict", None, 0, 61.0)],
            1,
            0,
            0,
            2.0,
            (0.0, 0.001, 0.01),
            0.0,
            BackupState(None, 60.0),
        ),
        news=News(),
    )
    async with Database(config.storage.path) as db:
        sock = server.bind("127.0.0.1", 0)
        app = create_app(live, more.get("readers") or db.reports)
        served = server.Server(app, sock, before_stop=app.state.stream.end)
        async with anyio.create_task_group() as tasks:
            await tasks.start(served.run)
            async with httpx.AsyncClient(base_url=served.url, timeout=60) as client:
                yield Game(db, live, config, client, served, app.state.stream, problems, connected)
            served.stop()


async def play(game: Game) -> Leaderboard:
    """Four scored rounds, one void, one missed, one closed, one open; two stored leaderboards."""
    db, config = game.db, game.config
    steps = np.arange(-10, 110)
    path = 100 * np.exp(0.0004 * np.cumsum(np.sin(steps)))
    prices = [(START_S + 10 * int(k), float(p)) for k, p in zip(steps, path, strict=True)]
    for asset in config.game.assets:
        await db.write(repositories.add_prices, asset, prices, "synthetic", NOW_S * 1000)
    models = [await db.write(repositories.upsert_model, info, START_S - 60) for info in (ALPHA, BETA, BENCH)]
    alpha, beta, bench = (model.model_no for model in models)
    version = await db.write(scores.current_scorer, "crps", "log_return", Rules().fingerprint(), START_S)
    sums = WindowSums(config.game.settings, BUILT_IN["crps"], scorer_version=version, benchmark=bench)

    async def hold(asset: str, horizon_s: int, step_s: int, at_s: int, *, scored: bool) -> int:
        held = Round(asset, horizon_s, step_s, at_s, performed_at_ms=at_s * 1000 + 1250)
        (no,) = await db.write(repositories.open_rounds, [held])
        assert no is not None
        n = horizon_s // step_s
        ms = at_s * 1000 + 1300
        bad = orjson.dumps([{"type": "builtin", "name": "norm", "params": {"scale": -1}}] * n)
        answers = [
            Answer(no, alpha, AnswerStatus.SUCCESS, ms, 900, None, normals(n, 0.0004)),
            Answer(no, beta, AnswerStatus.SUCCESS, ms, 1900, None, bad),
            Answer(no, bench, AnswerStatus.SUCCESS, ms, 700, None, points(n)),
        ]
        await db.write(repositories.add_answers, answers)
        if not scored:
            return no
        await db.write(repositories.close_round, no, RoundStatus.CLOSED, None, [])
        await db.write(repositories.save_validation, no, {beta: "segment 1: scale must be > 0"})
        realised = realise(
            Series(*await db.read(repositories.load_prices, asset, at_s - 10, at_s + horizon_s)),
            held.setting,
            at_s,
            10,
            "log_return",
        )
        raw: dict[int, float | None] = {beta: None}
        for answer in (answers[0], answers[2]):
            assert answer.payload is not None
            densities = decode(answer.payload, held.setting, Limits(16, 2048))
            raw[answer.model_no] = score([(densities, realised)], Rules())[0].raw
        result = score_round(raw, {bench}, realised.no_move, BUILT_IN["crps"])
        assert not isinstance(result, VoidRound)
        sums.add(held.setting.key, held.resolvable_at_s, result)
        scored_ms = (held.resolvable_at_s + 10) * 1000
        assert await db.write(scores.save_round_scores, no, version, result, realised.resolved, scored_ms)
        return no

    await hold("BTC", 60, 10, START_S, scored=True)
    await hold("BTC", 60, 10, START_S + 20, scored=True)
    await hold("ETH", 60, 10, START_S + 20, scored=True)
    await hold("BTC", 120, 60, START_S + 60, scored=True)
    void = await hold("BTC", 60, 10, START_S + 40, scored=False)
    await db.write(repositories.close_round, void, RoundStatus.VOID, "the prices never came", [])
    missed = Round("ETH", 60, 10, START_S + 40, RoundStatus.MISSED, "the game was not running")
    await db.write(repositories.record_rounds, [missed])
    new = await db.write(repositories.upsert_model, NEW, START_S + 70)
    closed = await hold("BTC", 60, 10, START_S + 80, scored=False)
    await db.write(repositories.close_round, closed, RoundStatus.CLOSED, None, [new.model_no])
    (open_no,) = await db.write(
        repositories.open_rounds, [Round("BTC", 60, 10, NOW_S - 20, performed_at_ms=NOW_S * 1000 - 20_000)]
    )
    assert open_no is not None
    timed_out = Answer(open_no, beta, AnswerStatus.TIMEOUT, NOW_S * 1000 - 1000, 2_000_000)
    answer = Answer(open_no, alpha, AnswerStatus.SUCCESS, NOW_S * 1000 - 1000, 900, None, normals(6, 0.001))
    await db.write(repositories.add_answers, [answer, timed_out])
    known = [model for model in await db.read(repositories.load_models) if model.info.model_id != "new"]
    leaderboard = sums.leaderboard(NOW_S, known)
    for at_s in (NOW_S - 900, NOW_S):
        await db.write(scores.save_leaderboard, replace(leaderboard, created_at_s=at_s), True)
    game.live.publish(leaderboard)
    return leaderboard


def day(offset: int) -> str:
    """As the web app writes it."""
    return moment(NOW_S + 86400 * offset).replace("Z", ".000Z")
