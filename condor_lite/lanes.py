"""A lane per model: one task that sends its model what is next, one call at a time.

What is next follows from the watermark (the newest price that the model has been given, for each asset) and
from the rounds that are open. A slow model makes only its own lane late.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field

import orjson

from condor_lite.clock import Clock
from condor_lite.game.entities import AnswerStatus, Model, Round
from condor_lite.models.runner import Connection, Outcome, Reply, tick_request
from condor_lite.pacer import Throttle, Waker
from condor_lite.prices.book import PriceBook, Prices, Times

NO_TIME_LEFT = "no time was left to ask before the deadline"
HISTORY_TIMEOUT_S = 120.0
_HISTORY_TRIES = 3
_HISTORY_PAUSE_S = 0.02  # between the sends of 5 MB each to two newcomers (20 at once hold the loop 123 ms)
_HISTORY_YIELDS_S = 1.0
_BUSY_PAUSE_S = 0.25
_UNDER_WAY = 32  # calls at once: more answers in one turn of the event loop hold it for too long
_UNDER_WAY_S = 0.01  # how long a call counts as one of them
_STARTS_A_TURN = 8  # of calls in one turn of the event loop
_CACHED_TICKS = 16
_PIECE = 1440  # points: a day of minutes, encoded in about 0.3 ms

_HANDED_OVER = (
    Outcome.SUCCESS,
    Outcome.MODEL_FAILED,
    Outcome.BAD_IMPLEMENTATION,
    Outcome.PROTOCOL,
    Outcome.TOO_LARGE,
)
# the call reached the model's code, or would never do so

_GIVEN_UP_AT_ONCE = {
    Outcome.BAD_IMPLEMENTATION: "BAD_IMPLEMENTATION",
    Outcome.REFUSED: "CONNECTION_FAILED",
}
# what no further try can cure, and what it is reported as

Watermark = tuple[int, ...]
"""Newest timestamp given, for each asset in the order of the config; 0 where none was."""


@dataclass(slots=True, eq=False)
class OpenRound:
    """A round between its time and its deadline. `asked` and `outcomes` are by `model_no`."""

    round: Round
    request: bytes
    deadline_s: float
    max_answer_bytes: int
    asked: set[int] = field(default_factory=set)
    """Who was ready when it opened, or since."""
    outcomes: dict[int, AnswerStatus] = field(default_factory=dict)
    provisional: dict[int, Reply] = field(default_factory=dict)
    """Failures of the connection: what counts unless the model comes back and answers before the deadline."""
    reached: set[int] = field(default_factory=set)
    """Whose call is under way or was: the others were busy with an earlier one, or the host was too slow."""
    refused: set[int] = field(default_factory=set)
    """Whose answer found no room to wait for the database."""
    unstored: int = 0
    """For how many there was not even room to say that."""

    @property
    def round_no(self) -> int:
        assert self.round.round_no is not None
        return self.round.round_no


@dataclass(slots=True, eq=False)
class Participant:
    """What the predict loop knows of one model, connected or not."""

    model: Model
    lane: Lane | None = None
    consecutive_failures: int = 0
    consecutive_timeouts: int = 0
    consecutive_invalid: int = 0
    counted_at_s: float = -math.inf
    """When (game's clock) its newest time-out was counted."""
    trusted: bool = True
    """Whether its silence may be our fault: it answered last time, or has not been asked yet."""
    suspected: set[int] = field(default_factory=set)
    """Times (`scheduled_at`) of the newest rounds that were void because most models were silent, it too."""
    last_error: str | None = None
    watermark: Watermark | None = None
    watermark_of: str | None = None
    """The deployment that was given those prices."""

    @property
    def failing(self) -> bool:
        """Whether it has not answered well since it last failed."""
        return bool(self.consecutive_failures or self.consecutive_timeouts or self.consecutive_invalid)


@dataclass(frozen=True, slots=True)
class Tick:
    """New points, encoded once for every model that is at the same watermark."""

    request: bytes
    watermark: Watermark


class Ticks:
    """Makes ticks out of the price book, each encoded once."""

    def __init__(self, book: PriceBook, assets: tuple[str, ...]) -> None:
        self._book = book
        self._assets = assets
        self._cache: OrderedDict[tuple[Watermark, Watermark], Tick] = OrderedDict()
        self._history: tuple[Watermark, Tick] | None = None
        self._history_lock = asyncio.Lock()

    def _newest(self, until_s: int | None) -> Watermark:
        newest = tuple(self._book.newest_s(asset) or 0 for asset in self._assets)
        return newest if until_s is None else tuple(min(ts_s, until_s) for ts_s in newest)

    def since(self, watermark: Watermark, until_s: int | None = None) -> Tick | None:
        """The points after `watermark`, up to `until_s`; None where there are none."""
        newest = self._newest(until_s)
        if all(ts_s <= given_s for ts_s, given_s in zip(newest, watermark, strict=True)):
            return None
        key = (watermark, newest)
        if (tick := self._cache.get(key)) is None:
            points = self._book.since(dict(zip(self._assets, watermark, strict=True)), max(newest))
            reached = tuple(map(max, newest, watermark))
            tick = self._cache[key] = Tick(tick_request(orjson.dumps(points)), reached)
            while len(self._cache) > _CACHED_TICKS:
                self._cache.popitem(last=False)
        return tick

    async def history(self, until_s: int | None) -> Tick:
        """The last `feed.history` up to `until_s`, encoded off the loop and shared by newcomers."""
        async with self._history_lock:
            newest = self._newest(until_s)
            if self._history is None or self._history[0] != newest:
                request = await asyncio.to_thread(_encode, self._book.history(max(newest)))
                self._history = (newest, Tick(request, newest))
            return self._history[1]


def _encode(history: Mapping[str, tuple[Times, Prices]]) -> bytes:
    """The history as a tick, its JSON made in pieces: others go on only between two of them."""
    assets = []
    for asset, (ts_s, price) in history.items():
        pieces = [
            orjson.dumps(
                list(zip(ts_s[at : at + _PIECE].tolist(), price[at : at + _PIECE].tolist(), strict=True))
            )[1:-1]
            for at in range(0, len(ts_s), _PIECE)
        ]
        assets.append(orjson.dumps(asset) + b":[" + b",".join(pieces) + b"]")
    return tick_request(b"{" + b",".join(assets) + b"}")


class HistoryGate:
    """Lets one newcomer after another have its history, a short pause apart; nobody waits for an answer.

    While others wait for their turn to be called it lets them go first, though not for ever.
    """

    def __init__(self) -> None:
        self._next_s = 0.0
        self._one_at_a_time = asyncio.Lock()

    async def turn(self, throttle: Throttle) -> None:
        loop = asyncio.get_running_loop()
        async with self._one_at_a_time:
            until_s = loop.time() + _HISTORY_YIELDS_S
            await asyncio.sleep(self._next_s - loop.time())
            while throttle.crowded and loop.time() < until_s:  # noqa: ASYNC110
                await asyncio.sleep(_HISTORY_PAUSE_S)
            self._next_s = loop.time() + _HISTORY_PAUSE_S


class _Paused(Exception):
    """No call is started any more: the host has paused the model."""


@dataclass(frozen=True, slots=True)
class Floor:
    """What all lanes share, and where they bring their results. `paused` holds `model_id`s.

    `give_up(participant, code, reason)`, and `set_up_again(participant)` for one that lost its instance or
    can't be reached.
    """

    clock: Clock
    ticks: Ticks
    open_rounds: list[OpenRound]
    paused: Container[str]
    timeout_s: float
    next_due_s: Callable[[], int]
    """The time of the next rounds: nobody is given a later price before they are open."""
    history_ready: asyncio.Event
    """Set once newcomers can be given the history: they get it once, and what comes later not at all."""
    settle: Callable[[OpenRound, Participant, Reply], None]
    set_up_again: Callable[[Participant], None]
    give_up: Callable[[Participant, str, str], None]
    waker: Waker
    throttle: Throttle = field(default_factory=lambda: Throttle(_UNDER_WAY, _UNDER_WAY_S, _STARTS_A_TURN))
    history_gate: HistoryGate = field(default_factory=HistoryGate)


class Lane:
    """One connection's lane. `since_s` is when it began, then when the model had got its history."""

    def __init__(
        self, participant: Participant, connection: Connection, floor: Floor, since_s: float
    ) -> None:
        self.participant = participant
        self.connection = connection
        self.since_s = since_s
        self.fed = False
        self.busy = False
        """Whether a call is under way, or the model still at one that timed out."""
        self._floor = floor
        self._asks: deque[OpenRound] = deque(floor.open_rounds)
        self._wake = asyncio.Event()

    @property
    def paused(self) -> bool:
        return self.connection.model_id in self._floor.paused

    @property
    def ready(self) -> bool:
        """Whether the model can be asked: it has got its history, and is not paused."""
        return self.fed and not self.paused

    def ask(self, open_round: OpenRound) -> None:
        """Put `open_round` in line."""
        self._asks.append(open_round)
        self.wake()

    def wake(self) -> None:
        """New points may be there, or the model was paused or resumed."""
        self._floor.waker.wake(self._wake)

    async def run(self) -> None:
        """Feed and ask the model until cancelled."""
        if self.participant.watermark is None:
            await self._floor.history_ready.wait()
        while True:
            self._wake.clear()
            if self.paused:
                self._asks = deque(self._floor.open_rounds)  # what it is asked should it be resumed now
                for open_round in self._asks:
                    self._not_asked(open_round)
            else:
                with contextlib.suppress(_Paused), self._floor.clock.hold():
                    await self._catch_up()
            await self._wake.wait()

    async def _catch_up(self) -> None:
        """Do all that is to be done now."""
        if self.participant.watermark is None:
            await self._feed_history()
        if not self.fed:
            self.fed, self.since_s = True, self._floor.clock.now()
        while await self._do_next():
            pass

    async def _do_next(self) -> bool:
        """Do what is next; False where there is nothing."""
        if self._asks:
            open_round = self._asks[0]
            try:
                if self._may_ask(open_round):
                    await self._ask(open_round)
            finally:
                self._asks.popleft()
            return True
        assert self.participant.watermark is not None
        if tick := self._floor.ticks.since(self.participant.watermark, self._floor.next_due_s()):
            reply = await self._tick(tick, self._floor.timeout_s)
            return reply.outcome in _HANDED_OVER
        return False

    def _left_s(self, open_round: OpenRound) -> float:
        """Wall seconds until the round's deadline."""
        left_s = self._floor.clock.wall_s(open_round.deadline_s - self._floor.clock.now())
        return min(left_s, self._floor.timeout_s)  # a clock that was set back gives nobody more time

    def _may_ask(self, open_round: OpenRound) -> bool:
        """Not twice, not after the deadline, and nobody who has seen a price later than the round's time."""
        given = self.participant.watermark
        return (
            self.participant.model.model_no not in open_round.outcomes
            and self._left_s(open_round) > 0
            and (given is None or max(given) <= open_round.round.scheduled_at_s)
        )

    async def _ask(self, open_round: OpenRound) -> None:
        """Ask, after a tick with what came before the round. Paused on the way, the model was never asked."""
        try:
            await self._ask_now(open_round)
        except _Paused:
            self._not_asked(open_round)
            raise

    def _not_asked(self, open_round: OpenRound) -> None:
        model_no = self.participant.model.model_no
        if model_no not in open_round.outcomes and model_no not in open_round.provisional:
            open_round.asked.discard(model_no)

    async def _ask_now(self, open_round: OpenRound) -> None:
        floor, participant = self._floor, self.participant
        open_round.asked.add(participant.model.model_no)
        assert participant.watermark is not None
        if tick := floor.ticks.since(participant.watermark, open_round.round.scheduled_at_s):
            reply = await self._tick(tick, self._left_s(open_round), open_round)
            if reply.outcome in (Outcome.TIMEOUT, Outcome.BUSY):
                floor.settle(open_round, participant, reply)
                return
        reply = await self._call(open_round.request, self._left_s(open_round), open_round)
        if reply.payload is not None and len(reply.payload) > open_round.max_answer_bytes:
            detail = (
                f"the answer is too large: {len(reply.payload)} bytes, at most {open_round.max_answer_bytes}"
            )
            reply = Reply(Outcome.TOO_LARGE, reply.exec_time_us, detail)
        self.connection.answered |= reply.outcome is Outcome.SUCCESS
        floor.settle(open_round, participant, reply)
        if code := _GIVEN_UP_AT_ONCE.get(reply.outcome):
            floor.give_up(participant, code, reply.detail or "")

    async def _tick(self, tick: Tick, timeout_s: float, open_round: OpenRound | None = None) -> Reply:
        """Send new points. A model that raised on them has had them; a silent one gets them again."""
        reply = await self._call(tick.request, timeout_s, open_round)
        if reply.outcome in _HANDED_OVER:
            self._hand_over(tick)
        if reply.outcome is not Outcome.SUCCESS:
            self.participant.last_error = f"tick: {reply.detail}"
        return reply

    async def _call(self, request: bytes, timeout_s: float, open_round: OpenRound | None) -> Reply:
        """Call the model, waiting in line where it is still busy with a call that timed out."""
        floor = self._floor
        loop = asyncio.get_running_loop()
        until_s = loop.time() + timeout_s
        while True:
            number = await floor.throttle.enter(last=self.participant.failing)
            if self.paused:
                floor.throttle.leave(number)
                raise _Paused
            left_s = until_s - loop.time()
            if left_s <= 0:
                floor.throttle.leave(number)
                return Reply(Outcome.TIMEOUT, int(timeout_s * 1e6), NO_TIME_LEFT)
            if open_round is not None:
                open_round.reached.add(self.participant.model.model_no)
            self.busy = True
            reply = await self.connection.ask(request, left_s)
            self.busy = reply.outcome is Outcome.BUSY
            floor.throttle.leave(number)
            if reply.outcome is Outcome.SETUP_MISSING:
                floor.set_up_again(self.participant)
            if reply.outcome is not Outcome.BUSY:
                return reply
            if open_round is not None:
                open_round.reached.discard(self.participant.model.model_no)
            if until_s - loop.time() <= _BUSY_PAUSE_S:
                return reply
            await asyncio.sleep(_BUSY_PAUSE_S)

    async def _feed_history(self) -> None:
        """Give a new instance the past, in one tick that counts against nobody."""
        floor, participant = self._floor, self.participant
        for _ in range(_HISTORY_TRIES):
            await floor.history_gate.turn(floor.throttle)
            # Who will be asked in an open round must not know more than the others did.
            until_s = min(
                (open_round.round.scheduled_at_s for open_round in floor.open_rounds),
                default=floor.next_due_s(),
            )
            tick = await floor.ticks.history(until_s)
            reply = await self._call(tick.request, HISTORY_TIMEOUT_S, None)
            if reply.outcome is not Outcome.SUCCESS:
                participant.last_error = f"history: {reply.detail}"
            if reply.outcome in _HANDED_OVER:
                self._hand_over(tick)
                return
            if code := _GIVEN_UP_AT_ONCE.get(reply.outcome):
                floor.give_up(participant, code, reply.detail or "")
                break
            if reply.outcome not in (Outcome.TIMEOUT, Outcome.BUSY):
                floor.set_up_again(participant)
                break
        else:
            floor.give_up(participant, "MULTIPLE_TIMEOUT", "did not take its price history")
        await asyncio.Event().wait()  # until the fleet ends this connection

    def _hand_over(self, tick: Tick) -> None:
        self.participant.watermark = tick.watermark
        self.participant.watermark_of = self.connection.deployment_id
