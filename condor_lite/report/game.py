"""Family 2: the game's own endpoints: leaderboard, models, statistics and rounds."""

from __future__ import annotations

import csv
import io
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field, fields
from sqlite3 import Row

from condor_lite.explain import RoundKey, parse_round_id
from condor_lite.game.entities import RoundStatus, Setting, Standing, Window, WindowScores
from condor_lite.report import params
from condor_lite.report.answers import (
    Deployment,
    LeaderboardRow,
    ModelMetrics,
    OverallScores,
    RecentPrediction,
    RoundDetail,
    RoundPrediction,
    RoundRow,
    Statistics,
    horizon_label,
    moment,
    moment_of_ms,
)
from condor_lite.report.calibration import calibrations
from condor_lite.report.context import Context, NotFound
from condor_lite.report.ready import (
    DEFAULT_LIMIT,
    ReadyMade,
    leaderboard_row,
    one_digit,
    status,
    window_leaderboard,
)
from condor_lite.report.replies import Reply, pack
from condor_lite.storage import queries

CSV = "text/csv; charset=utf-8"

_RECENT = 20
_BRIEFLY_S = 2
_DAY_S = 86400


@dataclass(frozen=True, slots=True)
class LeaderboardParams:
    window: Window = field(
        default=Window.ANCHOR, metadata=params.choice(Window, "sorted and ranked by this window")
    )
    limit: int = field(default=DEFAULT_LIMIT, metadata=params.whole(1, 1000))


async def leaderboard(context: Context, sent: LeaderboardParams) -> Reply:
    """The models in the order of one window."""
    made = await context.ready()
    if sent.limit == DEFAULT_LIMIT:
        return made.windows[sent.window]
    standings = made.by_window[sent.window][: sent.limit]
    return await context.in_thread(
        lambda: pack(window_leaderboard(sent.window, standings, made.versions), context.max_age_s)
    )


async def leaderboard_csv(context: Context, sent: params.NoParams) -> Reply:
    """The leaderboard as a table for spreadsheets: the rows and columns of /reports/leaderboard."""
    made = await context.ready()
    return await context.remembered("csv", _BRIEFLY_S, lambda: context.in_thread(_csv, made, context))


def _csv(made: ReadyMade, context: Context) -> Reply:
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(entry.name for entry in fields(LeaderboardRow))
    for standing in made.standings:
        row = leaderboard_row(standing, made.connected, moment(made.created_at_s), made.versions)
        writer.writerow(_cell(value) for value in astuple(row))
    headers = {"content-disposition": 'attachment; filename="leaderboard.csv"'}
    return pack(out.getvalue().encode(), context.max_age_s, media_type=CSV, headers=headers)


def _cell(value: object) -> object:
    """A name that a spreadsheet would take for a formula is made a text by an apostrophe."""
    return f"'{value}" if isinstance(value, str) and value[:1] in "=+-@\t\r" and value else value


@dataclass(frozen=True, slots=True)
class ModelParams:
    model_id: str = field(metadata=params.path())


async def model_metrics(context: Context, sent: ModelParams) -> Reply:
    """How one model fares, overall and in every part, and its latest predictions."""
    made = await context.ready()
    standing = made.by_id.get(sent.model_id)
    if standing is None:
        raise NotFound("no model with this id has ever taken part; /reports/models lists those that have")
    model = standing.model
    predictions = await queries.predictions(context.readers, [model.model_no], -math.inf, math.inf, _RECENT)
    deployments = await queries.deployments(context.readers, model.model_no)
    calibration, by_setting = await calibrations(context, context.live.leaderboard, model.model_no)
    info = model.info
    return pack(
        ModelMetrics(
            model_id=info.model_id,
            model_name=info.model_name,
            cruncher_id=info.cruncher_id,
            cruncher_name=info.cruncher_name,
            deployment_id=info.deployment_id,
            benchmark=info.benchmark,
            status=status(info.model_id, made.connected),
            joined_at=moment(model.joined_at_s),
            last_seen_at=moment(model.last_seen_at_s),
            rank=standing.rank,
            ranks={window.value: standing.ranks.get(window) for window in Window},
            overall_scores=_scores(standing.overall),
            standard_error=_scores(standing.standard_error),
            p_better_than_next=one_digit(standing.p_better_than_next),
            skill=_scores(standing.skill),
            by_horizon=_by_horizon(standing, context.live.config.game.settings),
            by_setting={key: _scores(scores) for key, scores in standing.by_setting.items()},
            rounds=standing.rounds,
            answered=standing.answered,
            calibration=calibration,
            calibration_by_setting=dict(by_setting),
            deployments=_deployments(deployments),
            recent_predictions=[_recent_prediction(row) for row in predictions],
            scorer_version=made.versions.current,
            mixed_versions=made.versions.mixed,
        ),
        _BRIEFLY_S,
    )


async def statistics(context: Context, sent: params.NoParams) -> Reply:
    """The game in numbers."""
    made = await context.ready()
    return await context.remembered(
        "statistics", _BRIEFLY_S, lambda: _statistics(context, len(made.standings))
    )


@dataclass(frozen=True, slots=True)
class RoundsParams:
    asset: str | None = field(default=None, metadata=params.word())
    horizon: int | None = field(default=None, metadata=params.seconds())
    status: RoundStatus | None = field(default=None, metadata=params.choice(RoundStatus))
    limit: int = field(default=100, metadata=params.whole(1, 1000))
    before: params.Cursor | None = field(
        default=None,
        metadata=params.cursor(
            "rounds scheduled before this time, or what the last page's X-Next-Before said"
        ),
    )


async def rounds(context: Context, sent: RoundsParams) -> Reply:
    """The rounds, newest first."""
    found, before = await find_rounds(context, sent)
    headers = {"x-next-before": before} if before else {}
    return await context.rows(found, _round_row, _BRIEFLY_S, headers)


async def find_rounds(context: Context, sent: RoundsParams) -> tuple[list[Row], str | None]:
    """A page of them, and what `before` is for the next one, where there is more."""
    found = await queries.rounds(
        context.readers,
        asset=sent.asset,
        horizon_s=sent.horizon,
        status=sent.status,
        before_s=sent.before.at_s if sent.before else None,
        before_round_no=sent.before.round_no if sent.before else None,
        limit=sent.limit + 1,
    )
    if len(found) <= sent.limit:
        return found, None
    del found[sent.limit :]
    return found, f"{found[-1]['scheduled_at_s']}_{found[-1]['round_no']}"


@dataclass(frozen=True, slots=True)
class RoundParams:
    round_id: str = field(metadata=params.path("such as BTC-3600-60-1700000000"))


async def round_detail(context: Context, sent: RoundParams) -> Reply:
    """One round, and what came of every model in it."""
    row = await find_round(context, sent.round_id)
    answers = await queries.round_answers(context.readers, row["round_no"])

    def work() -> Reply:
        return pack(
            RoundDetail(
                **asdict(_round_row(row)),
                scored_at=moment_of_ms(row["scored_at_ms"]),
                median=row["median"],
                no_move=row["no_move"],
                resolved_segments=row["resolved"],
                scorer_version=row["scorer_version"],
                predictions=[
                    RoundPrediction(
                        model_id=answer["model_id"],
                        model_name=answer["model_name"],
                        status=answer["answer_status"],
                        detail=answer["detail"],
                        exec_time_us=answer["exec_time_us"],
                        received_at=moment_of_ms(answer["received_at_ms"]),
                        raw_score=answer["raw"],
                        score=answer["score"],
                    )
                    for answer in answers
                ],
            ),
            _BRIEFLY_S,
        )

    return await context.in_thread(work)


async def find_round(context: Context, round_id: str) -> Row:
    """Raises NotFound."""
    key: RoundKey | None = parse_round_id(round_id)
    if key is None:
        raise NotFound("a round's id looks like BTC-3600-60-1700000000: asset, horizon, step, time")
    row = await queries.round_by_key(
        context.readers, key.asset, key.horizon_s, key.step_s, key.scheduled_at_s
    )
    if row is None:
        raise NotFound("no such round is stored: it was never due, is still to come, or is long past")
    return row


async def _statistics(context: Context, total_models: int) -> Reply:
    live = context.live
    now_s = live.clock.now()
    row = await queries.statistics(context.readers, now_s - _DAY_S)
    scorer = await queries.current_scorer(context.readers)
    return pack(
        Statistics(
            total_models=total_models,
            active_models=len(live.connected()),
            total_predictions=row["predictions"],
            predictions_last_24h=row["recent_predictions"],
            total_rounds=row["rounds"],
            scored_rounds=row["scored_rounds"],
            rounds_last_24h=row["recent_rounds"],
            assets=list(live.config.game.assets),
            game=live.config.game.name,
            game_time=moment(int(now_s)),
            started_at=moment(int(live.started_at_s)),
            leaderboard_at=moment(live.leaderboard.created_at_s) if live.leaderboard else None,
            scoring_rule=scorer["rule"] if scorer else live.config.scoring.rule,
            scorer_version=scorer["scorer_version"] if scorer else None,
            simulated_prices=live.config.feed.source == ("synthetic",),
        ),
        _BRIEFLY_S,
    )


def _scores(scores: WindowScores) -> OverallScores:
    return OverallScores(scores.recent, scores.steady, scores.anchor)


def _by_horizon(standing: Standing, settings: Iterable[Setting]) -> dict[str, OverallScores]:
    """The settings' scores, averaged by their weights over those of one horizon."""
    grouped: Mapping[int, list[tuple[float, WindowScores]]] = defaultdict(list)
    for setting in settings:
        if setting.key in standing.by_setting:
            grouped[setting.horizon_s].append((setting.weight, standing.by_setting[setting.key]))
    return {
        horizon_label(horizon_s): OverallScores(
            *(
                _weighted_mean((weight, scores.of(window)) for weight, scores in grouped[horizon_s])
                for window in Window
            )
        )
        for horizon_s in sorted(grouped)
    }


def _weighted_mean(pairs: Iterable[tuple[float, float | None]]) -> float | None:
    present = [(weight, value) for weight, value in pairs if value is not None]
    total = sum(weight for weight, _ in present)
    return sum(weight * value for weight, value in present) / total if total else None


def _deployments(rows: list[Row]) -> list[Deployment]:
    return [
        Deployment(row["deployment_id"], moment(row["first_seen_at_s"]), changed)
        for row, changed in zip(rows, code_changes(rows), strict=True)
    ]


def code_changes(deployments: Sequence[Row]) -> list[bool]:
    """Whether each of these, oldest first, brought other code than the one before, or may have."""
    hashes = [row["code_hash"] for row in deployments]
    return [after is None or after != before for before, after in zip([None, *hashes], hashes, strict=False)]


def _recent_prediction(row: Row) -> RecentPrediction:
    return RecentPrediction(
        round_id=round_id(row),
        asset=row["asset"],
        horizon=row["horizon_s"],
        step=row["step_s"],
        scheduled_at=moment(row["scheduled_at_s"]),
        round_status=row["status"],
        status=row["answer_status"],
        detail=row["detail"],
        exec_time_us=row["exec_time_us"],
        raw_score=row["raw"],
        score=row["score"],
        scorer_version=row["scorer_version"],
    )


def round_id(row: Row) -> str:
    return f"{row['asset']}-{row['horizon_s']}-{row['step_s']}-{row['scheduled_at_s']}"


def _round_row(row: Row) -> RoundRow:
    return RoundRow(
        round_id=round_id(row),
        asset=row["asset"],
        horizon=row["horizon_s"],
        step=row["step_s"],
        scheduled_at=moment(row["scheduled_at_s"]),
        performed_at=moment_of_ms(row["performed_at_ms"]),
        resolvable_at=moment(row["resolvable_at_s"]),
        status=row["status"],
        reason=row["reason"],
        answered=row["answered"],
        failed=row["failed"],
        timed_out=row["timed_out"],
        absent=row["absent"],
    )
