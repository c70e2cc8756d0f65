"""CRPS of many segments at once: a closed form where there is one, quadrature where there is none.

Segments are sorted into single leaves (by family), mixtures of normals and sets of points (each by their
number of leaves, so that they are matrices), and the rest. A segment's value does not depend on what else is
in the batch.
"""

from __future__ import annotations

import numpy as np
from scipy import special

from condor_lite.game import pairs, quadrature
from condor_lite.game.families import FAMILIES, NORM, POINT, SQRT_2, SQRT_2_PI, SQRT_PI, Floats
from condor_lite.game.mixture import Densities, Ints
from condor_lite.game.spread import SPREADS


def crps(densities: Densities, x: Floats) -> Floats:
    """The continuous ranked probability score of every segment at `x`, shape (n,), in the unit of `x`."""
    return crps_and_spread(densities, x)[0]


def crps_and_spread(densities: Densities, x: Floats) -> tuple[Floats, Floats]:
    """The CRPS, and as its by-product E|X - X'|, infinite where the mean is; both of shape (n,), in the unit
    of `x`.
    """
    with np.errstate(all="ignore"):
        value, spread = _crps_and_spread(densities, x)
    return np.maximum(value, 0.0), spread


def _crps_and_spread(densities: Densities, x: Floats) -> tuple[Floats, Floats]:
    starts = densities.starts()
    first, count = starts[:-1], np.diff(starts)
    kind = densities.family[first]
    # The family of segments that have only one, -1 for the mixed ones.
    if (densities.family == kind[0]).all():
        kind = kind.astype(np.intp)
    else:
        foreign = densities.family != kind[densities.segment]
        mixed = np.bincount(densities.segment, foreign, densities.n) > 0
        kind = np.where(mixed, -1, kind.astype(np.intp))

    value, spread = np.empty(densities.n), np.empty(densities.n)
    by_quadrature = np.ones(densities.n, np.bool_)
    for code in np.unique(kind[count == 1]):
        closed = FAMILIES[code].crps
        if closed is not None:
            members = np.flatnonzero((kind == code) & (count == 1))
            leaf = first[members]
            scale = densities.scale[leaf]
            y = (x[members] - densities.loc[leaf]) / scale
            value[members] = scale * closed(y, densities.a[leaf], densities.b[leaf])
            spread[members] = scale * SPREADS[code](densities.a[leaf], densities.b[leaf])
            by_quadrature[members] = False
    for code, of_matrix in ((NORM, _of_normals), (POINT, _of_points)):
        several = (kind == code) & (count > 1)
        for size in np.unique(count[several]):
            members = np.flatnonzero(several & (count == size))
            leaf = first[members, None] + np.arange(size)
            value[members], spread[members] = of_matrix(densities, leaf, x[members])
        by_quadrature[several] = False
    rest = np.flatnonzero(by_quadrature)
    if len(rest):
        value[rest], spread[rest], done = pairs.crps_and_spread(densities.take(rest), x[rest])
        rest = rest[~done]
    if len(rest):
        value[rest], spread[rest] = quadrature.crps_and_spread(densities.take(rest), x[rest])
    return value, spread


def _mean_distance(distance: Floats, deviation: Floats) -> Floats:
    """E|Y| of Y ~ N(distance, deviation^2)."""
    z = distance / deviation
    return np.asarray(
        distance * special.erf(z / SQRT_2) + (2.0 / SQRT_2_PI) * deviation * np.exp(-0.5 * z * z)
    )


def _sum(values: Floats) -> Floats:
    """Row sums, from left to right: the order that `sum` adds in depends on how many rows there are."""
    return np.asarray(np.cumsum(values, axis=1)[:, -1])


def _of_normals(densities: Densities, leaf: Ints, x: Floats) -> tuple[Floats, Floats]:
    """E|X - x| - E|X - X'|/2 over pairs of components (Grimit et al. 2006); `leaf`: shape (segments,
    components).
    """
    loc, scale, weight = densities.loc[leaf], densities.scale[leaf], densities.weight[leaf]
    value = _sum(weight * _mean_distance(x[:, None] - loc, scale))
    own = _sum(weight * weight * scale) / SQRT_PI
    i, j = np.triu_indices(leaf.shape[1], 1)
    apart = _mean_distance(loc[:, i] - loc[:, j], np.sqrt(scale[:, i] ** 2 + scale[:, j] ** 2))
    across = _sum(weight[:, i] * weight[:, j] * apart)
    return value - own - across, 2.0 * (own + across)


def _of_points(densities: Densities, leaf: Ints, x: Floats) -> tuple[Floats, Floats]:
    """The integral of (F(z) - 1[z >= x])^2 as a sum over the gaps between points; `leaf`: shape (segments,
    points).
    """
    places = np.concatenate([densities.loc[leaf], x[:, None]], axis=1)
    weight = np.concatenate([densities.weight[leaf], np.zeros((len(x), 1))], axis=1)
    order = np.argsort(places, axis=1, kind="stable")
    places = np.take_along_axis(places, order, axis=1)
    weight = np.take_along_axis(weight, order, axis=1)
    below = np.cumsum(weight, axis=1)[:, :-1]
    above = np.cumsum(weight[:, ::-1], axis=1)[:, ::-1][:, 1:]
    tail = np.where(places[:, :-1] >= x[:, None], above, below)
    gaps = np.diff(places, axis=1)
    return _sum(gaps * tail * tail), 2.0 * _sum(gaps * below * above)
