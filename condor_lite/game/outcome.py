"""What happened: realised increments from prices, and when a round's prices are final."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from condor_lite.game.entities import Round, Setting
from condor_lite.game.families import Floats

Seconds = npt.NDArray[np.int64]
Sources = npt.NDArray[np.int16]

BASIS_POINTS = 1e4
WAIT, SCORE = "wait", "score"


@dataclass(frozen=True, slots=True, eq=False)
class Series:
    """One asset's prices: `ts_s` int64[k], epoch seconds UTC, ascending; `price` float64[k].

    `source` int16[k] tells apart the sources that gave them; None: all came from one.
    """

    ts_s: Seconds
    price: Floats
    source: Sources | None = None

    def since(self, from_s: int) -> Series:
        """The points with `ts >= from_s`."""
        own = slice(int(np.searchsorted(self.ts_s, from_s)), None)
        return Series(self.ts_s[own], self.price[own], None if self.source is None else self.source[own])

    @property
    def newest_s(self) -> int | None:
        return int(self.ts_s[-1]) if len(self.ts_s) else None


@dataclass(frozen=True, slots=True, eq=False)
class Realised:
    """The outcome of one round with `n` segments.

    `boundary_ts_s` int64[n + 1] are the grid times t_0 .. t_n; `boundary_price` float64[n + 1] the prices
    there, NaN where not fresh; `increments` float64[n] the log returns or price differences, NaN where
    unresolved; `unit` turns an increment into basis points; `no_move` is the mean |x_k| over the resolved
    segments in bp, NaN without any. `boundary_source` int16[n + 1] are the numbers of the sources of the
    prices, -1 where not fresh; None: all came from one.
    """

    boundary_ts_s: Seconds
    boundary_price: Floats
    increments: Floats
    resolved: int
    unit: float
    no_move: float
    boundary_source: Sources | None = None
    silence_s: int = 0
    """The longest time of the round without a price that left a segment unresolved, 0 where none did."""

    @property
    def between_sources(self) -> npt.NDArray[np.bool_]:
        """Which segments, bool[n], have end prices of two sources, whose difference is no market's move."""
        if self.boundary_source is None:
            return np.zeros(len(self.increments), np.bool_)
        start, end = self.boundary_source[:-1], self.boundary_source[1:]
        return np.asarray((start != end) & (start >= 0) & (end >= 0))

    @property
    def void_reason(self) -> str | None:
        """Why this outcome can't be scored, or None."""
        n = len(self.increments)
        if 2 * self.resolved < n:
            between = int(self.between_sources.sum())
            also = f"; the prices of {between} come from two sources" if between else ""
            if self.silence_s:
                also += f"; no price came for {self.silence_s} s of the round"
            return f"prices resolve only {self.resolved} of {n} segments{also}"
        if not np.isfinite(self.unit):
            return "there is no price at the start of the round"
        return None


def realise(series: Series, setting: Setting, scheduled_at_s: int, tick_s: int, target: str) -> Realised:
    """The increments of a round over its segments `(t0 + (k-1)*step, t0 + k*step]`.

    P(tau) is the last price with timestamp <= tau, fresh when less than `tick_s` old; a segment is resolved
    when both its end points are fresh and from one source, a zero increment included. `target`:
    "log_return" or "price_change".
    """
    boundary_ts_s = scheduled_at_s + setting.step_s * np.arange(setting.segments + 1, dtype=np.int64)
    last = np.searchsorted(series.ts_s, boundary_ts_s, side="right") - 1
    price = np.full(len(boundary_ts_s), np.nan)
    known = last >= 0
    price[known] = series.price[last[known]]
    usable = np.isfinite(price) & (price > 0.0)
    start = float(price[0]) if usable[0] else float("nan")
    age_s = np.full(len(boundary_ts_s), tick_s, np.int64)
    age_s[known] = boundary_ts_s[known] - series.ts_s[last[known]]
    price[~usable | (age_s >= tick_s)] = np.nan
    silent = known & (age_s >= tick_s)
    silence_s = 0
    if silent.any():
        ends_s = np.append(series.ts_s, boundary_ts_s[-1])[last[silent] + 1]
        begins_s = np.maximum(series.ts_s[last[silent]], scheduled_at_s)
        silence_s = int((np.minimum(ends_s, boundary_ts_s[-1]) - begins_s).max())
    source = None if series.source is None else _sources(series.source, last, np.isnan(price))
    if target == "price_change":
        increments, unit = np.diff(price), BASIS_POINTS / start
    else:
        increments, unit = np.log1p(np.diff(price) / price[:-1]), BASIS_POINTS
    if source is not None:
        increments[source[:-1] != source[1:]] = np.nan
    resolved = np.isfinite(increments)
    count = int(resolved.sum())
    no_move = float(np.abs(increments[resolved]).mean() * unit) if count else float("nan")
    return Realised(boundary_ts_s, price, increments, count, unit, no_move, source, silence_s)


def _sources(source: Sources, last: npt.NDArray[np.intp], unknown: npt.NDArray[np.bool_]) -> Sources | None:
    """The sources of the boundary prices, None where it is one."""
    found = np.full(len(last), -1, np.int16)
    found[~unknown] = source[last[~unknown]]
    return found if len(np.unique(found[~unknown])) > 1 else None


def verdict(
    newest_s: int | None,
    now_s: float,
    round_: Round,
    *,
    settle_delay_s: int,
    void_after_s: int,
    leapt_to_s: float = 0.0,
) -> str:
    """`WAIT`, `SCORE` (its prices can no longer change), or the reason why the round is void.

    `newest_s` is the asset's newest price, `now_s` the game's clock. That one may be trusted to void for want
    of prices: it goes on by seconds, whether or not prices come, but leaps only where a source of prices
    confirms it (`clock.LiveClock`), and what lies before `leapt_to_s` it has not seen pass. So a feed that is
    gone for good voids in `void_after` of the time that the game has seen pass, and a machine's clock that is
    set ahead voids nothing. Whether enough segments are resolved shows once the outcome is known:
    `Realised.void_reason`.
    """
    resolvable_at_s = round_.resolvable_at_s
    if newest_s is not None and newest_s >= resolvable_at_s:
        return SCORE if now_s >= resolvable_at_s + settle_delay_s else WAIT
    if now_s >= max(resolvable_at_s, leapt_to_s) + void_after_s:
        return f"no price of {round_.asset} came within {void_after_s} s of the end of the round"
    return WAIT
