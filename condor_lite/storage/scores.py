"""What came of the rounds: scores, scorers, leaderboards; and what is forgotten in time.

Plain functions that run inside `Database.write` or `Database.read`; the first argument is the connection.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping
from itertools import chain
from types import MappingProxyType

import numpy as np

from condor_lite.config import StorageConfig
from condor_lite.game.entities import Leaderboard, Round, RoundScores, Window
from condor_lite.game.windows import WindowRows, window_start_s
from condor_lite.storage.repositories import select_rounds

_HOUR_WEIGHS = 50  # kept sums of an hour are as large as so many other rows

# Settling


def rounds_to_settle(conn: sqlite3.Connection, resolvable_until_s: float, limit: int) -> list[Round]:
    """Closed rounds with `resolvable_at <= resolvable_until_s`, the oldest first."""
    return select_rounds(
        conn,
        "status = 'closed' AND resolvable_at_s <= ? ORDER BY resolvable_at_s, round_no LIMIT ?",
        (resolvable_until_s, limit),
    )


def counted_models(conn: sqlite3.Connection, round_no: int) -> dict[int, bool]:
    """The models (`model_no`) that a round counts for, and whether each has a valid answer.

    Those that were asked, and those that were absent after having been asked in an earlier round.
    """
    scheduled_at_s, absent = conn.execute(
        "SELECT scheduled_at_s, absent_models FROM round WHERE round_no = ?", (round_no,)
    ).fetchone()
    missing = set(json.loads(absent))
    begun = conn.execute("SELECT model_no FROM model WHERE first_round_at_s <= ?", (scheduled_at_s,))
    counted = {model_no: False for (model_no,) in begun if model_no in missing}
    counted.update(
        (model_no, bool(valid))
        for model_no, valid in conn.execute(
            "SELECT model_no, status = 'SUCCESS' FROM prediction WHERE round_no = ?", (round_no,)
        )
    )
    return dict(sorted(counted.items()))


def void_round(conn: sqlite3.Connection, round_no: int, reason: str) -> None:
    """Let a round count for nobody. One that is scored stays so."""
    conn.execute(
        "UPDATE round SET status = 'void', reason = ? WHERE round_no = ? AND status IN ('open', 'closed')",
        (reason, round_no),
    )


# Scores


def current_scorer(
    conn: sqlite3.Connection, rule: str, target: str, fingerprint: str, at_s: float, rules: str | None = None
) -> int:
    """The `scorer_version` of these rules: the newest that is published where it is theirs, or a new one.

    `rules`: all of their parameters, as JSON.
    """
    newest = conn.execute(
        "SELECT scorer_version, rule, target, fingerprint FROM scorer WHERE published "
        "ORDER BY scorer_version DESC LIMIT 1"
    ).fetchone()
    if newest is not None and newest[1:] == (rule, target, fingerprint):
        conn.execute(
            "UPDATE scorer SET rules = ? WHERE scorer_version = ? AND rules IS NULL", (rules, newest[0])
        )
        return int(newest[0])
    return add_scorer(conn, rule, target, fingerprint, at_s, rules, published=True)


def add_scorer(
    conn: sqlite3.Connection,
    rule: str,
    target: str,
    fingerprint: str,
    at_s: float,
    rules: str | None,
    *,
    published: bool,
) -> int:
    (version,) = conn.execute(
        "INSERT INTO scorer (rule, target, fingerprint, created_at_s, rules, published) "
        "VALUES (?, ?, ?, ?, ?, ?) RETURNING scorer_version",
        (rule, target, fingerprint, int(at_s), rules, published),
    ).fetchone()
    return int(version)


def save_round_scores(
    conn: sqlite3.Connection,
    round_no: int,
    scorer_version: int,
    scores: RoundScores,
    resolved: int,
    scored_at_ms: int,
    details: Mapping[int, str] = MappingProxyType({}),
) -> bool:
    """Store all of a round's scores and mark it as scored; `resolved` is its number of resolved segments.

    `details`: by `model_no`, why an answer is none under this scorer, where the prediction does not say so.
    False, and nothing written, if it was scored under this version before or is neither closed nor scored.
    """
    is_settled = conn.execute(
        "SELECT 1 FROM round WHERE round_no = ? AND status IN ('closed', 'scored')", (round_no,)
    ).fetchone()
    if is_settled is None:
        return False
    inserted = conn.execute(
        "INSERT INTO round_score (round_no, scorer_version, median, no_move, resolved, scored_at_ms) "
        "VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (round_no, scorer_version) DO NOTHING",
        (round_no, scorer_version, float(scores.median), float(scores.no_move), resolved, scored_at_ms),
    ).rowcount
    if not inserted:
        return False
    conn.executemany(
        "INSERT INTO score (round_no, scorer_version, model_no, raw, counted, score, detail) "
        "VALUES (?, ?, ?, ?, ?, ?, ?)",
        (
            (
                round_no,
                scorer_version,
                int(model_no),
                None if score.raw is None else float(score.raw),
                float(score.counted),
                float(score.score),
                details.get(model_no),
            )
            for model_no, score in scores.models.items()
        ),
    )
    conn.execute("UPDATE round SET status = 'scored', reason = NULL WHERE round_no = ?", (round_no,))
    return True


def load_window_rows(
    conn: sqlite3.Connection, scorer_version: int, since_s: float, until_s: float
) -> WindowRows:
    """All scores of the rounds with `since_s <= resolvable_at < until_s`, by time."""
    span = (since_s, until_s, scorer_version)
    rounds = conn.execute(
        "SELECT round_no, asset, horizon_s, step_s, resolvable_at_s, no_move, median "
        "FROM round CROSS JOIN round_score USING (round_no) WHERE status = 'scored' "
        "AND resolvable_at_s >= ? AND resolvable_at_s < ? AND scorer_version = ? ORDER BY round_no",
        span,
    ).fetchall()
    # Numbers only, straight into one array: a row that becomes objects costs several times as much.
    numbers = np.fromiter(
        chain.from_iterable(
            conn.execute(
                "SELECT round_no, model_no, coalesce(raw, 9e999), counted "
                "FROM round CROSS JOIN score USING (round_no) WHERE status = 'scored' "
                "AND resolvable_at_s >= ? AND resolvable_at_s < ? AND scorer_version = ? "
                "ORDER BY resolvable_at_s, round_no, model_no",
                span,
            )
        ),
        np.float64,
    ).reshape(-1, 4)
    round_no, *columns = (np.array(column) for column in (zip(*rounds, strict=True) if rounds else [()] * 7))
    place = np.searchsorted(round_no, numbers[:, 0].astype(np.int64))
    asset, horizon_s, step_s, resolvable_at_s, no_move, median = (column[place] for column in columns)
    return WindowRows(
        asset=asset,
        horizon_s=horizon_s,
        step_s=step_s,
        resolvable_at_s=resolvable_at_s,
        round_no=round_no[place],
        no_move=no_move,
        median=median,
        model_no=numbers[:, 1].astype(np.int64),
        raw=np.where(np.isinf(numbers[:, 2]), np.nan, numbers[:, 2]),
        counted=numbers[:, 3],
    )


# The leaderboard


def save_leaderboard(conn: sqlite3.Connection, leaderboard: Leaderboard, with_settings: bool) -> None:
    """Store the ranks and scores of one moment, `with_settings` also those of each setting."""
    when = (leaderboard.created_at_s, leaderboard.scorer_version)
    conn.executemany(
        "INSERT OR REPLACE INTO leaderboard (created_at_s, scorer_version, model_no, rank, score_recent, "
        "score_steady, score_anchor) VALUES (?, ?, ?, ?, ?, ?, ?)",
        (
            (
                *when,
                standing.model.model_no,
                standing.rank,
                standing.overall.recent,
                standing.overall.steady,
                standing.overall.anchor,
            )
            for standing in leaderboard.standings
        ),
    )
    if with_settings:
        conn.executemany(
            "INSERT OR REPLACE INTO snapshot (created_at_s, scorer_version, model_no, asset, horizon_s, "
            "step_s, score_recent, score_steady, score_anchor) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                (
                    *when,
                    standing.model.model_no,
                    *key.rsplit("-", 2),
                    scores.recent,
                    scores.steady,
                    scores.anchor,
                )
                for standing in leaderboard.standings
                for key, scores in standing.by_setting.items()
            ),
        )


# Forgetting


def prune(conn: sqlite3.Connection, now_s: float, keep: StorageConfig, limit: int = 1000) -> bool:
    """Delete about `limit` rows that are older than the host wants to keep; True while there is more to do.

    A round, or a round's payloads, go whole, by `resolvable_at`, and never while it waits to be scored or its
    scores count in a window. The file uses the freed pages again.
    """
    deleted = 0
    rounds_before_s = min(now_s - keep.keep_predictions_s, window_start_s(Window.ANCHOR, now_s))
    for step in (
        _prune_payloads(conn, now_s - keep.keep_payloads_s, limit),
        _prune_rounds(conn, rounds_before_s, limit),
        _prune_prices(conn, now_s - keep.keep_prices_s, limit),
        _prune_charts(conn, now_s - keep.keep_snapshots_s, limit),
        _prune_calibration(conn, rounds_before_s, limit),
        _prune_hours(conn, window_start_s(Window.ANCHOR, now_s), limit),
        _prune_deployments(conn, min(rounds_before_s, now_s - keep.keep_snapshots_s), limit),
    ):
        for rows in step:
            deleted += rows
            if deleted >= limit:
                return True
    return False


def _prune_payloads(conn: sqlite3.Connection, before_s: float, limit: int) -> Iterator[int]:
    rounds = conn.execute(
        "SELECT round_no FROM round WHERE has_payloads = 1 AND resolvable_at_s < ? "
        "AND status NOT IN ('open', 'closed') ORDER BY resolvable_at_s LIMIT ?",
        (before_s, limit),
    )
    for (round_no,) in rounds.fetchall():
        rows = conn.execute("DELETE FROM payload WHERE round_no = ?", (round_no,)).rowcount
        conn.execute("UPDATE round SET has_payloads = 0 WHERE round_no = ?", (round_no,))
        yield rows


def _prune_rounds(conn: sqlite3.Connection, before_s: float, limit: int) -> Iterator[int]:
    rounds = conn.execute(
        "SELECT round_no FROM round WHERE scheduled_at_s < ? AND resolvable_at_s < ? "
        "AND status NOT IN ('open', 'closed') ORDER BY scheduled_at_s LIMIT ?",
        (before_s, before_s, limit),
    )
    for (round_no,) in rounds.fetchall():
        yield sum(
            conn.execute(delete, (round_no,)).rowcount
            for delete in (
                "DELETE FROM left_out WHERE round_no = ?",
                "DELETE FROM score WHERE round_no = ?",
                "DELETE FROM round_score WHERE round_no = ?",
                "DELETE FROM payload WHERE round_no = ?",
                "DELETE FROM prediction WHERE round_no = ?",
                "DELETE FROM round WHERE round_no = ?",
            )
        )


def _prune_prices(conn: sqlite3.Connection, before_s: float, limit: int) -> Iterator[int]:
    asset = ""
    # From asset to asset by the key: SELECT DISTINCT would read every price.
    next_asset = "SELECT asset FROM price WHERE asset > ? ORDER BY asset LIMIT 1"
    while row := conn.execute(next_asset, (asset,)).fetchone():
        (asset,) = row
        yield conn.execute(
            "DELETE FROM price WHERE asset = ? AND ts_s IN "
            "(SELECT ts_s FROM price WHERE asset = ? AND ts_s < ? ORDER BY ts_s LIMIT ?)",
            (asset, asset, before_s, limit),
        ).rowcount


def _prune_charts(conn: sqlite3.Connection, before_s: float, limit: int) -> Iterator[int]:
    for delete in (
        "DELETE FROM leaderboard WHERE (model_no, created_at_s) IN "
        "(SELECT model_no, created_at_s FROM leaderboard "
        "WHERE created_at_s < ? ORDER BY created_at_s LIMIT ?)",
        "DELETE FROM snapshot WHERE (model_no, created_at_s, asset, horizon_s, step_s) IN "
        "(SELECT model_no, created_at_s, asset, horizon_s, step_s FROM snapshot "
        "WHERE created_at_s < ? ORDER BY created_at_s LIMIT ?)",
    ):
        yield conn.execute(delete, (before_s, limit)).rowcount


def _prune_calibration(conn: sqlite3.Connection, before_s: float, limit: int) -> Iterator[int]:
    yield conn.execute(
        "DELETE FROM calibration WHERE (scorer_version, asset, horizon_s, step_s, model_no, hour_s) IN "
        "(SELECT scorer_version, asset, horizon_s, step_s, model_no, hour_s FROM calibration "
        "WHERE hour_s < ? ORDER BY hour_s LIMIT ?)",
        (before_s, limit),
    ).rowcount


def _prune_hours(conn: sqlite3.Connection, before_s: float, limit: int) -> Iterator[int]:
    yield (
        _HOUR_WEIGHS
        * conn.execute(
            "DELETE FROM hour_sum WHERE rowid IN (SELECT rowid FROM hour_sum WHERE hour_s < ? LIMIT ?)",
            (before_s, limit // _HOUR_WEIGHS),
        ).rowcount
    )


def _prune_deployments(conn: sqlite3.Connection, before_s: float, limit: int) -> Iterator[int]:
    """Those that were replaced before that time, and all of a model that has been gone since."""
    yield conn.execute(
        "DELETE FROM deployment WHERE (model_no, deployment_id) IN "
        "(SELECT model_no, d.deployment_id FROM deployment d JOIN model m USING (model_no) "
        "JOIN (SELECT model_no, max(first_seen_at_s) AS since_s FROM deployment WHERE first_seen_at_s < ? "
        "GROUP BY model_no) USING (model_no) "
        "WHERE m.last_seen_at_s < ? OR d.first_seen_at_s < since_s AND d.deployment_id != m.deployment_id "
        "LIMIT ?)",
        (before_s, before_s, limit),
    ).rowcount
