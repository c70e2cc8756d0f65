"""The synthetic market: the same for the same seed however it is asked, and like a market."""

from __future__ import annotations

import asyncio
import random

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from condor_lite.prices import synthetic
from condor_lite.prices.synthetic import SyntheticSource

NOW_S = 1_763_690_400
DAY_S = 86400

GOLDEN_BTC = {1700000025: 91862.91, 1700000050: 91850.58, 1700000075: 91858.48}
GOLDEN_DOGE = {1700002800: 73.70296, 1700006400: 73.25526}


def fetch(source: SyntheticSource, asset: str, after_s: int, until_s: int, step_s: int) -> dict[int, float]:
    return dict(asyncio.run(source.fetch(asset, after_s, until_s, step_s)))


def returns(asset: str, days: int, step_s: int = 60, seed: int = 0) -> npt.NDArray[np.float64]:
    prices = fetch(SyntheticSource(seed), asset, NOW_S - days * DAY_S, NOW_S, step_s)
    return np.diff(np.log(np.fromiter(prices.values(), float)))


def kurtosis(sample: npt.NDArray[np.float64]) -> float:
    return float((sample**4).mean() / (sample**2).mean() ** 2)


def test_every_tick_has_a_point_and_the_range_is_half_open() -> None:
    points = fetch(SyntheticSource(0), "BTC", NOW_S, NOW_S + 300, 60)
    assert list(points) == [NOW_S + 60 * k for k in range(1, 6)]
    assert fetch(SyntheticSource(0), "BTC", NOW_S, NOW_S, 60) == {}
    assert fetch(SyntheticSource(0), "BTC", NOW_S + 1, NOW_S + 59, 60) == {}


@given(
    after_s=st.integers(NOW_S - 3 * DAY_S, NOW_S),
    length_s=st.integers(1, 2 * DAY_S),
    step_s=st.sampled_from([1, 5, 10, 30, 60, 300, 3600]),
    random_state=st.randoms(use_true_random=False),
)
@settings(max_examples=25)
def test_the_same_seed_gives_the_same_path_whenever_it_is_asked(
    after_s: int, length_s: int, step_s: int, random_state: random.Random
) -> None:
    length_s = min(length_s, 2000 * step_s)
    whole = fetch(SyntheticSource(5), "ETH", after_s, after_s + length_s, step_s)
    source = SyntheticSource(5)
    for _ in range(3):
        first_s = random_state.randrange(after_s, after_s + length_s)
        last_s = random_state.randrange(first_s, after_s + length_s + 1)
        part = fetch(source, "ETH", first_s, last_s, step_s)
        assert part == {ts_s: price for ts_s, price in whole.items() if first_s < ts_s <= last_s}
        fetch(source, "ETH", first_s - 200 * DAY_S, first_s - 199 * DAY_S, 3600)  # something else in between


@pytest.mark.parametrize("step_s", [5, 20, 45, 60, 300, 3600])
def test_every_tick_samples_the_same_path(step_s: int) -> None:
    seconds = fetch(SyntheticSource(1), "SOL", NOW_S - 7200, NOW_S, 1)
    coarse = fetch(SyntheticSource(1), "SOL", NOW_S - 7200, NOW_S, step_s)
    assert coarse == {ts_s: price for ts_s, price in seconds.items() if ts_s % step_s == 0}


def test_one_new_point_at_a_time_over_midnight_is_the_history() -> None:
    first_s = NOW_S // DAY_S * DAY_S - 600
    whole = fetch(SyntheticSource(2), "BTC", first_s, first_s + 1200, 5)
    source = SyntheticSource(2)
    single: dict[int, float] = {}
    for ts_s in range(first_s, first_s + 1200, 5):
        single |= fetch(source, "BTC", ts_s, ts_s + 5, 5)
    assert single == whole


def test_seeds_and_assets_have_paths_of_their_own() -> None:
    pairs = [(0, "BTC"), (1, "BTC"), (0, "ETH"), (0, "DOGE"), (0, "PEPE")]
    paths = np.array([returns(asset, 5, seed=seed) for seed, asset in pairs])
    correlation = np.corrcoef(paths) - np.eye(len(pairs))
    assert abs(correlation).max() < 0.1


@pytest.mark.parametrize(("asset", "level"), [("BTC", 95_000), ("ETH", 3_300), ("SOL", 190), ("XAU", 2_700)])
def test_levels_stay_plausible_over_ten_years(asset: str, level: float) -> None:
    source = SyntheticSource(0)
    prices = np.array(
        [
            price
            for year in range(0, 10, 2)
            for price in fetch(
                source, asset, NOW_S + year * 365 * DAY_S, NOW_S + year * 365 * DAY_S + 60 * DAY_S, 3600
            ).values()
        ]
    )
    assert level / 3 < prices.min()
    assert prices.max() < level * 3
    assert level / 1.5 < np.median(prices) < level * 1.5


def test_other_assets_have_levels_around_100_that_their_name_gives() -> None:
    for asset in ("DOGE", "PEPE", "A"):
        prices = [fetch(SyntheticSource(seed), asset, NOW_S, NOW_S + 60, 60) for seed in (0, 1)]
        assert all(15 < price < 650 for path in prices for price in path.values())
        assert prices[0] != prices[1]


def test_returns_are_those_of_a_market() -> None:
    minutes = returns("BTC", 60)
    assert np.std(minutes) * np.sqrt(1440) == pytest.approx(0.025, rel=0.2)
    assert 10 < kurtosis(minutes) < 100, "far from normal, as one-minute prices are"
    assert kurtosis(minutes.reshape(-1)[: len(minutes) // 60 * 60].reshape(-1, 60).sum(1)) < kurtosis(minutes)
    assert abs(np.corrcoef(minutes[1:], minutes[:-1])[0, 1]) < 0.02, "no cheap drift"
    sizes = np.minimum(abs(minutes), 5 * np.std(minutes))
    assert np.corrcoef(sizes[1:], sizes[:-1])[0, 1] > 0.15, "volatility clusters"
    hours = np.log(sizes[: len(sizes) // 60 * 60].reshape(-1, 60).mean(1))
    assert np.quantile(hours, 0.9) - np.quantile(hours, 0.1) > 0.6, "an hour can be twice as wild as another"


def test_within_a_minute_the_variance_grows_with_time() -> None:
    seconds = returns("BTC", 3, step_s=5)
    tens = seconds[: len(seconds) // 12 * 12].reshape(-1, 12)
    ratio = tens.sum(1).var() / (12 * seconds.var())
    assert ratio == pytest.approx(1, abs=0.15)
    assert kurtosis(seconds) > 10
    by_place = (np.minimum(abs(tens), 4 * seconds.std()) ** 2).mean(0)
    assert by_place.max() / by_place.min() < 1.3, "no second of the minute is livelier than another"


def test_a_model_that_follows_the_volatility_wins_most_hours() -> None:
    gains = np.zeros(24 * 12)
    for asset in ("BTC", "ETH", "SOL", "XAU"):
        move = returns(asset, 14, step_s=10)
        constant = np.sqrt(np.convolve(move**2, np.ones(8640) / 8640)[8639 : len(move)])
        kernel = 0.02 * 0.98 ** np.arange(500)
        moving = np.sqrt(np.convolve(move**2, kernel)[8639 : len(move)])
        asked = np.arange(0, len(constant) - 1, 3)
        outcome = move[8639:][asked + 1]
        gain = _crps_normal(constant[asked], outcome) - _crps_normal(moving[asked], outcome)
        gains += gain[: len(gains) * 120].reshape(-1, 120).sum(1) / np.std(move)
    assert (gains > 0).mean() > 0.85


def _crps_normal(sigma: npt.NDArray[np.float64], x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    from scipy.stats import norm

    z = x / sigma
    crps: npt.NDArray[np.float64] = sigma * (z * (2 * norm.cdf(z) - 1) + 2 * norm.pdf(z) - 1 / np.sqrt(np.pi))
    return crps


def test_a_stored_game_can_go_on_after_an_update() -> None:
    """The paths are part of what a game's database relies on: these must never change unnoticed."""
    source = SyntheticSource(0)
    assert fetch(source, "BTC", 1_700_000_000, 1_700_000_075, 25) == pytest.approx(GOLDEN_BTC, rel=1e-7)
    assert fetch(source, "DOGE", 1_700_000_000, 1_700_007_200, 3600) == pytest.approx(GOLDEN_DOGE, rel=1e-7)


def test_the_mean_of_the_bounded_news_is_right() -> None:
    from scipy.integrate import quad
    from scipy.stats import t

    unit = np.sqrt(synthetic.NU / (synthetic.NU - 2))

    def weighted(x: float) -> float:
        return float(min(x * x, synthetic.NEWS) * t.pdf(x * unit, synthetic.NU) * unit)

    edge = np.sqrt(synthetic.NEWS)
    mean = 2 * (quad(weighted, 0, edge)[0] + quad(weighted, edge, np.inf)[0])
    assert abs(synthetic._MEAN_NEWS - mean) < 1e-5
