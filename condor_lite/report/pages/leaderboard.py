"""The leaderboard: who leads, how that came, and above it the state of the game in one line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from sqlite3 import Row
from typing import Any, cast

from condor_lite.game.entities import Standing, Window
from condor_lite.game.leaderboard import is_gone
from condor_lite.game.schedule import next_due
from condor_lite.report import params
from condor_lite.report.context import Context
from condor_lite.report.game import round_id
from condor_lite.report.pages.common import FOR_S, show
from condor_lite.report.ready import ReadyMade
from condor_lite.report.replies import Reply
from condor_lite.storage import overview, queries

_MOST_MODELS = 1000
_MOST_SHOWN = 250  # a browser gets the others when it searches for them, or sorts them to the top
_POINTS = 32
_DAY_S = 86400
_LOOK_BACK_S = 7 * _DAY_S
_LOOK_BACK_FOR_S = 10.0  # how long what is in the database about all models is remembered (wall)
_SPARK_WIDTH, _SPARK_HEIGHT, _SPARK_EDGE = 88, 22, 2


class Sort(StrEnum):
    RANK = "rank"
    MODEL = "model"
    PLAYER = "player"
    RECENT = "recent"
    STEADY = "steady"
    ANCHOR = "anchor"
    ERROR = "error"
    SKILL = "skill"
    ANSWERED = "answered"
    TIME = "time"


class Order(StrEnum):
    ASC = "asc"
    DESC = "desc"


_ASCENDING = {Sort.RANK, Sort.MODEL, Sort.PLAYER, Sort.TIME}


@dataclass(frozen=True, slots=True)
class LeaderboardPageParams:
    window: Window = field(default=Window.ANCHOR, metadata=params.choice(Window))
    sort: Sort = field(default=Sort.RANK, metadata=params.choice(Sort))
    order: Order | None = field(default=None, metadata=params.choice(Order))
    q: str = field(default="", metadata=params.word())


@dataclass(frozen=True, slots=True)
class Spark:
    """A line of scores: the SVG path, the zero line's height (None: out of sight), and its ends in words."""

    path: str
    end: tuple[float, float]
    zero: float | None
    first: float
    last: float


@dataclass(frozen=True, slots=True)
class History:
    """Stored scores, by model: of up to a week for the lines, and the ranks at `since_s`, a day ago."""

    since_s: int | None
    ranks: Mapping[Window, Mapping[int, int]]
    times_s: Sequence[int]
    scores: Mapping[int, Mapping[int, tuple[float | None, ...]]]


@dataclass(frozen=True, slots=True)
class Line:
    """A model in the table. `climbed`: ranks since the stored leaderboard a day ago; None: it had none then.

    `failing`: what is wrong with its newest answers, None where most of them are good.
    """

    standing: Standing
    rank: int | None
    climbed: int | None
    running: bool
    new: bool
    gone: bool
    failing: str | None
    answered: float | None
    median_us: int | None
    past: History

    def spark(self, window: Window) -> Spark | None:
        return _spark(self.past, self.standing.model.model_no, list(Window).index(window))

    def value(self, sort: Sort, window: Window) -> str | float | None:
        """What the table is sorted by."""
        match sort:
            case Sort.RANK:
                return self.rank
            case Sort.MODEL:
                return self.standing.model.info.model_name.casefold()
            case Sort.PLAYER:
                return self.standing.model.info.cruncher_name.casefold()
            case Sort.RECENT | Sort.STEADY | Sort.ANCHOR:
                return self.standing.overall.of(Window(sort.value))
            case Sort.ANSWERED:
                return self.answered
            case Sort.ERROR:
                return self.standing.standard_error.of(window)
            case Sort.SKILL:
                return self.standing.skill.of(window)
            case Sort.TIME:
                return self.median_us


@dataclass(frozen=True, slots=True)
class NextRound:
    """The next question about a horizon."""

    asset: str
    horizon_s: int
    at_s: int


async def page(context: Context, sent: LeaderboardPageParams) -> Reply:
    """The leaderboard in the order of one window, and the state of the game."""
    since = context.stream.newest
    made = await context.ready()
    make = partial(_page, context, made, sent, since)
    if sent.q:  # there is no end of these
        async with context.large():
            return await make()
    return await context.remembered(("page", sent.window, sent.sort, sent.order), FOR_S, make)


async def _page(context: Context, made: ReadyMade, sent: LeaderboardPageParams, since: str) -> Reply:
    live, readers = context.live, context.readers
    now_s = live.clock.now()
    past = await context.remembered("history", _LOOK_BACK_FOR_S, partial(_history, context, now_s))
    lately = await context.remembered("answering", _LOOK_BACK_FOR_S, partial(_answering, context, made))
    order = sent.order or (Order.ASC if sent.sort in _ASCENDING else Order.DESC)
    scored = any(standing.overall.recent is not None for standing in made.standings)
    last = await overview.last_result(readers)
    return await show(
        context,
        "leaderboard.html",
        at="/",
        since=since,
        window=sent.window,
        windows=list(reversed(Window)),
        sort=sent.sort,
        order=order,
        q=sent.q,
        lines=await context.in_thread(_lines, made, sent, order, past, lately),
        models=len(made.standings),
        most=_MOST_SHOWN,
        since_s=past.since_s,
        as_of_s=made.created_at_s if live.leaderboard else None,
        versions=made.versions,
        first_scores_s=None if scored else await _first_scores_s(context, now_s),
        feeds=live.feeds(),
        next_rounds=_next_rounds(context, now_s),
        last=last,
        last_id=None if last is None else round_id(last),
        rule=await queries.current_rule(readers, live.config.scoring.rule),
    )


def _lines(
    made: ReadyMade,
    sent: LeaderboardPageParams,
    order: Order,
    past: History,
    lately: Mapping[int, Row],
) -> list[Line]:
    """The lines that are searched for, sorted; those without a value are last in either order."""
    words = sent.q.strip().casefold()

    def is_found(standing: Standing) -> bool:
        info = standing.model.info
        return words in f"{info.model_name} {info.cruncher_name} {info.model_id}".casefold()

    standings = made.by_window[sent.window]
    most_rounds = max((standing.rounds for standing in standings), default=0)
    lines = [
        _line(standing, sent.window, made, past, lately.get(standing.model.model_no), most_rounds)
        for standing in standings
        if is_found(standing)
    ]
    if sent.sort is Sort.RANK and order is Order.ASC:
        return lines[:_MOST_SHOWN]  # benchmarks stand in their place
    values = [(line.value(sent.sort, sent.window), line) for line in lines]
    present = [(value, line) for value, line in values if value is not None]
    present.sort(key=lambda pair: cast(Any, pair[0]), reverse=order is Order.DESC)
    absent = [line for value, line in values if value is None]
    return [*(line for _, line in present), *absent][:_MOST_SHOWN]


def _line(
    standing: Standing,
    window: Window,
    made: ReadyMade,
    past: History,
    lately: Row | None,
    most_rounds: int,
) -> Line:
    model = standing.model
    rank, before = standing.ranks.get(window), past.ranks[window].get(model.model_no)
    return Line(
        standing=standing,
        rank=rank,
        climbed=None if rank is None or before is None else before - rank,
        running=model.info.model_id in made.connected,
        new=is_new(standing, made, most_rounds),
        gone=is_gone(model, made.created_at_s),
        failing=failing(lately),
        past=past,
        answered=standing.answered / standing.rounds if standing.rounds else None,
        median_us=lately["median_us"] if lately is not None else None,
    )


def is_new(standing: Standing, made: ReadyMade, most_rounds: int) -> bool:
    """Whether a model joined within a day and has fewer than half of the rounds that others have."""
    return made.created_at_s - standing.model.joined_at_s < _DAY_S and 2 * standing.rounds < most_rounds


def failing(lately: Row | None) -> str | None:
    """What is wrong with a model's newest answers, None where most of them are good."""
    if lately is None or 2 * lately["bad"] <= lately["newest"]:
        return None
    return str(lately["detail"])


async def _history(context: Context, now_s: float) -> History:
    since_s = await overview.snapshot_before(context.readers, now_s - _DAY_S)
    times_s = await overview.snapshot_times(context.readers, now_s - _LOOK_BACK_S, now_s, _POINTS)
    rows = await overview.scores_at(context.readers, [*times_s, *([] if since_s is None else [since_s])])

    def work() -> History:
        scores: dict[int, dict[int, tuple[float | None, ...]]] = {}
        then = []
        while rows:  # freed here, beside the event loop
            at_s, model_no, rank, *values = rows.pop()
            scores.setdefault(model_no, {})[at_s] = tuple(values)
            if at_s == since_s and rank is not None:
                then.append((model_no, values))
        ranks = {window: _ranks(then, place) for place, window in enumerate(Window)}
        return History(since_s, ranks, times_s, scores)

    return await context.in_thread(work)


def _ranks(models: Sequence[tuple[int, Sequence[float | None]]], place: int) -> dict[int, int]:
    """By the window at `place`; equal scores share a rank (1, 2, 2, 4)."""
    scores = {model_no: value for model_no, values in models if (value := values[place]) is not None}
    ordered = sorted(scores.values(), reverse=True)
    first = {score: rank for rank, score in reversed(list(enumerate(ordered, 1)))}
    return {model_no: first[score] for model_no, score in scores.items()}


async def _answering(context: Context, made: ReadyMade) -> dict[int, Row]:
    numbers = [standing.model.model_no for standing in made.by_window[Window.ANCHOR][:_MOST_MODELS]]
    return {row["model_no"]: row for row in await overview.answering(context.readers, numbers)}


def _spark(past: History, model_no: int, place: int) -> Spark | None:
    """One window's scores, on the time axis that all lines share; the line breaks where there is none."""
    known = past.scores.get(model_no, {})
    scores = {
        at_s: value for at_s in past.times_s if (value := known.get(at_s, (None,) * 3)[place]) is not None
    }
    if len(scores) < 2:
        return None
    low, high = min(scores.values()), max(scores.values())
    width, height = _SPARK_WIDTH - 2 * _SPARK_EDGE, _SPARK_HEIGHT - 2 * _SPARK_EDGE

    def x(at_s: int) -> float:
        return _SPARK_EDGE + width * (at_s - past.times_s[0]) / (past.times_s[-1] - past.times_s[0])

    def y(score: float) -> float:
        return _SPARK_EDGE + height * ((high - score) / (high - low) if high > low else 0.5)

    path, pen = [], "M"
    for at_s in past.times_s:
        if at_s not in scores:
            pen = "M"
            continue
        path.append(f"{pen}{x(at_s):.1f} {y(scores[at_s]):.1f}")
        pen = "L"
    values = list(scores.values())
    return Spark(
        path="".join(path),
        end=(round(x(list(scores)[-1]), 1), round(y(values[-1]), 1)),
        zero=round(y(0.0), 1) if low < 0 < high else None,
        first=values[0],
        last=values[-1],
    )


def _next_rounds(context: Context, now_s: float) -> list[NextRound]:
    """The next round of each horizon, the soonest first."""
    config = context.live.config.game
    found = []
    for horizon_s in {setting.horizon_s for setting in config.settings if setting.interval_s}:
        asked = [setting for setting in config.settings if setting.horizon_s == horizon_s]
        at_s, asset = min(
            (next_due([setting], now_s), setting.asset) for setting in asked if setting.interval_s
        )
        found.append(NextRound(asset, horizon_s, at_s))
    return sorted(found, key=lambda round_: round_.at_s)


async def _first_scores_s(context: Context, now_s: float) -> float:
    """When there will be scores, as far as can be told (game time)."""
    config = context.live.config
    end_s = await overview.first_end_s(context.readers)
    if end_s is None:
        end_s = min(
            next_due([each], now_s) + each.horizon_s for each in config.game.settings if each.interval_s
        )
    wait_s = config.scoring.settle_delay_s + config.scoring.interval_s * context.live.clock.speed
    return end_s + wait_s
