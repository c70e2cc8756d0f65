"""A model's own process: a gRPC server with the public model runner's service, for the code in one folder.

    python -m condor_lite.models.host FOLDER CONTROL_FD PARENT_PID LOG_FILE LOG_BYTES ADDRESS LIMITS

It serves at ADDRESS, tells its parent its port over the socket CONTROL_FD, and ends when that socket closes
or the parent dies (PARENT_PID 0: it is in a sandbox, which ends with the parent). The model's output goes to
LOG_FILE, whose content is moved to LOG_FILE.1 before it passes LOG_BYTES. LIMITS is a `Limits` as JSON.
Everything imported here is paid for by every model's start: nothing heavier than gRPC.
"""

from __future__ import annotations

import ctypes
import io
import json
import logging
import os
import signal
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import orjson
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from model_runner_client.grpc.generated import dynamic_subclass_pb2_grpc as service
from model_runner_client.grpc.generated.commons_pb2 import (
    Argument,
    KwArgument,
    Status,
    Variant,
    VariantType,
)
from model_runner_client.grpc.generated.dynamic_subclass_pb2 import (
    CallRequest,
    CallResponse,
    RestResponse,
    SetupRequest,
    SetupResponse,
)

from condor_lite.models.limits import Limits
from condor_lite.models.loader import BadImplementationError, describe, load, own_traceback
from condor_lite.models.output import cap

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

log = logging.getLogger("condor_lite.host")

_MAX_MESSAGE_BYTES = 64 * 1024 * 1024  # the public server's; the history of the first tick takes megabytes
_LOG_CHECK_S = 5.0
_PR_SET_PDEATHSIG = 1


class ModelServicer(service.DynamicSubclassServiceServicer):  # type: ignore[misc]
    """Sets the model up and calls it, one call at a time; a second one is refused with RESOURCE_EXHAUSTED."""

    def __init__(self, folder: Path, limits: Limits) -> None:
        self._folder = folder
        self._limits = limits
        self._busy = threading.Lock()
        self._model: object | None = None

    def Setup(self, request: SetupRequest, context: grpc.ServicerContext) -> SetupResponse:  # noqa: N802
        return SetupResponse(status=self._exclusively(context, lambda: self._setup(request)))

    def Call(self, request: CallRequest, context: grpc.ServicerContext) -> CallResponse:  # noqa: N802
        response: CallResponse = self._exclusively(context, lambda: self._call(request))
        return response

    def Rest(self, request: object, context: grpc.ServicerContext) -> RestResponse:  # noqa: N802
        return RestResponse(status=self._exclusively(context, self._reset))

    def _exclusively(self, context: grpc.ServicerContext, work: Callable[[], Any]) -> Any:
        if not self._busy.acquire(blocking=False):
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "Server busy")
        try:
            self._limits.renew_cpu()
            return work()
        finally:
            self._busy.release()

    def _setup(self, request: SetupRequest) -> Status:
        if self._model is not None:
            return Status(code="SUCCESS", message="Instance already exists")
        base_class = request.className.strip()
        if not base_class:
            return Status(code="INVALID_ARGUMENT", message="class_name cannot be empty")
        try:
            args, kwargs = _arguments(request.instanceArguments, request.instanceKwArguments)
            self._model = load(self._folder, base_class, args, kwargs)
        except BadImplementationError as error:
            log.error("this is no model: %s", error)
            return Status(code="BAD_IMPLEMENTATION", message=str(error))
        except BaseException as error:
            log.error("the model could not be created\n%s", own_traceback(error, self._folder))
            code = "BAD_IMPLEMENTATION" if isinstance(error, ImportError) else "SETUP_FAILED"
            return Status(code=code, message=describe(error, self._folder))
        return Status(code="SUCCESS", message="Instance created successfully")

    def _call(self, request: CallRequest) -> CallResponse:
        name = request.methodName
        if self._model is None:
            return _refused("FAILED_PRECONDITION", "Setup has not been called yet")
        if not name:
            return _refused("INVALID_ARGUMENT", "methodName cannot be empty")
        method = getattr(self._model, name, None)
        if not callable(method):
            return _refused(
                "BAD_IMPLEMENTATION", f'Method "{name}" not found in class "{type(self._model).__name__}"'
            )
        try:
            args, kwargs = _arguments(request.methodArguments, request.methodKwArguments)
            result = encode(method(*args, **_accepted(method, kwargs)))
        except BaseException as error:
            # Also SystemExit: in this thread it would end nothing, and leave the caller without an answer.
            log.error("%s failed\n%s", name, own_traceback(error, self._folder))
            return _refused("MODEL_FAILED", f"The model raised an exception: {describe(error, self._folder)}")
        return CallResponse(status=Status(code="SUCCESS", message=""), methodResponse=result)

    def _reset(self) -> Status:
        had_one, self._model = self._model is not None, None
        return Status(
            code="SUCCESS",
            message="Instance successfully reset" if had_one else "No instance exists to reset",
        )


def encode(value: object) -> Variant | None:
    """What a method returned, in the public runner's encoding; None for None.

    Raises ValueError for what has no encoding, OverflowError for an integer of more than 8 bytes. NaN and
    Infinity pass as `json.dumps` writes them: judging an answer is not the host's business.
    """
    if value is None:
        return None
    if isinstance(value, float):
        return Variant(type=VariantType.DOUBLE, value=struct.pack("d", value))
    if isinstance(value, int):
        return Variant(type=VariantType.INT, value=value.to_bytes(8, "little", signed=True))
    if isinstance(value, str):
        return Variant(type=VariantType.STRING, value=value.encode())
    if isinstance(value, dict | list):
        try:
            text = json.dumps(value, separators=(",", ":"))
        except TypeError as error:
            raise ValueError(f"the answer can't be written as JSON: {error}") from None
        return Variant(type=VariantType.JSON, value=text.encode())
    pandas = sys.modules.get("pandas")  # a DataFrame can only come from a model that imported it
    if pandas is not None and isinstance(value, pandas.DataFrame):
        buffer = io.BytesIO()
        value.to_parquet(buffer)
        return Variant(type=VariantType.PARQUET, value=buffer.getvalue())
    raise ValueError(f"an answer must be a list, dict, number, text or None, not {type(value).__name__}")


def decode(variant: Variant) -> Any:
    """An argument's value. Raises ValueError on an unknown type or broken bytes."""
    kind, value = variant.type, variant.value
    if kind == VariantType.JSON:
        return orjson.loads(value)
    if kind == VariantType.STRING:
        return value.decode()
    if kind == VariantType.INT:
        return int.from_bytes(value, "little", signed=True)
    if kind == VariantType.DOUBLE:
        return struct.unpack("d", value)[0]
    if kind == VariantType.NONE:
        return None
    if kind == VariantType.PARQUET:
        import pandas as pd  # type: ignore[import-untyped]

        return pd.read_parquet(io.BytesIO(value))
    raise ValueError(f"unsupported data type {kind}")


def _arguments(args: Iterable[Argument], kwargs: Iterable[KwArgument]) -> tuple[list[Any], dict[str, Any]]:
    ordered = sorted(args, key=lambda argument: argument.position)
    return [decode(argument.data) for argument in ordered], {
        item.keyword: decode(item.data) for item in kwargs
    }


def _accepted(method: Callable[..., Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments that the method knows: a game may send more than a model cares for."""
    if not kwargs:
        return kwargs
    import inspect

    known = inspect.signature(method).parameters
    return {name: value for name, value in kwargs.items() if name in known}


def _refused(code: str, message: str) -> CallResponse:
    return CallResponse(status=Status(code=code, message=message))


class CappedLog(io.RawIOBase):
    """The process's output, kept to two files of `limit` bytes. A full disk loses lines, not calls."""

    def __init__(self, path: Path, limit: int) -> None:
        self._path = path
        self._limit = limit
        self._lock = threading.Lock()

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return 1

    def write(self, data: ReadableBuffer, /) -> int:
        chunk = bytes(data)
        kept = chunk[-self._limit :]
        with self._lock, suppress(OSError):
            cap(1, self._path, self._limit, len(kept))
            os.write(1, kept)
        return len(chunk)

    def check(self) -> None:
        """To be called now and then, for what C code and other processes write by themselves."""
        with self._lock, suppress(OSError):
            cap(1, self._path, self._limit)


def start_server(folder: Path, address: str, limits: Limits) -> tuple[grpc.Server, int]:
    """Serve the model in `folder`; returns the port, too, which is 1 for a Unix socket."""
    server = grpc.server(
        ThreadPoolExecutor(max_workers=4, thread_name_prefix="model"),
        options=[
            ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
            ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
            ("grpc.so_reuseport", 0),
            ("grpc.http2.bdp_probe", 0),  # no ping to measure a line that never leaves the machine
        ],
    )
    checks = health.HealthServicer(
        experimental_non_blocking=True, experimental_thread_pool=ThreadPoolExecutor(1)
    )
    checks.set("", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    service.add_DynamicSubclassServiceServicer_to_server(ModelServicer(folder, limits), server)
    port = server.add_insecure_port(address)
    server.start()
    return server, port


def end_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when the thread that started it ends, however it ends (Linux)."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:  # it died before prctl took effect
        os._exit(1)


def main(argv: list[str]) -> None:
    """Serve until the parent closes the control socket. SIGTERM ends the process at once, without a word."""
    folder, control_fd, parent_pid, log_path, log_bytes, address, limits_json = argv
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the game; it ends its models itself
    if int(parent_pid):
        end_with_parent(int(parent_pid))
    limits = Limits(**json.loads(limits_json))
    limits.apply()
    output = CappedLog(Path(log_path), int(log_bytes))
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(output), "utf-8", "backslashreplace", line_buffering=True)
    sys.stderr = io.TextIOWrapper(io.BufferedWriter(output), "utf-8", "backslashreplace", line_buffering=True)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    sys.dont_write_bytecode = True  # a redeployment within a second would be taken for the cached old code
    control = socket.socket(fileno=int(control_fd))
    _server, port = start_server(Path(folder), address, limits)
    control.sendall(f"{port}\n".encode())
    control.settimeout(_LOG_CHECK_S)
    while True:
        try:
            if not control.recv(64):
                break
        except TimeoutError:
            output.check()
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1:])
