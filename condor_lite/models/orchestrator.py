"""The embedded orchestrator: local model folders on one side, the public WebSocket protocol on the other.

It runs a process for each model folder (local.py) and tells every connected coordinator which models run and
where. See the protocol: `init` once after connecting, then `update`s; `report_failure` comes back.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import logging
import math
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import anyio
import orjson
import structlog
from anyio.abc import TaskGroup, TaskStatus
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from condor_lite.clock import machine_s
from condor_lite.config import Config
from condor_lite.errors import StartError
from condor_lite.models.folder import FolderWatch, ModelFolder
from condor_lite.models.local import LocalModel, LocalModelState, LocalState, Patience
from condor_lite.models.process import Guard, LaunchSettings, forget_logs

log = structlog.get_logger(__name__)

_MAX_ENTRIES = 300  # in one message: the client takes 1 MiB
_MAX_PENDING = 10_000  # for a client that does not read; it gets a fresh `init` when it comes back
_MAX_REASON = 500

# A browser's or a port scanner's broken handshake is no news; what matters is logged here.
_websocket_log = logging.getLogger("condor_lite.orchestrator.websocket")
_websocket_log.setLevel(logging.CRITICAL)


class _Client:
    """One connected coordinator: what it has been told, and what it is still to be told."""

    def __init__(self, connection: ServerConnection, entries: list[dict[str, Any]]) -> None:
        self.connection = connection
        self.told: dict[str, str] = {}
        self._event = "init"
        self._pending = entries
        self._news = asyncio.Event()

    def tell(self, entries: list[dict[str, Any]]) -> None:
        self._pending.extend(entries)
        self._news.set()
        if len(self._pending) > _MAX_PENDING:
            self.connection.transport.abort()

    async def send(self) -> None:
        """Send what there is, whenever there is something; entries that came up meanwhile share a message."""
        while True:
            entries, self._pending = self._pending[:_MAX_ENTRIES], self._pending[_MAX_ENTRIES:]
            message = orjson.dumps({"event": self._event, "data": entries})
            self._event = "update"
            for entry in entries:
                if entry["state"] == "RUNNING":
                    self.told[entry["model_id"]] = entry["deployment_id"]
            await self.connection.send(message.decode())
            if not self._pending:
                self._news.clear()
                await self._news.wait()


class Orchestrator:
    """Runs the models in `orchestrator.models`. Use: `await task_group.start(Orchestrator(...).run)`.

    Time is the wall's throughout: this is process supervision, whatever the game's clock does.
    """

    def __init__(
        self,
        config: Config,
        data_dir: Path,
        patience: Patience | None = None,
        believed_s: Callable[[], float] = machine_s,
    ) -> None:
        """`believed_s`: the time by a clock that does not follow a machine's that leaps (epoch seconds)."""
        self.port = config.orchestrator.port
        self._config = config
        self._log_dir = data_dir.absolute() / "models-log"
        self._patience = patience or Patience()
        self._believed_s = believed_s
        self._watch = FolderWatch(config.orchestrator.models.absolute())
        self._models: dict[str, tuple[LocalModel, anyio.CancelScope]] = {}
        self._clients: set[_Client] = set()

    def states(self) -> list[LocalModelState]:
        """Every model folder's state, sorted by model id."""
        return [self._models[model_id][0].state for model_id in sorted(self._models)]

    def retire(self) -> None:
        """The game ends: whatever process ends from now on is not replaced."""
        for model, _ in self._models.values():
            model.retire()

    def restart(self, model_id: str) -> bool:
        """Have a model's process started anew, given up or not; False where there is no such folder."""
        if model_id not in self._models:
            return False
        self._models[model_id][0].restart()
        return True

    async def run(self, task_status: TaskStatus[int] = anyio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled. Started (with the port) once it listens; the models start after that.

        Raises StartError where it can't listen, or its folders can't be read or written.
        """
        with self._bind() as listener:
            self.port = listener.getsockname()[1]
            await anyio.to_thread.run_sync(self._check_folders)
            server = serve(
                self._serve,
                sock=listener,
                origins=[None],  # no web page, though it may reach the loopback interface
                ping_interval=None,
                close_timeout=1,
                max_size=1 << 20,
                logger=_websocket_log,
            )
            async with Guard() as guard, server:
                settings = LaunchSettings(
                    base_class=self._config.game.base_class,
                    log_dir=self._log_dir,
                    guard=guard,
                    starting=anyio.Semaphore(2 * (os.cpu_count() or 1) + 4),
                    setup_timeout_s=self._patience.setup_timeout_s,
                    stop_grace_s=self._patience.stop_grace_s,
                    rules=self._config.orchestrator,
                    hidden=(self._log_dir.parent, self._config.orchestrator.models.absolute()),
                )
                task_status.started(self.port)
                try:
                    async with anyio.create_task_group() as tasks:
                        await self._follow_folders(tasks, settings)
                finally:
                    self._models.clear()
                    with contextlib.suppress(OSError):  # a process that would not end still holds its folder
                        self._temp_dir.rmdir()

    @property
    def _temp_dir(self) -> Path:
        return self._log_dir.with_name("models-tmp")

    def _bind(self) -> socket.socket:
        host = self._config.orchestrator.host
        if not _is_loopback(host):
            raise StartError(
                f"orchestrator.host = {host!r}: the embedded orchestrator listens on this machine only; "
                'use "127.0.0.1", or orchestrator.mode = "remote"'
            )
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            return socket.create_server((host, self.port), family=family)
        except OSError as error:
            in_use = error.errno == errno.EADDRINUSE
            what = "the port is in use" if in_use else error.strerror or str(error)
            raise StartError(
                f"orchestrator.port = {self.port}: {what}; choose another one, or 0 for any free one"
            ) from None

    def _check_folders(self) -> None:
        try:
            self._log_dir.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(self._temp_dir, ignore_errors=True)  # after a crash
            self._watch.scan()
        except OSError as error:
            raise StartError(f"{error.filename}: {error.strerror}; the models need it") from None

    async def _follow_folders(self, tasks: TaskGroup, settings: LaunchSettings) -> None:
        forget_at_s = -math.inf
        readable = True
        while True:
            try:
                # A network's disk that is gone never answers, and must not hold up the end.
                found = await anyio.to_thread.run_sync(self._watch.scan, abandon_on_cancel=True)
            except OSError as error:
                if readable:
                    log.warning("models_folder_unreadable", path=error.filename, error=error.strerror)
                readable = False
            else:
                readable = True
                self._take_over({model.model_id: model for model in found}, tasks, settings)
                if anyio.current_time() >= forget_at_s:
                    forget_at_s = anyio.current_time() + self._patience.forget_s
                    now_s = min(machine_s(), self._believed_s())
                    before_s = now_s - self._config.storage.keep_predictions_s
                    await anyio.to_thread.run_sync(
                        forget_logs, self._log_dir, frozenset(self._models), before_s
                    )
            await anyio.sleep(self._patience.scan_s)

    def _take_over(self, found: dict[str, ModelFolder], tasks: TaskGroup, settings: LaunchSettings) -> None:
        for model_id in self._models.keys() - found.keys():
            self._models.pop(model_id)[1].cancel()
            log.info("model_removed", model_id=model_id)
        for model_id, source in found.items():
            if model_id in self._models:
                self._models[model_id][0].update(source)
            else:
                model = LocalModel(source, settings, self._patience, self._announce)
                scope = anyio.CancelScope()
                self._models[model_id] = (model, scope)
                tasks.start_soon(_run_within, scope, model, name=f"model {model_id}")

    def _announce(self, entries: list[dict[str, Any]]) -> None:
        for client in self._clients:
            client.tell(entries)

    async def _serve(self, connection: ServerConnection) -> None:
        request = connection.request
        crunch_id = unquote(urlsplit(request.path).path.strip("/")) if request else ""
        with contextlib.suppress(ConnectionClosed):
            if not crunch_id:
                await connection.send('{"event": "error", "data": "no crunch id; connect to /<crunch_id>"}')
                await connection.close(1008, "no crunch id")
            elif crunch_id != self._config.game.crunch_id:
                await connection.send('{"event": "init", "data": []}')
                await connection.wait_closed()
            else:
                await self._serve_coordinator(connection)

    async def _serve_coordinator(self, connection: ServerConnection) -> None:
        running = [model.entry for model, _ in self._models.values()]
        client = _Client(connection, [entry for entry in running if entry])
        self._clients.add(client)
        sender = asyncio.create_task(client.send())
        try:
            async for message in connection:
                self._hear(client, message)
        finally:
            self._clients.discard(client)
            sender.cancel()
            with contextlib.suppress(asyncio.CancelledError, ConnectionClosed):
                await sender

    def _hear(self, client: _Client, message: str | bytes) -> None:
        for model_id, reason in parse_reports(message):
            model = self._models[model_id][0] if model_id in self._models else None
            # A report names no deployment: one about a deployment that has been replaced, but of whose
            # successor this client has not heard yet, would stop the wrong one.
            if model and model.deployment_id and client.told.get(model_id) == model.deployment_id:
                model.report(reason)
            else:
                log.debug("stale_failure_report", model_id=model_id, reason=reason)


def parse_reports(message: str | bytes) -> list[tuple[str, str]]:
    """(model id, reason) of each well-formed entry of a `report_failure` message; none of any other one."""
    try:
        said = orjson.loads(message)
    except orjson.JSONDecodeError:
        return []
    if not isinstance(said, dict) or said.get("event") != "report_failure":
        return []
    entries = said.get("data")
    reports = []
    for entry in entries if isinstance(entries, list) else []:
        if isinstance(entry, dict) and isinstance(entry.get("model_id"), str):
            parts = [
                part for key in ("failure_code", "failure_reason") if isinstance(part := entry.get(key), str)
            ]
            text = "".join(c if c.isprintable() else " " for c in ": ".join(parts)[:_MAX_REASON])
            reports.append((entry["model_id"], text or "reported without a reason"))
    return reports


async def _run_within(scope: anyio.CancelScope, model: LocalModel) -> None:
    with scope:
        await model.run()


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


__all__ = ["LocalModelState", "LocalState", "Orchestrator", "Patience", "parse_reports"]
