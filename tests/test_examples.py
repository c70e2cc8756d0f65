"""The bundled models: valid answers for any asset, tick, step and horizon; fast; different; and good."""

import importlib.util
import json
import math
import time

import numpy as np
import pytest
import scoringrules

from condor_lite.models.folder import EXAMPLES, read_model, scan
from condor_lite.tracker import TrackerBase

NAMES = sorted(path.name for path in EXAMPLES.iterdir() if (path / "main.py").exists())
T0 = 1_700_000_000 // 60 * 60
DAY_S = 86400


def create(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / name / "main.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (cls,) = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, TrackerBase) and value is not TrackerBase
    ]
    return cls()


@pytest.fixture(params=NAMES)
def model(request):
    return create(request.param)


def walk(rng, n, tick_s=60, start_s=T0, scale=5e-4):
    steps = rng.standard_t(4, n) * scale * np.repeat(rng.lognormal(0, 0.7, n // 60 + 1), 60)[:n]
    prices = 100 * np.exp(np.cumsum(steps))
    return [[start_s + (i + 1) * tick_s, price] for i, price in enumerate(prices.tolist())]


def checked(answer, horizon, step):
    """The answer as the game would receive it, once it is known to be a valid one."""
    densities = json.loads(json.dumps(answer, allow_nan=False))
    assert len(densities) == horizon // step
    for k, density in enumerate(densities, 1):
        assert density["step"] == k * step
        for leaf in [c["density"] for c in density.get("components", [])] or [density]:
            if leaf["type"] == "discrete":
                assert len(leaf["values"]) == len(leaf["weights"]) <= 50
                assert all(math.isfinite(v) for v in leaf["values"])
                assert math.isclose(sum(leaf["weights"]), 1)
            else:
                assert leaf["type"] == "builtin"
                assert leaf["name"] in ("norm", "t", "laplace")
                assert 1e-9 < leaf["params"]["scale"] < 1e9
                assert leaf["params"].get("df", 4) > 2
        for component in density.get("components", []):
            assert 0 <= component["weight"] <= 1
    assert len(json.dumps(answer)) <= 16 * 1024 + 2048 * len(densities)
    return densities


def spread(density):
    """E|X - X'| / 2 up to the family: how wide a density is, in one number."""
    return crps(density, 0.0)


def crps(density, x):
    if density["type"] == "mixture":
        parts = density["components"]
        scales = np.array([part["density"]["params"]["scale"] for part in parts])
        weights = np.array([part["weight"] for part in parts])
        return float(scoringrules.crps_mixnorm(x, 0 * scales, scales, weights))
    if density["type"] == "discrete":
        values, weights = np.array(density["values"]), np.array(density["weights"])
        between = np.abs(values[:, None] - values[None, :])
        return float(weights @ np.abs(values - x) - weights @ between @ weights / 2)
    params = density["params"]
    if density["name"] == "norm":
        return float(scoringrules.crps_normal(x, params["loc"], params["scale"]))
    if density["name"] == "t":
        return float(scoringrules.crps_t(x, params["df"], params["loc"], params["scale"]))
    return float(scoringrules.crps_laplace(x, params["loc"], params["scale"]))


def test_they_are_described():
    models = {model.model_id: model for model in map(read_model, map(EXAMPLES.joinpath, NAMES))}
    assert len(models) >= 6
    assert [m.problem for m in models.values()] == [None] * len(models)
    assert [m.model_id for m in models.values() if m.benchmark] == ["constant_normal"]
    assert len({m.name for m in models.values()}) == len(models)
    assert {m.model_id for m in scan(EXAMPLES.parent / "nowhere")} == set(NAMES)


QUESTIONS = [(60, 10), (300, 30), (3600, 60), (86400, 300), (86400, 86400)]


@pytest.mark.parametrize("points", [0, 1, 2, 15, 300])
def test_answers_are_valid_however_short_the_history(model, points):
    model.tick({"BTC": walk(np.random.default_rng(1), points)})
    for horizon, step in QUESTIONS:
        checked(model.predict("BTC", horizon, step), horizon, step)
        checked(model.predict("UNHEARD-OF", horizon, step), horizon, step)


@pytest.mark.parametrize(
    "prices",
    [
        [1.0] * 3000,
        [1.0] * 2990 + [0.9] * 10,
        [1.0, 1.0, 1.0, 1.0001] * 750,
        [1.0] * 1500 + [1e-5] * 1500,
        [1.0] * 2999 + [1e6],
    ],
    ids=["flat", "depeg", "bounce", "crash", "absurd last tick"],
)
def test_answers_are_valid_on_stablecoins_and_jumps(model, prices):
    for i in range(0, 3000, 500):
        model.tick({"USDC": [[T0 + 60 * j, prices[j]] for j in range(i, i + 500)]})
        for horizon, step in QUESTIONS:
            checked(model.predict("USDC", horizon, step), horizon, step)


def test_ticks_finer_than_the_history_do_not_change_the_scale_much(model):
    rng = np.random.default_rng(2)
    history = [
        [T0 + 60 * (i + 1), p] for i, p in enumerate(100 * np.exp(np.cumsum(rng.normal(0, 5e-4, 1440))))
    ]
    model.tick({"BTC": history})
    before = spread(model.predict("BTC", 60, 10)[0])
    time_s, price = history[-1]
    for _ in range(360):
        time_s, price = time_s + 5, price * math.exp(rng.normal(0, 5e-4 * math.sqrt(5 / 60)))
        model.tick({"BTC": [[time_s, price]]})
        after = spread(model.predict("BTC", 60, 10)[0])
    assert 0.5 < after / before < 2
    assert 0.5 < after / (spread(model.predict("BTC", 3600, 60)[0]) * math.sqrt(10 / 60)) < 2


def test_a_tick_again_or_out_of_order_does_no_harm(model):
    points = walk(np.random.default_rng(3), 600)
    model.tick({"BTC": points})
    model.tick({"BTC": points[100:]})
    model.tick({"BTC": points[300:200:-1], "ETH": []})
    checked(model.predict("BTC", 3600, 60), 3600, 60)


def test_they_differ():
    history = {"BTC": walk(np.random.default_rng(4), 3000)}
    answers = set()
    for name in NAMES:
        model = create(name)
        model.tick(history)
        answers.add(json.dumps(model.predict("BTC", 3600, 60)))
    assert len(answers) == len(NAMES)


def test_most_beat_the_benchmark_when_volatility_changes():
    rng = np.random.default_rng(5)
    total = dict.fromkeys(NAMES, 0.0)
    scales = np.repeat(np.exp(rng.normal(0, 1, 400)) * 4e-4, 360)  # a new volatility every six hours
    prices = np.exp(np.cumsum(rng.standard_t(4, len(scales)) * scales))
    points = [[T0 + 60 * i, p] for i, p in enumerate(prices.tolist())]
    models = {name: create(name) for name in NAMES}
    start = len(points) - 2 * 1440
    done = 0
    for now in range(start, len(points) - 60, 30):
        for name, model in models.items():
            model.tick({"BTC": points[done : now + 1]})
            densities = model.predict("BTC", 3600, 60)
            moves = np.diff(np.log(prices[now : now + 61]))
            total[name] += sum(crps(d, x) for d, x in zip(densities, moves, strict=True))
        done = now + 1
    benchmark = total.pop("constant_normal")
    assert sum(score < benchmark for score in total.values()) >= len(total) - 1, total


def test_the_demo_costs_little(model):
    # Not a timing test: a guard against an answer or a history that takes a hundred times too long.
    rng = np.random.default_rng(6)
    data = {asset: walk(rng, 30 * 1440) for asset in ("BTC", "ETH", "SOL", "XAU")}
    started_s = time.process_time()
    model.tick(data)
    for asset in data:
        for _ in range(10):
            model.predict(asset, 3600, 60)
    assert time.process_time() - started_s < 60
