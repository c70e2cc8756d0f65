"""The bodies that everybody asks for, made once a leaderboard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace

from condor_lite.game.entities import Leaderboard, Model, Standing, Window, WindowScores
from condor_lite.game.leaderboard import is_gone
from condor_lite.report.answers import (
    LeaderboardRow,
    ModelRow,
    RankedModel,
    Running,
    WindowLeaderboard,
    moment,
)
from condor_lite.report.replies import Reply, encode_rows, pack

DEFAULT_LIMIT = 100


@dataclass(frozen=True, slots=True)
class Versions:
    """Whose scores the leaderboard sums up: the current scorer's, along with those of others (`mixed`).

    `uncounted`: rounds of the longest window that only other scorers have scored.
    """

    current: int | None
    mixed: list[int]
    uncounted: int


@dataclass(frozen=True, slots=True)
class ReadyMade:
    """`standings`: all models that the game knows, those without a standing last; `by_window`: sorted by each
    window. `windows`: the bodies of `/leaderboard` for each window at its default limit.
    """

    created_at_s: float
    versions: Versions
    standings: tuple[Standing, ...]
    by_id: Mapping[str, Standing]
    by_window: Mapping[Window, tuple[Standing, ...]]
    connected: Set[str]
    windows: Mapping[Window, Reply]
    hub_leaderboard: Reply
    hub_models: Reply


def make(
    leaderboard: Leaderboard | None,
    models: Sequence[Model],
    connected: Set[str],
    started_at_s: float,
    max_age_s: int,
) -> ReadyMade:
    """`models`: as the database has them now: newer than the leaderboard's where a participant redeployed."""
    created_at_s = leaderboard.created_at_s if leaderboard else started_at_s
    fresh = {model.model_no: model for model in models}
    standings = [
        replace(standing, model=fresh.pop(standing.model.model_no, standing.model))
        for standing in (leaderboard.standings if leaderboard else ())
    ]
    standings += [_unranked(model) for model in sorted(fresh.values(), key=_seniority)]
    by_window = {window: _sorted_by(window, standings, created_at_s) for window in Window}
    versions = Versions(None, [], 0)
    if leaderboard is not None:
        mixed = list(leaderboard.mixed_versions)
        versions = Versions(leaderboard.scorer_version, mixed, leaderboard.uncounted)
    return ReadyMade(
        created_at_s=created_at_s,
        versions=versions,
        standings=tuple(standings),
        by_id={standing.model.info.model_id: standing for standing in standings},
        by_window=by_window,
        connected=connected,
        windows={
            window: pack(window_leaderboard(window, by_window[window][:DEFAULT_LIMIT], versions), max_age_s)
            for window in Window
        },
        hub_leaderboard=pack(
            encode_rows(
                leaderboard_row(standing, connected, moment(created_at_s), versions) for standing in standings
            ),
            max_age_s,
        ),
        hub_models=pack(encode_rows(_model_row(standing.model) for standing in standings), max_age_s),
    )


def window_leaderboard(
    window: Window, standings: Sequence[Standing], versions: Versions
) -> WindowLeaderboard:
    return WindowLeaderboard(
        window=window,
        count=len(standings),
        scorer_version=versions.current,
        mixed_versions=versions.mixed,
        uncounted_rounds=versions.uncounted,
        models=[
            RankedModel(
                rank=standing.ranks.get(window),
                model_id=standing.model.info.model_id,
                model_name=standing.model.info.model_name,
                cruncher_name=standing.model.info.cruncher_name,
                score=standing.overall.of(window),
                prediction_count=standing.answered,
            )
            for standing in standings
        ],
    )


def status(model_id: str, connected: Set[str]) -> Running:
    return "RUNNING" if model_id in connected else "STOPPED"


def one_digit(probability: float | None) -> float | None:
    """As a probability of an order is shown: 14 blocks say no more."""
    return None if probability is None else round(probability, 1)


def _unranked(model: Model) -> Standing:
    """The standing of a model that no leaderboard has listed yet."""
    nothing = WindowScores()
    return Standing(
        model=model,
        rank=None,
        ranks=dict.fromkeys(Window),
        overall=nothing,
        by_setting={},
        rounds=0,
        answered=0,
        skill=nothing,
        standard_error=nothing,
        p_better_than_next=None,
    )


def _seniority(model: Model) -> tuple[int, str]:
    return (model.joined_at_s, model.info.model_id)


def _sorted_by(window: Window, standings: Sequence[Standing], now_s: float) -> tuple[Standing, ...]:
    """By the window's score; those without one, and those long gone, last."""

    def key(standing: Standing) -> tuple[int, float, tuple[int, str]]:
        score = standing.overall.of(window)
        group = 2 if is_gone(standing.model, now_s) else 1 if score is None else 0
        return (group, -(score or 0.0), _seniority(standing.model))

    return tuple(sorted(standings, key=key))


def leaderboard_row(
    standing: Standing, connected: Set[str], created_at: str, versions: Versions
) -> LeaderboardRow:
    info = standing.model.info
    return LeaderboardRow(
        created_at=created_at,
        rank=standing.rank,
        model_id=info.model_id,
        model_name=info.model_name,
        cruncher_name=info.cruncher_name,
        username=info.cruncher_name,
        score_recent=standing.overall.recent,
        score_steady=standing.overall.steady,
        score_anchor=standing.overall.anchor,
        status=status(info.model_id, connected),
        cruncher_id=info.cruncher_id,
        benchmark=info.benchmark,
        joined_at=moment(standing.model.joined_at_s),
        rounds=standing.rounds,
        answered=standing.answered,
        skill_recent=standing.skill.recent,
        skill_steady=standing.skill.steady,
        skill_anchor=standing.skill.anchor,
        standard_error_recent=standing.standard_error.recent,
        standard_error_steady=standing.standard_error.steady,
        standard_error_anchor=standing.standard_error.anchor,
        p_better_than_next=one_digit(standing.p_better_than_next),
        coverage_90=standing.calibration.coverage_90 if standing.calibration else None,
        bias=standing.calibration.bias if standing.calibration else None,
        scorer_version=versions.current,
        mixes_versions=bool(versions.mixed),
    )


def _model_row(model: Model) -> ModelRow:
    info = model.info
    return ModelRow(info.model_id, info.model_name, info.cruncher_name, info.cruncher_id, info.deployment_id)
