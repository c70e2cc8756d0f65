"""One round: what was asked, what the models thought, what really happened, and who got which score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from sqlite3 import Row

from condor_lite.explain import SILENCE
from condor_lite.game.entities import AnswerStatus, RoundStatus
from condor_lite.report import params
from condor_lite.report.context import Context
from condor_lite.report.game import find_round, round_id
from condor_lite.report.pages import picture
from condor_lite.report.pages.common import FOR_S, query, show
from condor_lite.report.replies import Reply
from condor_lite.storage import queries

_MOST_SHOWN = 250  # as on the leaderboard: the others are found by their names


@dataclass(frozen=True, slots=True)
class RoundPageParams:
    round_id: str = field(metadata=params.path("such as BTC-3600-60-1700000000"))
    model: tuple[str, ...] = field(default=(), metadata=params.ids("model"))
    q: str = field(default="", metadata=params.word())


@dataclass(frozen=True, slots=True)
class Line:
    """A model in the table. `series`: its colour in the picture, if it is in it; `toggle`: the query that
    puts it in, or out.
    """

    answer: Row
    series: int | None
    toggle: str | None
    reason: str | None


async def page(context: Context, sent: RoundPageParams) -> Reply:
    """One round with its picture; `model` chooses whose forecasts are in it, `q` who is in the table."""
    since = context.stream.newest
    row = await find_round(context, sent.round_id)
    wanted = sent.model[: picture.MOST_FANS]
    if sent.q:  # there is no end of these
        async with context.large():
            return await _page(context, row, wanted, sent.q, since)
    key = ("round", row["round_no"], wanted)
    return await context.remembered(key, FOR_S, partial(_page, context, row, wanted, "", since))


async def _page(context: Context, row: Row, wanted: Sequence[str], q: str, since: str) -> Reply:
    config, now_s = context.live.config, context.live.clock.now()
    answers = await queries.round_answers(context.readers, row["round_no"])
    seen = await picture.outcome(context, row)
    is_scored = row["status"] == RoundStatus.SCORED and row["scorer_version"] is not None
    chosen = await picture.choose(context, row, answers, wanted, seen.start) if is_scored else []
    places = {one.model_id: place for place, one in enumerate(chosen, start=1)}
    return await show(
        context,
        "round.html",
        at="/rounds",
        since=since,
        round=row,
        round_id=round_id(row),
        segments=row["horizon_s"] // row["step_s"],
        is_scored=is_scored,
        is_over=row["resolvable_at_s"] <= now_s,
        seen=seen,
        move_bp=1e4 * (seen.end / seen.start - 1) if seen.start and seen.end else None,
        chosen=chosen,
        drawing=picture.drawing(row, seen, chosen),
        lines=await context.in_thread(_lines, answers, places, is_scored, q),
        answers=len(answers),
        most=_MOST_SHOWN,
        q=q,
        scores_after_s=context.live.clock.wall_s(config.scoring.settle_delay_s) + config.scoring.interval_s,
    )


def _lines(answers: Sequence[Row], places: dict[str, int], is_scored: bool, q: str) -> list[Line]:
    words = q.strip().casefold()
    found = [one for one in answers if words in f"{one['model_name']} {one['model_id']}".casefold()]
    return [_line(answer, places, is_scored, q) for answer in found[:_MOST_SHOWN]]


def _line(answer: Row, places: dict[str, int], is_scored: bool, q: str) -> Line:
    model_id = answer["model_id"]
    toggle = None
    if is_scored and answer["raw"] is not None:
        if model_id in places:
            toggle = query(q=q, model=[other for other in places if other != model_id])
        elif len(places) < picture.MOST_FANS:
            toggle = query(q=q, model=[*places, model_id])
    status = AnswerStatus(answer["answer_status"])
    reason = answer["detail"]
    if reason is None and status is not AnswerStatus.SUCCESS:
        reason = SILENCE[status]
    return Line(answer, places.get(model_id), toggle, reason)
