"""The short form of the torture run: nearly every fault once, in a random order, and what it would find."""

from __future__ import annotations

import random
import signal
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path

import psutil
import pytest

from condor_lite.config import OrchestratorConfig
from condor_lite.models import sandbox
from condor_lite.storage.connection import connect_writer
from tests.program import Program, program, replaying
from tests.torture.books import Books
from tests.torture.faults import (
    FAULTS,
    Fault,
    kill,
    port_taken,
    stopped,
    terminate,
    terminate_locked,
    terminate_twice,
)
from tests.torture.run import Torture
from tests.torture.worlds import START_S, Live, Replayed, World

SPAN_S = 2.0
STARTS = (terminate, terminate_twice, terminate_locked, port_taken)  # take long: two of them, by the seed
QUICKER = (*STARTS, kill, stopped)  # in the live game, which starts no models


def tortured(world: World, faults: list[Fault], seed: int) -> Torture:
    torture = Torture(random.Random(seed))
    torture.moments.shuffle(faults)
    assert torture.wait(world, 0) is not None, world.run.console.read_text()
    for fault in faults:
        torture.suffer(world, fault, SPAN_S)
    return torture


@pytest.mark.timeout(1200)
def test_no_fault_loses_or_doubles_anything_and_the_game_is_well_again_after_each(tmp_path: Path) -> None:
    seed = time.time_ns() % 10**6
    print(f"seed {seed}")
    with (
        Replayed(tmp_path / "replayed", minutes=60) as replayed,
        Live(tmp_path / "live") as live,
        ThreadPoolExecutor(2) as both,
    ):
        left_out = random.Random(seed).sample(STARTS, 2)
        without_models = [
            fault for fault in FAULTS[Live] if fault in QUICKER or fault not in FAULTS[Replayed]
        ]
        with_models = [fault for fault in FAULTS[Replayed] if fault not in without_models]
        running = [
            both.submit(tortured, world, [fault for fault in faults if fault not in left_out], seed)
            for world, faults in ((replayed, with_models), (live, without_models))
        ]
        tortures = [torture.result() for torture in running]
        assert replayed.run.end() == 0
        violations = [what for torture in tortures for what in torture.violations]
        for torture in tortures:
            print(torture.table())
        assert not violations

        replayed.books.patience_s = 0.0
        with closing(sqlite3.connect(replayed.books.path)) as db, db:
            shown = replayed.books.leaderboard(db)
            assert not replayed.books.check(lambda: shown), "what is wrong later is wrong by the test"
            newest = "SELECT max(round_no) FROM round WHERE status = 'scored' AND answered > 2"
            (no,) = db.execute(newest).fetchone()
            db.execute("DELETE FROM prediction WHERE round_no = ?", (no,))
            db.execute("UPDATE score SET raw = raw * (1 + model_no) WHERE round_no = ?", (no,))
            db.execute("UPDATE round SET scheduled_at_s = scheduled_at_s + 7 WHERE round_no = ?", (no - 1,))
        found = str(replayed.books.check(lambda: shown))
        for expected in (
            "answers that were on disk are gone",
            "count other answers",
            "off the grid",
            "sum up to",
        ):
            assert expected in found


def test_the_books_ask_for_no_score_of_rounds_before_a_model_was_there(tmp_path: Path) -> None:
    at_s, books = START_S, Books(tmp_path / "condor.db", ())
    with closing(connect_writer(books.path, 1.0)) as db:

        def hold(round_no: int, at_s: int, horizon_s: int, step_s: int, status: str) -> bool:
            db.execute(
                "INSERT INTO round (round_no, scheduled_at_s, horizon_s, step_s, resolvable_at_s, status,"
                " asset) VALUES (?, ?, ?, ?, ?, ?, 'BTC')",
                (round_no, at_s, horizon_s, step_s, at_s + horizon_s, status),
            )
            return "took part and lack a score" in str(list(books._twice(db)))

        late = "INSERT INTO model VALUES (1, 'late', 'late', 'c', 'c', 'd', NULL, 0, ?, ?, ?)"
        db.execute(late, (at_s + 80, at_s + 80, at_s))
        hold(1, at_s, 1200, 600, "closed")
        db.execute("INSERT INTO prediction VALUES (1, 1, 'SUCCESS', NULL, ?, 1)", (1000 * (at_s + 90),))
        assert not hold(2, at_s + 60, 300, 60, "scored")
        assert hold(3, at_s + 120, 300, 60, "scored")


@pytest.mark.skipif(
    (problem := sandbox.problem(OrchestratorConfig().model_disk_bytes)) is not None, reason=str(problem)
)
def test_a_kill_leaves_no_process_of_a_sandbox(tmp_path: Path) -> None:
    replaying(tmp_path)
    with program(tmp_path, CONDOR_LITE__ORCHESTRATOR__SANDBOX="true") as run:
        run.until_said("round_closed")
        run.until(lambda: sandboxed(run))
        run.end(signal.SIGKILL)  # looks for what is left


def sandboxed(run: Program) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        return [process for process in run.family() if process.name() == "bwrap"]
    return []
