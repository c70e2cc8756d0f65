"""Spreads bursts of work over turns of the event loop, so that a thousand models do not hold it."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from contextlib import ExitStack

from condor_lite.clock import Clock

_LAST_SHARE = 64  # so that a flood of the others is not for ever


class Pacer:
    """Lets `starts_a_turn` callers go on in each turn of the event loop, first come, first served."""

    def __init__(self, starts_a_turn: int) -> None:
        self._starts_a_turn = starts_a_turn
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._pump: asyncio.Task[None] | None = None

    async def turn(self) -> None:
        """Return when it is this caller's turn."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        if self._pump is None:
            self._pump = asyncio.create_task(self._run(), name="pacer")
        await turn

    async def _run(self) -> None:
        while self._waiting:
            started = 0
            while self._waiting and started < self._starts_a_turn:
                turn = self._waiting.popleft()
                if not turn.done():  # whoever waited may have been cancelled
                    turn.set_result(None)
                    started += 1
            await asyncio.sleep(0)
        self._pump = None


class Waker:
    """Sets events, `wakes_a_turn` in a turn of the event loop; the clock stands still until all are set."""

    def __init__(self, clock: Clock, wakes_a_turn: int) -> None:
        self._clock = clock
        self._wakes_a_turn = wakes_a_turn
        self._waiting: deque[asyncio.Event] = deque()
        self._hold = ExitStack()

    def wake(self, event: asyncio.Event) -> None:
        """Have `event` set soon, after those before it."""
        if not self._waiting:
            self._hold.enter_context(self._clock.hold())
            asyncio.get_running_loop().call_soon(self._run)
        self._waiting.append(event)

    def _run(self) -> None:
        for _ in range(min(self._wakes_a_turn, len(self._waiting))):
            self._waiting.popleft().set()
        if self._waiting:
            asyncio.get_running_loop().call_soon(self._run)
        else:
            self._hold.close()


class Throttle:
    """Lets `most` calls be under way at once, but counts none of them for longer than `patience_s`.

    So their answers come back in portions that the event loop can take, and those who never answer hold up
    the others by `patience_s` for each `most` of them, and not for ever. At most `starts_a_turn` begin in
    one turn of the loop. Who enters as one of the last waits until nobody else does, but for every 64th call.
    """

    def __init__(self, most: int, patience_s: float, starts_a_turn: int) -> None:
        self._most = most
        self._patience_s = patience_s
        self._starts_a_turn = starts_a_turn
        self._under_way: dict[int, float] = {}
        """When each call that counts began; the oldest first."""
        self._first: deque[asyncio.Future[int]] = deque()
        self._last: deque[asyncio.Future[int]] = deque()
        self._numbers = itertools.count(1)
        self._next: asyncio.Handle | None = None
        """The next look at who may begin."""
        self._next_is_soon = False

    @property
    def crowded(self) -> bool:
        """Whether anyone waits to begin."""
        return bool(self._first or self._last)

    async def enter(self, *, last: bool = False) -> int:
        """Return when a call may begin, with its number. First come, first served."""
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[int] = loop.create_future()
        (self._last if last else self._first).append(turn)
        self._plan(loop)
        return await turn

    def leave(self, number: int) -> None:
        """The call has ended. One that is not reported, as its caller was cancelled, runs out by itself."""
        if self._under_way.pop(number, None) is not None:
            self._plan(asyncio.get_running_loop())

    def _plan(self, loop: asyncio.AbstractEventLoop) -> None:
        """Look again in the next turn where there is room, or else when the oldest call runs out."""
        if not self.crowded or self._next_is_soon:
            return
        if len(self._under_way) < self._most:
            if self._next is not None:
                self._next.cancel()
            self._next, self._next_is_soon = loop.call_soon(self._admit, loop), True
        elif self._next is None:
            oldest_s = next(iter(self._under_way.values()))
            self._next = loop.call_at(oldest_s + self._patience_s, self._admit, loop)

    def _admit(self, loop: asyncio.AbstractEventLoop) -> None:
        self._next, self._next_is_soon = None, False
        now_s = loop.time()
        while self._under_way and next(iter(self._under_way.values())) <= now_s - self._patience_s:
            del self._under_way[next(iter(self._under_way))]
        begun = 0
        while self.crowded and len(self._under_way) < self._most and begun < self._starts_a_turn:
            number = next(self._numbers)
            is_last = self._last and (not self._first or number % _LAST_SHARE == 0)
            turn = (self._last if is_last else self._first).popleft()
            if not turn.done():  # whoever waited may have been cancelled
                self._under_way[number] = now_s
                turn.set_result(number)
                begun += 1
        self._plan(loop)
