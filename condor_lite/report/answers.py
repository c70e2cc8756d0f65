"""What the API answers: a dataclass for each row or object, written by orjson, readable as a schema.

All are frozen and slotted but those that are sent by the ten thousand: so they are made, and written, in a
quarter of the time. Numbers that are absent are None. NaN and infinities, which none of these should hold,
become `null` too.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal

from msgspec import Meta

from condor_lite.game.entities import AnswerStatus, RoundStatus, Window

Moment = Annotated[
    str, Meta(description="ISO 8601, UTC, with Z", extra_json_schema={"format": "date-time"}, max_length=32)
]
NaiveMoment = Annotated[
    datetime,
    Meta(
        description="ISO 8601, UTC, without a zone: the web app's chart appends its own Z",
        extra_json_schema={"pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d$"},
    ),
]
Format = Annotated[str, Meta(pattern=r"^(percentage|integer|compact|number|decimal-\d+)$")]
Running = Literal["RUNNING", "STOPPED"]
EpochSeconds = Annotated[int, Meta(description="epoch seconds, UTC")]


_EPOCH = datetime(1970, 1, 1)  # noqa: DTZ001 - told without a zone


def moment(at_s: float) -> str:
    """Epoch seconds as ISO 8601 with `Z`; milliseconds only where there are any."""
    at = datetime.fromtimestamp(at_s, UTC).replace(tzinfo=None)
    return at.isoformat(timespec="milliseconds" if at.microsecond else "seconds") + "Z"


def moment_of_ms(at_ms: int | None) -> str | None:
    return None if at_ms is None else moment(at_ms / 1000)


def naive_moment(at_s: int) -> datetime:
    """Epoch seconds in UTC without a zone."""
    return _EPOCH + timedelta(0, at_s)  # half of what fromtimestamp takes


def horizon_label(horizon_s: int) -> str:
    """`1h`, `24h`, `5m`, `90s`: the largest unit up to the hour that leaves a whole number."""
    for unit_s, unit in ((3600, "h"), (60, "m")):
        if horizon_s % unit_s == 0:
            return f"{horizon_s // unit_s}{unit}"
    return f"{horizon_s}s"


# Family 1: what the CrunchDAO hub and its coordinator web app read.


@dataclass(frozen=True, slots=True)
class ModelRow:
    model_id: str
    model_name: str
    cruncher_name: str
    cruncher_id: str
    deployment_id: str


@dataclass(frozen=True, slots=True)
class LeaderboardRow:
    """`username` is the cruncher's name: the web app's default column. `status`: RUNNING or STOPPED.

    `standard_error_*` are those of the scores. `p_better_than_next`: the probability that the model is better
    than the next one that has a rank. `coverage_90`: the share of moves inside its central 90 % intervals;
    `bias`: mean PIT - 0.5. None until there is enough to say. `mixes_versions`: other scorers' scores are
    in the sums beside those of `scorer_version`.
    """

    created_at: Moment
    rank: int | None
    model_id: str
    model_name: str
    cruncher_name: str
    username: str
    score_recent: float | None
    score_steady: float | None
    score_anchor: float | None
    status: Running
    cruncher_id: str
    benchmark: bool
    joined_at: Moment
    rounds: int
    answered: int
    skill_recent: float | None
    skill_steady: float | None
    skill_anchor: float | None
    standard_error_recent: float | None
    standard_error_steady: float | None
    standard_error_anchor: float | None
    p_better_than_next: float | None
    coverage_90: float | None
    bias: float | None
    scorer_version: int | None
    mixes_versions: bool


@dataclass
class SnapshotRow:
    model_id: str
    score_recent: float | None
    score_steady: float | None
    score_anchor: float | None
    performed_at: NaiveMoment
    scorer_version: int


@dataclass
class SettingSnapshotRow:
    """`param` names the setting, such as `BTC-3600-60`; `horizon` and `step` are seconds."""

    model_id: str
    param: str
    asset: str
    horizon: int
    step: int
    score_recent: float | None
    score_steady: float | None
    score_anchor: float | None
    performed_at: NaiveMoment
    scorer_version: int


@dataclass
class PredictionRow:
    """`score_value` is None until the round is scored; `score_failed`: the model has no score of its own.

    `scorer_version`: the scorer that scored it. Scores of different ones may be by different rules.
    """

    model_id: str
    param: str
    asset: str
    horizon: int
    step: int
    score_value: float | None
    score_failed: bool
    score_failed_reason: str | None
    scored_at: NaiveMoment | None
    performed_at: NaiveMoment
    round_id: str
    status: AnswerStatus
    raw_score: float | None
    exec_time_us: int
    scorer_version: int | None


@dataclass(frozen=True, slots=True)
class FeedRow:
    source: str
    subject: str
    kind: str
    granularity: str
    record_count: int
    oldest_ts: Moment | None
    newest_ts: Moment | None
    watermark_ts: Moment | None
    watermark_updated_at: Moment | None


@dataclass(frozen=True, slots=True)
class FeedPointRow:
    source: str
    subject: str
    kind: str
    granularity: str
    ts_event: Moment
    ts_ingested: Moment
    values: dict[str, float]
    meta: dict[str, str]


# How the web app shows the above. Its field names are camelCase.


@dataclass(frozen=True, slots=True)
class ModelCell:
    """A column that shows a model with a mark for its status."""

    statusProperty: str  # noqa: N815
    type: Literal["model"] = "model"


@dataclass(frozen=True, slots=True)
class Column:
    id: int
    type: Literal["PROJECT", "USERNAME", "VALUE"]
    property: str
    format: Format | None
    displayName: str  # noqa: N815
    tooltip: str | None
    nativeConfiguration: ModelCell | None  # noqa: N815
    order: int


@dataclass(frozen=True, slots=True)
class XAxis:
    name: str


@dataclass(frozen=True, slots=True)
class Series:
    name: str
    label: str
    color: str


@dataclass(frozen=True, slots=True)
class YAxis:
    series: list[Series]
    format: Format | None


@dataclass(frozen=True, slots=True)
class Alert:
    """A mark at rows whose `field` is true."""

    field: str
    reasonField: str  # noqa: N815


@dataclass(frozen=True, slots=True)
class Filter:
    label: str
    property: str
    autoSelectFirst: bool  # noqa: N815
    type: Literal["select"] = "select"


@dataclass(frozen=True, slots=True)
class LineChart:
    xAxis: XAxis  # noqa: N815
    yAxis: YAxis  # noqa: N815
    groupByProperty: str  # noqa: N815
    alertConfig: Alert | None  # noqa: N815
    filterConfig: list[Filter]  # noqa: N815
    displayEvolution: bool  # noqa: N815
    type: Literal["line"] = "line"


@dataclass(frozen=True, slots=True)
class Widget:
    id: Annotated[int, Meta(ge=50)]
    type: Literal["CHART"]
    displayName: str  # noqa: N815
    tooltip: str | None
    order: int
    endpointUrl: str  # noqa: N815
    nativeConfiguration: LineChart  # noqa: N815


@dataclass(frozen=True, slots=True)
class ReportSchema:
    schema_version: Literal["1"]
    leaderboard_columns: list[Column]
    metrics_widgets: list[Widget]


# Family 2: the game's own endpoints.


@dataclass(frozen=True, slots=True)
class RankedModel:
    rank: int | None
    model_id: str
    model_name: str
    cruncher_name: str
    score: float | None
    prediction_count: int


@dataclass(frozen=True, slots=True)
class WindowLeaderboard:
    """`scorer_version`: whose scores are summed up. `mixed_versions`: other scorers whose scores are in the
    sums, too. `uncounted_rounds`: rounds of the last 7 days that only other scorers have scored, which don't
    count.
    """

    window: Window
    count: int
    models: list[RankedModel]
    scorer_version: int | None
    mixed_versions: list[int]
    uncounted_rounds: int


@dataclass(frozen=True, slots=True)
class OverallScores:
    recent_24h: float | None
    steady_72h: float | None
    anchor_7d: float | None


@dataclass(frozen=True, slots=True)
class RecentPrediction:
    round_id: str
    asset: str
    horizon: int
    step: int
    scheduled_at: Moment
    round_status: RoundStatus
    status: AnswerStatus
    detail: str | None
    exec_time_us: int
    raw_score: float | None
    score: float | None
    scorer_version: int | None


@dataclass(frozen=True, slots=True)
class Deployment:
    deployment_id: str
    first_seen_at: Moment
    code_changed: bool


@dataclass(frozen=True, slots=True)
class CalibrationEstimate:
    value: float
    standard_error: float | None


@dataclass(frozen=True, slots=True)
class ModelCalibration:
    """Over 7 days; all None until there are as many distinct segment times as needed.

    `pit_histogram`: shares of 20 bins, each 0.05 where a model is calibrated. `coverage_50`, `coverage_90`:
    the share of moves inside its central intervals. `bias`: mean PIT - 0.5, positive where prices came out
    higher than the model thought. `sharpness_bp`: E|X - X'|, None where a forecast's is infinite.
    """

    segment_times: int
    segment_times_needed: int
    pit_histogram: list[CalibrationEstimate] | None = None
    coverage_50: CalibrationEstimate | None = None
    coverage_90: CalibrationEstimate | None = None
    bias: CalibrationEstimate | None = None
    sharpness_bp: CalibrationEstimate | None = None


@dataclass(frozen=True, slots=True)
class ModelMetrics:
    """`by_horizon` and `by_setting`: scores by `1h`, `24h`, ... and by `BTC-3600-60`, ...

    `standard_error` is that of `overall_scores`; `p_better_than_next`: the probability that the model is
    better than the next one that has a rank.
    """

    model_id: str
    model_name: str
    cruncher_id: str
    cruncher_name: str
    deployment_id: str
    benchmark: bool
    status: Running
    joined_at: Moment
    last_seen_at: Moment
    rank: int | None
    ranks: dict[str, int | None]
    overall_scores: OverallScores
    standard_error: OverallScores
    p_better_than_next: float | None
    skill: OverallScores
    by_horizon: dict[str, OverallScores]
    by_setting: dict[str, OverallScores]
    rounds: int
    answered: int
    calibration: ModelCalibration
    calibration_by_setting: dict[str, ModelCalibration]
    deployments: list[Deployment]
    recent_predictions: list[RecentPrediction]
    scorer_version: int | None
    mixed_versions: list[int]


@dataclass(frozen=True, slots=True)
class Statistics:
    """Predictions count those with status SUCCESS. A model is active while it is connected."""

    total_models: int
    active_models: int
    total_predictions: int
    predictions_last_24h: int
    total_rounds: int
    scored_rounds: int
    rounds_last_24h: int
    assets: list[str]
    game: str
    game_time: Moment
    started_at: Moment
    leaderboard_at: Moment | None
    scoring_rule: str
    scorer_version: int | None
    simulated_prices: bool


@dataclass(frozen=True, slots=True)
class RoundRow:
    round_id: str
    asset: str
    horizon: int
    step: int
    scheduled_at: Moment
    performed_at: Moment | None
    resolvable_at: Moment
    status: RoundStatus
    reason: str | None
    answered: int
    failed: int
    timed_out: int
    absent: int


@dataclass(frozen=True, slots=True)
class RoundPrediction:
    model_id: str
    model_name: str
    status: AnswerStatus
    detail: str | None
    exec_time_us: int | None
    received_at: Moment | None
    raw_score: float | None
    score: float | None


@dataclass(frozen=True, slots=True)
class RoundDetail:
    """A round with its answers. `median` and `no_move` are m and a of the round's score, None until then."""

    round_id: str
    asset: str
    horizon: int
    step: int
    scheduled_at: Moment
    performed_at: Moment | None
    resolvable_at: Moment
    status: RoundStatus
    reason: str | None
    answered: int
    failed: int
    timed_out: int
    absent: int
    scored_at: Moment | None
    median: float | None
    no_move: float | None
    resolved_segments: int | None
    scorer_version: int | None
    predictions: list[RoundPrediction]


@dataclass(frozen=True, slots=True)
class PredictionDetail:
    """All that a score is made of. Lists are by segment, `prices` by end point (one more); None: unresolved,
    and `unresolved` says why (a price is missing, or the two come from different sources).

    `densities` is the answer as it was sent. `segment_scores` are computed anew, `raw_score` to `score` are
    stored. `reason`: why there is no valid answer, or which part of the explanation is no longer there.
    """

    round_id: str
    model_id: str
    model_name: str
    status: AnswerStatus
    reason: str | None
    rule: str
    target: str
    scorer_version: int
    exec_time_us: int | None
    received_at: Moment | None
    densities: Any
    prices: list[tuple[EpochSeconds, float | None]]
    increments: list[float | None]
    unresolved: list[str | None]
    segment_scores: list[float | None] | None
    raw_score: float | None
    counted: float | None
    median: float
    no_move: float
    score: float | None


# Family 3: operations.


@dataclass(frozen=True, slots=True)
class Health:
    status: Literal["ok"]


@dataclass(frozen=True, slots=True)
class Readiness:
    """`problems`: what is not as it should be, in words."""

    status: Literal["ready"]
    problems: list[str]


@dataclass(frozen=True, slots=True)
class NotReady:
    error: str
    detail: str
    problems: list[str]


@dataclass(frozen=True, slots=True)
class Version:
    name: str
    version: str
    python: str
    sqlite: str
    game: str


@dataclass(frozen=True, slots=True)
class Failure:
    """Every error: what, and why, and what would be right."""

    error: str
    detail: str
