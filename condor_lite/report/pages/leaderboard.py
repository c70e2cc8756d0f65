"""The leaderboard."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from condor_lite.game.entities import Standing, Window
from condor_lite.report import ready
from condor_lite.report.answers import horizon_label, moment
from condor_lite.report.context import Context
from condor_lite.report.game import LeaderboardParams
from condor_lite.report.pages.common import show
from condor_lite.report.replies import Reply
from condor_lite.storage import queries

_FOR_S = 2.0
_ROUNDS = 8
_MOST_MODELS = 1000


@dataclass(frozen=True, slots=True)
class Line:
    """A model in the table."""

    standing: Standing
    rank: int | None
    running: bool
    answered_share: float | None


@dataclass(frozen=True, slots=True)
class PriceState:
    asset: str
    price: str
    age: str
    stale: bool


@dataclass(frozen=True, slots=True)
class RoundLine:
    round_id: str
    status: str
    reason: str | None
    at: str
    answered: int
    failed: int
    timed_out: int
    absent: int


async def page(context: Context, sent: LeaderboardParams) -> Reply:
    """The leaderboard in the order of one window, the prices, and the latest rounds."""
    made = await context.ready()
    return await context.remembered(("page", sent.window), _FOR_S, partial(_page, context, made, sent.window))


async def _page(context: Context, made: ready.ReadyMade, window: Window) -> Reply:
    live = context.live
    now_s = live.clock.now()
    rounds = await queries.rounds(
        context.readers,
        asset=None,
        horizon_s=None,
        status=None,
        before_s=None,
        before_round_no=None,
        limit=_ROUNDS,
    )
    values: dict[str, Any] = {
        "window": window,
        "windows": list(Window),
        "now": moment(int(now_s)),
        "as_of": moment(made.created_at_s) if live.leaderboard else None,
        "lines": [_line(standing, window, made) for standing in made.by_window[window][:_MOST_MODELS]],
        "prices": [
            PriceState(
                state.asset,
                "-" if state.price is None else f"{state.price:,.{_decimals(state.price)}f}",
                "no price yet" if state.newest_ts_s is None else _age(now_s - state.newest_ts_s),
                state.stale,
            )
            for state in live.feeds()
        ],
        "rounds": [
            RoundLine(
                f"{row['asset']}-{row['horizon_s']}-{row['step_s']}-{row['scheduled_at_s']}",
                row["status"],
                row["reason"],
                moment(row["scheduled_at_s"]),
                row["answered"],
                row["failed"],
                row["timed_out"],
                row["absent"],
            )
            for row in rounds
        ],
        "first_scores_after": _first_scores_after(context),
    }
    return await show(context, "leaderboard.html", at="/", **values)


def _line(standing: Standing, window: Window, made: ready.ReadyMade) -> Line:
    return Line(
        standing=standing,
        rank=standing.ranks.get(window),
        running=standing.model.info.model_id in made.connected,
        answered_share=standing.answered / standing.rounds if standing.rounds else None,
    )


def _first_scores_after(context: Context) -> str:
    """How long after the first round its scores come, in words: the shortest horizon, and what follows it."""
    config = context.live.config
    shortest_s = min(setting.horizon_s for setting in config.game.settings)
    wait_s = context.live.clock.wall_s(shortest_s + config.scoring.settle_delay_s) + config.scoring.interval_s
    return _age(wait_s).removesuffix(" old")


def _age(age_s: float) -> str:
    if age_s < 120:
        return f"{max(age_s, 0):.0f} s old"
    return f"{horizon_label(int(age_s) // 60 * 60)} old"


def _decimals(price: float) -> int:
    """Six significant digits, at least two decimals."""
    return max(2, 6 - len(str(int(abs(price)))))
