"""Why a model got the score it has: all that it is made of, computed once more from what is stored."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import orjson

from condor_lite.config import Config
from condor_lite.errors import CondorError
from condor_lite.game.density import decode
from condor_lite.game.entities import AnswerStatus, Round, RoundStatus
from condor_lite.game.outcome import BASIS_POINTS, Realised, realise
from condor_lite.game.scoring import Rules, SegmentScores, score
from condor_lite.score import configured_rules
from condor_lite.storage.evidence import (
    AnswerEvidence,
    Result,
    find_answers,
    find_result,
    find_round,
    find_versions,
    knows_model,
)
from condor_lite.storage.repositories import load_series

_SAME = 1e-12  # relative: how well the score computed anew must agree with the stored one

SILENCE = {
    AnswerStatus.FAILED: "the call failed",
    AnswerStatus.TIMEOUT: "no answer within the round's deadline",
    AnswerStatus.ABSENT: "not connected, or still being fed the price history, when the round was held",
}


class NotExplained(CondorError):
    """There is nothing to explain, or not yet; the message says why."""


@dataclass(frozen=True, slots=True)
class RoundKey:
    """The parts of a `round_id`."""

    asset: str
    horizon_s: int
    step_s: int
    scheduled_at_s: int


@dataclass(frozen=True, slots=True)
class RoundExplanation:
    """A scored round and what came of every model in it, best first."""

    round: Round
    result: Result
    answers: list[AnswerEvidence]


@dataclass(frozen=True, slots=True)
class Evidence:
    """What one score is computed from. `sources`: the names that `realised.boundary_source` numbers."""

    round: Round
    result: Result
    answer: AnswerEvidence
    rules: Rules
    realised: Realised
    sources: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Explanation:
    """One answer and its score. Lists are by segment, `prices` (time in epoch seconds, price) by end point.

    `densities` is the answer's JSON as it was sent, None where it is no JSON or not there any more. None in a
    list: no fresh price, an unresolved segment; `unresolved` says by segment why, None for those that are
    resolved. `reason` says what else is missing, and why.
    """

    round: Round
    result: Result
    answer: AnswerEvidence
    reason: str | None
    densities: bytes | None
    prices: list[tuple[int, float | None]]
    increments: list[float | None]
    unresolved: list[str | None]
    segment_scores: list[float | None] | None


def parse_round_id(round_id: str) -> RoundKey | None:
    """`BTC-3600-60-1700000000` -> its parts; None for anything else. An asset's name may hold a dash."""
    asset, *numbers = round_id.rsplit("-", 3)
    if len(numbers) != 3 or not asset:
        return None
    if not all(number.isascii() and number.isdigit() and len(number) <= 12 for number in numbers):
        return None
    return RoundKey(asset, *map(int, numbers))


def explain_round(conn: sqlite3.Connection, round_id: str, version: int | None = None) -> RoundExplanation:
    """All models' scores in one round, those that count or one scorer's. Raises NotExplained where there are
    none.
    """
    held, result = _scored_round(conn, round_id, version)
    assert held.round_no is not None
    return RoundExplanation(held, result, find_answers(conn, held.round_no, result.shown_as))


def explain(
    conn: sqlite3.Connection, config: Config, round_id: str, model_id: str, version: int | None = None
) -> Explanation:
    """One model's score in one round, the one that counts or one scorer's, computed anew here and now.

    Raises NotExplained as `gather` does.
    """
    evidence = gather(conn, config, round_id, model_id, version)
    return conclude(evidence, obstacle(evidence, config) or _scores(evidence))


def gather(
    conn: sqlite3.Connection, config: Config, round_id: str, model_id: str, version: int | None = None
) -> Evidence:
    """All that is stored about one model's score in one round.

    Raises NotExplained where the round is unknown or not scored (until then its answers are secret), or where
    the model was not part of it.
    """
    held, result = _scored_round(conn, round_id, version)
    assert held.round_no is not None
    answers = find_answers(conn, held.round_no, result.shown_as, model_id)
    if not answers:
        if knows_model(conn, model_id):
            raise NotExplained("this model was neither asked in the round nor missed in it")
        raise NotExplained("no model with this id has ever taken part")
    rules = rules_of(config, result.rule, result.target, result.rules)
    realised, sources = _realised(conn, held, rules)
    return Evidence(held, result, answers[0], rules, realised, sources)


def obstacle(evidence: Evidence, config: Config) -> str | None:
    """Why the score can't be computed anew, None where it can be tried."""
    answer = evidence.answer
    if answer.status is not AnswerStatus.SUCCESS:
        return answer.detail or SILENCE[answer.status]
    if answer.payload is None:
        days = config.storage.keep_payloads_s / 86400
        return f"the answer itself is not stored any more: answers are kept for {days:g} days"
    if answer.raw is None:
        return answer.detail or "the answer could not be scored"
    if evidence.realised.void_reason is not None:
        return "the prices of the round are not stored any more"
    return None


def failed(reason: object) -> str:
    return f"the score can't be computed anew: {reason}"


def conclude(evidence: Evidence, scores: SegmentScores | str) -> Explanation:
    """`scores`: computed anew from the evidence, or why they are not."""
    answer, realised = evidence.answer, evidence.realised
    segments, reason = None, None
    if isinstance(scores, str):
        reason = scores
    else:
        segments = _numbers(scores.values)
        if answer.raw is None or not math.isclose(scores.raw, answer.raw, rel_tol=_SAME, abs_tol=1e-12):
            reason = (
                f"computed anew the raw score is {scores.raw:.9g}, not the stored one: prices are gone, or "
                "the scoring rules have changed since"
            )
    return Explanation(
        round=evidence.round,
        result=evidence.result,
        answer=answer,
        reason=reason,
        densities=answer.payload if answer.payload is not None and _is_json(answer.payload) else None,
        prices=list(
            zip(realised.boundary_ts_s.tolist(), _numbers(realised.boundary_price), strict=True),
        ),
        increments=_numbers(realised.increments),
        unresolved=list(_unresolved(realised, evidence.sources)),
        segment_scores=segments,
    )


def _scored_round(conn: sqlite3.Connection, round_id: str, version: int | None) -> tuple[Round, Result]:
    key = parse_round_id(round_id)
    if key is None:
        raise NotExplained("a round's id looks like BTC-3600-60-1700000000: asset, horizon, step, time")
    held = find_round(conn, key.asset, key.horizon_s, key.step_s, key.scheduled_at_s)
    if held is None or held.round_no is None:
        raise NotExplained("no such round is stored: it was never due, is still to come, or is long past")
    result = find_result(conn, held.round_no, version)
    if result is None and (versions := find_versions(conn, held.round_no)):
        raise NotExplained(
            f"scorer version {version} has not scored this round; these have: "
            + ", ".join(map(str, versions))
        )
    if result is None or held.status is not RoundStatus.SCORED:
        raise NotExplained(_unscored(held))
    return held, result


def _unscored(held: Round) -> str:
    if held.status in (RoundStatus.OPEN, RoundStatus.CLOSED):
        return "the round is not scored yet: answers are shown when it is"
    return f"the round is {held.status.value} and has no scores: {held.reason or 'no reason was noted'}"


def _realised(conn: sqlite3.Connection, held: Round, rules: Rules) -> tuple[Realised, tuple[str, ...]]:
    """The round's outcome, and the names that its `boundary_source` numbers stand for."""
    from_s = held.scheduled_at_s - rules.max_staleness_s
    series, sources = load_series(conn, held.asset, from_s, held.resolvable_at_s)
    return realise(series, held.setting, held.scheduled_at_s, rules.tick_s, rules.target), sources


def _unresolved(realised: Realised, sources: tuple[str, ...]) -> Iterator[str | None]:
    """Why each segment is not resolved, None for those that are."""
    between = realised.between_sources
    for at, known in enumerate(np.isfinite(realised.increments).tolist()):
        if known:
            yield None
        elif between[at] and realised.boundary_source is not None:
            first, then = (sources[number] for number in realised.boundary_source[at : at + 2].tolist())
            yield f"the source of the prices changed from {first} to {then}"
        else:
            yield "there is no fresh price at both its ends"


def _scores(evidence: Evidence) -> SegmentScores | str:
    rules, realised, payload = evidence.rules, evidence.realised, evidence.answer.payload
    assert payload is not None
    scale_unit = BASIS_POINTS / realised.unit
    try:
        densities = decode(
            payload, evidence.round.setting, rules.limits, rule=rules.rule, scale_unit=scale_unit
        )
        (scores,) = score([(densities, realised)], rules)
    except CondorError as error:
        return failed(error)
    return scores if scores.error is None else failed(scores.error)


def rules_of(config: Config, rule: str, target: str, stored: Rules | None) -> Rules:
    """A scorer's rules: those stored with it, or, where it is older than that, the configured ones."""
    return stored or replace(configured_rules(config), rule=rule, target=target)


def _is_json(payload: bytes) -> bool:
    try:
        orjson.loads(payload)
    except orjson.JSONDecodeError:
        return False
    return True


def _numbers(values: npt.NDArray[np.float64]) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values.tolist()]
