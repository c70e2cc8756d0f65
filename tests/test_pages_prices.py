"""The page of the prices."""

from __future__ import annotations

from pathlib import Path

import pytest

from condor_lite.report.pages.picture import with_gaps
from condor_lite.storage import repositories
from tests.pages import blocks, links_lead_somewhere, page, text
from tests.served import NOW_S, play, serve


@pytest.mark.anyio
async def test_each_asset_has_its_prices_and_its_feed(tmp_path: Path) -> None:
    async with serve(tmp_path) as game:
        await play(game)
        points = [(at_s, 100.0 + at_s % 7) for at_s in range(NOW_S - 3600, NOW_S, 10)]
        await game.db.write(repositories.add_prices, "BTC", points, "synthetic", 0)
        html = await page(game, "/prices")
        (btc,) = blocks(html)
        assert len(btc["t"]) == len(btc["p"])
        assert 300 < len(btc["t"]) <= 400
        assert btc["t"] == sorted(btc["t"])
        shown = text(html)
        assert "No price yet" in shown, "ETH has none"
        assert "359 of 360" in shown or "360 of 360" in shown
        assert "stale" in shown
        await links_lead_somewhere(game, html, "/prices")


@pytest.mark.anyio
async def test_the_range_bounds_what_is_drawn(tmp_path: Path) -> None:
    async with serve(tmp_path) as game:
        points = [(at_s, 100.0) for at_s in range(NOW_S - 8 * 86400, NOW_S, 60)]
        await game.db.write(repositories.add_prices, "BTC", points, "synthetic", 0)
        for length, reach_s in (("1h", 3600), ("6h", 21600), ("1d", 86400), ("7d", 7 * 86400)):
            (btc,) = blocks(await page(game, "/prices", range=length))
            assert len(btc["t"]) <= 400
            assert 0.9 * reach_s < btc["t"][-1] - btc["t"][0] <= reach_s
        await page(game, "/prices", 400, range="1y")


@pytest.mark.anyio
async def test_synthetic_prices_are_called_so(tmp_path: Path) -> None:
    async with serve(tmp_path) as game:
        assert "the game makes them up" in text(await page(game, "/prices"))


def test_a_gap_breaks_the_line() -> None:
    points = [(at_s, 1.0) for at_s in (0, 10, 20, 30, 100, 110)]
    assert [price for _, price in with_gaps(points)] == [1.0] * 4 + [None] + [1.0] * 2
    assert with_gaps(points[:4]) == points[:4]
    assert with_gaps([]) == []
