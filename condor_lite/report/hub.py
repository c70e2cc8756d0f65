"""Family 1: what the CrunchDAO hub and its coordinator web app call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from sqlite3 import Row
from typing import Literal

from condor_lite.config import Config
from condor_lite.report import params
from condor_lite.report.answers import (
    FeedPointRow,
    FeedRow,
    PredictionRow,
    SettingSnapshotRow,
    SnapshotRow,
    horizon_label,
    moment,
    naive_moment,
)
from condor_lite.report.charts import REPORT_SCHEMA
from condor_lite.report.context import Context
from condor_lite.report.game import round_id
from condor_lite.report.params import BadParameter
from condor_lite.report.replies import Reply, pack
from condor_lite.storage import queries

KIND = "price"
DEFAULT_RANGE_S = 30 * 86400

_BRIEFLY_S = 2
_SCHEMA_FOR_S = 3600
_FEEDS_FOR_S = 15.0  # counting all prices takes a while
_STATUS_REASONS = {"FAILED": "the call failed", "TIMEOUT": "no answer within the round's deadline"}


async def models(context: Context, sent: params.NoParams) -> Reply:
    """All models that ever took part."""
    return (await context.ready()).hub_models


async def leaderboard(context: Context, sent: params.NoParams) -> Reply:
    """All models in rank order, with their scores in every window."""
    return (await context.ready()).hub_leaderboard


@dataclass(frozen=True, slots=True)
class SnapshotParams:
    project_ids: tuple[str, ...] | None = field(
        default=None, metadata=params.ids("projectIds", "model ids; without it all models")
    )
    start: float | None = field(
        default=None, metadata=params.instant("30 days before the end, where it is left out")
    )
    end: float | None = field(default=None, metadata=params.instant("now, where it is left out"))
    limit: int = field(
        default=10_000, metadata=params.whole(1, 20_000, "longer lines are thinned to about so many rows")
    )


async def snapshots(context: Context, sent: SnapshotParams) -> Reply:
    """The models' overall scores over time, oldest first."""
    return await _snapshots(context, sent, "leaderboard", _snapshot_row)


async def setting_snapshots(context: Context, sent: SnapshotParams) -> Reply:
    """The models' scores by setting over time, oldest first."""
    return await _snapshots(context, sent, "snapshot", _setting_snapshot_row)


@dataclass(frozen=True, slots=True)
class PredictionsParams:
    project_ids: tuple[str, ...] | None = field(
        default=None, metadata=params.ids("projectIds", "model ids; without it all models")
    )
    start: float | None = field(
        default=None, metadata=params.instant("30 days before the end, where it is left out")
    )
    end: float | None = field(default=None, metadata=params.instant("now, where it is left out"))
    limit: int = field(default=1000, metadata=params.whole(1, 10_000, "the newest are kept"))
    before: params.Cursor | None = field(
        default=None,
        metadata=params.cursor(
            "rounds scheduled before this time, or what the last page's X-Next-Before said"
        ),
    )


async def predictions(context: Context, sent: PredictionsParams) -> Reply:
    """What the models answered and how it was scored, oldest first; of more than `limit` the newest."""
    start_s, end_s = _range(context, sent.start, sent.end)
    before = None
    if sent.before is not None:
        if sent.before.round_no is None:
            end_s = min(end_s, sent.before.at_s - 1e-3)
        else:
            before = (sent.before.round_no, sent.before.model_no or 0)
    numbers = await _chosen(context, sent.project_ids)
    async with context.large():
        found = await queries.predictions(context.readers, numbers, start_s, end_s, sent.limit + 1, before)
        headers = {}
        if len(found) > sent.limit:
            del found[sent.limit :]
            last = found[-1]
            headers["x-next-before"] = f"{last['scheduled_at_s']}_{last['round_no']}_{last['model_no']}"
        return await context.rows(
            found,
            _prediction_row,
            _BRIEFLY_S,
            headers,
            order=lambda row: (row["scheduled_at_s"], row["round_no"], row["model_no"]),
        )


async def schema(context: Context, sent: params.NoParams) -> Reply:
    """How the web app shows all this."""
    return _SCHEMA_REPLY


async def feeds(context: Context, sent: params.NoParams) -> Reply:
    """The stored prices, by asset and source."""
    return await context.remembered("feeds", _FEEDS_FOR_S, partial(_feeds, context))


@dataclass(frozen=True, slots=True)
class TailParams:
    source: str | None = field(default=None, metadata=params.word())
    subject: str | None = field(default=None, metadata=params.word("an asset; without it all"))
    kind: str | None = field(default=None, metadata=params.word())
    granularity: str | None = field(default=None, metadata=params.word())
    limit: int = field(default=20, metadata=params.whole(1, 1000))


async def feed_tail(context: Context, sent: TailParams) -> Reply:
    """The newest prices, newest first."""
    config = context.live.config
    granularity = _granularity(config)
    if sent.kind not in (None, KIND) or sent.granularity not in (None, granularity):
        return pack([], _BRIEFLY_S)
    subjects = config.game.assets if sent.subject is None else (sent.subject,)
    rows: list[Row] = []
    for subject in subjects:
        rows += await queries.feed_tail(context.readers, subject, sent.source, sent.limit)
    rows.sort(key=lambda row: row["ts_s"], reverse=True)
    del rows[sent.limit :]
    return await context.rows(rows, partial(_feed_point_row, granularity), _BRIEFLY_S)


async def _snapshots(
    context: Context,
    sent: SnapshotParams,
    table: Literal["leaderboard", "snapshot"],
    to_row: Callable[[Row], object],
) -> Reply:
    start_s, end_s = _range(context, sent.start, sent.end)
    numbers = await _chosen(context, sent.project_ids)
    spacing_s = context.live.config.scoring.snapshot_interval_s
    async with context.large():
        found = await queries.snapshots(
            context.readers, table, numbers, start_s, end_s, sent.limit, spacing_s
        )
        found.reverse()
        return await context.rows(found, to_row, context.max_age_s)


async def _chosen(context: Context, project_ids: Sequence[str] | None) -> list[int] | None:
    """The `model_no`s that a request means; None: all."""
    if project_ids is None:
        return None
    by_id = (await context.ready()).by_id
    return [by_id[model_id].model.model_no for model_id in project_ids if model_id in by_id]


def _range(context: Context, start_s: float | None, end_s: float | None) -> tuple[float, float]:
    if end_s is None:
        end_s = max(context.live.clock.now(), start_s or 0.0)
    if start_s is None:
        start_s = end_s - DEFAULT_RANGE_S
    if start_s > end_s:
        raise BadParameter("start must not be after end")
    return start_s, end_s


async def _feeds(context: Context) -> Reply:
    granularity = _granularity(context.live.config)
    newest = {(state.source, state.asset): state.newest_ts_s for state in context.live.feeds()}
    rows, stored = [], set()
    for row in await queries.feeds(context.readers):
        stored.add(row["asset"])
        newest_s = newest.get((row["source"], row["asset"])) or row["newest_s"]
        rows.append(
            FeedRow(
                source=row["source"],
                subject=row["asset"],
                kind=KIND,
                granularity=granularity,
                record_count=row["points"],
                oldest_ts=moment(row["oldest_s"]),
                newest_ts=moment(row["newest_s"]),
                watermark_ts=moment(newest_s),
                watermark_updated_at=moment(row["ingested_at_ms"] // 1000),
            )
        )
    rows += [
        FeedRow(
            source=source,
            subject=asset,
            kind=KIND,
            granularity=granularity,
            record_count=0,
            oldest_ts=None,
            newest_ts=None,
            watermark_ts=None if newest_s is None else moment(newest_s),
            watermark_updated_at=None,
        )
        for (source, asset), newest_s in newest.items()
        if asset not in stored
    ]
    return pack(rows, _BRIEFLY_S)


def _granularity(config: Config) -> str:
    return horizon_label(config.feed.tick_s)


def _snapshot_row(row: Row) -> SnapshotRow:
    return SnapshotRow(
        row["model_id"],
        row["score_recent"],
        row["score_steady"],
        row["score_anchor"],
        naive_moment(row["at_s"]),
        row["scorer_version"],
    )


def _setting_snapshot_row(row: Row) -> SettingSnapshotRow:
    return SettingSnapshotRow(
        row["model_id"],
        f"{row['asset']}-{row['horizon_s']}-{row['step_s']}",
        row["asset"],
        row["horizon_s"],
        row["step_s"],
        row["score_recent"],
        row["score_steady"],
        row["score_anchor"],
        naive_moment(row["at_s"]),
        row["scorer_version"],
    )


def _prediction_row(row: Row) -> PredictionRow:
    reason = _failed_reason(row)
    return PredictionRow(
        model_id=row["model_id"],
        param=f"{row['asset']}-{row['horizon_s']}-{row['step_s']}",
        asset=row["asset"],
        horizon=row["horizon_s"],
        step=row["step_s"],
        score_value=row["score"],
        score_failed=reason is not None,
        score_failed_reason=reason,
        scored_at=None if row["scored_at_ms"] is None else naive_moment(row["scored_at_ms"] // 1000),
        performed_at=naive_moment(
            row["scheduled_at_s"] if row["performed_at_ms"] is None else row["performed_at_ms"] // 1000
        ),
        round_id=round_id(row),
        status=row["answer_status"],
        raw_score=row["raw"],
        exec_time_us=row["exec_time_us"],
        scorer_version=row["scorer_version"],
    )


def _failed_reason(row: Row) -> str | None:
    """Why there is no score of the model's own and will be none; None where there is one, or may be yet."""
    if row["answer_status"] != "SUCCESS":
        return row["detail"] or _STATUS_REASONS[row["answer_status"]]
    if row["status"] == "void":
        return f"the round is void: {row['reason']}"
    if row["status"] == "scored" and row["raw"] is None:
        return row["detail"] or "the answer could not be scored"
    return None


def _feed_point_row(granularity: str, row: Row) -> FeedPointRow:
    return FeedPointRow(
        source=row["source"],
        subject=row["asset"],
        kind=KIND,
        granularity=granularity,
        ts_event=moment(row["ts_s"]),
        ts_ingested=moment(row["ingested_at_ms"] / 1000),
        values={"price": row["price"]},
        meta={},
    )


_SCHEMA_REPLY = pack(REPORT_SCHEMA, _SCHEMA_FOR_S)
