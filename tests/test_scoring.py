"""Scores against the definition, other people's scorers and known answers; outcomes and verdicts."""

import json
import math
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from condor_lite.game import quadrature, scoring
from condor_lite.game.crps import crps
from condor_lite.game.density import Densities, Limits, decode
from condor_lite.game.entities import Round, Setting
from condor_lite.game.families import CODES, FAMILIES
from condor_lite.game.scoring import (
    SCORE,
    WAIT,
    Realised,
    RuleError,
    Rules,
    Series,
    load_rule,
    realise,
    score,
    verdict,
)

Floats = npt.NDArray[np.float64]
# One leaf: weight, family, loc, scale, then the family's shape parameters.
Leaf = tuple[float, str, float, float, *tuple[float, ...]]

SHAPES: dict[str, list[tuple[float, float]]] = {
    "t": [(0.8, 40)],
    "lognorm": [(0.05, 3)],
    "gamma": [(0.1, 200)],
    "beta": [(0.1, 50), (0.1, 50)],
    "weibull_min": [(0.3, 20)],
    "weibull_max": [(0.3, 20)],
    "pareto": [(0.9, 40)],
    "chi": [(0.3, 100)],
    "chi2": [(0.3, 200)],
    "f": [(0.5, 60), (2.2, 60)],
}
NAMES = [family.name for family in FAMILIES if family.name != "point"]


def build(*segments: list[Leaf]) -> Densities:
    rows = [
        (k, CODES[name], weight, loc, scale, *(*shapes, 0.0, 0.0)[:2])
        for k, leaves in enumerate(segments)
        for weight, name, loc, scale, *shapes in leaves
    ]
    table = np.array(rows, dtype=np.float64)
    columns = (table[:, i].copy() for i in range(2, 7))
    return Densities(len(segments), table[:, 0].astype(np.intp), table[:, 1].astype(np.uint8), *columns)


def one(leaves: list[Leaf], x: float) -> float:
    return float(crps(build(leaves), np.array([x]))[0])


def by_quadrature(leaves: list[Leaf], x: float) -> float:
    with np.errstate(all="ignore"):
        return float(quadrature.crps(build(leaves), np.array([x]))[0])


def law_of(leaf: Leaf) -> Any:
    _, name, loc, scale, *shapes = leaf
    return getattr(stats, name)(*shapes, loc=loc, scale=scale)


Curve = Callable[[Floats], Floats]


def tails(leaf: Leaf) -> tuple[Curve, Curve, list[float]]:
    """cdf, sf and the places to cut at, from scipy; a heavy tail is left to the integral to infinity."""
    _, name, loc, scale, *_ = leaf
    if name == "point":
        return (lambda z: (z >= loc) * 1.0), (lambda z: (z < loc) * 1.0), [loc]
    law = law_of(leaf)
    levels = np.array([0.05, 0.3, 0.7, 0.95])
    deep = 10.0 ** -np.arange(2.0, 26.0)  # a decade a piece: no rule of few points sees a heavy tail in one
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy may not find the deepest quantiles
        places = np.concatenate([law.ppf(levels), law.isf(deep), law.ppf(deep), law.support()])
    return law.cdf, law.sf, [float(place) for place in places if abs(place - loc) <= 1e4 * scale]


RULES = [np.polynomial.legendre.leggauss(points) for points in (15, 24)]


def integral(f: Curve, cuts: list[float]) -> float:
    """Of `f` from the first to the last cut: each piece is halved until two Gauss-Legendre rules agree."""
    low, high = np.array(cuts[:-1]), np.array(cuts[1:])
    total = 0.0
    for _ in range(60):
        middle, half = (low + high) / 2, (high - low) / 2
        coarse, fine = (half * (f(middle[:, None] + half[:, None] * x) @ weight) for x, weight in RULES)
        rough = np.abs(fine - coarse) > 1e-10 * (total + fine.sum()) / len(cuts)
        total += float(fine[~rough].sum())
        low, high = (
            np.concatenate([low[rough], middle[rough]]),
            np.concatenate([middle[rough], high[rough]]),
        )
        if not len(low):
            break
    return total + float(fine[rough].sum())


def reference(leaves: list[Leaf], x: float) -> float:
    """The definition, from scipy's distributions: the integral of F^2 below x and of (1 - F)^2 above it."""
    parts = [(leaf[0], *tails(leaf)) for leaf in leaves]
    places = sorted({x, *(place for *_, cuts in parts for place in cuts)})
    at_x = places.index(x)

    def below(z: Floats) -> Floats:
        return np.asarray(sum(weight * cdf(z) for weight, cdf, _, _ in parts) ** 2)

    def above(z: Floats) -> Floats:
        return np.asarray(sum(weight * sf(z) for weight, _, sf, _ in parts) ** 2)

    with np.errstate(all="ignore"):  # far out, powers overflow
        total = integral(below, places[: at_x + 1]) + integral(above, places[at_x:])
        for end, sign, tail in ((places[-1], 1.0, above), (places[0], -1.0, below)):
            unit = max(abs(end - x), 1e-9)

            def far(v: Floats, end: float = end, step: float = sign * unit, tail: Any = tail) -> Floats:
                return np.asarray(tail(end + step * np.expm1(v)) * abs(step) * np.exp(v))

            if tail(np.array(end)) > 0.0:
                total += integral(far, [*np.arange(0.0, 41.0), *np.arange(50.0, 401.0, 10.0)])
    return total


@st.composite
def any_leaf(draw: st.DrawFn, names: list[str], spread: float = 1.0) -> Leaf:
    name = draw(st.sampled_from(names))
    scale = 10.0 ** draw(st.floats(-spread, spread))
    shapes = [math.exp(draw(st.floats(math.log(low), math.log(high)))) for low, high in SHAPES.get(name, [])]
    loc = draw(st.floats(-3, 3)) * scale
    return (1.0, name, loc, scale, *shapes)


def place_in(leaf: Leaf, level: float) -> float:
    return leaf[2] if leaf[1] == "point" else float(law_of(leaf).ppf(level))


# --- known answers ----------


def test_known_answers() -> None:
    normal: Leaf = (1.0, "norm", 0.0, 1.0)
    assert one([normal], 0.0) == pytest.approx(0.2336949772551091, rel=1e-13)
    assert one([normal], 1.0) == pytest.approx(0.6024413576276163, rel=1e-13)
    assert one([(1.0, "point", 2.5, 1.0)], -1.0) == 3.5
    assert one([(0.5, "point", 0.0, 1.0), (0.5, "point", 1.0, 1.0)], 0.0) == 0.25
    assert one([(1.0, "cauchy", 0.0, 1.0)], 0.0) == pytest.approx(2 * math.log(2) / math.pi, rel=1e-13)
    assert one([(1.0, "uniform", 0.0, 1.0)], 0.5) == pytest.approx(1 / 12, rel=1e-13)
    assert one([(1.0, "laplace", 0.0, 1.0)], 0.0) == pytest.approx(0.25, rel=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_a_family_alone_is_right_by_its_definition(name: str) -> None:
    @settings(max_examples=20)
    @given(any_leaf([name], spread=4.0), st.sampled_from([1e-4, 0.3, 0.5, 0.9, 0.9999]))
    def agrees(leaf: Leaf, level: float) -> None:
        x = place_in(leaf, level)
        expected = reference([leaf], x)
        assert one([leaf], x) == pytest.approx(expected, rel=1e-6)
        assert by_quadrature([leaf], x) == pytest.approx(expected, rel=1e-6)

    agrees()


@settings(max_examples=100)
@given(
    st.lists(
        st.tuples(st.floats(0.001, 1.0), any_leaf([*NAMES, "point"], spread=3.0)), min_size=2, max_size=4
    ),
    st.sampled_from([1e-3, 0.5, 0.99]),
)
def test_a_mixture_is_right_by_its_definition(parts: list[tuple[float, Leaf]], level: float) -> None:
    total = sum(weight for weight, _ in parts)
    leaves: list[Leaf] = [(weight / total, *leaf[1:]) for weight, leaf in parts]  # type: ignore[misc]
    x = place_in(leaves[0], level)
    assert one(leaves, x) == pytest.approx(reference(leaves, x), rel=1e-6)


def random_leaves(name: str, n: int, rng: np.random.Generator) -> list[Leaf]:
    """Over all that is legal, extremes included."""
    family = FAMILIES[CODES[name]]
    leaves: list[Leaf] = []
    for _ in range(n):
        shapes = []
        for shape in family.shapes:
            low = max(shape.lowest, shape.above * 1.001)
            wide = math.exp(rng.uniform(math.log(low), math.log(shape.highest)))
            shapes.append(
                wide if rng.random() < 0.5 else min(shape.above + 10 ** rng.uniform(-3, 1), shape.highest)
            )
            shapes[-1] = max(shapes[-1], low)
        leaves.append((1.0, name, float(rng.normal()), 10 ** rng.uniform(-9, 9), *shapes))
    return leaves


@pytest.mark.parametrize(
    "name", [family.name for family in FAMILIES if family.crps and family.name != "point"]
)
def test_closed_forms_and_quadrature_agree_on_all_that_is_legal(name: str) -> None:
    rng = np.random.default_rng(CODES[name])
    leaves = random_leaves(name, 400, rng)
    densities = build(*([leaf] for leaf in leaves))
    reach = rng.normal(size=400) * 10 ** rng.uniform(-4, 6, 400)
    x = np.array([leaf[2] + leaf[3] * far for leaf, far in zip(leaves, reach, strict=True)])
    x[::5] = densities.loc[::5]
    closed = crps(densities, x)
    with np.errstate(all="ignore"):
        np.testing.assert_allclose(closed, quadrature.crps(densities, x), rtol=1e-6)
    assert (closed >= 0.0).all()


@pytest.mark.parametrize(
    ("name", "shapes", "x"),
    [
        ("gamma", (2e-6,), 0.0),
        ("chi2", (4e-6,), 0.0),
        ("beta", (6e-6, 950.0), 0.0),
        ("beta", (950.0, 6e-6), 1.0),
        ("beta", (1e6, 1e-6), 1.0),
    ],
)
def test_at_a_pole_a_closed_form_does_not_cancel(name: str, shapes: tuple[float, ...], x: float) -> None:
    law = getattr(stats, name)(*(reversed(shapes) if x else shapes))

    def integrand(w: float) -> float:
        return float(law.sf(np.exp(w)) ** 2 * np.exp(w))

    true = sum(integrate.quad(integrand, low, low + 3, epsrel=1e-10)[0] for low in range(-60, 6, 3))
    for scale in (1e-9, 1.0, 1e9):
        value = one([(1.0, name, 0.0, scale, *shapes)], x * scale)
        assert value == pytest.approx(scale * true, rel=1e-6, abs=0.0)


@pytest.mark.parametrize(
    "name", ["norm", "t", "laplace", "logistic", "lognorm", "expon", "gamma", "beta", "uniform"]
)
def test_scoringrules_agrees_where_it_has_the_family(name: str) -> None:
    sr = pytest.importorskip("scoringrules")
    theirs: dict[str, Callable[..., Any]] = {
        "norm": lambda y, a, b: sr.crps_normal(y, 0.0, 1.0),
        "t": lambda y, a, b: sr.crps_t(y, a, 0.0, 1.0),
        "laplace": lambda y, a, b: sr.crps_laplace(y, 0.0, 1.0),
        "logistic": lambda y, a, b: sr.crps_logistic(y, 0.0, 1.0),
        "lognorm": lambda y, a, b: sr.crps_lognormal(np.abs(y), 0.0, a),
        "expon": lambda y, a, b: sr.crps_exponential(np.abs(y), 1.0),
        "gamma": lambda y, a, b: sr.crps_gamma(np.abs(y), a, 1.0),
        "beta": lambda y, a, b: sr.crps_beta(np.abs(y) % 1.0, a, b),
        "uniform": lambda y, a, b: sr.crps_uniform(y, 0.0, 1.0),
    }
    rng = np.random.default_rng(1)
    y = rng.normal(size=200) * 2.0
    a, b = rng.uniform(1.1, 3.0, 200), rng.uniform(1.1, 3.0, 200)
    if name in ("lognorm", "expon", "gamma", "beta"):
        y = np.abs(y) % 1.0 if name == "beta" else np.abs(y)
    shapes = [(float(a[i]), float(b[i]))[: len(SHAPES.get(name, []))] for i in range(200)]
    ours = crps(build(*([(1.0, name, 0.0, 1.0, *shapes[i])] for i in range(200))), y)
    np.testing.assert_allclose(ours, theirs[name](y, a, b), rtol=1e-9)


def test_mixtures_of_normals_agree_with_scoringrules_and_with_quadrature() -> None:
    sr = pytest.importorskip("scoringrules")
    rng = np.random.default_rng(2)
    m, s, w = rng.normal(size=(50, 4)), 10 ** rng.uniform(-3, 1, (50, 4)), rng.random((50, 4))
    w /= w.sum(axis=1, keepdims=True)
    x = rng.normal(size=50)
    densities = build(*([(w[k, i], "norm", m[k, i], s[k, i]) for i in range(4)] for k in range(50)))
    ours = crps(densities, x)
    np.testing.assert_allclose(ours, sr.crps_mixnorm(x, m, s, w), rtol=1e-9)
    np.testing.assert_allclose(ours, quadrature.crps(densities, x), rtol=1e-9)


@pytest.mark.parametrize("df", [0.501, 0.6, 0.99, 0.9999, 1.0, 1.0001, 1.0079, 1.0081, 1.5])
def test_t_with_few_degrees_of_freedom(df: float) -> None:
    for x in (0.0, 0.7, -30.0, 1e6):
        value = one([(1.0, "t", 0.0, 1.0, df)], x)
        assert value == pytest.approx(by_quadrature([(1.0, "t", 0.0, 1.0, df)], x), rel=1e-8)
        if df == 1.0:
            assert value == pytest.approx(one([(1.0, "cauchy", 0.0, 1.0)], x), rel=1e-8)


# --- properties ----------


@settings(max_examples=40)
@given(
    st.lists(any_leaf([*NAMES, "point"]), min_size=1, max_size=3),
    st.floats(-5, 5),
    st.sampled_from([1e-6, 1e-3, 7.0, 1e5]),
    st.floats(-100, 100),
)
def test_crps_scales_and_shifts_with_the_distribution(
    leaves: list[Leaf], x: float, c: float, shift: float
) -> None:
    share = 1.0 / len(leaves)
    mixed: list[Leaf] = [(share, *leaf[1:]) for leaf in leaves]  # type: ignore[misc]
    moved: list[Leaf] = [(share, leaf[1], c * leaf[2] + shift * c, c * leaf[3], *leaf[4:]) for leaf in leaves]
    base = one(mixed, x)
    assert base >= 0.0
    assert one(moved, c * x + shift * c) == pytest.approx(c * base, rel=1e-8, abs=1e-13 * c)


@pytest.mark.parametrize("name", [*NAMES, "point"])
def test_a_mixture_of_identical_components_equals_the_component(name: str) -> None:
    shapes = [math.sqrt(low * high) for low, high in SHAPES.get(name, [])]
    for x in (-1.0, 0.3, 0.4, 9.0):
        alone = one([(1.0, name, 0.3, 2.0, *shapes)], x)
        mixed = one([(w, name, 0.3, 2.0, *shapes) for w in (0.2, 0.5, 0.3)], x)
        assert mixed == pytest.approx(alone, rel=1e-9)


def test_a_score_does_not_depend_on_what_else_is_in_the_batch() -> None:
    rng = np.random.default_rng(3)
    segments: list[list[Leaf]] = []
    for k in range(60):
        names = [NAMES[k % len(NAMES)]] if k % 3 == 0 else list(rng.choice([*NAMES, "point"], 3))
        if k % 7 == 0:
            names = ["norm"] * (1 + k % 5)
        if k % 11 == 0:
            names = ["point"] * (1 + k % 5)
        shapes = [[math.sqrt(low * high) for low, high in SHAPES.get(name, [])] for name in names]
        segments.append(
            [
                (1 / len(names), n, rng.normal(), rng.uniform(0.1, 3), *s)
                for n, s in zip(names, shapes, strict=True)
            ]
        )
    x = rng.normal(size=60)
    together = crps(build(*segments), x)
    assert together.tolist() == [one(leaves, float(x[k])) for k, leaves in enumerate(segments)]


def test_discrete_crps_is_the_energy_form() -> None:
    rng = np.random.default_rng(4)
    places, weights = rng.normal(size=40).round(1), rng.random(40)
    weights /= weights.sum()
    leaves: list[Leaf] = [(w, "point", v, 1.0) for w, v in zip(weights, places, strict=True)]
    for x in (-9.0, 0.0, float(places[3]), 0.123, 9.0):
        apart = np.abs(places[:, None] - places)
        energy = weights @ np.abs(places - x) - 0.5 * weights @ apart @ weights
        assert one(leaves, x) == pytest.approx(energy, rel=1e-12)


@pytest.mark.parametrize("rule", ["crps", "log"])
def test_a_proper_rule_prefers_the_truth_to_its_distortions(rule: str) -> None:
    """The expected score under the true distribution, averaged over its quantiles."""
    levels = (np.arange(2000) + 0.5) / 2000
    truth: list[Leaf] = [(0.7, "norm", 0.0, 1e-3), (0.3, "norm", 0.0, 3e-3)]
    grid = np.linspace(-0.02, 0.02, 40001)
    cdf = sum(leaf[0] * stats.norm.cdf(grid, leaf[2], leaf[3]) for leaf in truth)
    x = np.interp(levels, cdf, grid)

    def expected(leaves: list[Leaf]) -> float:
        outcome = Realised(np.arange(2001), np.ones(2001), x, 2000, 1e4, 1.0)
        return score([(build(*[leaves] * 2000), outcome)], Rules(rule=rule))[0].raw

    best = expected(truth)
    distorted: list[list[Leaf]] = [
        [(w, name, loc + shift, scale * wide) for w, name, loc, scale in truth]
        for shift, wide in ((2e-4, 1), (-2e-4, 1), (0, 0.8), (0, 1.25), (0, 0.1), (0, 10), (1e-3, 1.2))
    ]
    distorted += [
        [(1.0, "norm", 0.0, 1.8e-3)],
        [(1.0, "laplace", 0.0, 1.0e-3)],
        [(1.0, "t", 0.0, 1.0e-3, 1.5)],
        [(1.0, "norm", 0.0, 1e-9)],
    ]
    assert all(expected(leaves) > best for leaves in distorted)


# --- other people's scorers ----------


def as_spec(leaves: list[Leaf]) -> dict[str, Any]:
    names = {"t": ["df"], "gamma": ["a"], "lognorm": ["s"]}
    return {
        "type": "mixture",
        "components": [
            {
                "weight": w,
                "density": {
                    "type": "builtin",
                    "name": name,
                    "params": {
                        "loc": loc,
                        "scale": scale,
                        **dict(zip(names.get(name, []), shapes, strict=True)),
                    },
                },
            }
            for w, name, loc, scale, *shapes in leaves
        ],
    }


def test_the_grid_of_crunch_synth_agrees_within_its_own_error_and_errs_beyond_its_bounds() -> None:
    evaluator = pytest.importorskip("crunch_synth.tracker_evaluator")
    inside: list[Leaf] = [(0.6, "norm", 5.0, 120.0), (0.4, "t", -10.0, 60.0, 5.0)]
    for x in (-300.0, 0.0, 77.0):
        for points in (1024, 20_001):
            grid = evaluator.crps_integral(as_spec(inside), x, -4000, 4000, points)
            assert one(inside, x) == pytest.approx(grid, abs=8000 / (points - 1))
    wider: list[Leaf] = [(1.0, "norm", 0.0, 8000.0)]
    truth = reference(wider, 100.0)
    assert one(wider, 100.0) == pytest.approx(truth, rel=1e-9)
    assert evaluator.crps_integral(as_spec(wider), 100.0, -4000, 4000, 1024) < 0.8 * truth


@pytest.mark.parametrize("name", NAMES)
def test_likelihood_equals_densitypdf(name: str) -> None:
    theirs = pytest.importorskip("densitypdf").density_pdf
    shapes = [math.sqrt(low * min(high, 30)) for low, high in SHAPES.get(name, [])]
    keys = [shape.name for shape in FAMILIES[CODES[name]].shapes]
    params = {"loc": -0.2, "scale": 1.3, **dict(zip(keys, shapes, strict=True))}
    other = {"type": "builtin", "name": "norm", "params": {"loc": 0.0, "scale": 1.0}}
    spec = {
        "type": "mixture",
        "components": [
            {"weight": 3, "density": {"type": "scipy", "name": name, "params": params}},
            {"weight": 1, "density": other},
        ],
    }
    setting = Setting("BTC", 300, 300)
    densities = decode(json.dumps([spec]).encode(), setting, Limits(16, 2048))
    for x in (-2.0, 0.3, 1.05, 4.0):
        outcome = Realised(np.arange(2), np.ones(2), np.array([x]), 1, 1e4, 1.0)
        (result,) = score([(densities, outcome)], Rules(rule="likelihood"))
        assert result.raw == pytest.approx(float(theirs(spec, x)), rel=1e-12)


def test_a_pole_of_a_density_is_worth_no_infinity() -> None:
    densities = build([(1.0, "gamma", 0.0, 1.0, 0.5)])
    outcome = Realised(np.arange(2), np.ones(2), np.zeros(1), 1, 1e4, 0.0)
    assert score([(densities, outcome)], Rules(rule="likelihood"))[0].raw == 1e12


# --- rules and batches ----------


def outcome_of(increments: list[float], unit: float = 1e4) -> Realised:
    x = np.array(increments)
    resolved = x[np.isfinite(x)]
    n = len(x)
    mean = float(np.abs(resolved).mean() * unit) if len(resolved) else math.nan
    return Realised(np.arange(n + 1), np.ones(n + 1), x, len(resolved), unit, mean)


def test_crps_is_in_basis_points_and_averages_the_resolved_segments() -> None:
    densities = build(*[[(1.0, "norm", 0.0, 1e-3)]] * 3)
    (result,) = score([(densities, outcome_of([0.0, math.nan, 1e-3]))], Rules())
    assert result.values[[0, 2]] == pytest.approx([2.336949772551091, 6.024413576276163], rel=1e-12)
    assert math.isnan(result.values[1])
    assert result.raw == pytest.approx((2.336949772551091 + 6.024413576276163) / 2, rel=1e-12)


def test_a_segment_whose_score_is_no_number_is_not_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(densities: Densities, x: npt.NDArray[np.float64]) -> Any:
        return np.where(x > 0.0, np.nan, 1.0), np.ones(len(x))

    monkeypatch.setattr(scoring, "crps_and_spread", broken)
    densities = build(*[[(1.0, "norm", 0.0, 1e-3)]] * 3)
    bad, good = score(
        [(densities, outcome_of([0.0, math.nan, 1e-3])), (densities, outcome_of([0.0, math.nan, -1e-3]))],
        Rules(),
    )
    assert math.isnan(bad.raw)
    assert good.raw == 1e4


def test_price_changes_and_log_returns_give_the_same_basis_points() -> None:
    for price in (1e-5, 1.0, 1e5):
        densities = build([(1.0, "t", 0.0, 1e-3 * price, 3.0)])
        (result,) = score(
            [(densities, outcome_of([2e-3 * price], 1e4 / price))], Rules(target="price_change")
        )
        assert result.raw == pytest.approx(1e4 * one([(1.0, "t", 0.0, 1e-3, 3.0)], 2e-3), rel=1e-9)


def test_log_is_the_probability_of_the_move_as_quoted() -> None:
    rules = Rules(rule="log", log_halfwidth_bp=0.5)
    densities = build([(1.0, "norm", 0.0, 1e-3)], [(0.25, "point", 1e-3, 1.0), (0.75, "point", 0.0, 1.0)])
    (result,) = score([(densities, outcome_of([2e-3, 1e-3]))], rules)
    expected = stats.norm.cdf(20.5, scale=10) - stats.norm.cdf(19.5, scale=10)
    assert result.values == pytest.approx([-math.log(expected), math.log(4)], rel=1e-9)
    (missed,) = score([(densities, outcome_of([0.5, 0.5]))], rules)
    assert missed.values == pytest.approx([-math.log(1e-9)] * 2)


def test_a_batch_scores_each_answer_as_alone() -> None:
    first = build([(1.0, "norm", 0.0, 1e-3)], [(1.0, "t", 0.0, 1e-3, 3.0)])
    second = build([(0.5, "norm", 0.0, 1e-3), (0.5, "point", 0.0, 1.0)])
    nothing = build([(1.0, "laplace", 0.0, 1e-3)])
    items = [
        (first, outcome_of([1e-3, math.nan])),
        (second, outcome_of([2e-3], 3.0)),
        (nothing, outcome_of([math.nan])),
    ]
    for rule in ("crps", "log", "likelihood"):
        rules = Rules(rule=rule)
        together = score(items, rules)
        for item, result in zip(items, together, strict=True):
            (alone,) = score([item], rules)
            np.testing.assert_array_equal(alone.values, result.values)
            assert len(result.values) == item[0].n
        assert math.isnan(together[2].raw)
    assert score([], Rules()) == []


def test_a_spike_gains_nothing_by_its_width_or_by_weights_that_are_not_normalised() -> None:
    wide, spike = build([(1.0, "norm", 0.0, 1e-3)]), build([(1.0, "norm", 0.0, 1e-9)])
    outcome = outcome_of([8e-4])
    honest, sharp = score([(wide, outcome), (spike, outcome)], Rules())
    assert honest.raw < sharp.raw
    assert sharp.raw == pytest.approx(8.0, rel=1e-5)
    setting, limits = Setting("BTC", 300, 300), Limits(16, 2048)
    density = {"type": "builtin", "name": "norm", "params": {"scale": 1e-3}}
    values = []
    for weights in ((1, 1), (1e-300, 1e-300), (1e9, 1e9)):
        spec = {"type": "mixture", "components": [{"density": density, "weight": w} for w in weights]}
        values.append(
            score([(decode(json.dumps([spec]).encode(), setting, limits), outcome)], Rules())[0].raw
        )
    assert values == [values[0]] * 3
    assert values[0] == pytest.approx(honest.raw, rel=1e-12)


# A host's own rules, loaded as "tests.test_scoring:..." or whatever this module is called.
def absolute_median(densities: Densities, x: Floats) -> Floats:
    return np.abs(x - densities.mix(densities.loc))


absolute_median.lower_is_better = True  # type: ignore[attr-defined]


def raising(densities: Densities, x: Floats) -> Floats:
    raise ValueError("no such luck")


def short(densities: Densities, x: Floats) -> Floats:
    return x[:-1]


def infinite(densities: Densities, x: Floats) -> Floats:
    return np.where(x > 0, np.inf, x)


def test_own_rules_are_called_with_densities_and_increments() -> None:
    name = f"{__name__}:absolute_median"
    assert load_rule(name).lower_is_better is True
    assert load_rule(name).capped is False
    densities = build([(1.0, "norm", 1.0, 1.0)], [(1.0, "norm", 2.0, 1.0)])
    (result,) = score([(densities, outcome_of([4.0, math.nan]))], Rules(rule=name))
    assert result.raw == 3.0
    assert result.error is None


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("raising", "the scoring rule raised ValueError: no such luck"),
        ("short", "the scoring rule returned shape (1,), not (2,)"),
        ("infinite", "the scoring rule returned inf for segment 2"),
    ],
)
def test_an_own_rule_that_fails_marks_the_answer(function: str, words: str) -> None:
    densities = build(*[[(1.0, "norm", 0.0, 1.0)]] * 2)
    (result,) = score([(densities, outcome_of([0.0, 1.0]))], Rules(rule=f"{__name__}:{function}"))
    assert result.error == words
    assert math.isnan(result.raw)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("crsp", "known are crps, log, likelihood"),
        (f"{__name__}:nothing", "can't be imported: AttributeError"),
        ("no_such_module:rule", "can't be imported: ModuleNotFoundError"),
        (f"{__name__}:SHAPES", "is not a function"),
        (f"{__name__}:raising", "set raising.lower_is_better to True or False"),
    ],
)
def test_a_rule_that_can_not_be_used_says_why(name: str, words: str) -> None:
    with pytest.raises(RuleError, match="scoring") as caught:
        load_rule(name)
    assert words in str(caught.value)


def test_built_in_rules_say_which_way_is_up() -> None:
    assert [(load_rule(n).lower_is_better, load_rule(n).capped) for n in ("crps", "log", "likelihood")] == [
        (True, True),
        (True, False),
        (False, False),
    ]


def test_the_fingerprint_changes_with_every_rule_and_only_then() -> None:
    rules = Rules()
    changes: list[dict[str, Any]] = [
        {"rule": "log"},
        {"target": "price_change"},
        {"log_halfwidth_bp": 1.0},
        {"max_components": 3},
        {"max_segment_bytes": 100},
        {"tick_s": 30},
        {"max_staleness_s": 60},
        {"rule": f"{__name__}:short"},
        {"rule": f"{__name__}:infinite"},
    ]
    prints = {rules.fingerprint(), *(replace(rules, **change).fingerprint() for change in changes)}
    assert len(prints) == len(changes) + 1
    assert Rules().fingerprint() == rules.fingerprint()


# --- outcomes and verdicts ----------

T0 = 1_700_000_040
MINUTES = Setting("BTC", 300, 60)


def series(*points: tuple[int, float]) -> Series:
    return Series(
        np.array([T0 + t for t, _ in points], np.int64), np.array([p for _, p in points], np.float64)
    )


def test_increments_are_log_returns_between_fresh_prices() -> None:
    prices = series(
        (-300, 5.0),
        (0, 100.0),
        (60, 101.0),
        (120, 101.0),
        (179, 103.0),
        (240, 104.0),
        (300, 105.0),
        (360, 1.0),
    )
    realised = realise(prices, MINUTES, T0, 60, "log_return")
    assert realised.boundary_ts_s.tolist() == [T0 + 60 * k for k in range(6)]
    assert realised.boundary_price.tolist() == [100.0, 101.0, 101.0, 103.0, 104.0, 105.0]
    expected = [math.log(1.01), 0.0, math.log(103 / 101), math.log(104 / 103), math.log(105 / 104)]
    assert realised.increments == pytest.approx(expected, rel=1e-13, abs=0)
    assert (realised.resolved, realised.unit) == (5, 1e4)
    assert realised.no_move == pytest.approx(1e4 * sum(expected) / 5)
    assert realised.void_reason is None


def test_price_changes_are_scaled_by_the_first_price() -> None:
    prices = series((0, 200.0), *((60 * k, 200.0 + k) for k in range(1, 6)))
    realised = realise(prices, MINUTES, T0, 60, "price_change")
    assert realised.increments.tolist() == [1.0] * 5
    assert realised.unit == 50.0
    assert realised.no_move == 50.0


def test_a_price_of_one_tick_of_age_is_not_fresh() -> None:
    prices = series((0, 100.0), (60, 101.0), (240, 102.0), (300, 103.0))
    realised = realise(prices, MINUTES, T0, 60, "log_return")
    assert np.isnan(realised.boundary_price).tolist() == [False, False, True, True, False, False]
    assert np.isfinite(realised.increments).tolist() == [True, False, False, False, True]
    assert realised.resolved == 2
    why = "prices resolve only 2 of 5 segments; no price came for 180 s of the round"
    assert realised.void_reason == why
    assert realise(prices, MINUTES, T0, 120, "log_return").void_reason is None


def test_no_prices_make_a_round_void_and_not_a_crash() -> None:
    for prices in (series(), series((1000, 5.0)), series((0, 0.0), (60, -1.0), (120, math.nan))):
        realised = realise(prices, MINUTES, T0, 60, "log_return")
        assert realised.resolved == 0
        assert math.isnan(realised.no_move)
        assert str(realised.void_reason).startswith("prices resolve only 0 of 5 segments")
    late = series(*((60 * k, 100.0) for k in range(1, 6)))
    assert (
        realise(late, MINUTES, T0, 60, "price_change").void_reason
        == "there is no price at the start of the round"
    )
    assert realise(late, MINUTES, T0, 60, "log_return").void_reason is None


@given(st.lists(st.floats(0.5, 2.0), min_size=6, max_size=6), st.floats(1e-5, 1e5))
@settings(max_examples=30)
def test_log_returns_do_not_depend_on_the_level_of_prices(prices: list[float], level: float) -> None:
    base = realise(series(*((60 * k, p) for k, p in enumerate(prices))), MINUTES, T0, 60, "log_return")
    other = realise(
        series(*((60 * k, p * level) for k, p in enumerate(prices))), MINUTES, T0, 60, "log_return"
    )
    np.testing.assert_allclose(base.increments, other.increments, rtol=1e-9, atol=1e-14)
    assert base.increments.sum() == pytest.approx(math.log(prices[-1] / prices[0]), abs=1e-12)


@pytest.mark.parametrize(
    ("newest", "now", "expected"),
    [
        (299, 10_000, "void"),
        (299, 7499, WAIT),
        (299, 7500, "void"),
        (None, 7500, "void"),
        (None, 0, WAIT),
        (300, 359.9, WAIT),
        (300, 360.0, SCORE),
        (420, 400, SCORE),
        (300, 99_999, SCORE),
    ],
)
def test_a_round_waits_for_its_prices_to_be_final(newest: int | None, now: float, expected: str) -> None:
    round_ = Round("BTC", 300, 60, T0)
    at = None if newest is None else T0 + newest
    told = verdict(at, T0 + now, round_, settle_delay_s=60, void_after_s=7200)
    assert told == (
        "no price of BTC came within 7200 s of the end of the round" if expected == "void" else expected
    )


def test_time_that_the_game_did_not_see_pass_voids_nothing() -> None:
    told = partial(verdict, T0 + 299, round_=Round("BTC", 300, 60, T0), settle_delay_s=60, void_after_s=7200)
    assert told(now_s=T0 + 97_199, leapt_to_s=T0 + 90_000.0) == WAIT
    assert told(now_s=T0 + 97_200, leapt_to_s=T0 + 90_000.0) not in (WAIT, SCORE)


def test_workers_start_without_heavy_imports() -> None:
    """Each pool process imports the scorer: it must not pull in what it doesn't need."""
    heavy = [
        "scipy.stats",
        "scipy.optimize",
        "scipy.integrate",
        "scoringrules",
        "anyio",
        "starlette",
        "aiosqlite",
        "httpx",
    ]
    code = f"import sys, condor_lite.game.scoring; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
