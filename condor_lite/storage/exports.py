"""What `export` reads: whole tables, row by row, in the order of time. The first argument is a connection.

It must be in autocommit mode: rows are read in pages, each of one moment and in a transaction of its own, so
that nothing is held from the game for long. What is newer than the beginning is left out.
"""

# ruff: noqa: S608  (only constants are put together)
from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import orjson

from condor_lite.storage.compression import restored
from condor_lite.storage.queries import ANSWER, NEWEST, RESULT

Row = tuple[Any, ...]

PAGE_ROWS = 10_000
_PAGE_PAYLOADS = 200  # which may be large


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a file. Times are integers since the epoch, in the unit that `kind` names."""

    name: str
    kind: Literal["text", "integer", "number", "seconds", "milliseconds"]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be exported: `since_s <= time <= until_s`, of some assets and models (empty: of all)."""

    since_s: float
    until_s: float
    assets: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    payloads: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """One file's worth. `time`: the place of the column, in seconds, that rows are chosen and sorted by.

    `changes`: how often the prices go from one source over to another.
    """

    name: str
    columns: tuple[Column, ...]
    time: int
    count: int
    rows: Callable[[], Iterator[Row]]
    changes: int = 0


_Selected = tuple[tuple[Column, str], ...]  # with the SQL that gives them

_ROUND_ID = "r.asset || '-' || r.horizon_s || '-' || r.step_s || '-' || r.scheduled_at_s"
_ROUND = (
    (Column("round_id", "text"), _ROUND_ID),
    (Column("asset", "text"), "r.asset"),
    (Column("horizon", "integer"), "r.horizon_s"),
    (Column("step", "integer"), "r.step_s"),
    (Column("scheduled_at", "seconds"), "r.scheduled_at_s"),
    (Column("model_id", "text"), "m.model_id"),
)
_PREDICTION = (
    *_ROUND,
    (Column("status", "text"), ANSWER),  # three columns at once
    (Column("detail", "text"), ""),
    (Column("scorer_version", "integer"), ""),
    (Column("received_at", "milliseconds"), "p.received_at_ms"),
    (Column("exec_time_us", "integer"), "p.exec_time_us"),
    (Column("raw_score", "number"), "s.raw"),
    (Column("score", "number"), "s.score"),
)
_SCORE = (
    *_ROUND,
    (Column("resolvable_at", "seconds"), "r.resolvable_at_s"),
    (Column("scored_at", "milliseconds"), "q.scored_at_ms"),
    (Column("scorer_version", "integer"), "coalesce(q.carried_from, q.scorer_version)"),
    (Column("median", "number"), "q.median"),
    (Column("no_move", "number"), "q.no_move"),
    (Column("resolved", "integer"), "q.resolved"),
    (Column("raw_score", "number"), "s.raw"),
    (Column("counted_score", "number"), "s.counted"),
    (Column("score", "number"), "s.score"),
    (Column("detail", "text"), "s.detail"),
)
_STANDING = (
    (Column("created_at", "seconds"), "t.created_at_s"),
    (Column("rank", "integer"), "t.rank"),
    (Column("model_id", "text"), "m.model_id"),
    (Column("model_name", "text"), "m.model_name"),
    (Column("cruncher_name", "text"), "m.cruncher_name"),
    (Column("score_recent", "number"), "t.score_recent"),
    (Column("score_steady", "number"), "t.score_steady"),
    (Column("score_anchor", "number"), "t.score_anchor"),
    (Column("scorer_version", "integer"), "t.scorer_version"),
)
_DENSITIES = (Column("densities", "text"), "payload.body")
_PRICE = ((Column("timestamp", "integer"), "ts_s"), (Column("close", "number"), "price"))
_BY_ROUND = ("r.scheduled_at_s", "r.round_no")
_OF_ROUNDS = "r.scheduled_at_s BETWEEN :since AND :until"
_OF_ASSETS = "(:assets = '[]' OR r.asset IN (SELECT value FROM json_each(:assets)))"
_OF_MODELS = "(:models = '[]' OR m.model_id IN (SELECT value FROM json_each(:models)))"


def prices(conn: sqlite3.Connection, wanted: Wanted) -> list[Table]:
    """Each asset's prices, as a replay reads them; assets without any are left out."""
    of_asset = "FROM price r WHERE asset = :asset AND ts_s BETWEEN :since AND :until"
    counts = conn.execute(
        f"SELECT asset, count(*), max(ts_s) FROM price r WHERE ts_s BETWEEN :since AND :until "
        f"AND {_OF_ASSETS} GROUP BY asset ORDER BY asset",
        _parameters(wanted),
    ).fetchall()
    tables = []
    for asset, count, until_s in counts:
        parameters = {**_parameters(wanted), "asset": asset, "until": until_s}
        (changes,) = conn.execute(
            "SELECT count(*) FROM (SELECT source, lag(source) OVER (ORDER BY ts_s) AS before "
            f"{of_asset}) WHERE source != before",
            parameters,
        ).fetchone()
        rows = _reader(conn, _PRICE, of_asset, ("ts_s",), parameters)
        tables.append(Table(asset, _columns(_PRICE), 0, count, rows, changes))
    return tables


def leaderboard(conn: sqlite3.Connection, wanted: Wanted) -> list[Table]:
    """The leaderboards that were kept (every `scoring.snapshot_interval`), a row a model and time."""
    rows = (
        "FROM leaderboard t INDEXED BY leaderboard_by_time CROSS JOIN model m ON m.model_no = t.model_no "
        f"WHERE t.created_at_s BETWEEN :since AND :until AND {_OF_MODELS}"
    )
    return _table(conn, "leaderboard", _STANDING, 0, wanted, rows, ("t.created_at_s", "t.model_no"))


def scores(conn: sqlite3.Connection, wanted: Wanted) -> list[Table]:
    """The scores that count, a row a round and model; also of those that were absent or failed."""
    rows = (
        f"FROM round r CROSS JOIN round_score q ON q.round_no = r.round_no AND q.scorer_version = {NEWEST} "
        "CROSS JOIN score s ON s.round_no = q.round_no AND s.scorer_version = q.scorer_version "
        f"CROSS JOIN model m ON m.model_no = s.model_no WHERE {_OF_ROUNDS} AND {_OF_ASSETS} AND {_OF_MODELS}"
    )
    return _table(conn, "scores", _SCORE, 4, wanted, rows, (*_BY_ROUND, "s.model_no"))


def predictions(conn: sqlite3.Connection, wanted: Wanted) -> list[Table]:
    """Who was asked in each round, and what came of it; with `payloads`, the densities as they were sent."""
    columns: _Selected = _PREDICTION
    payload = ""
    if wanted.payloads:
        columns = (*columns, _DENSITIES)
        payload = "LEFT JOIN payload ON payload.round_no = p.round_no AND payload.model_no = p.model_no"
    rows = (
        "FROM round r CROSS JOIN prediction p ON p.round_no = r.round_no "
        f"CROSS JOIN model m ON m.model_no = p.model_no {RESULT} {payload} "
        f"WHERE {_OF_ROUNDS} AND {_OF_ASSETS} AND {_OF_MODELS}"
    )
    return _table(conn, "predictions", columns, 4, wanted, rows, (*_BY_ROUND, "p.model_no"))


def _table(
    conn: sqlite3.Connection,
    name: str,
    columns: _Selected,
    time: int,
    wanted: Wanted,
    rows: str,
    key: tuple[str, ...],
) -> list[Table]:
    parameters = _parameters(wanted)
    count, parameters["until"] = conn.execute(f"SELECT count(*), max({key[0]}) {rows}", parameters).fetchone()
    read = _reader(conn, columns, rows, key, parameters)
    return [Table(name, _columns(columns), time, count, read)] if count else []


def _reader(
    conn: sqlite3.Connection,
    columns: _Selected,
    rows: str,
    key: tuple[str, ...],
    parameters: dict[str, object],
) -> Callable[[], Iterator[Row]]:
    """`key` tells rows apart and orders them, the time, which is bound as `:since`, first."""
    expressions = ", ".join(expression for _, expression in columns if expression)
    payloads = _DENSITIES in columns
    by = ", ".join(key)
    last = [f":last_{place}" for place in range(len(key))]
    behind = f"AND ({by}) > ({', '.join(last)})"
    limit = min(PAGE_ROWS, _PAGE_PAYLOADS) if payloads else PAGE_ROWS

    def read() -> Iterator[Row]:
        more: dict[str, object] = {}
        while True:
            page = conn.execute(
                f"SELECT {expressions}, {by} {rows} {behind if more else ''} ORDER BY {by} LIMIT {limit}",
                {**parameters, **more},
            ).fetchall()
            for row in page:
                values = row[: -len(key)]
                yield (*values[:-1], _whole(values)) if payloads else values
            if len(page) < limit:
                return
            reached = page[-1][-len(key) :]
            more = {"since": reached[0], **{f"last_{place}": value for place, value in enumerate(reached)}}

    return read


def _whole(row: Row) -> str | None:
    """The answer in a row's last column, as it was sent."""
    body = row[-1]
    return None if body is None else restored(body, f"{row[5]} in {row[0]}").decode(errors="replace")


def _columns(columns: _Selected) -> tuple[Column, ...]:
    return tuple(column for column, _ in columns)


def _parameters(wanted: Wanted) -> dict[str, object]:
    return {
        "since": wanted.since_s,
        "until": wanted.until_s,
        "assets": orjson.dumps(wanted.assets).decode(),
        "models": orjson.dumps(wanted.models).decode(),
    }
