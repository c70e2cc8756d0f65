"""Every service is killed by an exception, one after another, in a running game, and comes back."""

from __future__ import annotations

import asyncio
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator
from itertools import groupby
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
import structlog

from condor_lite import config as configuration
from condor_lite import supervisor
from condor_lite.errors import StorageUnavailable
from condor_lite.supervisor import Game, Service, playing
from tests.program import LIMIT_S
from tests.stage import until

pytestmark = pytest.mark.anyio

CONFIG = """
[game]
speed = 20

[[game.settings]]
assets = ["BTC", "ETH"]
horizon = "20s"
step = "20s"
interval = "20s"

[predict]
max_consecutive_timeouts = 1000000

[feed]
tick = "5s"
history = "10m"

[scoring]
interval = "1s"
workers = 1

[backup]
every = "6h"

[webhook]
url = "http://127.0.0.1:9/"
secret = "a secret of the test's own, long enough"

[orchestrator]
port = 0

[report]
port = 0
"""

SERVICES = {
    "control",
    "predict",
    "fleet",
    "models",
    "rescore",
    "score",
    "feed",
    "upkeep",
    "journal",
    "report",
    "watchdog",
    "backup",
    "alarms",
    "webhook",
}


_ENDS_WITHIN_S = 20.0  # a service that was killed, with all that it has to put away


class Injected(Exception):
    """What kills a service."""


class Pauses:
    """Stands in for asyncio in the supervisor: the pause before a restart lasts until it is `over`."""

    def __init__(self) -> None:
        self.over = asyncio.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    async def sleep(self, pause_s: float) -> None:
        await self.over.wait()


class Mortal(Service):
    """A service that `kill()` ends with an exception where it stands, in its innermost `await`."""

    def __init__(self, name: str, run: Callable[..., Awaitable[None]], *others: Any, **options: Any) -> None:
        async def mortal(**started: Any) -> None:
            self._task = asyncio.current_task()
            await self._drive(run(**started))

        super().__init__(name, mortal, *others, **options)
        self._task: asyncio.Task[Any] | None = None
        self._condemned = False

    async def kill(self) -> None:
        """Until it has failed: what it waited for may take the exception for a failure of its own."""
        assert self._task is not None
        while not self.failure:
            self._condemned = True
            self._task.cancel()
            with anyio.move_on_after(_ENDS_WITHIN_S):
                await until(lambda: self.failure)

    @types.coroutine
    def _drive(self, work: Coroutine[Any, Any, None]) -> Generator[Any, Any, None]:
        go_on: Callable[[Any], Any] = work.send
        value: Any = None
        while True:
            try:
                awaited = go_on(value)
            except StopIteration:
                return
            try:
                go_on, value = work.send, (yield awaited)
            except BaseException as error:
                go_on, value = work.throw, error
                if self._condemned:
                    self._condemned, value = False, Injected("by the test")
                    assert self._task is not None
                    while self._task.uncancel():
                        pass


async def ready(game: Game) -> tuple[int, str]:
    async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
        reply = await client.get(f"{game.web.url}/readyz")
    return reply.status_code, reply.text


def scored(game: Game) -> float:
    return game.live.leaderboard.created_at_s if game.live.leaderboard else 0.0


@pytest.mark.timeout(1200)
async def test_every_service_that_is_killed_comes_back_while_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "Service", Mortal)
    pauses = Pauses()
    monkeypatch.setattr(supervisor, "asyncio", pauses)
    (tmp_path / "config.toml").write_text(CONFIG)
    config = configuration.load(tmp_path / "config.toml", {})
    with structlog.testing.capture_logs() as logs:
        async with playing(config) as game:
            await until(lambda: scored(game))
            services = {service.name: service for service in game.services}
            assert services.keys() == SERVICES
            for name, service in services.items():
                assert isinstance(service, Mortal)
                before = {other.name: other.restarts for other in game.services}
                rounds, leaderboard_s = len(await held(game)), scored(game)
                await service.kill()
                assert "Injected" in str(service.failure) or "ExceptionGroup" in str(service.failure)
                assert any(f"{name} is down" in problem.what for problem in game.problems())
                if name != "report":
                    status, said = await ready(game)
                    assert (status, f"{name} is down" in said) == (503, True), said
                pauses.over.set()
                await until(lambda service=service: not service.failure)
                pauses.over.clear()
                await until_held(game, rounds + 2)
                await until(lambda since_s=leaderboard_s: scored(game) > since_s)
                after = {other.name: other.restarts for other in game.services}
                assert after == {**before, name: before[name] + 1}, "nobody else was restarted"
            await until_ready(game)
    failures = [line["service"] for line in logs if line["event"] == "service_failed"]
    assert [name for name, _ in groupby(failures)] == list(services), "each in turn"


async def held(game: Game) -> list[Any]:
    """The rounds that got answers, and of which these are on disk."""
    return await game.db.read(
        lambda conn: conn.execute(
            "SELECT round_no FROM round WHERE status IN ('closed', 'scored') AND answered > 0"
        ).fetchall()
    )


async def until_held(game: Game, count: int) -> None:
    async with asyncio.timeout(LIMIT_S):
        while len(await held(game)) < count:  # noqa: ASYNC110 - a commit has no event
            await asyncio.sleep(0.05)


async def until_ready(game: Game) -> None:
    async with asyncio.timeout(LIMIT_S):
        while (await ready(game))[0] != 200:  # noqa: ASYNC110 - neither has this
            await asyncio.sleep(0.05)


@pytest.mark.parametrize(("error", "longest_s"), [(RuntimeError, 0.08), (StorageUnavailable, 0.02)])
async def test_a_disk_that_is_full_for_long_is_tried_again_soon(
    error: type[Exception], longest_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "_RESTART_FIRST_S", 0.01)
    monkeypatch.setattr(supervisor, "_RESTART_MOST_UNSTORED_S", 0.02)
    tries = 0

    async def fails() -> None:
        nonlocal tries
        tries += 1
        if tries > 4:
            await asyncio.Event().wait()
        raise error("the disk is full")

    with structlog.testing.capture_logs() as logs:
        service = Service("score", fails, lambda event: None)
        running = asyncio.create_task(service.serve())
        await until(lambda: tries > 4)
        await service.stop()
        await running
    pauses_s = [line["restart_in_s"] for line in logs if line["event"] == "service_failed"]
    assert pauses_s == [min(0.01 * 2**failure, longest_s) for failure in range(4)]


async def test_a_cancelled_wait_in_one_service_ends_neither_it_nor_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(supervisor, "_RESTART_FIRST_S", 0.01)
    tries = 0

    async def waits() -> None:
        nonlocal tries
        tries += 1
        never = asyncio.get_running_loop().create_future()
        if tries == 1:
            never.cancel()  # as a client does with the calls on a connection that it closes
        await never

    async with anyio.create_task_group() as tasks:
        service = Service("fleet", waits, lambda event: None)
        tasks.start_soon(service.serve)
        await until(lambda: tries == 2)
        await service.stop()
    assert (tries, service.restarts) == (2, 1)
