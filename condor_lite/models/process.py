"""One model process, from the start of its interpreter to the end of its process group."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import secrets
import shutil
import signal
import site
import socket
import sys
from collections.abc import Set
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from subprocess import DEVNULL
from typing import BinaryIO

import anyio
import grpc
from anyio.abc import Process
from grpc_health.v1 import health_pb2, health_pb2_grpc
from model_runner_client.grpc.generated.dynamic_subclass_pb2 import SetupRequest
from model_runner_client.grpc.generated.dynamic_subclass_pb2_grpc import DynamicSubclassServiceStub

from condor_lite.config import OrchestratorConfig
from condor_lite.models import sandbox
from condor_lite.models.folder import ModelFolder
from condor_lite.models.guard import MARK, end_marked
from condor_lite.models.limits import Limits
from condor_lite.models.output import cap

LOG_BYTES = 1_000_000

_PORT_TIMEOUT_S = 60.0
_PACKAGE_ROOT = Path(__file__).resolve().parents[2]
_PASSED_ON = (
    "PATH",
    "HOME",
    "LANG",
    "LC_ALL",
    "LC_CTYPE",
    "TZ",
    "LD_LIBRARY_PATH",
    "SSL_CERT_FILE",
)
_uids = itertools.cycle(range(40_000, 60_000))  # of sandboxed models, where the game is run by root

_SIGNALLED = 128  # plus the signal: how bubblewrap ends where its program was killed
_SINGLE_THREADED = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")


class LaunchError(Exception):
    """A model's process could not be brought to serve. `final`: the same code will fail again."""

    def __init__(self, reason: str, *, final: bool = False) -> None:
        self.final = final
        super().__init__(reason)


class Guard:
    """The process that ends what is left of the models when this one is killed (guard.py)."""

    def __init__(self) -> None:
        self._process: Process | None = None
        self._pipe = -1

    async def __aenter__(self) -> Guard:
        command = [sys.executable, "-I", "-S", str(Path(__file__).with_name("guard.py"))]
        read_end, self._pipe = os.pipe()
        try:
            self._process = await anyio.open_process(
                command, stdin=read_end, stdout=DEVNULL, stderr=DEVNULL, start_new_session=True, env={}
            )
        finally:
            os.close(read_end)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        os.close(self._pipe)
        if self._process:
            with anyio.CancelScope(shield=True):
                await self._process.wait()

    def add(self, group: int, mark: str) -> None:
        self._tell(f"+{group} {mark}\n")

    def forget(self, group: int, mark: str) -> None:
        self._tell(f"-{group} {mark}\n")

    def _tell(self, line: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # somebody killed it; the kernel still ends the hosts
            os.write(self._pipe, line.encode())


@dataclass(frozen=True, slots=True)
class LaunchSettings:
    """What every model process of a game has in common. Times are wall seconds.

    `rules` says what a model may use; of the `hidden` folders a sandbox shows nothing but the model's own.
    """

    base_class: str
    log_dir: Path
    guard: Guard
    starting: anyio.Semaphore  # bounds how many interpreters start at once; no model code runs under it
    setup_timeout_s: float
    stop_grace_s: float
    rules: OrchestratorConfig = field(default_factory=OrchestratorConfig)
    hidden: tuple[Path, ...] = ()

    @property
    def temp_dir(self) -> Path:
        """Where models outside a sandbox have a folder each."""
        return self.log_dir.with_name("models-tmp")


class ModelProcess:
    """A running host (host.py), set up and answering. Made by `launch`."""

    def __init__(
        self,
        source: ModelFolder,
        deployment_id: str,
        process: Process,
        mark: str,
        control: socket.socket,
        settings: LaunchSettings,
    ) -> None:
        self.source = source
        self.deployment_id = deployment_id
        self.ip = "127.0.0.1"
        self.port = 0
        self._inside: int | None = None
        self._mark = mark
        self._process = process
        self._settings = settings
        self._control = control

    @property
    def pid(self) -> int:
        return self._process.pid

    async def wait(self) -> str:
        """Return when the process has ended; says how it ended."""
        rules = self._settings.rules
        how, number = _ending(await self._process.wait(), sandboxed=rules.sandbox)
        if number == signal.SIGXCPU:
            how += f": more than {rules.model_cpu_s} s of a processor since its last call began"
        last_line = await anyio.to_thread.run_sync(_last_words, log_path(self._settings, self.source))
        return f"{how} ({last_line})" if last_line else how

    async def stop(self) -> None:
        """End the process and all that it started: SIGTERM, SIGKILL after the grace. Not to be cancelled."""
        with anyio.CancelScope(shield=True):
            if self._inside and self._process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._inside, signal.SIGKILL)  # so that bwrap collects it, and no zombie is left
            else:
                self._signal(signal.SIGTERM)
            with anyio.move_on_after(self._settings.stop_grace_s):
                await self._process.wait()
            self._signal(signal.SIGKILL)
            await self._process.wait()
            if not self._settings.rules.sandbox:  # whose end is the end of all in it
                await anyio.to_thread.run_sync(_clear_away, self._mark, self._settings.temp_dir)
            self._settings.guard.forget(self.pid, self._mark)
            self._control.close()

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    async def _read_port(self) -> None:
        line = b""
        with anyio.move_on_after(_PORT_TIMEOUT_S):
            line = await asyncio.get_running_loop().sock_recv(self._control, 64)
            if not line:
                raise LaunchError(f"its process did not start: {await self.wait()}")
        if not line:
            raise LaunchError(f"its process did not serve within {_PORT_TIMEOUT_S:g} s")
        self.port = int(line)
        if self._settings.rules.sandbox:
            # "ip:port" is what clients of the protocol dial, and gRPC takes "unix:/path:1" as such.
            try:
                self._inside = sandbox.first_inside(self.pid)
            except (OSError, IndexError):
                raise LaunchError(f"its sandbox has ended: {await self.wait()}") from None
            self.ip = f"unix:/proc/{self._inside}/root{sandbox.socket_path(self._mark)}"

    async def _probe(self) -> None:
        """Health check, then Setup, so that a broken model is known before anybody is told of it."""
        timeout_s = self._settings.setup_timeout_s
        options = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(f"{self.ip}:{self.port}", options=options) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            setup = DynamicSubclassServiceStub(channel).Setup
            try:
                await health.Check(health_pb2.HealthCheckRequest(), timeout=timeout_s, wait_for_ready=True)
                response = await setup(SetupRequest(className=self._settings.base_class), timeout=timeout_s)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                    reason = f"importing and creating the model took longer than {timeout_s:g} s"
                    raise LaunchError(reason) from None
                with anyio.move_on_after(1):
                    raise LaunchError(f"its process ended in Setup: {await self.wait()}") from None
                raise LaunchError(f"Setup failed: {error.code().name} {error.details()}") from None
        status = response.status
        if status.code != "SUCCESS":
            raise LaunchError(status.message or status.code, final=status.code == "BAD_IMPLEMENTATION")


async def launch(source: ModelFolder, deployment_id: str, settings: LaunchSettings) -> ModelProcess:
    """Start a model and set it up. Raises LaunchError; leaves no process behind then, nor when cancelled.

    To be called on the event loop's thread: the kernel ends the process with the thread that started it.
    """
    model: ModelProcess | None = None
    try:
        async with settings.starting:
            model = await _spawn(source, deployment_id, settings)
            await model._read_port()
        await model._probe()
    except BaseException:
        if model:
            await model.stop()
        raise
    return model


async def _spawn(source: ModelFolder, deployment_id: str, settings: LaunchSettings) -> ModelProcess:
    control, theirs = socket.socketpair()
    mark = secrets.token_hex(12)
    try:
        control.setblocking(False)
        with theirs, anyio.CancelScope(shield=True):  # a process that nobody knows of could not be ended
            process = await _open_process(source, deployment_id, settings, mark, theirs)
    except OSError as error:
        control.close()
        shutil.rmtree(settings.temp_dir / mark, ignore_errors=True)
        raise LaunchError(f"its process can't be started: {error}") from None
    settings.guard.add(process.pid, mark)
    return ModelProcess(source, deployment_id, process, mark, control, settings)


async def _open_process(
    source: ModelFolder, deployment_id: str, settings: LaunchSettings, mark: str, control: socket.socket
) -> Process:
    rules, path = settings.rules, log_path(settings, source)
    limits = Limits(
        memory_bytes=rules.model_memory_bytes,
        disk_bytes=rules.model_disk_bytes,
        processes=rules.model_processes,
        cpu_s=rules.model_cpu_s,
        sandboxed=rules.sandbox,
        uid=next(_uids) if rules.sandbox and os.geteuid() == 0 else None,
    )
    if rules.sandbox:
        wrapped = sandbox.command(source.path, settings.hidden, rules.model_disk_bytes)
        address, parent, temp = f"unix:{sandbox.socket_path(mark)}:1", 0, Path("/tmp")  # noqa: S108
    else:
        wrapped, address, parent, temp = [], "127.0.0.1:0", os.getpid(), settings.temp_dir / mark
        temp.mkdir(parents=True, mode=0o700)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as log:
        _head(log, path, f"deployment {deployment_id}")
        return await anyio.open_process(
            [
                *wrapped,
                *(sys.executable, "-P", "-m", "condor_lite.models.host"),
                *(str(source.path), str(control.fileno()), str(parent), str(path), str(LOG_BYTES)),
                *(address, json.dumps(asdict(limits))),
            ],
            stdin=DEVNULL,
            stdout=log,
            stderr=log,
            cwd=source.path,
            env=_environment(mark, temp, sandboxed=rules.sandbox),
            pass_fds=(control.fileno(),),
            start_new_session=True,
        )


def log_path(settings: LaunchSettings, source: ModelFolder) -> Path:
    """Where a model's own output goes."""
    return settings.log_dir / f"{source.model_id}.log"


def note(settings: LaunchSettings, source: ModelFolder, reason: str) -> None:
    """Tell the participant in the model's log what the game has to say of it."""
    path = log_path(settings, source)
    with contextlib.suppress(OSError), path.open("a+b") as log:
        _head(log, path, f"not running: {reason}")


def forget_logs(folder: Path, models: Set[str], before_s: float) -> None:
    """Delete the logs that were last written to before that time (wall), but for those of these models."""
    for path in [*folder.glob("*.log"), *folder.glob("*.log.1")]:
        with contextlib.suppress(OSError):
            gone = path.name.removesuffix(".1").removesuffix(".log") not in models
            if gone and path.stat().st_mtime < before_s:
                path.unlink()


def _head(log: BinaryIO, path: Path, what: str) -> None:
    """A line of the game's own. Also caps what processes left that did not live to do it."""
    cap(log.fileno(), path, LOG_BYTES)
    log.write(f"--- {datetime.now(UTC):%Y-%m-%d %H:%M:%S} {what}\n".encode())
    log.flush()


def _environment(mark: str, temp: Path, *, sandboxed: bool) -> dict[str, str]:
    """What a model may see of the environment: no secrets of the host's, and one thread for numerics."""
    environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and not sandboxed]
    if str(_PACKAGE_ROOT) not in (*site.getsitepackages(), site.getusersitepackages()):
        paths.insert(0, str(_PACKAGE_ROOT))  # run from a checkout
    if sandboxed:
        environment |= {"HOME": str(temp), "USER": "model", "PYTHONUSERBASE": site.getuserbase()}
    else:
        environment[MARK] = mark
    if paths:
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    return {
        **environment,
        **dict.fromkeys(_SINGLE_THREADED, "1"),
        "TMPDIR": str(temp),
        "GRPC_VERBOSITY": "NONE",
        "GRPC_ENABLE_FORK_SUPPORT": "0",  # what a model forks does not serve; its threads would be made anew
        "PYTHONFAULTHANDLER": "1",
        "PYTHONIOENCODING": "utf-8:backslashreplace",
    }


def _clear_away(mark: str, temp_dir: Path) -> None:
    end_marked([mark])
    with contextlib.suppress(RecursionError):  # folders in folders in folders
        shutil.rmtree(temp_dir / mark, ignore_errors=True)


def _ending(code: int, *, sandboxed: bool) -> tuple[str, int]:
    """In words, and the signal, 0 for none. Of a sandbox a model may give us any code that it likes."""
    number = code - _SIGNALLED if sandboxed and code > _SIGNALLED else -code
    if number > 0 and number in signal.valid_signals():
        named = signal.Signals(number).name if number in list(signal.Signals) else f"signal {number}"
        return f"killed by {named}", number
    return f"ended with exit code {code}", 0


def _last_words(path: Path) -> str:
    """The last line that the model itself wrote, such as the end of a traceback."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 2000))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return "" if last.startswith("---") or " INFO condor_lite.host: " in last else last[:300]
