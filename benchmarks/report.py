"""The report under load: its hottest answer, a month of history, a mix of readers, and the game beside them.

`python -m benchmarks.report [part ...]` runs some of the parts; each has a fresh process. The clients are in
a process of their own. Where other programs run, processor time of the serving process says more than answers
a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import anyio
import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from benchmarks._client import Asked, asking
from benchmarks.predict import (
    Beats,
    Times,
    compare_answers,
    compare_starts,
    ms,
    playing,
    quantile,
    row,
    serving,
    watched,
)
from condor_lite import config as configuration
from condor_lite.clock import SteppedClock
from condor_lite.config import Config
from condor_lite.game.calibration import Brief
from condor_lite.game.entities import (
    Leaderboard,
    Model,
    ModelInfo,
    Standing,
    Window,
    WindowScores,
)
from condor_lite.logs import configure
from condor_lite.news import News
from condor_lite.prices.feed import FeedState
from condor_lite.report import server
from condor_lite.report.answers import moment
from condor_lite.report.api import create_app
from condor_lite.report.live import Live, Vitals
from condor_lite.storage import repositories, scores
from condor_lite.storage.connection import connect_writer
from condor_lite.storage.database import Database
from condor_lite.watchdog import spare_the_loop
from tests.fleet.process import FleetProcess

LEADERBOARD = "/reports/leaderboard"
RANKED = 500
CONNECTIONS = (64, 256)
TURNS = 3
TURN_S = 0.5

MODELS, ROUNDS, ASSETS = 100, 50_000, ("BTC", "ETH", "SOL", "XAU")
DAY_S = 86400
START_S = 1_700_006_400
END_S = START_S + 30 * DAY_S
SPACING_S = 900
CONFIG = """
[[game.settings]]
assets = ["BTC", "ETH", "SOL", "XAU"]
horizon = "1h"
step = "1m"
interval = "1m"

[feed]
tick = "60s"

[log]
level = "error"
"""


def main(parts: Sequence[str] = ()) -> None:
    """Run the parts in turn; all where none is named."""
    if unknown := [part for part in parts if part not in PARTS]:
        sys.exit(f"no part {', '.join(unknown)}; there are: {', '.join(PARTS)}")
    with tempfile.TemporaryDirectory() as folder:
        for part in parts or PARTS:
            subprocess.run([sys.executable, "-m", "benchmarks.report", "run", part, folder], check=True)


def board(models: int, created_at_s: int, first_no: int = 1) -> Leaderboard:
    """So many models, with every number that a leaderboard can show."""
    return Leaderboard(created_at_s, 1, tuple(_standing(first_no + k, k + 1) for k in range(models)))


def _standing(model_no: int, rank: int) -> Standing:
    def numbers(scale: float) -> WindowScores:
        return WindowScores(*(scale / (rank + part) for part in (0.1, 0.3, 0.7)))

    return Standing(
        model=Model(model_no, info(model_no), START_S, END_S, START_S),
        rank=rank,
        ranks=dict.fromkeys(Window, rank),
        overall=numbers(10.0),
        by_setting={f"{asset}-3600-60": numbers(9.0) for asset in ASSETS},
        rounds=10_000,
        answered=9_990 - rank,
        skill=numbers(0.3),
        standard_error=numbers(0.7),
        p_better_than_next=0.7,
        calibration=Brief(0.9 - rank / 1e4, rank / 1e4),
    )


def info(model_no: int) -> ModelInfo:
    return ModelInfo(
        f"{model_no:05}", f"model {model_no}", f"player-{model_no}", f"player {model_no}", f"d-{model_no}"
    )


@asynccontextmanager
async def reporting(folder: Path, leaderboard: Leaderboard, at_s: int) -> AsyncIterator[tuple[str, Live]]:
    """The report on the database in `folder`, without a game beside it; its address."""
    config = _config(folder)
    configure(config.log)
    states = [FeedState(asset, "synthetic", at_s - 5, 101.5, 5.0, False, 10) for asset in ASSETS]
    live = Live(
        config=config,
        clock=SteppedClock(at_s),
        started_at_s=at_s - DAY_S,
        problems=list,
        feeds=lambda: states,
        connected=frozenset,
        vitals=lambda: Vitals([], 1, 0, 0, 2.0, (0.0, 0.001, 0.01), 0.0),
        news=News(),
    )
    live.publish(leaderboard)
    async with Database(config.storage.path) as db:
        app = create_app(live, db.reports)
        async with _served(app, app.state.stream.end) as url:
            spare_the_loop()
            yield url, live


@asynccontextmanager
async def _served(app: ASGIApp, before_stop: Callable[[], None] = lambda: None) -> AsyncIterator[str]:
    served = server.Server(app, server.bind("127.0.0.1", 0), before_stop=before_stop)
    async with anyio.create_task_group() as tasks:
        await tasks.start(served.run)
        yield served.url
        served.stop()


@asynccontextmanager
async def _on_plain_uvicorn(app: ASGIApp) -> AsyncIterator[str]:
    sock = server.bind("127.0.0.1", 0)
    plain = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", ws="none"))
    plain.capture_signals = contextlib.nullcontext  # type: ignore[method-assign, assignment]
    serving = asyncio.create_task(plain.serve([sock]))
    while not plain.started:  # noqa: ASYNC110 - it has no event
        await asyncio.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        plain.should_exit = True
        await serving


def _config(folder: Path) -> Config:
    path = folder / "config.toml"
    path.write_text(CONFIG)
    return configuration.load(path, {})


def _port(url: str) -> int:
    return int(url.rpartition(":")[2])


# -- leaderboard ---------------------------------------------------------------------------------------------


@dataclass
class Turns:
    """One server's, together."""

    answered: int = 0
    seconds: float = 0.0
    cpu_s: float = 0.0
    failed: int = 0

    @property
    def a_second(self) -> float:
        return self.answered / self.seconds

    @property
    def cpu_us(self) -> float:
        return 1e6 * self.cpu_s / self.answered


async def leaderboard(folder: Path) -> None:
    """500 models: answers a second, in turns with the same bytes from an endpoint that does nothing else."""
    print(f"leaderboard: {RANKED} models; to the same bytes from bare Starlette, in turns (target >= 0.7)")
    async with AsyncExitStack() as stack:
        own = folder / "small"
        own.mkdir(exist_ok=True)
        ours, _ = await stack.enter_async_context(reporting(own, board(RANKED, END_S), END_S))
        async with httpx.AsyncClient(headers={"accept-encoding": "identity"}) as client:
            body = (await client.get(ours + LEADERBOARD)).content
        for zipped in (False, True):
            bare = _bare(gzip.compress(body, 4) if zipped else body, zipped)
            ports = {
                "bare, this server's settings": _port(await stack.enter_async_context(_served(bare))),
                "bare, plain uvicorn": _port(await stack.enter_async_context(_on_plain_uvicorn(bare))),
                "this report": _port(ours),
            }
            for connections in CONNECTIONS:
                await _take_turns(ports, connections, zipped)


def _bare(body: bytes, zipped: bool) -> Starlette:
    headers = {"content-encoding": "gzip"} if zipped else None

    async def answer(request: Request) -> Response:
        return Response(body, media_type="application/json", headers=headers)

    return Starlette(routes=[Route(LEADERBOARD, answer)])


async def _take_turns(ports: dict[str, int], connections: int, zipped: bool) -> None:
    turns = {name: Turns() for name in ports}
    for _ in range(TURNS):
        for name, port in ports.items():
            async with asking(port, connections, [LEADERBOARD], zipped=zipped) as asked:
                cpu_s = time.process_time()
                await asyncio.sleep(TURN_S)
                cpu_s = time.process_time() - cpu_s
            one = turns[name]
            one.answered += asked.answered
            one.seconds += asked.seconds
            one.cpu_s += cpu_s
            one.failed += sum(asked.failed.values())
    of = "gzip" if zipped else "plain"
    reference = next(iter(turns.values()))
    for name, one in turns.items():
        note = f"{one.cpu_us:.0f} us of processor, {reference.cpu_us / one.cpu_us:.2f}; failed: {one.failed}"
        row(
            f"{name} ({connections}, {of})",
            f"{one.a_second:.0f}/s",
            f"{one.a_second / reference.a_second:.2f}   {note}",
        )


# -- history -------------------------------------------------------------------------------------------------


async def history(folder: Path) -> None:
    """One model's 30 days out of 5 million predictions."""
    path = _month(folder)
    print(
        f"history: one model's 30 days of {MODELS * ROUNDS:,} predictions, {path.stat().st_size / 1e9:.2f} GB"
    )
    async with (
        reporting(folder, board(MODELS, END_S), END_S) as (url, _),
        httpx.AsyncClient(base_url=url, timeout=30.0) as client,
    ):
        for name, target in HISTORY.items():
            spent_s, cpu_s, rows, size = [], [], 0, 0
            for number in range(1, 16):
                before_s, before_cpu_s = time.perf_counter(), time.process_time()
                answer = await client.get(target.format(number=number) + _SPAN)
                spent_s.append(time.perf_counter() - before_s)
                cpu_s.append(time.process_time() - before_cpu_s)
                rows, size = len(answer.json()), len(answer.content)
            note = f"max of 15 {ms(max(spent_s))}; processor {ms(statistics.median(cpu_s))} with the client's"
            row(name, ms(statistics.median(spent_s)), f"{note}; {rows} rows, {size / 1000:.0f} kB")


_SPAN = f"&start={moment(START_S)}&end={moment(END_S)}"
HISTORY = {
    "predictions, a page of 1,000": "/reports/predictions?projectIds={number:05}",
    "predictions, a page of 10,000": "/reports/predictions?projectIds={number:05}&limit=10000",
    "models/global": "/reports/models/global?projectIds={number:05}",
    "models/params, 4 settings": "/reports/models/params?projectIds={number:05}",
}


def _month(folder: Path) -> Path:
    """The file, made by the first part that needs it."""
    path = _config(folder).storage.path
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(connect_writer(path, 2.0)) as conn:
            conn.execute("PRAGMA synchronous = OFF")
            conn.execute("PRAGMA foreign_keys = OFF")
            conn.execute("PRAGMA cache_size = -400000")
            conn.execute("BEGIN")
            fill(conn, MODELS, ROUNDS, START_S)
            conn.execute("COMMIT")
            conn.execute("PRAGMA analysis_limit = 400")
            conn.execute("PRAGMA optimize")
            conn.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return path


def fill(conn: sqlite3.Connection, models: int, rounds: int, start_s: int) -> None:
    """30 days of so many rounds, by turns of four assets, all of them scored, and of snapshots.

    The file must be empty. It is faster without foreign keys.
    """
    for number in range(1, models + 1):
        repositories.upsert_model(conn, info(number), start_s)
    version = scores.current_scorer(conn, "crps", "log_return", "x", start_s)
    numbers = "WITH RECURSIVE n(k) AS (SELECT 0 UNION ALL SELECT k + 1 FROM n WHERE k + 1 < {})"
    (index,) = conn.execute("SELECT sql FROM sqlite_master WHERE name = 'prediction_by_model'").fetchone()
    conn.execute("DROP INDEX prediction_by_model")  # sorted once at the end, which is faster
    given = {"start": start_s, "every": 30 * DAY_S // rounds, "models": models, "version": version}
    settings = 'SELECT value AS asset, key AS place FROM json_each(\'["BTC", "ETH", "SOL", "XAU"]\')'
    for sql in (
        f"""{numbers.format(rounds)}
        INSERT INTO round (round_no, asset, horizon_s, step_s, scheduled_at_s, resolvable_at_s,
                           performed_at_ms, status, validated, answered)
        SELECT k + 1, asset, 3600, 60, :start + k * :every, :start + k * :every + 3600,
               1000 * (:start + k * :every) + 20, 'scored', 1, :models
        FROM n CROSS JOIN ({settings}) ON place = k % 4""",
        """INSERT INTO prediction
        SELECT round_no, model_no, 'SUCCESS', NULL, performed_at_ms, 1500 + model_no
        FROM round CROSS JOIN model""",
        index,
        """INSERT INTO round_score (round_no, scorer_version, median, no_move, resolved, scored_at_ms)
        SELECT round_no, :version, 0.7, 0.9, 60, 1000 * resolvable_at_s FROM round""",
        """INSERT INTO score (round_no, scorer_version, model_no, raw, counted, score)
        SELECT round_no, :version, model_no, model_no / 17.0, model_no / 17.0, model_no / 19.0
        FROM round CROSS JOIN model""",
        f"""{numbers.format(30 * DAY_S // SPACING_S)}
        INSERT INTO leaderboard SELECT :start + k * {SPACING_S}, model_no, :version, model_no,
               k / 7.0, k / 11.0, k / 13.0 FROM model CROSS JOIN n""",
        f"""{numbers.format(30 * DAY_S // SPACING_S)}
        INSERT INTO snapshot SELECT :start + k * {SPACING_S}, model_no, :version, asset, 3600, 60,
               k / 7.0, k / 11.0, k / 13.0 FROM model CROSS JOIN n CROSS JOIN ({settings})""",
    ):
        conn.execute(sql, given if ":" in sql else ())


# -- mixed ---------------------------------------------------------------------------------------------------

MIX = (
    *[LEADERBOARD] * 8,
    "/reports/models/global?projectIds=00007",
    "/reports/models/params?projectIds=00008",
    "/reports/predictions?projectIds=00009",
    "/leaderboard",
    "/statistics",
    "/rounds?limit=50",
    "text/html /",
    "text/html /rounds",
)
READERS = 32


async def mixed(folder: Path) -> None:
    """All kinds of readers at once, on the file of a month."""
    _month(folder)
    print(f"mixed: half of it the leaderboard; {READERS} readers of /events; 64 connections, 5 s")
    async with (
        reporting(folder, board(MODELS, END_S), END_S) as (url, live),
        asking(_port(url), 64, MIX, readers=READERS, zipped=True) as asked,
        watched() as beats,
    ):
        cpu_s = time.process_time()
        for _ in range(5):
            await asyncio.sleep(1.0)
            live.publish(board(MODELS, END_S))
        cpu_s = time.process_time() - cpu_s
    show(asked, cpu_s)
    row("", "", f"{beats}")


def show(asked: Asked, cpu_s: float) -> None:
    latencies_s = asked.all_s
    cost = f"{1e6 * cpu_s / asked.answered:.0f} us of processor each"
    note = (
        f"a second; p50 {ms(statistics.median(latencies_s))}, p99 {ms(quantile(latencies_s, 0.99))}; {cost}"
    )
    row("all", f"{asked.a_second:.0f}", f"{note}; failed: {asked.failed or 'none'}")
    for name, some in sorted(asked.latencies_s.items()):
        row(name, ms(quantile(some, 0.99)), f"p99; p50 {ms(statistics.median(some))}; {len(some)} answers")


# -- rounds --------------------------------------------------------------------------------------------------


def _month_ago_s() -> int:
    return (int(time.time()) // SPACING_S) * SPACING_S - 30 * DAY_S


async def rounds(folder: Path) -> None:
    """The predict rounds of 100 models while 64 connections ask without a pause, in turns with none."""
    print(
        "rounds: 100 models, 64 connections that ask without a pause; with / without (delay p99 target 25 ms)"
    )
    loads = {"leaderboard": [LEADERBOARD], "mixed": MIX}
    async with (
        FleetProcess(100) as fleet,
        playing(
            fleet.port, prepare=partial(fill, models=MODELS, rounds=2_500, start_s=_month_ago_s())
        ) as game,
        serving(game, board(RANKED, int(time.time()), 10_001)) as port,
    ):
        await game.connected(100)
        await game.next_rounds(2)
        healthy, alone, calm = game.numbers("well"), [], Beats()
        beside: dict[str, list[Times]] = {name: [] for name in loads}
        beats = {name: Beats() for name in loads}
        asked: dict[str, list[Asked]] = {name: [] for name in loads}
        for _ in range(3):
            async with watched(calm):
                alone += await game.next_rounds(3)
            for name, targets in loads.items():
                async with (
                    asking(port, 64, targets, readers=8, zipped=True) as figures,
                    watched(beats[name]),
                ):
                    beside[name] += await game.next_rounds(3)
                asked[name].append(figures)
    row("no requests", "", str(calm))
    for name in loads:
        many = statistics.mean(one.a_second for one in asked[name])
        failed = sum(sum(one.failed.values()) for one in asked[name])
        row(name, f"{many:.0f}/s", f"failed: {failed}")
        compare_starts(beside[name], alone)
        compare_answers("opens -> answer committed", beside[name], alone, healthy, beats[name], "")


PARTS: dict[str, Callable[[Path], Awaitable[None]]] = {
    "leaderboard": leaderboard,
    "history": history,
    "mixed": mixed,
    "rounds": rounds,
}

if __name__ == "__main__":
    match sys.argv[1:]:
        case ["run", part, folder]:
            asyncio.run(PARTS[part](Path(folder)))  # type: ignore[arg-type]
        case parts:
            main(parts)
