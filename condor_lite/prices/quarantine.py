"""Absurd prices: a jump of ten times or more counts only once a second point confirms it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from condor_lite.prices.grid import Point

_ABSURD = 10.0
_CONFIRMS = 2.0  # a second point within this factor is of the same magnitude


@dataclass(frozen=True, slots=True)
class Sifted:
    """`sound`: the points to believe. `dropped`: those that the next point disproved. `held`: an absurd
    newest one, which nothing has confirmed or disproved yet."""

    sound: list[Point]
    dropped: list[Point]
    held: Point | None


def sift(points: Sequence[Point], before: float | None) -> Sifted:
    """Look at points in their order (ascending, or descending for a past that is fetched backwards).

    `before` is the last sound price in front of them; without one the points' median stands in for it.
    """
    levels = [price for _, price in points]
    if before is None and points:
        before = statistics.median(levels)
    if before is None or not _apart(max([*levels, before]), min([*levels, before]), _ABSURD):
        return Sifted(list(points), [], None)
    sound: list[Point] = []
    dropped: list[Point] = []
    held: Point | None = None
    for point in points:
        absurd = _apart(point[1], before, _ABSURD)
        if held is not None:
            confirmed = absurd and not _apart(point[1], held[1], _CONFIRMS)
            (sound if confirmed else dropped).append(held)
            held = None
            absurd = absurd and not confirmed
        if absurd:
            held = point
        else:
            sound.append(point)
            before = point[1]
    return Sifted(sound, dropped, held)


def _apart(one: float, other: float, factor: float) -> bool:
    return max(one, other) >= factor * min(one, other)
