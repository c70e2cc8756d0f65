"""The whole game on a live feed: history, ticks, rounds, an outage, and what comes after it."""

from __future__ import annotations

import asyncio
import time
from contextlib import closing
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from condor_lite import config as configuration
from condor_lite.clock import SteppedClock
from condor_lite.prices import web
from condor_lite.prices.coinbase import CoinbaseSource
from condor_lite.scaffold import init
from condor_lite.supervisor import Game
from tests.games import joined, settle
from tests.price_server import Fault, PriceServer, price
from tests.program import Program, database, program
from tests.stage import START_S

pytestmark = pytest.mark.anyio

CONFIG = """
[[game.settings]]
assets = ["BTC", "ETH"]
horizon = "3m"
step = "1m"
interval = "2m"

[feed]
source = "coinbase"
history = "2h"

[scoring]
workers = 1

[orchestrator]
port = 0

[report]
port = 0
"""

MODEL = """
from condor_lite.tracker import TrackerBase

class Steady(TrackerBase):
    def predict(self, asset, horizon, step):
        assert len(self.prices.series(asset)[0]) > 100, "the history came first"
        return [{"type": "builtin", "name": "norm", "params": {"loc": 0, "scale": 4e-4}}] * (horizon // step)
"""

MINUTE_S = 60


@pytest.fixture
def challenge(tmp_path: Path) -> Path:
    (tmp_path / "config.toml").write_text(CONFIG)
    (tmp_path / "models" / "steady").mkdir(parents=True)
    (tmp_path / "models" / "steady" / "main.py").write_text(MODEL)
    return tmp_path


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SteppedClock:
    """The game's, the exchange's and this machine's."""
    stepped = SteppedClock(START_S - 30)
    monkeypatch.setattr(web, "time", SimpleNamespace(time=stepped.now, monotonic=stepped.now))
    monkeypatch.setattr(CoinbaseSource, "rate_per_s", 1e6)
    return stepped


async def get(game: Game, path: str) -> Any:
    async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
        reply = await client.get(game.web.url + path)
    return reply.json()


def read(folder: Path, sql: str) -> list[tuple[Any, ...]]:
    with closing(database(folder)) as db:
        return db.execute(sql).fetchall()


async def test_an_outage_is_survived_without_a_price_made_up(challenge: Path, clock: SteppedClock) -> None:
    async with PriceServer(now=clock.now) as server:
        environ = {"CONDOR_LITE__FEED__BASE_URL": server.url}
        config = configuration.load(challenge / "config.toml", environ)
        async with joined(config, clock, 1) as game:
            await clock.run_until(START_S + 20 * MINUTE_S)
            await game.journal.flushed()
            rows = {row["subject"]: row for row in await get(game, "/reports/feeds")}
            assert {row["source"] for row in rows.values()} == {"coinbase"}
            assert rows.keys() == {"BTC", "ETH"}
            assert all(row["record_count"] >= 120 for row in rows.values())
            assert (await get(game, "/statistics"))["total_predictions"] >= 16
            assert not [state for state in game.feed.states() if state.stale or state.error]

            server.outage = Fault(503, b"<html>maintenance</html>")
            server.requests.clear()
            await clock.run_until(START_S + 40 * MINUTE_S)
            await game.journal.flushed()
            for state in game.feed.states():
                assert state.stale
                assert "is in trouble (HTTP 503)" in str(state.error)
                assert state.newest_ts_s is not None
                assert state.newest_ts_s <= START_S + 20 * MINUTE_S
            assert 20 <= len(server.requests) <= 2 * 2 * 20, "it asks again, later each time"

            async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
                reply = await client.get(f"{game.web.url}/readyz")
            assert reply.status_code == 503
            assert "BTC" in reply.text

            server.outage = None
            await settle(game, clock, START_S + 60 * MINUTE_S)
            assert not [state for state in game.feed.states() if state.stale or state.error]

    for asset in ("BTC", "ETH"):
        points = read(challenge, f"SELECT ts_s, price FROM price WHERE asset = '{asset}' ORDER BY ts_s")
        first_s, last_s = points[0][0], points[-1][0]
        assert last_s >= START_S + 59 * MINUTE_S
        assert points == [(at_s, price(asset, at_s)) for at_s in range(first_s, last_s + 1, MINUTE_S)]
        rounds = dict(read(challenge, f"SELECT scheduled_at_s, status FROM round WHERE asset = '{asset}'"))
        during = {at_s: status for at_s, status in rounds.items() if 1500 < at_s - START_S <= 2400}
        assert set(during.values()) == {"skipped"}
        played = [status for at_s, status in rounds.items() if not 1200 <= at_s - START_S <= 2520]
        assert played.count("scored") >= 15
        assert set(played) <= {"scored", "closed", "open"}


def feeds(run: Program, points: int) -> list[dict[str, Any]]:
    """Once all of them have so many."""
    rows: list[dict[str, Any]] = run.get("/reports/feeds")
    return rows if all(row["record_count"] >= points for row in rows) else []


async def test_the_program_has_its_history_from_the_exchange_and_stops_cleanly(challenge: Path) -> None:
    began_s = time.time()
    async with PriceServer() as server:
        with program(challenge, CONDOR_LITE__FEED__BASE_URL=server.url) as run:
            rows = await asyncio.to_thread(run.until, lambda: feeds(run, 118))
            console = run.console.read_text()
            assert await asyncio.to_thread(run.end) == 0, console
    assert {(row["source"], row["subject"]) for row in rows} == {("coinbase", "BTC"), ("coinbase", "ETH")}
    assert all(datetime.fromisoformat(row["newest_ts"]).timestamp() > began_s - 130 for row in rows)
    assert "prices=coinbase" in console
    assert "HTTP Request" not in console, "a line for each request"


async def test_one_line_puts_a_new_challenge_on_live_prices(tmp_path: Path) -> None:
    init(tmp_path)
    text = (tmp_path / "config.toml").read_text()
    changed = [line for line in text.splitlines() if line.startswith('source = "synthetic"')]
    assert len(changed) == 1
    (tmp_path / "config.toml").write_text(text.replace(changed[0], 'source = "coinbase"'))
    async with PriceServer() as server:
        environ = {"FEED__BASE_URL": server.url, "ORCHESTRATOR__PORT": "0"}
        with program(tmp_path, **{f"CONDOR_LITE__{name}": value for name, value in environ.items()}) as run:
            rows = await asyncio.to_thread(run.until, lambda: feeds(run, 299))
            models = await asyncio.to_thread(run.until, lambda: run.get("/reports/models"))
            assert await asyncio.to_thread(run.end) == 0, run.console.read_text()
    assert {(row["source"], row["subject"]) for row in rows} == {("coinbase", "BTC"), ("coinbase", "ETH")}
    assert [model["model_id"] for model in models] == ["example"]


@pytest.mark.parametrize(
    ("void_after", "first", "reason"),
    [
        ("15m", 8, "no price of BTC came within 900 s of the end of the round"),
        ("2h", 10, "prices resolve only 0 of 3 segments; no price came for 180 s of the round"),
    ],
)
async def test_rounds_over_an_hour_without_trades_are_void_and_say_so(
    challenge: Path, clock: SteppedClock, void_after: str, first: int, reason: str
) -> None:
    halted = range(START_S + 10 * MINUTE_S, START_S + 70 * MINUTE_S)
    async with PriceServer(
        now=clock.now, silent=lambda symbol, at_s: symbol == "BTC-USD" and at_s in halted
    ) as server:
        environ = {"CONDOR_LITE__FEED__BASE_URL": server.url, "CONDOR_LITE__SCORING__VOID_AFTER": void_after}
        config = configuration.load(challenge / "config.toml", environ)
        async with joined(config, clock, 1) as game:
            await settle(game, clock, START_S + 100 * MINUTE_S)
    rounds = {
        asset: {
            (at_s - START_S) // MINUTE_S: (status, reason)
            for at_s, status, reason in read(
                challenge, f"SELECT scheduled_at_s, status, reason FROM round WHERE asset = '{asset}'"
            )
        }
        for asset in ("BTC", "ETH")
    }
    assert {rounds["BTC"][at] for at in range(0, first, 2)} == {("scored", None)}
    assert {rounds["BTC"][at] for at in range(first, 14, 2)} == {("void", reason)}, "asked until it was stale"
    assert {rounds["BTC"][at][0] for at in range(14, 72, 2)} == {"skipped"}
    assert {rounds["BTC"][at][0] for at in range(72, 96, 2)} == {"scored"}
    assert {rounds["ETH"][at][0] for at in range(1, 95, 2)} == {"scored"}


async def test_rounds_of_an_asset_that_was_left_out_are_void_and_say_so(
    challenge: Path, clock: SteppedClock
) -> None:
    async with PriceServer(now=clock.now) as server:
        environ = {"CONDOR_LITE__FEED__BASE_URL": server.url, "CONDOR_LITE__SCORING__VOID_AFTER": "5m"}
        for assets, until_s in (('["BTC", "ETH"]', START_S + 600), ('["BTC"]', START_S + 1500)):
            (challenge / "config.toml").write_text(CONFIG.replace('["BTC", "ETH"]', assets))
            config = configuration.load(challenge / "config.toml", environ)
            async with joined(config, clock, 1) as game:
                await settle(game, clock, until_s)
    rows = read(challenge, "SELECT asset, scheduled_at_s, status, reason FROM round WHERE status != 'missed'")
    last = max(row for row in rows if row[0] == "ETH")
    assert last[2:] == ("void", "no price of ETH came within 300 s of the end of the round")
    assert {status for asset, _, status, _ in rows if asset == "ETH"} == {"scored", "void"}
    after = {at_s: status for asset, at_s, status, _ in rows if asset == "BTC" and at_s > START_S + 600}
    assert {status for at_s, status in after.items() if at_s < START_S + 1200} == {"scored"}


async def test_an_asset_that_the_exchange_does_not_know_keeps_it_from_starting(challenge: Path) -> None:
    with (challenge / "config.toml").open("a") as file:
        file.write('\n[feed.symbols]\nETH = "ETH-USB"\n')
    async with PriceServer() as server:
        with program(challenge, CONDOR_LITE__FEED__BASE_URL=server.url) as run:
            code = await asyncio.to_thread(run.ended)
    complaint = run.console.read_text()
    assert code == 2
    assert 'does not know "ETH-USB" for ETH' in complaint
    assert "ETH-USD" in complaint
    assert "Traceback" not in complaint
