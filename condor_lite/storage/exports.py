"""What `export` reads: whole tables, row by row, on one snapshot."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator


def price_counts(conn: sqlite3.Connection, since_s: float, until_s: float) -> dict[str, int]:
    """How many prices each asset has with `since_s <= ts <= until_s`; assets without any are left out."""
    return dict(
        conn.execute(
            "SELECT asset, count(*) FROM price WHERE ts_s BETWEEN ? AND ? GROUP BY asset ORDER BY asset",
            (since_s, until_s),
        )
    )


def prices(
    conn: sqlite3.Connection, asset: str, since_s: float, until_s: float
) -> Iterator[tuple[int, float, str]]:
    """One asset's `(ts_s, price, source)` with `since_s <= ts <= until_s`, ascending."""
    yield from conn.execute(
        "SELECT ts_s, price, source FROM price WHERE asset = ? AND ts_s BETWEEN ? AND ? ORDER BY ts_s",
        (asset, since_s, until_s),
    )
