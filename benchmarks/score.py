"""Decoding and scoring a day in steps of 5 minutes, against parsing alone and other people's scorers."""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import orjson
from crunch_synth.tracker_evaluator import crps_integral
from densitypdf import density_pdf

from condor_lite.game.density import decode
from condor_lite.game.entities import Setting
from condor_lite.game.scoring import Realised, Rules, score

SETTING = Setting("BTC", 86400, 300)
SEGMENTS = SETTING.segments
BATCH = 20


def main() -> None:
    """Print a table of times a prediction, each as a ratio to a reference that takes turns with it."""
    # Workers have no such heap as importing the other scorers leaves, which every full collection walks.
    gc.freeze()
    rng = np.random.default_rng(0)
    increments = rng.normal(size=SEGMENTS) * 1e-3
    outcome = Realised(np.arange(SEGMENTS + 1), np.ones(SEGMENTS + 1), increments, SEGMENTS, 1e4, 8.0)
    normals = [_payload(rng, "norm", {}) for _ in range(BATCH)]
    print(f"{SEGMENTS} segments of 3 normals, {len(normals[0]) / 1000:.0f} kB")
    batch, parsing = _compare(normals, outcome, repeats=15)
    _row(f"{BATCH} at once", batch, f"{batch / parsing:.2f} x orjson.loads ({_ms(parsing)})", "<= 2")
    alone, parsing = _compare(normals[:1], outcome, repeats=100)
    _row("one alone", alone, f"{alone / parsing:.2f} x orjson.loads ({_ms(parsing)})", "<= 2")
    grid, pdf = _take_turns(
        lambda: _grid(normals[0], increments), lambda: _densitypdf(normals[0], increments), repeats=25
    )
    for name, theirs, target in (("grid of 1024 points", grid, ">= 20"), ("json, densitypdf", pdf, ">= 3")):
        _row(name, theirs, f"{theirs / batch:.1f} x ours at once, {theirs / alone:.1f} x alone", target)

    print(f"other answers, {BATCH} at once")
    kinds: dict[str, Callable[[], bytes]] = {
        "1 normal": lambda: _payload(rng, "norm", {}, leaves=1),
        "1 t": lambda: _payload(rng, "t", {"df": 3.5}, leaves=1),
        "3 t": lambda: _payload(rng, "t", {"df": 3.5}),
        "3 laplace": lambda: _payload(rng, "laplace", {}),
        "21 points": lambda: _discrete(rng, 21),
        "normal, t and point": lambda: _mixed(rng),
    }
    for name, make in kinds.items():
        spent, parsing = _compare([make() for _ in range(BATCH)], outcome, repeats=5)
        ratios = f"{spent / parsing:.1f} x orjson.loads, the grid takes {grid / spent:.1f} x as long"
        _row(name, spent, ratios)


def _compare(payloads: list[bytes], outcome: Realised, repeats: int) -> list[float]:
    """Seconds a prediction: scored together, and only parsed one after another."""

    def parse() -> None:
        for payload in payloads:
            orjson.loads(payload)

    times = _take_turns(lambda: _score(payloads, outcome), parse, repeats=repeats)
    return [spent / len(payloads) for spent in times]


def _score(payloads: list[bytes], outcome: Realised) -> float:
    rules = Rules()
    items = [(decode(payload, SETTING, rules.limits), outcome) for payload in payloads]
    return score(items, rules)[0].raw


def _grid(payload: bytes, x: np.ndarray[Any, Any]) -> float:
    densities = [item["prediction"] for item in orjson.loads(payload)]
    return statistics.fmean(crps_integral(d, at, -0.01, 0.01) for d, at in zip(densities, x, strict=True))


def _densitypdf(payload: bytes, x: np.ndarray[Any, Any]) -> float:
    densities = [item["prediction"] for item in json.loads(payload)]
    return statistics.fmean(density_pdf(d, float(at)) for d, at in zip(densities, x, strict=True))


def _leaf(rng: np.random.Generator, name: str, shapes: dict[str, float]) -> dict[str, Any]:
    place = {"loc": float(rng.normal() * 1e-4), "scale": float(rng.uniform(2e-4, 3e-3))}
    return {"type": "builtin", "name": name, "params": {**shapes, **place}}


def _answer(densities: list[dict[str, Any]]) -> bytes:
    return json.dumps([{"step": 300 * (k + 1), "prediction": d} for k, d in enumerate(densities)]).encode()


def _mixture(rng: np.random.Generator, densities: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "type": "mixture",
        "components": [{"density": density, "weight": float(rng.random())} for density in densities],
    }


def _payload(rng: np.random.Generator, name: str, shapes: dict[str, float], leaves: int = 3) -> bytes:
    if leaves == 1:
        return _answer([_leaf(rng, name, shapes) for _ in range(SEGMENTS)])
    return _answer(
        [_mixture(rng, [_leaf(rng, name, shapes) for _ in range(leaves)]) for _ in range(SEGMENTS)]
    )


def _discrete(rng: np.random.Generator, points: int) -> bytes:
    values = np.linspace(-0.003, 0.003, points).round(5).tolist()
    return _answer(
        [
            {
                "type": "discrete",
                "points": {str(v): float(w) for v, w in zip(values, rng.random(points), strict=True)},
            }
            for _ in range(SEGMENTS)
        ]
    )


def _mixed(rng: np.random.Generator) -> bytes:
    zero = {"type": "discrete", "points": {"0": 1}}
    return _answer(
        [_mixture(rng, [_leaf(rng, "norm", {}), _leaf(rng, "t", {"df": 4}), zero]) for _ in range(SEGMENTS)]
    )


def _take_turns(*jobs: Callable[[], object], repeats: int) -> list[float]:
    """Each job's median time in seconds; in turns, so that a busy machine is unfair to none."""
    spent: list[list[float]] = [[] for _ in jobs]
    for turn in range(repeats + 1):
        for job, times in zip(jobs, spent, strict=True):
            started_s = time.perf_counter()
            job()
            if turn:  # the first one warms up
                times.append(time.perf_counter() - started_s)
    return [statistics.median(times) for times in spent]


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.2f} ms"


def _row(name: str, seconds: float, ratio: str, target: str = "") -> None:
    print(f"  {name:<26}{_ms(seconds):>10}   {ratio}" + (f"   (target {target})" if target else ""))
