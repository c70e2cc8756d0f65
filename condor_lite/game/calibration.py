"""Whether forecasts mean what they say (SCORING.md, "Calibration"): PIT histogram, coverage, bias, sharpness.

For every resolved segment a unit of count is spread evenly over [F(x-), F(x)] in a histogram of 20 bins.
That is the non-randomised PIT (Czado, Gneiting, Held 2009, "Predictive model assessment for count data"):
right for discrete forecasts, the same when scored again, flat for a model that is calibrated. All that is
kept of an answer is `WIDTH` sums, which add up over answers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from condor_lite.game.entities import Brief, Setting, Window
from condor_lite.game.families import POINT, Floats
from condor_lite.game.mixture import Densities, Ints
from condor_lite.game.uncertainty import standard_error

BINS = 20
# The sums of an answer: the histogram, then these.
SEGMENTS, PIT, SPREAD = BINS, BINS + 1, BINS + 2
WIDTH = BINS + 3
# The bins of the central 50 % and 90 %.
HALF, NINETY = slice(5, 15), slice(1, 19)
# Under so many distinct segment times nothing is claimed.
FEWEST_TIMES = 400
# The hours of the anchor window and the one in progress.
_SLOTS = Window.ANCHOR.hours + 1


def sums(densities: Densities, x: Floats, spread_bp: Floats, owner: Ints, owners: int) -> Floats:
    """The sums of `owners` answers, shape (owners, WIDTH); segment k belongs to the answer `owner[k]`.

    `x`: what happened, finite; `spread_bp`: E|X - X'|. Where a distribution function gives no number, the
    segment counts for nothing.
    """
    at = np.minimum(densities.cdf(x), 1.0)
    below = np.maximum(at - _mass_at(densities, x), 0.0)
    numbers = np.isfinite(at)
    if not numbers.all():
        at, below, spread_bp, owner = at[numbers], below[numbers], spread_bp[numbers], owner[numbers]
    total = np.zeros((owners, WIDTH))
    jump = at > below
    smooth = ~jump
    cell = owner[smooth] * BINS + np.minimum((at[smooth] * BINS).astype(np.intp), BINS - 1)
    total[:, :BINS] = np.bincount(cell, minlength=owners * BINS).reshape(owners, BINS)
    if jump.any():
        np.add.at(total[:, :BINS], owner[jump], _shares(below[jump], at[jump]))
    total[:, SEGMENTS] = np.bincount(owner, minlength=owners)
    total[:, PIT] = np.bincount(owner, 0.5 * (below + at), owners)
    total[:, SPREAD] = np.bincount(owner, spread_bp, owners)
    return total


def _mass_at(densities: Densities, x: Floats) -> Floats:
    """F(x) - F(x-), shape (n,)."""
    points = densities.family == POINT
    if not points.any():
        return np.zeros(densities.n)
    return densities.mix((points & (densities.loc == x[densities.segment])).astype(np.float64))


def _shares(below: Floats, at: Floats) -> Floats:
    """A unit spread evenly over [below, at], by bin; shape (jumps, BINS)."""
    edges = np.arange(BINS + 1) / BINS
    upto = np.clip((edges - below[:, None]) / (at - below)[:, None], 0.0, 1.0)
    return np.diff(upto, axis=1)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over segments, and its standard error; None under 5 blocks."""

    value: float
    standard_error: float | None


@dataclass(frozen=True, slots=True)
class Calibration:
    """`histogram`: each bin's share. `bias`: mean PIT - 0.5, positive where prices came out higher than the
    model thought. `sharpness_bp` is None where a forecast's E|X - X'| is infinite.
    """

    histogram: tuple[Estimate, ...]
    coverage_50: Estimate
    coverage_90: Estimate
    bias: Estimate
    sharpness_bp: Estimate | None


def summarise(blocks: Floats) -> Calibration | None:
    """The calibration over blocks of game time, from the sums of each: float64[blocks, WIDTH].

    Ratios of sums over segments, with the standard errors of ratio estimators from whole blocks (Cochran,
    Sampling Techniques, section 6.4): segments overlap, so their number says nothing. None without a segment.
    """
    segments = blocks[:, SEGMENTS]
    if not segments.sum() > 0:
        return None

    def estimate(part: Floats) -> Estimate:
        value = part.sum() / segments.sum()
        error = standard_error((part - value * segments)[:, None], segments[:, None] > 0)[0] / segments.sum()
        return Estimate(float(value), None if math.isnan(error) else float(error))

    pit = estimate(blocks[:, PIT])
    return Calibration(
        histogram=tuple(estimate(blocks[:, place]) for place in range(BINS)),
        coverage_50=estimate(blocks[:, HALF].sum(axis=1)),
        coverage_90=estimate(blocks[:, NINETY].sum(axis=1)),
        bias=Estimate(pit.value - 0.5, pit.standard_error),
        sharpness_bp=estimate(blocks[:, SPREAD]) if np.isfinite(blocks[:, SPREAD]).all() else None,
    )


def block_of_hour(hours_ago: int, blocks: int) -> int:
    """The block of the anchor window that an hour belongs to, 0 is the newest; as in `windows.py` the hour in
    progress belongs to it, too.
    """
    return max(hours_ago - 1, 0) * blocks // Window.ANCHOR.hours


@dataclass(frozen=True, slots=True, eq=False)
class RoundCalibration:
    """What a round adds: `sums` float64[models, WIDTH], a row each for `model_no` (those with a score of
    their own); `ends_s` int64[resolved], when its resolved segments end, ascending.
    """

    model_no: Sequence[int]
    sums: Floats
    ends_s: NDArray[np.int64]

    def new_times(self, counted_until_s: int | None) -> int:
        """How many of the segments lie beyond the time up to which a model's segments were counted before:
        rounds overlap, and a time counts once.
        """
        if counted_until_s is None:
            return len(self.ends_s)
        return len(self.ends_s) - int(np.searchsorted(self.ends_s, counted_until_s, side="right"))


@dataclass(frozen=True, slots=True, eq=False)
class BriefRows:
    """One setting's columns of equal length, a row a (hour, model): what `BriefSums` is made of."""

    setting_key: str
    hour: NDArray[np.int64]  # hours since the epoch
    model_no: NDArray[np.int64]
    times: NDArray[np.float64]
    segments: NDArray[np.float64]
    inside_90: NDArray[np.float64]
    pit: NDArray[np.float64]


def brief_rows(setting_key: str, resolvable_at_s: int, added: RoundCalibration, times: Floats) -> BriefRows:
    """A round's rows; `times` float64[models]: how many segment times it adds to each model's."""
    return BriefRows(
        setting_key=setting_key,
        hour=np.full(len(added.model_no), resolvable_at_s // 3600, np.int64),
        model_no=np.array(added.model_no, np.int64),
        times=times,
        segments=added.sums[:, SEGMENTS],
        inside_90=added.sums[:, NINETY].sum(axis=1),
        pit=added.sums[:, PIT],
    )


class BriefSums:
    """As much of every model's calibration in the anchor window as the leaderboard shows: sums by setting and
    hour, for the settings of the current config. Not for use from two threads at once.
    """

    def __init__(self, settings: Sequence[Setting]) -> None:
        self._settings = {setting.key: place for place, setting in enumerate(settings)}
        self._columns: dict[int, int] = {}
        self._newest_hour = 0
        # [times, segments, inside 90 %, pit; setting, hour modulo their number, model]
        self._sums = np.zeros((4, len(settings), _SLOTS, 0), np.float32)

    def add(self, rows: BriefRows) -> None:
        """Add rounds' sums, in any order; a round's once."""
        setting = self._settings.get(rows.setting_key)
        if setting is None or not len(rows.hour):
            return
        self._enter(int(rows.hour.max()))
        used = rows.hour > self._newest_hour - _SLOTS
        column = self._places(rows.model_no)
        where = (rows.hour[used] % _SLOTS, column[used])
        for kind, values in enumerate((rows.times, rows.segments, rows.inside_90, rows.pit)):
            np.add.at(self._sums[kind, setting], where, values[used].astype(np.float32))

    def of_hour(self, setting_key: str, hour: int, model_no: NDArray[np.int64]) -> NDArray[np.float32]:
        """The sums of some models in an hour that is held: float32[4, models]."""
        self._enter(hour)
        columns = self._places(model_no)
        return self._sums[:, self._settings[setting_key], hour % _SLOTS][:, columns]

    def put(
        self, setting_key: str, hour: int, model_no: NDArray[np.int64], sums: NDArray[np.float32]
    ) -> None:
        """Let an hour's sums be these, as `of_hour` gave them."""
        self._enter(hour)
        if hour > self._newest_hour - _SLOTS:
            columns = self._places(model_no)
            self._sums[:, self._settings[setting_key], hour % _SLOTS][:, columns] = sums

    def briefs(self, now_s: float) -> dict[int, Brief]:
        """By `model_no`, over all settings; of those that one setting has enough distinct times of."""
        self._enter(int(now_s) // 3600)
        times, segments, inside_90, pit = self._sums.sum(axis=2, dtype=np.float64)
        enough = times.max(axis=0, initial=0.0) >= FEWEST_TIMES
        count = np.maximum(segments.sum(axis=0), 1.0)
        coverage, bias = inside_90.sum(axis=0) / count, pit.sum(axis=0) / count - 0.5
        return {
            model_no: Brief(float(coverage[column]), float(bias[column]))
            for model_no, column in self._columns.items()
            if enough[column]
        }

    def _enter(self, hour: int) -> None:
        """Let time reach `hour`, emptying the slots it takes over."""
        for passed in range(max(self._newest_hour + 1, hour - _SLOTS + 1), hour + 1):
            self._sums[:, :, passed % _SLOTS] = 0
        self._newest_hour = max(self._newest_hour, hour)

    def _places(self, model_no: NDArray[np.int64]) -> Ints:
        with suppress(KeyError):  # mostly they are known
            return np.array([self._columns[no] for no in model_no.tolist()], dtype=np.intp)
        distinct, of_model = np.unique(model_no, return_inverse=True)
        wanted = dict.fromkeys(distinct.tolist(), 0)
        if len(self._columns | wanted) > self._sums.shape[-1]:
            # Models without a segment in the held hours lose their columns.
            held = self._sums[1].any(axis=(0, 1))
            kept = {no: column for no, column in self._columns.items() if held[column] or no in wanted}
            needed = len(kept | wanted)
            grown = np.zeros((*self._sums.shape[:-1], max(16, needed + needed // 4)), np.float32)
            grown[..., : len(kept)] = self._sums[..., list(kept.values())]
            self._sums, self._columns = grown, {no: column for column, no in enumerate(kept)}
        columns = [self._columns.setdefault(no, len(self._columns)) for no in wanted]
        return np.array(columns, dtype=np.intp)[of_model]
