"""The orchestrator's side of the WebSocket, and what can go wrong on it."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from typing import Any

import websockets

from tests.fleet.model import PORT_LIMIT_S, ModelServer


class Orchestrator:
    """Announces models, and keeps what is reported to it.

    `first` is sent in place of the proper `init`; `die_in_init` closes the connection in the middle of it.
    """

    def __init__(self) -> None:
        self.entries: dict[str, dict[str, Any]] = {}
        self.reports: list[dict[str, Any]] = []
        self.port = 0
        self.connections = 0
        self.first: str | bytes | None = None
        self.die_in_init = False
        self._clients: set[websockets.ServerConnection] = set()
        self._server: websockets.Server | None = None

    async def start(self) -> None:
        async with asyncio.timeout(PORT_LIMIT_S):
            while self._server is None:
                try:
                    self._server = await websockets.serve(self._serve, "127.0.0.1", self.port)
                except OSError:  # somebody's own end of a connection was given the port meanwhile
                    await asyncio.sleep(0.1)
        self.port = next(iter(self._server.sockets)).getsockname()[1]

    async def stop(self) -> None:
        if self._server is not None:
            server, self._server = self._server, None
            server.close()
            await server.wait_closed()

    async def _serve(self, client: websockets.ServerConnection) -> None:
        self.connections += 1
        init = json.dumps({"event": "init", "data": list(self.entries.values())})
        try:
            if self.die_in_init:
                await client.send(_pieces(init))
                return
            self._clients.add(client)
            await client.send(init if self.first is None else self.first)
            async for message in client:
                self.reports.extend(json.loads(message)["data"])
        except (websockets.ConnectionClosed, _Death):
            client.transport.abort()
        finally:
            self._clients.discard(client)

    async def send(self, message: str | bytes) -> None:
        for client in list(self._clients):
            with suppress(websockets.ConnectionClosed):  # who comes back is told in `init`
                await client.send(message)

    async def announce(self, *models: ModelServer, state: str = "RUNNING") -> None:
        """Tell everybody connected, and whoever connects later, that these models are in `state`."""
        await self.say([model.entry(state) for model in models])

    async def say(self, entries: list[dict[str, Any]]) -> None:
        """The same with entries that a test or another process made."""
        for entry in entries:
            if entry["state"] == "RUNNING":
                self.entries[entry["model_id"]] = entry
            else:
                self.entries.pop(entry["model_id"], None)
        await self.send(json.dumps({"event": "update", "data": entries}))


class _Death(Exception):
    """The orchestrator ends while it sends."""


async def _pieces(message: str) -> Any:
    yield message[: len(message) // 2]
    await asyncio.sleep(0)
    raise _Death
