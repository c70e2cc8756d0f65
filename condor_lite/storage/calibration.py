"""The sums that calibration is computed from: a row for each (scorer, setting, model, hour).

They are added to in the transaction that stores a round's scores, so that a round counts once, and need no
answers that are gone by now. Functions run inside `Database.write` or `Database.read`; the first argument is
the connection.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import orjson

from condor_lite.game.calibration import (
    BINS,
    PIT,
    SEGMENTS,
    SPREAD,
    WIDTH,
    BriefRows,
    RoundCalibration,
)
from condor_lite.game.entities import Setting
from condor_lite.storage.database import Readers

_BINS = np.dtype("<f8")
_HOUR_S = 3600


def add_calibration(
    conn: sqlite3.Connection, round_no: int, scorer_version: int, added: RoundCalibration
) -> npt.NDArray[np.float64]:
    """Add a round to its models' sums; only along with its scores. Returns by model how many segment times it
    had that were not counted before, float64[models].
    """
    *setting, resolvable_at_s = conn.execute(
        "SELECT asset, horizon_s, step_s, resolvable_at_s FROM round WHERE round_no = ?", (round_no,)
    ).fetchone()
    hour_s = resolvable_at_s // _HOUR_S * _HOUR_S
    sums, times = added.sums.copy(), np.zeros(len(added.model_no))
    newest_s = int(added.ends_s[-1]) if len(added.ends_s) else resolvable_at_s
    rows = []
    for at, model_no in enumerate(added.model_no):
        key = (scorer_version, *setting, int(model_no))
        # The model's newest hour so far: this one or an earlier one.
        before = conn.execute(
            "SELECT hour_s, times, until_s, segments, pit, spread, bins FROM calibration WHERE "
            "scorer_version = ? AND asset = ? AND horizon_s = ? AND step_s = ? AND model_no = ? "
            "AND hour_s <= ? ORDER BY hour_s DESC LIMIT 1",
            (*key, hour_s),
        ).fetchone()
        until_s, counted = newest_s, 0
        times[at] = added.new_times(before[2] if before else None)
        if before:
            until_s = max(until_s, before[2])
            if before[0] == hour_s:
                counted = before[1]
                sums[at] += sums_of([before])[0]
        rows.append(
            (
                *key,
                hour_s,
                counted + int(times[at]),
                until_s,
                int(sums[at, SEGMENTS]),
                float(sums[at, PIT]),
                float(sums[at, SPREAD]) if np.isfinite(sums[at, SPREAD]) else None,
                sums[at, :BINS].astype(_BINS).tobytes(),
            )
        )
    conn.executemany("INSERT OR REPLACE INTO calibration VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)
    return times


def carry_over(conn: sqlite3.Connection, round_no: int, from_version: int, to_version: int) -> None:
    """Give the models of a round that can't be scored again the sums of its hour, under this version too.

    Only where no round of that setting and hour can be: an hour's sums can't be taken apart.
    """
    conn.execute(
        "INSERT INTO calibration SELECT ?, c.asset, c.horizon_s, c.step_s, c.model_no, c.hour_s, c.times, "
        "c.until_s, c.segments, c.pit, c.spread, c.bins "
        "FROM round CROSS JOIN score USING (round_no) CROSS JOIN calibration c "
        "ON c.scorer_version = score.scorer_version AND c.asset = round.asset "
        "AND c.horizon_s = round.horizon_s AND c.step_s = round.step_s AND c.model_no = score.model_no "
        "AND c.hour_s = resolvable_at_s / ? * ? "
        "WHERE round_no = ? AND score.scorer_version = ? AND NOT EXISTS ("
        "SELECT 1 FROM round other WHERE other.asset = round.asset AND other.horizon_s = round.horizon_s "
        "AND other.step_s = round.step_s AND other.has_payloads "
        "AND other.resolvable_at_s >= (SELECT since_s FROM rescore WHERE scorer_version = ?) "
        "AND other.scheduled_at_s BETWEEN c.hour_s - round.horizon_s AND c.hour_s - round.horizon_s + ?) "
        "ON CONFLICT DO NOTHING",
        (to_version, _HOUR_S, _HOUR_S, round_no, from_version, to_version, _HOUR_S - 1),
    )


def load_brief_rows(
    conn: sqlite3.Connection,
    scorer_version: int,
    setting: Setting,
    models: tuple[int, int],
    since_s: float,
) -> BriefRows:
    """What the leaderboard needs of a setting: the hours `hour_s >= since_s` of the models with the first
    `model_no` to the last, both included.
    """
    # By the key, model after model (the + keeps the bounds from being used instead). SQLite makes lists of
    # the columns: a million rows that become objects cost more, and hold up the other threads meanwhile.
    *columns, ends = conn.execute(
        "SELECT json_group_array(c.hour_s), json_group_array(c.model_no), json_group_array(c.times), "
        "json_group_array(c.segments), json_group_array(c.pit), "
        "coalesce(group_concat(hex(substr(c.bins, 1, 8)) || hex(substr(c.bins, -8)), ''), '') "
        "FROM model CROSS JOIN calibration c "
        "ON c.scorer_version = ? AND c.asset = ? AND c.horizon_s = ? AND c.step_s = ? "
        "AND c.model_no = model.model_no AND c.hour_s >= ? WHERE +model.model_no BETWEEN ? AND ?",
        (scorer_version, setting.asset, setting.horizon_s, setting.step_s, since_s, *models),
    ).fetchone()
    hour_s, model_no, times, segments, pit = map(orjson.loads, columns)
    outer = np.frombuffer(bytes.fromhex(ends), _BINS).reshape(-1, 2).sum(axis=1)
    count = np.array(segments, np.float64)
    return BriefRows(
        setting_key=setting.key,
        hour=np.array(hour_s, np.int64) // _HOUR_S,
        model_no=np.array(model_no, np.int64),
        times=np.array(times, np.float64),
        segments=count,
        inside_90=count - outer,
        pit=np.array(pit, np.float64),
    )


async def of_model(
    readers: Readers, scorer_version: int, model_no: int, settings: Sequence[Setting], since_s: float
) -> list[sqlite3.Row]:
    """One model's rows in these settings, from the hour `since_s` on; for `sums_of`."""
    return await readers.fetch(
        "SELECT c.asset, c.horizon_s, c.step_s, hour_s, times, segments, pit, spread, bins "
        "FROM json_each(?) setting CROSS JOIN calibration c ON c.scorer_version = ? "
        "AND c.asset = setting.value ->> 0 AND c.horizon_s = setting.value ->> 1 "
        "AND c.step_s = setting.value ->> 2 AND c.model_no = ? AND c.hour_s >= ?",
        (
            json.dumps([(setting.asset, setting.horizon_s, setting.step_s) for setting in settings]),
            scorer_version,
            model_no,
            since_s,
        ),
    )


def sums_of(rows: Sequence[sqlite3.Row]) -> npt.NDArray[np.float64]:
    """The sums of game/calibration.py: float64[rows, WIDTH]. A row ends in segments, pit, spread and bins."""
    sums = np.empty((len(rows), WIDTH))
    for at, row in enumerate(rows):
        segments, pit, spread, bins = row[-4:]
        sums[at, :BINS] = np.frombuffer(bins, _BINS)
        sums[at, BINS:] = segments, pit, np.inf if spread is None else spread
    return sums
