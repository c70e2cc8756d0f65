"""How spread out a distribution is: E|X - X'| of two independent draws, Gini's mean difference, by family.

It is the other half of the CRPS, E|X - x| - E|X - X'| / 2, from which these forms come (`families.py`).
"""

from __future__ import annotations

import numpy as np
from scipy import special

from condor_lite.game.families import CODES, SQRT_2, SQRT_PI, Floats, OfShape, half_step


def _constant(value: float) -> OfShape:
    return lambda a, b: np.full(a.shape, value)


def _t(a: Floats, b: Floats) -> Floats:
    finite = np.maximum(a, 1.0 + 1e-9)
    spread = 4.0 * np.sqrt(finite / np.pi) * half_step(0.5 * finite) ** 2 / half_step(finite - 0.5)
    return np.where(a > 1.0, spread / (finite - 1.0), np.inf)


def _lognorm(a: Floats, b: Floats) -> Floats:
    return np.asarray(2.0 * np.exp(0.5 * a * a) * special.erf(0.5 * a))


def _gamma(a: Floats, b: Floats) -> Floats:
    return 2.0 * half_step(a) / SQRT_PI


def _beta(a: Floats, b: Floats) -> Floats:
    return 2.0 * half_step(a) * half_step(b) / (SQRT_PI * (a + b) * half_step(a + b))


def _weibull(a: Floats, b: Floats) -> Floats:
    return np.asarray(-2.0 * special.gamma(1.0 + 1.0 / a) * np.expm1(-np.log(2.0) / a))


def _pareto(a: Floats, b: Floats) -> Floats:
    finite = np.maximum(a, 1.0 + 1e-9)
    return np.where(a > 1.0, 2.0 * finite / ((finite - 1.0) * (2.0 * finite - 1.0)), np.inf)


# By family code, of the standardised variable; `chi` and `f` have none in closed form.
SPREADS: dict[int, OfShape] = {
    CODES[name]: spread
    for name, spread in {
        "norm": _constant(2.0 / SQRT_PI),
        "t": _t,
        "laplace": _constant(1.5),
        "logistic": _constant(2.0),
        "lognorm": _lognorm,
        "expon": _constant(1.0),
        "gamma": _gamma,
        "beta": _beta,
        "uniform": _constant(1.0 / 3.0),
        "weibull_min": _weibull,
        "weibull_max": _weibull,
        "pareto": _pareto,
        "rayleigh": lambda a, b: SQRT_2 * _weibull(np.full(a.shape, 2.0), b),
        "chi2": lambda a, b: 2.0 * _gamma(0.5 * a, b),
        "cauchy": _constant(np.inf),
        "point": _constant(0.0),
    }.items()
}
