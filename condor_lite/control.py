"""The control socket: the only way into a running game that changes anything.

A Unix socket beside the database, for its owner alone. A connection carries one request and one answer, each
a line of JSON: `{"command": "pause", "arguments": {"model_id": "x"}}`, and `{"result": ...}` or
`{"error": "a sentence"}`.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import socket
import stat
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import orjson
import structlog

from condor_lite.errors import CondorError
from condor_lite.storage.lock import lock_holder

log = structlog.get_logger()

_MOST_CLIENTS = 16
_MOST_REQUEST_BYTES = 64 * 1024
_MOST_ANSWER_BYTES = 64 * 2**20
_REQUEST_WITHIN_S = 5.0
_TAKEN_WITHIN_S = 10.0
_ANSWER_WITHIN_S = 60.0
_MOST_PATH_BYTES = 107  # what a socket's address holds; longer ones go through the folder's descriptor

Command = Callable[..., Awaitable[object]]


class ControlError(CondorError):
    """The running game could not be told, or refused what it was told."""


class NoGame(ControlError):
    """No game runs on this database."""

    def __init__(self, database: Path) -> None:
        super().__init__(
            f"no game is running on {database}; start it, or name the one you mean with --config FILE"
        )


class _Request(msgspec.Struct, forbid_unknown_fields=True):
    command: str
    arguments: dict[str, str | int | float | bool | None] = {}


def socket_path(database: Path) -> Path:
    return database.with_name(database.name + ".sock")


class Control:
    """Serves `commands` by name; their arguments come by keyword, their results go out as JSON.

    Whoever holds the database's lock may replace a socket that a killed game left behind.
    """

    def __init__(
        self,
        database: Path,
        commands: Mapping[str, Command],
        *,
        request_within_s: float = _REQUEST_WITHIN_S,
        taken_within_s: float = _TAKEN_WITHIN_S,
    ) -> None:
        self._path = socket_path(database.resolve())
        self._commands = commands
        self._request_within_s = request_within_s
        self._taken_within_s = taken_within_s
        self._clients: set[asyncio.Task[None]] = set()
        self.listening = asyncio.Event()

    async def run(self) -> None:
        """Serve until cancelled. Raises ControlError where the socket can't be made."""
        listener = _bind(self._path)
        try:
            server = await asyncio.start_server(self._serve, sock=listener, limit=_MOST_REQUEST_BYTES)
            self.listening.set()
            try:
                await asyncio.Event().wait()
            finally:
                self.listening.clear()
                server.close()
                for client in self._clients:
                    client.cancel()
                await asyncio.gather(*self._clients, return_exceptions=True)
        finally:
            listener.close()
            self._path.unlink(missing_ok=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One client; whatever it does, only its own connection ends."""
        task = asyncio.current_task()
        assert task is not None
        too_many = len(self._clients) >= _MOST_CLIENTS
        self._clients.add(task)
        try:
            if too_many:
                answer = _error("too many commands at once; try again")
            else:
                async with asyncio.timeout(self._request_within_s):
                    line = await reader.readline()
                answer = await self._answer(line)
            writer.write(answer + b"\n")
            async with asyncio.timeout(self._taken_within_s):
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        except asyncio.CancelledError:
            pass  # only `run` cancels it, at the end; asyncio would call that an error
        except (OSError, TimeoutError, ValueError) as error:  # gone, silent or slow, or too long a line
            log.debug("control_client_dropped", error=f"{type(error).__name__}: {error}")
        finally:
            writer.transport.abort()
            self._clients.discard(task)

    async def _answer(self, line: bytes) -> bytes:
        try:
            request = msgspec.json.decode(line, type=_Request)
            command = self._commands.get(request.command)
            if command is None:
                known = ", ".join(self._commands)
                return _error(f"unknown command {request.command[:40]!r}; this game knows {known}")
            inspect.signature(command).bind(**request.arguments)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, TypeError) as error:
            return _error(f"not a request: {error}")
        try:
            answer = orjson.dumps({"result": await command(**request.arguments)})
        except CondorError as error:
            return _error(str(error))
        except Exception as error:
            log.exception("control_command_failed", command=request.command)
            return _error(f"the game failed to do it ({type(error).__name__}); its log says more")
        log.debug("control_command", command=request.command, **{"with": request.arguments})
        return answer


def call(
    database: Path, command: str, *, within_s: float = _ANSWER_WITHIN_S, **arguments: str | int | float | None
) -> Any:
    """Have the game that runs on `database` carry out a command; its result.

    Raises NoGame where none is running, ControlError with what it said or why it could not be asked.
    """
    database = database.resolve()
    path = socket_path(database)
    deadline_s = time.monotonic() + within_s
    received = bytearray()
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(within_s)
            with _address(path) as address:
                connection.connect(address)
            connection.sendall(orjson.dumps({"command": command, "arguments": arguments}) + b"\n")
            while not received.endswith(b"\n"):
                connection.settimeout(max(deadline_s - time.monotonic(), 0.001))
                chunk = connection.recv(1 << 20)
                if not chunk or len(received) > _MOST_ANSWER_BYTES:
                    raise ControlError("the game ended before it had answered")
                received += chunk
    except TimeoutError:
        raise ControlError(f"{_holder(database)} does not answer within {within_s:.0f} s") from None
    except PermissionError:
        raise ControlError(
            f"permission denied: {path} is for the user who runs the game; run this as the same user"
        ) from None
    except (FileNotFoundError, ConnectionRefusedError):
        if lock_holder(database) is None:
            raise NoGame(database) from None
        raise ControlError(
            f"{_holder(database)} runs, but does not listen on {path}: it is starting, ending, or has "
            "trouble that its log names"
        ) from None
    except OSError as error:
        raise ControlError(f"the game could not be asked: {error.strerror or error}") from None
    try:
        answer = orjson.loads(received)
        if "error" in answer:
            raise ControlError(str(answer["error"]))
        return answer["result"]
    except (ValueError, KeyError, TypeError):
        raise ControlError(f"{path} answers, but not as this version of condor_lite does") from None


def _holder(database: Path) -> str:
    pid = lock_holder(database)
    return f"the game (pid {pid})" if pid else "the game"


def _error(sentence: str) -> bytes:
    return orjson.dumps({"error": sentence.encode("utf-8", "replace").decode()})


def _bind(path: Path) -> socket.socket:
    """A listening socket at `path`, for its owner alone from the first moment."""
    try:
        if stat.S_ISSOCK(path.lstat().st_mode):
            path.unlink()  # left by a game that was killed: we hold the lock
    except FileNotFoundError:
        pass
    except OSError as error:
        raise ControlError(f"can't replace {path} ({error.strerror})") from error
    listener = socket.socket(socket.AF_UNIX)
    try:
        os.fchmod(listener.fileno(), 0o600)  # Linux makes the file with the socket's own mode
        with _address(path) as address:
            listener.bind(address)
        path.chmod(0o600)
        listener.listen(_MOST_CLIENTS)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise ControlError(
            f"can't make the control socket {path} ({error.strerror or error}); "
            "move what is in its way, or choose another storage.path"
        ) from error
    except BaseException:
        listener.close()
        raise
    return listener


@contextlib.contextmanager
def _address(path: Path) -> Iterator[str]:
    """`path` as a socket's address, by way of its folder's descriptor where it is too long for one."""
    if len(os.fsencode(path)) <= _MOST_PATH_BYTES:
        yield str(path)
        return
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        short = f"/proc/self/fd/{folder}/{path.name}"
        if len(os.fsencode(short)) > _MOST_PATH_BYTES:
            raise ControlError(f"{path.name} is too long a name for a socket; choose a shorter storage.path")
        yield short
    finally:
        os.close(folder)
