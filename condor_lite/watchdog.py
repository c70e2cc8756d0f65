"""Keeps the event loop free: measures how late it is, all the time, and says what held it for long."""

from __future__ import annotations

import asyncio
import gc
import math
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from itertools import islice

import structlog

log = structlog.get_logger()

_BEAT_S = 0.05
_KEPT = 1200  # beats: the last minute
_HELD_S = 1.0
_LOOK_S = 0.25
_FRAMES = 12
_SWITCH_S = 0.001  # how long a thread computes before the event loop gets its turn; Python's own 5 ms add up
_COLLECT_AFTER = (10_000, 10, 100)  # new objects, young collections, older ones


def spare_the_loop() -> None:
    """To be called once all is started: the garbage collector and other threads then hold the loop for less.

    What start-up made is never looked at again (a full collection of it takes 25 to 44 ms). A round of a
    thousand models makes 40,000 objects for a moment: with Python's own limits they are gone through a
    hundred times and, with all else that the models hold, once in full (80 ms on busy cores).
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_COLLECT_AFTER)
    sys.setswitchinterval(_SWITCH_S)


class Watchdog:
    """`run()` beats on the event loop; a thread of its own looks whether the beats come.

    `on_beat(late_s)` is called at each beat.
    """

    def __init__(self, on_beat: Callable[[float], None] = lambda late_s: None) -> None:
        self._on_beat = on_beat
        self._delays_s: deque[float] = deque(maxlen=_KEPT)
        self._beat_s = time.monotonic()
        self._loop_thread = threading.get_ident()
        self._ended = threading.Event()

    def delay_s(self, quantile: float) -> float:
        """How late the loop was in the last minute (wall seconds): 0.5 the median, 1.0 the worst."""
        if not self._delays_s:
            return 0.0
        ordered = sorted(self._delays_s)
        return next(islice(ordered, max(math.ceil(quantile * len(ordered)) - 1, 0), None))

    async def run(self) -> None:
        """Beat until cancelled."""
        self._loop_thread = threading.get_ident()
        self._ended.clear()
        self._beat_s = time.monotonic()
        watcher = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        watcher.start()
        try:
            while True:
                await asyncio.sleep(_BEAT_S)
                now_s = time.monotonic()
                late_s = max(now_s - self._beat_s - _BEAT_S, 0.0)
                self._delays_s.append(late_s)
                self._beat_s = now_s
                self._on_beat(late_s)
        finally:
            self._ended.set()

    def _watch(self) -> None:
        """Look from outside: a loop that is held can't say so itself."""
        looked_s, reported_s = time.monotonic(), 0.0
        while not self._ended.wait(_LOOK_S):
            now_s, beat_s = time.monotonic(), self._beat_s
            asleep_s, looked_s = now_s - looked_s - _LOOK_S, now_s
            if asleep_s > _HELD_S:  # this thread did not run either: a suspended machine, a stopped process
                log.warning("process_was_stopped", for_s=round(asleep_s, 1))
            elif now_s - beat_s > _HELD_S and beat_s != reported_s:
                reported_s = beat_s
                log.error("event_loop_held", for_s=round(now_s - beat_s, 1), doing=self._doing())

    def _doing(self) -> str:
        """The innermost frames of the loop's thread, outermost first."""
        frame = sys._current_frames().get(self._loop_thread)
        if frame is None:
            return "its thread has ended"
        calls = traceback.extract_stack(frame)[-_FRAMES:]
        return " > ".join(f"{call.filename.rsplit('/', 1)[-1]}:{call.lineno} {call.name}" for call in calls)
