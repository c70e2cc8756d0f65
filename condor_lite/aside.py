"""Work that may never end: a look at a network's disk that is gone."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class Aside:
    """Runs one thing at a time in a thread of its own, which keeps nobody from ending the program."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._before: Future[Any] | None = None

    async def run(self, work: Callable[[], T]) -> T:
        """What `work()` returns or raises.

        Raises TimeoutError where it, or what was left behind before it, does not end within the limit.
        """
        async with asyncio.timeout(self._limit_s):
            if self._before is not None:
                with contextlib.suppress(Exception):
                    await asyncio.wrap_future(self._before)
            future = Future[T]()
            future.set_running_or_notify_cancel()  # whoever waits may leave
            threading.Thread(target=_do, args=(work, future), name="aside", daemon=True).start()
            self._before = future
            return await asyncio.wrap_future(future)


def _do(work: Callable[[], T], future: Future[T]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:
        future.set_exception(error)
