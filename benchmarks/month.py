"""A month of a game with 100 models on stepped time: the file, memory, descriptors and threads stay flat.

`python -m benchmarks.month [models [days]]`. The whole game runs (the models are gRPC servers in another
process), with retention shorter than a month, so that the curve is flat long before its end. Then: what a
prediction costs on disk, with its payload and after that was forgotten.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil

from condor_lite import config as configuration
from condor_lite.clock import SteppedClock
from condor_lite.config import StorageConfig
from condor_lite.game.calibration import WIDTH, RoundCalibration
from condor_lite.game.entities import (
    Answer,
    AnswerStatus,
    ModelInfo,
    ModelScore,
    Round,
    RoundScores,
    RoundStatus,
)
from condor_lite.logs import configure
from condor_lite.storage import repositories, scores
from condor_lite.storage.calibration import add_calibration
from condor_lite.storage.connection import connect_writer
from condor_lite.supervisor import playing
from tests.fleet.process import FleetProcess

DAY_S = 86400
START_S = 1_700_006_400  # midnight UTC
RETENTION_DAYS = 8
CONFIG = """
[[game.settings]]
assets = ["BTC"]
horizon = "6h"
step = "{tick}"
interval = "{interval}"

[feed]
tick = "{tick}"
history = "2d"

[predict]
max_consecutive_timeouts = 1000000

[orchestrator]
mode = "remote"
port = {port}

[scoring]
snapshot_interval = "{interval}"
workers = 1

[storage]
keep_payloads = "2d"
keep_predictions = "8d"
keep_prices = "3d"
keep_snapshots = "4d"

[report]
port = 0

[log]
level = "error"
"""
SHAPES = ((86400, 300, 1), (86400, 3600, 1), (3600, 60, 5), (3600, 300, 5), (3600, 900, 5))
"""Of answers: horizon, step, and how many rounds an hour."""


@dataclass(frozen=True, slots=True)
class Size:
    """At the end of a day; `pages` of the file are in use. Of the game's process and its pool's together."""

    day: int
    file_bytes: int
    used_bytes: int
    log_bytes: int
    rss_bytes: int
    descriptors: int
    threads: int
    predictions: int


def main() -> None:
    given = [int(argument) for argument in sys.argv[1:] if argument.isdigit()]
    models, days = (*given, *(100, 30)[len(given) :])
    configure(configuration.LogConfig(level="error"))
    print(f"{models} models, a round an hour; what is kept longest: {RETENTION_DAYS} days")
    print("day   file MB  in use   log MB  RSS MB  descriptors  threads  predictions")
    with tempfile.TemporaryDirectory() as folder:
        begun_s = time.monotonic()
        asyncio.run(month(Path(folder), models, days, show=True))
    print(f"{time.monotonic() - begun_s:.0f} s")
    print("\nanswers of the Condor game's shapes  JSON sent  stored with payload     without")
    for name, digits in (("a fixed density, as the bundled models", 0), ("6 digits", 6), ("17 digits", 17)):
        sent, whole, bare = stored(digits)
        print(f"{name:<36} {sent:7.0f} B  {whole:7.0f} B = {whole / sent:5.1%}  {bare:6.0f} B")


async def month(
    folder: Path, models: int, days: int, *, tick: str = "30m", interval: str = "1h", show: bool = False
) -> list[Size]:
    """Play so many days; the sizes at the end of each."""
    sizes = []
    async with FleetProcess(models=models) as fleet:
        (folder / "config.toml").write_text(CONFIG.format(port=fleet.port, tick=tick, interval=interval))
        config = configuration.load(folder / "config.toml", {})
        clock = SteppedClock(START_S - 60)
        async with playing(config, clock) as game:
            while len(game.predict.fleet.running) < models:  # noqa: ASYNC110 - it has no event
                await asyncio.sleep(0.05)
            for day in range(1, days + 1):
                await clock.run_until(START_S + day * DAY_S)
                await game.journal.flushed()
                size = await game.db.read(_measure, config.storage.path, day)
                sizes.append(size)
                if show:
                    print(
                        f"{day:3} {size.file_bytes / 1e6:9.2f} {size.used_bytes / 1e6:7.2f} "
                        f"{size.log_bytes / 1e6:8.2f} {size.rss_bytes / 1e6:7.1f} {size.descriptors:12} "
                        f"{size.threads:8} {size.predictions:12}",
                        flush=True,
                    )
    return sizes


def _measure(conn: sqlite3.Connection, path: Path, day: int) -> Size:
    pages, free, page_bytes, predictions = (
        conn.execute(sql).fetchone()[0]
        for sql in (
            "PRAGMA page_count",
            "PRAGMA freelist_count",
            "PRAGMA page_size",
            "SELECT count(*) FROM prediction",
        )
    )
    own = psutil.Process()
    family = [own, *(child for child in own.children() if "spawn_main" in " ".join(child.cmdline()))]
    return Size(
        day=day,
        file_bytes=pages * page_bytes,
        used_bytes=(pages - free) * page_bytes,
        log_bytes=Path(f"{path}-wal").stat().st_size,
        rss_bytes=sum(process.memory_info().rss for process in family),
        descriptors=sum(process.num_fds() for process in family),
        threads=sum(process.num_threads() for process in family),
        predictions=predictions,
    )


def stored(digits: int, models: int = 20, hours: int = 4) -> tuple[float, float, float]:
    """Bytes a prediction: its JSON, and the whole file with payloads and once they are forgotten.

    `digits` of each number, different in each segment; 0: one density for all segments.
    """
    rng = np.random.default_rng(0)
    sent = rounds = 0
    with (
        tempfile.TemporaryDirectory() as folder,
        closing(connect_writer(Path(folder) / "condor.db", 2.0)) as conn,
    ):
        empty = _used_bytes(conn)
        for number in range(1, models + 1):
            info = ModelInfo(f"{number}", f"model {number}", "1", "player", "1", None, False)
            repositories.upsert_model(conn, info, START_S)
        version = scores.current_scorer(conn, "crps", "log_return", "", START_S)
        for round_ in _rounds(hours):
            rounds += 1
            segments = round_.horizon_s // round_.step_s
            payloads = [_payload(rng, segments, round_.step_s, digits) for _ in range(models)]
            sent += sum(map(len, payloads))
            _store(conn, replace(round_, round_no=rounds), payloads, version, rng)
        whole = _used_bytes(conn) - empty
        keep = replace(StorageConfig(), keep_payloads_s=0)
        while scores.prune(conn, START_S + 2 * DAY_S, keep):
            pass
        bare = _used_bytes(conn) - empty
    count = rounds * models
    return sent / count, whole / count, bare / count


def _rounds(hours: int) -> Iterator[Round]:
    for hour in range(hours):
        for horizon_s, step_s, an_hour in SHAPES:
            for place in range(an_hour):
                at_s = START_S + hour * 3600 + place * 3600 // an_hour
                yield Round("BTC", horizon_s, step_s, at_s, RoundStatus.OPEN, None, at_s * 1000)


def _payload(rng: np.random.Generator, segments: int, step_s: int, digits: int) -> bytes:
    drawn = rng.uniform(1e-4, 5e-4, (segments, 2))
    if not digits:
        drawn[:] = drawn[0]
    numbers = [[float(f"{value:.{digits or 17}g}") for value in row] for row in drawn.tolist()]
    return json.dumps(
        [
            {
                "step": (k + 1) * step_s,
                "type": "builtin",
                "name": "norm",
                "params": {"loc": loc, "scale": scale},
            }
            for k, (loc, scale) in enumerate(numbers)
        ]
    ).encode()


def _store(
    conn: sqlite3.Connection,
    round_: Round,
    payloads: list[bytes],
    version: int,
    rng: np.random.Generator,
) -> None:
    assert round_.round_no is not None
    numbers = range(1, len(payloads) + 1)
    conn.execute("BEGIN")
    repositories.open_rounds(conn, [round_])
    repositories.add_answers(
        conn,
        [
            Answer(
                round_.round_no,
                no,
                AnswerStatus.SUCCESS,
                round_.scheduled_at_s * 1000 + no,
                20_000,
                None,
                body,
            )
            for no, body in zip(numbers, payloads, strict=True)
        ],
    )
    repositories.close_round(conn, round_.round_no, RoundStatus.CLOSED, None, ())
    drawn = {no: ModelScore(*rng.random(3).tolist()) for no in numbers}
    segments = round_.horizon_s // round_.step_s
    scores.save_round_scores(conn, round_.round_no, version, RoundScores(0.7, 0.9, drawn), segments, 0)
    ends_s = round_.scheduled_at_s + round_.step_s * np.arange(1, segments + 1)
    added = RoundCalibration(model_no=list(numbers), sums=rng.random((len(drawn), WIDTH)), ends_s=ends_s)
    add_calibration(conn, round_.round_no, version, added)
    conn.execute("COMMIT")


def _used_bytes(conn: sqlite3.Connection) -> int:
    pages, free, page_bytes = (
        conn.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
    )
    return int((pages - free) * page_bytes)


if __name__ == "__main__":
    main()
