"""What the charts are drawn with and from: plotly's bundle, thinned prices."""

from __future__ import annotations

from pathlib import Path

import pytest

from condor_lite.report.bundle import ADDRESS
from condor_lite.storage import repositories
from condor_lite.storage.pictures import price_count, price_path
from tests.served import serve


@pytest.mark.anyio
async def test_plotly_is_served_whole_zipped_and_for_ever(tmp_path: Path) -> None:
    async with serve(tmp_path) as game:
        zipped = await game.client.get(ADDRESS)
        assert zipped.headers["content-encoding"] == "gzip"
        assert int(zipped.headers["content-length"]) < len(zipped.content) / 2
        assert "immutable" in zipped.headers["cache-control"]
        assert zipped.headers["content-type"].startswith("text/javascript")
        plain = await game.client.get(ADDRESS, headers={"accept-encoding": "identity"})
        assert plain.content == zipped.content
        assert b"Plotly" in plain.content
        again = await game.client.get(ADDRESS, headers={"if-none-match": zipped.headers["etag"]})
        assert again.status_code == 304
        assert (await game.client.get("/static/plotly-0.min.js")).status_code == 404


@pytest.mark.anyio
async def test_prices_are_thinned_to_the_last_of_each_span(tmp_path: Path) -> None:
    async with serve(tmp_path) as game:
        points = [(at_s, float(at_s)) for at_s in range(1000, 2000, 10) if not 1500 <= at_s < 1600]
        await game.db.write(repositories.add_prices, "BTC", points, "synthetic", 0)
        readers = game.db.reports
        found = await price_path(readers, "BTC", 1990, 50, 20)
        assert found[-1] == (1990, 1990.0)
        assert found[0] == (1040, 1040.0)
        assert [at_s for at_s, _ in found] == [*range(1040, 1500, 50), *range(1640, 2000, 50)]
        assert await price_path(readers, "ETH", 1990, 50, 20) == []
        assert len(await price_path(readers, "BTC", 1990, 1, 10**6)) == 90
        assert await price_count(readers, "BTC", 1000, 1100) == 10
