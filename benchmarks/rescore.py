"""How long a live round's scores take, alone and while 10,000 stored answers are scored again.

Each live round is scored as it would be in a game: from the call to its scores on disk and a new leaderboard.
The reference is the same without a rescore, before and after it.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.backlog import CONFIG, MODELS, ROUNDS, SEGMENTS, START_S, answers, fill, made_payload
from condor_lite import config as configuration
from condor_lite.clock import SteppedClock
from condor_lite.game.entities import Round, RoundStatus
from condor_lite.logs import configure
from condor_lite.rescore import Rescorer
from condor_lite.score import ScoreLoop
from condor_lite.storage import repositories
from condor_lite.storage.database import Database
from condor_lite.watchdog import spare_the_loop

LIVE = 12
PAUSE_S = 0.2


def main() -> None:
    """Print a live round's time without and with a rescore, one worker each."""
    asyncio.run(_measure())


async def _measure() -> None:
    payloads = [made_payload(np.random.default_rng(seed), 3) for seed in range(200)]
    print(f"{MODELS * ROUNDS} predictions of {SEGMENTS} mixtures of 3 normals are scored again")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.toml"
        path.write_text(CONFIG.format(workers=1))
        config = configuration.load(path, {})
        configure(config.log)
        async with Database(config.storage.path) as db:
            models = await fill(db, payloads)
            # Every live round is due already; it is only there once it is its turn.
            clock = SteppedClock(START_S + (ROUNDS + SEGMENTS + 70) * 60)
            loop = ScoreLoop(config, clock, db, lambda _: None)
            spare_the_loop()
            scoring = asyncio.create_task(loop.run())
            await loop.finish()
            places = iter(range(ROUNDS, ROUNDS + 60))

            async def live() -> float:
                at_s = START_S + 60 * next(places)
                (no,) = await db.write(repositories.open_rounds, [Round("BTC", 60 * SEGMENTS, 60, at_s)])
                await db.write(repositories.add_answers, answers(no, models, payloads, at_s))
                await db.write(repositories.close_round, no, RoundStatus.CLOSED, None, ())
                begun_s = time.perf_counter()
                await loop.finish()
                spent_s = time.perf_counter() - begun_s
                await asyncio.sleep(PAUSE_S)
                return spent_s

            before = [await live() for _ in range(LIVE)]
            rescorer = Rescorer(config, clock, db, loop)
            rescoring = asyncio.create_task(rescorer.run())
            await rescorer.rescore()
            await asyncio.sleep(1)  # its worker starts
            begun_s, begun = time.perf_counter(), (await rescorer.progress()).done
            meanwhile = []
            while len(meanwhile) < 2 * LIVE and (await rescorer.progress()).state == "running":
                meanwhile.append(await live())
            rescored = MODELS * ((await rescorer.progress()).done - begun)
            rate = rescored / (time.perf_counter() - begun_s)
            while (await rescorer.progress()).state == "running":  # noqa: ASYNC110 - it has no event
                await asyncio.sleep(PAUSE_S)
            await clock.run_until(clock.now() + 60)  # live scoring goes on by the new version
            after = [await live() for _ in range(LIVE)]
            for task in (rescoring, scoring):
                task.cancel()
            await asyncio.gather(rescoring, scoring, return_exceptions=True)
    alone, beside = before + after, meanwhile[:-1]  # the last one may have met its end
    for name, spent in (("without", alone), ("with", beside)):
        median, longest = 1000 * statistics.median(spent), 1000 * max(spent)
        print(f"  a live round {name:<12}{median:>7.0f} ms median, {longest:.0f} ms at most of {len(spent)}")
    ratio = statistics.median(beside) / statistics.median(alone)
    print(f"  with to without          {ratio:>7.2f} x   (rescored meanwhile: {rate:.0f} answers a second)")


if __name__ == "__main__":
    main()
