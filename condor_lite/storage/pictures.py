"""What the report's charts are drawn from: prices, thinned by seeking, and the answers of chosen models.

Times are epoch seconds.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

import orjson

from condor_lite.storage.database import Readers

MOST_POINTS = 1000


async def price_path(
    readers: Readers, asset: str, until_s: int, spacing_s: int, points: int
) -> list[tuple[int, float]]:
    """The last price of each of the `points` (at most 1000) spans of `spacing_s` that end at `until_s`, those
    without one left out; oldest first. Each span is one look-up, however many prices are in it.
    """
    points = min(points, MOST_POINTS)
    rows = await readers.fetch(
        """
        WITH RECURSIVE span(end_s) AS (
            SELECT ? UNION ALL SELECT end_s + ? FROM span WHERE end_s < ?
        )
        SELECT p.ts_s, p.price FROM span CROSS JOIN price p ON p.asset = ? AND p.ts_s = (
            SELECT max(ts_s) FROM price WHERE asset = ? AND ts_s > span.end_s - ? AND ts_s <= span.end_s
        )
        """,
        (until_s - spacing_s * (points - 1), spacing_s, until_s, asset, asset, spacing_s),
    )
    return [(row["ts_s"], row["price"]) for row in rows]


async def price_count(readers: Readers, asset: str, after_s: int, until_s: int) -> int:
    """How many prices are stored with `after_s < ts <= until_s`; the caller bounds the time."""
    ((count,),) = await readers.fetch(
        "SELECT count(*) FROM price WHERE asset = ? AND ts_s > ? AND ts_s <= ?", (asset, after_s, until_s)
    )
    return int(count)


async def answer_bodies(readers: Readers, round_no: int, model_nos: Sequence[int]) -> dict[int, bytes]:
    """What these models answered, compressed, by `model_no`, as far as it is stored."""
    rows = await readers.fetch(
        "SELECT model_no, body FROM payload WHERE round_no = ? "
        "AND model_no IN (SELECT value FROM json_each(?))",
        (round_no, orjson.dumps(list(model_nos)).decode()),
    )
    return {row["model_no"]: row["body"] for row in rows}


async def scorer(readers: Readers, scorer_version: int) -> sqlite3.Row:
    """The `rule`, the `target` and the `rules` (JSON, may be NULL) of a scorer."""
    (row,) = await readers.fetch(
        "SELECT rule, target, rules FROM scorer WHERE scorer_version = ?", (scorer_version,)
    )
    return row
