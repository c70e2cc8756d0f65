"""What is stored about one score: for whoever has to explain it. The first argument is a plain connection."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from condor_lite.game.entities import AnswerStatus, Round
from condor_lite.game.scoring import Rules
from condor_lite.storage.compression import restored
from condor_lite.storage.repositories import select_rounds
from condor_lite.storage.rescores import load_rules


@dataclass(frozen=True, slots=True)
class Result:
    """How a round was scored, by one scorer. `median` and `no_move` are m and a (bp).

    `scorer_version` is the scorer that computed the scores; `rules` are its rules, None where they were not
    kept. `shown_as` is the scorer that they count under, another one where they were carried over.
    """

    scorer_version: int
    shown_as: int
    rule: str
    target: str
    median: float
    no_move: float
    resolved: int
    scored_at_ms: int
    rules: Rules | None


@dataclass(frozen=True, slots=True)
class AnswerEvidence:
    """One model's part in a round. `body` is its answer as it is stored, `payload` as it was sent; None where
    none was sent or it has been pruned.
    """

    model_id: str
    model_name: str
    status: AnswerStatus
    detail: str | None
    received_at_ms: int | None
    exec_time_us: int | None
    raw: float | None
    counted: float | None
    score: float | None
    body: bytes | None
    payload: bytes | None


def find_round(
    conn: sqlite3.Connection, asset: str, horizon_s: int, step_s: int, scheduled_at_s: int
) -> Round | None:
    found = select_rounds(
        conn,
        "asset = ? AND horizon_s = ? AND step_s = ? AND scheduled_at_s = ?",
        (asset, horizon_s, step_s, scheduled_at_s),
    )
    return found[0] if found else None


def find_result(conn: sqlite3.Connection, round_no: int, version: int | None = None) -> Result | None:
    """The result that counts, or that of one scorer; None where the round has none."""
    row = conn.execute(
        """
        SELECT origin.scorer_version, q.scorer_version, origin.rule, origin.target, median, no_move,
               resolved, scored_at_ms, origin.rules
        FROM round_score q JOIN scorer shown ON shown.scorer_version = q.scorer_version
        JOIN scorer origin ON origin.scorer_version = coalesce(q.carried_from, q.scorer_version)
        WHERE round_no = :round AND shown.published
            AND (:version IS NULL OR q.scorer_version = :version)
        ORDER BY q.scorer_version DESC LIMIT 1
        """,
        {"round": round_no, "version": version},
    ).fetchone()
    if row is None:
        return None
    *values, rules = row
    return Result(*values, load_rules(rules))  # type: ignore[call-arg]


def find_versions(conn: sqlite3.Connection, round_no: int) -> list[int]:
    """The published scorers that scored a round, the oldest first."""
    rows = conn.execute(
        "SELECT scorer_version FROM round_score JOIN scorer USING (scorer_version) "
        "WHERE round_no = ? AND published ORDER BY scorer_version",
        (round_no,),
    )
    return [int(version) for (version,) in rows]


def knows_model(conn: sqlite3.Connection, model_id: str) -> bool:
    return conn.execute("SELECT 1 FROM model WHERE model_id = ?", (model_id,)).fetchone() is not None


def find_answers(
    conn: sqlite3.Connection, round_no: int, scorer_version: int, model_id: str | None = None
) -> list[AnswerEvidence]:
    """All who were asked or absent, best score first; with `model_id` only that model, and its payload."""
    (absent,) = conn.execute("SELECT absent_models FROM round WHERE round_no = ?", (round_no,)).fetchone()
    rows = conn.execute(
        """
        WITH part AS (
            SELECT model_no, status, detail, received_at_ms, exec_time_us
            FROM prediction WHERE round_no = :round
            UNION ALL
            SELECT value, 'ABSENT', NULL, NULL, NULL FROM json_each(:absent)
        )
        SELECT model_id, model_name,
               CASE WHEN raw IS NOT NULL THEN 'SUCCESS' WHEN score.detail IS NOT NULL THEN 'FAILED'
                    ELSE status END,
               CASE WHEN raw IS NULL THEN coalesce(score.detail, part.detail) END,
               received_at_ms, exec_time_us, raw, counted, score,
               CASE WHEN :model IS NULL THEN NULL ELSE body END
        FROM part JOIN model USING (model_no)
        LEFT JOIN score
            ON score.round_no = :round AND score.scorer_version = :scorer AND score.model_no = model.model_no
        LEFT JOIN payload ON payload.round_no = :round AND payload.model_no = model.model_no
        WHERE :model IS NULL OR model_id = :model
        ORDER BY score DESC NULLS LAST, model_id
        """,
        {"round": round_no, "absent": absent, "scorer": scorer_version, "model": model_id},
    )
    return [_answer(row) for row in rows]


def _answer(row: Sequence[Any]) -> AnswerEvidence:
    model_id, name, status, *rest, body = row
    payload = None if body is None else restored(body, model_id)
    return AnswerEvidence(model_id, name, AnswerStatus(status), *rest, body, payload)  # type: ignore[call-arg]
