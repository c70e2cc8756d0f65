"""One stream of server-sent events with many readers (WHATWG HTML, "Server-sent events").

An event is encoded once and kept for a while. A reader is nothing but its place among the kept events: who is
too slow, or was away for too long, finds its place gone, is told to `reset`, and goes on with what is new.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections import Counter, deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from itertools import islice

import orjson
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from condor_lite.errors import CondorError

EVENT_STREAM = "text/event-stream"
MOST_READERS = 200
RESET = "reset"

_KEPT = 1000
_AT_ONCE = 100
_GATHER_S = 0.05  # what happens together is sent together, and not in the moment in which models are asked
_HEARTBEAT_S = 15.0
_RETRY_MS = 3000
_WAKES_A_TURN = 8  # of the event loop
_HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}


@dataclass(frozen=True, slots=True)
class Subscription:
    """What a client asks for: all that came after this event; None: all that happens from now on."""

    last_event_id: str | None


class TooManyReaders(CondorError):
    def __init__(self, most: int) -> None:
        super().__init__(f"{most} event streams are open, which is the most: close one, or try again later")


class _Reader:
    """`place`: the number of the event that it is sent next; `address`: whose it is."""

    def __init__(self, place: int, address: object) -> None:
        self.place = place
        self.address = address
        self.news = asyncio.Event()
        self.ended = False

    def end(self) -> None:
        self.ended = True
        self.news.set()


class Stream:
    """All readers see the same events. To be used on the event loop only."""

    def __init__(self, *, most: int = MOST_READERS, heartbeat_s: float = _HEARTBEAT_S) -> None:
        self._most = most
        self._heartbeat_s = heartbeat_s
        self._boot = secrets.token_hex(4)
        self._newest = 0
        self._woken_for = 0
        self._kept: deque[bytes] = deque(maxlen=_KEPT)
        self._readers: dict[_Reader, None] = {}
        """The oldest first."""
        self._waking: asyncio.Handle | None = None

    @property
    def readers(self) -> int:
        """How many there are."""
        return len(self._readers)

    @property
    def newest(self) -> str:
        """The id of the newest event: what is read from now on holds all that came up to it."""
        return self._id(self._newest).decode()

    def publish(self, event: str, data: object) -> None:
        """Give every reader this event, soon. `data`: what orjson takes."""
        self._newest += 1
        self._kept.append(self._event(event, orjson.dumps(data)))
        self._plan()

    def reset(self) -> None:
        """Have all readers read everything anew: too much happened for a stream."""
        self._kept.clear()
        self.publish(RESET, {})

    def open(self, asked: Subscription, address: object = None) -> EventStream:
        """The response to someone at this address.

        Where there are too many, it takes the place of the oldest one of the address that has most of them,
        unless this one would have more then than that. Raises TooManyReaders.
        """
        if len(self._readers) >= self._most:
            self._make_room(address)
        reader = _Reader(self._place_after(asked.last_event_id), address)
        self._readers[reader] = None
        return EventStream(self, reader)

    def end(self) -> None:
        """End all responses in good order. A later one is a reader again."""
        for reader in self._readers:
            reader.end()

    def leave(self, reader: _Reader) -> None:
        self._readers.pop(reader, None)

    async def read(self, reader: _Reader) -> AsyncIterator[bytes]:
        """What is to be sent to `reader`, for as long as it is there."""
        yield b"retry: %d\nid: %s\n\n" % (_RETRY_MS, self._id(max(reader.place - 1, 0)))
        while not reader.ended:
            reader.news.clear()
            if text := self._next(reader):
                yield text
                continue
            try:
                async with asyncio.timeout(self._heartbeat_s):
                    await reader.news.wait()
            except TimeoutError:
                yield b":\n\n"

    def _make_room(self, address: object) -> None:
        counts = Counter(reader.address for reader in self._readers)
        crowd, most = counts.most_common(1)[0]
        if counts[address] + 1 >= most:  # or two would take turns with one place
            raise TooManyReaders(self._most)
        oldest = next(reader for reader in self._readers if reader.address == crowd)
        oldest.end()
        self.leave(oldest)

    def _place_after(self, last_event_id: str | None) -> int:
        if last_event_id is None:
            return self._newest + 1
        found = re.fullmatch(rf"{self._boot}-([0-9]{{1,15}})", last_event_id)
        if found is None or int(found[1]) > self._newest:
            return 0  # never kept
        return int(found[1]) + 1

    def _next(self, reader: _Reader) -> bytes:
        oldest = self._newest - len(self._kept) + 1
        if reader.place < oldest:
            reader.place = self._newest + 1
            return self._event(RESET, b"{}")
        start = reader.place - oldest
        texts = list(islice(self._kept, start, start + _AT_ONCE))
        reader.place += len(texts)
        return b"".join(texts)

    def _plan(self) -> None:
        """Wake the readers soon, where there is news."""
        if self._readers and self._waking is None and self._woken_for < self._newest:
            self._waking = asyncio.get_running_loop().call_later(_GATHER_S, self._wake_all)

    def _wake_all(self) -> None:
        self._woken_for = self._newest
        self._wake(deque(self._readers))

    def _wake(self, waiting: deque[_Reader]) -> None:
        """Have the readers send what is new, a few in each turn of the event loop."""
        for _ in range(min(_WAKES_A_TURN, len(waiting))):
            waiting.popleft().news.set()
        if waiting:
            self._waking = asyncio.get_running_loop().call_soon(self._wake, waiting)
        else:
            self._waking = None
            self._plan()

    def _event(self, event: str, data: bytes) -> bytes:
        return b"id: %s\nevent: %s\ndata: %s\n\n" % (self._id(self._newest), event.encode(), data)

    def _id(self, number: int) -> bytes:
        return f"{self._boot}-{number}".encode()


class EventStream(StreamingResponse):
    """One reader's response, which ends when the reader leaves, or with the stream."""

    def __init__(self, stream: Stream, reader: _Reader) -> None:
        super().__init__(stream.read(reader), headers=_HEADERS, media_type=EVENT_STREAM)
        self._stream = stream
        self._reader = reader

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._reader.ended = scope["method"] == "HEAD"
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._stream.leave(self._reader)
