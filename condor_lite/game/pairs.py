"""CRPS of mixtures of other than normal families, by pairs of components.

CRPS(F, x) = sum_i w_i E|X_i - x| - sum_ij w_i w_j E|X_i - X_j| / 2 (Grimit et al. 2006). E|X_i - x| has a
closed form; between smooth symmetric families, E|X_i - X_j| is that form of the wider one integrated over the
density of the narrower one: a smooth integrand on the whole line, for which the trapezoidal rule in v, with
y = sinh(pi/2 sinh v), converges exponentially (Takahasi, Mori 1974). Two coarser rules among the same nodes
say how precise it came out. Where that is not enough, where components are far apart, tails very heavy or
families others, nothing is claimed: `quadrature` does those, at several times the cost.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import special

from condor_lite.game.families import CODES, FAMILIES, NORM, POINT, SQRT_2, SQRT_2_PI, Floats
from condor_lite.game.mixture import Densities, Ints
from condor_lite.game.spread import SPREADS
from condor_lite.game.t_distance import LOWEST_DF, t_distances

Flags = npt.NDArray[np.bool_]

T, LAPLACE, LOGISTIC = CODES["t"], CODES["laplace"], CODES["logistic"]
SMOOTH = (NORM, T, LOGISTIC)

MOST_LEAVES = 24
FURTHEST = 4.0  # between two components, in scales of the wider one
PRECISION = 3e-8
NODES = 24  # on one side of the middle; the coarser rules use every second and every fourth
PAIRS_AT_ONCE = 2048


def crps_and_spread(densities: Densities, x: Floats) -> tuple[Floats, Floats, Flags]:
    """The CRPS and E|X - X'| of the segments that the third array marks; the others are left at NaN."""
    value, spread = np.full(densities.n, np.nan), np.full(densities.n, np.nan)
    starts = densities.starts()
    first, count = starts[:-1], np.diff(starts)
    fits = np.isin(densities.family, (*SMOOTH, LAPLACE, POINT))
    fits &= (densities.family != T) | (densities.a >= LOWEST_DF)
    eligible = (np.bincount(densities.segment, ~fits, densities.n) == 0) & (count <= MOST_LEAVES)
    for size in np.unique(count[eligible]):
        members = np.flatnonzero(eligible & (count == size))
        value[members], spread[members] = _of_size(
            densities, first[members, None] + np.arange(size), x[members]
        )
    return value, spread, np.isfinite(value)


def _of_size(densities: Densities, leaf: Ints, x: Floats) -> tuple[Floats, Floats]:
    """`leaf`: shape (segments, components). NaN where it is not precise enough."""
    flat = leaf.ravel()
    family, a, loc, scale = (getattr(densities, name)[flat] for name in ("family", "a", "loc", "scale"))
    weight = densities.weight[leaf]
    size = leaf.shape[1]
    to_x = scale * _distance(family, (np.repeat(x, size) - loc) / scale, a)
    own = np.empty(len(flat))
    for code in np.unique(family):
        of = family == code
        own[of] = scale[of] * SPREADS[code](a[of], a[of])
    i, j = np.triu_indices(size, 1)
    row = np.arange(len(leaf))[:, None] * size
    apart, error = _mean_distances(family, a, loc, scale, (row + i).ravel(), (row + j).ravel())
    pairs = (weight[:, i] * weight[:, j]).ravel()

    def total(values: Floats) -> Floats:
        return np.asarray(np.cumsum(values.reshape(len(leaf), -1), axis=1)[:, -1])

    half = 0.5 * total((weight * weight).ravel() * own) + total(pairs * apart)
    value = total(weight.ravel() * to_x) - half
    precise = total(pairs * apart * error) <= PRECISION * value
    return np.where(precise, value, np.nan), 2.0 * half


def _distance(family: npt.NDArray[np.uint8], y: Floats, a: Floats) -> Floats:
    """E|X - y| of standardised variables; `y` has one row, or element, a leaf."""
    out = np.empty_like(y)
    shape = (-1,) + (1,) * (y.ndim - 1)
    for code in np.unique(family):
        of = family == code
        z, df = np.abs(y[of]), a[of].reshape(shape)
        if code == NORM:
            out[of] = z * special.erf(z / SQRT_2) + (2.0 / SQRT_2_PI) * np.exp(-0.5 * z * z)
        elif code == T and z.ndim > 1:
            out[of] = t_distances(z, a[of])
        elif code == T:
            density = FAMILIES[T].pdf(z, df, df)
            out[of] = z * (1.0 - 2.0 * special.stdtr(df, -z)) + 2.0 * (df + z * z) / (df - 1.0) * density
        elif code == LOGISTIC:
            out[of] = z + 2.0 * np.log1p(np.exp(-z))
        elif code == LAPLACE:
            out[of] = z + np.exp(-z)
        else:
            out[of] = z
    return out


def _mean_distances(
    family: npt.NDArray[np.uint8], a: Floats, loc: Floats, scale: Floats, i: Ints, j: Ints
) -> tuple[Floats, Floats]:
    """E|X_i - X_j| of pairs of leaves, and its relative error: infinite where it is not known."""
    # i is the one that stays a function: the other one is a point, or the narrower.
    swap = (family[i] == POINT) | ((family[j] != POINT) & (scale[i] < scale[j]))
    i, j = np.where(swap, j, i), np.where(swap, i, j)
    offset = np.abs(loc[j] - loc[i])
    value, error = np.empty(len(i)), np.full(len(i), np.inf)

    closed = np.flatnonzero(family[j] == POINT)
    wide = i[closed]
    value[closed] = scale[wide] * _distance(family[wide], offset[closed] / scale[wide], a[wide])
    error[closed] = 0.0

    normal = (family[i] == NORM) & (family[j] == NORM)
    members = np.flatnonzero(normal)
    sigma = np.hypot(scale[i[members]], scale[j[members]])
    value[members] = sigma * _distance(family[i[members]], offset[members] / sigma, a[i[members]])
    error[members] = 0.0

    members = np.flatnonzero((family[i] == LAPLACE) & (family[j] == LAPLACE))
    value[members] = _of_laplaces(scale[i[members]], scale[j[members]], offset[members])
    error[members] = 0.0

    smooth = np.isin(family[i], SMOOTH) & np.isin(family[j], SMOOTH) & ~normal
    members = np.flatnonzero(smooth & (offset <= FURTHEST * scale[i]))
    if len(members):
        i, j = i[members], j[members]
        unit = scale[j]
        # Equal shapes are one pair: what a model answers is often the same for every step, but for its scale.
        table = np.column_stack([family[i], a[i], family[j], a[j], scale[i] / unit, offset[members] / unit])
        table, which = _distinct(table)
        found, precision = _by_trapezoids(*table.T)
        value[members], error[members] = unit * found[which], precision[which]
    value[np.isinf(error)] = np.nan
    return value, error


def _distinct(table: Floats) -> tuple[Floats, Ints]:
    """The distinct rows, and which of them each row is."""
    order = np.lexsort(table.T)
    ordered = table[order]
    new = np.concatenate([[False], (ordered[1:] != ordered[:-1]).any(axis=1)])
    which = np.empty(len(table), np.intp)
    which[order] = np.cumsum(new)
    new[0] = True
    return np.ascontiguousarray(ordered[new]), which


def _of_laplaces(a: Floats, b: Floats, offset: Floats) -> Floats:
    """d + (a^3 e^(-d/a) - b^3 e^(-d/b)) / (a^2 - b^2) of two Laplace variables, a >= b, d their distance.

    With r = (a - b)/b the difference is written so that it holds for r -> 0, too.
    """
    r, q = (a - b) / b, offset / a
    # b^3 e^(-d/a) [(1 + r)^3 - e^(-q r)] / (b^2 r (2 + r)), as d/b - d/a = q r.
    quotient = (3.0 + r * (3.0 + r)) + q * special.exprel(-q * r)
    return np.asarray(offset + b * np.exp(-q) * quotient / (2.0 + r))


def _by_trapezoids(
    wide: Floats, wide_a: Floats, narrow: Floats, narrow_a: Floats, ratio: Floats, offset: Floats
) -> tuple[Floats, Floats]:
    """E|ratio X_i + offset - X_j| of standardised leaves, and its relative error."""
    value, error = np.empty(len(wide)), np.empty(len(wide))
    for begin in range(0, len(wide), PAIRS_AT_ONCE):
        part = slice(begin, begin + PAIRS_AT_ONCE)
        shapes, which = _distinct(np.column_stack([narrow[part], narrow_a[part]]))
        y, weight = (nodes[which] for nodes in _nodes(shapes[:, 0].astype(np.uint8), shapes[:, 1]))
        scale, at = ratio[part, None], offset[part, None]
        places = np.concatenate([at + y, at - y[:, 1:]], axis=1) / scale
        heights = _distance(wide[part].astype(np.uint8), places, wide_a[part])
        terms = heights[:, : NODES + 1] * weight
        terms[:, 1:] += heights[:, NODES + 1 :] * weight[:, 1:]
        fine, half, quarter = (
            step * np.cumsum(np.ascontiguousarray(terms[:, ::step]), axis=1)[:, -1] for step in (1, 2, 4)
        )
        value[part] = fine * ratio[part]
        gap, coarse_gap = np.abs(fine - half) / fine, np.abs(half - quarter) / fine
        # As seen against 256 nodes; two rules may agree by chance, three do not.
        error[part] = np.where((gap < 1e-5) & (coarse_gap < 1e-2), 1e-12 + 20.0 * gap**1.5, np.inf)
    return value, error


def _nodes(family: npt.NDArray[np.uint8], a: Floats) -> tuple[Floats, Floats]:
    """Places y >= 0 and their weights (density times step) for each shape, (shapes, NODES + 1) each.

    They reach to where what is left of E|Y| is some 1e-12 of it.
    """
    df = np.where(family == T, a, 1e9)
    reach = np.where(family == LOGISTIC, 40.0, np.sqrt(df * np.expm1(54.0 / (df - 1.0))))
    last = np.arcsinh(np.arcsinh(reach) / (0.5 * np.pi))
    v = last[:, None] * (np.arange(NODES + 1) / NODES)
    inner = 0.5 * np.pi * np.sinh(v)
    y = np.sinh(inner)
    weight = np.cosh(inner) * (0.5 * np.pi) * np.cosh(v) * (last / NODES)[:, None]
    for code in np.unique(family):
        of = family == code
        weight[of] *= FAMILIES[code].pdf(y[of], a[of, None], a[of, None])
    return y, weight
