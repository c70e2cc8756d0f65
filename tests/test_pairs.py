"""Mixtures by pairs of components agree with quadrature wherever they claim anything."""

from __future__ import annotations

import numpy as np
import pytest

from condor_lite.game import pairs, quadrature
from condor_lite.game.crps import crps
from condor_lite.game.families import CODES
from condor_lite.game.mixture import Densities, concatenate

KINDS = {
    "t": ["t"],
    "laplace": ["laplace"],
    "logistic": ["logistic"],
    "normal and t": ["norm", "t"],
    "all with points": ["norm", "t", "logistic", "point"],
    "laplace with points": ["laplace", "point"],
    "laplace with normals": ["laplace", "norm"],
    "gamma": ["gamma"],
}


def mixtures(
    names: list[str], n: int, seed: int, *, size: int = 3, widths: float = 1.0, offsets: float = 0.3
) -> Densities:
    """`widths`, `offsets`: how different the components are."""
    rng = np.random.default_rng(seed)
    family = np.array([CODES[name] for name in rng.choice(names, n * size)], np.uint8)
    family[::size] = CODES[names[0]]  # a segment of nothing but points is not for quadrature
    segment = np.repeat(np.arange(n), size)
    weight = rng.random(len(family)) ** 3 + 1e-6
    heavy = np.isin(family, [CODES["t"], CODES["gamma"]])
    return Densities(
        n=n,
        segment=segment,
        family=family,
        weight=weight / np.bincount(segment, weight)[segment],
        loc=offsets * rng.normal(size=len(family)),
        scale=np.where(family == CODES["point"], 1.0, np.exp(widths * rng.normal(size=len(family)))),
        a=np.where(heavy, np.exp(rng.uniform(np.log(1.8), np.log(1e3), len(family))), 0.0),
        b=np.zeros(len(family)),
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("widths", "offsets"), [(0.3, 0.1), (1.0, 1.0), (3.0, 0.1), (1.0, 10.0)])
def test_what_is_claimed_is_right(kind: str, widths: float, offsets: float) -> None:
    densities = mixtures(KINDS[kind], 60, 1, widths=widths, offsets=offsets)
    x = 2.0 * np.random.default_rng(2).normal(size=densities.n)
    with np.errstate(all="ignore"):
        value, spread, claimed = pairs.crps_and_spread(densities, x)
        right, right_spread = quadrature.crps_and_spread(densities, x)
    assert value[claimed] == pytest.approx(right[claimed], rel=1e-7)
    assert spread[claimed] == pytest.approx(right_spread[claimed], rel=1e-6)
    assert np.isnan(value[~claimed]).all()
    assert crps(densities, x) == pytest.approx(right, rel=1e-7)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("laplace with normals", "gamma")])
def test_what_participants_send_is_claimed(kind: str) -> None:
    densities = mixtures(KINDS[kind], 200, 3, widths=0.7, offsets=0.1)
    densities.a[(densities.a > 0) & (densities.a < 2.5)] = 2.5
    _, _, claimed = pairs.crps_and_spread(densities, np.full(densities.n, 0.3))
    assert claimed.mean() > 0.8


def test_laplace_components_of_equal_and_nearly_equal_scale() -> None:
    for gap in (0.0, 1e-15, 1e-9, 1e-4):
        n = np.arange(2)
        one = Densities(
            1,
            np.zeros(2, np.intp),
            np.full(2, CODES["laplace"], np.uint8),
            np.full(2, 0.5),
            0.7 * n,
            1.0 + gap * n,
            np.zeros(2),
            np.zeros(2),
        )
        value, _, claimed = pairs.crps_and_spread(one, np.array([0.2]))
        assert claimed.all()
        assert value == pytest.approx(quadrature.crps(one, np.array([0.2])), rel=1e-9)


def test_a_rare_component_far_away_leaves_no_precision_to_chance() -> None:
    """Both sums are a thousand times their difference."""
    one = Densities(
        1,
        np.zeros(2, np.intp),
        np.full(2, CODES["t"], np.uint8),
        np.array([0.999, 0.001]),
        np.array([0.0, 3e3]),
        np.array([1e-3, 1e3]),
        np.full(2, 4.0),
        np.zeros(2),
    )
    x = np.zeros(1)
    assert crps(one, x) == pytest.approx(quadrature.crps(one, x), rel=1e-7)


def test_a_value_does_not_depend_on_what_else_is_in_the_batch() -> None:
    batch = [mixtures(["norm", "t", "point"], 1, seed) for seed in range(30)]
    together = crps(concatenate(batch), np.full(30, 0.4))
    assert together.tolist() == [crps(one, np.full(1, 0.4))[0] for one in batch]


def test_scale_and_place_cost_no_precision() -> None:
    densities = mixtures(["norm", "t"], 50, 4)
    x = np.random.default_rng(5).normal(size=50)
    expected = crps(densities, x)
    for factor in (1e-9, 1e5):
        scaled = mixtures(["norm", "t"], 50, 4)
        scaled.loc[:] *= factor
        scaled.scale[:] *= factor
        assert crps(scaled, x * factor) == pytest.approx(expected * factor, rel=1e-9)
