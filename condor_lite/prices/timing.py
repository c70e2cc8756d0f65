"""When a price can be had, and when to ask for it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from condor_lite.clock import Clock
from condor_lite.prices.supply import Line, Supply

_EARLY_S = 0.001  # what a clock's rounding may wake us too early
_WAIT_FIRST_S = 1.0  # for a point that is not there yet
_SILENT_TICKS = 3  # from then on it is asked for once a tick
_LAST_LOOK_S = 3.0  # before a point can be scored


@dataclass(frozen=True, slots=True)
class Timing:
    """`settle_s`: how old a point is when scores may rest on it."""

    clock: Clock
    tick_s: int
    settle_s: int

    def settled_s(self, supply: Supply) -> int:
        """The newest grid time whose price can be had."""
        at_s = self.clock.now() - supply.channel.lag_s * self.clock.speed + _EARLY_S
        return math.floor(at_s / self.tick_s) * self.tick_s

    def next_s(self, line: Line, newest_s: int | None, until_s: int) -> float:
        """When to ask again after all up to `until_s` was asked for, and came up to `newest_s`; game time.

        Right after the next tick; before that, where the point is not there yet, in 1, 2, 4, ... seconds, and
        where it is, shortly before it can be scored: until then the source may correct it.
        """
        next_s = until_s + self.tick_s + line.supply.channel.lag_s * self.clock.speed
        if line.supply.source.simulated:
            return next_s
        now_s = self.clock.now()
        if newest_s is not None and newest_s >= until_s:
            return min(next_s, self._last_look_s(now_s))
        if line.waiting_for_s != until_s:
            line.waiting_for_s, line.waited = until_s, 0
        if newest_s is None or until_s - newest_s > _SILENT_TICKS * self.tick_s:
            return next_s
        line.waited += 1
        return min(next_s, now_s + _WAIT_FIRST_S * 2.0 ** (line.waited - 1))

    def _last_look_s(self, now_s: float) -> float:
        """When the next point is about to settle."""
        look_s = self.settle_s - _LAST_LOOK_S
        if look_s <= _LAST_LOOK_S:
            return math.inf
        return math.ceil((now_s + _WAIT_FIRST_S - look_s) / self.tick_s) * self.tick_s + look_s
