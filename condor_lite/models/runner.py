"""The fleet: every model that is connected now, over model-runner-client.

The client library follows the orchestrator's WebSocket, makes the connections and calls Setup. The calls to
a model go straight to its gRPC stub, because the library's own `call` skips, counts and decodes
(PROTOCOL.md): a reply's payload stays the bytes that came, and every failure is told as what it was.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import grpc
import structlog
import websockets
from grpc.aio import AioRpcError, UsageError
from model_runner_client.errors import InvalidCoordinatorUsageError
from model_runner_client.grpc.generated.commons_pb2 import Argument, Variant, VariantType
from model_runner_client.grpc.generated.dynamic_subclass_pb2 import CallRequest, SetupRequest
from model_runner_client.grpc.generated.dynamic_subclass_pb2_grpc import DynamicSubclassServiceStub
from model_runner_client.model_cluster import ModelCluster
from model_runner_client.model_concurrent_runners import DynamicSubclassModelConcurrentRunner
from model_runner_client.model_runners import DynamicSubclassModelRunner
from model_runner_client.security.tls_peer_key import TlsProbeError
from model_runner_client.security.wallet_gelegation import AuthError
from model_runner_client.websocket_client import WebsocketClient

from condor_lite.config import Config
from condor_lite.game.entities import ModelInfo
from condor_lite.models import security

log = structlog.get_logger()

_SETUP_TIMEOUT_S = 60.0
_CONNECT_ATTEMPTS = 3
_RECONNECT_S = 1.0
_MAX_EVENT_BYTES = 32 * 2**20  # an `init` of 1,000 models takes about 250 kB
_REPLY_OVERHEAD_BYTES = 64 * 1024  # the channel's limit counts the framing too
_MAX_NAME_CHARS = 200
_MAX_REFUSED = 10_000


class Outcome(StrEnum):
    """How a call ended. Only `SUCCESS` has a payload."""

    SUCCESS = "success"
    TIMEOUT = "timeout"
    BUSY = "busy"  # the model is still working on an earlier call
    MODEL_FAILED = "model failed"  # its code raised
    BAD_IMPLEMENTATION = "bad implementation"  # no such method
    SETUP_MISSING = "setup missing"  # the process restarted behind our back
    TOO_LARGE = "too large"
    UNREACHABLE = "unreachable"
    REFUSED = "refused"  # it did not prove whose model it is
    PROTOCOL = "protocol error"


@dataclass(frozen=True, slots=True)
class Reply:
    """A call's end: `detail` is for the participant, `payload` the reply's bytes as they came."""

    outcome: Outcome
    exec_time_us: int
    detail: str | None = None
    payload: bytes | None = None


@dataclass(frozen=True, slots=True)
class Refused:
    """A model that could not be connected or was given up, and why; `since` is epoch seconds on the wall."""

    info: ModelInfo
    since: float
    reason: str


def tick_request(data: bytes) -> CallRequest:
    """`tick(data)` with `data` the JSON of `{asset: [[timestamp, price], ...]}`; shared by all models."""
    return _call_request("tick", (VariantType.JSON, data))


def predict_request(asset: str, horizon_s: int, step_s: int) -> CallRequest:
    """`predict(asset, horizon, step)`; shared by all models."""
    return _call_request(
        "predict",
        (VariantType.STRING, asset.encode()),
        (VariantType.INT, horizon_s.to_bytes(8, "little", signed=True)),
        (VariantType.INT, step_s.to_bytes(8, "little", signed=True)),
    )


def _call_request(method: str, *arguments: tuple[Any, bytes]) -> CallRequest:
    return CallRequest(
        methodName=method,
        methodArguments=[
            Argument(position=position, data=Variant(type=kind, value=value))
            for position, (kind, value) in enumerate(arguments, 1)
        ],
    )


class Connection(DynamicSubclassModelRunner):
    """One model's connection, from a successful Setup until it is closed.

    `fresh` says that Setup made a new instance, which knows nothing yet.
    """

    def __init__(self, base_class: str, *, max_reply_bytes: int, **kwargs: Any) -> None:
        super().__init__(base_class, **kwargs)
        self.setup_timeout = _SETUP_TIMEOUT_S
        self.retry_attempts = _CONNECT_ATTEMPTS
        self.fresh = True
        self.reconnecting = False
        self.problem: str | None = None
        """Why the last attempt to connect failed, for the host."""
        self._max_reply_bytes = max_reply_bytes

    @property
    def info(self) -> ModelInfo:
        """What the orchestrator said of the model last, made safe to store and show."""
        infos: Mapping[str, Any] = self.infos if isinstance(self.infos, Mapping) else {}
        cruncher_id = _name(infos.get("cruncher_id")) or self.model_id
        code_hash = infos.get("code_hash")
        return ModelInfo(
            model_id=self.model_id,
            model_name=_name(infos.get("model_name")) or self.model_id,
            cruncher_id=cruncher_id,
            cruncher_name=_name(infos.get("cruncher_name")) or cruncher_id,
            deployment_id=_name(self.deployment_id) or "unknown",
            code_hash=code_hash if isinstance(code_hash, str) else None,
            benchmark=infos.get("benchmark") is True,
        )

    async def init(self) -> tuple[bool, Any]:
        """Connect and call Setup; `problem` then says why it failed."""
        for attempt in range(1, _CONNECT_ATTEMPTS + 1):
            try:
                outcome: tuple[bool, Any] = await super().init()
                return outcome
            except InvalidCoordinatorUsageError:  # no connection without credentials, but it speaks TLS
                if self.gateway_credentials is None:
                    self.problem = "it asks for TLS, and orchestrator.credentials is not set"
                    break
                self.problem = self.problem or "this machine does not trust its TLS certificate"
            if attempt < _CONNECT_ATTEMPTS:
                await asyncio.sleep(self.retry_backoff_factor**attempt)
        return False, self.ErrorType.AUTH_ERROR

    def _connect_insecure_channels(self) -> None:
        self._begin_connecting()
        super()._connect_insecure_channels()

    def _connect_gateway_channels(self) -> None:
        self._begin_connecting()
        super()._connect_gateway_channels()

    async def _connect_secure_channels(self) -> None:
        self._begin_connecting()
        try:
            self.grpc_channel, self.grpc_health_channel = await security.secure_channels(
                self, self.secure_credentials
            )
        except (TlsProbeError, TimeoutError) as error:
            self.problem = security.refusal(error)
            raise

    def _begin_connecting(self) -> None:
        self.problem = None
        self.grpc_options += [
            ("grpc.max_receive_message_length", self._max_reply_bytes + _REPLY_OVERHEAD_BYTES),
            ("grpc.max_send_message_length", -1),
        ]
        if self.ip.startswith("127."):
            self.grpc_options.append(("grpc.enable_http_proxy", 0))

    async def setup(self, grpc_channel: Any) -> tuple[bool, Any]:
        self.grpc_stub = DynamicSubclassServiceStub(grpc_channel)
        try:
            response = await self.grpc_stub.Setup(
                SetupRequest(className=self.base_classname), timeout=self.setup_timeout
            )
        except AuthError as error:
            self.problem = security.refusal(error)
            raise
        except AioRpcError as error:
            self.problem = f"Setup failed: {_refusal(error, self.setup_timeout)[1]}"
            raise
        code = response.status.code
        self.fresh = "already exists" not in response.status.message
        if code == "SUCCESS":
            return True, None
        self.problem = f"Setup answered {_first_line(code)[:40]}: {_first_line(response.status.message)}"
        if code == "BAD_IMPLEMENTATION":
            return False, self.ErrorType.BAD_IMPLEMENTATION
        return False, self.ErrorType.FAILED

    async def ask(self, request: CallRequest, timeout_s: float) -> Reply:
        """Call the model and wait at most `timeout_s` (wall). Raises only its caller's cancellation."""
        loop = asyncio.get_running_loop()
        started_s = loop.time()

        def reply(outcome: Outcome, detail: str | None = None, payload: bytes | None = None) -> Reply:
            return Reply(outcome, int((loop.time() - started_s) * 1e6), detail, payload)

        if self.grpc_stub is None or self.closed:
            return reply(Outcome.UNREACHABLE, "the connection is closed")
        try:
            # gRPC's own deadline is kept by its threads; the outer one holds even if that is late.
            async with asyncio.timeout(timeout_s + 1.0):
                response = await self.grpc_stub.Call(request, timeout=timeout_s)
        except AioRpcError as error:
            return reply(*_refusal(error, timeout_s))
        except TimeoutError:
            return reply(Outcome.TIMEOUT, f"no answer within {timeout_s:.1f} s")
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            return reply(Outcome.UNREACHABLE, "disconnected during the call")
        except UsageError:
            return reply(Outcome.UNREACHABLE, "the connection is closed")
        except AuthError as error:
            return reply(Outcome.REFUSED, security.refusal(error))
        except Exception as error:  # undecodable messages: one model's trouble, whatever it is
            return reply(Outcome.PROTOCOL, f"{type(error).__name__}: {_first_line(str(error))}")
        code = response.status.code
        if code == "SUCCESS":
            return reply(*_payload(response.methodResponse))
        detail = _first_line(response.status.message)
        if code == "FAILED_PRECONDITION":
            return reply(Outcome.SETUP_MISSING, f"Setup missing: {detail}")
        if code == "BAD_IMPLEMENTATION":
            return reply(Outcome.BAD_IMPLEMENTATION, f"bad implementation: {detail}")
        if code == "MODEL_FAILED":
            return reply(Outcome.MODEL_FAILED, f"the model raised: {detail}")
        return reply(Outcome.PROTOCOL, f"the model's server answered {_first_line(code)[:40]}: {detail}")


def _refusal(error: AioRpcError, timeout_s: float) -> tuple[Outcome, str]:
    code, details = error.code(), _first_line(error.details() or "")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return Outcome.TIMEOUT, f"no answer within {timeout_s:.1f} s"
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        if "larger than max" in details or "decompress" in details.lower():
            return Outcome.TOO_LARGE, f"the answer is too large: {details}"
        return Outcome.BUSY, "busy with an earlier call"
    if code is grpc.StatusCode.UNAVAILABLE:
        return Outcome.UNREACHABLE, f"cannot connect: {details}"
    if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
        return Outcome.UNREACHABLE, f"the model's server refuses our credentials: {details}"
    return Outcome.PROTOCOL, f"gRPC {code.name}: {details}"


def _payload(variant: Any) -> tuple[Outcome, str | None, bytes | None]:
    if variant.type == VariantType.JSON:
        return Outcome.SUCCESS, None, variant.value
    if variant.type == VariantType.NONE:
        return Outcome.SUCCESS, None, b"null"
    known = variant.type in VariantType.values()
    kind = VariantType.Name(variant.type) if known else f"type {variant.type}"
    return Outcome.PROTOCOL, f"the answer must be JSON, not {kind}", None


def _first_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[0][:_MAX_NAME_CHARS] if lines else ""


def _name(value: object) -> str:
    """A participant's or model's name: one line, printable, bounded; empty where there is none."""
    if not isinstance(value, str):
        return ""
    return "".join(char for char in value[:_MAX_NAME_CHARS] if char.isprintable()).strip()


class _WebSocket(WebsocketClient):
    """The library's client with a larger message limit and a steadier reconnection."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.retry_interval = _RECONNECT_S

    def __del__(self) -> None:  # the library's registers an exit handler that fails without a loop
        pass

    async def connect(self) -> None:
        uri = f"ws://{self.host}:{self.port}/{self.crunch_id}"
        self.websocket = await websockets.connect(uri, max_size=_MAX_EVENT_BYTES, open_timeout=10)

    @property
    def connected(self) -> bool:
        return self.websocket is not None and self.websocket.state is websockets.State.OPEN


class _Running(dict[str, Connection]):
    """The library's table of running models, telling when one comes and goes."""

    def __init__(self, on_ready: Callable[[Connection], None], on_gone: Callable[[Connection], None]) -> None:
        super().__init__()
        self._on_ready, self._on_gone = on_ready, on_gone

    def __setitem__(self, model_id: str, connection: Connection) -> None:
        super().__setitem__(model_id, connection)
        self._on_ready(connection)

    def __delitem__(self, model_id: str) -> None:
        connection = self[model_id]
        super().__delitem__(model_id)
        self._on_gone(connection)


class _Runner(DynamicSubclassModelConcurrentRunner):
    """The library's runner, making `Connection`s."""

    def __init__(self, *args: Any, max_reply_bytes: int, **kwargs: Any) -> None:
        self._max_reply_bytes = max_reply_bytes
        super().__init__(*args, **kwargs)

    def create_model_runner(self, **kwargs: Any) -> Connection:
        return Connection(
            self.base_classname,
            max_reply_bytes=self._max_reply_bytes,
            secure_credentials=self.secure_credentials,
            gateway_credentials=self.gateway_credentials,
            **kwargs,
        )


class Fleet:
    """Connects to the orchestrator and keeps `running` true to what it announces.

    `on_ready(connection)` is called when a model can be asked, `on_gone(connection)` when it no longer can;
    a new deployment is both. Every model connects in a task of its own: one that hangs in Setup delays
    nobody. Raises ConfigError where the credentials can't be used.
    """

    def __init__(
        self,
        config: Config,
        port: int,
        on_ready: Callable[[Connection], None],
        on_gone: Callable[[Connection], None],
    ) -> None:
        for noisy in ("model_runner_client", "websockets"):
            logging.getLogger(noisy).setLevel(logging.CRITICAL)
        largest = max(setting.segments for setting in config.game.settings)
        runner = _Runner(
            timeout=int(config.predict.timeout_s) or 1,
            crunch_id=config.game.crunch_id,
            host=config.orchestrator.host,
            port=port,
            base_classname=config.game.base_class,
            max_reply_bytes=largest * config.predict.max_segment_bytes + 16 * 1024,
            **security.load_credentials(config.orchestrator),
        )
        self._cluster: ModelCluster = runner.model_cluster
        self._on_ready = on_ready
        self.running: dict[str, Connection] = _Running(self._ready, on_gone)
        self._cluster.models_run = self.running
        self._cluster.process_failure = self._report
        self._socket = _WebSocket(
            config.orchestrator.host, port, config.game.crunch_id, event_handler=self._on_event
        )
        # The client that this replaces would print a traceback at exit (its `__del__` registers this method).
        self._cluster.ws_client.disconnect_sync = lambda: None
        self._cluster.ws_client = self._socket
        self.refused: dict[str, Refused] = {}
        """By `model_id`, those reported to the orchestrator and not connected since."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._url = f"ws://{config.orchestrator.host}:{port}/{config.game.crunch_id}"

    @property
    def connected(self) -> bool:
        """Whether the orchestrator's WebSocket is open."""
        return self._socket.connected

    @property
    def connecting(self) -> dict[str, Connection]:
        """Those whose connection or Setup is under way."""
        return dict(self._cluster.pending_model_runs)

    async def run(self) -> None:
        """Follow the orchestrator until cancelled, then close every connection."""
        try:
            while True:
                try:
                    await self._listen()
                except (OSError, TimeoutError, websockets.WebSocketException) as error:
                    log.warning(
                        "orchestrator_lost",
                        url=self._url,
                        error=_first_line(str(error)),
                        retry_s=_RECONNECT_S,
                    )
                await asyncio.sleep(_RECONNECT_S)
        finally:
            await asyncio.shield(self._close())

    async def _listen(self) -> None:
        await self._socket.connect()
        await self._socket._send_pending_messages()
        log.debug("orchestrator_connected", url=self._url)
        async for message in self._socket.websocket:
            try:
                event = json.loads(message)
                await self._on_event(event["event"], event["data"])
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                log.warning("orchestrator_message_ignored", error=f"{type(error).__name__}: {error}"[:200])

    async def _on_event(self, event: str, data: list[dict[str, Any]]) -> None:
        entries = [entry for entry in data if _usable(entry)]
        if len(entries) < len(data):
            log.warning("orchestrator_entries_ignored", count=len(data) - len(entries))
        if event == "init":
            announced = {entry["model_id"] for entry in entries}
            for connection in [
                *self._cluster.models_run.values(),
                *self._cluster.pending_model_runs.values(),
            ]:
                if connection.model_id not in announced:
                    self._spawn(self._cluster.remove_model_runner(connection))
        elif event != "update":
            log.warning("orchestrator_event_unknown", event_name=str(event)[:40])
            return
        for entry in entries:
            self._spawn(self._cluster.update_model_runs([entry]))

    def reconnect(self, connection: Connection) -> None:
        """Connect and call Setup anew: the cure for a process that restarted on the same port."""
        if not connection.reconnecting:
            connection.reconnecting = True
            log.warning("model_set_up_again", model_id=connection.model_id)
            self._spawn(self._cluster.reconnect_model_runner(connection))

    def refresh(self) -> None:
        """Have the orchestrator say anew who runs: whoever was disconnected only here is connected again."""
        if self._socket.connected:
            self._spawn(self._socket.websocket.close())

    def give_up(self, connection: Connection, code: str, reason: str) -> None:
        """Report the model to the orchestrator, which stops it, and disconnect."""
        log.warning("model_given_up", model_id=connection.model_id, code=code, reason=reason)
        self._note(connection, reason)
        self._spawn(ModelCluster.process_failure(self._cluster, connection, code, reason))

    async def _report(self, connection: Connection, code: str, reason: str | None = None) -> None:
        """What the library calls, without a reason, when a model can't be connected."""
        reason = reason or connection.problem or f"no connection to {connection.ip}:{connection.port}"
        self._note(connection, reason)
        log.warning("model_not_connected", model_id=connection.model_id, code=code, reason=reason)
        await ModelCluster.process_failure(self._cluster, connection, code, reason)

    def _ready(self, connection: Connection) -> None:
        self.refused.pop(connection.model_id, None)
        self._on_ready(connection)

    def _note(self, connection: Connection, reason: str) -> None:
        self.refused.pop(connection.model_id, None)
        while len(self.refused) >= _MAX_REFUSED:
            del self.refused[next(iter(self.refused))]
        self.refused[connection.model_id] = Refused(connection.info, time.time(), reason)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("model_connection_failed", error=f"{type(error).__name__}: {_first_line(str(error))}")

    async def _close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        connections = [*self.running.values(), *self._cluster.pending_model_runs.values()]
        self.running.clear()
        await asyncio.gather(*(connection.close() for connection in connections), return_exceptions=True)
        await self._socket.disconnect()


def _usable(entry: object) -> bool:
    """Whether an orchestrator's entry can be acted on (PROTOCOL.md; ids as REPORT_API.md needs them)."""
    if not isinstance(entry, dict):
        return False
    model_id = entry.get("model_id")
    return (
        isinstance(model_id, str)
        and 0 < len(model_id) <= _MAX_NAME_CHARS
        and "," not in model_id
        and "::" not in model_id
        and model_id.isprintable()
        and isinstance(entry.get("deployment_id"), str)
        and (
            entry.get("state") != "RUNNING"
            or (isinstance(entry.get("ip"), str) and isinstance(entry.get("port"), int))
        )
    )
