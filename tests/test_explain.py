"""Every stored score can be explained: the parts that are shown add up to it, to 1e-12."""

from __future__ import annotations

import json
import math
import re
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import pytest

from condor_lite.clock import SteppedClock
from condor_lite.explain import Explanation, explain, explain_round
from condor_lite.game.entities import AnswerStatus
from condor_lite.storage.database import open_read_only
from condor_lite.sums import answer_lines, round_lines
from tests.test_score import CONFIG, START_S, Game, answer, playing

pytestmark = pytest.mark.anyio

ROUND = f"BTC-60-10-{START_S}"


def mixture(scale: float) -> bytes:
    """Of families without a closed form together."""
    parts: list[dict[str, object]] = [
        {"density": {"type": "builtin", "name": "t", "params": {"df": 2.5 + k, "scale": scale}}, "weight": k}
        for k in (1, 2)
    ]
    parts.append(
        {"density": {"type": "builtin", "name": "laplace", "params": {"scale": scale}}, "weight": 0.5}
    )
    return json.dumps([{"type": "mixture", "components": parts}] * 6).encode()


async def explained(game: Game) -> dict[str, Explanation]:
    """A scored round, by model; one answer is rejected, one hopeless."""
    unit = 100.0 if game.config.scoring.target == "price_change" else 1.0
    broken = json.loads(answer(2e-4 * unit))
    broken[2]["prediction"]["params"]["scale"] = -1.0
    await game.round(
        START_S,
        sharp=answer(2e-4 * unit),
        wide=mixture(1e-3 * unit),
        hopeless=answer(1e-1 * unit),
        benchmark=json.dumps(broken).encode(),
    )
    await game.round(START_S + 20, "ETH", **dict.fromkeys(game.models, mixture(2e-4 * unit)))
    await game.prices(START_S, START_S + 120)
    game.clock = SteppedClock(START_S + 120)
    await game.another_loop().finish()
    with closing(open_read_only(game.config.storage.path)) as conn:
        return {name: explain(conn, game.config, ROUND, f"id-{name}") for name in game.models}


@pytest.mark.parametrize("target", ["log_return", "price_change"])
@pytest.mark.parametrize("rule", ["crps", "log", "likelihood", "tests.rules:distance"])
async def test_the_whole_sum_adds_up_to_what_is_stored(rule: str, target: str, tmp_path: Path) -> None:
    text = CONFIG + f'rule = "{rule}"\ntarget = "{target}"\n'
    async with playing(tmp_path, text) as game:
        found = await explained(game)
    for name in ("sharp", "wide", "hopeless"):
        one = found[name]
        result, shown = one.result, one.answer
        assert one.reason is None
        assert shown.raw is not None
        assert shown.counted is not None
        assert shown.score is not None
        values = [value for value in one.segment_scores or [] if value is not None]
        assert len(values) == result.resolved == 6
        assert math.fsum(values) / 6 == pytest.approx(shown.raw, rel=1e-12)
        prices = [price for _, price in one.prices]
        moves = [
            math.log(b / a) if target == "log_return" else b - a
            for a, b in pairwise(prices)
            if a is not None and b is not None
        ]
        assert [at_s for at_s, _ in one.prices] == list(range(START_S, START_S + 61, 10))
        assert one.increments == pytest.approx(moves, rel=1e-9)
        unit = 1e4 if target == "log_return" or prices[0] is None else 1e4 / prices[0]
        no_move = math.fsum(abs(move or 0.0) for move in one.increments) / 6 * unit
        assert no_move == pytest.approx(result.no_move, rel=1e-12)
        gain = (shown.counted - result.median) * (1 if rule == "likelihood" else -1)
        divisor = result.no_move if rule == "crps" else 1.0
        assert shown.score == pytest.approx(100 * gain / divisor, rel=1e-12, abs=1e-12)
    if rule == "crps":
        hopeless = found["hopeless"]
        assert hopeless.answer.counted == pytest.approx(3 * hopeless.result.median, rel=1e-12)


@pytest.mark.parametrize("target", ["log_return", "price_change"])
async def test_a_round_that_began_with_a_stale_price_is_explained(target: str, tmp_path: Path) -> None:
    unit = 100.0 if target == "price_change" else 1.0
    async with playing(tmp_path, CONFIG + f'target = "{target}"\n') as game:
        await game.db.write(lambda conn: conn.execute("DELETE FROM price WHERE ts_s > ?", (START_S - 10,)))
        await game.round(START_S, **dict.fromkeys(game.models, answer(2e-4 * unit)))
        await game.prices(START_S, START_S + 120)
        game.clock = SteppedClock(START_S + 120)
        await game.another_loop().finish()
        with closing(open_read_only(game.config.storage.path)) as conn:
            one = explain(conn, game.config, ROUND, "id-sharp")
    assert one.reason is None
    assert one.segment_scores is not None
    assert one.segment_scores[0] is None
    scores = [score for score in one.segment_scores if score is not None]
    assert math.fsum(scores) / 5 == pytest.approx(one.answer.raw, rel=1e-12)


@pytest.mark.parametrize("rule", ["crps", "likelihood"])
async def test_the_text_has_all_digits(rule: str, tmp_path: Path) -> None:
    async with playing(tmp_path, CONFIG + f'rule = "{rule}"\n') as game:
        found = await explained(game)
        with closing(open_read_only(game.config.storage.path)) as conn:
            everybody = "\n".join(round_lines(explain_round(conn, ROUND)))
    lines = list(answer_lines(found["wide"]))
    number = r"(-?[\d.]+(?:e-?\d+)?)"
    rows = [re.match(rf" +\d+  \S+ \S+ +{number} +{number} +{number}", line) for line in lines]
    values = [float(row[3]) for row in rows if row]
    (raw,) = [float(line.split()[1]) for line in lines if line.startswith("raw ")]
    assert len(values) == 6
    assert sum(values) / 6 == pytest.approx(raw, rel=1e-12)
    assert raw == found["wide"].answer.raw
    formula = {"crps": "100 * (m - counted) / a", "likelihood": "100 * (counted - m)"}[rule]
    assert lines[-1].endswith(f"= {formula}")
    assert f"rule     {rule} on log_return, scorer version 1" in lines
    assert everybody.count("SUCCESS") == 3


async def test_a_rejected_answer_names_the_first_offending_field(tmp_path: Path) -> None:
    async with playing(tmp_path) as game:
        one = (await explained(game))["benchmark"]
    assert one.answer.status is AnswerStatus.FAILED
    assert one.reason is not None
    assert re.match(r"invalid: segment 3: .*scale", one.reason)
    assert one.segment_scores is None
    assert one.answer.raw is None
    assert one.answer.counted is not None
    assert one.densities is not None
    lines = list(answer_lines(one))
    assert f"note     {one.reason}" in lines
    assert any("90th percentile of the round's valid scores, at most 1.25 m" in line for line in lines)


async def test_parameters_that_changed_since_explain_what_they_scored(tmp_path: Path) -> None:
    text = CONFIG + 'rule = "log"\nlog_halfwidth = {}\n'
    async with playing(tmp_path, text.format(0.5)) as game:
        before = await explained(game)
    async with playing(tmp_path, text.format(2.0)) as game:
        with closing(open_read_only(game.config.storage.path)) as conn:
            after = explain(conn, game.config, ROUND, "id-wide")
    assert after.reason is None
    assert after.segment_scores == before["wide"].segment_scores
