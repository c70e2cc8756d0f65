"""A backlog of 10,000 predictions, from the database to the database, and what the event loop feels of it.

Fetched, decompressed, decoded, checked, scored, calibrated, compared, written: all that happens to an answer
after it was stored. The reference is parsing the same JSON once, in one process. Processor time says more
than the rate where other programs run: what is used here, in the event loop and the threads of the database,
is what no further worker takes over.
"""

from __future__ import annotations

import asyncio
import json
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import orjson

from condor_lite import config as configuration
from condor_lite.clock import SteppedClock
from condor_lite.game.entities import Answer, AnswerStatus, Model, ModelInfo, Round, RoundStatus
from condor_lite.logs import configure
from condor_lite.score import ScoreLoop
from condor_lite.storage import repositories
from condor_lite.storage.database import Database
from condor_lite.watchdog import spare_the_loop

MODELS, ROUNDS, SEGMENTS = 100, 100, 60
START_S = 1_700_002_800
BEAT_S = 0.002
CONFIG = """
[[game.settings]]
assets = ["BTC"]
horizon = "60m"
step = "1m"
interval = "1m"

[feed]
tick = "60s"
history = "1h"

[scoring]
workers = {workers}

[log]
level = "error"
"""


def main() -> None:
    """Print predictions a second with one worker and with two, and the loop's delays meanwhile."""
    for name, leaves in (("mixtures of 3 normals", 3), ("single normals", 1)):
        payloads = [made_payload(np.random.default_rng(seed), leaves) for seed in range(200)]
        started_s = time.perf_counter()
        for payload in payloads:
            orjson.loads(payload)
        parsing_s = (time.perf_counter() - started_s) / len(payloads)
        size = len(payloads[0]) / 1000
        print(f"{MODELS * ROUNDS} predictions of {SEGMENTS} {name}, {size:.1f} kB each")
        one = asyncio.run(_measure(payloads, 1, parsing_s))
        two = asyncio.run(_measure(payloads, 2, parsing_s))
        print(f"  two workers               {two / one:>9.2f} x one")


async def _measure(payloads: list[bytes], workers: int, parsing_s: float) -> float:
    """Predictions a second."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.toml"
        path.write_text(CONFIG.format(workers=workers))
        config = configuration.load(path, {})
        configure(config.log)
        async with Database(config.storage.path) as db:
            await fill(db, payloads)
            clock = SteppedClock(START_S + (ROUNDS + SEGMENTS + 10) * 60)
            loop = ScoreLoop(config, clock, db, lambda _: None)
            spare_the_loop()
            delays: list[float] = []
            beating = asyncio.create_task(_beat(delays))
            await asyncio.sleep(0.2)
            delays.clear()
            started_s, own_s, workers_s = time.perf_counter(), time.process_time(), _of_workers_s()
            await loop.finish()
            spent_s = time.perf_counter() - started_s
            own_s, workers_s = time.process_time() - own_s, _of_workers_s() - workers_s
            beating.cancel()
            (scored,) = await db.read(
                lambda conn: conn.execute("SELECT count(*) FROM score WHERE raw IS NOT NULL").fetchone()
            )
    assert scored == MODELS * ROUNDS, f"{scored} of {MODELS * ROUNDS} are scored"
    rate = scored / spent_s
    p99, longest = 1000 * float(np.quantile(delays, 0.99)), 1000 * max(delays)
    print(
        f"  {workers} worker{'s' if workers > 1 else ' '}{rate:>19.0f} /s  "
        f"= {1 / rate / parsing_s:.1f} x orjson.loads each"
        + ("   (target >= 2000 /s)" if workers == 1 else "")
    )
    print(
        f"    processor time          {1e6 * own_s / scored:>9.0f} us each here, "
        f"{1e6 * workers_s / scored:.0f} us in the workers, their start included"
    )
    print(
        f"    loop's delay            {p99:>9.1f} ms p99, {longest:.1f} ms at most   "
        "(target p99 <= 10, max <= 50)"
    )
    return rate


def _of_workers_s() -> float:
    """Processor time of the workers that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


async def _beat(delays: list[float]) -> None:
    while True:
        due_s = time.perf_counter() + BEAT_S
        await asyncio.sleep(BEAT_S)
        delays.append(time.perf_counter() - due_s)


async def fill(db: Database, payloads: list[bytes]) -> list[Model]:
    """Closed rounds, a minute apart, answered by all, and prices for an hour more. Returns the models."""
    models: list[Model] = [
        await db.write(
            repositories.upsert_model, ModelInfo(f"m{no}", f"model {no}", f"p{no}", f"p{no}", "1"), START_S
        )
        for no in range(MODELS)
    ]
    moves = np.random.default_rng(1).normal(0, 5e-4, ROUNDS + SEGMENTS + 80)
    prices = 100 * np.exp(np.cumsum(moves))
    points = [(START_S + 60 * (at - 5), float(price)) for at, price in enumerate(prices)]
    await db.write(repositories.add_prices, "BTC", points, "made up", 0)
    for at in range(ROUNDS):
        at_s = START_S + 60 * at
        (no,) = await db.write(repositories.open_rounds, [Round("BTC", 60 * SEGMENTS, 60, at_s)])
        assert no is not None
        await db.write(repositories.add_answers, answers(no, models, payloads, at_s))
        await db.write(repositories.close_round, no, RoundStatus.CLOSED, None, ())
    return models


def answers(round_no: int, models: list[Model], payloads: list[bytes], at_s: int) -> list[Answer]:
    """All models' answers in a round; other ones in the next."""
    return [
        Answer(round_no, model.model_no, AnswerStatus.SUCCESS, at_s * 1000, 1, None, payloads[place % 200])
        for place, model in enumerate(models, start=at_s // 60)
    ]


def made_payload(rng: np.random.Generator, leaves: int) -> bytes:
    def density() -> dict[str, object]:
        parts = [
            {
                "type": "builtin",
                "name": "norm",
                "params": {"loc": float(rng.normal() * 1e-4), "scale": float(rng.uniform(2e-4, 1e-3))},
            }
            for _ in range(leaves)
        ]
        if leaves == 1:
            return parts[0]
        components = [{"density": part, "weight": float(rng.random())} for part in parts]
        return {"type": "mixture", "components": components}

    return json.dumps([{"step": 60 * (k + 1), "prediction": density()} for k in range(SEGMENTS)]).encode()
