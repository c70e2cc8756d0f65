"""uvicorn inside the game: on a socket bound beforehand, without its own signals, logs and exits."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager

import anyio
import uvicorn
from anyio.abc import TaskStatus
from starlette.types import ASGIApp, Receive, Scope, Send

from condor_lite.errors import StartError
from condor_lite.pacer import Pacer
from condor_lite.report.connections import REQUEST_WITHIN_S, SECURITY_HEADERS, Connection, check

_BACKLOG = 1024
_ACCEPTS_A_TURN = 4
_SEND_BUFFER_BYTES = 128 * 1024
_CHECK_EVERY_S = 1.0
_REQUESTS_A_TURN = 4
_GRACE_S = 2  # for requests under way when the server is asked to stop


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0: any free one. Raises StartError with what to do where it can't be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named, asyncio turns Nagle's delay off: 40 ms an answer.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Small, so that a slow client is seen to take something now and then, and costs little.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        sock.bind((host, port))
        sock.listen(_BACKLOG)
        sock.setblocking(False)
    except (OSError, OverflowError) as error:
        sock.close()
        raise StartError(_what_to_do(host, port, error)) from error
    return sock


def _what_to_do(host: str, port: int, error: Exception) -> str:
    code = error.errno if isinstance(error, OSError) else None
    if code == errno.EADDRINUSE:
        return (
            f"report.port {port} is in use on {host}: end the other program, or choose another (0: any free)"
        )
    if code in (errno.EACCES, errno.EPERM):
        return f"report.port {port} needs privileges that this process does not have: choose one above 1023"
    if code == errno.EADDRNOTAVAIL or isinstance(error, socket.gaierror):
        return f"report.host {host} is no address of this machine: 127.0.0.1 is always one, 0.0.0.0 is all"
    return f"report.host {host} and report.port {port} can't be used: {error}"


def _in_turn(app: ASGIApp) -> ASGIApp:
    """Begin few requests in one turn of the event loop: the models' calls have theirs in between."""
    pacer = Pacer(_REQUESTS_A_TURN)

    async def wait(scope: Scope, receive: Receive, send: Send) -> None:
        await pacer.turn()
        await app(scope, receive, send)

    return wait


class _Uvicorn(uvicorn.Server):
    """Leaves the signals to the supervisor, and says when it serves."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.serving = asyncio.Event()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for sock in sockets or ():
            sock.listen(_BACKLOG)  # what asyncio accepts in a turn need not be all that may wait
        self.serving.set()

    async def watch(self) -> None:
        """Cut off slow clients, until cancelled."""
        while True:
            await asyncio.sleep(_CHECK_EVERY_S)
            check(self.server_state.connections, asyncio.get_running_loop().time())  # type: ignore[arg-type]


class Server:
    """Serves one application. `run` may be called again once it has ended: it binds the address anew."""

    def __init__(
        self, app: ASGIApp, sock: socket.socket, before_stop: Callable[[], None] = lambda: None
    ) -> None:
        """`before_stop` ends the answers that have no end of their own."""
        self._app = app
        self._before_stop = before_stop
        self._sock = sock
        self._host: str = sock.getsockname()[0]
        self._server: _Uvicorn | None = None
        self.port: int = sock.getsockname()[1]

    @property
    def url(self) -> str:
        """Where a browser on this machine finds it."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self._host, self._host)  # noqa: S104 - not bound here
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    @property
    def connections(self) -> Set[Connection]:
        """All that are open now."""
        return self._server.server_state.connections if self._server else set()  # type: ignore[return-value]

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Serve until `stop()` or cancelled: both free the port and give requests under way 2 s to end."""
        if self._sock.fileno() == -1:
            self._sock = bind(self._host, self.port)
        server = self._server = _Uvicorn(
            uvicorn.Config(
                _in_turn(self._app),
                http=Connection,
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="error",  # it warns of every client that sends nonsense
                access_log=False,
                proxy_headers=False,
                server_header=False,
                # asyncio tries so often in a turn, also where no descriptors are left, and tells each time.
                backlog=_ACCEPTS_A_TURN,
                headers=list(SECURITY_HEADERS.items()),
                timeout_keep_alive=int(REQUEST_WITHIN_S),
                timeout_graceful_shutdown=_GRACE_S,
            )
        )
        # A task of its own: cancelling serve() would leave the port open.
        serving = asyncio.create_task(server.serve([self._sock]), name="uvicorn")
        started = asyncio.create_task(server.serving.wait(), name="uvicorn-started")
        watching = asyncio.create_task(server.watch(), name="uvicorn-watch")
        try:
            await asyncio.wait({serving, started}, return_when=asyncio.FIRST_COMPLETED)
            if server.serving.is_set():
                task_status.started()
            await asyncio.wait({serving})
        finally:
            self.stop()
            started.cancel()
            with anyio.CancelScope(shield=True):
                await asyncio.wait({serving})
            watching.cancel()
            await asyncio.wait({started, watching})
        serving.result()

    def stop(self) -> None:
        """Take no more requests; `run` ends when those under way are answered."""
        if self._server is not None:
            self._before_stop()
            self._server.should_exit = True
