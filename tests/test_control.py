"""The control socket and the roster: a real socket, a real predict loop on stepped time."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import anyio
import orjson
import pytest
from model_runner_client.grpc.generated.dynamic_subclass_pb2 import CallRequest, CallResponse

from condor_lite import control, roster, table
from condor_lite.control import Control, ControlError, NoGame, socket_path
from condor_lite.errors import CondorError
from condor_lite.models.local import LocalState
from condor_lite.roster import Listing, ModelLine, Roster
from condor_lite.storage.database import open_read_only
from condor_lite.storage.lock import GameLock
from condor_lite.storage.roster import recent, tally
from tests import fleet
from tests.fleet import ModelServer
from tests.stage import START_S, Stage, staged, until, within
from tests.test_orchestrator import RUNNING, add_model, all_in, coordinating, orchestrating
from tests.test_orchestrator import until as in_state

pytestmark = pytest.mark.anyio


async def echo(text: str) -> str:
    return text


async def refuse() -> None:
    raise CondorError("not today")


async def crash() -> None:
    raise LookupError("secret")


COMMANDS = {"echo": echo, "refuse": refuse, "crash": crash}


@asynccontextmanager
async def serving(database: Path, **limits: float) -> AsyncIterator[Control]:
    served = Control(database, COMMANDS, **limits)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(served.run)
        await served.listening.wait()
        yield served
        tasks.cancel_scope.cancel()


async def call(database: Path, command: str, **arguments: Any) -> Any:
    return await asyncio.to_thread(lambda: control.call(database, command, **arguments))


async def send(database: Path, data: bytes) -> bytes:
    """What the socket answers to raw bytes."""
    reader, writer = await asyncio.open_unix_connection(str(socket_path(database)), limit=1 << 20)
    with closing(writer):
        writer.write(data)
        try:
            return await reader.read()
        except ConnectionResetError:
            return b""


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "condor.db"


# The socket


async def test_a_command_is_carried_out_and_answered(database: Path) -> None:
    async with serving(database):
        assert await call(database, "echo", text="Grüße\n") == "Grüße\n"
        mode = socket_path(database).stat().st_mode
        assert stat.S_ISSOCK(mode)
        assert stat.S_IMODE(mode) == 0o600
    assert not socket_path(database).exists()


async def test_errors_are_sentences_and_harm_nobody(database: Path) -> None:
    async with serving(database):
        for command, arguments, said in (
            ("refuse", {}, "not today"),
            ("crash", {}, r"the game failed to do it \(LookupError\)"),
            ("drop", {}, "unknown command 'drop'; this game knows echo, refuse, crash"),
            ("echo", {"words": "x"}, "missing a required argument: 'text'"),
        ):
            with pytest.raises(ControlError, match=said):
                await call(database, command, **arguments)
        assert await call(database, "echo", text="still here") == "still here"


@pytest.mark.parametrize(
    "sent",
    [
        b"\n",
        b"nonsense\n",
        b"[]\n",
        b'{"command": 1}\n',
        b'{"command": "echo", "arguments": {"text": ["x"]}}\n',
        b'{"command": "echo", "more": 1}\n',
        b'{"command": "\xff"}\n',
        b'{"command": "\\ud800"}\n',
        b"[" * 50_000 + b"\n",
    ],
)
async def test_what_is_no_request_is_refused(database: Path, sent: bytes) -> None:
    async with serving(database):
        assert "error" in orjson.loads(await send(database, sent))


async def test_too_long_a_request_is_cut_off(database: Path) -> None:
    async with serving(database):
        assert await send(database, b"x" * 200_000) == b""
        assert await call(database, "echo", text="x") == "x"


async def test_a_silent_client_is_cut_off_and_many_delay_nobody(database: Path) -> None:
    async with serving(database, request_within_s=3.0):
        silent = [await asyncio.open_unix_connection(str(socket_path(database))) for _ in range(20)]
        ends = await asyncio.gather(*(reader.read() for reader, _ in silent))
        assert ends.count(b"") == 16
        assert all(b"too many commands at once" in end for end in ends if end)
        for _, writer in silent:
            writer.close()
        assert await call(database, "echo", text="x") == "x"


async def test_a_client_that_does_not_read_is_cut_off(database: Path) -> None:
    async def much() -> str:
        return "x" * 5_000_000

    served = Control(database, {"much": much, "echo": echo}, taken_within_s=3.0)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(served.run)
        await served.listening.wait()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(socket_path(database)))
            client.sendall(b'{"command": "much"}\n')
            await until(lambda: served._clients)
            await until(lambda: not served._clients)
        assert len(await call(database, "much")) == 5_000_000
        tasks.cancel_scope.cancel()


async def test_a_client_that_leaves_harms_nobody(database: Path) -> None:
    async with serving(database):
        for sent in (b"", b'{"command": "echo"', b'{"command": "crash"}\n'):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(socket_path(database)))
                client.sendall(sent)
        assert await call(database, "echo", text="x") == "x"


async def test_a_socket_that_a_killed_game_left_is_replaced(database: Path) -> None:
    code = f"import socket, os, signal; socket.socket(socket.AF_UNIX).bind({str(socket_path(database))!r}); "
    killed = subprocess.run([sys.executable, "-c", code + "os.kill(os.getpid(), signal.SIGKILL)"])  # noqa: ASYNC221
    assert killed.returncode == -signal.SIGKILL
    assert socket_path(database).exists()
    with pytest.raises(NoGame):
        await call(database, "echo", text="x")
    async with serving(database):
        assert await call(database, "echo", text="x") == "x"


async def test_a_file_in_the_way_is_left_alone(database: Path) -> None:
    socket_path(database).write_text("precious")
    with pytest.raises(ControlError, match="can't make the control socket"):
        await Control(database, COMMANDS).run()
    assert socket_path(database).read_text() == "precious"


async def test_a_folder_with_a_long_name_will_do(tmp_path: Path) -> None:
    deep = tmp_path / ("long" * 20) / ("longer" * 20)
    deep.mkdir(parents=True)
    async with serving(deep / "condor.db"):
        assert await call(deep / "condor.db", "echo", text="x") == "x"
    assert not list(deep.iterdir())
    with pytest.raises(ControlError, match="too long a name"):
        await Control(deep / ("d" * 100), COMMANDS).run()


async def test_a_client_says_why_it_could_not_ask(database: Path) -> None:
    with pytest.raises(NoGame, match=r"no game is running on .*condor\.db"):
        await call(database, "echo", text="x")
    lock = GameLock(database)
    with pytest.raises(ControlError, match=rf"the game \(pid {os.getpid()}\) runs, but does not listen"):
        await call(database, "echo", text="x")
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.bind(str(socket_path(database)))
        deaf.listen()
        with pytest.raises(ControlError, match=r"the game \(pid \d+\) does not answer within"):
            await call(database, "echo", text="x", within_s=0.05)
    lock.release()


# The roster


@asynccontextmanager
async def steered(stage: Stage) -> AsyncIterator[Roster]:
    """The roster of a stage, behind a socket."""
    models = Roster("game", stage.clock, stage.db, stage.journal, stage.predict, None)
    await models.start()
    served = Control(stage.db.path, models.commands)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(served.run)
        await served.listening.wait()
        yield models
        tasks.cancel_scope.cancel()


async def lines(stage: Stage) -> dict[str, dict[str, Any]]:
    listing = await call(stage.db.path, "models")
    return {line["model_id"]: line for line in listing["models"]}


async def test_the_table_counts_what_each_model_did(tmp_path: Path) -> None:
    gone = ModelServer("gone")
    async with staged(tmp_path) as stage, steered(stage):
        await stage.join(ModelServer("bad", fleet.raises), gone, ModelServer("good"))
        await stage.play(26)
        await stage.orchestrator.announce(gone, state="STOPPED")
        await until(lambda: not stage.ready("gone"))
        await stage.play(20)
        found = await lines(stage)
        held = len([None for closed in stage.closed if closed.status == "closed"])
        assert held == 5
        good, bad, left = found["good"], found["bad"], found["gone"]
        assert (good["state"], good["answered"], good["failed"]) == ("ready", held, 0)
        assert (good["deployment_id"], good["model_name"]) == ("good_1", "Good")
        assert good["median_ms"] > 0
        assert START_S <= good["since_s"] <= START_S + 2
        assert good["last_error"] is None
        assert (bad["state"], bad["failed"], bad["answered"]) == ("given up", 3, 0)
        assert bad["reason"].startswith("3 failures in a row")
        assert bad["last_error"] == "the model raised: division by zero"
        assert START_S < bad["last_error_at_s"] < START_S + 40
        assert (left["state"], left["answered"] + left["absent"]) == ("disconnected", held)
        assert left["absent"] == 2

        numbers = dict(await stage.rows("SELECT model_id, model_no FROM model"))
        later = await stage.db.read(tally, START_S + 10, START_S + 30)
        assert later[numbers["good"]] == {"SUCCESS": 2}
        assert later[numbers["bad"]] == {"FAILED": 1, "ABSENT": 1}
        assert not await stage.db.read(recent, START_S + 3600)


async def test_a_paused_model_is_absent_and_gets_what_it_missed_when_resumed(tmp_path: Path) -> None:
    model = ModelServer("a")
    async with staged(tmp_path) as stage, steered(stage):
        await stage.join(model, ModelServer("b"))
        await stage.play(25)
        said = await call(stage.db.path, "pause", model_id="a")
        assert said.startswith("a is paused: ")
        asked, ticks = len(model.predicts), len(model.ticks)
        await stage.play(60)
        assert (len(model.predicts), len(model.ticks)) == (asked, ticks)
        answers = await stage.answers()
        assert ("a", START_S + 40) not in answers
        assert answers["b", START_S + 40][0] == "SUCCESS"
        line = (await lines(stage))["a"]
        assert (line["state"], line["paused"], line["since_s"]) == ("paused", True, START_S + 26)
        assert line["absent"] == 6
        assert "paused already" in await call(stage.db.path, "pause", model_id="a")

        assert "gets the prices that it missed" in await call(stage.db.path, "resume", model_id="a")
        await stage.play(40)
        times = [int(ts_s) for tick in model.ticks for ts_s, _ in tick.get("BTC", [])]
        assert times == sorted(set(times))
        new = [ts_s for ts_s in times if ts_s > START_S + 5]
        assert new == list(range(START_S + 10, new[-1] + 5, 5)), "no price is missing"
        assert (await stage.answers())["a", START_S + 100][0] == "SUCCESS"
        assert "was not paused" in await call(stage.db.path, "resume", model_id="a")


async def test_a_pause_takes_effect_in_mid_round(tmp_path: Path) -> None:
    """The tick before an ask is under way when the pause comes: it may end, but the ask does not follow."""
    ticking, go_on = asyncio.Event(), asyncio.Event()

    async def waits_in_its_tick(model: ModelServer, request: CallRequest) -> CallResponse:
        if request.methodName == "tick" and model.predicts:
            ticking.set()
            await go_on.wait()
        return await fleet.answers_well(model, request)

    model = ModelServer("a", waits_in_its_tick)
    async with staged(tmp_path, within("9s")) as stage, steered(stage):
        await stage.join(model, ModelServer("b"))
        playing = asyncio.create_task(stage.play(60))
        await ticking.wait()
        asked = len(model.predicts)
        await call(stage.db.path, "pause", model_id="a")
        go_on.set()
        await playing
        assert len(model.predicts) == asked
        statuses = {
            status for (model_id, _), (status, _) in (await stage.answers()).items() if model_id == "a"
        }
        assert statuses == {"SUCCESS"}, "it was not blamed for a round that it was taken out of"
        assert (await lines(stage))["a"]["absent"] >= 3


async def test_a_model_that_is_replaced_while_paused_gets_its_history_when_resumed(tmp_path: Path) -> None:
    old, new = ModelServer("a"), ModelServer("a", deployment=2)
    async with staged(tmp_path) as stage, steered(stage):
        await stage.join(old, ModelServer("b"))
        await stage.play(15)
        await call(stage.db.path, "pause", model_id="a")
        await new.start()
        stage.models.append(new)
        await stage.orchestrator.announce(new)
        await until(lambda: new.setups)
        await stage.play(30)
        assert not new.ticks
        await call(stage.db.path, "resume", model_id="a")
        await until(lambda: stage.ready("a"))
        await stage.play(20)
        assert len(new.ticks[0]["BTC"]) >= 59
        assert new.predicts


async def test_a_pause_is_there_when_the_game_starts_again(tmp_path: Path) -> None:
    async with staged(tmp_path) as stage, steered(stage):
        await stage.join(ModelServer("a"))
        await call(stage.db.path, "pause", model_id="a")
    with closing(open_read_only(stage.db.path)) as conn:
        listing = roster.stored(conn, "game")
    assert [(line.state, line.paused) for line in listing.models] == [("paused", True)]
    assert not listing.running

    model = ModelServer("a")
    async with staged(tmp_path, start_s=START_S + 101) as stage, steered(stage):
        await model.start()
        stage.models.append(model)
        await stage.orchestrator.announce(model)
        await until(lambda: "a" in stage.predict.fleet.running)
        await stage.play(30)
        assert not model.predicts
        await call(stage.db.path, "resume", model_id="a")
        await until(lambda: stage.ready("a"))
        await stage.play(30)
        assert model.predicts
    async with staged(tmp_path, start_s=START_S + 201) as stage, steered(stage):
        assert not stage.predict.paused


async def test_a_restart_behind_a_remote_orchestrator_sets_a_model_up_again(tmp_path: Path) -> None:
    model, bad = ModelServer("a"), ModelServer("bad", fleet.raises)
    async with staged(tmp_path) as stage, steered(stage):
        await stage.join(model, bad)
        await stage.play(15)
        model.instance = False
        assert "set up anew" in await call(stage.db.path, "restart", model_id="a")
        await until(lambda: model.setups == 2 and stage.ready("a"))
        await stage.play(30)
        assert (await stage.answers())["a", START_S + 40][0] == "SUCCESS"

        await until(lambda: "bad" not in stage.predict.fleet.running)
        bad.behaviour = fleet.answers_well
        assert "the orchestrator is asked again" in await call(stage.db.path, "restart", model_id="bad")
        await until(lambda: stage.ready("bad"))
        assert (await lines(stage))["bad"]["state"] == "ready"


async def test_a_restart_brings_back_a_local_model_that_was_reported_and_replaces_one_that_runs(
    tmp_path: Path,
) -> None:
    add_model(tmp_path, "good")
    async with orchestrating(tmp_path) as local:
        first = (await in_state(local, RUNNING))["good"].deployment_id
        async with coordinating(local) as coordinator:
            await coordinator.entries(1)
            await coordinator.report("good")
            assert await coordinator.entries(1) == [("good", "STOPPED", first)]
            await in_state(local, all_in(LocalState.REPORTED))
            assert local.restart("good")
            second = (await in_state(local, RUNNING))["good"].deployment_id
            assert await coordinator.entries(1) == [("good", "RUNNING", second)]
            assert local.restart("good")
            running, stopped = await coordinator.entries(2)
            assert (running[:2], stopped) == (("good", "RUNNING"), ("good", "STOPPED", second))
            assert len({first, second, running[2]}) == 3
        assert not local.restart("nobody")


async def test_an_unknown_id_is_answered_with_near_ones(tmp_path: Path) -> None:
    async with staged(tmp_path) as stage, steered(stage):
        await stage.join(ModelServer("alpha"), ModelServer("17", infos={"model_name": "Fox"}))
        for model_id, said in (
            ("alhpa", r"no model has the id 'alhpa'; did you mean alpha\?"),
            ("Fox", r"no model has the id 'Fox'; did you mean 17\?"),
            ("zzz\x1b", r"no model has the id 'zzz\?'; `condor-lite models` lists all of them"),
        ):
            for command in ("pause", "resume", "restart"):
                with pytest.raises(ControlError, match=said):
                    await call(stage.db.path, command, model_id=model_id)
        assert not stage.predict.paused


def test_the_table_shows_nothing_that_a_terminal_would_obey() -> None:
    line = ModelLine(
        model_id="m" * 100,
        model_name="n",
        player="p",
        state="given up",
        since_s=None,
        reason="\x1b[2J" + "r" * 500,
        paused=False,
        deployment_id=None,
        answered=1,
        failed=2,
        timed_out=3,
        absent=4,
        median_ms=None,
        last_error="division\nby zero",
        last_error_at_s=START_S,
    )
    shown = list(table.lines(Listing("game", False, START_S, [line])))
    assert shown[0] == "no game is running; this is how game was left at 2023-11-14 23:00:00 UTC"
    assert all(text.isprintable() for text in shown)
    assert all(len(text) < 350 for text in shown)
    assert "m" * 37 + "..." in shown[3]
    assert list(table.lines(Listing("game", True, START_S, []))) == ["no model has taken part yet"]
