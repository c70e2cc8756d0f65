"""A new leaderboard of 1,000 models and 8 settings, with a week in the file and with an hour.

The reference is the same game with a single scored round a setting. All that happens from a scored round to
bodies that the API can serve is counted; the loop's delay is measured meanwhile. Where other programs run,
processor time says more, and the loop thread's own from beat to beat: the rest of a delay is waiting for a
core or for the interpreter's lock.
"""

from __future__ import annotations

import asyncio
import sqlite3
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from condor_lite import config as configuration
from condor_lite.clock import SteppedClock
from condor_lite.game.calibration import WIDTH, RoundCalibration
from condor_lite.game.entities import Leaderboard, ModelInfo
from condor_lite.game.scoring import Rules, load_rule
from condor_lite.logs import configure
from condor_lite.pool import ScoringPool
from condor_lite.report.ready import make
from condor_lite.scorer import Scorer
from condor_lite.storage import repositories, scores
from condor_lite.storage.calibration import add_calibration
from condor_lite.storage.database import Database
from condor_lite.watchdog import spare_the_loop

MODELS, HOURS = 1000, 168
NOW_S = 1_700_002_800 + 1800
BEAT_S = 0.002
REFRESHES = 15
CONFIG = """
[[game.settings]]
assets = ["BTC", "ETH", "SOL", "XAU"]
horizon = "1h"
step = "1m"
interval = "1m"

[[game.settings]]
assets = ["BTC", "ETH", "SOL", "XAU"]
horizon = "24h"
step = "5m"
interval = "1h"

[feed]
tick = "60s"

[log]
level = "error"
"""


def main() -> None:
    """Print what a refresh and a start take with an hour and with a week in the file."""
    print(f"{MODELS} models, 8 settings, a scored round an hour and setting")
    empty = asyncio.run(_measure(1))
    full = asyncio.run(_measure(HOURS))
    print(f"  a week to an hour         {full / empty:>9.2f} x of the processor   (target <= 1.2)")


async def _measure(hours: int) -> float:
    """Seconds of the processor for a refresh."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.toml"
        path.write_text(CONFIG)
        config = configuration.load(path, {})
        configure(config.log)
        boards: list[Leaderboard] = []
        async with Database(config.storage.path) as db:
            rules = Rules()
            version = await db.write(
                scores.current_scorer, rules.rule, rules.target, rules.fingerprint(), NOW_S
            )
            keys = [(setting.asset, setting.horizon_s, setting.step_s) for setting in config.game.settings]
            await db.write(_fill_models)
            for hour in range(hours):
                await db.write(_fill_hour, keys, version, NOW_S - 600 - 3600 * hour)
            pool, info = ScoringPool(1, rules, 2.0), load_rule(rules.rule)
            scorer, again = (
                Scorer(config, SteppedClock(NOW_S), db, pool, info, version, boards.append) for _ in range(2)
            )
            spare_the_loop()
            delays: list[tuple[float, float]] = []
            beating = asyncio.create_task(_beat(delays))
            started_s, cpu_s = time.perf_counter(), time.process_time()
            await scorer.board.publish(changed=True)
            rebuilt_s, rebuilt_cpu_s = time.perf_counter() - started_s, time.process_time() - cpu_s
            rebuild_held = _held(delays)
            await asyncio.sleep(0.2)
            delays.clear()
            spent, bodies, cpu = [], [], []
            for _ in range(REFRESHES):
                del boards[:-1]
                started_s, cpu_s = time.perf_counter(), time.process_time()
                await scorer.board.publish(changed=True)
                published_s = time.perf_counter()
                cpu.append(time.process_time() - cpu_s)
                models = await db.read(repositories.load_models)
                await asyncio.to_thread(make, boards[-1], models, frozenset(), NOW_S, 10)
                spent.append(published_s - started_s)
                bodies.append(time.perf_counter() - published_s)
            beating.cancel()
            cpu_s = time.process_time()
            await scorer.board.keep()
            keep_cpu_s = time.process_time() - cpu_s
            started_s, cpu_s = time.perf_counter(), time.process_time()
            await again.board.publish(changed=True)
            again_s, again_cpu_s = time.perf_counter() - started_s, time.process_time() - cpu_s
    refresh_s, refresh_cpu_s = statistics.median(spent), statistics.median(cpu)
    label = "a week in the file" if hours > 1 else "an hour in the file"
    print(f"  {label}")
    print(
        f"    refresh                 {1000 * refresh_s:>9.1f} ms, "
        f"{1000 * refresh_cpu_s:.1f} ms of the processor   (target <= 250)"
    )
    print(f"    bodies for the API      {1000 * statistics.median(bodies):>9.1f} ms")
    print(f"    loop held               {_held(delays)}   (target <= 10)")
    print(
        f"    rebuilt from all scores {1000 * rebuilt_s:>9.1f} ms, "
        f"{1000 * rebuilt_cpu_s:.1f} ms of the processor"
    )
    print(f"    loop held meanwhile     {rebuild_held}")
    print(f"    past hours' sums kept   {'':>9}    {1000 * keep_cpu_s:.1f} ms of the processor")
    print(
        f"    rebuilt at a start      {1000 * again_s:>9.1f} ms, {1000 * again_cpu_s:.1f} ms of the processor"
    )
    return refresh_cpu_s


def _held(delays: list[tuple[float, float]]) -> str:
    late_s, own_s = (max(column) for column in zip(*delays, strict=True))
    return f"{1000 * late_s:>9.1f} ms at most, {1000 * own_s:.1f} ms by what it computed itself"


async def _beat(delays: list[tuple[float, float]]) -> None:
    """Note how late the loop is, and how long its thread computed from one beat to the next."""
    while True:
        due_s, computed_s = time.perf_counter() + BEAT_S, time.thread_time()
        await asyncio.sleep(BEAT_S)
        delays.append((time.perf_counter() - due_s, time.thread_time() - computed_s))


def _fill_models(conn: sqlite3.Connection) -> None:
    for no in range(MODELS):
        info = ModelInfo(f"m{no}", f"model {no}", f"p{no}", f"player {no}", "1", benchmark=no == 0)
        repositories.upsert_model(conn, info, NOW_S - 8 * 86400)
        repositories.touch_models(conn, [no + 1], NOW_S)


def _fill_hour(conn: sqlite3.Connection, keys: list[tuple[str, int, int]], version: int, end_s: int) -> None:
    """One scored round a setting, with calibration sums."""
    rng = np.random.default_rng(end_s)
    for key in keys:
        (no,) = conn.execute(
            "INSERT INTO round (asset, horizon_s, step_s, scheduled_at_s, resolvable_at_s, status) "
            "VALUES (?, ?, ?, ?, ?, 'scored') RETURNING round_no",
            (*key, end_s - key[1], end_s),
        ).fetchone()
        conn.execute("INSERT INTO round_score VALUES (?, ?, 5, 10, 60, 0, NULL)", (no, version))
        raw = rng.gamma(25, 0.2, MODELS).tolist()
        conn.executemany(
            "INSERT INTO score (round_no, scorer_version, model_no, raw, counted, score) "
            "VALUES (?, ?, ?, ?, ?, ?)",
            [(no, version, at + 1, value, value, 10 * (5 - value)) for at, value in enumerate(raw)],
        )
        sums = np.ones((MODELS, WIDTH))
        ends_s = end_s - 60 * np.arange(60)[::-1]
        add_calibration(conn, no, version, RoundCalibration(range(1, MODELS + 1), sums, ends_s))
