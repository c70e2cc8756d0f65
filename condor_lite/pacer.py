"""Spreads bursts of work over turns of the event loop, so that a thousand models do not hold it."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque


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


class Throttle:
    """Lets `most` calls be under way at once, but counts none of them for longer than `patience_s`.

    So their answers come back in portions that the event loop can take, and those who never answer hold up
    the others by `patience_s` for each `most` of them, and not for ever.
    """

    def __init__(self, most: int, patience_s: float) -> None:
        self._most = most
        self._patience_s = patience_s
        self._under_way: dict[int, float] = {}
        """When each call that counts began; the oldest first."""
        self._waiting: deque[asyncio.Future[int]] = deque()
        self._numbers = itertools.count()
        self._timer: asyncio.TimerHandle | None = None

    async def enter(self) -> int:
        """Return when a call may begin, with its number. First come, first served."""
        loop = asyncio.get_running_loop()
        if not self._waiting and len(self._under_way) < self._most:
            return self._begin(loop.time())
        turn: asyncio.Future[int] = loop.create_future()
        self._waiting.append(turn)
        self._watch(loop)
        return await turn

    def leave(self, number: int) -> None:
        """A call has ended. One that nobody reports ended, as its caller was cancelled, runs out by itself."""
        if self._under_way.pop(number, None) is not None and self._waiting:
            self._admit(asyncio.get_running_loop())

    def _begin(self, now_s: float) -> int:
        number = next(self._numbers)
        self._under_way[number] = now_s
        return number

    def _admit(self, loop: asyncio.AbstractEventLoop) -> None:
        while self._waiting and len(self._under_way) < self._most:
            turn = self._waiting.popleft()
            if not turn.done():  # whoever waited may have been cancelled
                turn.set_result(self._begin(loop.time()))

    def _watch(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._timer is None and self._waiting and self._under_way:
            oldest_s = next(iter(self._under_way.values()))
            self._timer = loop.call_at(oldest_s + self._patience_s, self._run_out, loop)

    def _run_out(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        until_s = loop.time() - self._patience_s
        for number, began_s in list(itertools.islice(self._under_way.items(), self._most)):
            if began_s > until_s:
                break
            del self._under_way[number]
        self._admit(loop)
        self._watch(loop)
