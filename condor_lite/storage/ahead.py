"""Undoing what a game wrote while its time was wrongly ahead."""

from __future__ import annotations

import sqlite3

from condor_lite.storage import repositories


def forget_ahead(conn: sqlite3.Connection, at_s: float) -> float:
    """Set the game's time back to `at_s`; how far it could be set back: no further than to the newest answer.

    What lies ahead of it and was never asked (missed, skipped, unanswered rounds) is forgotten, so that these
    rounds can be held in their time, and so are leaderboards of that time. Nothing that a model sent goes.
    """
    conn.execute(
        "DELETE FROM round WHERE scheduled_at_s > ? AND status <> 'scored' AND NOT EXISTS "
        "(SELECT 1 FROM prediction WHERE prediction.round_no = round.round_no)",
        (at_s,),
    )
    conn.execute("DELETE FROM leaderboard WHERE created_at_s > ?", (at_s,))
    conn.execute("DELETE FROM snapshot WHERE created_at_s > ?", (at_s,))
    conn.execute(
        "UPDATE model SET joined_at_s = min(joined_at_s, ?), last_seen_at_s = min(last_seen_at_s, ?)",
        (int(at_s), int(at_s)),
    )
    repositories.save_clock(conn, at_s)
    reached_s = repositories.load_clock(conn)
    assert reached_s is not None
    return reached_s
