"""The feed's arithmetic, pure: which prices are missing, and which points stand on the grid of ticks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

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
    if not times_s or times_s[-1] <= span.after_s:
        return []
    ts_s = np.array(times_s, np.int64)
    step_s = span.step_s
    first_s = max(span.after_s, times_s[0] - 1) // step_s * step_s + step_s
    grid_s = np.arange(first_s, times_s[-1] + 1, step_s, dtype=np.int64)
    last = np.searchsorted(ts_s, grid_s, side="right") - 1
    following_s = ts_s[np.minimum(last + 1, len(ts_s) - 1)]
    known = (ts_s[last] > grid_s - step_s) | (following_s - ts_s[last] <= QUIET_S)
    return [
        (at_s, wanted[times_s[index]])
        for at_s, index in zip(grid_s[known].tolist(), last[known].tolist(), strict=True)
    ]


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
