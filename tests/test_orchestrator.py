"""The embedded orchestrator: real model processes, a real WebSocket, and the real client library."""

import json
import os
import shutil
import signal
import socket
import time
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import anyio
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_runner_client.grpc.generated.commons_pb2 import Argument, Variant, VariantType
from model_runner_client.model_concurrent_runners import DynamicSubclassModelConcurrentRunner
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from condor_lite.config import (
    BackupConfig,
    Config,
    FeedConfig,
    GameConfig,
    LogConfig,
    OrchestratorConfig,
    PredictConfig,
    ReportConfig,
    ScoringConfig,
    StorageConfig,
    WebhookConfig,
)
from condor_lite.errors import StartError
from condor_lite.game.entities import Setting
from condor_lite.models.folder import FolderWatch, list_models, read_model
from condor_lite.models.orchestrator import LocalState, Orchestrator, Patience, parse_reports

pytestmark = pytest.mark.anyio

MODELS = Path(__file__).parent / "models"
LIMIT_S = 120
QUICK = Patience(scan_s=0.05, backoff_s=0.05, max_backoff_s=0.2, failures=3, stop_grace_s=1.0)


def config_in(tmp_path, **orchestrator):
    return Config(
        GameConfig((Setting("BTC", 60, 10, 20),)),
        FeedConfig(),
        OrchestratorConfig(**{"port": 0, "models": tmp_path / "models", **orchestrator}),
        PredictConfig(),
        ScoringConfig(),
        StorageConfig(),
        BackupConfig(),
        WebhookConfig(),
        ReportConfig(),
        LogConfig(),
    )


def add_model(tmp_path, source, model_id=None):
    folder = tmp_path / "models" / (model_id or source)
    shutil.copytree(MODELS / source, folder)
    return folder


@asynccontextmanager
async def orchestrating(tmp_path, patience=QUICK, believed_s=time.time, **orchestrator):
    before = set(psutil.Process().children())  # such as multiprocessing's own
    orch = Orchestrator(config_in(tmp_path, **orchestrator), tmp_path / "data", patience, believed_s)
    async with anyio.create_task_group() as tasks:
        assert await tasks.start(orch.run) == orch.port
        try:
            yield orch
        finally:
            tasks.cancel_scope.cancel()
    assert set(psutil.Process().children()) <= before


async def until(orch, condition, seconds=LIMIT_S):
    """Wait for the states (by model id) to meet a condition."""
    states = {}
    try:
        with anyio.fail_after(seconds):
            while True:
                states = {state.model_id: state for state in orch.states()}
                if condition(states):
                    return states
                await anyio.sleep(0.01)
    except TimeoutError:
        pytest.fail(f"never came true: {states}")


async def eventually(condition, seconds=LIMIT_S):
    with anyio.fail_after(seconds):
        while True:
            if condition():
                return
            await anyio.sleep(0.01)


def all_in(*expected):
    return lambda states: states and all(state.state in expected for state in states.values())


RUNNING = all_in(LocalState.RUNNING)


class Coordinator:
    """A bare WebSocket client that reads the orchestrator's messages."""

    def __init__(self, connection):
        self.connection = connection

    async def next(self):
        with anyio.fail_after(LIMIT_S):
            message = json.loads(await self.connection.recv())
        return message["event"], message["data"]

    async def entries(self, count):
        """The next entries: (model id, state, deployment id)."""
        found = []
        while len(found) < count:
            found += [(e["model_id"], e["state"], e["deployment_id"]) for e in (await self.next())[1]]
        return found

    async def report(self, *model_ids, code="MULTIPLE_FAILED"):
        data = [{"model_id": m, "failure_code": code, "failure_reason": None, "ip": "x"} for m in model_ids]
        await self.connection.send(json.dumps({"event": "report_failure", "data": data}))


@asynccontextmanager
async def coordinating(orch, crunch_id="condorgame", **options):
    async with connect(f"ws://127.0.0.1:{orch.port}/{crunch_id}", **options) as connection:
        yield Coordinator(connection)


@asynccontextmanager
async def real_client(orch):
    runner = DynamicSubclassModelConcurrentRunner(
        10, "condorgame", "127.0.0.1", orch.port, "condor_lite.tracker.TrackerBase"
    )
    cluster = runner.model_cluster
    cluster.ws_client.disconnect_sync = lambda: None  # its __del__ registers it, to fail at exit
    await runner.init()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(runner.sync)
        yield runner
        tasks.cancel_scope.cancel()
    await cluster.ws_client.disconnect()
    for model in list(cluster.models_run.values()):
        await cluster.remove_model_runner(model)


def pid_of(model_id):
    (process,) = [p for p in psutil.Process().children() if any(f"/{model_id}" in a for a in p.cmdline()[:5])]
    return process.pid


def text(position, value):
    return Argument(position=position, data=Variant(type=VariantType.STRING, value=value.encode()))


def number(position, value):
    return Argument(position=position, data=Variant(type=VariantType.INT, value=value.to_bytes(8, "little")))


async def test_the_client_library_finds_the_models_and_calls_them(tmp_path):
    add_model(tmp_path, "good", "alice")
    bob = add_model(tmp_path, "good", "bob")
    (bob / "model.toml").write_text(
        'name = "Bob <b>"\ncruncher_id = "w-1"\ncruncher_name = "Robert"\nbenchmark = true\n'
    )
    async with orchestrating(tmp_path) as orch:
        await until(orch, RUNNING)
        async with real_client(orch) as runner:
            assert runner.model_cluster.models_run.keys() == {"alice", "bob"}
            infos = runner.model_cluster.models_run["bob"].infos
            assert (
                infos["model_name"],
                infos["cruncher_id"],
                infos["cruncher_name"],
                infos["benchmark"],
            ) == (
                *("Bob <b>", "w-1", "Robert"),
                True,
            )
            arguments = ([text(1, "BTC"), number(2, 3600), number(3, 60)], [])
            results = await runner.call("predict", arguments)
            assert [len(r.result) for r in results.values()] == [60, 60]

            add_model(tmp_path, "abstract_between", "carol")
            await eventually(lambda: "carol" in runner.model_cluster.models_run)
            shutil.rmtree(bob)
            await eventually(lambda: "bob" not in runner.model_cluster.models_run)
            results = await runner.call("predict", arguments)
            assert sorted(m.model_id for m in results) == ["alice", "carol"]


async def test_broken_models_say_why_and_hurt_nobody(tmp_path):
    for source in ("good", "import_error", "exits_at_import", "dies_in_setup", "no_class"):
        add_model(tmp_path, source)
    add_model(tmp_path, "good", "a,b")
    (add_model(tmp_path, "good", "bad_toml") / "model.toml").write_text('benchmark = "yes"\n')
    (add_model(tmp_path, "good", "no_main") / "main.py").rename(tmp_path / "models" / "no_main" / "x.py")
    (add_model(tmp_path, "good", "syntax") / "main.py").write_text("def f(:\n")
    (tmp_path / "models" / "notes").mkdir()
    (tmp_path / "models" / "README.md").touch()
    patience = Patience(scan_s=0.05, backoff_s=0.05, failures=2)
    async with orchestrating(tmp_path, patience) as orch:
        settled = (LocalState.RUNNING, LocalState.GIVEN_UP, LocalState.REJECTED)
        states = await until(orch, all_in(*settled))
        reasons = {model_id: (state.state, state.reason) for model_id, state in states.items()}
        assert reasons.pop("good") == (LocalState.RUNNING, None)
        assert reasons == {
            "a,b": (
                LocalState.REJECTED,
                "the folder's name is the model's id, and 'a,b' has a ',' or '::' in it; rename the folder",
            ),
            "bad_toml": (LocalState.REJECTED, "model.toml: benchmark = 'yes': must be true or false"),
            "no_main": (
                LocalState.REJECTED,
                "there is no main.py in its folder; put the model's class there",
            ),
            "import_error": (
                LocalState.GIVEN_UP,
                "main.py line 1: ModuleNotFoundError: No module named 'a_module_that_is_not_there'",
            ),
            "exits_at_import": (LocalState.GIVEN_UP, "main.py line 3: it called sys.exit(3)"),
            "dies_in_setup": (
                LocalState.GIVEN_UP,
                "its process ended in Setup: ended with exit code 7 (about to fall over)",
            ),
            "no_class": (
                LocalState.GIVEN_UP,
                "no class in main.py inherits from condor_lite.tracker.TrackerBase",
            ),
            "syntax": (LocalState.GIVEN_UP, "main.py line 1: SyntaxError: invalid syntax"),
        }
        async with coordinating(orch) as coordinator:
            event, data = await coordinator.next()
            assert (event, [entry["model_id"] for entry in data]) == ("init", ["good"])


async def test_a_model_that_takes_too_long_to_create_says_so(tmp_path):
    add_model(tmp_path, "endless_import")
    patience = Patience(scan_s=0.05, setup_timeout_s=1.5, backoff_s=0.05, failures=2)
    async with orchestrating(tmp_path, patience) as orch:
        states = await until(orch, all_in(LocalState.GIVEN_UP))
    assert states["endless_import"].reason == "importing and creating the model took longer than 1.5 s"


async def test_a_killed_model_is_announced_and_comes_back(tmp_path):
    add_model(tmp_path, "good")
    async with orchestrating(tmp_path) as orch, coordinating(orch) as coordinator:
        assert await coordinator.next() == ("init", [])
        ((_, _, first),) = await coordinator.entries(1)
        os.kill(pid_of("good"), signal.SIGKILL)
        (stopped, running) = await coordinator.entries(2)
        assert stopped == ("good", "STOPPED", first)
        assert running[:2] == ("good", "RUNNING")
        assert running[2] != first
        states = await until(orch, RUNNING)
        assert (states["good"].restarts, states["good"].deployment_id) == (1, running[2])


async def test_a_model_that_keeps_dying_is_given_up_and_tried_again_later(tmp_path):
    add_model(tmp_path, "good")
    patience = Patience(scan_s=0.05, backoff_s=0.01, failures=2, quarantine_s=3.0)
    async with orchestrating(tmp_path, patience) as orch, coordinating(orch) as coordinator:
        await coordinator.next()
        for _ in range(2):
            assert (await coordinator.entries(1))[0][1] == "RUNNING"
            os.kill(pid_of("good"), signal.SIGKILL)
            assert (await coordinator.entries(1))[0][1] == "STOPPED"
        states = await until(orch, all_in(LocalState.GIVEN_UP))
        assert states["good"].reason.startswith("killed by SIGKILL")
        assert (await coordinator.entries(1))[0][1] == "RUNNING"


async def test_new_code_takes_over_from_the_old(tmp_path):
    folder = add_model(tmp_path, "good")
    async with orchestrating(tmp_path) as orch, coordinating(orch) as coordinator:
        await coordinator.next()
        ((_, _, first),) = await coordinator.entries(1)
        old_pid = pid_of("good")
        main = folder / "main.py"
        main.write_text(main.read_text() + "# better\n")
        running, stopped = await coordinator.entries(2)
        assert stopped == ("good", "STOPPED", first)
        assert running[1] == "RUNNING"
        await eventually(lambda: not psutil.pid_exists(old_pid))

        main.write_text("def f(:\n")  # broken: the old one goes on
        states = await until(orch, lambda states: states["good"].reason is not None)
        assert states["good"].state is LocalState.RUNNING
        assert (
            states["good"].reason == "its new code does not run: main.py line 1: SyntaxError: invalid syntax"
        )
        assert states["good"].deployment_id == running[2]


async def test_a_new_name_is_told_without_a_restart(tmp_path):
    folder = add_model(tmp_path, "good")
    async with orchestrating(tmp_path) as orch, coordinating(orch) as coordinator:
        await coordinator.next()
        _, (before,) = await coordinator.next()
        (folder / "model.toml").write_text('name = "Goodness"\n')
        _, (after,) = await coordinator.next()
        assert after["infos"].pop("model_name") == "Goodness"
        assert before["infos"].pop("model_name") == "good"
        assert before == after


async def test_a_reported_model_rests_until_its_code_changes(tmp_path):
    folder = add_model(tmp_path, "good")
    add_model(tmp_path, "good", "other")
    async with orchestrating(tmp_path) as orch:
        await until(orch, RUNNING)
        async with coordinating(orch) as coordinator:
            await coordinator.next()
            for junk in ("{", "[]", b"\xff", '{"event": "report_failure"}', '{"event": "x", "data": []}'):
                await coordinator.connection.send(junk)
            await coordinator.report("good", "good", "nobody", code="MULTIPLE_TIMEOUT")
            await coordinator.report("good")
            assert (await coordinator.entries(1))[0][:2] == ("good", "STOPPED")
            states = await until(orch, lambda states: states["good"].state is LocalState.REPORTED)
            assert states["good"].reason == "MULTIPLE_TIMEOUT"
            assert states["other"].state is LocalState.RUNNING
            main = folder / "main.py"
            main.write_text(main.read_text() + "# better\n")
            assert (await coordinator.entries(1))[0][:2] == ("good", "RUNNING")


async def test_without_models_the_bundled_ones_run(tmp_path):
    async with orchestrating(tmp_path) as orch:
        states = await until(orch, RUNNING)
        assert len(states) >= 6
        async with coordinating(orch) as coordinator:
            event, data = await coordinator.next()
            assert event == "init"
            assert [e["model_id"] for e in data if e["infos"]["benchmark"]] == ["constant_normal"]
            assert len({e["port"] for e in data}) == len({e["deployment_id"] for e in data}) == len(states)


async def test_paths_and_origins(tmp_path):
    add_model(tmp_path, "good")
    async with orchestrating(tmp_path) as orch:
        await until(orch, RUNNING)
        async with coordinating(orch, "") as coordinator:
            assert (await coordinator.next())[0] == "error"
            with pytest.raises(ConnectionClosed):
                await coordinator.next()
        async with coordinating(orch, "another") as coordinator:
            assert await coordinator.next() == ("init", [])
        with pytest.raises(InvalidStatus):
            async with coordinating(orch, origin="http://evil.example"):
                pass


async def test_what_stops_it_from_starting_is_a_clear_error(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StartError, match=rf"orchestrator\.port = {port}: the port is in use"):
            await Orchestrator(config_in(tmp_path, port=port), tmp_path / "data").run()
    with pytest.raises(StartError, match=r"orchestrator\.host = '0\.0\.0\.0'"):
        await Orchestrator(config_in(tmp_path, host="0.0.0.0"), tmp_path / "data").run()
    (tmp_path / "file").touch()
    with pytest.raises(StartError, match="file/models-log"):
        await Orchestrator(config_in(tmp_path), tmp_path / "file").run()


async def test_it_can_be_stopped_while_its_models_start(tmp_path):
    add_model(tmp_path, "endless_import")
    add_model(tmp_path, "good")
    async with orchestrating(tmp_path) as orch:
        await until(orch, lambda states: any(s.state is LocalState.RUNNING for s in states.values()))


def test_patience_grows():
    patience = Patience()
    assert [patience.backoff(n) for n in (1, 2, 3, 7, 60)] == [1, 2, 4, 60, 60]
    assert [patience.quarantine(n) for n in (1, 2, 5, 6, 99)] == [3600, 7200, 57600, 86400, 86400]


@settings(max_examples=100)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(0, 9) | st.text(),
        lambda inner: (
            st.lists(inner) | st.dictionaries(st.sampled_from(["model_id", "failure_code", "x"]), inner)
        ),
        max_leaves=6,
    )
)
def test_no_report_is_too_odd(data):
    message = json.dumps({"event": "report_failure", "data": data})
    for model_id, reason in parse_reports(message):
        assert isinstance(model_id, str)
        assert reason
        assert reason.isprintable()


def test_half_a_copy_is_not_started(tmp_path):
    add_model(tmp_path, "good")
    watch = FolderWatch(tmp_path / "models")
    assert [m.model_id for m in watch.scan()] == ["good"]
    late = add_model(tmp_path, "good", "late")
    (late / "main.py").write_text("class Half")
    assert [m.model_id for m in watch.scan()] == ["good"]
    (late / "main.py").write_text("class Whole: pass")
    assert [m.model_id for m in watch.scan()] == ["good"]
    assert [m.model_id for m in watch.scan()] == ["good", "late"]
    shutil.rmtree(late)
    assert len(watch.scan()) == 2  # it may be on its way back
    assert [m.model_id for m in watch.scan()] == ["good"]
    shutil.rmtree(tmp_path / "models")
    assert [m.model_id for m in watch.scan()] == ["good"]
    (tmp_path / "models").mkdir()
    watch.scan()
    assert watch.scan() == []  # and not the bundled ones


def test_the_code_hash_is_of_the_code(tmp_path):
    folder = add_model(tmp_path, "good")
    before = read_model(folder)
    (folder / "model.toml").write_text('name = "x"\n')
    (folder / "resources").mkdir()
    (folder / "resources" / "state.bin").write_bytes(b"1")
    (folder / ".notes").touch()
    assert read_model(folder).code_hash == before.code_hash
    (folder / "table.csv").touch()
    assert read_model(folder).code_hash != before.code_hash


@pytest.mark.parametrize(
    ("toml", "problem"),
    [
        ("name = 1", "name = 1: must be a string"),
        ('name = ""', "name = '': must be printable text, not empty"),
        ('cruncher_id = "a\\nb"', "must be printable text"),
        (f'cruncher_name = "{"x" * 201}"', "must be at most 200 characters long"),
        ('nmae = "x"', "'nmae' is not known; it may have name, cruncher_id, cruncher_name, benchmark"),
        ("name = ", "model.toml: "),
    ],
)
def test_a_bad_model_toml_is_named(toml, problem, tmp_path):
    folder = add_model(tmp_path, "good")
    (folder / "model.toml").write_text(toml)
    assert problem in read_model(folder).problem


def test_hidden_and_other_folders_are_no_models(tmp_path):
    add_model(tmp_path, "good")
    for name in (".git", "__pycache__", "notes"):
        (tmp_path / "models" / name).mkdir()
    (tmp_path / "models" / "__pycache__" / "x.py").touch()
    assert [path.name for path in list_models(tmp_path / "models")] == ["good"]
    assert list_models(tmp_path / "nowhere") == []


async def test_the_logs_of_removed_models_go_in_time(tmp_path):
    logs = tmp_path / "data" / "models-log"
    logs.mkdir(parents=True)
    add_model(tmp_path, "good")
    for name, days in (
        ("good.log.1", 90),
        ("gone.log", 31),
        ("gone.log.1", 40),
        ("left.log", 29),
        ("notes.txt", 90),
    ):
        (logs / name).write_text("said")
        os.utime(logs / name, (time.time() - days * 86400,) * 2)
    async with orchestrating(tmp_path, replace(QUICK, forget_s=0.1)) as orch:
        await until(orch, RUNNING)
        kept = {"good.log", "good.log.1", "left.log", "notes.txt"}
        await eventually(lambda: {path.name for path in logs.iterdir()} == kept)
        os.utime(logs / "left.log", (time.time() - 31 * 86400,) * 2)
        await eventually(lambda: not (logs / "left.log").exists())


async def test_a_clock_that_is_not_believed_forgets_no_log(tmp_path):
    logs = tmp_path / "data" / "models-log"
    logs.mkdir(parents=True)
    for name, days in (("old", 400), ("new", 100)):
        (logs / f"{name}.log").write_text("said")
        os.utime(logs / f"{name}.log", (time.time() - days * 86400,) * 2)
    async with orchestrating(tmp_path, replace(QUICK, forget_s=0.1), lambda: time.time() - 365 * 86400):
        await eventually(lambda: not (logs / "old.log").exists())
    assert (logs / "new.log").exists()


async def test_a_process_that_can_not_be_started_leaves_no_folder(tmp_path):
    add_model(tmp_path, "good")
    (tmp_path / "data" / "models-log" / "good.log").mkdir(parents=True)
    async with orchestrating(tmp_path) as orch:
        given_up = LocalState.GIVEN_UP
        states = await until(orch, lambda states: "good" in states and states["good"].state is given_up)
        assert "can't be started" in states["good"].reason
        assert not list((tmp_path / "data").glob("models-tmp/*"))
