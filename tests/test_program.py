"""The program as it is started: with a console, a port and a file; stopped, killed, started again."""

from __future__ import annotations

import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest

START_S = 1_700_000_400
KILLS = 20
RECORDED_MINUTES = 150

DEMO = """
[[game.settings]]
assets = ["BTC", "ETH"]
horizon = "20s"
step = "5s"
interval = "10s"

[feed]
tick = "5s"
history = "10m"

[scoring]
interval = "1s"
snapshot_interval = "10s"
workers = 1

[orchestrator]
port = 0
"""

REPLAY = """
[game]
speed = 60
start = "2023-11-14T22:50:00Z"

[[game.settings]]
assets = ["BTC", "USDC"]
horizon = "10m"
step = "1m"
interval = "2m"

[feed]
source = "replay"
path = "prices"
history = "30m"

[scoring]
interval = "1s"
workers = 1

[orchestrator]
port = 0
"""


def free_port() -> int:
    """Below the range that connections are given theirs from: nobody else takes it before it is bound."""
    while True:
        port = random.randrange(12_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class Program:
    """One run of `python -m condor_lite` in `folder`."""

    def __init__(self, folder: Path, *arguments: str, **environ: str) -> None:
        self.folder = folder
        self.port = free_port()
        self.console = folder / "console.log"
        with self.console.open("ab") as console:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "condor_lite", *arguments],
                cwd=folder,
                env={**os.environ, "CONDOR_LITE__REPORT__PORT": str(self.port), **environ},
                stdout=console,
                stderr=subprocess.STDOUT,
            )

    def get(self, path: str) -> Any:
        reply = httpx.get(f"http://127.0.0.1:{self.port}{path}", timeout=10)
        return reply.raise_for_status().json()

    def until(self, happened: Callable[[], Any], limit_s: float = 60) -> Any:
        """What `happened()` returns once it is something; the program's failures are shown."""
        deadline_s = time.monotonic() + limit_s
        while time.monotonic() < deadline_s:
            assert self.process.poll() is None, self.console.read_text()
            try:
                if result := happened():
                    return result
            except httpx.TransportError:
                pass  # not listening yet
            time.sleep(0.02)
        raise AssertionError(f"not within {limit_s} s:\n{self.console.read_text()[-4000:]}")

    def family(self) -> list[psutil.Process]:
        try:
            this = psutil.Process(self.process.pid)
            return [this, *this.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal; the exit code. Nothing that it started may outlive it."""
        family = self.family()
        self.process.send_signal(number)
        code = self.process.wait(20)
        _, alive = psutil.wait_procs(family, timeout=10)
        assert not alive, f"outlived the program: {[process.cmdline() for process in alive]}"
        return code


@contextmanager
def program(folder: Path, *arguments: str, **environ: str) -> Iterator[Program]:
    run = Program(folder, *arguments, **environ)
    try:
        yield run
    finally:
        if run.process.poll() is None:
            run.end(signal.SIGKILL)


def database(folder: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{folder / 'data' / 'condor.db'}?mode=ro", uri=True)


def scored_models(run: Program) -> list[dict[str, Any]]:
    return [row for row in run.get("/leaderboard")["models"] if row["score"] is not None]


@pytest.fixture
def challenge(tmp_path: Path) -> Path:
    (tmp_path / "config.toml").write_text(DEMO)
    return tmp_path


def test_a_game_plays_stops_cleanly_and_goes_on_where_it_was(challenge: Path) -> None:
    with program(challenge) as first:
        first.until(lambda: first.get("/statistics")["total_predictions"])
        first.until(lambda: scored_models(first))
        models = first.get("/leaderboard")["models"]
        assert len(models) >= 5
        assert {row["status"] for row in first.get("/reports/leaderboard")} == {"RUNNING"}
        detail = first.get(f"/model/{models[0]['model_id']}/metrics")
        assert detail["overall_scores"]["recent_24h"] is not None
        scored = first.get("/rounds?status=scored")[-1]
        assert first.get(f"/rounds/{scored['round_id']}")["predictions"][0]["raw_score"] is not None
        assert first.get("/healthz")
        assert first.until(lambda: first.get("/readyz"))
        assert first.end() == 0
    left = sorted(path.name for path in (challenge / "data").iterdir())
    assert left == ["condor.db", "condor.db.lock", "models-log"]
    console = first.console.read_text()
    assert "Traceback" not in console
    assert "warning" not in console
    assert "error" not in console
    with closing(database(challenge)) as db:
        before = db.execute("SELECT round_no, scheduled_at_s, status FROM round ORDER BY 1").fetchall()
        assert not [row for row in before if row[2] == "open"]
        scores = db.execute("SELECT * FROM score ORDER BY 1, 2, 3").fetchall()
        assert scores

    with program(challenge) as second:
        newest = before[-1][0]
        second.until(lambda: second.get("/statistics")["total_rounds"] > len(before) + 2)
        second.until(lambda: scored_models(second))
        assert second.end(signal.SIGINT) == 0
    with closing(database(challenge)) as db:
        assert (
            db.execute("SELECT * FROM score WHERE round_no <= ? ORDER BY 1, 2, 3", (newest,)).fetchall()[
                : len(scores)
            ]
            == scores
        )
        offsets = db.execute("SELECT DISTINCT asset, scheduled_at_s % 10 FROM round ORDER BY 1").fetchall()
        assert offsets == [("BTC", 0), ("ETH", 5)], "the schedule did not shift"
        assert db.execute("SELECT count(*) FROM model").fetchone()[0] == len(models)


def catches(pid: int, signum: int) -> bool:
    """Whether the process has a handler for this signal yet."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (signum - 1) & 1)


def test_a_signal_at_any_moment_of_the_start_ends_it_with_exit_code_0(challenge: Path) -> None:
    for after_s in (0.05, 0.2, 0.4, 0.6, 0.8, 1.0, 1.3, 1.8):
        with program(challenge) as run:
            time.sleep(after_s)  # the moment is what is tested
            # before the interpreter runs our first line, nobody can answer a signal
            unready = not catches(run.process.pid, signal.SIGTERM)
            code = run.end()
            assert code == 0 or (unready and code == -signal.SIGTERM), (after_s, run.console.read_text())
    assert "Traceback" not in run.console.read_text()


def test_what_the_user_can_mend_is_said_in_a_sentence_with_exit_code_2(challenge: Path) -> None:
    with program(challenge) as first:
        first.until(lambda: first.get("/healthz"))
        port = str(first.port)
        for environ, expected in (
            ({"CONDOR_LITE__REPORT__PORT": "0"}, "condor_lite"),
            ({"CONDOR_LITE__REPORT__PORT": port, "CONDOR_LITE__STORAGE__PATH": "other.db"}, port),
            ({"CONDOR_LITE__PREDICT__TIMEOUT": "soon"}, "predict.timeout"),
        ):
            with program(challenge, **environ) as second:
                assert second.process.wait(20) == 2
            said = second.console.read_text()
            assert expected in said
            assert "Traceback" not in said
        assert first.end() == 0


def write_recording(folder: Path) -> None:
    (folder / "prices").mkdir()
    generator = np.random.default_rng(1)
    for asset, level, width in (("BTC", 30_000, 4e-4), ("USDC", 1, 1e-4)):
        moves = generator.standard_t(3, RECORDED_MINUTES) * width
        rows = [
            f"{START_S - START_S % 60 + 60 * (minute + 1)},{level * np.exp(total):.9g}"
            for minute, total in enumerate(np.cumsum(moves))
        ]
        (folder / "prices" / f"{asset}.csv").write_text("timestamp,close\n" + "\n".join(rows) + "\n")


@pytest.mark.timeout(400)
def test_twenty_kills_lose_nothing_and_count_nothing_twice(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(REPLAY)
    write_recording(tmp_path)
    moments = random.Random(4)
    acknowledged: set[tuple[str, str, str]] = set()
    for number in range(KILLS):
        with program(tmp_path) as run:
            if number % 5 == 4:  # a slow machine, too, gets as far as that
                run.until(lambda run=run: "round_closed" in run.console.read_text())
            time.sleep(moments.uniform(0.3, 3.5))  # the moment is what is tested
            run.end(signal.SIGKILL)
        if (tmp_path / "data" / "condor.db").exists():
            stored = answers(tmp_path)
            assert acknowledged <= stored, "an answer that was stored is gone"
            acknowledged = stored
    assert acknowledged

    with program(tmp_path, CONDOR_LITE__GAME__SPEED="600") as last:
        last.until(lambda: "feed_finished" in last.console.read_text(), 120)
        last.until(lambda: not last.get("/rounds?status=open") and not last.get("/rounds?status=closed"), 60)
        published = {
            row["model_id"]: [row["score_recent"], row["score_steady"], row["score_anchor"]]
            for row in last.get("/reports/leaderboard")
        }
        assert last.end() == 0

    with closing(database(tmp_path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
        twice = "SELECT 1 FROM {} GROUP BY round_no, {} HAVING count(*) > 1"
        for table, key in (("prediction", "model_no"), ("payload", "model_no"), ("round_score", "1")):
            assert not db.execute(twice.format(table, key)).fetchall()
        scored, scored_rows = db.execute(
            "SELECT count(*), (SELECT count(*) FROM round_score) FROM round WHERE status = 'scored'"
        ).fetchone()
        assert scored == scored_rows > 0
        recomputed = window_scores(db)
    assert published.keys() == recomputed.keys()
    for model_id, scores in published.items():
        assert scores == pytest.approx([recomputed[model_id]] * 3, rel=1e-9, abs=1e-9)


def answers(folder: Path) -> set[tuple[str, str, str]]:
    with closing(sqlite3.connect(folder / "data" / "condor.db")) as db:
        return set(
            db.execute(
                "SELECT asset || scheduled_at_s, model_id, prediction.status FROM prediction"
                " JOIN round USING (round_no) JOIN model USING (model_no)"
            )
        )


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
