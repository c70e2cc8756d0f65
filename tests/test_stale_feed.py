"""What models and rounds see of a feed that is not all there: an outage, and a history still on its way."""

from __future__ import annotations

from pathlib import Path

import pytest

from condor_lite.clock import SteppedClock
from condor_lite.prices.source import SourceError
from tests.exchange import MINUTE_S, Exchange, walk
from tests.fleet import ModelServer
from tests.stage import START_S, staged, until

pytestmark = pytest.mark.anyio

CONFIG = """
[[game.settings]]
assets = ["BTC", "ETH"]
horizon = "10m"
step = "1m"
interval = "2m"

[feed]
history = "6h"

[orchestrator]
mode = "remote"
"""

PRICES = {asset: walk(7, START_S - 86400, START_S + 86400) for asset in ("BTC", "ETH")}


async def test_an_outage_skips_the_assets_rounds_and_ends_with_one_tick(tmp_path: Path) -> None:
    model = ModelServer("a")
    down = False

    async def fault(asset: str) -> None:
        if down and asset == "BTC":
            raise SourceError("HTTP 503")

    def live(clock: SteppedClock) -> Exchange:
        return Exchange(clock, PRICES, fault=fault)

    async with staged(tmp_path, CONFIG, live=live) as stage:
        await stage.join(model)
        await stage.play(10)
        down, seen = True, len(model.ticks)
        await stage.play(600)
        assert len(model.ticks) > seen
        assert not any("BTC" in tick for tick in model.ticks[seen:]), "no tick without a new point"
        (btc, eth) = stage.feed.states()
        assert (btc.stale, btc.error, eth.stale) == (True, "HTTP 503", False)
        down = False
        await stage.play(130)
        await until(lambda: any("BTC" in tick for tick in model.ticks[seen:]))
        first = next(tick for tick in model.ticks[seen:] if "BTC" in tick)
        assert [int(ts_s) for ts_s, _ in first["BTC"]][:10] == [START_S + MINUTE_S * k for k in range(1, 11)]
        rounds = await stage.rows(
            "SELECT asset, (scheduled_at_s - ?) / 60, status, reason FROM round ORDER BY 1, 2", START_S
        )
    skipped = [(asset, minute) for asset, minute, status, _ in rounds if status == "skipped"]
    assert skipped == [("BTC", minute) for minute in (4, 6, 8, 10)]
    assert {reason for _, _, status, reason in rounds if status == "skipped"} == {
        f"the newest BTC price is {60 * minute} s old (feed.max_staleness: 180 s)" for minute in (4, 6, 8, 10)
    }
    held = [(asset, minute) for asset, minute, status, _ in rounds if status in ("open", "closed")]
    assert ("BTC", 12) in held
    assert {("ETH", minute) for minute in (1, 3, 5, 7, 9, 11)} <= set(held)


async def test_models_are_given_their_history_once_it_is_there(tmp_path: Path) -> None:
    model = ModelServer("a")
    blocked = True

    async def fault(asset: str) -> None:
        if blocked and asset == "ETH":
            raise SourceError("HTTP 503")

    async with staged(tmp_path, CONFIG, live=lambda clock: Exchange(clock, PRICES, fault=fault)) as stage:
        await model.start()
        stage.models.append(model)
        await stage.orchestrator.announce(model)
        await until(lambda: "a" in stage.predict.participants)
        await stage.play(30)
        assert not model.ticks
        blocked = False
        await stage.play(60)  # longer than it ever waits by then, and not until nobody waits for it any more
        await until(lambda: model.ticks)
    assert {asset: len(points) for asset, points in model.ticks[0].items()} == {"BTC": 360, "ETH": 360}
