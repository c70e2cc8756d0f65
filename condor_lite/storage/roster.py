"""Who is paused, and how each model has fared lately. The first argument is a plain connection."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from condor_lite.game.entities import AnswerStatus

_LATELY = 201  # answers of a model that its median and its last error are taken from
_PART_S = 3600

# Two small queries a model: its newest rows by its index, sorted by SQLite without holding the GIL.
_NEWEST = """
    WITH newest AS (
        SELECT status, detail, received_at_ms, exec_time_us
        FROM prediction INDEXED BY prediction_by_model
        WHERE model_no = ? AND round_no >= ? ORDER BY round_no DESC LIMIT ?
    )
"""
_MEDIAN = f"""{_NEWEST}
    SELECT exec_time_us FROM newest WHERE status = 'SUCCESS' ORDER BY exec_time_us
    LIMIT 1 OFFSET (SELECT max(count(*) - 1, 0) / 2 FROM newest WHERE status = 'SUCCESS')
"""  # noqa: S608
_ERROR = f"""{_NEWEST}
    SELECT detail, received_at_ms / 1000 FROM newest WHERE status != 'SUCCESS'
    ORDER BY received_at_ms DESC LIMIT 1
"""  # noqa: S608

Tally = dict[int, Counter[AnswerStatus]]
"""By `model_no`: in how many rounds it had which status."""


@dataclass(frozen=True, slots=True)
class Recent:
    """From a model's newest answers: the median time of the good ones, and the newest that was not good."""

    median_us: int | None
    error: str | None
    error_at_s: int | None


# Pauses


def load_pauses(conn: sqlite3.Connection) -> dict[str, int]:
    """By `model_id`, since when the model is paused (game's clock, epoch seconds)."""
    return dict(conn.execute("SELECT model_id, since_s FROM pause"))


def save_pause(conn: sqlite3.Connection, model_id: str, since_s: int) -> None:
    """Keep a model paused from one start of the game to the next; one that is paused stays as it is."""
    conn.execute(
        "INSERT INTO pause (model_id, since_s) VALUES (?, ?) ON CONFLICT (model_id) DO NOTHING",
        (model_id, since_s),
    )


def delete_pause(conn: sqlite3.Connection, model_id: str) -> None:
    conn.execute("DELETE FROM pause WHERE model_id = ?", (model_id,))


# How models fare


def spans(since_s: float, until_s: float) -> Iterator[tuple[float, float]]:
    """The hours from `since_s` to `until_s`: parts of a day that `tally` counts without holding others up."""
    while since_s < until_s:
        yield since_s, min(since_s + _PART_S, until_s)
        since_s += _PART_S


def tally(conn: sqlite3.Connection, since_s: float, until_s: float) -> Tally:
    """What came of each model in the rounds of `since_s < scheduled_at <= until_s` that count.

    Void and open rounds are left out. 1,000 models in 8 settings of a round every 5 minutes are 100,000 rows
    an hour.
    """
    found: Tally = {}
    within = "scheduled_at_s > ? AND scheduled_at_s <= ? AND round.status IN ('closed', 'scored')"
    asked = conn.execute(
        "SELECT model_no, prediction.status, count(*) FROM round INDEXED BY round_by_time "  # noqa: S608
        f"CROSS JOIN prediction USING (round_no) WHERE {within} GROUP BY 1, 2",
        (since_s, until_s),
    )
    for model_no, status, count in asked:
        found.setdefault(model_no, Counter())[AnswerStatus(status)] = count
    absent = conn.execute(
        "SELECT value, count(*) FROM round INDEXED BY round_by_time "  # noqa: S608
        f"CROSS JOIN json_each(absent_models) WHERE {within} GROUP BY 1",
        (since_s, until_s),
    )
    for model_no, count in absent:
        found.setdefault(model_no, Counter())[AnswerStatus.ABSENT] = count
    return found


def recent(conn: sqlite3.Connection, since_s: float) -> dict[int, Recent]:
    """By `model_no`, what a model's newest answers tell, of those in rounds with `scheduled_at > since_s`."""
    (first_no,) = conn.execute(
        "SELECT min(round_no) FROM round INDEXED BY round_by_time WHERE scheduled_at_s > ?", (since_s,)
    ).fetchone()
    if first_no is None:
        return {}
    found = {}
    for (model_no,) in conn.execute("SELECT model_no FROM model").fetchall():
        bounds = (model_no, first_no, _LATELY)
        median = conn.execute(_MEDIAN, bounds).fetchone()
        error = conn.execute(_ERROR, bounds).fetchone()
        if median or error:
            found[model_no] = Recent(median[0] if median else None, *(error or (None, None)))
    return found
