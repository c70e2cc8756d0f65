"""A model at the wire: a real gRPC server that behaves as a test says."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import grpc
import grpc.aio
import orjson
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from model_runner_client.grpc.generated.commons_pb2 import Status, Variant, VariantType
from model_runner_client.grpc.generated.dynamic_subclass_pb2 import (
    CallRequest,
    CallResponse,
    SetupRequest,
    SetupResponse,
)

SERVICE = "dynamic_subclass.DynamicSubclassService"
PORT_LIMIT_S = 60.0

Wire = CallResponse | bytes
"""What a call is answered with: a message, or the bytes that stand in for one."""
Behaviour = Callable[["ModelServer", CallRequest], Awaitable[Wire]]
SetupBehaviour = Callable[["ModelServer", SetupRequest], Awaitable[SetupResponse | bytes]]


class Abort(Exception):
    """Raised by a behaviour: end the call with a status of gRPC's own."""

    def __init__(self, code: grpc.StatusCode, details: str = "") -> None:
        super().__init__(details)
        self.code, self.details = code, details


def success(value: bytes, kind: int = VariantType.JSON) -> CallResponse:
    return CallResponse(status=Status(code="SUCCESS"), methodResponse=Variant(type=kind, value=value))


def refusal(code: str, message: str = "") -> CallResponse:
    return CallResponse(status=Status(code=code, message=message))


def asked(request: CallRequest) -> tuple[str, int, int]:
    """A predict request's asset, horizon and step."""
    asset, horizon, step = (argument.data.value for argument in request.methodArguments)
    return asset.decode(), int.from_bytes(horizon, "little"), int.from_bytes(step, "little")


@lru_cache(maxsize=256)
def _read(request: bytes) -> CallRequest:
    return CallRequest.FromString(request)


def _from_wire(request: bytes) -> CallRequest:
    """All models get the same bytes at about the same time; a fleet of a thousand has no time to waste."""
    return _read(request) if len(request) < 4096 else CallRequest.FromString(request)


@lru_cache(maxsize=64)
def _normals(segments: int, step_s: int, sigma: float) -> bytes:
    density = {"type": "builtin", "name": "norm", "params": {"loc": 0.0, "scale": sigma * step_s**0.5}}
    return orjson.dumps([{"step": (k + 1) * step_s, **density} for k in range(segments)])


def normals(request: CallRequest, sigma: float = 1e-4) -> bytes:
    """A fitting answer to a predict request: a flat normal for each segment."""
    _, horizon, step = (argument.data.value for argument in request.methodArguments)
    return _normals(*_segments(horizon, step), sigma)


def _segments(horizon: bytes, step: bytes) -> tuple[int, int]:
    step_s = int.from_bytes(step, "little")
    return int.from_bytes(horizon, "little") // step_s, step_s


DONE = success(b"", VariantType.NONE)
_DONE_ON_WIRE = DONE.SerializeToString()


@lru_cache(maxsize=64)
def _good_answer(asset: bytes, horizon: bytes, step: bytes) -> bytes:
    segments, step_s = _segments(horizon, step)
    return success(_normals(segments, step_s, 1e-4)).SerializeToString()


async def answers_well(model: ModelServer, request: CallRequest) -> Wire:
    if request.methodName == "tick":
        return _DONE_ON_WIRE
    return _good_answer(*(argument.data.value for argument in request.methodArguments))


async def creates_an_instance(model: ModelServer, request: SetupRequest) -> SetupResponse:
    message = "Instance already exists" if model.instance else "Instance created successfully"
    model.instance = True
    return SetupResponse(status=Status(code="SUCCESS", message=message))


def _to_wire(response: Wire | SetupResponse) -> bytes:
    return response if isinstance(response, bytes) else response.SerializeToString()


@dataclass(eq=False)
class ModelServer:
    """One model: the public service, one call at a time, with a `behaviour` that may change while it runs.

    `remember=False` keeps nothing of what it is given (a thousand of them, or a month of prices).
    """

    model_id: str
    behaviour: Behaviour = answers_well
    port: int = 0
    deployment: int = 1
    infos: dict[str, Any] = field(default_factory=dict)
    instance: bool = False
    setup: SetupBehaviour = creates_an_instance
    compression: grpc.Compression | None = None
    credentials: grpc.ServerCredentials | None = None
    remember: bool = True
    stuck: bool = False
    """Whether it is busy until the next Setup."""
    setups: int = 0
    calls: int = 0
    """Since the last Setup."""
    ticks: list[dict[str, list[list[float]]]] = field(default_factory=list)
    predicts: list[tuple[str, int, int]] = field(default_factory=list)
    restarting: asyncio.Task[None] | None = None
    _busy: bool = False
    _server: grpc.aio.Server | None = None

    async def start(self) -> None:
        options = [
            ("grpc.max_receive_message_length", 64 * 2**20),
            ("grpc.max_send_message_length", 64 * 2**20),
            ("grpc.so_reuseport", 0),
            ("grpc.http2.bdp_probe", 0),  # a fleet of a thousand shares the machine with who asks it
        ]
        self._server = grpc.aio.server(options=options, compression=self.compression)
        methods = {
            "Setup": grpc.unary_unary_rpc_method_handler(self.Setup, SetupRequest.FromString, _to_wire),
            "Call": grpc.unary_unary_rpc_method_handler(self.Call, _from_wire, _to_wire),
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))
        health = health_aio.HealthServicer()
        await health.set("", health_pb2.HealthCheckResponse.SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(health, self._server)
        address = f"127.0.0.1:{self.port}"
        if self.credentials is None:
            self.port = self._server.add_insecure_port(address)
        else:
            self.port = self._server.add_secure_port(address, self.credentials)
        await self._server.start()

    async def stop(self) -> None:
        if self._server is not None:
            server, self._server = self._server, None
            await server.stop(None)
        self.instance = self._busy = self.stuck = False

    async def restart(self) -> None:
        """End the process, as it were, and start another one on the same port: its instance is gone."""
        await self.stop()
        async with asyncio.timeout(PORT_LIMIT_S):
            while True:
                try:
                    return await self.start()
                except RuntimeError:  # somebody's own end of a connection was given the port meanwhile
                    await asyncio.sleep(0.1)

    async def Setup(self, request: SetupRequest, context: Any) -> SetupResponse | bytes:  # noqa: N802
        self.setups += 1
        self.calls, self.stuck = 0, False
        return await self.setup(self, request)

    async def Call(self, request: CallRequest, context: Any) -> Wire:  # noqa: N802
        if self._busy or self.stuck:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "Server busy")
        if not self.instance:
            return refusal("FAILED_PRECONDITION", "Setup has not been called yet")
        self._busy = True
        self.calls += 1
        try:
            if self.remember:
                if request.methodName == "tick":
                    self.ticks.append(orjson.loads(request.methodArguments[0].data.value))
                else:
                    self.predicts.append(asked(request))
            return await self.behaviour(self, request)
        except Abort as abort:
            await context.abort(abort.code, abort.details)
            raise AssertionError("unreachable") from abort
        finally:
            self._busy = False

    def entry(self, state: str = "RUNNING") -> dict[str, Any]:
        """What an orchestrator says of this model."""
        infos = {
            "model_name": self.model_id.title(),
            "cruncher_id": f"wallet-{self.model_id}",
            "cruncher_name": f"player of {self.model_id}",
            **self.infos,
        }
        return {
            "deployment_id": f"{self.model_id}_{self.deployment}",
            "model_id": self.model_id,
            "infos": infos,
            "state": state,
            "ip": "127.0.0.1",
            "port": self.port,
        }


async def hang() -> None:
    """Never return."""
    await asyncio.Event().wait()
