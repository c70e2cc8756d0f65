"""Synthetic prices: a market that is always open, looks like one, and is the same for the same seed.

One-minute returns follow a GARCH(1,1) (Bollerslev 1986) with Student-t shocks (variance 1) and rare jumps:

    r_m = scale * sqrt(s_m * w_m) * n_m + jump_m        n_m ~ N(0, 1), w_m ~ (NU - 2) / chi2(NU)
    s_{m+1} = OMEGA + s_m * (BETA + ALPHA * min(n_m^2 w_m, NEWS) / E[min(...)])

NEWS bounds what one shock does to the volatility; without it the fourth moment is infinite, and some days
look like no market ever did. Given w a minute's return is Gaussian, so the seconds inside it are an exact
Brownian bridge.

Every second is known without those before it: the random numbers come from a counter-based generator
(Philox), and a day depends on finitely many: its volatility starts where the day before would have ended
from the mean (after 1,440 minutes the difference is below 1e-10), its level is `sum(PULL**k * return of the
day k days before)`, which keeps the price within a plausible range for years. Only the generator's raw bits
are used, whose stream NumPy guarantees.

Changing anything here changes the paths, which a game that was stopped then refuses to go on with: say so
in the changelog.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from condor_lite.prices.grid import Point

Floats = npt.NDArray[np.float64]

ALPHA, BETA = 0.15, 0.84
NU = 6
NEWS = 5.0
_MEAN_NEWS = 0.859133  # E[min(t^2, NEWS)] of the standardised t with NU degrees of freedom
_HIGHEST = 25.0  # of s, whose mean is 1
_JUMPS_A_DAY = 2.0
_JUMP_SCALE = 6.0  # its standard deviation, in those of an average minute
PULL = 0.97  # what is left of a day's return a day later: a half-life of 23 days
_PULL_DAYS = 128

_DAY_S, _DAY_MIN = 86400, 1440
_EPOCH_DAY = 2**32  # so that days before 1970 have counters too
_DAYS_HELD = 3

_MARKETS = {"BTC": (95_000.0, 0.025), "ETH": (3_300.0, 0.034), "SOL": (190.0, 0.042), "XAU": (2_700.0, 0.010)}
"""Asset -> mean level, standard deviation of a day's log return. Others get theirs from their name."""


class SyntheticSource:
    """Prices for any asset, at any time, without a network."""

    name = "synthetic"
    simulated = True
    latency_s = 0.0
    page_points = 10_000
    reach_s: int | None = None
    skew_s: float | None = None

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._paths: dict[str, _Path] = {}

    def __str__(self) -> str:
        return f"synthetic prices with feed.seed = {self._seed}"

    async def fetch(self, asset: str, after_s: int, until_s: int, step_s: int) -> list[Point]:
        """The price at every multiple of `step_s` in `(after_s, until_s]`."""
        path = self._paths.get(asset)
        if path is None:
            path = self._paths[asset] = _Path(self._seed, asset)
        first_s = after_s // step_s * step_s + step_s
        ts_s = np.arange(first_s, until_s + 1, step_s, dtype=np.int64)
        return list(zip(ts_s.tolist(), path.prices(ts_s).tolist(), strict=True)) if len(ts_s) else []

    def end_s(self, asset: str) -> int | None:
        """None: it never ends."""
        return None

    async def aclose(self) -> None:
        """Nothing to close."""


@dataclass(frozen=True, slots=True)
class _Day:
    """One day's minutes. All arrays [1440] but `level`, the log price at the minutes' ends, with the start
    [1441]."""

    level: Floats
    spread: Floats
    """Standard deviation of the minute's Gaussian part: what the bridge inside it has."""
    jump: Floats
    jump_second: Floats


@dataclass(frozen=True, slots=True)
class _Returns:
    """The minutes of `days` days before levels are put in. Arrays [days, 1440]."""

    total: Floats
    spread: Floats
    jump: Floats
    jump_second: Floats


class _Path:
    def __init__(self, seed: int, asset: str) -> None:
        self._minute_key, self._second_key, draw = _keys(seed, asset)
        # Levels of 50 to 200 and 2 to 4 % a day for an asset that the table doesn't know.
        self._base, day_scale = _MARKETS.get(asset, (50 * 4.0**draw, 0.02 * 2.0**draw))
        self._decimals = 6 - math.floor(math.log10(self._base))
        self._scale = day_scale / math.sqrt(_DAY_MIN + _JUMPS_A_DAY * _JUMP_SCALE**2)
        self._day_returns: dict[int, float] = {}
        self._days: OrderedDict[int, _Day] = OrderedDict()

    def prices(self, ts_s: npt.NDArray[np.int64]) -> Floats:
        """The prices at `ts_s` int64[k], ascending: float64[k]."""
        minute = (ts_s - 1) // 60  # a minute is the 60 seconds after its start, its end included
        day = minute // _DAY_MIN
        found = np.empty(len(ts_s))
        edges = [0, *(np.flatnonzero(np.diff(day)) + 1).tolist(), len(ts_s)]
        self._build(int(day[0]), int(day[-1]))
        for part in (slice(*edge) for edge in pairwise(edges)):
            number = int(day[part.start])
            found[part] = self._levels(number, self._days[number], ts_s[part], minute[part])
        while len(self._days) > _DAYS_HELD:
            self._days.popitem(last=False)
        prices: Floats = np.round(self._base * np.exp(found), self._decimals)
        return prices

    def _levels(
        self, number: int, day: _Day, ts_s: npt.NDArray[np.int64], minute: npt.NDArray[np.int64]
    ) -> Floats:
        index = minute - number * _DAY_MIN
        second = ts_s - minute * 60  # 1 to 60
        start, end = day.level[index], day.level[index + 1]
        if (second == 60).all():
            return end
        first, last = int(minute[0]), int(minute[-1])
        bridge = self._bridges(first, last - first + 1)[minute - first, second - 1]
        after_jump = np.where(second > day.jump_second[index], day.jump[index], 0.0)
        straight = (end - start - day.jump[index]) * second / 60
        return np.where(second == 60, end, start + straight + day.spread[index] * bridge + after_jump)

    def _bridges(self, first_minute: int, minutes: int) -> Floats:
        """Standard Brownian bridges at the seconds of each minute: [minutes, 60]."""
        counter = (_EPOCH_DAY * _DAY_MIN + first_minute) * 60 // 4
        u = _uniforms(self._second_key, counter, minutes * 60).reshape(minutes, 2, 30)
        normal = np.concatenate(_normals(u[:, 0], u[:, 1]), axis=1)
        walk = np.cumsum(normal, axis=1)
        bridge: Floats = (walk - walk[:, -1:] * (np.arange(1, 61) / 60)) / math.sqrt(60)
        return bridge

    def _build(self, first: int, last: int) -> None:
        """See that the days `first` to `last` are in `_days`."""
        missing = [day for day in range(first, last + 1) if day not in self._days]
        for day in range(first, last + 1):
            if day in self._days:
                self._days.move_to_end(day)
        if not missing:
            return
        first, last = missing[0], missing[-1]
        # The levels need the returns of the days before; those that are known need not be drawn again.
        before = range(first - _PULL_DAYS, first)
        drawn = next((day for day in before if day not in self._day_returns), first)
        returns = self._returns(drawn, last - drawn + 1)
        sums = np.cumsum(returns.total, axis=1)
        self._day_returns.update(enumerate(sums[:, -1].tolist(), start=drawn))
        for day in range(first, last + 1):
            row = day - drawn
            start, end = self._level(day), self._level(day + 1)
            pull = (end - start - float(sums[row, -1])) / _DAY_MIN
            level = np.empty(_DAY_MIN + 1)
            level[0], level[1:] = start, start + sums[row] + pull * np.arange(1, _DAY_MIN + 1)
            level[-1] = end  # to the last bit what the next day starts with
            self._days[day] = _Day(
                level, returns.spread[row].copy(), returns.jump[row].copy(), returns.jump_second[row].copy()
            )
            self._days.move_to_end(day)
        if len(self._day_returns) > 8 * _PULL_DAYS:
            self._day_returns = {day: self._day_returns[day] for day in range(last - _PULL_DAYS, last + 1)}

    def _level(self, day: int) -> float:
        """The log price over the base's at the start of `day`."""
        return math.fsum(PULL**k * self._day_returns[day - 1 - k] for k in range(_PULL_DAYS))

    def _returns(self, first: int, days: int) -> _Returns:
        # One day more in front, whose end is the volatility to start with.
        counter = (_EPOCH_DAY + first - 1) * _DAY_MIN * 6 // 4
        u = _uniforms(self._minute_key, counter, (days + 1) * _DAY_MIN * 6).reshape(days + 1, 6, _DAY_MIN)
        normal, jump_normal = _normals(u[:, 0], u[:, 1])
        mixing = (NU - 2) / (-2 * np.log(u[:, 2] * u[:, 3] * u[:, 4]))  # -2 log(u u u) is chi2 with NU = 6
        news = np.minimum(normal**2 * mixing, NEWS) / _MEAN_NEWS
        variance = _garch(np.log(BETA + ALPHA * news))
        spread = self._scale * np.sqrt(variance * mixing[1:])
        chance = _JUMPS_A_DAY / _DAY_MIN
        jumps = u[1:, 5] < chance
        jump = np.where(jumps, self._scale * _JUMP_SCALE * jump_normal[1:], 0.0)
        jump_second = np.floor(u[1:, 5] / chance * 60)
        return _Returns(spread * normal[1:] + jump, spread, jump, jump_second)


def _garch(log_factor: Floats) -> Floats:
    """`s` for the minutes of all days but the first, from the log of what each minute multiplies `s` by.

    [days + 1, 1440] -> [days, 1440]. The recursion `s' = OMEGA + s * factor` is linear in `s`, so with
    `C_m` the sum of the logs before minute m it is `s_m = exp(C_m) * (s_0 + OMEGA * sum(exp(-C_j), 1 <= j
    <= m))`; within a day `|C|` stays below 1440 * |log(BETA)| = 251, far from an overflow.
    """
    total = np.zeros((log_factor.shape[0], _DAY_MIN + 1))
    np.cumsum(log_factor, axis=1, out=total[:, 1:])
    grown = np.zeros_like(total)
    np.cumsum((1 - ALPHA - BETA) * np.exp(-total[:, 1:]), axis=1, out=grown[:, 1:])
    start = np.exp(total[:-1, -1]) * (1 + grown[:-1, -1])
    variance: Floats = np.exp(total[1:, :-1]) * (start[:, None] + grown[1:, :-1])
    return np.minimum(variance, _HIGHEST)


def _normals(u: Floats, v: Floats) -> tuple[Floats, Floats]:
    """Two independent standard normals a pair of uniforms (Box and Muller 1958)."""
    radius = np.sqrt(-2 * np.log(u))
    return radius * np.cos(2 * np.pi * v), radius * np.sin(2 * np.pi * v)


def _uniforms(key: int, counter: int, count: int) -> Floats:
    """`count` numbers in (0, 1); each step of the counter is worth four."""
    raw = np.random.Philox(key=key, counter=counter).random_raw(count)
    uniform: Floats = ((raw >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return uniform


def _keys(seed: int, asset: str) -> tuple[int, int, float]:
    """An asset's two Philox keys, for minutes and for seconds, and a number in [0, 1) for its character."""
    digest = hashlib.sha512(f"{seed}/{asset}".encode()).digest()
    character = hashlib.sha256(asset.encode()).digest()
    return (
        int.from_bytes(digest[:16], "big"),
        int.from_bytes(digest[16:32], "big"),
        int.from_bytes(character[:4], "big") / 2**32,
    )
