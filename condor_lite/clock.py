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
from typing import Protocol


class Clock(Protocol):
    """What the game asks of time. `speed` is game seconds per wall second."""

    speed: float

    @property
    def stands_still_for_s(self) -> float:
        """How long (wall) the game's time will stand still; 0 nearly always."""
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
    """The wall's clock, or from `start_s` on one that runs `speed` times faster than the wall's.

    Without `start_s` it is the wall's clock itself, except that it never goes back, also not behind
    `not_before_s`: where somebody sets the wall's back, the game stands still until it has caught up.
    """

    _LONGEST_SLEEP_S = 5.0  # on the wall: a clock that is set forward is noticed within that

    def __init__(
        self, start_s: float | None = None, speed: float = 1.0, *, not_before_s: float = 0.0
    ) -> None:
        if start_s is None and speed != 1.0:
            raise ValueError("a clock with a speed needs a start")
        self.speed = speed
        self._start_s = start_s
        self._origin_s = time.monotonic()
        self._latest_s = not_before_s

    def now(self) -> float:
        if self._start_s is not None:
            return self._start_s + (time.monotonic() - self._origin_s) * self.speed
        self._latest_s = max(self._latest_s, time.time())
        return self._latest_s

    @property
    def stands_still_for_s(self) -> float:
        """How long the game's time will stand still, because the wall's clock was set back."""
        return max(self._latest_s - time.time(), 0.0) if self._start_s is None else 0.0

    async def sleep_until(self, at_s: float) -> None:
        while (left_s := at_s - self.now()) > 0:  # noqa: ASYNC110 - a clock has no event
            await asyncio.sleep(min(left_s / self.speed + self.stands_still_for_s, self._LONGEST_SLEEP_S))

    def wall_s(self, game_s: float) -> float:
        return game_s / self.speed

    def hold(self) -> AbstractContextManager[None]:
        return nullcontext()


class SteppedClock:
    """Jumps from one deadline to the next as soon as nobody holds it. `run_until` drives it.

    Work that must be finished before time moves on (a call to a model, a batch in the pool, a write) runs
    under `hold()`, so a simulated week takes as long as its work and gives the same rounds on every
    machine.
    """

    _PASSES = 25  # turns of the event loop without a hold after which everybody is taken to be asleep

    def __init__(self, start_s: float, speed: float = 1.0) -> None:
        self.speed = speed
        self._now_s = float(start_s)
        self._sleepers: list[tuple[float, int, asyncio.Event]] = []
        self._order = itertools.count()
        self._holds = 0
        self._free = asyncio.Event()
        self._free.set()

    @property
    def stands_still_for_s(self) -> float:
        return 0.0

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
