"""Fans of cumulated paths: against the sums whose distributions are known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

from condor_lite.game.families import BY_NAME, CODES, POINT
from condor_lite.game.fan import QUANTILES, fan
from condor_lite.game.mixture import Densities

SHAPES = {
    "t": (3.0,),
    "lognorm": (0.4,),
    "gamma": (2.0,),
    "beta": (2.0, 3.0),
    "weibull_min": (1.5,),
    "weibull_max": (1.5,),
    "pareto": (3.0,),
    "chi": (3.0,),
    "chi2": (4.0,),
    "f": (5.0, 8.0),
}
NORMAL = stats.norm.ppf(QUANTILES)


def densities(*segments: list[tuple[float, str, float, float, tuple[float, ...]]]) -> Densities:
    """From segments of (weight, family, loc, scale, shapes)."""
    leaves = [(k, *leaf) for k, segment in enumerate(segments) for leaf in segment]
    columns: Any = list(zip(*leaves, strict=True))
    shapes = np.array([(*own, 0.0, 0.0)[:2] for own in columns[5]])
    return Densities(
        len(segments),
        np.array(columns[0]),
        np.array([CODES[name] for name in columns[2]], np.uint8),
        np.array(columns[1]),
        np.array(columns[3]),
        np.array(columns[4]),
        shapes[:, 0],
        shapes[:, 1],
    )


def test_normal_segments_add_up_to_a_normal_path() -> None:
    n = 288
    loc, scale = 0.1, 2.0
    found = fan(densities(*[[(1.0, "norm", loc, scale, ())]] * n))
    k = np.arange(1, n + 1)[:, None]
    assert found.shape == (n, 5)
    assert np.abs((found - k * loc) / (scale * np.sqrt(k)) - NORMAL).max() < 0.15
    assert (np.diff(found, axis=1) > 0).all()


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_one_segment_has_its_own_quantiles(name: str) -> None:
    shapes = SHAPES.get(name, ())
    (found,) = fan(densities([(1.0, name, 1.0, 2.0, shapes)]))
    law = getattr(stats, name)(*shapes, loc=1.0, scale=2.0)
    assert law.cdf(found) == pytest.approx(QUANTILES, abs=0.025)


def test_a_mixture_is_drawn_by_its_weights() -> None:
    (found,) = fan(densities([(0.4, "norm", -100.0, 1.0, ()), (0.6, "uniform", 100.0, 1.0, ())]))
    assert found[1] == pytest.approx(stats.norm.ppf(0.25 / 0.4, -100.0), abs=0.2)
    assert found[2:] == pytest.approx(100.0 + (np.array(QUANTILES[2:]) - 0.4) / 0.6, abs=0.05)


def test_points_walk_like_coins() -> None:
    coins = [[(0.5, "norm", 0.0, 1.0, ()), (0.5, "norm", 0.0, 1.0, ())] for _ in range(100)]
    one = densities(*coins)
    one.family[:] = POINT
    one.loc[:] = np.tile([-1.0, 1.0], 100)
    found = fan(one)
    assert sorted(set(found[0])) == [-1.0, 1.0]
    assert found[-1] == pytest.approx(10.0 * NORMAL, abs=2.0)


def test_heavy_tails_leave_numbers() -> None:
    found = fan(densities(*[[(1.0, "cauchy", 0.0, 1e9, ())]] * 50))
    assert np.isfinite(found).all()


def test_a_long_answer_costs_a_bounded_number_of_draws() -> None:
    found = fan(densities(*[[(1.0, "norm", 0.0, 1.0, ())]] * 5000))
    assert found[-1] / np.sqrt(5000) == pytest.approx(NORMAL, abs=0.35)


def test_the_same_answer_gives_the_same_fan() -> None:
    one = densities([(1.0, "t", 0.0, 1.0, (3.0,))], [(1.0, "laplace", 0.0, 1.0, ())])
    assert (fan(one) == fan(one)).all()
