"""A lean HTTP client that asks without a pause, in a process of its own: `asking(...)` starts and ends it.

Each connection asks for the next target as soon as it has an answer; readers of /events only read. A target
is an address, or what is accepted and the address: "text/html /rounds". Nothing is decoded, so that a server
on the same cores has what it can of them.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import cycle, takewhile
from pathlib import Path

import orjson

_LAST_WITHIN_S = 15.0
_ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Asked:
    """What became of it. `answered` within `seconds`; `latencies_s` by target without its query, also of what
    was answered after that; `failed`: by what was wrong.
    """

    seconds: float = 0.0
    answered: int = 0
    bytes: int = 0
    event_bytes: int = 0
    failed: dict[str, int] = field(default_factory=dict)
    latencies_s: dict[str, list[float]] = field(default_factory=dict)

    @property
    def a_second(self) -> float:
        return self.answered / self.seconds

    @property
    def all_s(self) -> list[float]:
        return [latency_s for some in self.latencies_s.values() for latency_s in some]


@asynccontextmanager
async def asking(
    port: int, connections: int, targets: Sequence[str], *, readers: int = 0, zipped: bool = False
) -> AsyncIterator[Asked]:
    """Ask 127.0.0.1 within; the figures are there afterwards. All connections are open when it begins, and
    have their last answers when it ends.
    """
    asked = Asked()
    how = {"port": port, "connections": connections, "targets": targets, "readers": readers, "zipped": zipped}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks._client", orjson.dumps(how).decode()),
        cwd=_ROOT,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        await process.stdout.readline()
        yield asked
        process.terminate()
        figures, _ = await process.communicate()
        for name, value in orjson.loads(figures).items():
            setattr(asked, name, value)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


class _Connection(asyncio.Protocol):
    def __init__(self, asked: Asked, targets: Iterator[tuple[str, bytes]]) -> None:
        self.done = asyncio.Event()
        self._asked = asked
        self._targets = targets
        self._path = ""
        self._since_s = 0.0
        self._head = b""
        self._left = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._ask()

    def data_received(self, data: bytes) -> None:
        self._asked.bytes += len(data)
        if not self._left:
            self._head += data
            end = self._head.find(b"\r\n\r\n")
            if end < 0:
                return
            head, data, self._head = self._head[:end].lower(), self._head[end + 4 :], b""
            if not head.startswith(b"http/1.1 200"):
                self._fail(head[9:12].decode())
            at = head.index(b"content-length:") + 15
            self._left = int(head[at : (head.find(b"\r", at) + 1 or len(head) + 1) - 1])
        self._left -= len(data)
        if not self._left:
            self._asked.answered += 1
            self._asked.latencies_s[self._path].append(time.perf_counter() - self._since_s)
            self._ask()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.is_set():
            self.done.set()
            self._fail("connection lost")

    def _ask(self) -> None:
        if (target := next(self._targets, None)) is None:
            self._transport.abort()
            self.done.set()
            return
        self._path, request = target
        self._since_s = time.perf_counter()
        self._transport.write(request)

    def _fail(self, what: str) -> None:
        self._asked.failed[what] = self._asked.failed.get(what, 0) + 1


class _Reader(asyncio.Protocol):
    def __init__(self, asked: Asked, request: bytes) -> None:
        self._asked = asked
        self._request = request

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._asked.event_bytes += len(data)


async def _run(port: int, connections: int, targets: list[str], readers: int, zipped: bool) -> None:
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, ended.set)
    asked = Asked(latencies_s=defaultdict(list))
    coding = "Accept-Encoding: gzip\r\n" if zipped else ""

    def request(target: str) -> bytes:
        kind, _, address = target.rpartition(" ")
        return (
            f"GET {address} HTTP/1.1\r\nHost: localhost\r\nAccept: {kind or '*/*'}\r\n{coding}\r\n".encode()
        )

    endless = cycle([(target.partition("?")[0], request(target)) for target in targets])
    requests = takewhile(lambda _: not ended.is_set(), endless)
    for _ in range(readers):
        await loop.create_connection(lambda: _Reader(asked, request("/events")), "127.0.0.1", port)
    asking = [
        (await loop.create_connection(lambda: _Connection(asked, requests), "127.0.0.1", port))[1]
        for _ in range(connections)
    ]
    print("asking", flush=True)
    asked.answered, started_s = 0, time.perf_counter()
    asked.latencies_s.clear()
    await ended.wait()
    asked.seconds, answered = time.perf_counter() - started_s, asked.answered
    # Else the server would still be at it when someone else is measured.
    await asyncio.wait_for(asyncio.gather(*(one.done.wait() for one in asking)), _LAST_WITHIN_S)
    asked.answered = answered
    print(orjson.dumps(asked).decode())


if __name__ == "__main__":
    asyncio.run(_run(**orjson.loads(sys.argv[1])))
