"""The program as it is started: with a console, a port and a file; stopped, killed, started again."""

from __future__ import annotations

import random
import signal
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.games import window_scores
from tests.program import DEMO, Program, catches, database, program, replaying

KILLS = 20


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
    no_models = {"CONDOR_LITE__ORCHESTRATOR__MODE": "remote", "CONDOR_LITE__ORCHESTRATOR__PORT": "9"}
    with program(challenge, **no_models) as first:
        first.until(lambda: first.get("/healthz"))
        port = str(first.port)
        for environ, expected in (
            ({"CONDOR_LITE__REPORT__PORT": "0"}, "another condor_lite"),
            ({"CONDOR_LITE__REPORT__PORT": port, "CONDOR_LITE__STORAGE__PATH": "other.db"}, port),
            ({"CONDOR_LITE__PREDICT__TIMEOUT": "soon"}, "predict.timeout"),
        ):
            with program(challenge, **environ) as second:
                assert second.ended() == 2
            said = second.console.read_text()
            assert expected in said
            assert "Traceback" not in said
        assert first.end() == 0


def test_twenty_kills_lose_nothing_and_count_nothing_twice(tmp_path: Path) -> None:
    replaying(tmp_path)
    moments = random.Random(4)
    acknowledged: set[tuple[str, str, str]] = set()
    for number in range(KILLS):
        with program(tmp_path) as run:
            if number % 5 == 4:  # a slow machine, too, gets as far as that
                run.until_said("round_closed")
            time.sleep(moments.uniform(0.3, 3.5))  # the moment is what is tested
            run.end(signal.SIGKILL)
        if (tmp_path / "data" / "condor.db").exists():
            stored = answers(tmp_path)
            assert acknowledged <= stored, "an answer that was stored is gone"
            acknowledged = stored
    assert acknowledged

    with program(tmp_path, CONDOR_LITE__GAME__SPEED="600") as last:
        last.until_said("feed_finished")
        last.until(lambda: not last.get("/rounds?status=open") and not last.get("/rounds?status=closed"))
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
