"""A score's whole sum in plain text, for `condor-lite score`."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

import orjson

from condor_lite.explain import Explanation, RoundExplanation
from condor_lite.game.entities import Round
from condor_lite.storage.evidence import AnswerEvidence, Result

_NAME_CHARS = 32
_EXACT_CHARS = 23


def round_lines(explained: RoundExplanation) -> Iterator[str]:
    """The round, and every model's part in it, best first."""
    yield from _heading(explained.round, explained.result)
    yield ""
    yield f"{'model':<{_NAME_CHARS}} {'status':<8} {'raw':>12} {'counted':>12} {'score':>10}  detail"
    for answer in explained.answers:
        yield (
            f"{_shown(answer.model_name):<{_NAME_CHARS}} {answer.status:<8} {_number(answer.raw, 12)} "
            f"{_number(answer.counted, 12)} {_number(answer.score, 10, 3)}  {answer.detail or ''}".rstrip()
        )


def answer_lines(explained: Explanation) -> Iterator[str]:
    """One model's score, segment by segment, down to the sum that was stored."""
    answer, result = explained.answer, explained.result
    yield from _heading(explained.round, result)
    yield ""
    yield f"model    {_shown(answer.model_name)} ({answer.model_id}), {answer.status}"
    if answer.exec_time_us is not None:
        yield f"answered in {answer.exec_time_us / 1000:.1f} ms"
    if explained.reason:
        yield f"note     {explained.reason}"
    yield ""
    columns = " ".join(f"{name:>{_EXACT_CHARS}}" for name in ("price", "increment", "score"))
    yield f"{'segment':>7}  {'until (UTC)':<19} {columns}  density"
    densities = orjson.loads(explained.densities) if explained.densities is not None else []
    start_s, start_price = explained.prices[0]
    yield f"{'start':>7}  {_time(start_s):<19} {_exact(start_price)}"
    for at, (ts_s, price) in enumerate(explained.prices[1:]):
        density = orjson.dumps(densities[at]).decode() if _has(densities, at) else ""
        remark = f"({explained.unresolved[at]})  " if explained.unresolved[at] else ""
        value = explained.segment_scores[at] if explained.segment_scores else None
        yield (
            f"{at + 1:>7}  {_time(ts_s):<19} {_exact(price)} {_exact(explained.increments[at])} "
            f"{_exact(value)}  {remark}{density[:200]}".rstrip()
        )
    yield ""
    yield from _sum(answer, result)


def _heading(round_: Round, result: Result) -> Iterator[str]:
    yield f"round    {round_.round_id}"
    yield f"asked    {_time(round_.scheduled_at_s)} UTC, resolved {_time(round_.resolvable_at_s)} UTC"
    carried = f", carried over into {result.shown_as}" if result.shown_as != result.scorer_version else ""
    yield f"rule     {result.rule} on {result.target}, scorer version {result.scorer_version}{carried}"
    yield f"segments {result.resolved} of {round_.setting.segments} resolved"
    yield f"median   {result.median!r} (m: the median model's raw score)"
    yield f"no move  {result.no_move!r} (a: what the forecast of no move would have scored)"


def _sum(answer: AnswerEvidence, result: Result) -> Iterator[str]:
    if answer.raw is not None:
        yield f"raw      {answer.raw!r} = the mean of the resolved segments' scores"
    if answer.counted is None or answer.score is None:
        return
    if answer.counted != answer.raw:
        why = "capped at 3 m"
        if answer.raw is None:
            limit = ", at most 1.25 m" if result.rule == "crps" else ""
            why = f"no valid answer: the 90th percentile of the round's valid scores{limit}"
        yield f"counted  {answer.counted!r} ({why})"
    if result.rule == "crps":
        formula = "100 * (m - counted) / a"
    elif (answer.score > 0) == (answer.counted > result.median):  # the rule says that higher is better
        formula = "100 * (counted - m)"
    else:
        formula = "100 * (m - counted)"
    yield f"score    {answer.score!r} = {formula}"


def _has(densities: object, at: int) -> bool:
    return isinstance(densities, list) and at < len(densities)


def _shown(name: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in name)[:_NAME_CHARS]


def _time(ts_s: int) -> str:
    return datetime.fromtimestamp(ts_s, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _exact(value: float | None) -> str:
    """All digits: who adds them up gets the stored sum."""
    return f"{'-' if value is None else repr(value):>{_EXACT_CHARS}}"


def _number(value: float | None, width: int, decimals: int = 6) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:>{width}.{decimals}f}"
