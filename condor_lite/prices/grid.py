"""The feed's arithmetic, pure: which prices are missing, and which points stand on the grid of ticks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

Point = tuple[int, float]
"""`(timestamp_s, price)`."""

QUIET_S = 900
"""The longest silence that is taken for a market without trades. A longer one may as well be an exchange
that was down: nothing is filled in, and the rounds over it stay unresolved."""

_MODELS_STEP_S = 60


@dataclass(frozen=True, slots=True)
class Span:
    """Points wanted with `after_s < ts_s <= until_s`, on multiples of `step_s`."""

    after_s: int
    until_s: int
    step_s: int


def history_step_s(tick_s: int) -> int:
    """The resolution of the history that models get: the tick's, but never finer than one minute."""
    return math.ceil(_MODELS_STEP_S / tick_s) * tick_s


def on_grid(points: Sequence[Point], span: Span, previous: Point | None = None) -> list[Point]:
    """The price at each grid time in `span`: the last one at or before it. Ascending, each time once.

    `points` may come in any order, with duplicates (the last one counts) and off the grid; `previous` is
    the last point known before them. Nothing is claimed after the newest point, because only a later point
    proves that the source was up; nor in a silence of more than QUIET_S, unless the point is less than one
    step old.
    """
    wanted = dict(points)
    if previous is not None:
        wanted[previous[0]] = previous[1]
    times_s = sorted(ts_s for ts_s in wanted if ts_s <= span.until_s)
    if not times_s:
        return []
    found: list[Point] = []
    step_s = span.step_s
    for ts_s, until_s in pairwise([*times_s, times_s[-1] + 1]):
        if until_s - ts_s > QUIET_S:
            until_s = min(until_s, ts_s + step_s)
        first_s = -(-max(ts_s, span.after_s + 1) // step_s) * step_s
        found += [(at_s, wanted[ts_s]) for at_s in range(first_s, until_s, step_s)]
    return found


def pieces(after_s: int, until_s: int, *, tick_s: int, fine_after_s: int, fine_from_s: int) -> list[Span]:
    """`(after_s, until_s]` as spans, oldest first: every tick up to `fine_after_s` and from `fine_from_s` on,
    the models' resolution in between."""
    coarse_s = history_step_s(tick_s)
    fine_after_s, fine_from_s = (
        max(at_s // coarse_s * coarse_s, after_s) for at_s in (fine_after_s, fine_from_s)
    )
    if coarse_s == tick_s or fine_after_s >= fine_from_s:
        spans = [Span(after_s, until_s, tick_s)]
    else:
        spans = [
            Span(after_s, min(fine_after_s, until_s), tick_s),
            Span(fine_after_s, min(fine_from_s, until_s), coarse_s),
            Span(fine_from_s, until_s, tick_s),
        ]
    return [span for span in spans if span.after_s < span.until_s]


def missing(
    held_s: npt.NDArray[np.int64], now_s: int, *, tick_s: int, history_s: int, fine_s: int, keep_s: int
) -> list[Span]:
    """What lacks in a series that has the times `held_s` (int64[k], ascending), newest first.

    `now_s` is on the grid of ticks. Without a point in the last `keep_s`, that is the history. Scoring needs
    every tick, but only where rounds lie: in the `fine_s` (the longest horizon) after a point that was
    followed by a stop, which rounds from before still reach into, and from `fine_s` before now on. Elsewhere
    the models' resolution is enough.
    """
    coarse_s = history_step_s(tick_s)
    first_s = (now_s - history_s) // coarse_s * coarse_s
    fine_from_s = now_s - fine_s
    held_s = held_s[held_s >= now_s - keep_s]
    if not len(held_s):
        return pieces(first_s, now_s, tick_s=tick_s, fine_after_s=first_s, fine_from_s=fine_from_s)[::-1]
    spans: list[Span] = []
    if held_s[0] - first_s > coarse_s:
        spans.append(Span(first_s, int(held_s[0]) - tick_s, coarse_s))
    ends_s = [*(held_s[1:] - tick_s).tolist(), now_s]
    for place in np.flatnonzero(
        np.diff(held_s, append=max(now_s + coarse_s, held_s[-1])) > coarse_s
    ).tolist():
        after_s, until_s = int(held_s[place]), ends_s[place]
        if until_s > first_s:
            spans += pieces(
                after_s,
                until_s,
                tick_s=tick_s,
                fine_after_s=after_s + fine_s,
                fine_from_s=fine_from_s,
            )
    return spans[::-1]
