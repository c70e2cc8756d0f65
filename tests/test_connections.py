"""What a client may send and how slowly: over real sockets against the report's own server."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import anyio
import orjson
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from condor_lite.report import connections, server
from condor_lite.report.connections import SECURITY_HEADERS
from condor_lite.report.replies import Reply, respond
from condor_lite.report.sending import Sending
from tests.program import LIMIT_S
from tests.stage import until

pytestmark = pytest.mark.anyio

LARGE = b"x" * 20_000_000
ASK = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


@dataclass
class Large:
    """Makes its body anew for each client."""

    sending: Sending

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = Reply(LARGE, None, b"", 200, ())
        with self.sending.one(reply, scope):
            await respond(scope, send, reply)


@pytest.fixture
def sending() -> Sending:
    """With room for three large bodies."""
    return Sending(3 * len(LARGE))


@pytest.fixture
async def served(sending: Sending, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[server.Server]:
    """A server of three addresses: a short answer, a large one, and one that never comes.

    It is a thousand times as patient as it should be, and the test's own checks are all there are: no machine
    is so slow that this decides a test.
    """
    monkeypatch.setattr(server, "_CHECK_EVERY_S", 1e6)
    for name in ("REQUEST_WITHIN_S", "STALLED_AFTER_S", "BEHIND_FOR_S"):
        monkeypatch.setattr(connections, name, 1000 * getattr(connections, name))
    monkeypatch.setattr(server, "REQUEST_WITHIN_S", connections.REQUEST_WITHIN_S)

    async def short(request: Request) -> Response:
        return PlainTextResponse("here")

    async def never(request: Request) -> Response:
        await asyncio.Event().wait()
        raise AssertionError

    app = Starlette(routes=[Route("/", short), Route("/large", Large(sending)), Route("/never", never)])
    made = server.Server(app, server.bind("127.0.0.1", 0))
    async with anyio.create_task_group() as tasks:
        await tasks.start(made.run)
        yield made
        tasks.cancel_scope.cancel()


class Client:
    """A bare connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        async with asyncio.timeout(LIMIT_S):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = dict(line.split(": ", 1) for line in head[1:] if line)
            body = await self.reader.readexactly(int(headers["content-length"]))
        return int(head[0].split()[1]), headers, body

    async def refusal(self) -> tuple[int, str]:
        """The status and the detail of an error that ends the connection."""
        status, headers, body = await self.answer()
        assert headers.items() >= SECURITY_HEADERS.items()
        assert headers["content-type"] == "application/json"
        assert await self.ended()
        said = orjson.loads(body)
        assert set(said) == {"error", "detail"}
        return status, said["detail"]

    async def ended(self) -> bool:
        async with asyncio.timeout(LIMIT_S):
            try:
                return await self.reader.read() == b""
            except ConnectionError:
                return True


Connect = Callable[..., Awaitable[Client]]


@pytest.fixture
async def connect(served: server.Server) -> AsyncIterator[Connect]:
    """Opens connections with little room for what has not been read, closed with the test."""
    clients: list[Client] = []

    async def open_one(address: str = "127.0.0.1") -> Client:
        sock = socket.socket()
        sock.bind((address, 0))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", served.port))
        clients.append(Client(*await asyncio.open_connection(sock=sock)))
        return clients[-1]

    yield open_one
    for client in clients:
        client.writer.transport.abort()


async def check(made: server.Server, after_s: float) -> None:
    """As the server does each second, at a later time."""
    connections.check(made.connections, asyncio.get_running_loop().time() + after_s)


async def test_an_address_and_headers_too_large_are_refused(connect: Connect) -> None:
    for request in (
        b"GET /" + b"a" * 17_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nCookie: " + b"a" * 17_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n" + b"a: b\r\n" * 101 + b"\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nNeverEnding: " + b"a" * 17_000,
    ):
        client = await connect()
        client.send(request)
        status, detail = await client.refusal()
        assert status == 431
        assert "16384 bytes" in detail


async def test_an_address_of_a_thousand_ids_is_not_too_large(connect: Connect) -> None:
    client = await connect()
    client.send(b"GET /?projectIds=" + b"%2C".join([b"123456"] * 1000) + b" HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (await client.answer())[0] == 200


@pytest.mark.parametrize("sized", [b"Content-Length: 20000", b"Transfer-Encoding: chunked"])
async def test_a_body_is_not_waited_for(connect: Connect, sized: bytes) -> None:
    client = await connect()
    client.send(b"POST / HTTP/1.1\r\nHost: x\r\n" + sized + b"\r\n\r\n")
    assert await client.refusal() == (413, "nothing here is changed over HTTP: send no body")


async def test_what_is_no_http_is_refused(connect: Connect) -> None:
    client = await connect()
    client.send(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")  # TLS
    assert (await client.refusal())[0] == 400


async def test_requests_that_do_not_wait_for_answers_are_bounded(connect: Connect) -> None:
    few, many = await connect(), await connect()
    few.send(ASK * 8)
    many.send(b"GET /never HTTP/1.1\r\nHost: x\r\n\r\n" + ASK * 1000)

    assert [(await few.answer())[0] for _ in range(8)] == [200] * 8
    assert (await many.refusal())[0] == 429


async def test_a_client_that_sends_a_byte_at_a_time_is_cut_off(
    served: server.Server, connect: Connect
) -> None:
    silent, dribbling, returning = [await connect() for _ in range(3)]
    returning.send(ASK)
    await returning.answer()
    busy = await connect()
    busy.send(b"GET /never HTTP/1.1\r\nHost: x\r\n\r\n")
    for byte in ASK[:-2]:
        dribbling.send(bytes([byte]))
        await dribbling.writer.drain()
    returning.send(ASK[:10])
    await until(lambda: sum(not connection.is_waiting for connection in served.connections) == 1)

    await check(served, 9_000)
    assert len(served.connections) == 4
    await check(served, 11_000)

    assert await silent.ended()
    assert await dribbling.ended()
    assert await returning.ended()
    assert len(served.connections) == 1


async def test_a_client_that_never_reads_its_answer_is_cut_off(
    served: server.Server, connect: Connect
) -> None:
    client = await connect()
    client.writer.transport.pause_reading()  # type: ignore[attr-defined]
    client.send(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
    await until(lambda: behind(served) == 1)

    for later_s in (0, 29_000):
        await check(served, later_s)
        assert len(served.connections) == 1
    for later_s in (60_000, 91_000):  # until then the system itself may have taken something
        await check(served, later_s)
    await until(lambda: not served.connections)


async def test_a_client_that_reads_slowly_gets_all_of_its_answer(
    served: server.Server, connect: Connect
) -> None:
    client = await connect()
    client.send(b"GET /large HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    head = await client.reader.readuntil(b"\r\n\r\n")
    for megabytes in range(20):
        await client.reader.readexactly(1_000_000)
        await check(served, 20_000 * megabytes)

    assert b"200 OK" in head
    assert await client.ended()


async def test_a_client_that_takes_a_byte_now_and_then_is_cut_off_in_the_end(
    served: server.Server, connect: Connect
) -> None:
    client = await connect()
    client.send(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
    await client.reader.readuntil(b"\r\n\r\n")
    for later_s in range(0, 600_000, 20_000):
        await client.reader.readexactly(500_000)
        await until(lambda: behind(served) == 1)
        await check(served, later_s)
    assert len(served.connections) == 1

    await check(served, 601_000)
    await until(lambda: not served.connections)


async def test_those_who_never_read_cost_little_memory_and_no_one_else_an_answer(
    served: server.Server, connect: Connect, sending: Sending
) -> None:
    lazy = [await connect() for _ in range(5)]
    await until(lambda: len(served.connections) == 5)
    for client in lazy:
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        client.send(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
        await until(lambda: sending.held_bytes > 0)
    await until(lambda: len(served.connections) == 3 and sending.held_bytes == 3 * len(LARGE))
    unsent = sum(connection.transport.get_write_buffer_size() for connection in served.connections)
    assert unsent < 3 * 1_000_000

    reading = await connect()
    reading.send(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
    status, _, body = await reading.answer()
    assert (status, len(body)) == (200, len(LARGE))
    assert len(served.connections) == 3  # the first of the lazy had to go
    for client in lazy:
        client.writer.transport.abort()
    await until(lambda: sending.held_bytes == 0)


async def test_a_body_that_many_get_is_held_once(served: server.Server) -> None:
    sending, reply = Sending(10 * len(LARGE)), Reply(LARGE, b"zip", b"", 200, ())
    with sending.one(reply, {}), sending.one(reply, {}):
        assert sending.held_bytes == len(LARGE) + 3
    assert sending.held_bytes == 0


async def test_a_newcomer_takes_the_place_of_who_waits_longest(
    served: server.Server, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "MOST_CONNECTIONS", 3)
    busy, waiting, other = [await connect() for _ in range(3)]
    busy.send(b"GET /never HTTP/1.1\r\nHost: x\r\n\r\n")
    await until(lambda: not all(connection.is_waiting for connection in served.connections))
    for client in (waiting, other):
        client.send(ASK)
        assert (await client.answer())[0] == 200

    newcomer = await connect()
    newcomer.send(ASK)

    assert (await newcomer.answer())[0] == 200
    assert await waiting.ended()
    for client in (other, newcomer):
        client.send(b"GET /never HTTP/1.1\r\nHost: x\r\n\r\n")
    await until(lambda: not any(connection.is_waiting for connection in served.connections))
    refused = await connect()
    assert (await refused.refusal())[0] == 503


async def test_slow_readers_make_room_for_a_newcomer(
    served: server.Server, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "MOST_CONNECTIONS", 3)
    for number in range(1, 4):
        client = await connect()
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        client.send(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
        await until(lambda number=number: behind(served) == number)  # type: ignore[misc]
        await check(served, number)
        if number == 1:
            (slowest,) = served.connections

    honest = await connect()
    honest.send(ASK)

    assert (await honest.answer())[0] == 200
    assert len(served.connections) == 3
    assert slowest not in served.connections


async def test_the_address_with_most_connections_makes_room_for_another(
    served: server.Server, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "MOST_CONNECTIONS", 4)
    other = await connect("127.0.0.3")
    other.send(ASK)
    assert (await other.answer())[0] == 200
    crowd = [await connect() for _ in range(3)]
    for client in crowd:
        client.send(b"GET /never HTTP/1.1\r\nHost: x\r\n\r\n")
    await until(lambda: sum(not one.is_waiting for one in served.connections) == 3)

    assert (await (await connect()).refusal())[0] == 503  # one more of the crowd
    honest = await connect("127.0.0.2")
    honest.send(ASK)

    assert (await honest.answer())[0] == 200
    assert await crowd[0].ended()
    other.send(ASK)
    assert (await other.answer())[0] == 200


async def test_a_network_of_ipv6_counts_as_one_address() -> None:
    network = connections.network
    assert network("2001:db8::1") == network("2001:db8:0:0:ffff::2") != network("2001:db8:0:1::1")
    assert network("::ffff:10.0.0.1") == network("10.0.0.1") != network("10.0.0.2")
    assert network("fe80::1%eth0") == network("fe80::1")


def behind(made: server.Server) -> int:
    """How many are sent something that they do not take."""
    return sum(bool(one.transport.get_write_buffer_size()) for one in made.connections)


async def test_without_descriptors_visitors_wait_and_it_is_said_a_few_times(served: server.Server) -> None:
    told: list[dict[str, object]] = []
    visitors = [socket.create_connection(("127.0.0.1", served.port), 30) for _ in range(2)]
    late = [socket.socket() for _ in range(50)]
    await until(lambda: len(served.connections) == len(visitors))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    loop = asyncio.get_running_loop()
    handler = loop.get_exception_handler()
    loop.set_exception_handler(lambda _, what: told.append(what))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
        for visitor in late:
            visitor.settimeout(30)
            visitor.connect(("127.0.0.1", served.port))
        await until(lambda: told)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        loop.set_exception_handler(handler)
    assert len(told) < 100
    await until(lambda: len(served.connections) == len(visitors) + len(late))
    for visitor in (*visitors, *late):
        visitor.close()
