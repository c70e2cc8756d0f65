"""Every stored score can be explained: the parts that are shown add up to it, to 1e-12."""

from __future__ import annotations

import json
import math
import re
from contextlib import closing
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from condor_lite.clock import SteppedClock
from condor_lite.errors import StorageError
from condor_lite.explain import Explanation, NotExplained, explain, explain_round
from condor_lite.game.entities import AnswerStatus
from condor_lite.storage.database import open_read_only
from condor_lite.storage.rescores import carry_over
from condor_lite.storage.scores import add_scorer
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


def explain_stored(game: Game, round_id: str, model_id: str) -> Explanation:
    with closing(open_read_only(game.config.storage.path)) as conn:
        return explain(conn, game.config, round_id, model_id)


async def scored(game: Game) -> Explanation:
    """Score what there is; the first round of the model "wide"."""
    game.clock = SteppedClock(START_S + 240)
    await game.another_loop().finish()
    return explain_stored(game, ROUND, "id-wide")


def adds_up(one: Explanation) -> None:
    """From the prices to the stored score, by the definition."""
    result, shown = one.result, one.answer
    assert shown.counted is not None
    assert shown.score is not None
    prices = [math.nan if price is None else price for _, price in one.prices]
    is_log = result.target == "log_return"
    moves = [math.log(b / a) if is_log else b - a for a, b in pairwise(prices)]
    known = [at for at, move in enumerate(one.increments) if move is not None]
    assert len(known) == result.resolved
    assert [one.increments[at] for at in known] == pytest.approx([moves[at] for at in known], rel=1e-9)
    assert [at for at, why in enumerate(one.unresolved) if why is None] == known
    unit = 1e4 if is_log else 1e4 / prices[0]
    no_move = math.fsum(abs(one.increments[at] or 0.0) for at in known) / len(known) * unit
    assert no_move == pytest.approx(result.no_move, rel=1e-12)
    if shown.raw is not None:
        assert one.reason is None
        values = [value for value in one.segment_scores or [] if value is not None]
        assert len(values) == len(known)
        assert math.fsum(values) / len(values) == pytest.approx(shown.raw, rel=1e-12)
    gain = (shown.counted - result.median) * (1 if result.rule == "likelihood" else -1)
    divisor = result.no_move if result.rule == "crps" else 1.0
    assert shown.score == pytest.approx(100 * gain / divisor, rel=1e-12, abs=1e-12)


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
        assert (one.result.rule, one.result.target) == (rule, target)
        assert one.result.resolved == 6
        assert [at_s for at_s, _ in one.prices] == list(range(START_S, START_S + 61, 10))
        adds_up(one)
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


async def test_a_damaged_answer_is_named(tmp_path: Path) -> None:
    async with playing(tmp_path) as game:
        await explained(game)
        await game.db.write(lambda conn: conn.execute("UPDATE payload SET body = x'01020304ff'") and None)
        with (
            closing(open_read_only(game.config.storage.path)) as conn,
            pytest.raises(StorageError, match="the stored answer of id-sharp is damaged"),
        ):
            explain(conn, game.config, ROUND, "id-sharp")


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
        after = explain_stored(game, ROUND, "id-wide")
    assert after.reason is None
    assert after.segment_scores == before["wide"].segment_scores


async def test_a_tick_that_changed_since_leaves_prices_as_fresh_as_they_were(tmp_path: Path) -> None:
    async with playing(tmp_path) as game:
        await game.db.write(lambda conn: conn.execute("DELETE FROM price").rowcount)
        await game.prices(START_S - 13, START_S + 122)  # 3 s before each segment's end, 2 s behind it
        await game.round(START_S)
        before = await scored(game)
        game.config = replace(game.config, feed=replace(game.config.feed, tick_s=2))
        after = explain_stored(game, ROUND, "id-wide")
    assert before.result.resolved == 6
    adds_up(after)
    assert after.segment_scores == before.segment_scores


async def test_a_change_of_the_source_is_left_out_of_the_sum_and_said(tmp_path: Path) -> None:
    async with playing(tmp_path) as game:
        await game.round(START_S)
        await game.prices(START_S, START_S + 120)
        after = f"UPDATE price SET source = 'other' WHERE ts_s > {START_S + 30}"
        await game.db.write(lambda conn: conn.execute(after).rowcount)
        one = await scored(game)
    assert one.result.resolved == 5
    assert one.unresolved == [
        *[None] * 3,
        "the source of the prices changed from test to other",
        *[None] * 2,
    ]
    adds_up(one)


async def test_scores_that_were_carried_over_add_up_by_the_scorer_that_computed_them(tmp_path: Path) -> None:
    async with playing(tmp_path) as game:
        await game.round(START_S)
        await game.prices(START_S, START_S + 120)
        before = await scored(game)
        await game.db.write(
            lambda conn: add_scorer(conn, "crps", "log_return", "f", START_S, None, published=True)
        )
        await game.db.write(carry_over, 1, 2)
        one = explain_stored(game, ROUND, "id-wide")
    assert (one.result.scorer_version, one.result.shown_as) == (1, 2)
    assert one.answer == before.answer
    adds_up(one)
    assert any(line.endswith("scorer version 1, carried over into 2") for line in answer_lines(one))


async def test_absent_models_late_joiners_and_voids_are_explained(tmp_path: Path) -> None:
    async with playing(tmp_path) as game:
        await game.prices(START_S, START_S + 240)
        await game.round(START_S)
        absent = game.models.pop("hopeless")
        await game.join("late", START_S + 10)
        del game.models["sharp"]
        no = await game.round(START_S + 20)
        missing = f"UPDATE round SET absent_models = '[{absent.model_no}]', absent = 1 WHERE round_no = {no}"
        await game.db.write(lambda conn: conn.execute(missing).rowcount)
        await game.round(START_S + 40)
        void = "UPDATE round SET status = 'void', reason = 'no model was connected' WHERE round_no = 3"
        await game.db.write(lambda conn: conn.execute(void).rowcount)
        await scored(game)
        second = f"BTC-60-10-{START_S + 20}"
        newcomer, gone = (explain_stored(game, second, f"id-{name}") for name in ("late", "hopeless"))
        with pytest.raises(NotExplained, match="neither asked in the round nor missed in it"):
            explain_stored(game, ROUND, "id-late")
        with pytest.raises(NotExplained, match="void and has no scores: no model was connected"):
            explain_stored(game, f"BTC-60-10-{START_S + 40}", "id-wide")
        with closing(open_read_only(game.config.storage.path)) as conn:
            field = explain_round(conn, second).answers
    adds_up(newcomer)
    assert gone.answer.status is AnswerStatus.ABSENT
    assert gone.reason == "not connected, or still being fed the price history, when the round was held"
    assert (gone.answer.raw, gone.segment_scores) == (None, None)
    raws = [one.raw for one in field if one.raw is not None]
    expected = min(np.percentile(raws, 90), 1.25 * gone.result.median)
    assert gone.answer.counted == pytest.approx(expected, rel=1e-12)
    adds_up(gone)
