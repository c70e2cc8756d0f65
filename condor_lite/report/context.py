"""What every handler is given, and where work goes that must not hold the event loop."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from functools import partial
from typing import Any, TypeVar

import anyio.to_thread

from condor_lite.errors import CondorError, QueryTimeout
from condor_lite.game.entities import Leaderboard, Model
from condor_lite.report.events import announce
from condor_lite.report.live import Live
from condor_lite.report.metrics import Metrics
from condor_lite.report.ready import ReadyMade, make
from condor_lite.report.recount import Recount
from condor_lite.report.replies import Reply, encode_rows, pack
from condor_lite.report.sending import Sending
from condor_lite.report.stream import Stream
from condor_lite.storage import queries
from condor_lite.storage.database import Readers

T = TypeVar("T")

_ROWS_ON_THE_LOOP = 100  # well under a millisecond; more are packed in a thread
_READY_FOR_S = 10.0  # a changed name or deployment shows after this long at the latest
_LOOK_EVERY_S = 0.25  # who is connected; looking takes as long as answering
_THREADS = 1  # two do no more in a second, and keep the interpreter from the event loop for longer
_LARGE_AT_ONCE = 1
_TURN_WITHIN_S = 5.0
_MOST_REMEMBERED = 256


class NotFound(CondorError):
    """There is nothing at this address; the message says why, and where to look."""


class Busy(QueryTimeout):
    """Too much is asked for at once."""

    def __init__(self) -> None:
        CondorError.__init__(
            self, "too many answers that take long are asked for at once; try again in a few seconds"
        )


class Context:
    """One for each application."""

    def __init__(self, live: Live, readers: Readers) -> None:
        self.live = live
        self.readers = readers
        self.stream = Stream()
        self.sending = Sending()
        self.recount = Recount(live.config.scoring.time_limit_s)
        announce(live, self.stream)
        self.metrics = Metrics(live)
        self.max_age_s = max(1, min(10, int(live.config.scoring.interval_s)))
        """How long a leaderboard is promised to hold, on the wall."""
        self._threads = asyncio.Semaphore(_THREADS)
        self._alone = asyncio.Semaphore(1)
        self._recounting = asyncio.Semaphore(1)
        self._large = asyncio.Semaphore(_LARGE_AT_ONCE)
        self._ready: ReadyMade | None = None
        self._ready_for: Leaderboard | None = None
        self._ready_until_s = 0.0
        self._looked_at_s = 0.0
        self._ready_lock = asyncio.Lock()
        self._models: Sequence[Model] = ()
        self._remembered: dict[object, tuple[float, Any]] = {}
        self._remembering: dict[object, asyncio.Lock] = {}

    async def ready(self) -> ReadyMade:
        """The ready-made bodies for the leaderboard and the models of this moment."""
        if (made := self._current()) is not None:
            return made
        async with self._ready_lock:
            if (made := self._current()) is not None:
                return made
            leaderboard, connected = self.live.leaderboard, frozenset(self.live.connected())
            with suppress(QueryTimeout):  # those of last time will do; the leaderboard has its own
                self._models = await queries.models(self.readers)
            work = partial(make, leaderboard, self._models, connected, self.live.started_at_s, self.max_age_s)
            # Everybody waits for it: it waits for nobody's pages.
            made = await anyio.to_thread.run_sync(work)
            self._ready, self._ready_for = made, leaderboard
            self._looked_at_s = asyncio.get_running_loop().time()
            self._ready_until_s = self._looked_at_s + _READY_FOR_S
            return made

    async def in_thread(self, work: Callable[..., T], *args: Any) -> T:
        """Run what takes more than a moment beside the event loop, one after the other.

        Raises Busy.
        """
        async with _turn(self._threads):
            return await anyio.to_thread.run_sync(partial(work, *args))

    async def alone(self, work: Callable[[], T]) -> T:
        """The same for what may take seconds: one at a time, so that nothing else waits for it."""
        async with _turn(self._alone):
            return await anyio.to_thread.run_sync(work)

    def recounting(self) -> AbstractAsyncContextManager[None]:
        """For `recount`: one at a time. Raises Busy."""
        return _turn(self._recounting)

    def large(self) -> AbstractAsyncContextManager[None]:
        """For answers of thousands of rows, from the query to the body, and those that nobody else will ask
        for: one at a time, so that their rows do not fill the memory, and quick answers need not queue with
        them. Raises Busy.
        """
        return _turn(self._large)

    async def rows(
        self,
        rows: list[sqlite3.Row],
        to_answer: Callable[[sqlite3.Row], object],
        max_age_s: int,
        headers: Mapping[str, str] | None = None,
        order: Callable[[sqlite3.Row], Any] | None = None,
    ) -> Reply:
        """A bare array of answers, one a row, sorted by `order`. Uses `rows` up: freeing them takes time."""

        def work() -> Reply:
            if order is not None:
                rows.sort(key=order)
            return pack(encode_rows(map(to_answer, _drained(rows))), max_age_s, headers=headers)

        return await self.in_thread(work) if len(rows) > _ROWS_ON_THE_LOOP else work()

    async def remembered(self, key: object, for_s: float, ask: Callable[[], Awaitable[T]]) -> T:
        """What `ask` gave within the last `for_s` seconds (on the wall), made by one request for all.

        Of so many keys that clients can choose, the newest are kept.
        """
        now_s = asyncio.get_running_loop().time
        lock = self._remembering.setdefault(key, asyncio.Lock())
        try:
            async with lock:
                until_s, value = self._remembered.get(key, (0.0, None))
                if now_s() >= until_s:
                    value = await ask()
                    self._forget(now_s())
                    self._remembered.pop(key, None)
                    self._remembered[key] = (now_s() + for_s, value)
                return value  # type: ignore[no-any-return]
        finally:
            if self._remembering.get(key) is lock and not lock.locked():
                del self._remembering[key]

    def _forget(self, now_s: float) -> None:
        """What is over, and the oldest where there is too much."""
        for key in [key for key, (until_s, _) in self._remembered.items() if now_s >= until_s]:
            del self._remembered[key]
        if len(self._remembered) >= _MOST_REMEMBERED:
            del self._remembered[next(iter(self._remembered))]

    def _current(self) -> ReadyMade | None:
        made, now_s = self._ready, asyncio.get_running_loop().time()
        if made is None or self._ready_for is not self.live.leaderboard or now_s >= self._ready_until_s:
            return None
        if now_s >= self._looked_at_s + _LOOK_EVERY_S:
            if made.connected != self.live.connected():
                return None
            self._looked_at_s = now_s
        return made


@asynccontextmanager
async def _turn(room: asyncio.Semaphore) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(_TURN_WITHIN_S):
            await room.acquire()
    except TimeoutError:
        raise Busy from None
    try:
        yield
    finally:
        room.release()


def _drained(rows: list[T]) -> Iterator[T]:
    """One row after the other, each let go of before the next."""
    rows.reverse()
    while rows:
        yield rows.pop()
