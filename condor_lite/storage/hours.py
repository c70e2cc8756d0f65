"""The window sums of past hours, kept so that a start need not read a week of scores.

They are a shortcut, no evidence: what is kept of an hour counts while it holds as many rounds as are scored,
otherwise the hour is summed from its scores. Who gives `Sum` or `BriefSums` another meaning empties the table
in a migration. Functions run inside `Database.write` or `Database.read`; the first argument is the
connection.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence

import numpy as np
import zstandard

from condor_lite.game.entities import Setting
from condor_lite.game.windows import HOUR_S, HourSums, Sum

_NUMBERS, _SUMS, _BRIEFS = np.dtype("<i8"), np.dtype("<f8"), np.dtype("<f4")
_BRIEF_SUMS = 4


def save_hours(
    conn: sqlite3.Connection, scorer_version: int, benchmark: int | None, hours: Iterable[HourSums]
) -> None:
    """Keep these sums, in the place of older ones; `benchmark` is the one that skill is measured against."""
    compressor = zstandard.ZstdCompressor(level=1)
    conn.executemany(
        "INSERT OR REPLACE INTO hour_sum (scorer_version, asset, horizon_s, step_s, hour_s, rounds, "
        "benchmark, models, sums) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            (
                scorer_version,
                *_parts(hour.setting),
                hour.hour * HOUR_S,
                hour.rounds,
                benchmark,
                len(hour.model_no),
                compressor.compress(
                    b"".join(
                        column.astype(kind).tobytes()
                        for column, kind in (
                            (hour.model_no, _NUMBERS),
                            (hour.sums, _SUMS),
                            (hour.briefs, _BRIEFS),
                        )
                    )
                ),
            )
            for hour in hours
        ),
    )


def hours_to_sum(
    conn: sqlite3.Connection,
    scorer_version: int,
    benchmark: int | None,
    settings: Sequence[Setting],
    since_s: float,
) -> set[int]:
    """The hours (`hour_s >= since_s`) of which, for one of these settings, not as many rounds are kept as are
    scored.
    """
    asked = {_parts(setting) for setting in settings}
    scored = conn.execute(
        "SELECT asset, horizon_s, step_s, resolvable_at_s / ? * ? AS hour_s, count(*) "
        "FROM round CROSS JOIN round_score USING (round_no) "
        "WHERE status = 'scored' AND resolvable_at_s >= ? AND scorer_version = ? GROUP BY 1, 2, 3, 4",
        (HOUR_S, HOUR_S, since_s, scorer_version),
    )
    kept = conn.execute(
        "SELECT asset, horizon_s, step_s, hour_s, rounds FROM hour_sum "
        "WHERE scorer_version = ? AND hour_s >= ? AND benchmark IS ?",
        (scorer_version, since_s, benchmark),
    )
    return {row[3] for row in set(scored) ^ set(kept) if row[:3] in asked}


def load_hours(
    conn: sqlite3.Connection, scorer_version: int, settings: Sequence[Setting], hour_s: int
) -> list[HourSums]:
    """What is kept of an hour."""
    asked = {_parts(setting): setting for setting in settings}
    decompressor = zstandard.ZstdDecompressor()
    return [
        _hour(asked[parts], hour_s // HOUR_S, models, decompressor.decompress(sums))
        for *key, models, sums in conn.execute(
            "SELECT asset, horizon_s, step_s, models, sums FROM hour_sum "
            "WHERE scorer_version = ? AND hour_s = ?",
            (scorer_version, hour_s),
        )
        if (parts := tuple(key)) in asked
    ]


def _hour(setting: Setting, hour: int, models: int, content: bytes) -> HourSums:
    sums_at = models * _NUMBERS.itemsize
    briefs_at = sums_at + len(Sum) * (1 + models) * _SUMS.itemsize
    return HourSums(
        setting,
        hour,
        np.frombuffer(content[:sums_at], _NUMBERS),
        np.frombuffer(content[sums_at:briefs_at], _SUMS).reshape(len(Sum), -1),
        np.frombuffer(content[briefs_at:], _BRIEFS).reshape(_BRIEF_SUMS, -1),
    )


def _parts(setting: Setting) -> tuple[str, int, int]:
    return setting.asset, setting.horizon_s, setting.step_s
