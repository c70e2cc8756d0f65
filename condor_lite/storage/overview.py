"""What the leaderboard's page shows beside the leaderboard: how scores went, and how models answer lately."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

import orjson

from condor_lite.storage.database import Readers

_LATELY = 101  # answers of a model that its median time is taken from ...
_NEWEST = 10  # ... and those that say whether it fails
_MOST_SCORES = 100_000


async def snapshot_times(readers: Readers, since_s: float, now_s: float, count: int) -> list[int]:
    """Times of stored leaderboards from `since_s` on, the newest last: at most `count`, evenly apart."""
    rows = await readers.fetch(
        """
        WITH RECURSIVE bounds(first_s, newest_s) AS (
            SELECT (SELECT min(created_at_s) FROM leaderboard WHERE created_at_s >= ?),
                   (SELECT max(created_at_s) FROM leaderboard WHERE created_at_s <= ?)
        ), time(at_s) AS (
            SELECT newest_s FROM bounds WHERE newest_s >= first_s
            UNION ALL
            SELECT (SELECT max(created_at_s) FROM leaderboard
                    WHERE created_at_s <= at_s - max((newest_s - first_s) / ?, 1) AND created_at_s >= first_s)
            FROM time, bounds WHERE at_s IS NOT NULL LIMIT ?
        )
        SELECT at_s FROM time WHERE at_s IS NOT NULL ORDER BY at_s
        """,
        (since_s, now_s, max(count - 1, 1), count),
    )
    return [row["at_s"] for row in rows]


async def snapshot_before(readers: Readers, at_s: float) -> int | None:
    """The time of the newest stored leaderboard at or before `at_s`; of the oldest where none is that old."""
    ((found,),) = await readers.fetch(
        """
        SELECT coalesce((SELECT max(created_at_s) FROM leaderboard WHERE created_at_s <= ?),
                        (SELECT min(created_at_s) FROM leaderboard))
        """,
        (at_s,),
    )
    return None if found is None else int(found)


async def scores_at(readers: Readers, times_s: Sequence[int]) -> list[sqlite3.Row]:
    """Every model's stored rank and scores at these times of leaderboards, by time."""
    return await readers.fetch(
        """
        SELECT t.created_at_s, t.model_no, t.rank, t.score_recent, t.score_steady, t.score_anchor
        FROM json_each(?) time CROSS JOIN leaderboard t INDEXED BY leaderboard_by_time
            ON t.created_at_s = time.value
        ORDER BY time.key LIMIT ?
        """,
        (orjson.dumps(list(times_s)).decode(), _MOST_SCORES),
    )


async def answering(readers: Readers, model_nos: Sequence[int]) -> list[sqlite3.Row]:
    """Of each model's newest answers: the median time of the good ones (`median_us`), how many of the very
    newest (`newest`) were not good (`bad`), and what was wrong with the last of these (`detail`).
    """
    return await readers.fetch(
        """
        SELECT m.value AS model_no,
            (SELECT exec_time_us FROM (
                SELECT exec_time_us, count(*) OVER () AS total,
                       row_number() OVER (ORDER BY exec_time_us) AS place
                FROM (SELECT status, exec_time_us FROM prediction INDEXED BY prediction_by_model
                      WHERE model_no = m.value ORDER BY round_no DESC LIMIT ?)
                WHERE status = 'SUCCESS') WHERE place = (total + 1) / 2) AS median_us,
            (SELECT count(*) FROM (
                SELECT 1 FROM prediction INDEXED BY prediction_by_model
                WHERE model_no = m.value ORDER BY round_no DESC LIMIT ?)) AS newest,
            (SELECT count(*) FROM (
                SELECT status FROM prediction INDEXED BY prediction_by_model
                WHERE model_no = m.value ORDER BY round_no DESC LIMIT ?) WHERE status != 'SUCCESS') AS bad,
            (SELECT coalesce(detail, lower(status)) FROM (
                SELECT status, detail FROM prediction INDEXED BY prediction_by_model
                WHERE model_no = m.value ORDER BY round_no DESC LIMIT ?) WHERE status != 'SUCCESS'
             LIMIT 1) AS detail
        FROM json_each(?) m
        """,
        (_LATELY, _NEWEST, _NEWEST, _NEWEST, orjson.dumps(list(model_nos)).decode()),
    )


async def last_result(readers: Readers) -> sqlite3.Row | None:
    """The round scored last by its end, how it was answered, and who was best in it (None: nobody)."""
    rows = await readers.fetch(
        """
        SELECT r.asset, r.horizon_s, r.step_s, r.scheduled_at_s, r.resolvable_at_s, r.answered,
               r.failed + r.timed_out + r.absent AS unanswered, m.model_id, m.model_name, s.score
        FROM (SELECT * FROM round INDEXED BY round_by_status WHERE status = 'scored'
              ORDER BY resolvable_at_s DESC, round_no DESC LIMIT 1) r
        LEFT JOIN score s ON s.round_no = r.round_no AND s.raw IS NOT NULL
            AND s.scorer_version IN (SELECT scorer_version FROM scorer WHERE published)
        LEFT JOIN model m ON m.model_no = s.model_no
        ORDER BY s.scorer_version DESC, s.score DESC LIMIT 1
        """
    )
    return rows[0] if rows else None


async def first_end_s(readers: Readers) -> int | None:
    """When the first of the rounds that are not scored yet is over; None where there is none."""
    ((found,),) = await readers.fetch(
        """
        SELECT min(resolvable_at_s) FROM (
            SELECT (SELECT min(resolvable_at_s) FROM round WHERE status = 'open') AS resolvable_at_s
            UNION ALL SELECT (SELECT min(resolvable_at_s) FROM round WHERE status = 'closed')
        )
        """
    )
    return None if found is None else int(found)
