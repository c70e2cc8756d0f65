"""The game heals by itself: an orchestrator that fails, models that hang at the start, many newcomers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from condor_lite.models.runner import Connection, Reply
from tests import fleet
from tests.fleet import ModelServer
from tests.stage import START_S, Stage, staged, until, within

pytestmark = pytest.mark.anyio

MIB = 2**20
PATIENT = within("10s")  # nobody here is slow but the machine


@pytest.fixture(autouse=True)
def _soon_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("condor_lite.models.fleet._RECONNECT_S", 0.02)


async def started(stage: Stage, *models: ModelServer) -> None:
    for model in models:
        await model.start()
        stage.models.append(model)


async def only(stage: Stage, *model_ids: str) -> None:
    """Wait until these are the models that play."""
    await until(lambda: {name for name in stage.predict.participants if stage.ready(name)} == set(model_ids))


async def answered_all(stage: Stage, *models: ModelServer, since_s: float) -> None:
    """Every round since then has an answer of each of these models."""
    answers = await stage.answers()
    rounds = [closed.scheduled_at_s for closed in stage.closed if closed.scheduled_at_s > since_s]
    assert rounds
    for model in models:
        missing = [at_s for at_s in rounds if answers.get((model.model_id, at_s)) != ("SUCCESS", None)]
        assert not missing, model.model_id


async def test_models_play_on_without_an_orchestrator_which_comes_back_with_others(tmp_path: Path) -> None:
    stays, goes, comes = ModelServer("stays"), ModelServer("goes"), ModelServer("comes")
    async with staged(tmp_path, PATIENT) as stage:
        await stage.join(stays, goes)
        await stage.orchestrator.stop()
        await until(lambda: not stage.predict.fleet.connected)
        gone_s = stage.clock.now()
        await stage.play(300)
        await answered_all(stage, stays, goes, since_s=gone_s)
        await started(stage, comes)
        stage.orchestrator.entries = {model.model_id: model.entry() for model in (stays, comes)}
        await stage.orchestrator.start()
        await only(stage, "stays", "comes")
        back_s = stage.clock.now()
        await stage.play(40)
        await answered_all(stage, stays, comes, since_s=back_s)
        assert stays.setups == 1, "who ran all the time is left alone"


async def test_an_orchestrator_that_dies_in_the_middle_of_init_removes_nobody(tmp_path: Path) -> None:
    stays, comes = ModelServer("stays"), ModelServer("comes")
    async with staged(tmp_path, PATIENT) as stage:
        await stage.join(stays)
        await started(stage, comes)
        await stage.orchestrator.stop()
        stage.orchestrator.die_in_init = True
        stage.orchestrator.entries["comes"] = comes.entry()
        await stage.orchestrator.start()
        tried = stage.orchestrator.connections
        await until(lambda: stage.orchestrator.connections >= tried + 3)
        before_s = stage.clock.now()
        await stage.play(40)
        await answered_all(stage, stays, since_s=before_s)
        assert not stage.ready("comes")
        stage.orchestrator.die_in_init = False
        await only(stage, "stays", "comes")
        assert stays.setups == 1


@pytest.mark.parametrize("message", ['{"event": "init", "data": [', "null", '{"event": "init"}', b"\xff\xfe"])
async def test_a_message_that_cannot_be_read_has_the_list_told_anew(
    message: str | bytes, tmp_path: Path
) -> None:
    stays, goes, comes = ModelServer("stays"), ModelServer("goes"), ModelServer("comes")
    async with staged(tmp_path, PATIENT) as stage:
        await stage.join(stays, goes)
        await started(stage, comes)
        before_s = stage.clock.now()
        stage.orchestrator.entries = {model.model_id: model.entry() for model in (stays, comes)}
        await stage.orchestrator.send(message)
        await only(stage, "stays", "comes")
        await stage.play(40)
        await answered_all(stage, stays, since_s=before_s)
        assert stays.setups == 1


async def test_updates_are_followed_after_an_init_that_can_never_be_read(tmp_path: Path) -> None:
    stays, comes = ModelServer("stays"), ModelServer("comes")
    async with staged(tmp_path, PATIENT) as stage:
        await stage.join(stays)
        await stage.orchestrator.stop()
        stage.orchestrator.first = "{"
        await stage.orchestrator.start()
        tried = stage.orchestrator.connections
        await until(lambda: stage.orchestrator.connections >= tried + 2 and stage.predict.fleet.connected)
        await stage.join(comes)
        await only(stage, "stays", "comes")
        assert stays.setups == 1


@pytest.mark.parametrize("size", [2 * MIB, 33 * MIB])
async def test_a_large_message_is_read_and_one_that_is_too_large_has_the_list_told_anew(
    size: int, tmp_path: Path
) -> None:
    stays, comes = ModelServer("stays"), ModelServer("comes")
    async with staged(tmp_path, PATIENT) as stage:
        await stage.join(stays)
        await started(stage, comes)
        stage.orchestrator.entries["comes"] = comes.entry()
        update = {"event": "update", "data": [comes.entry()], "padding": "x" * size}
        await stage.orchestrator.send(json.dumps(update))
        await only(stage, "stays", "comes")
        assert stage.orchestrator.connections == (1 if size < 32 * MIB else 2)
        before_s = stage.clock.now()
        await stage.play(40)
        await answered_all(stage, stays, comes, since_s=before_s)
        assert stays.setups == 1


async def test_a_flood_of_updates_costs_nobody_a_round(tmp_path: Path) -> None:
    stays, restless, comes = ModelServer("stays"), ModelServer("restless"), ModelServer("comes")
    async with staged(tmp_path, PATIENT) as stage:
        await stage.join(stays)
        await started(stage, restless, comes)
        before_s = stage.clock.now()
        playing = asyncio.create_task(stage.play(60))
        for _ in range(300):
            await stage.orchestrator.announce(stays, restless)
            await stage.orchestrator.announce(restless, state="STOPPED")
        await stage.orchestrator.announce(comes)
        await playing
        await only(stage, "stays", "comes")
        await stage.play(40)
        await answered_all(stage, stays, since_s=before_s)
        assert stays.setups == 1


async def test_who_hangs_at_the_start_delays_nobody(tmp_path: Path) -> None:
    hanging = [ModelServer(f"hanging-{number}", setup=fleet.hangs_in_setup) for number in range(5)]
    model = ModelServer("model")
    with socket.create_server(("127.0.0.1", 0), backlog=64) as silent:
        port = silent.getsockname()[1]
        async with staged(tmp_path, PATIENT) as stage:
            await stage.orchestrator.say([ModelServer(f"silent-{n}", port=port).entry() for n in range(5)])
            await started(stage, *hanging)
            await stage.orchestrator.announce(*hanging)
            await until(lambda: all(server.setups for server in hanging))
            await stage.join(model)
            before_s = stage.clock.now()
            await stage.play(40)
            await answered_all(stage, model, since_s=before_s)
            others = {*stage.predict.fleet.connecting, *stage.predict.fleet.refused}
            assert len(others) == 10, (
                "all the others are still at it, or have used up the time that they have"
            )


@contextlib.asynccontextmanager
async def slow_to_open(port: int, opens_in_s: float) -> AsyncIterator[int]:
    """A port whose lines lead to `port`, and say nothing for so long at first."""
    tasks: set[asyncio.Task[None]] = set()

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(OSError):
            while data := await reader.read(MIB):
                writer.write(data)
                await writer.drain()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(opens_in_s)
        try:
            inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            writer.close()
            return
        for ends in ((reader, inner_writer), (inner_reader, writer)):
            tasks.add(asyncio.create_task(carry(*ends)))

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            await asyncio.gather(*tasks)


async def test_a_model_at_the_end_of_a_line_that_opens_slowly_is_connected(tmp_path: Path) -> None:
    model = ModelServer("far")
    await model.start()
    async with slow_to_open(model.port, 2.0) as port, staged(tmp_path, PATIENT) as stage:
        stage.models.append(model)
        await stage.orchestrator.say([{**model.entry(), "port": port}])
        await only(stage, "far")
        assert model.setups == 1


MONTH = PATIENT.replace('assets = ["BTC", "ETH"]', 'assets = ["BTC", "ETH", "SOL", "XAU"]').replace(
    'history = "1h"', 'history = "30d"'
)


async def test_twenty_newcomers_share_one_encoded_month_and_cost_nobody_a_tick_or_a_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: dict[str, list[bytes]] = {}
    ask = Connection.ask

    async def noted(self: Connection, request: bytes, timeout_s: float) -> Reply:
        if len(request) > MIB:
            sent.setdefault(self.deployment_id, []).append(request)
        return await ask(self, request, timeout_s)

    monkeypatch.setattr(Connection, "ask", noted)
    veterans = [ModelServer(f"veteran-{number}") for number in range(3)]
    async with staged(tmp_path, MONTH) as stage:
        await stage.join(*veterans)
        begun_s = stage.clock.now()
        for deployment in (1, 2):
            newcomers = [
                ModelServer(f"newcomer-{number}", deployment=deployment, remember=False)
                for number in range(20)
            ]
            await started(stage, *newcomers)
            sent.clear()
            playing = asyncio.create_task(stage.play(40))
            await stage.orchestrator.announce(*newcomers)
            await playing
            await until(lambda given=sent: len(given) == 20)
            await only(stage, *(model.model_id for model in [*veterans, *newcomers]))
            joined_s = stage.clock.now()
            await stage.play(40)
            await answered_all(stage, *newcomers, since_s=joined_s)
            assert all(len(requests) == 1 for requests in sent.values())
            given = [requests[0] for requests in sent.values()]
            assert len({id(request) for request in given}) == len(set(given)) < 10, (
                "one for each newest price"
            )
        await answered_all(stage, *veterans, since_s=begun_s)
        for model in veterans:
            for asset in ("BTC", "ETH", "SOL", "XAU"):
                points = [int(ts_s) for tick in model.ticks[1:] for ts_s, _ in tick.get(asset, [])]
                assert points == list(range(points[0], points[-1] + 1, 5)), "each point once, in order"
                assert points[0] <= START_S + 10
                assert points[-1] >= stage.clock.now() - 5


def _patience_ms(port: int) -> list[int]:
    """For how long each of this process's connections to `port` waits for the network."""
    found = []
    for file in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            if not str(file.readlink()).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(file.name))) as connection:
                inet = connection.family in (socket.AF_INET, socket.AF_INET6)
                if inet and connection.getpeername()[1] == port:
                    found.append(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT))
    return found


async def test_a_connection_bears_seconds_without_a_network(tmp_path: Path) -> None:
    model = ModelServer("model")
    async with staged(tmp_path, PATIENT) as stage:
        await stage.join(model)
        found = _patience_ms(model.port)
        assert found
        assert all(patience_ms == 0 or patience_ms >= 10_000 for patience_ms in found), (
            "0: as the system has it"
        )
