"""One client's connection: uvicorn's, with bounds on what a client may send, and on its slowness.

What breaks a bound is told so in JSON where it may still be listening, and cut off.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from ipaddress import IPv6Address, ip_address
from typing import Any

import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from condor_lite.report.answers import Failure
from condor_lite.report.sending import CUT_OFF

SECURITY_HEADERS: Mapping[str, str] = {
    "content-security-policy": (
        # plotly's bundle sets styles inline; no script is.
        "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
        "connect-src 'self'; font-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
}
"""What a browser must not do with an answer. uvicorn puts them into each, its own included."""

MOST_CONNECTIONS = 512
"""A newcomer beyond them takes the place of one of the address that has most of them."""
MOST_HEAD_BYTES = 16 * 1024
MOST_BODY_BYTES = 16 * 1024
REQUEST_WITHIN_S = 10.0
"""From the connection, or the last answer, to a request's first byte, and from there to the end of its
headers.
"""
STALLED_AFTER_S = 30.0
"""A client that takes nothing of its answer for so long is cut off."""
BEHIND_FOR_S = 600.0
"""A client for whom something was waiting all this time is cut off, too: it takes a byte now and then."""

_MOST_HEADERS = 100
_MOST_PIPELINED = 8


class _Refused(Exception):
    """A request that is not even given to the application."""

    def __init__(self, status: HTTPStatus, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail


class Connection(HttpToolsProtocol):
    """`address`: the client's, or its proxy's. `waiting_since_s`: since when it has waited for a request, or
    for the rest of it (loop time).
    """

    connections: set[Connection]  # type: ignore[assignment]

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.address: object = None
        self.waiting_since_s = self.loop.time()
        self._head_bytes = 0
        self._in_head = True
        self._refused: _Refused | None = None
        self._left = 0
        self._moved = False
        self._moved_at_s = 0.0
        self._behind_since_s = 0.0

    @property
    def is_waiting(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def check(self, now_s: float) -> None:
        """Cut the client off if it is too slow."""
        before, self._left = self._left, self.transport.get_write_buffer_size()
        if self._left:
            if not before:
                self._behind_since_s = now_s
            if not before or self._left < before or self._moved:
                self._moved_at_s = now_s
            stalled = now_s - self._moved_at_s > STALLED_AFTER_S
            if stalled or now_s - self._behind_since_s > BEHIND_FOR_S:
                self.transport.abort()
            self._moved = False
        elif self.is_waiting and now_s - self.waiting_since_s > REQUEST_WITHIN_S:
            self.transport.abort()

    # As asyncio and httptools call it.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.address = network(self.client[0]) if self.client else None
        if len(self.connections) > MOST_CONNECTIONS:
            self._make_room()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._in_head and not self.transport.is_closing():
            self._head_bytes += len(data)
            if self._head_bytes > MOST_HEAD_BYTES:
                self._refuse(_too_much_head())

    def resume_writing(self) -> None:
        self._moved = True
        super().resume_writing()

    def on_message_begin(self) -> None:
        if len(self.pipeline) >= _MOST_PIPELINED:
            self._refused = _Refused(
                HTTPStatus.TOO_MANY_REQUESTS, f"wait for answers: at most {_MOST_PIPELINED} may be ahead"
            )
            raise self._refused
        self._head_bytes, self._in_head = 0, True
        self.waiting_since_s = self.loop.time()
        super().on_message_begin()
        self.scope["extensions"] = {CUT_OFF: {"call": self.transport.abort}}

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        name = name.lower()
        if name == b"transfer-encoding" or (
            name == b"content-length" and (len(value) > 10 or int(value) > MOST_BODY_BYTES)
        ):
            self._refused = _Refused(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "nothing here is changed over HTTP: send no body"
            )
            raise self._refused

    def on_headers_complete(self) -> None:
        sizes = sum(len(name) + len(value) + 4 for name, value in self.headers)
        if sizes + len(self.url) > MOST_HEAD_BYTES or len(self.headers) > _MOST_HEADERS:
            self._refused = _too_much_head()
            raise self._refused
        self._in_head = False
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        self.waiting_since_s = self.loop.time()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(self._refused or _Refused(HTTPStatus.BAD_REQUEST, "this is no valid HTTP request"))

    def _refuse(self, refused: _Refused) -> None:
        status = refused.status
        body = orjson.dumps(Failure(status.phrase.lower(), refused.detail))
        headers = (
            *self.server_state.default_headers,
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"cache-control", b"no-store"),
            (b"connection", b"close"),
        )
        lines = [b"HTTP/1.1 %d %s" % (status, status.phrase.encode()), *map(b": ".join, headers), b"", body]
        self.transport.write(b"\r\n".join(lines))
        self.transport.close()

    def _make_room(self) -> None:
        """Close a connection of the address that has most of them: this one, where all others have something
        to do, and are of the same address.
        """
        counts = Counter(other.address for other in self.connections)
        most = max(counts.values())
        crowd = [one for one in self.connections if counts[one.address] == most and one is not self]
        longest = min(crowd, key=Connection._place, default=self)
        if longest.is_idle or counts[self.address] < most:
            longest.transport.abort()
        else:
            busy = f"{MOST_CONNECTIONS} clients are being answered: try again in a few seconds"
            self._refuse(_Refused(HTTPStatus.SERVICE_UNAVAILABLE, busy))

    @property
    def is_idle(self) -> bool:
        """Whether it waits for a request, or takes its answer slowly."""
        return self.is_waiting or self._left > 0

    def _place(self) -> tuple[bool, bool, float]:
        """Who is least, goes first."""
        since_s = self.waiting_since_s if self.is_waiting or not self._left else self._behind_since_s
        return not self.is_idle, not self.is_waiting, since_s


def check(connections: Iterable[Connection], now_s: float) -> None:
    """Cut off all clients that are too slow."""
    for connection in tuple(connections):
        connection.check(now_s)


def network(host: str) -> object:
    """What one client may have as many addresses of as it likes: of IPv6 the first 64 bits."""
    address = ip_address(host.partition("%")[0])
    if isinstance(address, IPv6Address):
        return address.ipv4_mapped or int(address) >> 64
    return address


def _too_much_head() -> _Refused:
    return _Refused(
        HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
        f"the address and the headers may have {MOST_HEAD_BYTES} bytes and {_MOST_HEADERS} lines",
    )
