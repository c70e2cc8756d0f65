"""Who is believed when the machine's clock, a source's own clock and its prices disagree."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from condor_lite.clock import LiveClock
from condor_lite.config import Config, load
from condor_lite.prices import online
from condor_lite.prices.coinbase import CoinbaseSource
from condor_lite.prices.source import Source
from condor_lite.prices.witness import Witness
from condor_lite.storage import repositories
from condor_lite.storage.database import Database
from tests.machine import Machine
from tests.price_server import Fault, PriceServer
from tests.program import LIMIT_S
from tests.stage import START_S

pytestmark = pytest.mark.anyio

HOUR_S, YEAR_S = 3600, 365 * 86400
CONFIG = """
[[game.settings]]
assets = ["BTC", "ETH"]
horizon = "1h"
step = "1m"
interval = "12m"

[feed]
source = "coinbase"
base_url = "{url}"
"""


class Scene:
    """A source that knows the time, beside a machine that may not."""

    def __init__(self, machine: Machine, server: PriceServer, config: Config) -> None:
        self.machine, self.server, self.config = machine, server, config
        self.source = CoinbaseSource(config.feed)
        self._witness: Witness | None = None

    async def asks(self, clock: LiveClock) -> bool:
        self._witness = self._witness or Witness(self.config, clock, [self.source], lambda: None)
        return await self._witness.look()


@pytest.fixture
async def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Scene]:
    machine = Machine(monkeypatch, START_S)
    monkeypatch.setattr(CoinbaseSource, "rate_per_s", 1e6)
    monkeypatch.setattr("condor_lite.prices.witness._START_WAIT_S", LIMIT_S)
    async with PriceServer(now=lambda: machine.true_s) as server:
        (tmp_path / "config.toml").write_text(CONFIG.format(url=server.url))
        made = Scene(machine, server, load(tmp_path / "config.toml", {}))
        yield made
        await made.source.aclose()


@pytest.mark.parametrize("dated", [True, False])
async def test_a_machine_that_was_suspended_is_believed(scene: Scene, dated: bool) -> None:
    scene.server.dated = dated
    clock = LiveClock()
    scene.machine.sleeps(3 * HOUR_S)
    assert clock.doubt
    assert clock.now() == START_S
    assert await scene.asks(clock)
    assert clock.now() == clock.leapt_to_s == START_S + 3 * HOUR_S
    assert clock.trouble is None


@pytest.mark.parametrize("by_s", [HOUR_S, YEAR_S, -HOUR_S])
@pytest.mark.parametrize("silent", [False, True])
async def test_a_wrong_machine_is_not_believed_against_a_sources_clock(
    scene: Scene, by_s: int, silent: bool
) -> None:
    scene.server.silent = lambda symbol, open_s: silent
    clock = LiveClock()
    scene.machine.at_s += by_s
    assert clock.doubt
    assert await scene.asks(clock)
    assert clock.now() == pytest.approx(START_S, abs=2)
    assert clock.doubt is None
    assert clock.trouble


@pytest.mark.parametrize("by_s", [HOUR_S, -HOUR_S])
async def test_without_a_clock_of_the_sources_a_wrong_machine_stays_in_doubt(scene: Scene, by_s: int) -> None:
    scene.server.dated = False
    clock = LiveClock()
    scene.machine.at_s += by_s
    assert not await scene.asks(clock)
    assert clock.doubt
    scene.machine.at_s -= by_s
    assert clock.doubt is None


async def test_a_source_in_trouble_is_no_witness_even_if_it_tells_its_time(scene: Scene) -> None:
    scene.server.outage = Fault(503, b"<html>maintenance</html>")
    clock = LiveClock()
    scene.machine.at_s += YEAR_S
    scene.server.now = lambda: scene.machine.true_s + 10 * YEAR_S
    assert not await scene.asks(clock)
    assert clock.now() == START_S


async def test_a_sources_wrong_clock_moves_nothing(scene: Scene) -> None:
    true = scene.server.now
    clock = LiveClock()
    assert await scene.asks(clock)
    scene.server.now = lambda: true() + YEAR_S
    assert await scene.asks(clock)
    assert clock.now() == START_S
    assert clock.trouble is None


async def test_a_machine_that_starts_behind_is_not_believed_against_later_prices(scene: Scene) -> None:
    scene.machine.at_s -= 5 * HOUR_S  # one without a clock of its own wakes where it was turned off
    clock = LiveClock(START_S - 5 * HOUR_S)
    assert await scene.asks(clock)
    assert clock.now() == pytest.approx(START_S, abs=2)
    assert clock.trouble == "the machine's clock is 5:00:00 behind that of the prices, which the game goes by"


async def test_a_silent_source_keeps_no_other_from_being_asked(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("condor_lite.prices.witness._TIMEOUT_S", math.inf)

    class Dead(CoinbaseSource):
        async def fetch(self, *question: Any) -> Any:
            await asyncio.Event().wait()

    scene.machine.sleeps(3 * HOUR_S)
    clock = LiveClock(START_S)
    dead = Dead(scene.config.feed)
    assert await Witness(scene.config, clock, [dead, scene.source], lambda: None).look()
    await dead.aclose()
    assert clock.now() == START_S + 3 * HOUR_S


async def test_a_source_that_answers_nonsense_is_no_witness(scene: Scene) -> None:
    class Own(Source):
        name = "own"

        async def fetch(self, *question: Any) -> Any:
            return None

    assert not await Witness(scene.config, LiveClock(START_S), [Own()], lambda: None).look()


async def test_a_source_of_short_pages_is_a_witness_and_shown_by_the_check(scene: Scene) -> None:
    class Own(Source):
        name = "own"
        page_points = 2

        async def fetch(self, asset: str, after_s: int, until_s: int, step_s: int) -> list[tuple[int, float]]:
            if until_s - after_s > 2 * step_s:
                raise ValueError("too many points")
            return [(START_S - 120, 1.0)] if after_s < START_S - 120 <= until_s else []

    clock = LiveClock(START_S - 5 * HOUR_S)
    assert clock.doubt
    assert await Witness(scene.config, clock, [Own()], lambda: None).look()
    assert clock.doubt is None
    (found,), _ = await online.look([Own()], ["BTC"], 60, 180, lambda: START_S)
    assert found.point == (START_S - 120, 1.0)


@pytest.mark.parametrize("dated", [True, False])
async def test_a_game_that_stored_a_future_is_set_back_and_keeps_what_was_answered(
    scene: Scene, tmp_path: Path, dated: bool
) -> None:
    scene.server.dated = dated
    async with Database(tmp_path / "condor.db") as db:
        await db.write(repositories.save_clock, START_S + YEAR_S)
        clock = LiveClock(await db.read(repositories.load_clock))
        witness = Witness(scene.config, clock, [scene.source], lambda: None)
        await witness.confirm(db)
        assert clock.now() == pytest.approx(START_S, abs=2)
        assert clock.trouble is None
        assert await db.read(repositories.load_clock) == pytest.approx(START_S, abs=2)


async def test_a_game_whose_machine_forgot_the_time_is_not_set_back(scene: Scene, tmp_path: Path) -> None:
    scene.machine.at_s -= YEAR_S
    async with Database(tmp_path / "condor.db") as db:
        await db.write(repositories.save_clock, START_S - 10 * HOUR_S)
        clock = LiveClock(await db.read(repositories.load_clock))
        await Witness(scene.config, clock, [scene.source], lambda: None).confirm(db)
        assert clock.now() == pytest.approx(START_S, abs=2), "what the source says, as its prices do"
        assert await db.read(repositories.load_clock) == START_S - 10 * HOUR_S
