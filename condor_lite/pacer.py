"""Spreads bursts of work over turns of the event loop, so that a thousand models do not hold it."""

from __future__ import annotations

import asyncio
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
