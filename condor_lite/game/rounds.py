"""A round's raw scores -> what they count as, for whom (SCORING.md, "From raw scores to ranks", Round)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Set

import numpy as np
from numpy.typing import NDArray

from condor_lite.game.entities import ModelScore, RoundScores, RuleInfo, VoidRound

# In units of the round's median. Real bad days reach 1.7: the first binds on hopeless answers only.
WORST_ANSWER = 3.0
WORST_MISS = 1.25
MISS_QUANTILE = 0.9


def score_round(
    raw: Mapping[int, float | None], benchmarks: Set[int], no_move: float, info: RuleInfo
) -> RoundScores | VoidRound:
    """Score all models that a round counts for.

    `raw`: by `model_no`, the mean over the resolved segments; None for a model that failed, timed out, was
    absent or sent an invalid answer (a number that is not finite is no valid score either). `no_move`: a, the
    mean |x_k| in bp. A round that can't rank anyone comes back as a `VoidRound`.

    Raises ValueError for a `no_move` that can't be one: the caller has not resolved the round.
    """
    if not 0 <= no_move < math.inf:
        raise ValueError(f"no_move must be finite and >= 0, got {no_move}")
    if no_move == 0:
        return VoidRound("the price did not move")
    values = np.array([math.nan if value is None else value for value in raw.values()], dtype=float)
    valid = np.isfinite(values)
    if not valid.any():
        return VoidRound("no model gave a valid answer")

    ranked = valid & np.array([model_no not in benchmarks for model_no in raw])
    median = float(np.median(values[ranked if ranked.any() else valid]))
    worse = 1 if info.lower_is_better else -1
    missing = worse * float(np.quantile(worse * values[valid], MISS_QUANTILE))
    counted = np.where(valid, values, missing)
    if info.capped:
        counted = np.minimum(counted, np.where(valid, WORST_ANSWER * median, WORST_MISS * median))
    score = 100 * gain(median, counted, info) / (no_move if info.capped else 1.0)

    return RoundScores(
        median=median,
        no_move=no_move,
        models={
            model_no: ModelScore(value if ok else None, worth, shown)
            for model_no, value, ok, worth, shown in zip(
                raw, values.tolist(), valid.tolist(), counted.tolist(), score.tolist(), strict=True
            )
        },
    )


def gain(
    median: float | NDArray[np.float64], counted: NDArray[np.float64], info: RuleInfo
) -> NDArray[np.float64]:
    """How much better than the median model: m - raw, where higher is better raw - m."""
    return median - counted if info.lower_is_better else counted - median
