"""Models and an orchestrator at the wire: real gRPC servers and a WebSocket, behaving as a test says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
import orjson
import websockets
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from model_runner_client.grpc.generated.commons_pb2 import Status, Variant, VariantType
from model_runner_client.grpc.generated.dynamic_subclass_pb2 import (
    CallRequest,
    CallResponse,
    SetupRequest,
    SetupResponse,
)
from model_runner_client.grpc.generated.dynamic_subclass_pb2_grpc import (
    DynamicSubclassServiceServicer,
    add_DynamicSubclassServiceServicer_to_server,
)

Behaviour = Callable[["ModelServer", CallRequest], Awaitable[CallResponse]]


def success(value: bytes, kind: int = VariantType.JSON) -> CallResponse:
    return CallResponse(status=Status(code="SUCCESS"), methodResponse=Variant(type=kind, value=value))


def refusal(code: str, message: str = "") -> CallResponse:
    return CallResponse(status=Status(code=code, message=message))


def normals(request: CallRequest, sigma: float = 1e-4) -> bytes:
    """A fitting answer to a predict request: a flat normal for each segment."""
    horizon_s, step_s = (
        int.from_bytes(argument.data.value, "little", signed=True)
        for argument in request.methodArguments[1:3]
    )
    density = {"type": "builtin", "name": "norm", "params": {"loc": 0.0, "scale": sigma * step_s**0.5}}
    return orjson.dumps([{"step": (k + 1) * step_s, **density} for k in range(horizon_s // step_s)])


async def answers_well(model: ModelServer, request: CallRequest) -> CallResponse:
    if request.methodName == "tick":
        return CallResponse(status=Status(code="SUCCESS"))
    return success(normals(request))


async def hangs(model: ModelServer, request: CallRequest) -> CallResponse:
    if request.methodName == "predict":
        await asyncio.Event().wait()
    return await answers_well(model, request)


async def raises(model: ModelServer, request: CallRequest) -> CallResponse:
    if request.methodName == "predict":
        return refusal("MODEL_FAILED", "division by zero")
    return await answers_well(model, request)


@dataclass
class ModelServer(DynamicSubclassServiceServicer):
    """One model: the public service, one call at a time, with a `behaviour` that may change while it runs."""

    model_id: str
    behaviour: Behaviour = answers_well
    port: int = 0
    deployment: int = 1
    infos: dict[str, Any] = field(default_factory=dict)
    instance: bool = False
    setups: int = 0
    ticks: list[dict[str, list[list[float]]]] = field(default_factory=list)
    predicts: list[tuple[str, int, int]] = field(default_factory=list)
    _busy: bool = False
    _server: grpc.aio.Server | None = None

    async def start(self) -> None:
        options = [
            ("grpc.max_receive_message_length", 64 * 2**20),
            ("grpc.max_send_message_length", 64 * 2**20),
        ]
        self._server = grpc.aio.server(options=[*options, ("grpc.so_reuseport", 0)])
        add_DynamicSubclassServiceServicer_to_server(self, self._server)
        health = health_aio.HealthServicer()
        await health.set("", health_pb2.HealthCheckResponse.SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(health, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self._server.start()

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(None)
            self._server = None
        self.instance = self._busy = False

    async def Setup(self, request: SetupRequest, context: Any) -> SetupResponse:  # noqa: N802
        self.setups += 1
        message = "Instance already exists" if self.instance else "Instance created successfully"
        self.instance = True
        return SetupResponse(status=Status(code="SUCCESS", message=message))

    async def Call(self, request: CallRequest, context: Any) -> CallResponse:  # noqa: N802
        if self._busy:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "Server busy")
        if not self.instance:
            return refusal("FAILED_PRECONDITION", "Setup has not been called yet")
        self._busy = True
        try:
            if request.methodName == "tick":
                self.ticks.append(orjson.loads(request.methodArguments[0].data.value))
            else:
                asset, horizon, step = (argument.data.value for argument in request.methodArguments)
                self.predicts.append(
                    (asset.decode(), int.from_bytes(horizon, "little"), int.from_bytes(step, "little"))
                )
            return await self.behaviour(self, request)
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


class Orchestrator:
    """The orchestrator's side of the WebSocket: announces models, and keeps what is reported to it."""

    def __init__(self) -> None:
        self.entries: dict[str, dict[str, Any]] = {}
        self.reports: list[dict[str, Any]] = []
        self.port = 0
        self._clients: set[websockets.ServerConnection] = set()
        self._server: websockets.Server | None = None

    async def start(self) -> None:
        self._server = await websockets.serve(self._serve, "127.0.0.1", self.port)
        self.port = next(iter(self._server.sockets)).getsockname()[1]

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()

    async def _serve(self, client: websockets.ServerConnection) -> None:
        self._clients.add(client)
        try:
            await client.send(json.dumps({"event": "init", "data": list(self.entries.values())}))
            async for message in client:
                self.reports.extend(json.loads(message)["data"])
        except websockets.ConnectionClosed:
            pass
        finally:
            self._clients.discard(client)

    async def send(self, message: str | bytes) -> None:
        for client in list(self._clients):
            await client.send(message)

    async def announce(self, *models: ModelServer, state: str = "RUNNING") -> None:
        """Tell everybody connected, and whoever connects later, that these models are in `state`."""
        entries = [model.entry(state) for model in models]
        for entry in entries:
            if state == "RUNNING":
                self.entries[entry["model_id"]] = entry
            else:
                self.entries.pop(entry["model_id"], None)
        await self.send(json.dumps({"event": "update", "data": entries}))
