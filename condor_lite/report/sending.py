"""How much is held in memory for clients that have not taken their answers yet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from starlette.types import Scope

from condor_lite.report.replies import Reply

CUT_OFF = "condor.cut_off"
"""The extension of a request's scope whose `call` ends the connection at once."""

MOST_BYTES = 64 * 1024 * 1024
_SMALL_BYTES = 128 * 1024  # the system's own buffer takes it


class Sending:
    """The large bodies that are being sent. A body that many clients get counts once.

    Where they are too many bytes, the client that has been at its own for the longest is cut off: who reads
    as fast as others is done long before that.
    """

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self.held_bytes = 0
        self._most_bytes = most_bytes
        self._under_way: dict[object, tuple[Reply, Scope]] = {}
        self._clients: dict[int, int] = {}
        """How many are sent this body, by its id."""

    @contextmanager
    def one(self, reply: Reply, scope: Scope) -> Iterator[None]:
        """While `reply` is sent to this client."""
        if len(reply.body) <= _SMALL_BYTES:
            yield
            return
        ticket = object()
        self._under_way[ticket] = reply, scope
        clients = self._clients.get(id(reply), 0)
        self._clients[id(reply)] = clients + 1
        self.held_bytes += 0 if clients else _size(reply)
        while self.held_bytes > self._most_bytes and len(self._under_way) > 1:
            self._cut_off(next(iter(self._under_way)))
        try:
            yield
        finally:
            self._leave(ticket)

    def _cut_off(self, ticket: object) -> None:
        _, scope = self._under_way[ticket]
        self._leave(ticket)
        scope["extensions"][CUT_OFF]["call"]()

    def _leave(self, ticket: object) -> None:
        if (left := self._under_way.pop(ticket, None)) is None:
            return  # it was cut off
        reply, _ = left
        clients = self._clients.pop(id(reply)) - 1
        if clients:
            self._clients[id(reply)] = clients
        else:
            self.held_bytes -= _size(reply)


def _size(reply: Reply) -> int:
    return len(reply.body) + len(reply.zipped or b"")
