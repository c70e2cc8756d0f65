"""All SQL of the report: bounded, by index, in pages. Times are epoch seconds; ranges include both ends."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Sequence
from typing import Literal

import orjson

from condor_lite.game.entities import Model, ModelInfo, RoundStatus
from condor_lite.storage.database import Readers

MOST_MODELS = 20_000
MOST_ANSWERS = 20_000

_ONE_BY_ONE = 16  # up to so many models are looked up each by its own index range
_WORTH_COUNTING = 200_000
_BEFORE_ALL = -(2**62)
_AFTER_ALL = 2**62

# For a round that was scored more than once, the result of the newest scorer that is published.
NEWEST = """
    (SELECT n.scorer_version FROM round_score n
     WHERE n.round_no = r.round_no AND n.scorer_version IN (SELECT scorer_version FROM scorer WHERE published)
     ORDER BY n.scorer_version DESC LIMIT 1)
"""
RESULT = f"""
    LEFT JOIN round_score q ON q.round_no = r.round_no AND q.scorer_version = {NEWEST}
    LEFT JOIN score s ON s.round_no = q.round_no AND s.scorer_version = q.scorer_version
        AND s.model_no = p.model_no
"""
# What became of an answer under that scorer: another one may have rejected it.
ANSWER = """
    CASE WHEN s.raw IS NOT NULL THEN 'SUCCESS' WHEN s.detail IS NOT NULL THEN 'FAILED' ELSE p.status END
        AS answer_status,
    CASE WHEN s.raw IS NULL THEN coalesce(s.detail, p.detail) END AS detail,
    coalesce(q.carried_from, q.scorer_version) AS scorer_version
"""
# A round's counts are stored when it is closed; of an open one, the answers that are there are counted.
_COUNT = """
    CASE WHEN r.status = 'open' THEN (
        SELECT count(*) FROM prediction WHERE round_no = r.round_no AND status = '{}'
    ) ELSE r.{} END AS {}
"""
_ROUND = f"""
    r.round_no, r.asset, r.horizon_s, r.step_s, r.scheduled_at_s, r.resolvable_at_s, r.performed_at_ms,
    r.status, r.reason, {_COUNT.format("SUCCESS", "answered", "answered")},
    {_COUNT.format("FAILED", "failed", "failed")}, {_COUNT.format("TIMEOUT", "timed_out", "timed_out")},
    r.absent
"""


async def free_bytes(readers: Readers) -> int:
    """How much of the file is unused, and used again before it grows."""
    ((count,),) = await readers.fetch(
        "SELECT freelist_count * page_size FROM pragma_freelist_count, pragma_page_size"
    )
    return int(count)


async def models(readers: Readers) -> list[Model]:
    """All models that ever connected, oldest first."""
    rows = await readers.fetch("SELECT * FROM model ORDER BY model_no LIMIT ?", (MOST_MODELS,))
    return [
        Model(
            model_no=row["model_no"],
            info=ModelInfo(
                model_id=row["model_id"],
                model_name=row["model_name"],
                cruncher_id=row["cruncher_id"],
                cruncher_name=row["cruncher_name"],
                deployment_id=row["deployment_id"],
                code_hash=row["code_hash"],
                benchmark=bool(row["benchmark"]),
            ),
            joined_at_s=row["joined_at_s"],
            last_seen_at_s=row["last_seen_at_s"],
            first_round_at_s=row["first_round_at_s"],
        )
        for row in rows
    ]


async def deployments(readers: Readers, model_no: int, limit: int = 100) -> list[sqlite3.Row]:
    """The model's deployments, oldest first of the newest `limit`."""
    rows = await readers.fetch(
        """
        SELECT deployment_id, code_hash, first_seen_at_s FROM deployment WHERE model_no = ?
        ORDER BY first_seen_at_s DESC, deployment_id DESC LIMIT ?
        """,
        (model_no, limit),
    )
    return rows[::-1]


async def snapshots(
    readers: Readers,
    table: Literal["leaderboard", "snapshot"],
    model_nos: Sequence[int] | None,
    start_s: float,
    end_s: float,
    limit: int,
    spacing_s: int,
) -> list[sqlite3.Row]:
    """Stored window scores (of `snapshot`: by setting) of these models, or of all; newest first, at most
    `limit`.

    Where a few models have more than that, their lines are thinned evenly rather than cut off: of so many
    `spacing_s` (how often snapshots are kept) the last one stays.
    """
    setting = ", t.asset, t.horizon_s, t.step_s" if table == "snapshot" else ""
    order = "ORDER BY at_s DESC, t.model_no DESC" + (setting and f"{setting} DESC")
    scores = "t.score_recent, t.score_steady, t.score_anchor"
    named = "CROSS JOIN model m ON m.model_no = t.model_no"
    within = "t.created_at_s BETWEEN ? AND ?"
    if model_nos is not None and len(model_nos) <= _ONE_BY_ONE:
        chosen = f"t.model_no IN ({', '.join('?' * len(model_nos))}) AND {within}"
        params: tuple[object, ...] = (*model_nos, start_s, end_s)
        ((count,),) = await readers.fetch(
            f"SELECT count(*) FROM (SELECT 1 FROM {table} t WHERE {chosen} LIMIT {_WORTH_COUNTING})",  # noqa: S608
            params,
        )
        if count < _WORTH_COUNTING:
            thinned = ""
            if count > limit:
                span_s = spacing_s * -(-count // limit)
                thinned = f"""
                    AND NOT EXISTS (
                        SELECT 1 FROM {table} n WHERE n.model_no = t.model_no
                        AND n.created_at_s > t.created_at_s
                        AND n.created_at_s < min(?, (t.created_at_s / ? + 1) * ?)
                    )
                """  # noqa: S608
                params = (*params, math.floor(end_s) + 1, span_s, span_s)
            return await readers.fetch(
                f"SELECT m.model_id, t.scorer_version, t.created_at_s AS at_s, {scores}{setting} "  # noqa: S608
                f"FROM {table} t {named} WHERE {chosen} {thinned} {order} LIMIT ?",
                (*params, limit),
            )
    among, some = ("", ()) if model_nos is None else _among(model_nos)
    return await readers.fetch(
        f"SELECT m.model_id, t.scorer_version, t.created_at_s AS at_s, {scores}{setting} "  # noqa: S608
        f"FROM {table} t INDEXED BY {table}_by_time {named} WHERE {within} {among} "
        "ORDER BY t.created_at_s DESC LIMIT ?",
        (start_s, end_s, *some, limit),
    )


async def predictions(
    readers: Readers,
    model_nos: Sequence[int] | None,
    start_s: float,
    end_s: float,
    limit: int,
    before: tuple[int, int] | None = None,
) -> list[sqlite3.Row]:
    """Predictions of these models, or of all, in rounds scheduled in the range; newest rounds first.

    `before`: the (round_no, model_no) that ended the page before.
    """
    if model_nos is not None and not model_nos:
        return []
    # A round's number all but follows its time, so the range narrows the numbers first, by the index alone.
    ((first, last),) = await readers.fetch(
        "SELECT min(round_no), max(round_no) FROM round WHERE scheduled_at_s BETWEEN ? AND ?",
        (start_s, end_s),
    )
    if first is None:
        return []
    below = before or (_AFTER_ALL, 0)
    within = """
        p.round_no BETWEEN ? AND ? AND r.scheduled_at_s BETWEEN ? AND ?
        AND (p.round_no, p.model_no) < (?, ?)
    """
    bounds = (first, min(last, below[0]), start_s, end_s, *below)
    rounds = "CROSS JOIN round r ON r.round_no = p.round_no"
    by_model = f"prediction p INDEXED BY prediction_by_model {rounds}"
    params: list[object]
    page = ""
    if model_nos is not None and 1 < len(model_nos) <= _ONE_BY_ONE:
        newest = f"""
            SELECT * FROM (SELECT p.round_no, p.model_no FROM {by_model} WHERE {within} AND p.model_no = ?
                           ORDER BY p.round_no DESC LIMIT ?)
        """  # noqa: S608 - only constants
        page = f"""
            WITH page AS MATERIALIZED (
                {" UNION ALL ".join([newest] * len(model_nos))} ORDER BY round_no DESC, model_no DESC LIMIT ?
            )
        """
        source = f"page CROSS JOIN prediction p USING (round_no, model_no) {rounds}"
        where, params = "true", [each for model_no in model_nos for each in (*bounds, model_no, limit)]
        params.append(limit)
    elif model_nos is not None and len(model_nos) == 1:
        source, where, params = by_model, f"{within} AND p.model_no = ?", [*bounds, *model_nos]
    else:
        among, some = ("", ()) if model_nos is None else _among(model_nos, "p")
        source, where, params = f"prediction p {rounds}", f"{within} {among}", [*bounds, *some]
    return await readers.fetch(
        f"""
        {page}
        SELECT m.model_id, r.asset, r.horizon_s, r.step_s, r.scheduled_at_s, r.performed_at_ms, r.status,
               r.reason, {ANSWER}, p.exec_time_us, q.scored_at_ms, s.raw, s.score, r.resolvable_at_s,
               p.round_no, p.model_no
        FROM {source} CROSS JOIN model m ON m.model_no = p.model_no {RESULT}
        WHERE {where} ORDER BY p.round_no DESC, p.model_no DESC LIMIT ?
        """,  # noqa: S608 - only constants
        (*params, limit),
    )


async def rounds(
    readers: Readers,
    *,
    asset: str | None,
    horizon_s: int | None,
    status: RoundStatus | None,
    before_s: float | None,
    before_round_no: int | None,
    limit: int,
) -> list[sqlite3.Row]:
    """Rounds, newest first. The unary plus keeps the order by time, which ends early, the leading index."""
    where = ["r.scheduled_at_s <= ?"]
    params: list[object] = [before_s if before_s is not None else _AFTER_ALL]
    if before_s is not None:
        where.append("(r.scheduled_at_s, r.round_no) < (?, ?)")
        params += [before_s, before_round_no if before_round_no is not None else _BEFORE_ALL]
    for column, value in (("asset", asset), ("horizon_s", horizon_s), ("status", status)):
        if value is None:
            continue
        # Rounds of a status that passes or is an exception are few: found by it, then sorted.
        free = "" if column == "status" and status is not RoundStatus.SCORED else "+"
        where.append(f"{free}r.{column} = ?")
        params.append(value)
    return await readers.fetch(
        f"SELECT {_ROUND} FROM round r WHERE {' AND '.join(where)} "  # noqa: S608 - only constants
        "ORDER BY r.scheduled_at_s DESC, r.round_no DESC LIMIT ?",
        (*params, limit),
    )


async def round_by_key(
    readers: Readers, asset: str, horizon_s: int, step_s: int, scheduled_at_s: int
) -> sqlite3.Row | None:
    """One round with its newest result, None where there is no such round."""
    rows = await readers.fetch(
        f"""
        SELECT {_ROUND}, r.absent_models, q.median, q.no_move, q.resolved, q.scored_at_ms,
               coalesce(q.carried_from, q.scorer_version) AS scorer_version
        FROM round r LEFT JOIN round_score q ON q.round_no = r.round_no
            AND q.scorer_version = {NEWEST}
        WHERE r.asset = ? AND r.horizon_s = ? AND r.step_s = ? AND r.scheduled_at_s = ?
        """,  # noqa: S608 - only constants
        (asset, horizon_s, step_s, scheduled_at_s),
    )
    return rows[0] if rows else None


async def round_answers(readers: Readers, round_no: int) -> list[sqlite3.Row]:
    """Who was asked in a round, or absent from it, and what came of it; best score first."""
    return await readers.fetch(
        f"""
        WITH asked AS (
            SELECT round_no, model_no, status, detail, received_at_ms, exec_time_us FROM prediction
            WHERE round_no = ?
            UNION ALL
            SELECT round_no, absent.value, 'ABSENT', NULL, NULL, NULL
            FROM round, json_each(round.absent_models) absent WHERE round_no = ?
        )
        SELECT m.model_id, m.model_name, {ANSWER}, p.received_at_ms, p.exec_time_us, s.raw, s.score
        FROM asked p CROSS JOIN model m ON m.model_no = p.model_no
        CROSS JOIN round r ON r.round_no = p.round_no {RESULT}
        ORDER BY s.score DESC NULLS LAST, p.status = 'SUCCESS' DESC, m.model_id LIMIT ?
        """,  # noqa: S608 - only constants
        (round_no, round_no, MOST_ANSWERS),
    )


async def feeds(readers: Readers) -> list[sqlite3.Row]:
    """How many points are stored by asset and source, and from when to when."""
    return await readers.fetch(
        """
        SELECT asset, source, count(*) AS points, min(ts_s) AS oldest_s, max(ts_s) AS newest_s,
               max(ingested_at_ms) AS ingested_at_ms
        FROM price GROUP BY asset, source ORDER BY asset, source LIMIT 1000
        """
    )


async def feed_tail(readers: Readers, asset: str, source: str | None, limit: int) -> list[sqlite3.Row]:
    """An asset's newest points, newest first."""
    return await readers.fetch(
        """
        SELECT asset, ts_s, price, source, ingested_at_ms FROM price
        WHERE asset = ? AND source = coalesce(?, source) ORDER BY ts_s DESC LIMIT ?
        """,
        (asset, source, limit),
    )


async def statistics(readers: Readers, since_s: float) -> sqlite3.Row:
    """Counts over the stored rounds, and over those scheduled after `since_s`; answers of open rounds too."""
    (row,) = await readers.fetch(
        """
        WITH running AS (
            SELECT r.scheduled_at_s FROM round r CROSS JOIN prediction p ON p.round_no = r.round_no
            WHERE r.status = 'open' AND p.status = 'SUCCESS'
        )
        SELECT (SELECT count(*) FROM running)
                   + coalesce(sum(answered) FILTER (WHERE status != 'open'), 0) AS predictions,
               (SELECT count(*) FROM running WHERE scheduled_at_s > ?)
                   + coalesce(sum(answered) FILTER (WHERE status != 'open' AND scheduled_at_s > ?), 0)
                   AS recent_predictions,
               count(*) AS rounds,
               count(*) FILTER (WHERE status = 'scored') AS scored_rounds,
               count(*) FILTER (WHERE scheduled_at_s > ?) AS recent_rounds
        FROM round
        """,
        (since_s, since_s, since_s),
    )
    return row


async def current_scorer(readers: Readers) -> sqlite3.Row | None:
    """The version and the rule whose scores count now; None before the first."""
    rows = await readers.fetch(
        "SELECT scorer_version, rule FROM scorer WHERE published ORDER BY scorer_version DESC LIMIT 1"
    )
    return rows[0] if rows else None


async def current_rule(readers: Readers, configured: str) -> str:
    """The rule that scores are by now: a rescore may have chosen another than the configured one."""
    scorer = await current_scorer(readers)
    return configured if scorer is None else str(scorer["rule"])


async def is_readable(readers: Readers) -> None:
    """Raises StorageError where the database can't be read now."""
    await readers.fetch("SELECT max(round_no) FROM round")


def _among(model_nos: Sequence[int], table: str = "t") -> tuple[str, tuple[str]]:
    return f"AND +{table}.model_no IN (SELECT value FROM json_each(?))", (_json(model_nos),)  # noqa: S608


def _json(numbers: Sequence[int]) -> str:
    return orjson.dumps(list(numbers)).decode()
