"""The program as it is started: with a console, a port and a file; stopped, killed, started again."""

from __future__ import annotations

import random
import signal
import sqlite3
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from condor_lite.models.folder import EXAMPLES
from tests.games import window_scores
from tests.program import DEMO, Program, catches, cut_short, database, program, replaying

KILLS = 20
BUNDLED = {path.parent.name for path in EXAMPLES.glob("*/main.py")}


def scored_models(run: Program) -> list[dict[str, Any]]:
    return [row for row in run.get("/leaderboard")["models"] if row["score"] is not None]


def statuses(run: Program) -> dict[str, str]:
    return {row["model_id"]: row["status"] for row in run.get("/reports/leaderboard")}


@pytest.fixture
def challenge(tmp_path: Path) -> Path:
    (tmp_path / "config.toml").write_text(DEMO)
    return tmp_path


def test_a_game_plays_stops_cleanly_and_goes_on_where_it_was(challenge: Path) -> None:
    with program(challenge) as first:
        first.until(lambda: first.get("/statistics")["total_predictions"])
        scores = first.until(lambda: scored_models(first))
        first.until(lambda: statuses(first) == dict.fromkeys(BUNDLED, "RUNNING"))
        detail = first.get(f"/model/{scores[0]['model_id']}/metrics")
        assert detail["overall_scores"]["recent_24h"] is not None
        scored = first.get("/rounds?status=scored")[-1]
        answers = first.get(f"/rounds/{scored['round_id']}")["predictions"]
        assert {answer["raw_score"] is not None for answer in answers if answer["status"] == "SUCCESS"} == {
            True
        }
        assert first.get("/healthz")
        assert first.until(lambda: first.get("/readyz"))
        assert first.end() == 0
    left = sorted(path.name for path in (challenge / "data").iterdir())
    assert left == ["condor.db", "condor.db.lock", "models-log"]
    assert not first.complaints()
    with closing(database(challenge)) as db:
        before = db.execute("SELECT round_no, scheduled_at_s, status FROM round ORDER BY 1").fetchall()
        assert not [row for row in before if row[2] == "open"]
        stored = set(db.execute("SELECT * FROM score"))
        assert stored

    with program(challenge) as second:
        second.until(lambda: second.get("/statistics")["total_rounds"] > len(before) + 2)
        second.until(lambda: scored_models(second))
        assert second.end(signal.SIGINT) == 0
    with closing(database(challenge)) as db:
        assert stored <= set(db.execute("SELECT * FROM score"))
        offsets = db.execute("SELECT DISTINCT asset, scheduled_at_s % 10 FROM round ORDER BY 1").fetchall()
        assert offsets == [("BTC", 0), ("ETH", 5)], "the schedule did not shift"
        assert {model_id for (model_id,) in db.execute("SELECT model_id FROM model")} == BUNDLED
        assert db.execute("SELECT count(*) FROM model").fetchone()[0] == len(BUNDLED)


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


@pytest.mark.timeout(1200)
def test_twenty_kills_lose_nothing_and_count_nothing_twice(tmp_path: Path) -> None:
    replaying(tmp_path)
    moments = random.Random(4)
    acknowledged: set[tuple[str, str, str]] = set()
    for number in range(KILLS):
        with program(tmp_path) as run:
            if number % 5 == 4:  # a slow machine, too, gets as far as that
                run.until(lambda before=acknowledged: answered(answers(tmp_path)) - before)
            time.sleep(moments.uniform(0.3, 3.5))  # the moment is what is tested
            run.end(signal.SIGKILL)
        stored = answers(tmp_path)
        assert acknowledged <= stored, "an answer that was stored is gone"
        acknowledged = stored
    assert answered(acknowledged)

    with closing(database(tmp_path)) as db:
        (newest_s,) = db.execute("SELECT max(ts_s) FROM price").fetchone()
    cut_short(tmp_path, newest_s + 40 * 60)
    with program(tmp_path, CONDOR_LITE__GAME__SPEED="600") as last:
        last.until_said("feed_finished")
        last.until(lambda: not last.get("/rounds?status=open") and not last.get("/rounds?status=closed"))
        last.until(lambda: agree(published(last), recomputed(tmp_path)))  # it follows the newest round
        shown = published(last)
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
    assert agree(shown, recomputed(tmp_path))


Scores = dict[str, list[float]]


def published(run: Program) -> Scores:
    """Every model's scores over the windows, as far as it has any."""
    windows = ("score_recent", "score_steady", "score_anchor")
    rows = run.get("/reports/leaderboard")
    return {row["model_id"]: [row[window] for window in windows] for row in rows}


def recomputed(folder: Path) -> Scores:
    with closing(database(folder)) as db:
        return {model_id: [score] * 3 for model_id, score in window_scores(db).items()}


def agree(one: Scores, other: Scores) -> bool:
    return one.keys() == other.keys() and all(
        scores == pytest.approx(other[model_id], rel=1e-9, abs=1e-9) for model_id, scores in one.items()
    )


def answers(folder: Path) -> set[tuple[str, str, str]]:
    """Round, model and status of all that are on disk; none as long as there are no tables."""
    with suppress(sqlite3.OperationalError), closing(database(folder)) as db:
        return set(
            db.execute(
                "SELECT asset || scheduled_at_s, model_id, prediction.status FROM prediction"
                " JOIN round USING (round_no) JOIN model USING (model_no)"
            )
        )
    return set()


def answered(stored: set[tuple[str, str, str]]) -> set[tuple[str, str, str]]:
    return {answer for answer in stored if answer[2] == "SUCCESS"}
