"""SCORING.md, "Round": what a round's raw scores count as, and for whom."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from condor_lite.game.entities import RoundScores, RuleInfo, VoidRound
from condor_lite.game.rounds import score_round

CRPS = RuleInfo("crps", lower_is_better=True, capped=True)
LOG = RuleInfo("log", lower_is_better=True, capped=False)
LIKELIHOOD = RuleInfo("likelihood", lower_is_better=False, capped=False)

RAW = st.dictionaries(st.integers(1, 50), st.none() | st.floats(1e-6, 1e6), min_size=1, max_size=12).filter(
    lambda raw: any(value is not None for value in raw.values())
)


def scored(raw, benchmarks=frozenset(), no_move=10.0, info=CRPS) -> RoundScores:
    scores = score_round(raw, benchmarks, no_move, info)
    assert isinstance(scores, RoundScores)
    return scores


def test_m_is_the_median_of_the_valid_raw_scores():
    assert scored({1: 4.0, 2: 6.0, 3: 7.0, 4: None}).median == 6.0
    assert scored({1: 4.0, 2: 6.0}).median == 5.0


def test_benchmarks_do_not_move_the_median():
    assert scored({1: 4.0, 2: 6.0, 3: 8.0, 4: 100.0, 5: 0.1}, benchmarks={4, 5}).median == 6.0


@pytest.mark.parametrize("others", [{}, {3: None}])
def test_the_median_is_of_all_models_where_there_are_only_benchmarks(others):
    assert scored({1: 4.0, 2: 6.0, **others}, benchmarks={1, 2}).median == 5.0


def test_a_score_is_the_gain_over_the_median_in_per_cent_of_no_move():
    scores = scored({1: 4.0, 2: 6.0, 3: 7.0}, no_move=8.0)
    assert [scores.models[no].score for no in (1, 2, 3)] == [25.0, 0.0, -12.5]
    assert scores.no_move == 8.0


def test_a_single_model_is_its_own_median():
    scores = scored({7: 5.0})
    assert (scores.median, scores.models[7].score) == (5.0, 0.0)


def test_a_hopeless_answer_counts_as_three_medians_and_keeps_its_raw_score():
    hopeless = scored({1: 4.0, 2: 6.0, 3: 1e9}, no_move=6.0).models[3]
    assert (hopeless.raw, hopeless.counted, hopeless.score) == (1e9, 18.0, -200.0)


def test_real_bad_days_are_not_capped():
    assert scored({1: 4.0, 2: 6.0, 3: 17.9}).models[3].counted == 17.9


def test_a_missing_answer_counts_with_the_90th_percentile():
    raw = {no: 100.0 + no for no in range(11)}
    missing = scored({**raw, 99: None}).models[99]
    assert missing.raw is None
    assert missing.counted == pytest.approx(109.0)


def test_a_missing_answer_counts_with_at_most_one_and_a_quarter_medians():
    assert scored({1: 4.0, 2: 6.0, 3: 60.0, 4: None}).models[4].counted == 7.5


def test_the_90th_percentile_is_of_all_valid_answers_benchmarks_included():
    raw = {1: 100.0, 2: 100.0, 3: 110.0, 4: 110.0, 5: None}
    assert scored(raw, benchmarks={3, 4}).models[5].counted == pytest.approx(110.0)


def test_a_score_that_is_not_finite_is_no_valid_answer():
    scores = scored({1: 4.0, 2: math.nan, 3: math.inf})
    assert scores.median == 4.0
    assert scores.models[2].raw is None
    assert scores.models[3].raw is None


def test_a_round_in_which_nothing_moved_is_void():
    assert score_round({1: 4.0}, set(), 0.0, CRPS) == VoidRound("the price did not move")


@pytest.mark.parametrize("raw", [{}, {1: None, 2: None}])
def test_a_round_without_a_valid_answer_is_void(raw):
    assert score_round(raw, set(), 5.0, CRPS) == VoidRound("no model gave a valid answer")


@pytest.mark.parametrize("no_move", [-1.0, math.nan, math.inf])
def test_an_unresolved_round_is_refused(no_move):
    with pytest.raises(ValueError, match="no_move"):
        score_round({1: 4.0}, set(), no_move, CRPS)


def test_other_rules_cap_nothing_and_divide_by_nothing():
    scores = scored({1: 1.0, 2: 2.0, 3: 20.0, 4: None}, no_move=8.0, info=LOG)
    assert scores.models[3].counted == 20.0
    assert scores.models[4].counted == pytest.approx(np.quantile([1.0, 2.0, 20.0], 0.9))
    assert scores.models[1].score == 100.0


def test_where_higher_is_better_the_raw_score_enters_negative():
    scores = scored({1: 1.0, 2: 2.0, 3: 5.0, 4: None}, info=LIKELIHOOD)
    assert [scores.models[no].score for no in (1, 2, 3)] == [-100.0, 0.0, 300.0]
    assert scores.models[4].counted == pytest.approx(np.quantile([1.0, 2.0, 5.0], 0.1))


@given(RAW, st.floats(1e-6, 1e6))
def test_scores_keep_the_order_and_no_rival_changes_a_difference(raw, no_move):
    scores = scored(raw, no_move=no_move)
    models = [model for model in scores.models.values() if model.raw is not None]
    for model in scores.models.values():
        assert model.counted <= 3 * scores.median
        assert model.score == pytest.approx(100 * (scores.median - model.counted) / no_move)
    for one in models:
        for other in models:
            assert (one.raw <= other.raw) <= (one.score >= other.score)


@given(RAW, st.floats(1e-6, 1e6), st.floats(1e-3, 1e3))
def test_a_change_of_the_price_unit_changes_no_score(raw, no_move, factor):
    scaled = {no: None if value is None else value * factor for no, value in raw.items()}
    for no, model in scored(scaled, no_move=no_move * factor).models.items():
        assert model.score == pytest.approx(scored(raw, no_move=no_move).models[no].score, rel=1e-9, abs=1e-6)
