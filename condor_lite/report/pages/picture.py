"""A round's picture: the price before and after, and chosen models' forecasts as fans around it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from sqlite3 import Row
from statistics import median

import numpy as np

from condor_lite.errors import StartError
from condor_lite.explain import rules_of
from condor_lite.game.entities import Setting
from condor_lite.game.families import Floats
from condor_lite.pool import PoolError
from condor_lite.report.context import Busy, Context
from condor_lite.storage import pictures
from condor_lite.storage.rescores import load_rules
from condor_lite.worker import ValidationItem

MOST_FANS = 5

_LONGEST_BEFORE_S = 6 * 3600
_POINTS = 400
_STEPS = 300  # of a fan that are drawn
_FAN_FOR_S = 600.0
_GAP = 5  # times the usual distance between two points

Points = list[tuple[int, float | None]]


@dataclass(frozen=True, slots=True)
class Fan:
    """`quantiles`: for each of `ends_s` the price's 5, 25, 50, 75 and 95 % quantiles; the first is t0."""

    ends_s: list[int]
    quantiles: list[list[float]]


@dataclass(frozen=True, slots=True)
class Chosen:
    """A model in the picture. `role`: best, median, worst, or empty; `missing`: why it has no fan."""

    model_id: str
    model_name: str
    role: str
    score: float | None
    fan: Fan | None
    missing: str | None


@dataclass(frozen=True, slots=True)
class Outcome:
    """The price's way, with None where there is a gap; at the start and at the end of the round."""

    path: Points
    start: float | None
    end: float | None


async def outcome(context: Context, row: Row) -> Outcome:
    """The price from a while before a round until a little after, as far as it is known."""
    tick_s = context.live.config.feed.tick_s
    start_s, end_s, step_s = row["scheduled_at_s"], row["resolvable_at_s"], row["step_s"]
    before_s = min(max(row["horizon_s"], 12 * tick_s), _LONGEST_BEFORE_S)
    after_s = row["horizon_s"] // 10
    # Spans end where segments do, so that their end prices are among those that are drawn.
    parts = max(1, min(_POINTS * step_s // (before_s + row["horizon_s"] + after_s), step_s // tick_s))
    while step_s % parts:
        parts -= 1
    spacing_s = step_s // parts
    while (before_s + row["horizon_s"] + after_s) // spacing_s > pictures.MOST_POINTS:
        spacing_s *= 2
    until_s = end_s + after_s // spacing_s * spacing_s
    count = (until_s - start_s + before_s) // spacing_s
    found = await pictures.price_path(context.readers, row["asset"], until_s, spacing_s, count)
    return Outcome(with_gaps(found), _at(found, start_s, tick_s), _at(found, end_s, tick_s))


def with_gaps(points: Sequence[tuple[int, float]]) -> Points:
    """A None where far fewer points are than elsewhere: a line must not bridge it."""
    if len(points) < 3:
        return list(points)
    usual_s = median(after - before for (before, _), (after, _) in pairwise(points))
    path: Points = [points[0]]
    for before, after in pairwise(points):
        if after[0] - before[0] > _GAP * usual_s:
            path.append((before[0] + 1, None))
        path.append(after)
    return path


def _at(points: Sequence[tuple[int, float]], at_s: int, tick_s: int) -> float | None:
    return next((price for ts_s, price in reversed(points) if at_s - tick_s < ts_s <= at_s), None)


async def choose(
    context: Context, row: Row, answers: Sequence[Row], wanted: Sequence[str], start: float | None
) -> list[Chosen]:
    """The fans of the wanted models, or of the best, the median and the worst; only of a scored round."""
    scored = [answer for answer in answers if answer["raw"] is not None]
    roles: dict[str, str] = {}
    if scored:
        median_one = min(scored, key=lambda answer: abs(answer["score"] or 0.0))
        for answer, role in ((median_one, "median"), (scored[-1], "worst"), (scored[0], "best")):
            roles[answer["model_id"]] = role
    if wanted:
        asked = set(wanted[:MOST_FANS])
        models = [answer for answer in answers if answer["model_id"] in asked]
    else:
        models = [answer for answer in scored if answer["model_id"] in roles]
    by_id = (await context.ready()).by_id
    numbers = {
        answer["model_id"]: by_id[answer["model_id"]].model.model_no
        for answer in models
        if answer["model_id"] in by_id
    }
    return [
        await _chosen(context, row, answer, numbers.get(answer["model_id"]), roles, start)
        for answer in models
    ]


async def _chosen(
    context: Context,
    row: Row,
    answer: Row,
    model_no: int | None,
    roles: dict[str, str],
    start: float | None,
) -> Chosen:
    found: Fan | str
    if answer["raw"] is None or model_no is None:
        found = "it has no valid answer"
    elif start is None:
        found = "there is no price at the start of the round"
    else:
        key = ("fan", row["round_no"], model_no, row["scorer_version"])
        find = partial(_find_fan, context, row, model_no, start)
        try:
            found = await context.remembered(key, _FAN_FOR_S, find)
        except Busy:
            found = "too many are asked for just now: reload in a moment"
        except (PoolError, StartError) as error:
            found = f"its answer can't be drawn: {error}"
    return Chosen(
        model_id=answer["model_id"],
        model_name=answer["model_name"],
        role=roles.get(answer["model_id"], ""),
        score=answer["score"],
        fan=found if isinstance(found, Fan) else None,
        missing=None if isinstance(found, Fan) else found,
    )


async def _find_fan(context: Context, row: Row, model_no: int, start: float) -> Fan | str:
    config = context.live.config
    body = (await pictures.answer_bodies(context.readers, row["round_no"], [model_no])).get(model_no)
    if body is None:
        days = config.storage.keep_payloads_s / 86400
        return f"its answer is not stored any more: answers are kept for {days:g} days"
    scorer = await pictures.scorer(context.readers, row["scorer_version"])
    rules = rules_of(config, scorer["rule"], scorer["target"], load_rules(scorer["rules"]))
    setting = Setting(row["asset"], row["horizon_s"], row["step_s"])
    moves = rules.target == "price_change"
    item = ValidationItem(body, setting, start if moves else 1.0)
    async with context.recounting():
        quantiles = await context.recount.fan(rules, item)
    if isinstance(quantiles, str):
        return f"its answer can't be drawn: {quantiles}"
    return await context.in_thread(_fan, quantiles, setting, row["scheduled_at_s"], start, moves)


def _fan(quantiles: Floats, setting: Setting, start_s: int, start: float, moves: bool) -> Fan:
    """In prices, `moves`: from the quantiles of changes of the price; else of log returns."""
    with np.errstate(over="ignore"):
        prices = start + quantiles if moves else start * np.exp(quantiles)
    prices = np.clip(prices, 0.0 if not moves else -1e15, 1e15)
    ends = np.arange(0, setting.segments, -(-setting.segments // _STEPS))
    ends = np.unique(np.append(ends, setting.segments - 1))
    return Fan(
        ends_s=[start_s, *(start_s + setting.step_s * (ends + 1)).tolist()],
        quantiles=[[start] * prices.shape[1], *([_short(x) for x in row] for row in prices[ends].tolist())],
    )


def _short(value: float) -> float:
    """To the digits that can be seen."""
    return float(f"{value:.8g}")


def drawing(row: Row, seen: Outcome, chosen: Sequence[Chosen]) -> dict[str, object]:
    """What static/charts.js draws a round from."""
    return {
        "asset": row["asset"],
        "start": row["scheduled_at_s"],
        "end": row["resolvable_at_s"],
        "t": [at_s for at_s, _ in seen.path],
        "p": [price for _, price in seen.path],
        "range": _range(seen, chosen),
        "fans": [
            {
                "name": one.model_name,
                "series": place,
                "t": one.fan.ends_s,
                "q": [list(column) for column in zip(*one.fan.quantiles, strict=True)],
            }
            for place, one in enumerate(chosen, start=1)
            if one.fan is not None
        ],
    }


def _range(seen: Outcome, chosen: Sequence[Chosen]) -> list[float] | None:
    """The prices to show: all that happened, and the fans, unless one is hopelessly wide."""
    prices = [price for _, price in seen.path if price is not None]
    if not prices:
        return None
    low, high = min(prices), max(prices)
    fans = [one.fan.quantiles[-1] for one in chosen if one.fan is not None]
    if seen.start is not None and fans:
        usual = median(max(ends[-1] - seen.start, seen.start - ends[0]) for ends in fans)
        reach = 2.5 * max(usual, high - seen.start, seen.start - low)
        low = max(min(low, *(min(row) for row in fans)), seen.start - reach)
        high = min(max(high, *(max(row) for row in fans)), seen.start + reach)
    room = 0.06 * (high - low) or 0.001 * abs(high)
    return [low - room, high + room]
