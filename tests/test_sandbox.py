"""What contains a local model: limits for every one, and bubblewrap's sandbox where it is asked for."""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

import anyio
import grpc
import psutil
import pytest
from model_runner_client.grpc.generated.commons_pb2 import VariantType
from model_runner_client.grpc.generated.dynamic_subclass_pb2_grpc import DynamicSubclassServiceStub

from condor_lite.check import obstacles
from condor_lite.config import OrchestratorConfig
from condor_lite.models import guard, sandbox
from condor_lite.models.folder import read_model
from condor_lite.models.process import LOG_BYTES, Guard, LaunchSettings, launch
from tests.test_host import BASE, MODELS, Host
from tests.test_orchestrator import (
    RUNNING,
    add_model,
    config_in,
    eventually,
    number,
    orchestrating,
    real_client,
    text,
    until,
)

pytestmark = pytest.mark.anyio

TIGHT = OrchestratorConfig(
    model_memory_bytes=1 << 29, model_processes=40, model_cpu_s=60, model_disk_bytes=20 << 20
)

_problem = sandbox.problem(TIGHT.model_disk_bytes)
needs_sandbox = pytest.mark.skipif(  # where it must work, a sandbox that doesn't is a failure
    _problem is not None and os.environ.get("CI") != "true", reason=str(_problem)
)
either_way = pytest.mark.parametrize(
    "boxed", [False, pytest.param(True, marks=needs_sandbox)], ids=["plain", "sandbox"]
)


class Hostile(Host):
    async def value(self, method, *args):
        status, answer = await self.call(method, *args)
        assert status.code == "SUCCESS", status
        if answer.type == VariantType.INT:
            return int.from_bytes(answer.value, "little", signed=True)
        return json.loads(answer.value) if answer.type == VariantType.JSON else answer.value.decode()


@asynccontextmanager
async def hosting(tmp_path, boxed, **rules):
    folder = tmp_path / "models" / "hostile"
    shutil.copytree(MODELS / "hostile", folder)
    rules = replace(TIGHT, sandbox=boxed, **rules)
    data = tmp_path / "data"
    async with Guard() as watching:
        settings = LaunchSettings(
            *(BASE, data / "models-log", watching, anyio.Semaphore(8), 100.0, 0.5),
            rules=rules,
            hidden=(data, folder.parent),
        )
        process = await launch(read_model(folder), "hostile_1", settings)
        try:
            async with grpc.aio.insecure_channel(f"{process.ip}:{process.port}") as channel:
                stub = DynamicSubclassServiceStub(channel)
                yield Hostile(process, stub, data / "models-log" / "hostile.log")
        finally:
            await process.stop()


def with_argument(token):
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if token in process.cmdline():
                found.append(process)
    return found


@either_way
async def test_memory_files_and_core_dumps_are_limited(tmp_path, boxed):
    async with hosting(tmp_path, boxed) as host:
        assert 0 < await host.value("hog") <= 512
        assert 0 < await host.value("hog_shared") <= 4 * 512
        assert 0 < await host.value("grow") <= 20
        assert await host.value("limit", "RLIMIT_CORE") == [0, 0]
        assert await host.value("predict", "BTC", 60, 10) == []  # none of which has hurt the model itself


@either_way
async def test_a_model_sees_neither_the_environment_nor_the_descriptors_of_the_game(
    tmp_path, boxed, monkeypatch
):
    monkeypatch.setenv("CONDOR_LITE__FEED__API_KEY", "a-secret")
    with (tmp_path / "held-by-the-game").open("w") as held:
        os.set_inheritable(held.fileno(), True)
        async with hosting(tmp_path, boxed) as host:
            own = psutil.Process(host.process.pid)
            assert "a-secret" not in str([p.environ() for p in [own, *own.children(recursive=True)]])
            assert not [name for name in await host.value("descriptors") if "held-by" in name]


@either_way
async def test_a_temp_folder_of_its_own_that_goes_with_it(tmp_path, boxed):
    async with hosting(tmp_path, boxed) as host:
        await host.value("grow")
        made = list((tmp_path / "data").glob("models-tmp/*/big"))
        assert len(made) == (0 if boxed else 1)
    assert not list((tmp_path / "data").glob("models-tmp/*"))


@either_way
async def test_what_left_the_process_group_and_ignores_sigterm_ends_with_the_model(tmp_path, boxed):
    token = secrets.token_hex(8)
    async with hosting(tmp_path, boxed) as host:
        await host.value("ignore_sigterm")
        await host.value("escape", token)
        assert len(with_argument(token)) == 1
    await eventually(lambda: not with_argument(token))


@either_way
async def test_processor_time_is_limited_from_call_to_call(tmp_path, boxed):
    async with hosting(tmp_path, boxed, model_cpu_s=1) as host:
        for _ in range(3):
            assert await host.value("burn", 0.7) == "burnt"
        with pytest.raises(grpc.aio.AioRpcError):
            await host.value("burn", 600)
        with anyio.fail_after(60):
            assert "killed by SIGXCPU: more than 1 s of a processor" in await host.process.wait()


@either_way
@pytest.mark.parametrize("code", [1, 200])
async def test_any_end_is_put_into_words(tmp_path, boxed, code):
    async with hosting(tmp_path, boxed) as host:
        with pytest.raises(grpc.aio.AioRpcError):
            await host.value("leave", code)
        assert await host.process.wait() == f"ended with exit code {code}"


async def test_a_nameless_signal_is_put_into_words(tmp_path):
    async with hosting(tmp_path, False) as host:
        os.kill(host.process.pid, 40)
        assert await host.process.wait() == "killed by signal 40"


@either_way
async def test_the_log_stays_small_and_keeps_the_last_line(tmp_path, boxed):
    async with hosting(tmp_path, boxed) as host:
        await host.value("chatter")
        assert host.log.stat().st_size <= LOG_BYTES + 20_000
        kept = [path.read_text() for path in host.log.parent.glob("hostile.log*")]
        assert "the last line" in "".join(kept)


def test_the_guard_ends_what_left_its_group():
    mark = secrets.token_hex(8)
    strayed = subprocess.Popen(["sleep", "600"], env={**os.environ, guard.MARK: mark}, start_new_session=True)
    innocent = subprocess.Popen(["sleep", "600"], env={**os.environ, guard.MARK: "another"})
    dead = subprocess.Popen(["true"])
    dead.wait()
    lines = f"+{dead.pid} {mark}\n+{innocent.pid} another\n-{innocent.pid} another\n"
    try:
        subprocess.run([sys.executable, "-I", "-S", guard.__file__], input=lines, text=True, check=True)
        assert strayed.wait(60) == -signal.SIGKILL
        assert innocent.poll() is None
    finally:
        for process in (strayed, innocent):
            process.kill()
            process.wait()


@needs_sandbox
async def test_a_fork_bomb_is_bounded_and_ends_with_the_sandbox(tmp_path):
    async with hosting(tmp_path, True) as host:
        own = psutil.Process(host.process.pid)
        try:
            assert await host.value("bomb") == "bounded"
        except grpc.aio.AioRpcError:  # its server died of it: no thread was left to serve with
            assert len(own.children(recursive=True)) <= TIGHT.model_processes + 1
            return
        processes = own.children(recursive=True)
        assert 5 < len(processes) <= TIGHT.model_processes + 1
    await eventually(lambda: not any(process.is_running() for process in processes))  # nor any zombie


@needs_sandbox
async def test_one_bomb_takes_nothing_from_another_model(tmp_path):
    async with hosting(tmp_path / "a", True) as first, hosting(tmp_path / "b", True) as second:
        with suppress(grpc.aio.AioRpcError):
            assert await first.value("bomb") == "bounded"
        assert await second.value("escape", "one-more") == "started"


@needs_sandbox
async def test_what_a_model_writes_is_bounded_and_nowhere_but_in_memory(tmp_path):
    async with hosting(tmp_path, True) as host:
        folder = tmp_path / "models" / "hostile"
        places = [folder, "/", "/usr", "/dev", "/etc", sys.prefix, sandbox._PACKAGE, "/tmp"]
        paths = [f"{place}/written" for place in places]
        assert await host.value("written", paths) == ["/tmp/written"]
        assert 0 < await host.value("fill", "/tmp") <= 20
        assert 0 < await host.value("fill", "/dev/shm") <= 20
        assert await host.value("predict", "BTC", 60, 10) == []
        assert sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file()) < 1 << 20


@needs_sandbox
async def test_a_model_finds_no_database_no_rival_and_no_process_but_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("CONDOR_LITE__FEED__API_KEY", "a-secret")
    rival = tmp_path / "models" / "rival"
    shutil.copytree(MODELS / "good", rival)
    (tmp_path / "data").mkdir()
    database, config = tmp_path / "data" / "condor.db", tmp_path / "config.toml"
    for path in (database, config):
        path.write_text("secret")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        async with hosting(tmp_path, True) as host:
            hidden = [str(p) for p in (database, config, rival, rival / "main.py", "/etc/passwd", "/home")]
            own = str(tmp_path / "models" / "hostile" / "main.py")
            assert await host.value("seen", [*hidden, own]) == [own]
            assert await host.value("processes") == 2  # bubblewrap's own, and the model
            assert "a-secret" not in str(await host.value("environments"))
            assert await host.value("reached", [listener.getsockname()[1]]) == []


@needs_sandbox
async def test_what_lies_beside_the_packages_is_hidden_too(tmp_path):
    """A game whose folder is inside of what every sandbox shows, such as /usr/local/game."""
    place = Path(sys.prefix) if os.access(sys.prefix, os.W_OK) else sandbox._PACKAGE  # others read the latter
    game = place / f"game-{secrets.token_hex(4)}"
    try:
        shutil.copytree(MODELS / "good", game / "models" / "rival")
        (game / "data").mkdir()
        (game / "data" / "condor.db").write_text("secret")
        async with hosting(game, True) as host:
            hidden = [game / "data" / "condor.db", game / "models" / "rival" / "main.py"]
            own = game / "models" / "hostile" / "main.py"
            assert await host.value("seen", [*map(str, hidden), str(own)]) == [str(own)]
    finally:
        shutil.rmtree(game)


@needs_sandbox
async def test_the_client_library_calls_models_in_sandboxes(tmp_path):
    add_model(tmp_path, "good", "alice")
    add_model(tmp_path, "hostile", "bob")
    async with orchestrating(tmp_path, sandbox=True) as orch:
        await until(orch, RUNNING)
        async with real_client(orch) as runner:
            results = await runner.call("predict", ([text(1, "BTC"), number(2, 60), number(3, 10)], []))
            assert sorted((m.model_id, len(r.result)) for m, r in results.items()) == [
                ("alice", 6),
                ("bob", 0),
            ]


@needs_sandbox
async def test_a_sandbox_ends_when_its_process_is_killed(tmp_path):
    token = secrets.token_hex(8)
    async with hosting(tmp_path, True) as host:
        await host.value("escape", token)
        os.kill(host.process.pid, signal.SIGKILL)
        with anyio.fail_after(60):
            assert "killed by SIGKILL" in await host.process.wait()
        await eventually(lambda: not with_argument(token))


def test_a_machine_without_bubblewrap_is_told_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    config = config_in(tmp_path, sandbox=True)
    (problem,) = [said for said in obstacles(config) if "sandbox" in said]
    assert problem.startswith("orchestrator.sandbox = true: bubblewrap is not installed; install it")
    assert not [said for said in obstacles(config_in(tmp_path)) if "sandbox" in said]


def test_a_machine_that_makes_no_sandbox_is_told_what_is_missing(tmp_path, monkeypatch):
    stub = tmp_path / "bwrap"
    stub.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    problem = sandbox.problem(1 << 20)
    assert problem is not None
    assert "can't make a sandbox here (bwrap: No permissions to create new namespace)" in problem
