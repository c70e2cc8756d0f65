"""One model: how its scores went, where it is good, if its forecasts mean what they say, and its errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from sqlite3 import Row
from statistics import median

from condor_lite.explain import SILENCE
from condor_lite.game.entities import AnswerStatus, Setting, Standing, Window
from condor_lite.game.leaderboard import is_gone
from condor_lite.report import params
from condor_lite.report.answers import CalibrationEstimate, ModelCalibration
from condor_lite.report.calibration import calibrations
from condor_lite.report.context import Context, NotFound
from condor_lite.report.game import code_changes, round_id
from condor_lite.report.pages import leaderboard
from condor_lite.report.pages.common import FOR_S, duration, show
from condor_lite.report.ready import ReadyMade, one_digit
from condor_lite.report.replies import Reply
from condor_lite.storage import overview, queries

_DAY_S = 86400
_REACH_S = 30 * _DAY_S
_POINTS = 500
_ANSWERS = 200
_LINES = 20
_NO_CLAIM = 2.0  # standard errors


@dataclass(frozen=True, slots=True)
class ModelPageParams:
    model_id: str = field(metadata=params.path())
    window: Window = field(default=Window.ANCHOR, metadata=params.choice(Window))


@dataclass(frozen=True, slots=True)
class Cell:
    """A setting in the heat map. `heat`: from -1, the worst of the table, to 1."""

    score: float | None
    heat: float


@dataclass(frozen=True, slots=True)
class HeatMap:
    """Scores by setting: `rows` has for each asset a cell of each of `columns`, None where none is asked."""

    columns: list[str]
    rows: list[tuple[str, list[Cell | None]]]


@dataclass(frozen=True, slots=True)
class LastRound:
    round_id: str
    row: Row
    reason: str | None


async def page(context: Context, sent: ModelPageParams) -> Reply:
    """One model's page."""
    made = await context.ready()
    standing = made.by_id.get(sent.model_id)
    if standing is None:
        raise NotFound("no model with this id has ever taken part; the leaderboard lists those that have")
    key = ("model", standing.model.model_no, sent.window)
    return await context.remembered(key, FOR_S, partial(_page, context, made, standing, sent.window))


async def _page(context: Context, made: ReadyMade, standing: Standing, window: Window) -> Reply:
    readers, live, model = context.readers, context.live, standing.model
    now_s = live.clock.now()
    numbers = [model.model_no]
    spacing_s = live.config.scoring.snapshot_interval_s
    stored = await queries.snapshots(
        readers, "leaderboard", numbers, now_s - _REACH_S, now_s, _POINTS, spacing_s
    )
    stored.reverse()
    answers = await queries.predictions(readers, numbers, now_s - _REACH_S, now_s, _ANSWERS)
    deployments = await queries.deployments(readers, model.model_no)
    calibration, _ = await calibrations(context, live.leaderboard, model.model_no)
    lately = await overview.answering(readers, numbers)
    most_rounds = max((other.rounds for other in made.standings), default=0)
    last = [_last_round(row) for row in answers]
    return await show(
        context,
        "model.html",
        at="/",
        standing=standing,
        versions=made.versions,
        info=model.info,
        running=model.info.model_id in made.connected,
        new=leaderboard.is_new(standing, made, most_rounds),
        gone=is_gone(model, made.created_at_s),
        failing=leaderboard.failing(lately[0] if lately else None),
        last_error=next((one for one in last if one.row["answer_status"] != AnswerStatus.SUCCESS), None),
        window=window,
        windows=list(reversed(Window)),
        p_better=one_digit(standing.p_better_than_next),
        scores=_scores(stored, deployments),
        deployments=deployments,
        heat_map=_heat_map(standing, live.config.game.settings, window),
        calibration=calibration,
        verdicts=_verdicts(calibration),
        pit=_pit(calibration),
        times=_times(answers),
        times_said=_times_said(answers),
        last=last[:_LINES],
    )


def _scores(stored: Sequence[Row], deployments: Sequence[Row]) -> dict[str, object]:
    """For the chart of the three windows, with marks where the participant deployed a new version."""
    return {
        "t": [row["at_s"] for row in stored],
        **{name: [_short(row[f"score_{name}"]) for row in stored] for name in ("recent", "steady", "anchor")},
        "deployments": [
            {"t": row["first_seen_at_s"], "label": row["deployment_id"][:24]}
            for row, changed in list(zip(deployments, code_changes(deployments), strict=True))[1:]
            if changed
        ],
    }


def _heat_map(standing: Standing, settings: Sequence[Setting], window: Window) -> HeatMap:
    scores: Mapping[str, float | None] = {key: found.of(window) for key, found in standing.by_setting.items()}
    largest = max((abs(score) for score in scores.values() if score is not None), default=0.0) or 1.0
    asked = {setting.key: setting for setting in settings}
    kinds = sorted({(setting.horizon_s, setting.step_s) for setting in settings})

    def cell(asset: str, horizon_s: int, step_s: int) -> Cell | None:
        key = Setting(asset, horizon_s, step_s).key
        if key not in asked:
            return None
        score = scores.get(key)
        return Cell(score, 0.0 if score is None else score / largest)

    return HeatMap(
        columns=[f"{duration(horizon_s)} / {duration(step_s)}" for horizon_s, step_s in kinds],
        rows=[
            (asset, [cell(asset, *kind) for kind in kinds])
            for asset in dict.fromkeys(setting.asset for setting in settings)
        ],
    )


def _pit(calibration: ModelCalibration) -> dict[str, object] | None:
    if calibration.pit_histogram is None:
        return None
    return {
        "shares": [_short(share.value) for share in calibration.pit_histogram],
        "errors": [_short(share.standard_error) for share in calibration.pit_histogram],
    }


def _verdicts(calibration: ModelCalibration) -> list[str]:
    """What the calibration says, in words; claims only what is beyond two standard errors."""
    inner, outer, bias = calibration.coverage_50, calibration.coverage_90, calibration.bias
    if inner is None or outer is None or bias is None:
        return []
    verdicts = []
    off = [_beyond(inner, 0.5), _beyond(outer, 0.9)]
    if any(side < 0 for side in off) and not any(side > 0 for side in off):
        verdicts.append("too narrow: prices leave its intervals more often than it says")
    elif any(side > 0 for side in off) and not any(side < 0 for side in off):
        verdicts.append("too wide: prices stay inside its intervals more often than it says")
    elif any(off):
        verdicts.append("of the wrong shape: too narrow in one part and too wide in another")
    if side := _beyond(bias, 0.0):
        verdicts.append("too low: prices come out higher" if side > 0 else "too high: prices come out lower")
    return verdicts


def _beyond(estimate: CalibrationEstimate, right: float) -> int:
    """-1 or 1 where the estimate is beyond what chance explains, else 0."""
    if estimate.standard_error is None or not estimate.standard_error:
        return 0
    distance = (estimate.value - right) / estimate.standard_error
    return 0 if abs(distance) <= _NO_CLAIM else 1 if distance > 0 else -1


def _times(answers: Sequence[Row]) -> dict[str, object]:
    shown = answers[::-1]
    return {
        "t": [row["scheduled_at_s"] for row in shown],
        "ms": [max(row["exec_time_us"], 1) / 1000 for row in shown],
        "status": [row["answer_status"] for row in shown],
    }


def _times_said(answers: Sequence[Row]) -> dict[str, float] | None:
    good = sorted(row["exec_time_us"] for row in answers if row["answer_status"] == AnswerStatus.SUCCESS)
    if not good:
        return None
    return {"median": median(good), "most": good[min(len(good) * 9 // 10, len(good) - 1)], "worst": good[-1]}


def _last_round(row: Row) -> LastRound:
    status = AnswerStatus(row["answer_status"])
    reason = row["detail"]
    if reason is None and status is not AnswerStatus.SUCCESS:
        reason = SILENCE[status]
    if reason is None and row["status"] == "void":
        reason = f"the round is void: {row['reason']}"
    return LastRound(round_id(row), row, reason)


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
