"""Rounds in which the source of the prices changed: what lies between two sources is nobody's move."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from condor_lite import config as configuration
from condor_lite import progress, supervisor
from condor_lite.clock import SteppedClock
from condor_lite.explain import explain
from condor_lite.game.entities import Setting
from condor_lite.game.outcome import Series, realise
from condor_lite.prices.source import SourceError
from condor_lite.storage import repositories
from condor_lite.storage.database import open_read_only
from condor_lite.sums import answer_lines
from tests.exchange import Exchange, walk
from tests.fleet import ModelServer
from tests.games import REMOTE, as_wide_as, joined, orchestrated, settle
from tests.test_score import START_S, TICK_S, Game, playing, price

pytestmark = pytest.mark.anyio

SETTING = Setting("BTC", 60, 10)
ROUND = f"BTC-60-10-{START_S}"
DEARER = 1.01  # the second source's prices: 100 bp above the first's, where a segment moves 2 bp


def outcome(
    by_point: Sequence[int], target: str = "log_return"
) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Which segments are resolved when the points every 5 s from the start on come from these sources."""
    ts_s = START_S + 5 * np.arange(len(by_point), dtype=np.int64)
    series = Series(ts_s, np.linspace(100, 101, len(ts_s)), np.array(by_point, np.int16))
    return np.isfinite(realise(series, SETTING, START_S, 5, target).increments)


@pytest.mark.parametrize("target", ["log_return", "price_change"])
def test_only_segments_with_both_ends_from_one_source_are_resolved(target: str) -> None:
    assert outcome([0] * 13, target).all()
    assert outcome([0] * 6 + [1] * 7, target).tolist() == [True, True, False, True, True, True]
    assert outcome([0] * 5 + [1] * 8, target).tolist() == [True, True, False, True, True, True]
    there_and_back = [0, 0, 0, 1, 0, 0, 0, 0, 1, 1, 2, 2, 2]
    assert outcome(there_and_back, target).tolist() == [True, True, True, False, False, True]


def test_one_source_is_the_same_as_not_knowing_which() -> None:
    ts_s = START_S + 5 * np.arange(13, dtype=np.int64)
    prices = np.linspace(100, 101, 13)
    known = realise(Series(ts_s, prices, np.full(13, 7, np.int16)), SETTING, START_S, 5, "log_return")
    unknown = realise(Series(ts_s, prices), SETTING, START_S, 5, "log_return")
    assert known.boundary_source is None
    assert known.increments.tolist() == unknown.increments.tolist()
    assert known.no_move == unknown.no_move


def test_a_missing_price_is_no_change_of_source() -> None:
    series = Series(
        START_S + 10 * np.array([0, 1, 2, 4, 5, 6], np.int64),
        np.linspace(100, 101, 6),
        np.array([0, 0, 0, 1, 1, 1], np.int16),
    )
    realised = realise(series, SETTING, START_S, 5, "log_return")
    assert np.isfinite(realised.increments).tolist() == [True, True, False, False, True, True]
    assert not realised.between_sources.any()


def test_too_many_changes_void_the_round_and_say_so() -> None:
    series = Series(
        START_S + 10 * np.arange(7, dtype=np.int64),
        np.linspace(100, 101, 7),
        np.array([0, 1, 0, 1, 0, 0, 0], np.int16),
    )
    assert realise(series, SETTING, START_S, 5, "log_return").void_reason == (
        "prices resolve only 2 of 6 segments; the prices of 4 come from two sources"
    )


async def switching(game: Game, changes: Mapping[int, str]) -> None:
    """Prices of two minutes; `changes` says from which second after the start on which source gave them."""
    source = "coinbase"
    for second in range(TICK_S, 121, TICK_S):
        source = changes.get(second, source)
        level = DEARER if source == "kraken" else 1.0
        point = (START_S + second, level * price(START_S + second))
        await game.db.write(repositories.add_prices, "BTC", [point], source, 0)


async def test_a_round_over_a_failover_is_scored_inside_each_source(tmp_path: Path) -> None:
    async with playing(tmp_path) as game:
        await game.db.write(lambda conn: conn.execute("UPDATE price SET source = 'coinbase'"))
        await game.round(START_S)
        await game.prices(START_S, START_S + 120, ["ETH"])
        await switching(game, {25: "kraken", 55: "coinbase"})
        await game.clock.run_until(START_S + 120)
        await game.loop.finish()
        assert await game.statuses() == [("scored", None)]
        first = await scores(game)
        assert await game.rows("SELECT resolved FROM round_score") == [(4,)]
        (no_move,) = (await game.rows("SELECT no_move FROM round_score"))[0]
        assert 0 < no_move < 5  # and not the 100 bp that lie between the two

        with closing(open_read_only(game.config.storage.path)) as conn:
            found = explain(conn, game.config, ROUND, "id-sharp")
        assert found.reason is None
        assert found.unresolved == [
            *(None, None),
            "the source of the prices changed from coinbase to kraken",
            *(None, None),
            "the source of the prices changed from kraken to coinbase",
        ]
        assert [value is None for value in found.increments] == [bool(why) for why in found.unresolved]
        lines = list(answer_lines(found))
        assert "segments 4 of 6 resolved" in lines
        assert (
            sum("(the source of the prices changed from coinbase to kraken)" in line for line in lines) == 1
        )
        config = game.config

    assert await asyncio.to_thread(progress.rescore, config, "rescore", dict.fromkeys(("since", "rule")))
    async with playing(tmp_path) as game:
        versions = await game.rows("SELECT DISTINCT scorer_version FROM score ORDER BY 1")
        assert versions == [(1,), (2,)]
        assert await scores(game, 2) == first == await scores(game, 1)


async def scores(game: Game, version: int = 1) -> list[tuple[object, ...]]:
    return await game.rows(
        "SELECT model_no, raw, counted, score, median, no_move, resolved FROM score"
        " JOIN round_score USING (round_no, scorer_version) WHERE scorer_version = ? ORDER BY model_no",
        version,
    )


async def test_a_round_with_too_little_inside_one_source_is_void_with_that_reason(tmp_path: Path) -> None:
    async with playing(tmp_path) as game:
        await game.db.write(lambda conn: conn.execute("UPDATE price SET source = 'coinbase'"))
        await game.round(START_S)
        changes = {5: "kraken", 15: "coinbase", 25: "kraken", 35: "coinbase"}
        await switching(game, changes)
        await game.clock.run_until(START_S + 120)
        await game.loop.finish()
        assert await game.statuses() == [
            ("void", "prices resolve only 2 of 6 segments; the prices of 4 come from two sources")
        ]


TWO_SOURCES = REMOTE.replace(
    'horizon = "10m"\nstep = "1m"\ninterval = "2m"', 'horizon = "30m"\nstep = "5m"\ninterval = "15m"'
).replace("[feed]", '[feed]\nsource = ["coinbase", "kraken"]\nfailover_after = "5m"')


async def test_the_rounds_of_a_game_whose_feed_fails_over_and_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SteppedClock(START_S - 30)
    span_s = (START_S - 4 * 3600, START_S + 5 * 3600)
    first = {"BTC": walk(1, *span_s), "ETH": walk(2, *span_s, start=1_500.0)}
    second = {asset: {at_s: DEARER * p for at_s, p in prices.items()} for asset, prices in first.items()}

    async def out_of_order(asset: str) -> None:
        if asset == "BTC" and 3700 <= clock.now() - START_S < 9000:
            raise SourceError("out of order")

    sources = [
        Exchange(clock, first, "coinbase", fault=out_of_order),
        Exchange(clock, second, "kraken"),
    ]
    monkeypatch.setattr(supervisor, "make_sources", lambda config: sources)
    models = [ModelServer("sharp", as_wide_as(4e-5)), ModelServer("wide", as_wide_as(2e-4))]
    async with orchestrated(*models) as orchestrator:
        (tmp_path / "config.toml").write_text(TWO_SOURCES.format(port=orchestrator.port))
        config = configuration.load(tmp_path / "config.toml", {})
        async with joined(config, clock, len(models)) as game:
            await settle(game, clock, START_S + 4 * 3600)
    with closing(open_read_only(config.storage.path)) as conn:
        rows = conn.execute(
            "SELECT asset, scheduled_at_s, status, reason, resolved, no_move FROM round"
            " LEFT JOIN round_score USING (round_no) WHERE resolvable_at_s < ?",
            (START_S + 4 * 3600 - 300,),
        ).fetchall()
        series, names = repositories.load_series(conn, "BTC", START_S, 2**40)
    assert series.source is not None
    changes = [names[series.source[at]] for at in np.flatnonzero(np.diff(series.source, prepend=-1))]
    assert changes == ["coinbase", "kraken", "coinbase"]
    assert {row[2:5] for row in rows if row[0] == "ETH"} == {("scored", None, 6)}
    left_out = 0
    for asset, at_s, status, reason, resolved, no_move in rows:
        if asset == "BTC" and status != "skipped":
            outcome = realise(series, Setting("BTC", 1800, 300), at_s, 60, "log_return")
            assert (status, resolved) == ("scored", outcome.resolved), reason
            assert no_move < 50
            left_out += int(outcome.between_sources.sum())
            assert outcome.resolved == 6 - outcome.between_sources.sum()
    assert left_out >= 4, "some round lies over each change"
