"""The fleet: every model that is connected now, over model-runner-client.

The client library follows the orchestrator's WebSocket, makes the connections and calls Setup. The calls to
a model go straight to its gRPC stub, because the library's own `call` skips, counts and decodes
(PROTOCOL.md): a reply's payload stays the bytes that came, and every failure is told as what it was.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import grpc
import structlog
from anyio.lowlevel import checkpoint_if_cancelled
from google.protobuf.message import DecodeError
from grpc.aio import AioRpcError, UsageError
from model_runner_client.errors import InvalidCoordinatorUsageError
from model_runner_client.grpc.generated.commons_pb2 import Argument, Variant, VariantType
from model_runner_client.grpc.generated.dynamic_subclass_pb2 import (
    DESCRIPTOR,
    CallRequest,
    CallResponse,
    SetupRequest,
    SetupResponse,
)
from model_runner_client.model_runners import DynamicSubclassModelRunner
from model_runner_client.security.tls_peer_key import TlsProbeError
from model_runner_client.security.wallet_gelegation import AuthError

from condor_lite.game.entities import ModelInfo
from condor_lite.models import security

log = structlog.get_logger()

_SERVICE = DESCRIPTOR.services_by_name["DynamicSubclassService"].full_name
_SETUP_TIMEOUT_S = 60.0
_CONNECT_ATTEMPTS = 3
_OPENING_S = 5.0  # of a line, at most: in the library's 0.1 to 1 s a far or busy one never opens
_REPLY_OVERHEAD_BYTES = 64 * 1024  # the channel's limit counts the framing too
_AHEAD_BYTES = 256 * 1024  # of a reply, sent before this side has asked for more: most replies are shorter
_NETWORK_PATIENCE_MS = 20_000  # gRPC's own
_NO_MESSAGE = "the model's server sent bytes that are no reply of the protocol"
MAX_NAME_CHARS = 200


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


def tick_request(data: bytes) -> bytes:
    """`tick(data)`, `data` the JSON of `{asset: [[timestamp, price], ...]}`; one for all models."""
    return _call_request("tick", (VariantType.JSON, data))


def predict_request(asset: str, horizon_s: int, step_s: int) -> bytes:
    """`predict(asset, horizon, step)`; one for all models."""
    return _call_request(
        "predict",
        (VariantType.STRING, asset.encode()),
        (VariantType.INT, horizon_s.to_bytes(8, "little", signed=True)),
        (VariantType.INT, step_s.to_bytes(8, "little", signed=True)),
    )


def _call_request(method: str, *arguments: tuple[Any, bytes]) -> bytes:
    request = CallRequest(
        methodName=method,
        methodArguments=[
            Argument(position=position, data=Variant(type=kind, value=value))
            for position, (kind, value) in enumerate(arguments, 1)
        ],
    )
    encoded: bytes = request.SerializeToString()
    return encoded


class Connection(DynamicSubclassModelRunner):
    """One model's connection, from a successful Setup until it is closed.

    `fresh` says that Setup made a new instance, which knows nothing yet.
    """

    def __init__(self, base_class: str, *, max_reply_bytes: int, **kwargs: Any) -> None:
        super().__init__(base_class, **kwargs)
        self.setup_timeout = _SETUP_TIMEOUT_S
        self.retry_attempts = _CONNECT_ATTEMPTS
        self.fresh = True
        self.answered = False
        """Whether it has answered well in a round."""
        self.problem: str | None = None
        """Why the last attempt to connect failed, for the host."""
        self._max_reply_bytes = max_reply_bytes
        self._call: Any = None

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
        ours: dict[str, int] = {
            "grpc.max_receive_message_length": self._max_reply_bytes + _REPLY_OVERHEAD_BYTES,
            "grpc.max_send_message_length": -1,
            # No ping with each reply to learn how fast the line is: with the server's own, a third of a call.
            "grpc.http2.bdp_probe": 0,
            "grpc.http2.lookahead_bytes": _AHEAD_BYTES,
            # How long an attempt to connect may take; the pauses between them are the library's.
            "grpc.min_reconnect_backoff_ms": int(_OPENING_S * 1000),
            # TCP's patience, too: after the library's 0.5 s without a network every answer would be lost.
            "grpc.keepalive_timeout_ms": _NETWORK_PATIENCE_MS,
        }
        if self.ip.startswith(("127.", "unix:")):
            ours["grpc.enable_http_proxy"] = 0
        self.grpc_options: list[tuple[str, Any]] = [*{**dict(self.grpc_options), **ours}.items()]

    async def setup(self, grpc_channel: Any) -> tuple[bool, Any]:
        # Replies stay bytes within gRPC: what its own decoding can't read, it would hand on as None.
        call_setup = grpc_channel.unary_unary(f"/{_SERVICE}/Setup", SetupRequest.SerializeToString)
        self._call = grpc_channel.unary_unary(f"/{_SERVICE}/Call")
        try:
            response = SetupResponse.FromString(
                await call_setup(SetupRequest(className=self.base_classname), timeout=self.setup_timeout)
            )
        except AuthError as error:
            self.problem = security.refusal(error)
            raise
        except AioRpcError as error:
            self.problem = f"Setup failed: {_refusal(error, self.setup_timeout)[1]}"
            raise
        except DecodeError:
            self.problem = f"Setup failed: {_NO_MESSAGE}"
            return False, self.ErrorType.FAILED
        except asyncio.CancelledError:
            await _let_scopes_know()
            raise
        code = response.status.code
        self.fresh = "already exists" not in response.status.message
        if code == "SUCCESS":
            return True, None
        self.problem = f"Setup answered {first_line(code)[:40]}: {first_line(response.status.message)}"
        if code == "BAD_IMPLEMENTATION":
            return False, self.ErrorType.BAD_IMPLEMENTATION
        return False, self.ErrorType.FAILED

    async def ask(self, request: CallRequest, timeout_s: float) -> Reply:
        """Call the model and wait at most `timeout_s` (wall). Raises only its caller's cancellation."""
        loop = asyncio.get_running_loop()
        started_s = loop.time()

        def reply(outcome: Outcome, detail: str | None = None, payload: bytes | None = None) -> Reply:
            return Reply(outcome, int((loop.time() - started_s) * 1e6), detail, payload)

        if self._call is None or self.closed:
            return reply(Outcome.UNREACHABLE, "the connection is closed")
        try:
            # gRPC's own deadline is kept by its threads; the outer one holds even if that is late.
            async with asyncio.timeout(timeout_s + 1.0):
                response = CallResponse.FromString(await self._call(request, timeout=timeout_s))
        except AioRpcError as error:
            return reply(*_refusal(error, timeout_s))
        except TimeoutError:
            return reply(Outcome.TIMEOUT, f"no answer within {timeout_s:.1f} s")
        except asyncio.CancelledError:
            await _let_scopes_know()
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            return reply(Outcome.UNREACHABLE, "disconnected during the call")
        except UsageError:
            return reply(Outcome.UNREACHABLE, "the connection is closed")
        except AuthError as error:
            return reply(Outcome.REFUSED, security.refusal(error))
        except DecodeError:
            return reply(Outcome.PROTOCOL, _NO_MESSAGE)
        except Exception as error:  # one model's trouble, whatever it is
            return reply(Outcome.PROTOCOL, f"{type(error).__name__}: {first_line(str(error))}")
        code = response.status.code
        if code == "SUCCESS":
            return reply(*_payload(response.methodResponse))
        detail = first_line(response.status.message)
        if code == "FAILED_PRECONDITION":
            return reply(Outcome.SETUP_MISSING, f"Setup missing: {detail}")
        if code == "BAD_IMPLEMENTATION":
            return reply(Outcome.BAD_IMPLEMENTATION, f"bad implementation: {detail}")
        if code == "MODEL_FAILED":
            raised = detail.removeprefix("The model raised an exception: ")
            return reply(Outcome.MODEL_FAILED, f"the model raised: {raised}")
        if not code:
            return reply(Outcome.PROTOCOL, "the model's server answered without a status code")
        return reply(Outcome.PROTOCOL, f"the model's server answered {first_line(code)[:40]}: {detail}")


async def _let_scopes_know() -> None:
    """To be called where gRPC raised a CancelledError: it raises one of its own in place of the one that was
    delivered, and a cancel scope that does not know it for its own lets it out, up to the task group.
    """
    await checkpoint_if_cancelled()


def _refusal(error: AioRpcError, timeout_s: float) -> tuple[Outcome, str]:
    code, details = error.code(), first_line(error.details() or "")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return Outcome.TIMEOUT, f"no answer within {timeout_s:.1f} s"
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        if "larger than max" in details or "decompress" in details.lower():
            sizes = re.findall(r"\d{3,}", details)
            size = f": {sizes[0]} bytes" if sizes else ""
            return Outcome.TOO_LARGE, f"the answer is too large{size} (predict.max_segment_bytes)"
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


def first_line(text: str) -> str:
    """The start of a text from outside, to be shown or logged."""
    lines = text.strip().splitlines()
    return lines[0][:MAX_NAME_CHARS] if lines else ""


def _name(value: object) -> str:
    """A participant's or model's name: one line, printable, bounded; empty where there is none."""
    if not isinstance(value, str):
        return ""
    return "".join(char for char in value[:MAX_NAME_CHARS] if char.isprintable()).strip()
