"""The whole game, every part real, on stepped time: six hours of rounds with the bundled models."""

from __future__ import annotations

import shutil
import sqlite3
from collections import Counter
from contextlib import closing
from pathlib import Path

import numpy as np
import orjson
import pytest
from scipy import integrate, stats

import condor_lite
from condor_lite import config as configuration
from condor_lite.clock import SteppedClock
from condor_lite.game import schedule
from condor_lite.game.entities import Leaderboard
from condor_lite.storage.compression import decompress
from condor_lite.storage.database import open_read_only
from tests.games import joined, settle
from tests.prices import recorded

pytestmark = pytest.mark.anyio

HOUR_S = 3600
BUNDLED = [
    path.parent for path in (Path(condor_lite.__file__).parent / "models" / "examples").glob("*/main.py")
]
NIGHT_OF_THE_PEG_S = 1_678_489_200  # 2023-03-10 23:00 UTC: USDC leaves its peg in the hours that follow

SETTINGS = """
[[game.settings]]
assets = [{assets}]
horizon = "1h"
step = "1m"
interval = "12m"

[orchestrator]
port = 0

[report]
port = 0

[scoring]
workers = 1
"""


async def play(
    config: configuration.Config, start_s: int, hours: int, models: int = len(BUNDLED)
) -> Leaderboard:
    """Play rounds for so many hours, and one more in which the last are resolved; the final leaderboard."""
    clock = SteppedClock(start_s - 30)
    async with joined(config, clock, models) as game:
        await settle(game, clock, start_s + (hours + 1) * HOUR_S + 180)
        assert game.live.leaderboard is not None
        return game.live.leaderboard


def check_books(path: Path, config: configuration.Config, start_s: int, hours: int) -> None:
    """Every round due was held, every answer is there once, every one that resolved is scored once."""
    with closing(open_read_only(path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
        for setting in config.game.settings:
            due = schedule.due(setting, start_s, start_s + hours * HOUR_S)
            rows = db.execute(
                "SELECT scheduled_at_s, status, answered FROM round WHERE asset = ? AND scheduled_at_s > ?"
                " AND scheduled_at_s <= ? ORDER BY scheduled_at_s",
                (setting.asset, start_s, start_s + hours * HOUR_S),
            ).fetchall()
            assert [row[0] for row in rows] == due
            assert Counter(row[1] for row in rows) == {"scored": len(due)}
            assert {row[2] for row in rows} == {len(BUNDLED)}
        unscored = db.execute(
            "SELECT count(*) FROM prediction JOIN round USING (round_no)"
            " LEFT JOIN score USING (round_no, model_no)"
            " WHERE round.status = 'scored' AND prediction.status = 'SUCCESS' AND raw IS NULL"
        ).fetchone()[0]
        assert unscored == 0


def check_by_hand(path: Path) -> None:
    """A stored score equals the CRPS integral of the stored answer over the stored prices."""
    with closing(open_read_only(path)) as db:
        body, raw, asset, at_s, step_s, horizon_s = db.execute(
            "SELECT body, raw, asset, scheduled_at_s, step_s, horizon_s FROM score"
            " JOIN model USING (model_no) JOIN payload USING (round_no, model_no) JOIN round USING (round_no)"
            " WHERE model_id = 'student_t' ORDER BY round_no LIMIT 1"
        ).fetchone()
        prices = [price_at(db, asset, at_s + k * step_s) for k in range(horizon_s // step_s + 1)]
    moves = np.diff(np.log(prices))
    by_segment = []
    for density, move in zip(orjson.loads(decompress(body)), moves, strict=True):
        density = density.get("prediction", density)
        assert density["name"] == "t"
        family = stats.t(**density["params"])
        wide = {"epsabs": 0, "epsrel": 1e-9}
        below = integrate.quad(lambda z, f=family: f.cdf(z) ** 2, -np.inf, move, **wide)[0]
        above = integrate.quad(lambda z, f=family: f.sf(z) ** 2, move, np.inf, **wide)[0]
        by_segment.append(1e4 * (below + above))
    assert raw == pytest.approx(np.mean(by_segment), rel=1e-6)


def price_at(db: sqlite3.Connection, asset: str, at_s: int) -> float:
    (price,) = db.execute(
        "SELECT price FROM price WHERE asset = ? AND ts_s <= ? ORDER BY ts_s DESC LIMIT 1", (asset, at_s)
    ).fetchone()
    return float(price)


def show(leaderboard: Leaderboard) -> None:
    print()
    for standing in leaderboard.standings:
        by_setting = "  ".join(f"{key} {scores.anchor:8.3f}" for key, scores in standing.by_setting.items())
        print(f"{standing.rank or '-':>2} {standing.model.info.model_name:<20} {by_setting}")


async def test_six_hours_around_the_night_when_usdc_lost_its_peg(tmp_path: Path) -> None:
    folder = recorded()
    text = SETTINGS.format(assets='"BTC", "USDC", "USDT"')
    (tmp_path / "config.toml").write_text(f'{text}\n[feed]\nsource = "replay"\npath = "{folder}"\n')
    config = configuration.load(tmp_path / "config.toml", {})
    leaderboard = await play(config, NIGHT_OF_THE_PEG_S, 6)
    show(leaderboard)
    check_books(config.storage.path, config, NIGHT_OF_THE_PEG_S, 6)
    check_by_hand(config.storage.path)
    on_usdc = {
        standing.model.info.model_id: standing.by_setting["USDC-3600-60"].anchor
        for standing in leaderboard.standings
    }
    assert max(on_usdc["student_t"], on_usdc["calm_turbulent"]) > on_usdc["constant_normal"]


async def test_three_hours_on_synthetic_prices(tmp_path: Path) -> None:
    start_s = 1_800_000_000
    (tmp_path / "config.toml").write_text(SETTINGS.format(assets='"BTC", "XAU"') + '[feed]\nhistory = "7d"\n')
    config = configuration.load(tmp_path / "config.toml", {})
    leaderboard = await play(config, start_s, 3)
    show(leaderboard)
    check_books(config.storage.path, config, start_s, 3)
    check_by_hand(config.storage.path)
    assert leaderboard.standings[0].model.info.model_id != "constant_normal"


async def test_a_crunch_synth_tracker_plays_and_is_scored_as_it_is(tmp_path: Path) -> None:
    pytest.importorskip("crunch_synth")
    tracker = Path(__file__).parent / "models" / "crunch_synth_gaussian"
    shutil.copytree(tracker, tmp_path / "models" / "gaussian")
    text = SETTINGS.format(assets='"BTC"').replace("[scoring]", '[scoring]\ntarget = "price_change"')
    base = '[game]\nbase_class = "crunch_synth.tracker.TrackerBase"\n[feed]\nhistory = "7d"\n'
    (tmp_path / "config.toml").write_text(base + text)
    config = configuration.load(tmp_path / "config.toml", {})
    leaderboard = await play(config, 1_800_000_000, 2, models=1)
    (standing,) = leaderboard.standings
    assert standing.rank == 1
    assert standing.answered == standing.rounds > 0
    with closing(open_read_only(config.storage.path)) as db:
        raw, level = db.execute("SELECT avg(raw), (SELECT avg(price) FROM price) FROM score").fetchone()
        assert level > 10_000
    assert 0.5 < raw < 20, "basis points of the price, whatever its level"
