"""The short form of the torture run: every kind of fault once, in a random order, and what it would find."""

from __future__ import annotations

import random
import signal
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from condor_lite.config import OrchestratorConfig
from condor_lite.models import sandbox
from tests.test_program import REPLAY, program, write_recording
from tests.torture.faults import FAULTS, Fault
from tests.torture.run import Torture
from tests.torture.worlds import Live, Replayed, World

SPAN_S = 2.0
COVERED = FAULTS[Replayed]  # no need to do them in the live game, too


def tortured(world: World, faults: list[Fault], seed: int) -> Torture:
    torture = Torture(random.Random(seed))
    torture.moments.shuffle(faults)
    assert torture.wait(world, 0) is not None, world.run.console.read_text()
    for fault in faults:
        torture.suffer(world, fault, SPAN_S)
    return torture


@pytest.mark.timeout(900)
def test_no_fault_loses_or_doubles_anything_and_the_game_is_well_again_after_each(tmp_path: Path) -> None:
    seed = time.time_ns() % 10**6
    print(f"seed {seed}")
    with (
        Replayed(tmp_path / "replayed", minutes=15) as replayed,
        Live(tmp_path / "live") as live,
        ThreadPoolExecutor(2) as both,
    ):
        faults = {
            world: both.submit(
                tortured,
                world,
                [fault for fault in FAULTS[type(world)] if world is replayed or fault not in COVERED],
                seed,
            )
            for world in (replayed, live)
        }
        tortures = [torture.result() for torture in faults.values()]
        assert replayed.run.end() == 0
        violations = [what for torture in tortures for what in torture.violations]
        for torture in tortures:
            print(torture.table())
        assert not violations

        replayed.books.patience_s = 0.0
        with closing(sqlite3.connect(replayed.books.path)) as db, db:
            shown = replayed.books.leaderboard(db)
            assert not replayed.books.check(lambda: shown), "what is wrong later is wrong by the test"
            (no,) = db.execute("SELECT max(round_no) FROM round WHERE status = 'scored'").fetchone()
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


@pytest.mark.skipif(
    (problem := sandbox.problem(OrchestratorConfig().model_disk_bytes)) is not None, reason=str(problem)
)
def test_a_kill_leaves_no_process_of_a_sandbox(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(REPLAY)
    write_recording(tmp_path)
    with program(tmp_path, CONDOR_LITE__ORCHESTRATOR__SANDBOX="true") as run:
        run.until(lambda: "round_closed" in run.console.read_text())
        assert [process for process in run.family() if process.name() == "bwrap"]
        run.end(signal.SIGKILL)  # looks for what is left
