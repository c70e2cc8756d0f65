"""The distribution families a model may answer with: probabilities, densities, closed-form CRPS.

Everything works on standardised values y = (x - loc) / scale and is vectorised over leaves; `a` and `b` are
the shape parameters (in the order of `Family.shapes`, unused ones are 0) and broadcast against `y`.
Parameters and spelling are scipy's. Tail probabilities are computed directly on either side, never as 1 - F,
so that they keep their relative precision.

Closed forms: Jordan, Krueger, Lerch (2019), "Evaluating Probabilistic Forecasts with scoringRules", appendix
A, for norm, t, laplace, logistic, lognorm, expon, gamma, beta and uniform; the others by the same identity,
CRPS = E|X - x| - E|X - X'| / 2. They are our own rather than the `scoringrules` package's because a payload
is untrusted: values outside the support, t with df <= 1 and far tails must come out right, and silently.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import special

Floats = npt.NDArray[np.float64]
Tail = Callable[[Floats, Floats, Floats, bool], Floats]
OfShape = Callable[[Floats, Floats], Floats]

SQRT_2 = float(np.sqrt(2.0))
SQRT_PI = float(np.sqrt(np.pi))
SQRT_2_PI = float(np.sqrt(2.0 * np.pi))
TINY = 1e-300


@dataclass(frozen=True, slots=True)
class Shape:
    """A shape parameter and its bounds. `above` is exclusive, with the reason that a participant reads."""

    name: str
    above: float = 0.0
    why: str = ""
    lowest: float = 1e-6
    highest: float = 1e6


@dataclass(frozen=True, slots=True)
class Family:
    """`tail(y, a, b, upper)` is P(X <= y), or P(X > y) where `upper`; `crps` is None where quadrature has to
    do.

    `edges` are the places where it is not smooth. `breaks(a, b)` gives ascending points, shape (leaves,
    points), that enclose all of the distribution that matters and between which it is smooth. `exponent` is
    the power with which a heavy tail falls (None: faster than any).
    """

    name: str
    tail: Tail
    pdf: Callable[[Floats, Floats, Floats], Floats]
    breaks: OfShape
    crps: Callable[[Floats, Floats, Floats], Floats] | None
    shapes: tuple[Shape, ...] = ()
    exponent: OfShape | None = None
    edges: tuple[float, ...] = ()


def _fixed(*points: float) -> OfShape:
    row = np.array(points)
    return lambda a, b: np.broadcast_to(row, (len(a), len(row)))


def _columns(*columns: Floats) -> Floats:
    """Break points as columns; quantiles that underflow or overflow collapse onto their neighbours."""
    table = np.column_stack(columns)
    table = np.nan_to_num(table, nan=0.0, posinf=1e30, neginf=-1e30)
    return np.maximum.accumulate(table, axis=1)


def _below(y: Floats, edge: float = 0.0) -> Floats:
    """How far y lies below the support; CRPS grows by just that distance."""
    return np.maximum(edge - y, 0.0)


def half_step(a: Floats) -> Floats:
    """Gamma(a + 1/2) / Gamma(a). scipy's `beta` and `poch` lose up to six digits where `a` is large; its
    asymptotic series (DLMF 5.11.13) is exact from 40 on."""
    i = 1.0 / np.maximum(a, 40.0)
    series = -399.0 / 262144.0 + i * (869.0 / 4194304.0 + i * 39325.0 / 33554432.0)
    series = i / 128.0 + i * i * (5.0 / 1024.0 + i * (-21.0 / 32768.0 + i * series))
    large = np.sqrt(a) * (1.0 + i * (-1.0 / 8.0 + series))
    return np.where(a > 40.0, large, SQRT_PI / special.beta(0.5, np.minimum(a, 40.0)))


# --- on the whole line ----------


def _norm_tail(y: Floats, a: Floats, b: Floats, upper: bool) -> Floats:
    return np.asarray(special.ndtr(-y if upper else y))


def _norm_pdf(y: Floats, a: Floats, b: Floats) -> Floats:
    return np.exp(-0.5 * y * y) / SQRT_2_PI


def _norm_crps(y: Floats, a: Floats, b: Floats) -> Floats:
    return np.asarray(y * special.erf(y / SQRT_2) + 2.0 * _norm_pdf(y, a, b) - 1.0 / SQRT_PI)


def _t_tail(y: Floats, a: Floats, b: Floats, upper: bool) -> Floats:
    return np.asarray(special.stdtr(a, -y if upper else y))


def _t_pdf(y: Floats, a: Floats, b: Floats) -> Floats:
    return np.asarray(
        np.exp(-0.5 * (a + 1.0) * np.log1p(y * y / a)) * half_step(0.5 * a) / np.sqrt(np.pi * a)
    )


def _t_closed(y: Floats, a: Floats, b: Floats) -> Floats:
    """E|X - x| - E|X - X'|/2 by analytic continuation: valid for every df > 0.5 but 1, where both terms are
    infinite.
    """
    y = np.abs(y)
    far = 1.0 - 2.0 * _t_tail(y, a, b, upper=True)
    spread = 2.0 * np.sqrt(a / np.pi) * half_step(0.5 * a) ** 2 / half_step(a - 0.5)
    return np.asarray(y * far + (2.0 * (a + y * y) * _t_pdf(y, a, b) - spread) / (a - 1.0))


_NODES = 1.0 + np.array([-0.07, -0.05, -0.03, -0.01, 0.01, 0.03, 0.05, 0.07])


def _t_crps(y: Floats, a: Floats, b: Floats) -> Floats:
    """Near df = 1 the closed form cancels, but the CRPS is smooth in df: Lagrange through 8 df around it
    (3e-10).
    """
    near = np.abs(a - 1.0) < 0.008
    value = _t_closed(y, np.where(near, 2.0, a), b)
    if near.any():
        df, z = a[near], y[near]
        total = np.zeros_like(z)
        for i, node in enumerate(_NODES):
            others = np.delete(_NODES, i)
            factor = np.prod((df[:, None] - others) / (node - others), axis=1)
            total += factor * _t_closed(z, np.full_like(z, node), z)
        value[near] = total
    return value


def _laplace_tail(y: Floats, a: Floats, b: Floats, upper: bool) -> Floats:
    half = 0.5 * np.exp(-np.abs(y))
    return np.where((y > 0.0) == upper, half, 1.0 - half)


def _laplace_pdf(y: Floats, a: Floats, b: Floats) -> Floats:
    return 0.5 * np.exp(-np.abs(y))


def _laplace_crps(y: Floats, a: Floats, b: Floats) -> Floats:
    y = np.abs(y)
    return y + np.exp(-y) - 0.75


def _logistic_tail(y: Floats, a: Floats, b: Floats, upper: bool) -> Floats:
    return np.asarray(special.expit(-y if upper else y))


def _logistic_pdf(y: Floats, a: Floats, b: Floats) -> Floats:
    e = np.exp(-np.abs(y))
    return np.asarray(e / (1.0 + e) ** 2)


def _logistic_crps(y: Floats, a: Floats, b: Floats) -> Floats:
    y = np.abs(y)
    return y + 2.0 * np.log1p(np.exp(-y)) - 1.0


def _cauchy_tail(y: Floats, a: Floats, b: Floats, upper: bool) -> Floats:
    return np.asarray(np.arctan2(1.0, y if upper else -y) / np.pi)


def _cauchy_pdf(y: Floats, a: Floats, b: Floats) -> Floats:
    return 1.0 / (np.pi * (1.0 + y * y))


def _cauchy_crps(y: Floats, a: Floats, b: Floats) -> Floats:
    """Integral of u^2 / sin(pi u)^2 over both sides; its Clausen parts add up to -ln 2."""
    return np.asarray(2.0 / np.pi * (y * np.arctan(y) + np.log(2.0) - np.log(np.hypot(1.0, y))))


# --- on the positive half-line ----------


def _lognorm_tail(y: Floats, a: Floats, b: Floats, upper: bool) -> Floats:
    z = np.log(np.maximum(y, TINY)) / a
    return np.asarray(np.where(y > 0.0, special.ndtr(-z if upper else z), float(upper)))


def _lognorm_pdf(y: Floats, a: Floats, b: Floats) -> Floats:
    positive = np.maximum(y, TINY)
    z = np.log(positive) / a
    return np.where(y > 0.0, np.exp(-0.5 * z * z - np.log(positive)) / (a * SQRT_2_PI), 0.0)


def _lognorm_crps(y: Floats, a: Floats, b: Floats) -> Floats:
    inside = np.maximum(y, TINY)
    z = np.log(inside) / a
    mean = np.exp(0.5 * a * a)
    parts = special.ndtr(z - a) - special.ndtr(-a / SQRT_2)
    return np.asarray(inside * special.erf(z / SQRT_2) - 2.0 * mean * parts + _below(y))


def _lognorm_breaks(a: Floats, b: Floats) -> Floats:
    """The squared upper tail, integrated over y, has its weight at exp(a^2 / 2): a/2 deviations above the
    median.
    """
    z = np.array([-9.0, -4.0, -1.5, 0.0, 1.5, 4.0])
    upper = 0.5 * a[:, None] + np.array([5.0, 9.0])
    return _columns(np.zeros_like(a), np.exp(a[:, None] * z), np.exp(a[:, None] * upper))


def _gamma_tail(y: Floats, a: Floats, b: Floats, upper: bool) -> Floats:
    return np.asarray((special.gammaincc if upper else special.gammainc)(a, np.maximum(y, 0.0)))


def _gamma_pdf(y: Floats, a: Floats, b: Floats) -> Floats:
    inside = np.maximum(y, 0.0)
    return np.where(y >= 0.0, np.exp(special.xlogy(a - 1.0, inside) - inside - special.gammaln(a)), 0.0)


def _gamma_crps(y: Floats, a: Floats, b: Floats) -> Floats:
    inside = np.maximum(y, 0.0)
    below, one_up = special.gammainc(a, inside), special.gammainc(a + 1.0, inside)
    centred = (inside - a) * (2.0 * below - 1.0) + 2.0 * a * (below - one_up)
    return np.asarray(centred - half_step(a) / SQRT_PI + _below(y))


def _gamma_breaks(a: Floats, b: Floats) -> Floats:
    low = special.gammaincinv(a[:, None], np.array([1e-12, 1e-3, 0.1, 0.5]))
    high = special.gammainccinv(a[:, None], np.array([0.1, 1e-3, 1e-9, 1e-25]))
    return _columns(np.zeros_like(a), low, high)


def _expon_tail(y: Floats, a: Floats, b: Floats, upper: bool) -> Floats:
    inside = np.maximum(y, 0.0)
    return np.exp(-inside) if upper else -np.expm1(-inside)


def _expon_pdf(y: Floats, a: Floats, b: Floats) -> Floats:
    return np.where(y >= 0.0, np.exp(-np.maximum(y, 0.0)), 0.0)


def _expon_crps(y: Floats, a: Floats, b: Floats) -> Floats:
    inside = np.maximum(y, 0.0)
    return inside + 2.0 * np.exp(-inside) - 1.5 + _below(y)


def _chi2_crps(y: Floats, a: Floats, b: Floats) -> Floats:
    return 2.0 * _gamma_crps(0.5 * y, 0.5 * a, b)


def _chi_pdf(y: Floats, a: Floats, b: Floats) -> Floats:
    inside = np.maximum(y, 0.0)
    log = special.xlogy(a - 1.0, inside) - 0.5 * inside * inside - special.gammaln(0.5 * a)
    return np.where(y >= 0.0, np.exp(log + (1.0 - 0.5 * a) * np.log(2.0)), 0.0)


def _half_square(y: Floats) -> Floats:
    """y^2/2 on the positive half-line: chi and rayleigh are gamma variables under this map."""
    inside = np.maximum(y, 0.0)
    return 0.5 * inside * inside


def _weibull_tail(y: Floats, a: Floats, b: Floats, upper: bool) -> Floats:
    w = np.maximum(y, 0.0) ** a
    return np.exp(-w) if upper else -np.expm1(-w)


def _weibull_pdf(y: Floats, a: Floats, b: Floats) -> Floats:
    inside = np.maximum(y, 0.0)
    return np.where(y >= 0.0, a * np.exp(special.xlogy(a - 1.0, inside) - inside**a), 0.0)


def _weibull_crps(y: Floats, a: Floats, b: Floats) -> Floats:
    """E|X - X'| = 2 mean (1 - 2^(-1/c)); E[X; X <= y] = mean P(1 + 1/c, y^c)."""
    inside = np.maximum(y, 0.0)
    w, mean = inside**a, special.gamma(1.0 + 1.0 / a)
    share = special.gammainc(1.0 + 1.0 / a, np.minimum(w, 1e300))
    return np.asarray(
        inside * (1.0 - 2.0 * np.exp(-w)) + mean * (np.exp2(-1.0 / a) - 2.0 * share) + _below(y)
    )


def _weibull_breaks(a: Floats, b: Floats) -> Floats:
    """In w = y^c: the squared upper tail has its weight at w = 1/(2c)."""
    w = np.array([1e-12, 1e-3, 0.1, 0.7])
    upper = np.array([3.0, 12.0, 50.0]) + np.array([0.5, 2.0, 5.0]) / a[:, None]
    return _columns(np.zeros_like(a), w ** (1.0 / a[:, None]), upper ** (1.0 / a[:, None]))


def _rayleigh_crps(y: Floats, a: Floats, b: Floats) -> Floats:
    return SQRT_2 * _weibull_crps(y / SQRT_2, np.full_like(y, 2.0), b)


def _pareto_tail(y: Floats, a: Floats, b: Floats, upper: bool) -> Floats:
    log = -a * np.log(np.maximum(y, 1.0))
    return np.exp(log) if upper else -np.expm1(log)


def _pareto_pdf(y: Floats, a: Floats, b: Floats) -> Floats:
    return np.where(y >= 1.0, a * np.exp(-(a + 1.0) * np.log(np.maximum(y, 1.0))), 0.0)


def _pareto_crps(y: Floats, a: Floats, b: Floats) -> Floats:
    """(y - 1) - 2 (1 - y^(1-b)) / (b - 1) + 1 / (2b - 1) for y >= 1, written to hold at b = 1, too."""
    log = np.log(np.maximum(y, 1.0))
    middle = log * special.exprel((1.0 - a) * log)
    return np.asarray(np.maximum(y - 1.0, 0.0) - 2.0 * middle + 1.0 / (2.0 * a - 1.0) + _below(y, 1.0))


def _pareto_breaks(a: Floats, b: Floats) -> Floats:
    quantiles = np.array([0.5, 0.1, 1e-3, 1e-6]) ** (-1.0 / a[:, None])
    return _columns(np.ones_like(a), np.minimum(quantiles, 1e9), np.full_like(a, 1e9))


def _incomplete_beta(a: Floats, b: Floats, z: Floats, rest: Floats, upper: bool) -> Floats:
    """I_z(a, b), or its complement by symmetry; `rest` is 1 - z, which says nothing of a very small z."""
    if not upper:
        return np.asarray(special.betainc(a, b, z))
    small = z < 1e-3
    mirrored = special.betainc(np.where(small, a, b), np.where(small, b, a), np.where(small, z, rest))
    return np.asarray(np.where(small, 1.0 - mirrored, mirrored))


def _f_tail(y: Floats, a: Floats, b: Floats, upper: bool) -> Floats:
    scaled = a * np.maximum(y, 0.0)
    return _incomplete_beta(0.5 * a, 0.5 * b, scaled / (scaled + b), b / (scaled + b), upper)


def _f_pdf(y: Floats, a: Floats, b: Floats) -> Floats:
    inside = np.maximum(y, 0.0)
    log = special.xlogy(0.5 * a - 1.0, inside) + 0.5 * a * np.log(a / b)
    log -= special.betaln(0.5 * a, 0.5 * b) + 0.5 * (a + b) * np.log1p(a * inside / b)
    return np.where(y >= 0.0, np.exp(log), 0.0)


def _f_breaks(a: Floats, b: Floats) -> Floats:
    z = special.betaincinv(0.5 * a[:, None], 0.5 * b[:, None], np.array([1e-12, 1e-3, 0.1, 0.5]))
    rest = special.betaincinv(0.5 * b[:, None], 0.5 * a[:, None], np.array([0.1, 1e-3, 1e-6]))
    ratio = (b / a)[:, None]
    low = np.minimum(ratio * z / np.maximum(1.0 - z, TINY), 1e9)
    high = np.minimum(ratio * (1.0 - rest) / np.maximum(rest, TINY), 1e9)
    return _columns(np.zeros_like(a), low, high, np.maximum(1e9, 1e9 * b / a))


# --- on an interval ----------


def _uniform_tail(y: Floats, a: Floats, b: Floats, upper: bool) -> Floats:
    return np.clip(1.0 - y if upper else y, 0.0, 1.0)


def _uniform_pdf(y: Floats, a: Floats, b: Floats) -> Floats:
    return np.where((y >= 0.0) & (y <= 1.0), 1.0, 0.0)


def _uniform_crps(y: Floats, a: Floats, b: Floats) -> Floats:
    inside = np.clip(y, 0.0, 1.0)
    return (inside**3 + (1.0 - inside) ** 3) / 3.0 + np.abs(y - inside)


def _beta_tail(y: Floats, a: Floats, b: Floats, upper: bool) -> Floats:
    inside = np.clip(y, 0.0, 1.0)
    return _incomplete_beta(a, b, inside, 1.0 - inside, upper)


def _beta_pdf(y: Floats, a: Floats, b: Floats) -> Floats:
    inside = np.clip(y, 0.0, 1.0)
    log = special.xlogy(a - 1.0, inside) + special.xlog1py(b - 1.0, -inside) - special.betaln(a, b)
    return np.where((y >= 0.0) & (y <= 1.0), np.exp(log), 0.0)


def _beta_crps(y: Floats, a: Floats, b: Floats) -> Floats:
    # From the nearer end: at a pole at 1 the score is a tiny part of what is subtracted there.
    mirrored = y > 0.5
    y, a, b = np.where(mirrored, 1.0 - y, y), np.where(mirrored, b, a), np.where(mirrored, a, b)
    inside, mean = np.clip(y, 0.0, 1.0), a / (a + b)
    below, one_up = special.betainc(a, b, inside), special.betainc(a + 1.0, b, inside)
    # E|X - X'| / 2 = mean * 2 B(2a, 2b) / (a B(a, b)^2), with the duplication formula applied three times.
    spread = half_step(a) * half_step(b) / (SQRT_PI * (a + b) * half_step(a + b))
    centred = (inside - mean) * (2.0 * below - 1.0) + 2.0 * mean * (below - one_up)
    return np.asarray(centred - spread + np.abs(y - inside))


def _beta_breaks(a: Floats, b: Floats) -> Floats:
    quantiles = special.betaincinv(a[:, None], b[:, None], np.array([1e-9, 1e-3, 0.1, 0.5]))
    upper = special.betainccinv(a[:, None], b[:, None], np.array([0.1, 1e-3, 1e-9]))
    return _columns(np.zeros_like(a), quantiles, upper, np.ones_like(a))


# --- a point ----------


def _point_tail(y: Floats, a: Floats, b: Floats, upper: bool) -> Floats:
    return np.where((y >= 0.0) != upper, 1.0, 0.0)


_HEAVY = (-1e3, -30.0, -1.5, 1.5, 30.0, 1e3)

FAMILIES: tuple[Family, ...] = (
    Family("norm", _norm_tail, _norm_pdf, _fixed(-10.0, -4.5, -1.5, 0.0, 1.5, 4.5, 10.0), _norm_crps),
    Family(
        "t",
        _t_tail,
        _t_pdf,
        _fixed(*_HEAVY),
        _t_crps,
        (Shape("df", 0.5, "its CRPS is infinite otherwise", highest=1e9),),
        lambda a, b: a,
    ),
    Family(
        "laplace",
        _laplace_tail,
        _laplace_pdf,
        _fixed(-45.0, -12.0, -3.0, 0.0, 3.0, 12.0, 45.0),
        _laplace_crps,
        edges=(0.0,),
    ),
    Family(
        "logistic",
        _logistic_tail,
        _logistic_pdf,
        _fixed(-45.0, -12.0, -3.0, 0.0, 3.0, 12.0, 45.0),
        _logistic_crps,
    ),
    Family(
        "lognorm",
        _lognorm_tail,
        _lognorm_pdf,
        _lognorm_breaks,
        _lognorm_crps,
        (Shape("s", highest=10.0),),
        edges=(0.0,),
    ),
    Family("expon", _expon_tail, _expon_pdf, _fixed(0.0, 1.0, 4.0, 14.0, 45.0), _expon_crps, edges=(0.0,)),
    Family("gamma", _gamma_tail, _gamma_pdf, _gamma_breaks, _gamma_crps, (Shape("a"),), edges=(0.0,)),
    Family(
        "beta", _beta_tail, _beta_pdf, _beta_breaks, _beta_crps, (Shape("a"), Shape("b")), edges=(0.0, 1.0)
    ),
    Family("uniform", _uniform_tail, _uniform_pdf, _fixed(0.0, 1.0), _uniform_crps, edges=(0.0, 1.0)),
    Family(
        "weibull_min",
        _weibull_tail,
        _weibull_pdf,
        _weibull_breaks,
        _weibull_crps,
        (Shape("c", lowest=0.05),),
        edges=(0.0,),
    ),
    Family(
        "weibull_max",
        lambda y, a, b, upper: _weibull_tail(-y, a, b, not upper),
        lambda y, a, b: _weibull_pdf(-y, a, b),
        lambda a, b: -_weibull_breaks(a, b)[:, ::-1],
        lambda y, a, b: _weibull_crps(-y, a, b),
        (Shape("c", lowest=0.05),),
        edges=(0.0,),
    ),
    Family(
        "pareto",
        _pareto_tail,
        _pareto_pdf,
        _pareto_breaks,
        _pareto_crps,
        (Shape("b", 0.5, "its CRPS is infinite otherwise"),),
        lambda a, b: a,
        edges=(1.0,),
    ),
    Family(
        "rayleigh",
        lambda y, a, b, upper: _expon_tail(_half_square(y), a, b, upper),
        lambda y, a, b: np.where(y >= 0.0, y * np.exp(-_half_square(y)), 0.0),
        _fixed(0.0, 0.05, 0.8, 2.0, 4.0, 10.0),
        _rayleigh_crps,
        edges=(0.0,),
    ),
    Family(
        "chi",
        lambda y, a, b, upper: _gamma_tail(_half_square(y), 0.5 * a, b, upper),
        _chi_pdf,
        lambda a, b: np.sqrt(2.0 * _gamma_breaks(0.5 * a, b)),
        None,
        (Shape("df"),),
        edges=(0.0,),
    ),
    Family(
        "chi2",
        lambda y, a, b, upper: _gamma_tail(0.5 * y, 0.5 * a, b, upper),
        lambda y, a, b: 0.5 * _gamma_pdf(0.5 * y, 0.5 * a, b),
        lambda a, b: 2.0 * _gamma_breaks(0.5 * a, b),
        _chi2_crps,
        (Shape("df"),),
        edges=(0.0,),
    ),
    Family(
        "f",
        _f_tail,
        _f_pdf,
        _f_breaks,
        None,
        (Shape("dfn"), Shape("dfd", 1.0, "its CRPS is infinite otherwise")),
        lambda a, b: 0.5 * b,
        edges=(0.0,),
    ),
    Family(
        "cauchy",
        _cauchy_tail,
        _cauchy_pdf,
        _fixed(*_HEAVY),
        _cauchy_crps,
        (),
        lambda a, b: np.ones_like(a),
    ),
    Family("point", _point_tail, lambda y, a, b: np.zeros_like(y), _fixed(0.0), lambda y, a, b: np.abs(y)),
)

CODES: dict[str, int] = {family.name: code for code, family in enumerate(FAMILIES)}
NORM, POINT = CODES["norm"], CODES["point"]
BY_NAME: dict[str, tuple[int, Family]] = {
    family.name: (code, family) for code, family in enumerate(FAMILIES) if family.name != "point"
}
