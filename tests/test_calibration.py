"""SCORING.md, "Calibration": PIT histogram, coverage, bias, sharpness; kept as sums, shown with errors."""

from __future__ import annotations

import math
import sqlite3
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy import integrate, stats

from condor_lite.clock import SteppedClock
from condor_lite.config import StorageConfig
from condor_lite.game import calibration as game
from condor_lite.game.calibration import BINS, PIT, SEGMENTS, SPREAD, WIDTH, BriefSums, RoundCalibration
from condor_lite.game.crps import crps_and_spread
from condor_lite.game.entities import Setting
from condor_lite.game.families import CODES, FAMILIES
from condor_lite.game.mixture import Densities
from condor_lite.game.outcome import Realised
from condor_lite.game.scoring import Rules, score
from condor_lite.game.uncertainty import block_count
from condor_lite.report.calibration import calibrations
from condor_lite.storage import calibration as storage
from condor_lite.storage import scores as stored_scores
from tests.test_score import START_S, Game, playing

DAY_S, HOUR_S = 86400, 3600


def densities(*segments: list[tuple[float, str, float, float]]) -> Densities:
    """Each a list of (weight, family, loc, scale)."""
    leaves = [(k, *leaf) for k, segment in enumerate(segments) for leaf in segment]
    column = list(zip(*leaves, strict=True))
    shape = np.array([{"t": 4.0, "gamma": 2.0, "beta": 2.0}.get(name, 0.0) for name in column[2]])
    return Densities(
        n=len(segments),
        segment=np.array(column[0], np.intp),
        family=np.array([CODES[name] for name in column[2]], np.uint8),
        weight=np.array(column[1], float),
        loc=np.array(column[3], float),
        scale=np.array(column[4], float),
        a=shape,
        b=shape,
    )


def normals(n: int, scale: float, loc: float = 0.0) -> Densities:
    return densities(*[[(1.0, "norm", loc, scale)]] * n)


def sums(one: Densities, x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, float)
    _, spread = crps_and_spread(one, x)
    return game.sums(one, x, spread, np.zeros(one.n, np.intp), 1)[0]


def summarised(one: Densities, x: np.ndarray, blocks: int = 14) -> game.Calibration:
    """A model's calibration where the game's blocks are equal parts of the segments."""
    _, spread = crps_and_spread(one, x)
    found = game.summarise(game.sums(one, x, spread, np.arange(one.n) * blocks // one.n, blocks))
    assert found is not None
    return found


# What is counted


def test_a_unit_of_count_falls_where_f_says() -> None:
    total = sums(normals(3, 2.0), stats.norm.ppf([0.01, 0.5001, 0.999]) * 2.0)
    assert np.flatnonzero(total[:BINS]).tolist() == [0, 10, 19]
    assert total[SEGMENTS] == 3
    assert total[PIT] == pytest.approx(0.01 + 0.5001 + 0.999)
    assert total[SPREAD] == pytest.approx(3 * 2.0 * 2.0 / math.sqrt(math.pi))


def test_a_point_spreads_its_unit_evenly_over_its_probability() -> None:
    coin = densities([(0.25, "point", -1.0, 1.0), (0.75, "point", 1.0, 1.0)])
    low, high = sums(coin, np.array([-1.0])), sums(coin, np.array([1.0]))
    assert low[:BINS] == pytest.approx([0.2] * 5 + [0.0] * 15)
    assert high[:BINS] == pytest.approx([0.0] * 5 + [1 / 15] * 15)
    assert (low[PIT], high[PIT]) == pytest.approx((0.125, 0.625))
    between = sums(coin, np.array([0.0]))
    assert between[5] == 1.0, "no mass there: F = 0.25 on either side"


def test_a_point_inside_a_mixture_spreads_only_its_own_share() -> None:
    quiet = densities([(0.5, "norm", 0.0, 1.0), (0.5, "point", 0.0, 1.0)])
    total = sums(quiet, np.array([0.0]))
    assert total[:BINS] == pytest.approx([0.0] * 5 + [0.1] * 10 + [0.0] * 5)


def test_the_ends_count_in_the_outer_bins() -> None:
    total = sums(densities(*[[(1.0, "uniform", 0.0, 1.0)]] * 2), np.array([-5.0, 5.0]))
    assert (total[0], total[BINS - 1]) == (1.0, 1.0)


@pytest.mark.parametrize("name", sorted(set(CODES) - {"point", "cauchy", "chi", "f"}))
def test_sharpness_is_the_mean_difference_of_two_draws(name: str) -> None:
    shape = {"t": 4.0, "gamma": 2.0, "beta": 2.0, "chi2": 3.0, "pareto": 4.0, "lognorm": 0.5}.get(name, 1.5)
    one = densities([(1.0, name, 0.5, 2.0)])
    one = replace(one, a=np.full(1, shape), b=np.full(1, 2.5))
    tail = FAMILIES[CODES[name]].tail

    def product(y: float) -> float:
        at = [np.array([y]), one.a, one.b]
        return float((tail(*at, False) * tail(*at, True))[0])

    area = sum(integrate.quad(product, *ends, epsabs=1e-12)[0] for ends in ((-200, 0), (0, 1), (1, 200)))
    assert crps_and_spread(one, np.zeros(1))[1][0] == pytest.approx(2.0 * 2 * area, rel=1e-4)


def test_sharpness_of_mixtures_is_a_by_product_of_either_way() -> None:
    same = densities([(0.3, "t", 1.0, 2.0), (0.7, "t", 1.0, 2.0)], [(0.5, "norm", 0.0, 1.0)] * 2)
    coin = densities([(0.5, "point", -1.0, 1.0), (0.5, "point", 1.0, 1.0)])
    alone = densities([(1.0, "t", 1.0, 2.0)], [(1.0, "norm", 0.0, 1.0)])
    x = np.array([0.3, 0.2])
    assert crps_and_spread(same, x)[1] == pytest.approx(crps_and_spread(alone, x)[1], rel=1e-6)
    assert crps_and_spread(coin, x[:1])[1] == pytest.approx([1.0])


def test_a_mean_difference_that_is_infinite_is_none_and_spoils_nothing_else() -> None:
    blocks = np.stack([sums(densities([(1.0, "cauchy", 0.0, 1.0)]), np.array([0.1]))] * 6)
    found = game.summarise(blocks)
    assert found is not None
    assert found.sharpness_bp is None
    assert found.coverage_50.value == 1.0


def test_scores_bring_the_sums_of_their_resolved_segments_in_basis_points() -> None:
    x = np.array([1e-4, np.nan, -2e-4])
    outcome = Realised(np.arange(4), np.ones(4), x, 2, 1e4, 1.5)
    for rule in ("crps", "log", "likelihood"):
        (result,) = score([(normals(3, 1e-4), outcome)], Rules(rule=rule))
        expected = sums(normals(2, 1e-4), x[[0, 2]])
        expected[SPREAD] *= 1e4
        assert result.calibration == pytest.approx(expected)


# What it says, by simulation


def test_a_calibrated_models_histogram_is_flat_and_a_distorted_ones_is_not() -> None:
    rng = np.random.default_rng(1)
    scale = rng.uniform(0.5, 2.0, 40_000)
    x = rng.normal(size=len(scale)) * scale

    def model(width: float, loc: float = 0.0) -> game.Calibration:
        return summarised(densities(*[[(1.0, "norm", loc, width * s)] for s in scale]), x)

    honest, narrow, wide, high = model(1.0), model(0.5), model(2.0), model(1.0, 0.5)
    shares = np.array([share.value for share in honest.histogram])
    assert shares == pytest.approx(np.full(BINS, 0.05), abs=0.005)
    assert honest.coverage_50.value == pytest.approx(0.5, abs=0.01)
    assert honest.coverage_90.value == pytest.approx(0.9, abs=0.01)
    assert honest.bias.value == pytest.approx(0.0, abs=0.01)
    assert narrow.coverage_90.value < 0.7 < 0.99 < wide.coverage_90.value
    assert narrow.sharpness_bp.value * 2 == pytest.approx(honest.sharpness_bp.value)
    assert high.bias.value < -0.1, "prices came out lower than it thought"


def test_a_calibrated_discrete_models_histogram_is_flat() -> None:
    rng = np.random.default_rng(2)
    places, chances = np.array([-1.0, 0.0, 1.0, 3.0]), np.array([0.2, 0.4, 0.3, 0.1])
    x = rng.choice(places, 20_000, p=chances)
    one = densities(*[[(p, "point", at, 1.0) for at, p in zip(places, chances, strict=True)]] * len(x))
    found = summarised(one, x)
    assert [share.value for share in found.histogram] == pytest.approx([0.05] * BINS, abs=0.005)
    assert found.bias.value == pytest.approx(0.0, abs=0.01)


def test_errors_hold_where_horizons_overlap_and_volatility_persists() -> None:
    # 5-minute segments of rounds each 15 minutes, an hour ahead, for a week: each move is counted four times,
    # and the model misses a volatility that lasts for hours. The long-run coverage is known by simulation.
    rng = np.random.default_rng(3)
    weeks, segments, copies = 300, 7 * 288, 4
    log_vol = np.zeros((weeks, segments + 600))
    for at in range(1, log_vol.shape[1]):
        log_vol[:, at] = 0.97 * log_vol[:, at - 1] + 0.1 * rng.normal(size=weeks)
    moves = rng.normal(size=(weeks, segments)) * np.exp(log_vol[:, 600:])
    inside = np.abs(stats.norm.cdf(moves) - 0.5) <= 0.45
    truth = inside.mean()
    count = block_count(168, HOUR_S)
    block = np.arange(segments) * count // segments
    covered = naive = 0
    for week in inside:
        blocks = np.zeros((count, WIDTH))
        blocks[:, SEGMENTS] = copies * np.bincount(block, minlength=count)
        blocks[:, 9] = copies * np.bincount(block, week, count)
        estimate = game.summarise(blocks).coverage_90
        covered += abs(estimate.value - truth) <= stats.t.ppf(0.95, count - 1) * estimate.standard_error
        alone = math.sqrt(truth * (1 - truth) / (copies * segments))
        naive += abs(estimate.value - truth) <= 1.645 * alone
    assert 0.8 <= covered / weeks <= 0.95
    assert naive / weeks < 0.6, "counts would claim far too much"


def test_under_five_blocks_there_is_a_value_and_no_error() -> None:
    found = game.summarise(np.stack([sums(normals(1, 1.0), np.array([0.1]))] * 4))
    assert found is not None
    assert found.coverage_90.value == 1.0
    assert found.coverage_90.standard_error is None
    assert game.summarise(np.zeros((14, WIDTH))) is None


# What is kept


async def rows(one: Game) -> list[tuple[Any, ...]]:
    return await one.rows("SELECT * FROM calibration ORDER BY asset, model_no, hour_s")


@pytest.mark.anyio
async def test_a_round_is_counted_once_whatever_happens(tmp_path: Path) -> None:
    async with playing(tmp_path) as one:
        no = await one.round(START_S)
        await one.prices(START_S, START_S + 120)
        one.clock = SteppedClock(START_S + 120)
        await one.another_loop().finish()
        first = await rows(one)
        await one.another_loop().finish()
        assert await rows(one) == first
        assert len(first) == len(one.models)
        # Scored again under another version, as when the rules change: sums of their own.
        ((version,),) = await one.rows("SELECT DISTINCT scorer_version FROM calibration")
        await one.db.write(
            lambda conn: storage.add_calibration(
                conn, no, version, RoundCalibration([], np.zeros((0, WIDTH)), np.zeros(0, np.int64))
            )
        )
        assert await rows(one) == first
    (bins,) = {row[-1] for row in first if row[4] == one.models["sharp"].model_no}
    assert np.frombuffer(bins).sum() == pytest.approx(6)


@pytest.mark.anyio
async def test_segment_times_of_overlapping_rounds_count_once(tmp_path: Path) -> None:
    async with playing(tmp_path) as one:
        for at_s in (START_S, START_S + 20, START_S + 40):
            await one.round(at_s)
        await one.prices(START_S, START_S + 160)
        one.clock = SteppedClock(START_S + 160)
        await one.another_loop().finish()
        (row,) = await one.rows(
            "SELECT times, segments FROM calibration WHERE model_no = ?", one.models["sharp"].model_no
        )
    assert row == (6 + 2 + 2, 18)


@pytest.mark.anyio
async def test_an_invalid_answer_leaves_nothing(tmp_path: Path) -> None:
    async with playing(tmp_path) as one:
        await one.round(START_S, sharp=b"[]")
        await one.prices(START_S, START_S + 120)
        one.clock = SteppedClock(START_S + 120)
        await one.another_loop().finish()
        kept = {row[4] for row in await rows(one)}
    assert kept == {model.model_no for name, model in one.models.items() if name != "sharp"}


@pytest.mark.anyio
async def test_it_is_forgotten_with_the_predictions(tmp_path: Path) -> None:
    async with playing(tmp_path) as one:
        await one.round(START_S)
        await one.prices(START_S, START_S + 120)
        one.clock = SteppedClock(START_S + 120)
        await one.another_loop().finish()
        keep: StorageConfig = one.config.storage
        await one.db.write(stored_scores.prune, START_S + keep.keep_predictions_s - HOUR_S, keep)
        assert await rows(one)
        while await one.db.write(stored_scores.prune, START_S + keep.keep_predictions_s + 2 * HOUR_S, keep):
            pass
        assert not await rows(one)


# What is shown


@pytest.mark.anyio
async def test_the_page_and_the_leaderboard_say_the_same_from_400_times_on(tmp_path: Path) -> None:
    async with playing(tmp_path) as one:
        rng = np.random.default_rng(4)
        at_s = START_S
        await one.round(at_s)
        await one.prices(at_s, at_s + 120)
        one.clock = SteppedClock(at_s + 120)
        await one.another_loop().finish()
        (version,) = {row[0] for row in await rows(one)}
        live: Any = SimpleNamespace(config=one.config)
        sharp, wide = one.models["sharp"].model_no, one.models["wide"].model_no
        setting = Setting("ETH", 60, 10)
        brief = BriefSums(one.config.game.settings)

        def play(conn: sqlite3.Connection) -> None:
            for hour in range(120):
                end_s = at_s + hour * HOUR_S
                (no,) = conn.execute(
                    "INSERT INTO round (asset, horizon_s, step_s, scheduled_at_s, resolvable_at_s, status) "
                    "VALUES ('ETH', 60, 10, ?, ?, 'scored') RETURNING round_no",
                    (end_s - 60, end_s),
                ).fetchone()
                x = rng.normal(size=6)
                added = RoundCalibration(
                    [sharp] if hour < 60 else [sharp, wide],
                    np.stack([sums(normals(6, 1.0), x), sums(normals(6, 3.0), x)][: 1 if hour < 60 else 2]),
                    end_s - 50 + 10 * np.arange(6),
                )
                times = storage.add_calibration(conn, no, version, added)
                brief.add(game.brief_rows(setting.key, end_s, added, times))

        await one.db.write(play)
        now_s = at_s + 121 * HOUR_S
        board: Any = SimpleNamespace(scorer_version=version, created_at_s=now_s)

        async def in_thread(work: Any, *args: Any) -> Any:
            return work(*args)

        context: Any = SimpleNamespace(live=live, readers=one.db.reports, in_thread=in_thread)
        overall, by_setting = await calibrations(context, board, sharp)
        few, _ = await calibrations(context, board, wide)
        nothing, none = await calibrations(context, None, sharp)
        loaded = BriefSums(one.config.game.settings)
        since_s = at_s - HOUR_S
        for each in one.config.game.settings:
            for no in (sharp, wide):
                loaded.add(await one.db.read(storage.load_brief_rows, version, each, (no, no), since_s))

    found = by_setting["ETH-60-10"]
    assert found.segment_times == 720
    assert found.coverage_90.value == pytest.approx(0.9, abs=0.04)
    assert 0 < found.coverage_90.standard_error < 0.05
    assert sum(share.value for share in found.pit_histogram) == pytest.approx(1.0)
    assert by_setting["BTC-60-10"].coverage_90 is None
    assert by_setting["BTC-60-10"].segment_times == 6
    assert (few.segment_times, few.segment_times_needed, few.pit_histogram) == (360, 400, None)
    assert (nothing.segment_times, none) == (0, {})
    assert overall.segment_times == 720
    assert set(brief.briefs(now_s)) == {sharp}
    assert brief.briefs(now_s)[sharp].coverage_90 == pytest.approx(found.coverage_90.value, rel=1e-5)
    assert loaded.briefs(now_s)[sharp].coverage_90 == pytest.approx(overall.coverage_90.value, rel=1e-5)
    assert loaded.briefs(now_s)[sharp].bias == pytest.approx(overall.bias.value, abs=1e-5)
    assert brief.briefs(now_s + 8 * DAY_S) == {}
