"""Every known way to win without forecasting, or to break the game by what is answered; none may work."""

from __future__ import annotations

import asyncio
import json
import math
import multiprocessing
import signal
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_runner_client.grpc.generated.dynamic_subclass_pb2 import CallRequest

from condor_lite import worker
from condor_lite.errors import InvalidAnswer
from condor_lite.game import density as decoding
from condor_lite.game.calibration import SEGMENTS
from condor_lite.game.density import Limits, decode
from condor_lite.game.entities import RuleInfo, Setting
from condor_lite.game.outcome import Realised
from condor_lite.game.rounds import score_round
from condor_lite.game.schedule import deadline_s
from condor_lite.game.scoring import Rules, score
from condor_lite.storage.compression import compress
from condor_lite.worker import ScoringItem
from tests.fleet import ModelServer, answers_well
from tests.stage import START_S, staged, until, within

LIMITS = Limits(max_components=16, max_segment_bytes=2048)
ONE = Setting("BTC", 300, 300)
DAY = Setting("BTC", 86400, 300)


def norm(loc: Any = 0.0, scale: Any = 1e-3) -> dict[str, Any]:
    return {"type": "builtin", "name": "norm", "params": {"loc": loc, "scale": scale}}


def mixture(*parts: tuple[Any, Any]) -> dict[str, Any]:
    return {"type": "mixture", "components": [{"density": density, "weight": w} for density, w in parts]}


def payload(*densities: Any) -> bytes:
    return json.dumps(list(densities)).encode()


def reason(body: bytes, setting: Setting = ONE) -> str:
    with pytest.raises(InvalidAnswer) as caught:
        decode(body, setting, LIMITS)
    return str(caught.value)


def outcome(*x: float) -> Realised:
    no_move = float(np.abs(x).mean()) * 1e4
    return Realised(np.arange(len(x) + 1), np.ones(len(x) + 1), np.array(x), len(x), 1e4, no_move)


def raw(density: Any, *x: float, rule: str = "crps") -> float:
    """The mean score of the same density for every increment."""
    setting = Setting("BTC", 300 * len(x), 300)
    (result,) = score(
        [(decode(payload(*[density] * len(x)), setting, LIMITS, rule=rule), outcome(*x))], Rules(rule=rule)
    )
    return result.raw


def quoted_moves(count: int = 4000) -> list[float]:
    """Increments of a price that is quoted in ticks of a basis point: a fifth of them are zero."""
    moves = np.random.default_rng(0).normal(0, 2e-4, count)
    return (np.round(moves * 1e4) / 1e4).tolist()


# Spikes


@pytest.mark.parametrize("scale", [0, -0.0, 1e-300, 9.9e-10, 5e-324])
def test_a_near_zero_scale_is_rejected(scale: float) -> None:
    for density in (norm(scale=scale), mixture((norm(), 1), (norm(scale=scale), 1e-9))):
        assert "scale must be" in reason(payload(density))


@pytest.mark.parametrize("rule", ["crps", "log"])
def test_a_spike_at_the_last_price_loses_to_the_truth(rule: str) -> None:
    moves = quoted_moves()
    spikes = [norm(scale=1e-9), norm(scale=1e-6), {"0": 1}, mixture((norm(scale=2e-4), 0.5), ({"0": 1}, 0.5))]
    honest = raw(norm(scale=2e-4), *moves, rule=rule)
    assert all(honest < raw(spike, *moves, rule=rule) for spike in spikes)


def test_the_best_spike_is_worth_what_no_move_is() -> None:
    moves = quoted_moves(100)
    assert raw(norm(scale=1e-9), *moves) == pytest.approx(outcome(*moves).no_move, rel=1e-3)
    assert raw({"0": 1}, *moves) == pytest.approx(outcome(*moves).no_move, rel=1e-12)


# Weights and probabilities


@pytest.mark.parametrize("weights", [(2, -1), (-1, 2), (1, -1e-300), (1, -5e-324)])
def test_negative_weights_are_rejected(weights: tuple[float, float]) -> None:
    first, second = weights
    assert "weight must be >= 0" in reason(payload(mixture((norm(), first), (norm(1e-3), second))))
    assert "probabilities must be >= 0" in reason(payload({"0": first, "1": second}))


@pytest.mark.parametrize("factor", [1e-300, 1e-3, 7.0, 1e300])
def test_weights_that_do_not_sum_to_1_gain_nothing(factor: float) -> None:
    x = (1e-4, -3e-4, 2e-3)
    honest = mixture((norm(), 0.25), (norm(1e-3, 5e-4), 0.75))
    inflated = mixture((norm(), 0.25 * factor), (norm(1e-3, 5e-4), 0.75 * factor))
    assert raw(inflated, *x) == pytest.approx(raw(honest, *x), rel=1e-12)
    points = {"-0.001": 0.25 * factor, "0.001": 0.75 * factor}
    assert raw(points, *x) == pytest.approx(raw({"-0.001": 0.25, "0.001": 0.75}, *x), rel=1e-12)


@pytest.mark.parametrize("weight", [0, -0.0])
def test_a_component_without_weight_counts_for_nothing_and_weights_of_nothing_are_rejected(
    weight: float,
) -> None:
    assert raw(mixture((norm(), 1), (norm(1e-3, 1e-9), weight)), 1e-3) == raw(norm(), 1e-3)
    assert "must sum to more than 0" in reason(payload(mixture((norm(), weight))))
    assert "must sum to more than 0" in reason(payload({"0": weight}))


# What is no number


NO_NUMBERS = [
    "0.1",
    "NaN",
    "nan",
    "Infinity",
    "-inf",
    "1e999",
    "",
    True,
    False,
    None,
    [0.1],
    [],
    {},
    {"a": 1},
]


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
def test_what_is_no_number_is_rejected_wherever_a_number_belongs(value: Any) -> None:
    for density in (
        norm(loc=value),
        norm(scale=value),
        {"type": "builtin", "name": "t", "params": {"df": value}},
        {"type": "statistics", "name": "normal", "params": {"mu": value, "sigma": 1}},
        mixture((norm(), value)),
        mixture((norm(), 1), (norm(), value)),
        {"type": "discrete", "points": {"0": value}},
        {"type": "discrete", "values": [value], "weights": [1]},
        {"type": "discrete", "values": [0], "weights": [value]},
        {"step": value, "prediction": norm()},
    ):
        assert reason(payload(density)).startswith("segment 1: ")


@pytest.mark.parametrize(
    "token", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "nan", "0x1p-4", "1_0", ".5", "+1"]
)
def test_numbers_that_json_does_not_have_are_rejected(token: str) -> None:
    for body in (payload(norm(loc=12345)), payload(mixture((norm(), 12345)))):
        told = reason(body.replace(b"12345", token.encode()))
        assert told.startswith("not JSON") or "not allowed" in told


@pytest.mark.parametrize(
    "key", ["NaN", "inf", "Infinity", "1e999", "0x1", "\u0661", "1_0", " 1", "", "0,1", "0.,1"]
)
def test_points_at_no_number_are_rejected(key: str) -> None:
    assert "segment 1" in reason(payload({"type": "discrete", "points": {key: 1}}))


def test_of_duplicate_keys_the_one_that_was_checked_counts() -> None:
    for name in (b"norm", b"laplace"):
        body = b'[{"type":"builtin","name":"%b","params":{"scale":%b,"scale":%b}}]'
        assert decode(body % (name, b"1e-12", b"0.5"), ONE, LIMITS).scale.tolist() == [0.5]
        assert "scale must be" in reason(body % (name, b"0.5", b"1e-12"))
    twice = (
        b'[{"type":"mixture","components":[{"weight":1,"density":%b,"weight":-1}]}]' % payload(norm())[1:-1]
    )
    assert "weight must be >= 0" in reason(twice)
    both = b'[{"prediction":%b,"prediction":{}}]' % payload(norm())[1:-1]
    assert "type is missing" in reason(both)


# Size


def test_more_components_than_allowed_are_rejected_however_they_are_nested() -> None:
    many = [(norm(k * 1e-5), 1) for k in range(17)]
    for density in (mixture(*many), mixture((mixture(*many[:8]), 1), (mixture(*many[8:]), 1))):
        assert "component" in reason(payload(density))
    pile: Any = norm()
    for _ in range(4):
        pile = mixture((pile, 1))
    assert "nested" in reason(payload(pile))


def test_4_mb_of_whitespace_are_refused_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object) -> None:
        raise AssertionError("it was parsed")

    monkeypatch.setattr(decoding, "_parse", read)
    monkeypatch.setattr(decoding, "_decode_fast", read)
    body = payload(*[norm()] * DAY.segments)
    assert reason(body + b" " * (4 * 2**20), DAY).startswith("the answer has ")


def in_worker(
    bodies: list[bytes], setting: Setting, x: Realised, limit_s: float
) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
    """Scored as in the pool, in this process."""
    lone = worker.Worker(multiprocessing.RawArray("d", worker.NOTE_WIDTH), Rules(), limit_s, 256)
    before = signal.signal(signal.SIGALRM, lambda signum, frame: lone.ring())
    try:
        return lone.score(0, [ScoringItem(compress(body), setting, x) for body in bodies], careful=False)
    finally:
        signal.signal(signal.SIGALRM, before)


def test_an_answer_that_scores_slowly_costs_its_time_limit_and_no_one_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(worker, "score", _stands_still_on_gamma)
    slow = payload({"type": "builtin", "name": "gamma", "params": {"a": 2}})
    found, sums, reasons = in_worker([payload(norm()), slow, payload(norm())], ONE, outcome(1e-3), 0.5)
    assert reasons == {1: "takes longer than 0.5 s to score"}
    assert np.isfinite(found[[0, 2]]).all()
    assert sums[:, SEGMENTS].tolist() == [1, 0, 1]


def _stands_still_on_gamma(pairs: list[Any], rules: Rules) -> Any:
    while any(densities.a.any() for densities, _ in pairs):
        pass
    return score(pairs, rules)


# Against others


def test_one_hopeless_answer_changes_no_ones_order_or_distance() -> None:
    crps = RuleInfo("crps", lower_is_better=True, capped=True)
    fair = score_round({1: 5.0, 2: 6.0, 3: 7.0}, set(), 10.0, crps)
    spoilt = score_round({1: 5.0, 2: 6.0, 3: 7.0, 4: 1e12}, set(), 10.0, crps)
    for scores in (fair, spoilt):
        assert scores.models[1].score - scores.models[2].score == pytest.approx(10.0)
    assert spoilt.models[4].counted <= 3 * spoilt.median


def test_not_answering_a_hard_round_is_no_better_than_the_bulk() -> None:
    crps = RuleInfo("crps", lower_is_better=True, capped=True)
    values: dict[int, float | None] = {no: 5.0 + 0.1 * no for no in range(11)}
    scores = score_round({**values, 99: None}, set(), 10.0, crps)
    assert (
        scores.models[99].counted >= statistics.quantiles(values.values(), n=10, method="inclusive")[8] - 1e-9
    )


@given(
    st.integers(1, 10**9),
    st.integers(1, 86400),
    st.integers(1, 300),
    st.integers(0, 86400),
    st.floats(0, 1e6, allow_nan=False),
)
def test_no_answer_is_taken_once_its_first_outcome_is_known(
    at_s: int, step_s: int, count: int, interval_s: int, timeout_s: float
) -> None:
    setting = Setting("BTC", step_s * count, step_s, interval_s)
    assert deadline_s(at_s, setting, timeout_s) <= at_s + step_s


@pytest.mark.anyio
async def test_an_answer_that_comes_late_is_none_whatever_it_says(tmp_path: Path) -> None:
    """It may be another model's, or made when the price was known: it is not even stored."""
    told = asyncio.Event()

    async def waits(model: ModelServer, request: CallRequest) -> Any:
        if request.methodName == "predict":
            await told.wait()
        return await answers_well(model, request)

    late, good = ModelServer("late", waits), ModelServer("good")
    async with staged(tmp_path, within("4s"), START_S + 5) as stage:
        await stage.join(late, good)
        await stage.play(10)  # the round's time, its deadline, and more
        told.set()
        await until(lambda: stage.ready("late"))
        await stage.play(5)
        answers = await stage.answers()
        stored = await stage.rows(
            "SELECT model_id, scheduled_at_s FROM payload JOIN model USING (model_no) "
            "JOIN round USING (round_no)"
        )
    assert answers["late", START_S + 10][0] == "TIMEOUT"
    assert answers["good", START_S + 10][0] == "SUCCESS"
    assert ("good", START_S + 10) in stored
    assert ("late", START_S + 10) not in stored


# Anything at all


names = st.sampled_from(
    ["norm", "t", "cauchy", "gamma", "beta", "f", "pareto", "weibull_min", "lognorm", "x"]
)
extremes = st.sampled_from([0, 1, -1, 0.5, 1e-9, 1e9, 5e-324, 1.8e308, -1e9, 0.5000001, "1", None, True, [1]])
numbers = st.one_of(extremes, st.floats(allow_nan=False, allow_infinity=False), st.floats(1e-6, 10))
parameters = st.dictionaries(
    st.sampled_from(["loc", "scale", "df", "a", "b", "c", "s", "dfn", "dfd"]), numbers, max_size=4
)
leaves = st.one_of(
    st.fixed_dictionaries({"type": st.just("scipy"), "name": names, "params": parameters}),
    st.builds(lambda loc, scale: norm(loc, scale), numbers, st.floats(1e-9, 1e9)),
    st.builds(
        lambda df, scale: {"type": "scipy", "name": "t", "params": {"df": df, "scale": scale}},
        st.floats(0.51, 1e6),
        st.floats(1e-9, 1e3),
    ),
    st.dictionaries(st.floats(-1, 1).map(str), st.floats(0, 1), min_size=1, max_size=4),
)
trees = st.recursive(
    leaves,
    lambda inner: st.lists(st.tuples(inner, numbers), min_size=1, max_size=3).map(
        lambda all_: mixture(*all_)
    ),
    max_leaves=5,
)


def comes_to_a_score_or_a_reason(body: bytes) -> None:
    found, sums, reasons = in_worker([body], ONE, outcome(1e-3), 20.0)
    if reasons:
        assert 0 < len(reasons[0]) <= 300
        assert not reasons[0].startswith("can't be scored"), "rejected, not failed upon"
        return
    assert math.isfinite(found[0])
    assert found[0] >= 0
    assert sums[0, :20].sum() == pytest.approx(1.0)


@settings(max_examples=150)
@given(trees)
def test_whatever_is_accepted_can_be_scored(tree: Any) -> None:
    comes_to_a_score_or_a_reason(json.dumps([tree]).encode())


BASE = payload(
    mixture(
        (norm(), 1),
        (mixture(({"type": "scipy", "name": "t", "params": {"df": 3, "scale": 0.001}}, 1)), 2),
        ({"-0.001": 0.5, "0.001": 0.5}, 1),
    )
)
SNIPPETS = [
    b"",
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b'"',
    b"-",
    b"e9",
    b"e-9",
    b"0",
    b"9" * 30,
    b"null",
    b"\\u0000",
    b"\xff",
]


@settings(max_examples=150)
@given(
    st.lists(
        st.tuples(
            st.integers(0, len(BASE)),
            st.integers(0, 8),
            st.one_of(st.sampled_from(SNIPPETS), st.binary(max_size=3)),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_mutated_answers_are_scored_or_rejected(changes: list[tuple[int, int, bytes]]) -> None:
    body = BASE
    for at, dropped, put in changes:
        body = body[:at] + put + body[at + dropped :]
    comes_to_a_score_or_a_reason(body)
