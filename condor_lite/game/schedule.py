"""When rounds are due: a grid since the epoch, so that a restart neither shifts nor repeats one."""

from __future__ import annotations

import math
from collections.abc import Iterable

from condor_lite.game.entities import Setting


def bit_reversal_offset_s(place: int, interval_s: int, tick_s: int) -> int:
    """How far the asset at `place` (0-based, in the list of assets) shifts its grid, in seconds.

    The fractions 0, 1/2, 1/4, 3/4, 1/8, ... of the interval (the van der Corput sequence in base 2), rounded
    down to the tick. They depend on the place alone: appending an asset moves no other.

    Raises ValueError for a negative place, or an interval or tick that is not positive.
    """
    if place < 0 or interval_s <= 0 or tick_s <= 0:
        raise ValueError(
            f"place must be >= 0, interval_s and tick_s > 0: got {place}, {interval_s} and {tick_s}"
        )
    numerator, denominator = 0, 1
    while place:
        numerator = numerator * 2 + place % 2
        denominator *= 2
        place //= 2
    return interval_s * numerator // denominator // tick_s * tick_s


def due(setting: Setting, after_s: float, until_s: float) -> list[int]:
    """The setting's scheduled times t with `after_s < t <= until_s`, ascending; none if it is not asked."""
    if not setting.interval_s:
        return []
    return list(range(_next(setting, after_s), math.floor(until_s) + 1, setting.interval_s))


def next_due(settings: Iterable[Setting], after_s: float) -> int:
    """The earliest scheduled time after `after_s` over all settings. ValueError if none of them is asked."""
    times = [_next(setting, after_s) for setting in settings if setting.interval_s]
    if not times:
        raise ValueError("no setting has an interval: nothing is ever due")
    return min(times)


def deadline_s(scheduled_at_s: int, setting: Setting, timeout_game_s: float) -> float:
    """Until when a round's answers are taken, in the game's time.

    Not past the first outcome (a step), nor past the setting's next round (an interval, where it has one).
    """
    limits = [timeout_game_s, setting.step_s]
    if setting.interval_s:
        limits.append(setting.interval_s)
    return scheduled_at_s + min(limits)


def _next(setting: Setting, after_s: float) -> int:
    """The first time of the setting's grid after `after_s`."""
    # Grid times are whole: t > after_s exactly when t > floor(after_s), and integers don't round.
    passed = (math.floor(after_s) - setting.offset_s) // setting.interval_s
    return setting.offset_s + (passed + 1) * setting.interval_s
