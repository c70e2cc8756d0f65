"""Three simulated days on which the source fails in every way, and the game is stopped and started again."""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from condor_lite import config as configuration
from condor_lite import supervisor
from condor_lite.clock import SteppedClock
from condor_lite.config import Config
from condor_lite.game import schedule
from condor_lite.game.entities import Leaderboard, Window
from condor_lite.game.outcome import Series, realise
from condor_lite.prices import intake
from condor_lite.prices.grid import QUIET_S
from condor_lite.prices.source import SourceError
from condor_lite.storage import repositories
from condor_lite.storage.database import open_read_only
from tests.exchange import MINUTE_S, Exchange, walk
from tests.fleet import ModelServer
from tests.games import as_wide_as, joined, orchestrated, settle
from tests.stage import START_S

pytestmark = pytest.mark.anyio

HOUR_S = 3600
DAYS_S = 3 * 86400
END_S = START_S + DAYS_S
ASSETS = ("BTC", "ETH")
HORIZON_S, STEP_S, INTERVAL_S = 1800, 600, 1800
TICK_S = 600
STALE_S = 3 * TICK_S

CONFIG = f"""
[[game.settings]]
assets = ["BTC", "ETH"]
horizon = {HORIZON_S}
step = {STEP_S}
interval = {INTERVAL_S}

[feed]
tick = {TICK_S}
history = "6h"

[orchestrator]
mode = "remote"
port = {{port}}

[report]
port = 0

[scoring]
workers = 1
interval = "10m"

[log]
level = "error"
"""


@dataclass(frozen=True)
class Trouble:
    """What is wrong from `begin_s` to `end_s`; of kind "stopped" the game itself is not there."""

    begin_s: int
    end_s: int
    assets: tuple[str, ...]
    kind: str

    def touches(self, begin_s: float, end_s: float) -> bool:
        return self.begin_s < end_s and begin_s < self.end_s


def troubles(rng: random.Random) -> Iterator[Trouble]:
    """Some a day, each over before the next one begins."""
    at_s = START_S + HOUR_S
    while at_s < END_S - 4 * HOUR_S:
        begin_s = at_s + rng.randrange(1200, 3 * HOUR_S)
        kind = rng.choice(["error", "error", "hang", "hang", "wrong", "wrong", "stopped"])
        lasts_s = rng.choice([rng.randrange(60, 600), rng.randrange(600, 5400)])
        assets = rng.choice([ASSETS, ("BTC",), ("ETH",)])
        yield Trouble(begin_s, begin_s + lasts_s, assets, kind)
        at_s = begin_s + lasts_s + 1200


def market(rng: random.Random) -> dict[str, dict[int, float]]:
    """Prices with quiet minutes; now and then an asset is not traded for an hour."""
    found = {}
    for number, asset in enumerate(ASSETS):
        prices = walk(rng.randrange(1000), START_S - 12 * HOUR_S, END_S + HOUR_S, 20_000 / (1 + 9 * number))
        for ts_s in [ts_s for ts_s in prices if rng.random() < 0.02]:
            del prices[ts_s]
        halt_s = START_S + rng.randrange(6, 60) * HOUR_S + 60 * rng.randrange(60)
        for ts_s in range(halt_s + MINUTE_S, halt_s + HOUR_S + MINUTE_S, MINUTE_S):
            prices.pop(ts_s, None)
        found[asset] = prices
    return found


class BadExchange(Exchange):
    """Whatever is wrong at the moment, an answer has rows that no feed may believe."""

    def __init__(
        self, clock: SteppedClock, prices: dict[str, dict[int, float]], wrong: Sequence[Trouble]
    ) -> None:
        super().__init__(clock, prices, fault=self.answer)
        self.wrong = wrong
        self.failed: Counter[str] = Counter()

    async def answer(self, asset: str) -> list[tuple[int, float]] | None:
        now_s = self.clock.now()
        for trouble in self.wrong:
            if asset in trouble.assets and trouble.begin_s <= now_s < trouble.end_s:
                self.failed[trouble.kind] += 1
                if trouble.kind == "error":
                    raise SourceError("out of order")
                if trouble.kind == "hang":
                    await asyncio.Event().wait()
                if trouble.kind == "wrong":
                    return self.nonsense(asset, int(now_s) // MINUTE_S * MINUTE_S)
        return None

    def nonsense(self, asset: str, at_s: int) -> list[tuple[int, float]]:
        """No prices, none of its time, and one that no second one confirms."""
        level = max(self.prices[asset].values())
        absurd = 30 * level if at_s // TICK_S % 2 else level / 30
        bad = [0.0, -5.0, math.nan, math.inf]
        return [(at_s, absurd), (at_s + 600, level), *((at_s - 60 * (k + 1), p) for k, p in enumerate(bad))]


async def test_three_days_of_trouble_lose_and_repeat_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(20)
    wrong = list(troubles(rng))
    assert {trouble.kind for trouble in wrong} == {"error", "hang", "wrong", "stopped"}
    prices = market(rng)
    monkeypatch.setattr(intake, "_FETCH_TIMEOUT_S", 0.005)
    models = [ModelServer("sharp", as_wide_as(4e-5)), ModelServer("wide", as_wide_as(2e-4))]
    runs: list[list[list[dict[str, list[list[float]]]]]] = []
    async with orchestrated(*models) as orchestrator:
        (tmp_path / "config.toml").write_text(CONFIG.format(port=orchestrator.port))
        config = configuration.load(tmp_path / "config.toml", {})
        for begin_s, end_s in runs_of(wrong):
            clock = SteppedClock(begin_s)
            exchange = BadExchange(clock, prices, wrong)
            monkeypatch.setattr(supervisor, "make_sources", lambda config, exchange=exchange: [exchange])
            for model in models:
                model.ticks = []
            async with joined(config, clock, len(models)) as game:
                await settle(game, clock, end_s)
                leaderboard = game.live.leaderboard
            runs.append([model.ticks for model in models])
    assert leaderboard is not None
    held = check_prices(config, prices)
    check_ticks(runs, held)
    check_rounds(config, wrong, held)
    check_windows(config, leaderboard)


def runs_of(wrong: Sequence[Trouble]) -> Iterator[tuple[float, float]]:
    """From when to when the game runs: between its stops, and until the last round is scored."""
    begin_s: float = START_S
    for trouble in wrong:
        if trouble.kind == "stopped":
            yield begin_s, trouble.begin_s
            begin_s = trouble.end_s
    yield begin_s, END_S


def check_prices(config: Config, prices: dict[str, dict[int, float]]) -> dict[str, dict[int, float]]:
    """What is stored is what the source had: each minute's price, the one before where it was quiet."""
    held = {}
    with closing(open_read_only(config.storage.path)) as conn:
        for asset in ASSETS:
            ts_s, price = repositories.load_prices(conn, asset, START_S, END_S)
            held[asset] = dict(zip(ts_s.tolist(), price.tolist(), strict=True))
    for asset, by_time in prices.items():
        expected, times_s = {}, sorted(by_time)
        for at_s, next_s in pairwise(times_s):
            until_s = next_s if next_s - at_s <= QUIET_S else min(next_s, at_s + TICK_S)
            grid_s = range(-(-at_s // TICK_S) * TICK_S, until_s, TICK_S)
            expected.update(dict.fromkeys(grid_s, by_time[at_s]))
        newest_s = max(held[asset])
        assert newest_s >= END_S - TICK_S
        assert held[asset] == {ts_s: p for ts_s, p in expected.items() if START_S <= ts_s <= newest_s}
    return held


def check_ticks(
    runs: Sequence[Sequence[Sequence[dict[str, list[list[float]]]]]], held: dict[str, dict[int, float]]
) -> None:
    """In each run every model got each point once, in order, up to the newest."""
    for run in runs:
        for ticks in run:
            given: defaultdict[str, list[tuple[int, float]]] = defaultdict(list)
            for tick in ticks:
                assert tick, "a tick has new points"
                for asset, points in tick.items():
                    assert points
                    given[asset] += [(int(ts_s), price) for ts_s, price in points]
            for asset, points in given.items():
                stored = held[asset]
                own = [point for point in points if point[0] >= START_S]
                assert [ts_s for ts_s, _ in points] == sorted({ts_s for ts_s, _ in points})
                newest_s = points[-1][0]
                since_s = max(START_S, points[0][0])
                assert own == [(ts_s, p) for ts_s, p in stored.items() if since_s <= ts_s <= newest_s]


def check_rounds(config: Config, wrong: Sequence[Trouble], held: dict[str, dict[int, float]]) -> None:
    """Each round due is there once; it is scored if it could be, and says why if not."""
    with closing(open_read_only(config.storage.path)) as conn:
        rows = conn.execute(
            "SELECT asset, scheduled_at_s, status, reason, answered, count(median), resolved FROM round"
            " LEFT JOIN round_score USING (round_no) GROUP BY round_no ORDER BY asset, scheduled_at_s"
        ).fetchall()
        assert conn.execute("SELECT count(*) FROM score").fetchone() == (
            2 * sum(row[2] == "scored" for row in rows),
        )
    counted = Counter(row[2] for row in rows)

    for setting in config.game.settings:
        own = {row[1]: row[2:] for row in rows if row[0] == setting.asset}
        due = schedule.due(setting, START_S, END_S - 1)
        assert [at_s for at_s in own if START_S < at_s < END_S] == due
        ts_s = np.array(sorted(held[setting.asset]), np.int64)
        series = Series(ts_s, np.array([held[setting.asset][at_s] for at_s in ts_s.tolist()]))
        for at_s in due:
            status, reason, answered, scored, resolved = own[at_s]
            feed_down = [t for t in wrong if t.kind != "stopped" and setting.asset in t.assets]
            stopped = [t for t in wrong if t.kind == "stopped"]
            if any(t.begin_s <= at_s and at_s + TICK_S < t.end_s for t in stopped):
                assert (status, reason) == ("missed", "the game was not running")
            elif any(t.begin_s + STALE_S + TICK_S < at_s < t.end_s for t in feed_down):
                assert status == "skipped"
                assert reason.startswith(f"the newest {setting.asset} price is ")
            elif not any(t.touches(at_s - STALE_S, at_s + TICK_S) for t in wrong) and fresh(ts_s, at_s):
                assert status not in ("skipped", "missed")
            if status in ("skipped", "missed"):
                assert reason
                assert not scored
            if status in ("closed", "open"):
                assert at_s + HORIZON_S + 2 * TICK_S > END_S
            if answered and at_s + HORIZON_S + 2 * TICK_S < END_S:
                outcome = realise(series, setting, at_s, TICK_S, "log_return")
                if outcome.void_reason is None:
                    assert (status, scored, resolved) == ("scored", 1, outcome.resolved)
                else:
                    assert (status, reason) == ("void", outcome.void_reason)
    assert counted["scored"] > 150
    assert min(counted[kind] for kind in ("void", "missed", "skipped")) > 0, counted


def fresh(ts_s: np.ndarray[tuple[int], np.dtype[np.int64]], at_s: int) -> bool:
    """Whether the market had a price shortly before."""
    return bool(((ts_s > at_s - STALE_S) & (ts_s < at_s)).any())


def check_windows(config: Config, leaderboard: Leaderboard) -> None:
    """The leaderboard is what SCORING.md's formula gives for the stored scores."""
    with closing(open_read_only(config.storage.path)) as conn:
        for window in Window:
            since_s = leaderboard.created_at_s // HOUR_S * HOUR_S - 3600 * window.hours
            for standing in leaderboard.standings:
                for key, shown in standing.by_setting.items():
                    asset, *_ = key.split("-")
                    gain, unit = conn.execute(
                        "SELECT sum(median - counted), sum(no_move)"
                        " FROM score JOIN round_score USING (round_no)"
                        " JOIN round USING (round_no) JOIN model USING (model_no)"
                        " WHERE model_id = ? AND asset = ? AND resolvable_at_s >= ?",
                        (standing.model.info.model_id, asset, since_s),
                    ).fetchone()
                    assert shown.of(window) == pytest.approx(100 * gain / unit, rel=1e-9, abs=1e-9)
