"""CRPS of any mixture, by adaptive Gauss-Kronrod quadrature on its distribution function.

CRPS(F, x) = integral of F^2 below x + integral of (1 - F)^2 above x. Each side is cut at x, at the points
that each component of the mixture says matter, and at every jump; the pieces are integrated with the 15-point
Kronrod rule (QUADPACK's qk15 and its error estimate) and halved where they are not precise enough, all pieces
of all segments at once. The variable is v with z - x = u = sigma sinh(v), which spans scales from 1e-9 to
1e18 in a few dozen units and keeps the full precision of (x - loc) whatever the level of prices. Beyond the
last point heavy tails are powers, and their squares are integrated exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from condor_lite.game.families import FAMILIES, POINT, Floats
from condor_lite.game.mixture import Densities, Ints

Flags = npt.NDArray[np.bool_]

_KRONROD_NODES = np.array(
    [
        0.991455371120812639206854697526329,
        0.949107912342758524526189684047851,
        0.864864423359769072789712788640926,
        0.741531185599394439863864773280788,
        0.586087235467691130294144691693013,
        0.405845151377397166906606412076961,
        0.207784955007898467600689403773245,
        0.0,
    ]
)
_KRONROD_WEIGHTS = np.array(
    [
        0.022935322010529224963732008058970,
        0.063092092629978553290700663189204,
        0.104790010322250183839876322541518,
        0.140653259715525918745189590510238,
        0.169004726639267902826583426598550,
        0.190350578064785409913256402421014,
        0.204432940075298892414161999234649,
        0.209482141084727828012999174891714,
    ]
)
_GAUSS_WEIGHTS = np.array(
    [
        0.129484966168869693270611432679082,
        0.279705391489276667901467771423780,
        0.381830050505118944950369775488975,
        0.417959183673469387755102040816327,
    ]
)
NODES = np.concatenate([-_KRONROD_NODES, _KRONROD_NODES[-2::-1]])
WEIGHTS = np.concatenate([_KRONROD_WEIGHTS, _KRONROD_WEIGHTS[-2::-1]])
_GAUSS = np.zeros(15)
_GAUSS[1:8:2], _GAUSS[9::2] = _GAUSS_WEIGHTS, _GAUSS_WEIGHTS[-2::-1]

TOLERANCE = 1e-10
MAX_HALVINGS = 48
ROWS_AT_ONCE = 8192


def crps(densities: Densities, x: Floats) -> Floats:
    """CRPS of every segment at `x`, shape (n,), in the unit of `x`, to a relative error of about 1e-9."""
    return crps_and_spread(densities, x)[0]


def crps_and_spread(densities: Densities, x: Floats) -> tuple[Floats, Floats]:
    """The CRPS, and E|X - X'| = 2 integral of F (1 - F) from the same values of F, to about 1e-6."""
    leaves = np.diff(densities.starts())
    value, spread = np.empty(densities.n), np.empty(densities.n)
    # Work in bounded portions: what a segment costs is about the square of its leaves.
    portion = (np.cumsum(leaves * (8 * leaves + 8)) // ROWS_AT_ONCE).astype(np.intp)
    for first, last in _runs(portion):
        chosen = np.arange(first, last)
        value[chosen], spread[chosen] = _portion(densities.take(chosen), x[chosen])
    return value, spread


def _runs(labels: Ints) -> list[tuple[int, int]]:
    edges = np.concatenate([[0], np.flatnonzero(np.diff(labels)) + 1, [len(labels)]])
    return [(int(edges[i]), int(edges[i + 1])) for i in range(len(edges) - 1)]


@dataclass(frozen=True, slots=True, eq=False)
class _Pieces:
    """Pieces [low, high] of v, each below or above x; `base` is the jumps' share of the tail."""

    segment: Ints
    low: Floats
    high: Floats
    upper: Flags
    base: Floats

    def halved(self, which: Ints) -> _Pieces:
        low, high = self.low[which], self.high[which]
        middle = 0.5 * (low + high)
        return _Pieces(
            np.repeat(self.segment[which], 2),
            np.stack([low, middle], 1).ravel(),
            np.stack([middle, high], 1).ravel(),
            np.repeat(self.upper[which], 2),
            np.repeat(self.base[which], 2),
        )


class _Mixtures:
    """The continuous leaves of a portion's segments, relative to x."""

    def __init__(self, densities: Densities, x: Floats) -> None:
        smooth = np.flatnonzero(densities.family != POINT)
        self.n = densities.n
        self.segment = densities.segment[smooth]
        self.family = densities.family[smooth]
        self.weight, self.scale = densities.weight[smooth], densities.scale[smooth]
        self.a, self.b = densities.a[smooth], densities.b[smooth]
        self.offset = densities.loc[smooth] - x[self.segment]
        edges = np.searchsorted(self.segment, np.arange(self.n + 1))
        self.first, self.count = edges[:-1], np.diff(edges)
        self.present = np.flatnonzero(np.bincount(self.family, minlength=len(FAMILIES)))

    def tail(self, segment: Ints, u: Floats, upper: Flags) -> Floats:
        """P(X - x <= u), or P(X - x > u) where `upper`; `u` has shape (rows, nodes)."""
        counts = self.count[segment]
        starts = np.cumsum(counts) - counts
        row = np.repeat(np.arange(len(segment)), counts)
        leaf = self.first[segment][row] + np.arange(len(row)) - starts[row]
        y = (u[row] - self.offset[leaf, None]) / self.scale[leaf, None]
        side = upper[row]
        for code in self.present:
            for flag in (False, True):
                members = np.flatnonzero((self.family[leaf] == code) & (side == flag))
                if len(members):
                    chosen = leaf[members]
                    a, b = self.a[chosen, None], self.b[chosen, None]
                    y[members] = FAMILIES[code].tail(y[members], a, b, flag)
        y *= self.weight[leaf, None]
        return np.asarray(np.add.reduceat(y, starts, axis=0))

    def breaks(self) -> tuple[Ints, Floats]:
        """Where to cut for the leaves' sake: segments and places u, unsorted.

        Leaves of about the same shape and place would all say the same: of the places in one cell, as wide as
        they are spaced in their own leaf, only one is kept. Edges, where a leaf is not smooth, are all kept.
        """
        segments, places, spacings, edges = [], [], [], []
        for code in self.present:
            members = np.flatnonzero(self.family == code)
            offset, scale = self.offset[members, None], self.scale[members, None]
            points = FAMILIES[code].breaks(self.a[members], self.b[members])
            gaps = np.full((len(members), points.shape[1] + 1), np.inf)
            gaps[:, 1:-1] = np.diff(points, axis=1)
            gaps[gaps == 0.0] = np.inf
            segments.append(np.repeat(self.segment[members], points.shape[1]))
            places.append((offset + scale * points).ravel())
            spacings.append((scale * np.minimum(gaps[:, 1:], gaps[:, :-1])).ravel())
            sharp = np.array(FAMILIES[code].edges)
            edges.append((np.repeat(self.segment[members], len(sharp)), (offset + scale * sharp).ravel()))
        segment, place, spacing = np.concatenate(segments), np.concatenate(places), np.concatenate(spacings)
        level = np.floor(np.log2(np.minimum(spacing, 1e30)))
        cell = np.floor(place / np.exp2(level))
        order = np.lexsort((cell, level, segment))
        segment, level, cell = segment[order], level[order], cell[order]
        first = np.ones(len(order), np.bool_)
        first[1:] = (np.diff(segment) != 0) | (np.diff(level) != 0) | (np.diff(cell) != 0)
        return (
            np.concatenate([segment[first], *(where for where, _ in edges)]),
            np.concatenate([place[order[first]], *(at for _, at in edges)]),
        )

    def exponents(self) -> Floats:
        """How fast each leaf's tail falls; 0 where it is not a heavy one."""
        exponent = np.zeros(len(self.segment))
        for code in self.present:
            power = FAMILIES[code].exponent
            if power is not None:
                members = np.flatnonzero(self.family == code)
                exponent[members] = power(self.a[members], self.b[members])
        return exponent


def _portion(densities: Densities, x: Floats) -> tuple[Floats, Floats]:
    mixtures = _Mixtures(densities, x)
    n = densities.n
    exponent = mixtures.exponents()
    heavy = np.flatnonzero(exponent)
    sigma = np.full(n, np.inf)
    np.minimum.at(sigma, mixtures.segment, mixtures.scale)

    jumps = np.flatnonzero(densities.family == POINT)
    jump_segment, jump_weight = densities.segment[jumps], densities.weight[jumps]
    jump_place = densities.loc[jumps] - x[jump_segment]

    segments, places = mixtures.breaks()
    far = np.zeros(n)
    if len(heavy):
        np.maximum.at(far, mixtures.segment[heavy], 1e9 * (mixtures.scale + np.abs(mixtures.offset))[heavy])
        np.maximum.at(far, segments, np.where(far[segments] > 0.0, np.abs(places), 0.0))
    every = np.arange(n)
    segments = np.concatenate([segments, jump_segment, every, every, every])
    places = np.concatenate([places, jump_place, np.zeros(n), far, -far])
    order = np.lexsort((places, segments))
    segments, places = segments[order], places[order]
    same = (segments[1:] == segments[:-1]) & (places[1:] > places[:-1])
    segment, low, high = segments[:-1][same], places[:-1][same], places[1:][same]
    upper = low >= 0.0
    base = _mass(n, jump_segment, jump_place, jump_weight, segment, low, upper)
    unit = sigma[segment]
    pieces = _Pieces(segment, np.arcsinh(low / unit), np.arcsinh(high / unit), upper, base)
    value, spread = _integrate(mixtures, pieces, sigma)
    if len(heavy):
        value_beyond, spread_beyond = _beyond(mixtures, exponent, far)
        value += value_beyond
        spread += spread_beyond
    return value, spread


def _mass(
    n: int,
    jump_segment: Ints,
    jump_place: Floats,
    jump_weight: Floats,
    segment: Ints,
    low: Floats,
    upper: Flags,
) -> Floats:
    """The jumps' share of the tail on each piece: the mass up to its start, or above it where `upper`."""
    if not len(jump_segment):
        return np.zeros(len(segment))
    order = np.lexsort((jump_place, jump_segment))
    jump_segment, jump_place, jump_weight = jump_segment[order], jump_place[order], jump_weight[order]
    base = np.empty(len(segment))
    jump_edges = np.searchsorted(jump_segment, np.arange(n + 1))
    edges = np.searchsorted(segment, np.arange(n + 1))
    for k in range(n):
        places, weights = (part[jump_edges[k] : jump_edges[k + 1]] for part in (jump_place, jump_weight))
        piece = slice(edges[k], edges[k + 1])
        passed = np.searchsorted(places, low[piece], side="right")
        below = np.concatenate([[0.0], np.cumsum(weights)])
        above = np.concatenate([np.cumsum(weights[::-1])[::-1], [0.0]])
        base[piece] = np.where(upper[piece], above[passed], below[passed])
    return base


def _integrate(mixtures: _Mixtures, pieces: _Pieces, sigma: Floats) -> tuple[Floats, Floats]:
    total, spread = np.zeros(mixtures.n), np.zeros(mixtures.n)
    for _ in range(MAX_HALVINGS):
        half = 0.5 * (pieces.high - pieces.low)
        v = (pieces.low + half)[:, None] + half[:, None] * NODES
        u = np.sinh(v) * sigma[pieces.segment, None]
        tail = mixtures.tail(pieces.segment, u, pieces.upper) + pieces.base[:, None]
        along = np.cosh(v) * (half * sigma[pieces.segment])[:, None]
        integrand = tail * tail * along
        # Row by row, not as a matrix product, whose last bits depend on what else is in the batch.
        integral = (integrand * WEIGHTS).sum(axis=1)
        difference = np.abs(integral - (integrand * _GAUSS).sum(axis=1))
        roughness = (np.abs(integrand - 0.5 * integral[:, None]) * WEIGHTS).sum(axis=1)
        ratio = np.divide(200.0 * difference, roughness, out=np.zeros_like(integral), where=roughness > 0.0)
        error = roughness * np.minimum(1.0, ratio * np.sqrt(ratio))
        so_far = total + np.bincount(pieces.segment, integral, mixtures.n)
        apart = 2.0 * (tail * (1.0 - tail) * along * WEIGHTS).sum(axis=1)
        coarse = error > TOLERANCE * so_far[pieces.segment]
        fine = np.flatnonzero(~coarse)
        total += np.bincount(pieces.segment[fine], integral[fine], mixtures.n)
        spread += np.bincount(pieces.segment[fine], apart[fine], mixtures.n)
        rough = np.flatnonzero(coarse)
        if not len(rough):
            return total, spread
        unfinished = np.bincount(pieces.segment[rough], apart[rough], mixtures.n)
        pieces = pieces.halved(rough)
    return so_far, spread + unfinished


def _beyond(mixtures: _Mixtures, exponent: Floats, far: Floats) -> tuple[Floats, Floats]:
    """Both squared tails beyond +-far, where leaf i's falls as (far / u)^exponent_i: sums over pairs of
    leaves; and twice the tails themselves, which F (1 - F) is there.

    At 1e9 times every scale and distance of the heavy leaves the power law holds to about 1e-9; the light
    leaves have left off before, and a light leaf further out is beyond what any tail can weigh.
    """
    value, spread = np.zeros(mixtures.n), np.zeros(mixtures.n)
    for k in np.flatnonzero(far):
        leaves = slice(mixtures.first[k], mixtures.first[k] + mixtures.count[k])
        heavy = np.flatnonzero(exponent[leaves]) + mixtures.first[k]
        power = exponent[heavy]
        for sign, upper in ((1.0, True), (-1.0, False)):
            mass = np.empty(len(heavy))
            for i, leaf in enumerate(heavy):
                y = np.array([(sign * far[k] - mixtures.offset[leaf]) / mixtures.scale[leaf]])
                a, b = mixtures.a[leaf : leaf + 1], mixtures.b[leaf : leaf + 1]
                mass[i] = mixtures.weight[leaf] * FAMILIES[mixtures.family[leaf]].tail(y, a, b, upper)[0]
            value[k] += far[k] * np.sum(np.outer(mass, mass) / (power[:, None] + power - 1.0))
            finite = np.where(power > 1.0, mass / np.where(power > 1.0, power - 1.0, 1.0), np.inf)
            spread[k] += 2.0 * far[k] * np.sum(finite)
    return value, spread
