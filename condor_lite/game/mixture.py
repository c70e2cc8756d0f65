"""Densities as flat arrays: what an answer is once it has been checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from condor_lite.game.families import FAMILIES, Family, Floats

Ints = npt.NDArray[np.intp]


@dataclass(frozen=True, slots=True, eq=False)
class Densities:
    """The densities of `n` segments as mixtures of leaves, sorted by segment; every segment has at least one.

    Arrays have one entry a leaf: `segment` (0-based), `family` (index into `FAMILIES`), `weight` (> 0, sums
    to 1 in a segment), `loc`, `scale`, and the shape parameters `a` and `b` (0 where the family has none).
    The points of a discrete distribution are leaves of the family `point`. Increments are log returns or
    price differences.
    """

    n: int
    segment: Ints
    family: npt.NDArray[np.uint8]
    weight: Floats
    loc: Floats
    scale: Floats
    a: Floats
    b: Floats

    def __len__(self) -> int:
        return self.n

    def cdf(self, x: Floats) -> Floats:
        """P(X_k <= x_k) for every segment k; `x`: shape (n,)."""
        return self.mix(self._by_family(x, lambda family, y, a, b: family.tail(y, a, b, False)))

    def pdf(self, x: Floats) -> Floats:
        """The density at x_k of every segment k (0 for points, which have none); `x`: shape (n,)."""
        return self.mix(self._by_family(x, lambda family, y, a, b: family.pdf(y, a, b)) / self.scale)

    def interval(self, low: Floats, high: Floats) -> Floats:
        """P(low_k < X_k <= high_k) for every segment, relative precision kept in either tail; shapes (n,)."""
        probability = np.empty(len(self.segment))
        above = low[self.segment] > self.loc
        for upper, sign in ((False, 1.0), (True, -1.0)):
            members = np.flatnonzero(above == upper)
            side = self.leaves(members)

            def tail(family: Family, y: Floats, a: Floats, b: Floats, upper: bool = upper) -> Floats:
                return family.tail(y, a, b, upper)

            probability[members] = sign * (side._by_family(high, tail) - side._by_family(low, tail))
        return self.mix(probability)

    def _by_family(self, x: Floats, evaluate: Callable[[Family, Floats, Floats, Floats], Floats]) -> Floats:
        """`evaluate(family, y, a, b)` for every leaf, family by family."""
        y = (x[self.segment] - self.loc) / self.scale
        with np.errstate(all="ignore"):
            for code in np.unique(self.family):
                members = np.flatnonzero(self.family == code)
                y[members] = evaluate(FAMILIES[code], y[members], self.a[members], self.b[members])
        return y

    def mix(self, values: Floats) -> Floats:
        """Leaves' values -> segments' weighted sums, shape (n,)."""
        return np.bincount(self.segment, self.weight * values, self.n).astype(np.float64)

    def leaves(self, chosen: Ints) -> Densities:
        """Only these leaves, of the same segments."""
        return Densities(self.n, *(getattr(self, name)[chosen] for name in _COLUMNS))

    def starts(self) -> Ints:
        """The index of every segment's first leaf, and one past the last: shape (n + 1,)."""
        return np.searchsorted(self.segment, np.arange(self.n + 1))

    def take(self, segments: Ints) -> Densities:
        """Some segments, renumbered in the order given (which must ascend)."""
        starts = self.starts()
        counts = np.diff(starts)[segments]
        rows = np.repeat(starts[segments] - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())
        taken = self.leaves(rows)
        return replace(taken, n=len(segments), segment=np.repeat(np.arange(len(segments)), counts))


_COLUMNS = ("segment", "family", "weight", "loc", "scale", "a", "b")


def concatenate(batch: Sequence[Densities]) -> Densities:
    """Many predictions' densities as one, segments numbered on."""
    if len(batch) == 1:
        return batch[0]
    offsets = np.cumsum([0] + [one.n for one in batch])
    columns = {name: np.concatenate([getattr(one, name) for one in batch]) for name in _COLUMNS}
    columns["segment"] = columns["segment"] + np.repeat(offsets[:-1], [len(one.segment) for one in batch])
    return Densities(int(offsets[-1]), **columns)
