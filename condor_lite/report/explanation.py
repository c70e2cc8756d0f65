"""Why a model got the score it has: `/rounds/{round_id}/predictions/{model_id}`."""

from __future__ import annotations

from dataclasses import dataclass, field

import orjson

from condor_lite.errors import CondorError
from condor_lite.explain import Evidence, Explanation, NotExplained, conclude, failed, gather, obstacle
from condor_lite.game.scoring import SegmentScores
from condor_lite.report import params
from condor_lite.report.answers import PredictionDetail, moment_of_ms
from condor_lite.report.context import Context, NotFound
from condor_lite.report.replies import Reply, pack
from condor_lite.storage.database import QUERY_LIMIT_S, reading
from condor_lite.worker import ScoringItem


@dataclass(frozen=True, slots=True)
class PredictionParams:
    round_id: str = field(metadata=params.path("such as BTC-3600-60-1700000000"))
    model_id: str = field(metadata=params.path())
    scorer_version: int | None = field(
        default=None,
        metadata=params.whole(1, 10**9, "as this scorer scored it; left out, the one that counts"),
    )


async def prediction_detail(context: Context, sent: PredictionParams) -> Reply:
    """Everything one score is made of; only once its round is scored."""

    config = context.live.config

    def read() -> Evidence:
        with reading(config.storage.path, QUERY_LIMIT_S) as conn:
            return gather(conn, config, sent.round_id, sent.model_id, sent.scorer_version)

    try:
        evidence = await context.alone(read)
    except NotExplained as error:
        raise NotFound(str(error)) from None
    scores = obstacle(evidence, config) or await _scores_anew(context, evidence)
    return await context.alone(
        lambda: pack(_prediction_detail(conclude(evidence, scores)), context.max_age_s)
    )


async def _scores_anew(context: Context, evidence: Evidence) -> SegmentScores | str:
    """In a process of its own: an answer may be made to take long."""
    body = evidence.answer.body
    assert body is not None
    async with context.recounting():
        item = ScoringItem(body, evidence.round.setting, evidence.realised)
        try:
            scores = await context.recount.scores(evidence.rules, item)
        except CondorError as error:
            return failed(error)
    return failed(scores) if isinstance(scores, str) else scores


def _prediction_detail(found: Explanation) -> PredictionDetail:
    answer, result = found.answer, found.result
    return PredictionDetail(
        round_id=found.round.round_id,
        model_id=answer.model_id,
        model_name=answer.model_name,
        status=answer.status,
        reason=found.reason,
        rule=result.rule,
        target=result.target,
        scorer_version=result.scorer_version,
        exec_time_us=answer.exec_time_us,
        received_at=moment_of_ms(answer.received_at_ms),
        densities=None if found.densities is None else orjson.Fragment(found.densities),
        prices=found.prices,
        increments=found.increments,
        unresolved=found.unresolved,
        segment_scores=found.segment_scores,
        raw_score=answer.raw,
        counted=answer.counted,
        median=result.median,
        no_move=result.no_move,
        score=answer.score,
    )
