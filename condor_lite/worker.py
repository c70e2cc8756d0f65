"""What runs inside a process of the scoring pool: no event loop, no database, nothing but pure functions.

`pool.py` is the other side. A worker notes in shared memory which item it is on and since when, so that the
pool knows the guilty one when the worker dies or does not react.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from condor_lite.errors import InvalidAnswer
from condor_lite.game.calibration import WIDTH
from condor_lite.game.density import Densities, decode
from condor_lite.game.entities import Setting
from condor_lite.game.families import Floats
from condor_lite.game.fan import fan
from condor_lite.game.scoring import Realised, Rules, SegmentScores, load_rule, score
from condor_lite.storage.compression import decompress

T = TypeVar("T")

# A note: an item's index or one of the three below, and since when (monotonic: one clock for all processes).
NOTE_WIDTH = 2
UNTOUCHED = -1.0
TOGETHER = -2.0
FINISHED = -3.0

_PR_SET_PDEATHSIG = 1
_REASON_CHARS = 300
POLITENESS = 10  # added to the process's nice value: predicting comes first
_TOGETHER_MORE = 8  # so many answers in a batch are given the time limit once more
_SHORTEST_ALARM_S = 0.01
_TOGETHER_MOST = 5  # times the time limit: what a batch that is stuck in native code may cost


@dataclass(frozen=True, slots=True)
class ValidationItem:
    """An answer to check, as it is stored. Bounds on scales are multiples of `scale_unit`: `P(t0)` for price
    changes.
    """

    body: bytes
    setting: Setting
    scale_unit: float = 1.0


@dataclass(frozen=True, slots=True)
class ScoringItem:
    """An answer to score, as it is stored, against what happened. Answers of a round share one `realised`: it
    is sent once.
    """

    body: bytes
    setting: Setting
    realised: Realised

    @property
    def scale_unit(self) -> float:
        """`P(t0)` for price changes, 1 for log returns: `unit` is 1e4 divided by it."""
        return 1e4 / self.realised.unit


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a batch: `raw[k]` is NaN where item k was only validated, or has a reason.

    `calibration[k]` are the sums of `game.calibration`, zeros there. `spent_s`: of the processor, as busy
    machines would otherwise make batches small, and each costs its way there and back. `segments`: where they
    were asked for, the scores of the segments of a single item that has no reason; `fan`: its quantiles.
    """

    raw: npt.NDArray[np.float64]
    calibration: npt.NDArray[np.float64]
    reasons: dict[int, str]
    spent_s: float
    segments: SegmentScores | None = None
    fan: Floats | None = None


def batch_limit_s(time_limit_s: float, answers: int) -> float:
    """How long a batch may take that is evaluated together; one that takes longer is done one by one."""
    return time_limit_s * min(1 + answers / _TOGETHER_MORE, _TOGETHER_MOST)


class _TimeOver(BaseException):
    """Not an Exception, so that a rule's own `except Exception` does not swallow it."""


class _Failed(Exception):
    """One item's failure; the message is the reason that its participant reads."""


class Worker:
    """The process's state: where to note, what to apply, how long an item may take."""

    def __init__(
        self, notes: ctypes.Array[ctypes.c_double], rules: Rules, time_limit_s: float, memory_mb: int
    ) -> None:
        self._notes = notes
        self._rules = rules
        self._time_limit_s = time_limit_s
        self._memory_mb = memory_mb
        self._slot: int | None = None  # where to note, while something runs that is limited
        self._until_cpu_s = 0.0
        self._alarms = 0

    def note(self, slot: int, item: float) -> None:
        """The item first, then the time: death in between blames the next item, not the one that is done."""
        self._notes[slot * NOTE_WIDTH] = item
        self._notes[slot * NOTE_WIDTH + 1] = time.monotonic()

    def validate(self, slot: int, items: Sequence[ValidationItem]) -> dict[int, str]:
        reasons = {}
        for at, item in enumerate(items):
            try:
                self._limited(slot, at, partial(self._decode, item))
            except _Failed as failure:
                reasons[at] = str(failure)
        return reasons

    def score(
        self, slot: int, items: Sequence[ScoringItem], careful: bool
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], dict[int, str]]:
        """Decode each, then evaluate all together; one by one where that fails or `careful` asks for it."""
        raw, calibration = _nothing(len(items))
        reasons: dict[int, str] = {}
        pairs: dict[int, tuple[Densities, Realised]] = {}
        for at, item in enumerate(items):
            try:
                pairs[at] = (self._limited(slot, at, partial(self._decode, item)), item.realised)
            except _Failed as failure:
                reasons[at] = str(failure)
        # A host's own rule goes one by one: nothing is known of its speed, and a batch wins nothing there.
        together = len(pairs) > 1 and not careful and ":" not in self._rules.rule
        if together:
            with contextlib.suppress(_Failed):
                work = partial(self._evaluate, list(pairs.values()))
                limit_s = batch_limit_s(self._time_limit_s, len(pairs))
                found = self._limited(slot, TOGETHER, work, limit_s)
                raw[list(pairs)], calibration[list(pairs)] = found
                return raw, calibration, reasons
        for at, pair in pairs.items():
            try:
                work = partial(self._evaluate, [pair])
                (raw[at],), (calibration[at],) = self._limited(slot, at, work)
            except _Failed as failure:
                reasons[at] = str(failure)
        return raw, calibration, reasons

    def explain(self, slot: int, item: ScoringItem) -> SegmentScores:
        """Raises _Failed."""
        densities = self._limited(slot, 0, partial(self._decode, item))
        (scores,) = self._limited(slot, 0, partial(score, [(densities, item.realised)], self._rules))
        if scores.error is not None:
            raise _Failed(scores.error[:_REASON_CHARS])
        return scores

    def fan(self, slot: int, item: ValidationItem) -> Floats:
        """Raises _Failed."""
        densities = self._limited(slot, 0, partial(self._decode, item))
        return self._limited(slot, 0, partial(fan, densities))

    def _decode(self, item: ValidationItem | ScoringItem) -> Densities:
        rule = self._rules.rule
        limits, payload = self._rules.limits, decompress(item.body)
        return decode(payload, item.setting, limits, rule=rule, scale_unit=item.scale_unit)

    def _evaluate(
        self, pairs: list[tuple[Densities, Realised]]
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        raw, calibration = _nothing(len(pairs))
        for at, scores in enumerate(score(pairs, self._rules)):
            if scores.error is not None:
                raise _Failed(scores.error[:_REASON_CHARS])
            if not math.isfinite(scores.raw):
                raise _Failed(f"can't be scored: the rule {self._rules.rule!r} gives {scores.raw}")
            raw[at], calibration[at] = scores.raw, scores.calibration
        return raw, calibration

    def _limited(self, slot: int, item: float, work: Callable[[], T], limit_s: float | None = None) -> T:
        """`work()` within the time limit, or `limit_s`."""
        limit_s = limit_s or self._time_limit_s
        try:
            self.note(slot, item)
            self._slot, self._alarms, self._until_cpu_s = slot, 0, time.process_time() + limit_s
            signal.setitimer(signal.ITIMER_REAL, limit_s)
            try:
                return work()
            finally:
                self._slot = None  # an alarm on the very edge comes to nothing
                signal.setitimer(signal.ITIMER_REAL, 0)
        except _TimeOver:
            raise _Failed(f"takes longer than {self._time_limit_s:g} s to score") from None
        except _Failed:
            raise
        except InvalidAnswer as error:
            raise _Failed(str(error)) from None
        except MemoryError:
            raise _Failed(f"takes more than {self._memory_mb} MB of memory to score") from None
        except BaseException as error:  # a host's rule may raise what it likes, SystemExit included
            raise _Failed(f"can't be scored: {type(error).__name__}: {error}"[:_REASON_CHARS]) from None

    def ring(self) -> None:
        """The time is over, or goes on: whether an answer is valid must not depend on what else the processor
        has to do, so it is the processor's time. A host's own rule may also sleep: it is given the rest of
        its processor time once more, in case the machine stood still.
        """
        if self._slot is None:
            return
        self._alarms += 1
        left_s = self._until_cpu_s - time.process_time()
        if left_s <= 0.0 or (":" in self._rules.rule and self._alarms > 1):
            raise _TimeOver
        self._notes[self._slot * NOTE_WIDTH + 1] = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, max(left_s, _SHORTEST_ALARM_S))


_worker: Worker | None = None
_problem: str | None = None


def enter(
    parent_pid: int,
    notes: ctypes.Array[ctypes.c_double],
    rules: Rules,
    time_limit_s: float,
    memory_mb: int,
    politeness: int,
) -> None:
    """The pool's initializer. A rule that can't be loaded is told by `problem()`: an error here says less."""
    global _worker, _problem
    for number in (signal.SIGINT, signal.SIGTERM):  # a terminal and a service manager may tell everybody
        signal.signal(number, signal.SIG_IGN)
    _end_with(parent_pid)
    os.nice(politeness)
    _worker = Worker(notes, rules, time_limit_s, memory_mb)
    try:
        load_rule(rules.rule)
    except BaseException as error:  # whatever importing a host's module raises
        _problem = str(error) or type(error).__name__
    _limit_memory(memory_mb)


def problem() -> str | None:
    """Why this worker can't score, or None."""
    return _problem


def run_validation(slot: int, items: Sequence[ValidationItem], careful: bool) -> Outcome:
    """Check a batch; notes go to `slot`. Nothing that an item does raises. (One by one in any case.)"""
    worker, started_s = _ready()
    reasons = worker.validate(slot, items)
    worker.note(slot, FINISHED)
    return Outcome(*_nothing(len(items)), reasons, time.process_time() - started_s)


def run_scoring(slot: int, items: Sequence[ScoringItem], careful: bool) -> Outcome:
    """Score a batch; notes go to `slot`. Nothing that an item does raises."""
    worker, started_s = _ready()
    raw, calibration, reasons = worker.score(slot, items, careful)
    worker.note(slot, FINISHED)
    return Outcome(raw, calibration, reasons, time.process_time() - started_s)


def run_explanation(slot: int, items: Sequence[ScoringItem], careful: bool) -> Outcome:
    """Score a single answer, with what its score is made of."""
    return _alone(slot, lambda worker: {"segments": worker.explain(slot, *items)})


def run_fan(slot: int, items: Sequence[ValidationItem], careful: bool) -> Outcome:
    """The fan of a single answer."""
    return _alone(slot, lambda worker: {"fan": worker.fan(slot, *items)})


def _alone(slot: int, find: Callable[[Worker], dict[str, Any]]) -> Outcome:
    """What is found about a single answer, or why nothing is."""
    worker, started_s = _ready()
    reasons, found = {}, {}
    try:
        found = find(worker)
    except _Failed as failure:
        reasons[0] = str(failure)
    worker.note(slot, FINISHED)
    return Outcome(*_nothing(1), reasons, time.process_time() - started_s, **found)


def _nothing(items: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Raw scores and calibration sums before there are any."""
    return np.full(items, np.nan), np.zeros((items, WIDTH))


def _ready() -> tuple[Worker, float]:
    """The worker, with signals as they belong: a host's rule may have left them blocked or handled."""
    assert _worker is not None
    signal.signal(signal.SIGALRM, _ring)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    return _worker, time.process_time()


def _ring(signum: int, frame: FrameType | None) -> None:
    assert _worker is not None
    _worker.ring()


def _end_with(parent_pid: int) -> None:
    """Let the kernel kill this process when its parent ends, however that happens; also when it already has.

    The "parent" is the thread that started this process: `pool.py` keeps that thread as long as the pool.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        sys.exit("the process that this worker belongs to has ended")


def _limit_memory(memory_mb: int) -> None:
    """Let this process grow by `memory_mb` from here on; more is a MemoryError, not the kernel's choice."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + memory_mb * 2**20
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(
        resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard)
    )
