"""Does the ranking rule find the better model? Simulated weeks, against the rule that is common today.

The common rule: in each round the best answer scores 1, the 95th percentile 0, clipped; a model's score is
the mean over the rounds that it answered.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from condor_lite.game.entities import Leaderboard, Model, ModelInfo, RoundScores, RuleInfo, Setting, Standing
from condor_lite.game.rounds import score_round
from condor_lite.game.windows import WindowSums

WEEKS = 60
WEEK_H = 168
START_S = 480_000 * 3600
SETTING = Setting("BTC", 3600, 300, interval_s=720)
CRPS = RuleInfo("crps", lower_is_better=True, capped=True)


@dataclass(frozen=True)
class Forecaster:
    """Answers normal densities: the truth, with its width and mean distorted.

    `noise`: the standard deviation of the error in the log of the width, which drifts over hours; `shift` is
    in standard deviations. It takes part from `joined_h` on, and misses the rounds of the hours in `out_h`.
    `twin_of`: makes the same errors as that one.
    """

    name: str
    width: float = 1.0
    noise: float = 0.0
    shift: float = 0.0
    joined_h: int = 0
    out_h: tuple[int, int] = (0, 0)
    twin_of: str | None = None


@dataclass(frozen=True)
class Week:
    """`raw`: CRPS in bp by forecaster's name, one a round: NaN before it joined, None for no answer."""

    hours: NDArray[np.float64]
    no_move: NDArray[np.float64]
    raw: Mapping[str, Sequence[float | None]]


def simulate(seed: int, forecasters: Sequence[Forecaster]) -> Week:
    """A week of one asset: minutes of a volatility that swings, and a round of an hour every 12 minutes.

    The prices depend on the seed alone, and each forecaster's errors on the seed and its name.
    """
    rng = np.random.default_rng([seed, 0])
    minutes = (WEEK_H + 1) * 60
    volatility_bp = 4 * np.exp(0.7 * _drift(rng, minutes, memory=600))
    moves_bp = volatility_bp * rng.normal(size=minutes)
    starts = np.arange(0, WEEK_H * 60, 12)
    segments = starts[:, None, None] + np.arange(60).reshape(12, 5)
    move_bp = moves_bp[segments].sum(axis=-1)
    true_bp = np.sqrt((volatility_bp[segments] ** 2).sum(axis=-1))
    raw: dict[str, Sequence[float | None]] = {}
    for one in forecasters:
        own = np.random.default_rng([seed, 1, zlib.crc32((one.twin_of or one.name).encode())])
        errors = np.exp(one.noise * _drift(own, len(starts), memory=15))
        sigma = true_bp * one.width * errors[:, None]
        z = (move_bp - one.shift * true_bp) / sigma
        density = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
        crps = (sigma * (z * (2 * ndtr(z) - 1) + 2 * density - 1 / math.sqrt(math.pi))).mean(axis=1)
        out = (starts >= one.out_h[0] * 60) & (starts < one.out_h[1] * 60)
        joined = starts >= one.joined_h * 60
        raw[one.name] = [
            None if missed else value if present else math.nan
            for value, missed, present in zip(crps.tolist(), out, joined, strict=True)
        ]
    return Week(starts / 60, np.abs(move_bp).mean(axis=1), raw)


def rank(week: Week, until_h: float = math.inf) -> Leaderboard:
    """The leaderboard of condor_lite after the rounds started before `until_h`."""
    sums = WindowSums((SETTING,), CRPS, scorer_version=1)
    names = list(week.raw)
    end_s = START_S
    for place, (hour, no_move) in enumerate(zip(week.hours.tolist(), week.no_move.tolist(), strict=True)):
        if hour >= until_h:
            break
        answers = {number: week.raw[name][place] for number, name in enumerate(names)}
        counted = {number: raw for number, raw in answers.items() if raw is None or not math.isnan(raw)}
        scores = score_round(counted, set(), no_move, CRPS)
        assert isinstance(scores, RoundScores)
        end_s = START_S + round(hour * 3600) + SETTING.horizon_s
        sums.add(SETTING.key, end_s, scores)
    models = [
        Model(number, ModelInfo(name, name, name, name, "1"), START_S, end_s)
        for number, name in enumerate(names)
    ]
    return sums.leaderboard(end_s, models)


def order(leaderboard: Leaderboard, among: Sequence[Forecaster]) -> list[str]:
    """The names of those that were asked about, best first."""
    wanted = {one.name for one in among}
    names = [standing.model.info.model_id for standing in leaderboard.standings if standing.rank]
    return [name for name in names if name in wanted]


def find(leaderboard: Leaderboard, name: str) -> Standing:
    return next(standing for standing in leaderboard.standings if standing.model.info.model_id == name)


def common_rule(week: Week) -> dict[str, float]:
    """The scores by the rule that is common today."""
    raw = np.array([[math.nan if x is None else x for x in own] for own in week.raw.values()])
    best, worst = np.nanmin(raw, axis=0), np.nanquantile(raw, 0.95, axis=0)
    scores = np.clip((worst - raw) / np.maximum(worst - best, 1e-12), 0, 1)
    return dict(zip(week.raw, np.nanmean(scores, axis=1).tolist(), strict=True))


REGULARS = (
    Forecaster("honest", noise=0.05),
    Forecaster("10 % too wide", width=1.1, noise=0.05),
    Forecaster("10 % too narrow", width=0.9, noise=0.05),
    Forecaster("noisy", noise=0.3),
    Forecaster("shifted", noise=0.05, shift=0.3),
)
CLOSE = REGULARS[:3]
ENTRANTS: dict[str, tuple[Forecaster, ...]] = {
    "nobody else": (),
    "one terrible": (Forecaster("terrible", width=200.0),),
    "one twice too wide": (Forecaster("wide", width=2.0),),
    "one twice too narrow": (Forecaster("thin", width=0.5),),
    "twenty clones": tuple(
        replace(REGULARS[1], name=f"clone {number}", twin_of=REGULARS[1].name) for number in range(20)
    ),
}


def main() -> None:
    """Print how often each rule gets it right, over the same simulated weeks."""
    print(f"{WEEKS} weeks; how often the honest model is before the one 10 % too wide, 10 % too narrow")
    for label, entrants in ENTRANTS.items():
        ours, theirs, kept = np.zeros(2), np.zeros(2), 0
        for seed in range(WEEKS):
            week = simulate(seed, CLOSE + entrants)
            ranked, common = order(rank(week), CLOSE), common_rule(week)
            ours += [ranked.index("honest") < ranked.index(other.name) for other in CLOSE[1:]]
            theirs += [common["honest"] > common[other.name] for other in CLOSE[1:]]
            kept += ranked == order(rank(simulate(seed, CLOSE)), CLOSE)
        print(
            f"  {label:21} condor_lite {ours[0] / WEEKS:4.0%} {ours[1] / WEEKS:4.0%}   common rule "
            f"{theirs[0] / WEEKS:4.0%} {theirs[1] / WEEKS:4.0%}   order as without: {kept / WEEKS:4.0%}"
        )

    reports = [Forecaster(f"x{width:.2f}", width=width) for width in (0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5)]
    print("score by the width reported (1: the belief):", *_means(reports))
    shifts = [Forecaster(f"{shift:+.2f}", shift=shift) for shift in (-0.2, -0.1, 0.0, 0.1, 0.2)]
    print("score by the mean reported (0: the belief): ", *_means(shifts))

    newcomer = Forecaster("newcomer", noise=0.02, joined_h=WEEK_H - 24)
    places: dict[int, list[int]] = {1: [], 3: [], 12: [], 24: []}
    for seed in range(WEEKS):
        week = simulate(seed, (*REGULARS, newcomer))
        for hours, seen in places.items():
            seen.append(find(rank(week, newcomer.joined_h + hours), "newcomer").rank or 0)
    for hours, seen in places.items():
        print(
            f"a newcomer as good as the best, after {hours:2} h: place {np.mean(seen):.1f} "
            f"of {len(REGULARS) + 1}, leads {np.mean(np.array(seen) == 1):.0%}"
        )

    lost = [_outage(seed) for seed in range(WEEKS)]
    print(
        f"an outage of six hours costs the best {np.mean([cost for cost, _ in lost]):.2f} points "
        f"and {np.mean([places for _, places in lost]):.1f} places of {len(REGULARS)}"
    )


def _means(forecasters: Sequence[Forecaster]) -> list[str]:
    scores: dict[str, list[float]] = {one.name: [] for one in forecasters}
    for seed in range(WEEKS):
        for standing in rank(simulate(seed, forecasters)).standings:
            scores[standing.model.info.model_id].append(standing.overall.anchor or 0.0)
    return [f"{name}: {np.mean(values):.2f}" for name, values in scores.items()]


def _outage(seed: int) -> tuple[float, int]:
    """What an outage costs the honest model: points and places."""
    absent = (replace(REGULARS[0], out_h=(80, 86)), *REGULARS[1:])
    before, after = (find(rank(simulate(seed, field)), "honest") for field in (REGULARS, absent))
    assert before.overall.anchor is not None
    assert after.overall.anchor is not None
    return before.overall.anchor - after.overall.anchor, (after.rank or 0) - (before.rank or 0)


def _drift(rng: np.random.Generator, count: int, memory: float) -> NDArray[np.float64]:
    """A stationary series of variance 1 whose correlation falls by half a `memory` of steps, roughly."""
    keep = math.exp(-math.log(2) / memory)
    steps = rng.normal(size=count) * math.sqrt(1 - keep**2)
    series = np.empty(count)
    value = rng.normal()
    for place, step in enumerate(steps.tolist()):
        value = keep * value + step
        series[place] = value
    return series
