"""SCORING.md, "Uncertainty": standard errors and probabilities from block sums."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from condor_lite.game.uncertainty import block_count, probability_better, standard_error

HOUR_S = 3600


def taken(count: int, models: int = 1) -> np.ndarray:
    return np.ones((count, models), dtype=bool)


@pytest.mark.parametrize(
    ("window_h", "horizon_s", "blocks"),
    [
        (168, HOUR_S, 14),
        (168, 12 * HOUR_S, 14),
        (168, 24 * HOUR_S, 7),
        (168, 13 * HOUR_S, 12),
        (168, 169 * HOUR_S, 0),
        (72, HOUR_S, 12),
        (72, 24 * HOUR_S, 3),
        (24, HOUR_S, 12),
        (24, 3 * HOUR_S, 8),
        (24, 90 * 60, 12),
        (24, 24 * HOUR_S, 1),
    ],
)
def test_blocks_are_equal_whole_hours_and_no_shorter_than_the_longest_horizon(window_h, horizon_s, blocks):
    assert block_count(window_h, horizon_s) == blocks


def test_the_standard_error_is_that_of_the_mean_of_the_blocks_times_their_number():
    sums = np.array([3.0, -1.0, 4.0, 1.0, 5.0, 9.0])
    expected = len(sums) * stats.sem(sums)
    assert standard_error(sums[:, None], taken(6))[0] == pytest.approx(expected, rel=1e-12)


def test_p_is_student_t_on_the_paired_differences():
    a, b = np.array([3.0, -1.0, 4.0, 1.0, 5.0, 9.0]), np.array([2.0, 0.0, 4.5, -1.0, 3.0, 8.0])
    expected = stats.ttest_rel(a, b, alternative="greater").pvalue
    assert probability_better((a - b)[:, None], taken(6))[0] == pytest.approx(1 - expected, rel=1e-12)
    assert probability_better((b - a)[:, None], taken(6))[0] == pytest.approx(expected, rel=1e-9)


def test_blocks_that_a_model_missed_are_left_out():
    sums = np.array([[1.0], [2.0], [1e9], [4.0], [3.0], [5.0]])
    present = np.array([[True], [True], [False], [True], [True], [True]])
    kept = sums[present[:, 0], 0]
    assert standard_error(sums, present)[0] == pytest.approx(5 * stats.sem(kept))
    assert probability_better(sums, present)[0] == pytest.approx(
        stats.t.cdf(stats.ttest_1samp(kept, 0)[0], 4)
    )


def test_under_five_blocks_nothing_is_claimed():
    sums = np.arange(4.0)[:, None]
    assert math.isnan(standard_error(sums, taken(4))[0])
    assert math.isnan(probability_better(sums, taken(4))[0])
    assert standard_error(np.empty((0, 2)), taken(0, 2)).shape == (2,)
    assert probability_better(np.empty((0, 0)), taken(0, 0)).shape == (0,)


def test_equal_models_are_even_and_a_constant_lead_is_certain():
    sums = np.array([[0.0, 1.0, -1.0]]).repeat(6, axis=0)
    assert probability_better(sums, taken(6, 3)).tolist() == [0.5, 1.0, 0.0]


def test_intervals_cover_about_what_they_claim_where_rounds_overlap_and_errors_persist():
    # Hourly errors: a day's moving sum (overlapping horizons) of an autoregressive series (persistence).
    rng = np.random.default_rng(5)
    models, hours, day = 1500, 168, 24
    noise = rng.normal(size=(hours + day + 100, models))
    persistent = np.zeros_like(noise)
    for at in range(1, len(noise)):
        persistent[at] = 0.5 * persistent[at - 1] + noise[at]
    sums = np.cumsum(persistent[100:], axis=0)
    hourly = sums[day:] - sums[:-day]
    count = block_count(hours, day * HOUR_S)
    blocks = hourly.reshape(count, hours // count, models).sum(axis=1)
    error = standard_error(blocks, taken(count, models))
    covered = np.abs(blocks.sum(axis=0)) <= stats.t.ppf(0.95, count - 1) * error
    assert 0.80 <= covered.mean() <= 0.94

    naive = hours * hourly.std(axis=0, ddof=1) / math.sqrt(hours)
    assert (np.abs(hourly.sum(axis=0)) <= 1.65 * naive).mean() < 0.6


def test_for_two_equal_models_p_averages_a_half_and_the_leaders_three_quarters():
    rng = np.random.default_rng(6)
    differences = rng.normal(size=(14, 4000))
    better = probability_better(differences, taken(14, 4000))
    assert better.mean() == pytest.approx(0.5, abs=0.02)
    assert np.maximum(better, 1 - better).mean() == pytest.approx(0.75, abs=0.02)
