"""The fleet: every model that the orchestrator announces, each connected and served in a task of its own.

The orchestrator's WebSocket, the connections, the credentials and Setup are the client library's. Who is to
be connected is decided here, a deployment at a time, because the library handles one update after another,
waits for each Setup, and forgets what it can't reach (PROTOCOL.md).
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import anyio
import structlog
import websockets
from anyio.abc import TaskGroup
from model_runner_client.model_runners import DynamicSubclassModelRunner
from model_runner_client.websocket_client import WebsocketClient

from condor_lite.config import Config
from condor_lite.game.answer import ENVELOPE_BYTES
from condor_lite.game.entities import ModelInfo
from condor_lite.models import security
from condor_lite.models.runner import MAX_NAME_CHARS, Connection, first_line
from condor_lite.news import ModelGivenUp, Tell, ignore
from condor_lite.pacer import Pacer

log = structlog.get_logger()

_RECONNECT_S = 1.0
_TOLD_ANEW_S = 60.0  # how soon after another message that can't be read the list is asked for again
_MAX_EVENT_BYTES = 32 * 2**20  # an `init` of 1,000 models takes about 250 kB
_CONNECTS_A_TURN = 1
_MOST_SETUPS = 6  # in a row, without a good answer in a round
_LASTS_S = 60.0  # a connection without a round in that time is as good as one with a good answer
_SETUP_PAUSE_S = 1.0  # before the third, doubled with each: the second follows at once
_HELD_OFF_S = 60.0  # how long the same deployment is not tried again after it was refused
_MAX_REFUSED = 10_000

_FAILURES = {
    DynamicSubclassModelRunner.ErrorType.BAD_IMPLEMENTATION: "BAD_IMPLEMENTATION",
    DynamicSubclassModelRunner.ErrorType.GRPC_CONNECTION_FAILED: "CONNECTION_FAILED",
    DynamicSubclassModelRunner.ErrorType.AUTH_ERROR: "CONNECTION_FAILED",
}


class _WebSocket(WebsocketClient):
    """The library's client with a larger message limit; `Fleet` does the listening."""

    def __del__(self) -> None:  # the library's registers an exit handler that fails without a loop
        pass

    async def connect(self) -> None:
        uri = f"ws://{self.host}:{self.port}/{self.crunch_id}"
        self.websocket = await websockets.connect(uri, max_size=_MAX_EVENT_BYTES, open_timeout=10)

    @property
    def connected(self) -> bool:
        return self.websocket is not None and self.websocket.state is websockets.State.OPEN


@dataclass(frozen=True, slots=True)
class Refused:
    """A model that could not be connected or was given up, and why; `since_s` is on the wall."""

    info: ModelInfo
    since_s: float
    reason: str


@dataclass(slots=True, eq=False)
class _Berth:
    """One deployment that is announced as running; a later announcement has a higher `order`."""

    entry: dict[str, Any]
    order: int
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    session: anyio.CancelScope | None = None
    connection: Connection | None = None

    @property
    def model_id(self) -> str:
        return str(self.entry["model_id"])

    @property
    def deployment_id(self) -> str:
        return str(self.entry["deployment_id"])

    @property
    def address(self) -> tuple[str, int]:
        return self.entry["ip"], self.entry["port"]


class Fleet:
    """Connects to the orchestrator and keeps `running` true to what it announces.

    `serve(connection)` runs for as long as a model is connected, and is cancelled when it no longer is;
    `renamed(connection)` is called when the orchestrator says something new of who it is. A
    new deployment connects while the old one goes on, and takes over once it is ready. Raises ConfigError
    where the credentials can't be used.
    """

    def __init__(
        self,
        config: Config,
        port: int,
        serve: Callable[[Connection], Awaitable[None]],
        renamed: Callable[[Connection], None],
        tell: Tell = ignore,
    ) -> None:
        for noisy in ("model_runner_client", "websockets"):
            logging.getLogger(noisy).setLevel(logging.CRITICAL)
        largest = max(setting.segments for setting in config.game.settings)
        self._max_reply_bytes = largest * config.predict.max_segment_bytes + ENVELOPE_BYTES
        self._base_class = config.game.base_class
        self._credentials = security.load_credentials(config.orchestrator)
        self._serve = serve
        self._renamed = renamed
        self._tell = tell
        self._socket = _WebSocket(config.orchestrator.host, port, config.game.crunch_id)
        self._url = f"ws://{config.orchestrator.host}:{port}/{config.game.crunch_id}"
        self._berths: dict[str, dict[str, _Berth]] = {}
        self._orders = itertools.count()
        self._pacer = Pacer(_CONNECTS_A_TURN)
        self._told_anew_s = -math.inf
        self._tasks: TaskGroup | None = None
        self.running: dict[str, Connection] = {}
        """By `model_id`, who is connected and set up."""
        self.refused: dict[str, Refused] = {}
        """By `model_id`, those reported to the orchestrator and not connected since."""

    @property
    def connected(self) -> bool:
        """Whether the orchestrator's WebSocket is open."""
        return self._socket.connected

    @property
    def connecting(self) -> dict[str, Connection]:
        """By `model_id`, those whose connection or Setup is under way."""
        return {
            berth.model_id: berth.connection
            for berths in self._berths.values()
            for berth in berths.values()
            if berth.connection is not None and berth.model_id not in self.running
        }

    async def run(self) -> None:
        """Follow the orchestrator until cancelled; every connection is closed then."""
        lost = False
        async with anyio.create_task_group() as tasks:
            self._tasks = tasks
            try:
                while True:
                    try:
                        await self._socket.connect()
                        log.debug("orchestrator_connected", url=self._url)
                        lost = False
                        await self._socket._send_pending_messages()
                        async for message in self._socket.websocket:
                            if not self._on_message(message) and time.monotonic() >= self._told_anew_s:
                                self._told_anew_s = time.monotonic() + _TOLD_ANEW_S
                                await self._socket.disconnect()
                    except (OSError, TimeoutError, websockets.WebSocketException) as error:
                        problem = first_line(str(error)) or type(error).__name__
                    else:
                        problem = "the connection was closed"
                    if not lost:
                        log.warning("orchestrator_lost", url=self._url, error=problem)
                    lost = True
                    await asyncio.sleep(_RECONNECT_S)
            finally:
                self._tasks = None
                self._berths.clear()
                with anyio.CancelScope(shield=True), anyio.move_on_after(2):
                    await self._socket.disconnect()

    # -- what the orchestrator says ------------------------------------------------------------------------

    def _on_message(self, message: str | bytes) -> bool:
        """Whether it could be read; otherwise somebody may have come or gone, and only an `init` tells."""
        try:
            said = json.loads(message)
            event, data = said["event"], said["data"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            log.warning("orchestrator_message_ignored", error=f"{type(error).__name__}: {error}"[:200])
            return False
        if event not in ("init", "update") or not isinstance(data, list):
            log.warning("orchestrator_message_ignored", error=f"no list of models: {str(said)[:120]}")
            return False
        entries = [entry for entry in data if _usable(entry)]
        if len(entries) < len(data):
            log.warning("orchestrator_entries_ignored", count=len(data) - len(entries))
        if event == "init":
            unclear = [entry for entry in data if isinstance(entry, dict) and not _usable(entry)]
            self._drop_all_but(entries, {str(entry.get("model_id")) for entry in unclear})
        for entry in entries:
            self._on_entry(entry)
        return True

    def _drop_all_but(self, entries: list[dict[str, Any]], unclear: set[str]) -> None:
        """An `init` is the whole truth, except about the models whose entries can't be read."""
        announced = {(entry["model_id"], entry["deployment_id"]) for entry in entries}
        for model_id, berths in self._berths.items():
            for berth in list(berths.values()):
                if (model_id, berth.deployment_id) not in announced and model_id not in unclear:
                    berth.scope.cancel()

    def _on_entry(self, entry: dict[str, Any]) -> None:
        model_id, deployment_id, state = entry["model_id"], entry["deployment_id"], entry["state"]
        berth = self._berths.get(model_id, {}).get(deployment_id)
        if state != "RUNNING":
            if berth is not None:
                berth.scope.cancel()
        elif berth is not None and not berth.scope.cancel_called and berth.address == _address(entry):
            berth.entry = entry
            if berth.connection is not None and berth.connection.infos != _infos(entry):
                berth.connection.infos = _infos(entry)
                if self.running.get(model_id) is berth.connection:
                    self._renamed(berth.connection)
        elif not self._held_off(model_id, deployment_id):
            if berth is not None:
                berth.scope.cancel()
            assert self._tasks is not None
            berth = _Berth(entry, next(self._orders))
            self._berths.setdefault(model_id, {})[deployment_id] = berth
            self._tasks.start_soon(self._keep, berth, name=f"model {model_id}")

    def _held_off(self, model_id: str, deployment_id: str) -> bool:
        refused = self.refused.get(model_id)
        return (
            refused is not None
            and refused.info.deployment_id == deployment_id
            and time.time() - refused.since_s < _HELD_OFF_S
        )

    # -- a model's connection ------------------------------------------------------------------------------

    async def _keep(self, berth: _Berth) -> None:
        """Keep one deployment connected until the orchestrator withdraws it, or it is given up."""
        setups = 0
        try:
            with berth.scope:
                while True:
                    lasted = await self._session(berth)
                    setups = 1 if lasted else setups + 1
                    if setups >= _MOST_SETUPS:
                        assert berth.connection is not None
                        reason = f"set up {setups} times without a good answer in any round"
                        self.give_up(berth.connection, "MULTIPLE_FAILED", reason)
                    if setups > 1:
                        await asyncio.sleep(_SETUP_PAUSE_S * 2.0 ** (setups - 2))
        except asyncio.CancelledError:
            if anyio.current_effective_deadline() == -math.inf:
                raise
            log.exception("model_connection_failed", model_id=berth.model_id)  # a library cancelled it
        except Exception:
            log.exception("model_connection_failed", model_id=berth.model_id)
        finally:
            berths = self._berths.get(berth.model_id, {})
            if berths.get(berth.deployment_id) is berth:
                del berths[berth.deployment_id]
                if not berths:
                    self._berths.pop(berth.model_id, None)

    async def _session(self, berth: _Berth) -> bool:
        """Connect, set up and serve the model until it is to be set up anew; whether it lasted."""
        connection = berth.connection = self._connection(berth)
        try:
            await self._pacer.turn()
            ready, error = await connection.init()
            if not ready:
                reason = connection.problem or f"no connection to {connection.ip}:{connection.port}"
                self.give_up(connection, _FAILURES.get(error, "MULTIPLE_FAILED"), reason)
                await anyio.sleep_forever()  # giving up has cancelled the berth
            self._take_over(berth, connection)
            since_s = time.monotonic()
            with anyio.CancelScope() as berth.session:
                await self._serve(connection)
            return connection.answered or time.monotonic() - since_s > _LASTS_S
        finally:
            if self.running.get(berth.model_id) is connection:
                del self.running[berth.model_id]
            with anyio.CancelScope(shield=True), anyio.move_on_after(5):
                await connection.close()

    def _connection(self, berth: _Berth) -> Connection:
        infos = _infos(berth.entry)
        return Connection(
            self._base_class,
            max_reply_bytes=self._max_reply_bytes,
            deployment_id=berth.deployment_id,
            model_id=berth.model_id,
            model_name=infos.get("model_name"),
            ip=berth.entry["ip"],
            port=berth.entry["port"],
            infos=infos,
            **self._credentials,
        )

    def _take_over(self, berth: _Berth, connection: Connection) -> None:
        """The newest deployment that is ready is the model; older ones end."""
        for other in list(self._berths.get(berth.model_id, {}).values()):
            if other.order < berth.order:
                other.scope.cancel()
            elif other.order > berth.order and other.connection is self.running.get(berth.model_id):
                berth.scope.cancel()
                return
        self.running[berth.model_id] = connection
        self.refused.pop(berth.model_id, None)

    def _berth_of(self, connection: Connection) -> _Berth | None:
        berth = self._berths.get(connection.model_id, {}).get(connection.deployment_id)
        return berth if berth is not None and berth.connection is connection else None

    # -- what the game says --------------------------------------------------------------------------------

    def reconnect(self, connection: Connection) -> None:
        """Connect and call Setup anew: the cure for a process that restarted on the same port."""
        berth = self._berth_of(connection)
        if berth is not None and berth.session is not None and not berth.session.cancel_called:
            log.warning("model_set_up_again", model_id=connection.model_id)
            berth.session.cancel()

    def give_up(self, connection: Connection, code: str, reason: str) -> None:
        """Report the model to the orchestrator, which stops it, and disconnect."""
        log.warning("model_given_up", model_id=connection.model_id, code=code, reason=reason)
        self._tell(ModelGivenUp(connection.info, reason))
        self.refused.pop(connection.model_id, None)
        while len(self.refused) >= _MAX_REFUSED:
            del self.refused[next(iter(self.refused))]
        self.refused[connection.model_id] = Refused(connection.info, time.time(), reason)
        failure = {
            "model_id": connection.model_id,
            "failure_code": code,
            "failure_reason": reason,
            "ip": connection.ip,
        }
        if self._tasks is not None:
            report = json.dumps({"event": "report_failure", "data": [failure]})
            self._tasks.start_soon(self._socket.send_message, report, name=f"report {connection.model_id}")
        berth = self._berth_of(connection)
        if berth is not None:
            berth.scope.cancel()

    def refresh(self, model_id: str) -> None:
        """Connect a model anew that was given up, if the orchestrator still announces it."""
        self.refused.pop(model_id, None)
        if self._socket.connected and self._tasks is not None:
            self._tasks.start_soon(self._socket.websocket.close, name="orchestrator-refresh")


def _infos(entry: dict[str, Any]) -> dict[str, Any]:
    infos = entry.get("infos")
    return infos if isinstance(infos, dict) else {}


def _address(entry: dict[str, Any]) -> tuple[str, int]:
    return entry["ip"], entry["port"]


def _usable(entry: object) -> bool:
    """Whether an orchestrator's entry can be acted on (PROTOCOL.md; ids as REPORT_API.md needs them)."""
    if not isinstance(entry, dict):
        return False
    model_id = entry.get("model_id")
    return (
        isinstance(model_id, str)
        and 0 < len(model_id) <= MAX_NAME_CHARS
        and "," not in model_id
        and "::" not in model_id
        and model_id.isprintable()
        and isinstance(entry.get("deployment_id"), str)
        and entry.get("state") in ("RUNNING", "STOPPED", "RECOVERING")
        and (
            entry["state"] != "RUNNING" or (isinstance(entry.get("ip"), str) and _is_port(entry.get("port")))
        )
    )


def _is_port(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 65536
