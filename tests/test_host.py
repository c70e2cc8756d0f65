"""A model's own process, over real gRPC: the public runner's service, its log, and its end."""

import asyncio
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import grpc
import psutil
import pytest
from google.protobuf.empty_pb2 import Empty
from model_runner_client.grpc.generated.commons_pb2 import Argument, KwArgument, Variant, VariantType
from model_runner_client.grpc.generated.dynamic_subclass_pb2 import CallRequest, SetupRequest
from model_runner_client.grpc.generated.dynamic_subclass_pb2_grpc import DynamicSubclassServiceStub

from condor_lite.models.folder import read_model
from condor_lite.models.process import LOG_BYTES, Guard, LaunchError, LaunchSettings, launch

pytestmark = pytest.mark.anyio

MODELS = Path(__file__).parent / "models"
BASE = "condor_lite.tracker.TrackerBase"


@asynccontextmanager
async def settings_in(path, setup_timeout_s=100.0):
    async with Guard() as guard:
        yield LaunchSettings(BASE, path / "models-log", guard, anyio.Semaphore(8), setup_timeout_s, 0.5)


class Host:
    """A launched model and a stub to call it with."""

    timeout_s = 100

    def __init__(self, process, stub, log):
        self.process, self.stub, self.log = process, stub, log

    async def call(self, method, *args, **kwargs):
        response = await self.stub.Call(
            CallRequest(
                methodName=method,
                methodArguments=[Argument(position=i + 1, data=variant(a)) for i, a in enumerate(args)],
                methodKwArguments=[KwArgument(keyword=k, data=variant(v)) for k, v in kwargs.items()],
            ),
            timeout=self.timeout_s,
        )
        return response.status, response.methodResponse

    async def json(self, method, *args, **kwargs):
        status, value = await self.call(method, *args, **kwargs)
        assert (status.code, value.type) == ("SUCCESS", VariantType.JSON), status
        return json.loads(value.value)

    async def text(self, method, *args, **kwargs):
        status, value = await self.call(method, *args, **kwargs)
        assert (status.code, value.type) == ("SUCCESS", VariantType.STRING), status
        return value.value.decode()


def variant(value):
    if isinstance(value, str):
        return Variant(type=VariantType.STRING, value=value.encode())
    if isinstance(value, int):
        return Variant(type=VariantType.INT, value=value.to_bytes(8, "little", signed=True))
    if isinstance(value, float):
        return Variant(type=VariantType.DOUBLE, value=struct.pack("d", value))
    return Variant(type=VariantType.JSON, value=json.dumps(value).encode())


@asynccontextmanager
async def hosting(name, tmp_path):
    async with settings_in(tmp_path) as settings:
        process = await launch(read_model(MODELS / name), f"{name}_1", settings)
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{process.port}") as channel:
                yield Host(
                    process, DynamicSubclassServiceStub(channel), tmp_path / "models-log" / f"{name}.log"
                )
        finally:
            await process.stop()


async def refused(name, tmp_path, **limits):
    async with settings_in(tmp_path, **limits) as settings:
        with pytest.raises(LaunchError) as caught:
            await launch(read_model(MODELS / name), f"{name}_1", settings)
    return caught.value, (tmp_path / "models-log" / f"{name}.log").read_text()


async def test_it_ticks_and_predicts(tmp_path):
    async with hosting("good", tmp_path) as host:
        status, _ = await host.call("tick", {"BTC": [[60, 1.0], [120, 1.1]]})
        assert status.code == "SUCCESS"
        assert len(await host.json("predict", "BTC", 3600, 60)) == 60
        _, points = await host.call("points", "BTC")
        assert int.from_bytes(points.value, "little") == 2


@pytest.mark.parametrize(
    ("name", "answer"),
    [("several", "first"), ("factory", "BTC 60 10"), ("other_module", "elsewhere")],
)
async def test_the_model_is_found(name, answer, tmp_path):
    async with hosting(name, tmp_path) as host:
        assert await host.text("predict", "BTC", 60, 10) == answer
        if name == "several":
            assert "First is taken, not Second" in host.log.read_text()


async def test_an_abstract_class_in_between_is_passed_over(tmp_path):
    async with hosting("abstract_between", tmp_path) as host:
        assert (await host.json("predict", "BTC", 60, 60))[0]["params"] == {"scale": 0.002}


@pytest.mark.parametrize(
    ("name", "final", "reason"),
    [
        (
            "import_error",
            True,
            "main.py line 1: ModuleNotFoundError: No module named 'a_module_that_is_not_there'",
        ),
        ("exits_at_import", True, "main.py line 3: it called sys.exit(3)"),
        ("no_class", True, f"no class in main.py inherits from {BASE}"),
        ("abstract_only", True, "Unfinished does not define predict"),
        ("raises_in_init", False, "main.py line 7: KeyError: 'missing'"),
        ("dies_in_setup", False, "its process ended in Setup: ended with exit code 7 (about to fall over)"),
    ],
)
async def test_a_broken_model_is_refused_with_the_reason(name, final, reason, tmp_path):
    error, log = await refused(name, tmp_path)
    assert (str(error), error.final) == (reason, final)
    assert reason.rpartition(": ")[2] in log or name == "dies_in_setup"
    assert "loader.py" not in log  # the traceback starts in the participant's code


async def test_a_syntax_error_is_refused_with_its_line(tmp_path):
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "main.py").write_text("x = 1\ndef f(:\n")
    async with settings_in(tmp_path) as settings:
        with pytest.raises(LaunchError, match=r"main\.py line 2: SyntaxError: invalid syntax"):
            await launch(read_model(folder), "broken_1", settings)


async def test_an_endless_import_is_ended(tmp_path):
    error, _ = await refused("endless_import", tmp_path, setup_timeout_s=1.0)
    assert "took longer than 1 s" in str(error)
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(MODELS / "endless_import") in cmdline(p)]


def cmdline(process):
    return process.info["cmdline"] or []


async def test_setup_comes_once_and_calls_only_after_it(tmp_path):
    async with hosting("good", tmp_path) as host:
        again = await host.stub.Setup(SetupRequest(className=BASE))
        assert (again.status.code, again.status.message) == ("SUCCESS", "Instance already exists")
        assert (await host.stub.Rest(Empty())).status.code == "SUCCESS"
        status, _ = await host.call("pid")
        assert status.code == "FAILED_PRECONDITION"
        empty = await host.stub.Setup(SetupRequest(className=" "))
        assert empty.status.code == "INVALID_ARGUMENT"
        unknown = await host.stub.Setup(SetupRequest(className="no.such.Base"))
        assert unknown.status.code == "BAD_IMPLEMENTATION"
        assert "'no.such.Base' can't be imported" in unknown.status.message


async def test_status_codes_and_values(tmp_path):
    async with hosting("odd", tmp_path) as host:

        async def code(method, *args):
            return (await host.call(method, *args))[0]

        assert (await code("")).code == "INVALID_ARGUMENT"
        assert (await code("no_such_method")).code == "BAD_IMPLEMENTATION"
        failed = await code("predict", "BTC", 60, 10)
        assert failed.code == "MODEL_FAILED"
        assert failed.message.startswith("The model raised an exception: main.py line ")
        assert failed.message.endswith("ZeroDivisionError: division by zero")
        assert (await code("a_set")).code == "MODEL_FAILED"
        assert (await code("huge")).code == "MODEL_FAILED"
        assert (await code("leaves")).message.endswith("it called sys.exit(1)")
        assert (await code("predict")).code == "MODEL_FAILED"
        status, value = await host.call("nothing")
        assert (status.code, value.type, value.value) == ("SUCCESS", VariantType.NONE, b"")
        status, value = await host.call("not_a_number")
        assert (status.code, value.value) == ("SUCCESS", b"[NaN,Infinity]")
        status, value = await host.call("echo", -5)
        assert (value.type, int.from_bytes(value.value, "little", signed=True)) == (VariantType.INT, -5)
        status, value = await host.call("echo", 0.5)
        assert (value.type, struct.unpack("d", value.value)) == (VariantType.DOUBLE, (0.5,))
        assert await host.text("echo", "ä") == "ä"
        assert await host.json("keywords", 1, b=3, unknown=4) == [1, 3]
        assert "Traceback" in host.log.read_text()


async def test_a_second_call_is_refused_while_the_first_runs(tmp_path):
    async with hosting("odd", tmp_path) as host:
        calls = {asyncio.create_task(host.call("hangs")) for _ in range(2)}
        (second,), running = await asyncio.wait(calls, timeout=60, return_when=asyncio.FIRST_COMPLETED)
        with pytest.raises(grpc.aio.AioRpcError, match="Server busy") as caught:
            await second
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        running.pop().cancel()


async def test_its_output_is_kept_and_capped(tmp_path):
    async with hosting("odd", tmp_path) as host:
        await host.call("shouts", 25_000)
        old = host.log.with_name("odd.log.1")
        assert LOG_BYTES - 10_000 < old.stat().st_size <= LOG_BYTES
        assert 0 < host.log.stat().st_size <= LOG_BYTES
        text = host.log.read_text()
        assert "line 24999 x" in text
        assert text.endswith("and C code too\n")
        await host.call("shouts_from_a_child", 200_000)
        assert old.stat().st_size == LOG_BYTES, "the child writes to the same file"
        assert old.read_text().endswith("child child \n")
        assert host.log.read_text().startswith("line 0 x")
        await host.call("shouts", 0)
    for _ in range(2):  # whatever was left behind by a process that did not live to see to it
        with host.log.open("a") as log:
            log.write("x" * 2 * LOG_BYTES)
        async with hosting("odd", tmp_path):
            assert host.log.stat().st_size < 1000
    assert sum(path.stat().st_size for path in host.log.parent.iterdir()) < 2 * LOG_BYTES
    assert len(list(host.log.parent.iterdir())) == 2


async def test_it_sees_no_secret_and_stands_in_its_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("CONDOR_LITE__FEED__API_KEY", "secret")
    async with hosting("odd", tmp_path) as host:
        environment = await host.json("environment")
        assert "secret" not in environment.values()
        assert environment["OPENBLAS_NUM_THREADS"] == "1"
        assert await host.text("folder") == str(MODELS / "odd")
        assert not {"pandas", "numpy", "structlog", "anyio"} & set(await host.json("modules"))
    assert not (MODELS / "odd" / "__pycache__").exists()


async def test_it_ignores_ctrl_c_and_ends_quietly_on_sigterm(tmp_path):
    async with hosting("good", tmp_path) as host:
        os.kill(host.process.pid, signal.SIGINT)
        _, pid = await host.call("pid")
        assert int.from_bytes(pid.value, "little") == host.process.pid
        before = host.log.read_text()
        os.kill(host.process.pid, signal.SIGTERM)
        assert (await host.process.wait()).startswith("killed by SIGTERM")
        assert host.log.read_text() == before


async def test_a_stopped_process_and_its_children_end(tmp_path):
    async with hosting("odd", tmp_path) as host:
        _, child = await host.call("start_child")
        child = psutil.Process(int.from_bytes(child.value, "little"))
        os.kill(host.process.pid, signal.SIGSTOP)  # it can't react to SIGTERM
        await host.process.stop()
        await anyio.to_thread.run_sync(child.wait, 60)


PARENT = """
import sys, threading, anyio
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_host import MODELS, DynamicSubclassServiceStub, Host, grpc, hosting

async def main():
    async with hosting("odd", Path({tmp!r})) as host:
        _, child = await host.call("start_child")
        print(host.process.pid, int.from_bytes(child.value, "little"), flush=True)
        await anyio.sleep_forever()

anyio.run(main)
"""


async def test_nothing_outlives_a_killed_parent(tmp_path):
    code = PARENT.format(tests=str(Path(__file__).parent), tmp=str(tmp_path))
    async with await anyio.open_process([sys.executable, "-c", code], stderr=None) as parent:
        pids = await parent.stdout.receive()
        family = [psutil.Process(int(pid)) for pid in pids.split()]
        family += psutil.Process(parent.pid).children(recursive=True)
        assert len(family) >= 3
        parent.kill()
    for process in family:
        await anyio.to_thread.run_sync(process.wait, 60)


async def test_the_folder_may_be_anywhere_and_hold_a_module_named_like_a_packages(tmp_path):
    folder = tmp_path / "a b ü"
    shutil.copytree(MODELS / "several", folder)
    (folder / "main.py").write_text(
        "import hypothesis\nassert hypothesis.MINE\n" + (folder / "main.py").read_text(), "utf-8"
    )
    (folder / "hypothesis.py").write_text("MINE = True\n")
    async with settings_in(tmp_path) as settings:
        process = await launch(read_model(folder), "x_1", settings)
        await process.stop()


def test_a_finite_hard_limit_of_the_processor_is_respected():
    code = (
        "import resource; from condor_lite.models.limits import Limits;"
        "resource.setrlimit(resource.RLIMIT_CPU, (50, 100));"
        "limits = Limits(1 << 30, 1 << 20, 8, 600, False, None);"
        "limits.renew_cpu(); print(resource.getrlimit(resource.RLIMIT_CPU))"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert said.stdout == "(100, 100)\n"
