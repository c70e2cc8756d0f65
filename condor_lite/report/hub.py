"""Family 1: what the CrunchDAO hub and its coordinator web app call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
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
from condor_lite.report.params import BadParameter
from condor_lite.report.replies import Reply, pack
from condor_lite.storage import queries

KIND = "price"
DEFAULT_RANGE_S = 30 * 86400

_BRIEFLY_S = 2
_SCHEMA_FOR_S = 3600
_FEEDS_FOR_S = 15.0  # counting all prices takes a while
_AS_SCHEDULED = itemgetter(4, -2, -1)  # the time, the round's number, the model's
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
    """What the models answered and how it was scored, oldest first: the newest that there is room for."""
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
            order=_AS_SCHEDULED,
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
    model_id, version, at_s, recent, steady, anchor = row
    return SnapshotRow(model_id, recent, steady, anchor, naive_moment(at_s), version)


def _setting_snapshot_row(row: Row) -> SettingSnapshotRow:
    model_id, version, at_s, recent, steady, anchor, asset, horizon_s, step_s = row
    param = f"{asset}-{horizon_s}-{step_s}"
    return SettingSnapshotRow(
        model_id, param, asset, horizon_s, step_s, recent, steady, anchor, naive_moment(at_s), version
    )


def _prediction_row(row: Row) -> PredictionRow:
    (  # by place: looking names up takes longer than all the rest
        model_id,
        asset,
        horizon_s,
        step_s,
        scheduled_at_s,
        performed_at_ms,
        round_status,
        round_reason,
        status,
        detail,
        version,
        exec_time_us,
        scored_at_ms,
        raw,
        score,
        *_,
    ) = row
    param = f"{asset}-{horizon_s}-{step_s}"
    reason = None
    if raw is None or round_status == "void":
        reason = _failed_reason(status, detail, round_status, round_reason)
    return PredictionRow(
        model_id,
        param,
        asset,
        horizon_s,
        step_s,
        score,
        reason is not None,
        reason,
        None if scored_at_ms is None else naive_moment(scored_at_ms // 1000),
        naive_moment(scheduled_at_s if performed_at_ms is None else performed_at_ms // 1000),
        f"{param}-{scheduled_at_s}",
        status,
        raw,
        exec_time_us,
        version,
    )


def _failed_reason(
    status: str, detail: str | None, round_status: str, round_reason: str | None
) -> str | None:
    """Why there is no score of the model's own and will be none; None where there may be one yet."""
    if status != "SUCCESS":
        return detail or _STATUS_REASONS[status]
    if round_status == "void":
        return f"the round is void: {round_reason}"
    if round_status == "scored":
        return detail or "the answer could not be scored"
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
