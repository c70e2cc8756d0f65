"""The process pool that checks and scores answers, and that no answer can break.

`ProcessPoolExecutor` knows no time-out for a task, and the death of one worker breaks every task in flight.
So a worker notes in shared memory which item it is on (`worker.py`), and the pool acts on the note: it is
made anew, and what was in flight runs again, the suspects alone. Only an item that then ends its worker
again, or holds it up again, is blamed.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import math
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.context import SpawnContext, SpawnProcess
from multiprocessing.sharedctypes import RawArray
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import anyio
import numpy as np
import numpy.typing as npt
import structlog

from condor_lite import worker
from condor_lite.errors import CondorError, StartError
from condor_lite.game.calibration import WIDTH
from condor_lite.game.families import Floats
from condor_lite.game.scoring import Rules, SegmentScores
from condor_lite.storage.compression import whole_bytes
from condor_lite.worker import Outcome, ScoringItem, ValidationItem

log = structlog.get_logger()

Item = TypeVar("Item", ValidationItem, ScoringItem)

_BATCH_S = 0.1  # what a batch is worth, as far as is known: half of it pays for its way there and back
_BATCH_ITEMS = 512
_SHARED_ITEMS = 32  # fewer are not spread over the workers
_BATCH_BYTES = 4 * 2**20
_GUESS_S_PER_BYTE = 5e-8  # until something has been measured
_ITEM_BYTES = 200  # an item's cost besides its payload's, in bytes of payload
_GRACE_S = 1.0  # after an item's time limit, before its worker is killed
_START_S = 60.0  # the longest that a worker may take to start, or to hand in a finished batch
_FRUITLESS = 3  # breaks in a row that nothing can be blamed for
_MEMORY_MB = 1024


class PoolError(CondorError):
    """The processes that score don't stay alive, and no answer is to blame."""


def make_executor(context: SpawnContext, workers: int, initargs: tuple[Any, ...]) -> Executor:
    """The one place that knows which executor it is; another kind of `concurrent.futures` fits in here."""
    return ProcessPoolExecutor(workers, mp_context=context, initializer=worker.enter, initargs=initargs)


class _RememberingContext(SpawnContext):
    """Keeps the processes that it made: an executor has no public way to kill them before Python 3.14."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[SpawnProcess] = []

    def Process(self, *args: Any, **kwargs: Any) -> SpawnProcess:  # type: ignore[override]  # noqa: N802
        process = SpawnProcess(*args, **kwargs)
        self.made.append(process)
        return process


@dataclass(frozen=True, slots=True)
class _Crew:
    """An executor with its processes and the notes that they write."""

    executor: Executor
    context: _RememberingContext
    notes: ctypes.Array[ctypes.c_double]

    def note(self, slot: int) -> tuple[float, float]:
        at = slot * worker.NOTE_WIDTH
        return self.notes[at], self.notes[at + 1]

    def dismiss(self) -> None:
        """End all processes at once, whatever they do. Blocks until they have ended."""
        for process in self.context.made:
            with contextlib.suppress(ValueError, AttributeError):  # closed, or never started
                process.kill()
        self.executor.shutdown(wait=True)


@dataclass(eq=False, slots=True)
class _Flight:
    """A batch on its way: the items' indices, and where the worker that has it makes its notes.

    `since_s`: from when on a worker had no other batch to take first.
    """

    items: list[int]
    careful: bool
    slot: int
    since_s: float
    future: Future[Outcome]
    landed: asyncio.Future[None]
    stuck_on: float | None = None


@dataclass(eq=False, slots=True)
class _Work(Generic[Item]):
    """One call's items: what is still to do, and what came of the rest."""

    function: Callable[[int, Sequence[Item], bool], Outcome]
    items: Sequence[Item]
    raw: npt.NDArray[np.float64]
    calibration: npt.NDArray[np.float64]
    segments: SegmentScores | None = None
    fan: Floats | None = None
    reasons: dict[int, str] = field(default_factory=dict)
    todo: deque[int] = field(default_factory=deque)
    suspects: deque[list[int]] = field(default_factory=deque)

    def record(self, indices: list[int], outcome: Outcome) -> None:
        self.raw[indices] = outcome.raw
        self.calibration[indices] = outcome.calibration
        self.segments, self.fan = outcome.segments, outcome.fan
        self.reasons.update((indices[at], reason) for at, reason in outcome.reasons.items())


class ScoringPool:
    """`async with ScoringPool(...) as pool`; calls run one after another, each spread over all workers.

    Raises StartError on entering where the rule can't be loaded, PoolError where workers die by themselves.
    """

    def __init__(
        self,
        workers: int,
        rules: Rules,
        time_limit_s: float,
        *,
        memory_mb: int = _MEMORY_MB,
        politeness: int = worker.POLITENESS,
    ) -> None:
        """`politeness` is added to the workers' nice value."""
        self._workers = workers
        self._places = workers + 1  # one batch lies ready, so that no worker waits for its way there
        self._rules = rules
        self._time_limit_s = time_limit_s
        self._memory_mb = memory_mb
        self._politeness = politeness
        self._s_per_byte: dict[object, float] = {}
        self._busy = asyncio.Lock()
        self._works: list[_Work[Any]] = []
        self._crew: _Crew | None = None
        self._fruitless = 0
        # Processes are started and ended in one thread: it takes milliseconds that the event loop does not
        # have, and a worker ends with the thread that started it (PR_SET_PDEATHSIG).
        self._thread = ThreadPoolExecutor(1, "scoring-pool", initializer=_keep_from_stopping)

    async def __aenter__(self) -> Self:
        try:
            problem = await self._start_problem()
            if problem is not None:
                raise StartError(f"scoring.rule {self._rules.rule!r} can't be used: {problem}")
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._close()

    @property
    def waiting(self) -> int:
        """How many items no worker has been given yet."""
        return sum(len(work.todo) + sum(map(len, work.suspects)) for work in self._works)

    async def validate(self, items: Sequence[ValidationItem]) -> dict[int, str]:
        """Which of the items (by index) are no valid answers, and why."""
        return (await self._run(worker.run_validation, items)).reasons

    async def score(
        self, items: Sequence[ScoringItem]
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], dict[int, str]]:
        """Raw scores float64[len(items)], NaN where there is none; calibration sums, a row an item; and for
        those without a score (by index) the reason.
        """
        work = await self._run(worker.run_scoring, items)
        return work.raw, work.calibration, work.reasons

    async def explain(self, item: ScoringItem) -> SegmentScores | str:
        """What one answer's score is made of, or the reason why it has none."""
        work = await self._run(worker.run_explanation, [item])
        return work.segments or work.reasons[0]

    async def fan(self, item: ValidationItem) -> Floats | str:
        """The quantiles that `game.fan` draws from one answer, or the reason why there are none."""
        work = await self._run(worker.run_fan, [item])
        return work.reasons[0] if work.fan is None else work.fan

    async def _start_problem(self) -> str | None:
        """What keeps the first worker from scoring. It starts here: the first batch need not wait for it."""
        future, _ = await self._in_thread(self._submit, worker.problem)
        await asyncio.wait({_landed(future)}, timeout=_START_S)
        if not future.done():
            return f"importing it takes longer than {_START_S:g} s"
        if future.exception() is not None:
            return f"the scoring process ended while it started ({future.exception()})"
        result: str | None = future.result()
        return result

    async def _close(self) -> None:
        """End the workers and their thread. Not to be cut short: a worker must not outlive the pool."""
        self._abandon()
        with anyio.CancelScope(shield=True):
            await asyncio.to_thread(self._thread.shutdown)

    async def _run(
        self, function: Callable[[int, Sequence[Item], bool], Outcome], items: Sequence[Item]
    ) -> _Work[Item]:
        raw, calibration = np.full(len(items), np.nan), np.zeros((len(items), WIDTH))
        work = _Work(function, items, raw, calibration, todo=deque(range(len(items))))
        self._works.append(work)
        try:
            async with self._busy:
                try:
                    await self._drive(work)
                except BaseException:
                    self._abandon()  # batches in flight have no one to come back to
                    raise
        finally:
            self._works.remove(work)
        return work

    async def _drive(self, work: _Work[Item]) -> None:
        flights: list[_Flight] = []
        while work.todo or work.suspects or flights:
            if work.suspects:
                if not flights:  # alone, so that there is no doubt who did it
                    flights.append(await self._launch(work, work.suspects.popleft(), 0, careful=True))
            else:
                while work.todo and len(flights) < self._places:
                    taken = {flight.slot for flight in flights}
                    slot = next(slot for slot in range(self._places) if slot not in taken)
                    flights.append(await self._launch(work, self._next_batch(work), slot, careful=False))
            await self._landing(flights)
            if any(flight.stuck_on is not None or _broke(flight) for flight in flights):
                await self._recover(work, flights)
                flights = []
            waiting = flights[self._workers :]
            for flight in [flight for flight in flights if flight.future.done()]:
                flights.remove(flight)
                outcome = flight.future.result()
                work.record(flight.items, outcome)
                self._learn(work, flight, outcome)
                self._fruitless = 0
            for flight in flights[: self._workers]:
                if flight in waiting:
                    flight.since_s = time.monotonic()

    async def _launch(self, work: _Work[Item], batch: list[int], slot: int, careful: bool) -> _Flight:
        items = [work.items[at] for at in batch]
        future, since_s = await self._in_thread(self._submit, work.function, slot, items, careful)
        return _Flight(batch, careful, slot, since_s, future, _landed(future))

    async def _landing(self, flights: Sequence[_Flight]) -> None:
        """Return when a batch has landed, or mark those whose worker does not react."""
        assert self._crew is not None
        longest_s = self._time_limit_s + _GRACE_S
        while True:
            now_s = time.monotonic()
            wait_s = longest_s  # by then, whoever is on an item has noted a new one, or is stuck
            for place, flight in enumerate(flights):
                item, since_s = self._crew.note(flight.slot)
                if item == worker.UNTOUCHED and place >= self._workers:
                    continue  # those before it are in its way
                if item >= 0:
                    left_s = since_s + longest_s - now_s
                elif item == worker.TOGETHER:
                    limit_s = worker.batch_limit_s(self._time_limit_s, len(flight.items))
                    left_s = since_s + limit_s + _GRACE_S - now_s
                else:
                    left_s = max(since_s, flight.since_s) + _START_S - now_s
                if left_s <= 0 and not flight.future.done():
                    flight.stuck_on = item
                wait_s = min(wait_s, max(left_s, 0.0))
            if any(flight.stuck_on is not None for flight in flights):
                return
            landed = {flight.landed for flight in flights}
            done, _ = await asyncio.wait(landed, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
            if done:
                return

    async def _recover(self, work: _Work[Item], flights: list[_Flight]) -> None:
        """Make the pool anew, and sort what was in flight into guilty, suspect and innocent."""
        crew = self._crew
        assert crew is not None
        await self._in_thread(self._dismiss)
        await asyncio.wait({flight.landed for flight in flights})
        some_stuck = any(flight.stuck_on is not None for flight in flights)
        blamed = False
        for flight in flights:
            if not _broke(flight):  # it landed in the meantime
                work.record(flight.items, flight.future.result())
                continue
            item, _ = crew.note(flight.slot)
            noted = flight.items[int(item)] if item >= 0 else None
            innocent = some_stuck and flight.stuck_on != item
            if innocent or (noted is None and item != worker.TOGETHER):
                if flight.careful:
                    work.suspects.append(flight.items)
                else:
                    work.todo.extendleft(reversed(flight.items))
                continue
            blamed = True
            if noted is None:
                work.suspects.append(flight.items)
                continue
            rest = [at for at in flight.items if at != noted]
            if flight.careful:
                work.reasons[noted] = self._verdict(flight)
                if rest:
                    work.suspects.append(rest)
            else:
                work.suspects.append([noted])
                work.todo.extendleft(reversed(rest))
        log.warning(
            "scoring_pool_remade",
            cause="a worker was stuck" if some_stuck else "a worker died",
            answers_in_flight=sum(len(flight.items) for flight in flights),
        )
        self._fruitless = 0 if blamed else self._fruitless + 1
        if self._fruitless >= _FRUITLESS:
            self._fruitless = 0
            raise PoolError(
                f"the scoring processes ended {_FRUITLESS} times in a row before they scored anything; "
                "is memory short, or does the host's rule end them while it is imported?"
            )

    def _verdict(self, flight: _Flight) -> str:
        if flight.stuck_on is not None:
            return f"takes longer than {self._time_limit_s:g} s to score"
        return "ended the process that scored it"

    def _next_batch(self, work: _Work[Item]) -> list[int]:
        s_per_byte = self._s_per_byte.get(work.function, _GUESS_S_PER_BYTE)
        allowed = min(_BATCH_BYTES, _BATCH_S / s_per_byte)
        share = max(math.ceil(len(work.todo) / self._workers), _SHARED_ITEMS)
        most = min(_BATCH_ITEMS, share, len(work.todo))
        batch = [work.todo.popleft()]
        size = _cost_bytes(work.items[batch[0]])
        while len(batch) < most:
            size += _cost_bytes(work.items[work.todo[0]])
            if size > allowed:
                break
            batch.append(work.todo.popleft())
        return batch

    def _learn(self, work: _Work[Item], flight: _Flight, outcome: Outcome) -> None:
        """Follow what a byte costs, slowly enough that a few odd answers don't decide."""
        measured = outcome.spent_s / sum(_cost_bytes(work.items[at]) for at in flight.items)
        before = self._s_per_byte.get(work.function, measured)
        self._s_per_byte[work.function] = 0.7 * before + 0.3 * measured

    def _abandon(self) -> None:
        """Let the crew go without waiting for it. The next call hires another."""
        self._thread.submit(self._dismiss)

    async def _in_thread(self, function: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)

    # In the pool's thread only, from here on.

    def _submit(self, function: Callable[..., Any], *args: Any) -> tuple[Future[Any], float]:
        crew = self._crew or self._hire()
        if args:
            slot = args[0] * worker.NOTE_WIDTH
            crew.notes[slot], crew.notes[slot + 1] = worker.UNTOUCHED, 0.0
        try:
            return crew.executor.submit(function, *args), time.monotonic()
        except BrokenExecutor as error:
            broken: Future[Any] = Future()
            broken.set_exception(error)
            return broken, time.monotonic()

    def _hire(self) -> _Crew:
        context = _RememberingContext()
        notes = RawArray("d", self._places * worker.NOTE_WIDTH)
        initargs = (os.getpid(), notes, self._rules, self._time_limit_s, self._memory_mb, self._politeness)
        self._crew = _Crew(make_executor(context, self._workers, initargs), context, notes)
        return self._crew

    def _dismiss(self) -> None:
        crew, self._crew = self._crew, None
        if crew is not None:
            crew.dismiss()


def _keep_from_stopping() -> None:
    """Processes inherit this thread's signal mask: none is stopped before it has learned to ignore that."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})


def _cost_bytes(item: ValidationItem | ScoringItem) -> int:
    return whole_bytes(item.body) + _ITEM_BYTES


def _broke(flight: _Flight) -> bool:
    return flight.future.done() and isinstance(flight.future.exception(), BrokenExecutor)


def _landed(future: Future[Any]) -> asyncio.Future[None]:
    """Done when `future` is. Unlike `asyncio.wrap_future` it never cancels it, which a broken executor's
    own thread would stumble over."""
    loop = asyncio.get_running_loop()
    landed: asyncio.Future[None] = loop.create_future()

    def land() -> None:
        if not landed.done():
            landed.set_result(None)

    future.add_done_callback(lambda _: loop.call_soon_threadsafe(land))
    return landed
