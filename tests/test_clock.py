"""The game's clock follows the wall's forward and never back; a stepped one waits for whoever holds it."""

from __future__ import annotations

import asyncio

import pytest

from condor_lite import clock as module
from condor_lite.clock import GameClock, LiveClock, SteppedClock
from tests.machine import Machine
from tests.stage import until

pytestmark = pytest.mark.anyio

YEAR_S = 365 * 86400


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch, 1e6)


def test_a_live_clock_never_goes_back_and_says_for_how_long_it_stands_still(machine: Machine) -> None:
    clock = LiveClock(1e6 - 30)
    assert clock.now() == 1e6
    machine.at_s -= 40
    assert clock.now() == 1e6
    assert clock.trouble == "the machine's clock was set back: the game stands still for 40 s"
    machine.passes(41)
    assert clock.now() == 1e6 + 1
    assert clock.trouble is None


@pytest.mark.parametrize("by_s", [YEAR_S, 7200, -7200, -YEAR_S])
def test_a_live_clock_follows_no_leap_that_nobody_confirms(machine: Machine, by_s: float) -> None:
    clock = LiveClock()
    assert clock.now() == 1e6
    machine.at_s += by_s
    machine.passes(10)
    assert clock.now() == 1e6 + 10
    assert clock.doubt is not None
    assert ("ahead of" if by_s > 0 else "behind") in clock.doubt
    assert clock.trouble == clock.doubt
    machine.at_s -= by_s
    machine.passes(10)
    assert clock.now() == 1e6 + 20
    assert clock.doubt is clock.trouble is None


def test_a_live_clock_follows_a_leap_that_is_confirmed(machine: Machine) -> None:
    clock = LiveClock()
    machine.at_s += 7200
    clock.told(machine.at_s + 5)
    assert clock.now() == machine.at_s
    assert clock.doubt is clock.trouble is None


def test_a_live_clock_goes_by_a_source_that_says_the_machines_is_wrong(machine: Machine) -> None:
    clock = LiveClock()
    machine.at_s += YEAR_S
    clock.told(1e6 + 5)
    machine.passes(100)
    assert clock.now() == 1e6 + 100
    assert clock.doubt is None
    assert "365 days, 0:00:00 ahead of that of the prices" in str(clock.trouble)
    machine.at_s -= 7200
    assert clock.doubt, "it leapt again"


def test_a_live_clock_that_went_ahead_from_the_start_says_so_and_goes_back(machine: Machine) -> None:
    machine.at_s += YEAR_S
    clock = LiveClock()
    clock.now()
    machine.at_s -= YEAR_S
    clock.told(1e6)
    assert clock.ahead_s == YEAR_S
    assert clock.now() == 1e6 + YEAR_S, "not while anybody goes by it"
    clock.go_back(1e6 + 300)
    machine.passes(1)
    assert clock.ahead_s == 0
    assert clock.now() == 1e6 + 300, "up to where answers are stored"
    machine.passes(300)
    assert clock.now() == 1e6 + 301


async def test_a_clock_that_is_set_forward_is_noticed_while_asleep(monkeypatch: pytest.MonkeyPatch) -> None:
    wall = [1000.0]
    monkeypatch.setattr(module.time, "time", lambda: wall[0])
    monkeypatch.setattr(GameClock, "_LONGEST_SLEEP_S", 0.01)
    sleeping = asyncio.create_task(GameClock().sleep_until(2000))
    await asyncio.sleep(0)
    wall[0] = 2000
    await asyncio.wait_for(sleeping, 60)


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
        await until(lambda: clock.now() == 10)
        for _ in range(100):
            await asyncio.sleep(0)
        assert clock.now() == 10
        release.set()
        await driving
    assert seen == [("worker", 10), ("other", 20)]
    assert clock.now() == 30
