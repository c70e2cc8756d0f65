"""The game's time: the wall's, a scaled one for simulated feeds, or a stepped one for tests.

Only this module reads a clock. Game times are epoch seconds UTC. Network time-outs and back-offs do not
belong here: they run on the wall's time, whatever the game's clock does.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Protocol

LEAP_S = 60.0  # by more, a machine's clock leaps: that is not believed without a witness
_TOLD_S = 1.0  # a stand-still of less is not worth a word


def machine_s() -> float:
    """What the machine's clock says, right or wrong, epoch seconds."""
    return time.time()


class Clock(Protocol):
    """What the game asks of time. `speed` is game seconds per wall second."""

    speed: float
    leapt_to_s: float
    """Where it last went on after a leap: what lies before, the game has not seen pass."""

    @property
    def doubt(self) -> str | None:
        """Why nobody knows what time it is: no round is opened then. None nearly always."""
        ...

    @property
    def trouble(self) -> str | None:
        """What is wrong with the machine's clock, in words; None nearly always."""
        ...

    def now(self) -> float:
        """The game's time, epoch seconds."""
        ...

    async def sleep_until(self, at_s: float) -> None:
        """Return once `now() >= at_s`."""
        ...

    def wall_s(self, game_s: float) -> float:
        """How many seconds on the wall a span of `game_s` seconds of the game takes."""
        ...

    def hold(self) -> AbstractContextManager[None]:
        """While held, a stepped clock stands still; no other clock cares."""
        ...


class GameClock:
    """The wall's clock, or from `start_s` on one that runs `speed` times faster than the wall's."""

    doubt: str | None = None
    trouble: str | None = None
    leapt_to_s = 0.0
    _LONGEST_SLEEP_S = 5.0  # on the wall: a clock that is set forward is noticed within that

    def __init__(self, start_s: float | None = None, speed: float = 1.0) -> None:
        if start_s is None and speed != 1.0:
            raise ValueError("a clock with a speed needs a start")
        self.speed = speed
        self._start_s = start_s
        self._origin_s = time.monotonic()

    def now(self) -> float:
        if self._start_s is not None:
            return self._start_s + (time.monotonic() - self._origin_s) * self.speed
        return time.time()

    async def sleep_until(self, at_s: float) -> None:
        while (left_s := at_s - self.now()) > 0:  # noqa: ASYNC110 - a clock has no event
            await asyncio.sleep(min(left_s / self.speed, self._LONGEST_SLEEP_S))

    def wall_s(self, game_s: float) -> float:
        return game_s / self.speed

    def hold(self) -> AbstractContextManager[None]:
        return nullcontext()


class LiveClock(GameClock):
    """The machine's clock as far as it can be believed, for games on live prices. It never goes back.

    A machine's clock may be set wrong, by years, and right again, and a suspended machine's leaps rightly. So
    this one follows it only where it moves by less than `LEAP_S` against a steady one, which nobody can set.
    Where it leaps, this one goes on with the steady one, in `doubt`, until it is `told` what time it is.
    `stored_s` is how far the game had come; a machine's clock that says otherwise has leapt, too.
    """

    def __init__(self, stored_s: float | None = None) -> None:
        super().__init__()
        self._line = (time.time() if stored_s is None else stored_s, time.monotonic())
        self._known_gap_s = 0.0
        self._latest_s = stored_s or 0.0
        self.not_before_s = 0.0
        """What is stored up to then can't be undone: the game's time can't be earlier."""

    def now(self) -> float:
        self._latest_s = max(self._latest_s, self.line_s, self.not_before_s)
        return self._latest_s

    @property
    def line_s(self) -> float:
        """What time it is, as far as is known: `now()`, or earlier where the game had gone too far ahead."""
        (at_s, steady_s), now_s, wall_s = self._line, time.monotonic(), time.time()
        own_s = at_s + now_s - steady_s
        if abs(wall_s - own_s) <= LEAP_S:
            own_s, self._known_gap_s = wall_s, 0.0
        self._line = own_s, now_s
        return own_s

    def told(self, at_s: float) -> None:
        """Somebody who knows says that it is `at_s`: the machine's clock is right, or wrong by so much."""
        wall_s, own_s = time.time(), self.line_s
        before_s = own_s
        if abs(wall_s - at_s) <= LEAP_S:
            own_s = wall_s
        elif abs(own_s - at_s) > LEAP_S:
            own_s = at_s
        self._line = own_s, time.monotonic()
        self._known_gap_s = wall_s - own_s
        if abs(own_s - before_s) > LEAP_S:
            self.leapt_to_s = own_s

    def go_back(self, not_before_s: float) -> None:
        """Forget how far the game had gone ahead, but for `not_before_s`."""
        self._latest_s = self.not_before_s = not_before_s

    @property
    def ahead_s(self) -> float:
        """How far the game has gone ahead of the time, without need: it may go back so far."""
        return self._latest_s - max(self.line_s, self.not_before_s)

    @property
    def doubt(self) -> str | None:  # type: ignore[override]
        gap_s = time.time() - self.line_s
        if abs(gap_s - self._known_gap_s) <= LEAP_S:
            return None
        return f"the machine's clock is {_differing(gap_s)} the game's, and no source of prices confirms it"

    @property
    def trouble(self) -> str | None:  # type: ignore[override]
        if self.doubt:
            return self.doubt
        if (still_s := self._latest_s - self.line_s) > _TOLD_S:
            return f"the machine's clock was set back: the game stands still for {still_s:.0f} s"
        if abs(gap_s := time.time() - self.line_s) > LEAP_S:
            return f"the machine's clock is {_differing(gap_s)} that of the prices, which the game goes by"
        return None


def _differing(gap_s: float) -> str:
    return f"{timedelta(seconds=round(abs(gap_s)))} {'ahead of' if gap_s > 0 else 'behind'}"


class SteppedClock:
    """Jumps from one deadline to the next as soon as nobody holds it. `run_until` drives it.

    Work that must be finished before time moves on (a call to a model, a batch in the pool, a write) runs
    under `hold()`, so a simulated week takes as long as its work and gives the same rounds on every
    machine.
    """

    doubt: str | None = None
    trouble: str | None = None
    leapt_to_s = 0.0
    _PASSES = 25  # turns of the event loop without a hold after which everybody is taken to be asleep

    def __init__(self, start_s: float, speed: float = 1.0) -> None:
        self.speed = speed
        self._now_s = float(start_s)
        self._sleepers: list[tuple[float, int, asyncio.Event]] = []
        self._order = itertools.count()
        self._holds = 0
        self._free = asyncio.Event()
        self._free.set()

    def now(self) -> float:
        return self._now_s

    async def sleep_until(self, at_s: float) -> None:
        if at_s <= self._now_s:
            await asyncio.sleep(0)
            return
        woken = asyncio.Event()
        heapq.heappush(self._sleepers, (at_s, next(self._order), woken))
        await woken.wait()

    def wall_s(self, game_s: float) -> float:
        return game_s / self.speed

    @contextmanager
    def hold(self) -> Iterator[None]:
        self._holds += 1
        self._free.clear()
        try:
            yield
        finally:
            self._holds -= 1
            if not self._holds:
                self._free.set()

    async def run_until(self, at_s: float) -> None:
        """Let the game's time pass until `at_s`, as fast as the work allows."""
        while True:
            await self._settle()
            if not self._sleepers or self._sleepers[0][0] > at_s:
                break
            self._now_s = max(self._now_s, self._sleepers[0][0])
            while self._sleepers and self._sleepers[0][0] <= self._now_s:
                heapq.heappop(self._sleepers)[2].set()
        self._now_s = max(self._now_s, at_s)

    async def _settle(self) -> None:
        quiet = 0
        while quiet < self._PASSES:
            await self._free.wait()
            await asyncio.sleep(0)
            quiet = 0 if self._holds else quiet + 1
