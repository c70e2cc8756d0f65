"""The live game's rows: clock, prices, models, rounds and answers.

Plain functions that run inside `Database.write` or `Database.read`; the first argument is the connection.
What is stored a second time is left as it is, so every function may be called again after an error.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from condor_lite.game.entities import Answer, AnswerStatus, Model, ModelInfo, Round, RoundStatus, Setting
from condor_lite.game.outcome import Series
from condor_lite.storage.compression import compress

# Columns in the order of the records' fields.
_SELECT_MODELS = (
    "SELECT model_no, model_id, model_name, cruncher_id, cruncher_name, deployment_id, code_hash, benchmark, "
    "joined_at_s, last_seen_at_s, first_round_at_s FROM model "
)
_SELECT_ROUNDS = (
    "SELECT asset, horizon_s, step_s, scheduled_at_s, status, reason, performed_at_ms, "
    "answered, failed, timed_out, absent, round_no FROM round WHERE "
)


# The clock


def save_clock(conn: sqlite3.Connection, now_s: float) -> None:
    conn.execute(
        "INSERT INTO meta (key, value) VALUES ('clock_s', ?) "
        "ON CONFLICT (key) DO UPDATE SET value = excluded.value",
        (repr(float(now_s)),),
    )


def load_clock(conn: sqlite3.Connection) -> float | None:
    """How far the game's time had come: the stored clock or the newest round, whichever is later."""
    stored = conn.execute("SELECT value FROM meta WHERE key = 'clock_s'").fetchone()
    (newest_s,) = conn.execute("SELECT max(scheduled_at_s) FROM round").fetchone()
    known = [float(stored[0])] if stored else []
    if newest_s is not None:
        known.append(float(newest_s))
    return max(known, default=None)


# Prices


def add_prices(
    conn: sqlite3.Connection,
    asset: str,
    points: Iterable[Sequence[float]],
    source: str,
    ingested_at_ms: int,
) -> int:
    """Store points `(ts_s, price)`; how many were new. A stored price stands: scores may rest on it."""
    return conn.executemany(
        "INSERT INTO price (asset, ts_s, price, source, ingested_at_ms) VALUES (?, ?, ?, ?, ?) "
        "ON CONFLICT (asset, ts_s) DO NOTHING",
        ((asset, int(ts_s), float(price), source, ingested_at_ms) for ts_s, price in points),
    ).rowcount


def load_prices(
    conn: sqlite3.Connection, asset: str, from_s: float, to_s: float
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Timestamps (int64[k], ascending) and prices (float64[k]) with `from_s <= ts <= to_s`."""
    rows = np.fromiter(
        conn.execute(
            "SELECT ts_s, price FROM price WHERE asset = ? AND ts_s BETWEEN ? AND ? ORDER BY ts_s",
            (asset, from_s, to_s),
        ),
        dtype=[("ts_s", np.int64), ("price", np.float64)],
    )
    return np.ascontiguousarray(rows["ts_s"]), np.ascontiguousarray(rows["price"])


def load_series(
    conn: sqlite3.Connection, asset: str, from_s: float, to_s: float
) -> tuple[Series, tuple[str, ...]]:
    """The points with `from_s <= ts <= to_s`, and the names that their `source` numbers stand for.

    A point filled in for a quiet time has the source of the point that proved it.
    """
    numbers: dict[str, int] = {}
    rows = np.fromiter(
        (
            (ts_s, price, numbers.setdefault(source, len(numbers)))
            for ts_s, price, source in conn.execute(
                "SELECT ts_s, price, source FROM price "
                "WHERE asset = ? AND ts_s BETWEEN ? AND ? ORDER BY ts_s",
                (asset, from_s, to_s),
            )
        ),
        dtype=[("ts_s", np.int64), ("price", np.float64), ("source", np.int16)],
    )
    columns = (np.ascontiguousarray(rows[name]) for name in ("ts_s", "price", "source"))
    return Series(*columns), tuple(numbers)


def revise_prices(
    conn: sqlite3.Connection, asset: str, points: Iterable[tuple[int, float]], source: str
) -> list[tuple[int, float]]:
    """Give points that `source` gave before its new prices; those that were changed.

    Only for points that no score can rest on yet: younger than `scoring.settle_delay`.
    """
    return [
        (ts_s, price)
        for ts_s, price in points
        if conn.execute(
            "UPDATE price SET price = ? WHERE asset = ? AND ts_s = ? AND source = ? AND price != ?",
            (price, asset, ts_s, source, price),
        ).rowcount
    ]


def newest_price_s(conn: sqlite3.Connection, asset: str) -> int | None:
    (newest_s,) = conn.execute("SELECT max(ts_s) FROM price WHERE asset = ?", (asset,)).fetchone()
    return None if newest_s is None else int(newest_s)


# Models


def upsert_model(
    conn: sqlite3.Connection, info: ModelInfo, at_s: float, model_no: int | None = None
) -> Model:
    """Store what is known of a model that is connected at `at_s`, and its deployment if that is new.

    `model_no` is the number of one that is new (None: any); the predict loop numbers models itself, to ask
    before it stores.
    """
    at_s = int(at_s)
    model_id = _text(info.model_id)
    conn.execute(
        "INSERT INTO model (model_no, model_id, model_name, cruncher_id, cruncher_name, deployment_id, "
        "code_hash, benchmark, joined_at_s, last_seen_at_s) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) "
        "ON CONFLICT (model_id) DO UPDATE SET model_name = excluded.model_name, "
        "cruncher_id = excluded.cruncher_id, cruncher_name = excluded.cruncher_name, "
        "deployment_id = excluded.deployment_id, code_hash = excluded.code_hash, "
        "benchmark = excluded.benchmark, last_seen_at_s = max(last_seen_at_s, excluded.last_seen_at_s)",
        (
            model_no,
            model_id,
            _text(info.model_name),
            _text(info.cruncher_id),
            _text(info.cruncher_name),
            _text(info.deployment_id),
            _text(info.code_hash),
            int(info.benchmark),
            at_s,
            at_s,
        ),
    )
    model = _model(conn.execute(_SELECT_MODELS + "WHERE model_id = ?", (model_id,)).fetchone())
    conn.execute(
        "INSERT INTO deployment (model_no, deployment_id, code_hash, first_seen_at_s) VALUES (?, ?, ?, ?) "
        "ON CONFLICT (model_no, deployment_id) DO NOTHING",
        (model.model_no, model.info.deployment_id, model.info.code_hash, at_s),
    )
    return model


def load_models(conn: sqlite3.Connection) -> list[Model]:
    """All models that ever took part, in the order in which they first joined."""
    return [_model(row) for row in conn.execute(_SELECT_MODELS + "ORDER BY model_no")]


def touch_models(conn: sqlite3.Connection, model_nos: Iterable[int], at_s: float) -> None:
    """Note that these models are connected at `at_s`."""
    conn.executemany(
        "UPDATE model SET last_seen_at_s = max(last_seen_at_s, ?) WHERE model_no = ?",
        ((int(at_s), model_no) for model_no in model_nos),
    )


# Rounds


def open_rounds(conn: sqlite3.Connection, rounds: Iterable[Round]) -> list[int | None]:
    """Store rounds that are about to be asked; their `round_no`, None for one that is stored already.

    A round that brings a `round_no` keeps it, so that its answers can be queued behind it.
    """
    return [_insert_round(conn, round_) for round_ in rounds]


def record_rounds(conn: sqlite3.Connection, rounds: Iterable[Round]) -> None:
    """Store rounds that were not held (missed, skipped, void); those stored already are left as they are."""
    for round_ in rounds:
        _insert_round(conn, round_)


def next_round_no(conn: sqlite3.Connection) -> int:
    """The first `round_no` above all in use: the predict loop numbers its rounds, to ask before it stores."""
    (newest_no,) = conn.execute("SELECT coalesce(max(round_no), 0) FROM round").fetchone()
    return int(newest_no) + 1


def newest_round_s(conn: sqlite3.Connection) -> dict[str, int]:
    """The newest `scheduled_at` by setting key, whatever became of that round."""
    rows = conn.execute(
        "SELECT asset, horizon_s, step_s, max(scheduled_at_s) FROM round GROUP BY asset, horizon_s, step_s"
    )
    return {Setting(*setting).key: scheduled_at_s for *setting, scheduled_at_s in rows}


def void_interrupted(conn: sqlite3.Connection, reason: str) -> list[str]:
    """Void the rounds that a crash left open; their `round_id`s."""
    rows = conn.execute("SELECT round_no FROM round WHERE status = 'open' ORDER BY scheduled_at_s").fetchall()
    return [close_round(conn, round_no, RoundStatus.VOID, reason, ()).round_id for (round_no,) in rows]


def close_round(
    conn: sqlite3.Connection,
    round_no: int,
    status: RoundStatus,
    reason: str | None,
    absent: Iterable[int],
) -> Round:
    """End an open round: count its answers, note the models (`model_no`) that were absent.

    A model with an answer row is not absent. A round that is not open any more is left as it is.
    """
    (is_open,) = conn.execute("SELECT status = 'open' FROM round WHERE round_no = ?", (round_no,)).fetchone()
    if is_open:
        asked = {
            no for (no,) in conn.execute("SELECT model_no FROM prediction WHERE round_no = ?", (round_no,))
        }
        missing = sorted(set(absent) - asked)
        conn.execute(
            "UPDATE round SET status = ?, reason = ?, absent = ?, absent_models = ? WHERE round_no = ?",
            (status.value, _text(reason), len(missing), json.dumps(missing, separators=(",", ":")), round_no),
        )
        _count_answers(conn, round_no)
    return select_rounds(conn, "round_no = ?", (round_no,))[0]


# Answers


def add_answers(conn: sqlite3.Connection, answers: Iterable[Answer]) -> int:
    """Store answers, their payloads compressed; how many were new. A model's first one in a round stands.

    The rounds must be stored and the statuses SUCCESS, FAILED or TIMEOUT; sqlite3.IntegrityError otherwise.
    """
    new = [answer for answer in answers if _insert_prediction(conn, answer)]
    kept = [
        (answer.round_no, answer.model_no, compress(answer.payload))
        for answer in new
        if answer.payload is not None
    ]
    conn.executemany("INSERT INTO payload (round_no, model_no, body) VALUES (?, ?, ?)", kept)
    conn.executemany(
        "UPDATE round SET has_payloads = 1 WHERE round_no = ? AND has_payloads = 0",
        {(round_no,) for round_no, _, _ in kept},
    )
    conn.executemany(
        "UPDATE model SET first_round_at_s = asked.scheduled_at_s "
        "FROM (SELECT scheduled_at_s FROM round WHERE round_no = ?) AS asked WHERE model_no = ? "
        "AND (first_round_at_s IS NULL OR first_round_at_s > asked.scheduled_at_s)",
        ((answer.round_no, answer.model_no) for answer in new),
    )
    return len(new)


def rounds_to_validate(conn: sqlite3.Connection, after_s: float, limit: int) -> list[Round]:
    """Closed rounds with `resolvable_at > after_s` whose answers nobody has looked into yet, the first to be
    resolved first. The earlier ones are looked into as they are scored.
    """
    return select_rounds(
        conn,
        "status = 'closed' AND validated = 0 AND resolvable_at_s > ? "
        "ORDER BY resolvable_at_s, round_no LIMIT ?",
        (after_s, limit),
    )


def not_validated(conn: sqlite3.Connection, round_nos: Iterable[int]) -> set[int]:
    """Those of the rounds whose answers nobody has looked into yet."""
    rows = conn.execute(
        "SELECT round_no FROM json_each(?) CROSS JOIN round ON round_no = value WHERE validated = 0",
        (json.dumps(list(round_nos)),),
    )
    return {round_no for (round_no,) in rows}


def payloads(conn: sqlite3.Connection, round_no: int) -> dict[int, bytes]:
    """By `model_no`, what the models with a valid answer sent, compressed, as far as it is still stored."""
    rows = conn.execute(
        "SELECT model_no, body FROM payload JOIN prediction USING (round_no, model_no) "
        "WHERE round_no = ? AND status = 'SUCCESS' ORDER BY model_no",
        (round_no,),
    )
    return dict(rows.fetchall())


def save_validation(conn: sqlite3.Connection, round_no: int, invalid: Mapping[int, str]) -> None:
    """Fail the answers that are not what was asked for; `invalid` has the reasons by `model_no`.

    The reasons come without the "invalid: " that `detail` begins with. A second call adds to the first.
    """
    conn.executemany(
        "UPDATE prediction SET status = 'FAILED', detail = ? "
        "WHERE round_no = ? AND model_no = ? AND status = 'SUCCESS'",
        ((_text(f"invalid: {reason}"), round_no, model_no) for model_no, reason in invalid.items()),
    )
    _count_answers(conn, round_no)
    conn.execute("UPDATE round SET validated = 1 WHERE round_no = ?", (round_no,))


def select_rounds(
    conn: sqlite3.Connection, condition: str, params: Sequence[object] | Mapping[str, object]
) -> list[Round]:
    """The rounds that meet a condition in SQL (of this package, never from outside)."""
    return [_round(*row) for row in conn.execute(_SELECT_ROUNDS + condition, params)]


# Rows


def _insert_round(conn: sqlite3.Connection, round_: Round) -> int | None:
    row = conn.execute(
        "INSERT INTO round (round_no, asset, horizon_s, step_s, scheduled_at_s, resolvable_at_s, "
        "performed_at_ms, status, reason) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) "
        "ON CONFLICT (asset, horizon_s, step_s, scheduled_at_s) DO NOTHING RETURNING round_no",
        (
            round_.round_no,
            round_.asset,
            round_.horizon_s,
            round_.step_s,
            round_.scheduled_at_s,
            round_.resolvable_at_s,
            round_.performed_at_ms,
            round_.status.value,
            _text(round_.reason),
        ),
    ).fetchone()
    return None if row is None else int(row[0])


def _insert_prediction(conn: sqlite3.Connection, answer: Answer) -> bool:
    cursor = conn.execute(
        "INSERT INTO prediction (round_no, model_no, status, detail, received_at_ms, exec_time_us) "
        "VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (round_no, model_no) DO NOTHING",
        (
            answer.round_no,
            answer.model_no,
            answer.status.value,
            _text(answer.detail),
            answer.received_at_ms,
            answer.exec_time_us,
        ),
    )
    return cursor.rowcount == 1


def _count_answers(conn: sqlite3.Connection, round_no: int) -> None:
    counts = dict(
        conn.execute(
            "SELECT status, count(*) FROM prediction WHERE round_no = ? GROUP BY status", (round_no,)
        )
    )
    conn.execute(
        "UPDATE round SET answered = ?, failed = ?, timed_out = ? WHERE round_no = ?",
        (
            counts.get(AnswerStatus.SUCCESS, 0),
            counts.get(AnswerStatus.FAILED, 0),
            counts.get(AnswerStatus.TIMEOUT, 0),
            round_no,
        ),
    )


def _model(row: Sequence[Any]) -> Model:
    model_no, model_id, name, cruncher_id, cruncher, deployment_id, code_hash, benchmark, *times = row
    info = ModelInfo(model_id, name, cruncher_id, cruncher, deployment_id, code_hash, bool(benchmark))
    return Model(model_no, info, *times)


def _round(asset: str, horizon_s: int, step_s: int, scheduled_at_s: int, status: str, *rest: Any) -> Round:
    return Round(asset, horizon_s, step_s, scheduled_at_s, RoundStatus(status), *rest)


def _text(value: str | None) -> str | None:
    """Text that SQLite takes: a lone surrogate, as a name or reason from outside may hold, becomes "?"."""
    return value if value is None or value.isascii() else value.encode("utf-8", "replace").decode()
