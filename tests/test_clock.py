"""The game's clock follows the wall's forward and never back; a stepped one waits for whoever holds it."""

from __future__ import annotations

import asyncio

import pytest

from condor_lite import clock as module
from condor_lite.clock import GameClock, SteppedClock

pytestmark = pytest.mark.anyio


async def test_the_clock_never_goes_back_and_says_for_how_long_it_stands_still(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wall = [1000.0]
    monkeypatch.setattr(module.time, "time", lambda: wall[0])
    clock = GameClock(not_before_s=900)
    assert clock.now() == 1000
    wall[0] = 400
    assert clock.now() == 1000
    assert clock.stands_still_for_s == 600
    wall[0] = 1001
    assert clock.now() == 1001
    assert clock.stands_still_for_s == 0
    assert GameClock(not_before_s=5000).now() == 5000


async def test_a_clock_that_is_set_forward_is_noticed_while_asleep(monkeypatch: pytest.MonkeyPatch) -> None:
    wall = [1000.0]
    monkeypatch.setattr(module.time, "time", lambda: wall[0])
    monkeypatch.setattr(GameClock, "_LONGEST_SLEEP_S", 0.01)
    sleeping = asyncio.create_task(GameClock().sleep_until(2000))
    await asyncio.sleep(0)
    wall[0] = 2000
    await asyncio.wait_for(sleeping, 5)


async def test_a_scaled_clock_runs_on_from_where_it_was_started() -> None:
    clock = GameClock(5000, speed=1000)
    await clock.sleep_until(5020)
    assert clock.now() >= 5020
    assert clock.wall_s(1000) == 1
    with pytest.raises(ValueError, match="needs a start"):
        GameClock(speed=2)


async def test_a_stepped_clock_stands_still_while_it_is_held() -> None:
    clock = SteppedClock(0)
    seen: list[tuple[str, float]] = []
    release = asyncio.Event()

    async def worker() -> None:
        await clock.sleep_until(10)
        with clock.hold():
            await release.wait()
            seen.append(("worker", clock.now()))

    async def other() -> None:
        await clock.sleep_until(20)
        seen.append(("other", clock.now()))

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(worker())
        tasks.create_task(other())
        driving = tasks.create_task(clock.run_until(30))
        await asyncio.sleep(0.01)
        assert clock.now() == 10
        release.set()
        await driving
    assert seen == [("worker", 10), ("other", 20)]
    assert clock.now() == 30
