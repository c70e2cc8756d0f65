"""Scoring again: a real database, real workers, stepped time; interrupted, resumed, forgotten, switched."""

from __future__ import annotations

import asyncio
import json
import re
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from condor_lite import progress, rescore
from condor_lite.clock import SteppedClock
from condor_lite.explain import explain
from condor_lite.rescore import Progress, RescoreError, Rescorer, read_since
from condor_lite.score import configured_rules
from condor_lite.storage import rescores
from condor_lite.storage.database import open_read_only
from tests.program import LIMIT_S, database, program, verb
from tests.test_models_verb import GAME, MODEL
from tests.test_score import CONFIG, SPREADS, START_S, Game, overall, playing

pytestmark = pytest.mark.anyio

ROUNDS = 40  # more than a page
END_S = START_S + 20 * ROUNDS + 60
EVERYTHING = (
    "SELECT round_no, scorer_version, median, no_move, model_no, raw, counted, score "
    "FROM round_score JOIN score USING (round_no, scorer_version) WHERE scorer_version = ? ORDER BY 1, 5"
)
POINTS = json.dumps([{"type": "discrete", "points": {"-0.0003": 1, "0.0003": 1}}] * 6).encode()


@asynccontextmanager
async def scored(folder: Path, text: str = CONFIG, rounds: int = ROUNDS) -> AsyncIterator[Game]:
    """A game with scored rounds, at rest shortly after the last of them."""
    async with playing(folder, text) as game:
        for at_s in range(START_S, START_S + 20 * rounds, 20):
            await game.round(at_s, wide=POINTS)
        end_s = max(END_S, START_S + 20 * rounds + 60)
        await game.prices(START_S, end_s + 60)
        game.clock = SteppedClock(end_s + 60)
        game.loop = game.another_loop()
        await game.loop.finish()
        yield game


def with_rule(game: Game, rule: str) -> None:
    """The host changes the config and starts anew."""
    game.config = replace(game.config, scoring=replace(game.config.scoring, rule=rule))
    game.loop = game.another_loop()


def rescorer_of(game: Game) -> Rescorer:
    return Rescorer(game.config, game.clock, game.db, game.loop)


async def done(game: Game, **options: Any) -> Progress:
    """Begin a rescore and carry it out."""
    return await ended(rescorer_of(game), "rescore", **options)


async def ended(rescorer: Rescorer, command: str, **options: Any) -> Progress:
    await rescorer.commands[command](**options)
    working = asyncio.create_task(rescorer.run())
    try:
        while (now := await rescorer.progress()).state == "running":
            await asyncio.wait({working}, timeout=0.01)
    finally:
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
    return now


async def versions(game: Game) -> list[tuple[int, int]]:
    """Rounds by scorer version."""
    return await game.rows("SELECT scorer_version, count(*) FROM round_score GROUP BY 1 ORDER BY 1")


async def test_the_same_rules_give_the_same_scores_under_a_new_version(tmp_path: Path) -> None:
    async with scored(tmp_path) as game:
        before = await game.rows(EVERYTHING, 1)
        shown = game.leaderboards[-1]
        sums = "SELECT * FROM calibration WHERE scorer_version = ? ORDER BY 2, 3, 4, 5, 6"
        calibration = await game.rows(sums, 1)
        now = await done(game)
        after = await game.rows(EVERYTHING, 2)
        assert await game.rows(EVERYTHING, 1) == before, "old scores stay"
        assert [row[1:] for row in await game.rows(sums, 2)] == [row[1:] for row in calibration]
        await game.another_loop().finish()
        assert await game.rows("SELECT count(*) FROM scorer") == [(2,)], "the next start goes on with it"
    assert (now.state, now.done, now.rounds, now.scored) == ("done", ROUNDS, ROUNDS, ROUNDS)
    assert [(row[0], *row[2:]) for row in after] == [(row[0], *row[2:]) for row in before]
    assert shown.scorer_version == 1
    assert all(one.scorer_version == 2 for one in game.leaderboards[-2:])
    assert overall(game.leaderboards[-1]) == pytest.approx(overall(shown), rel=1e-12)
    assert (game.leaderboards[-1].mixed_versions, game.leaderboards[-1].uncounted) == ((), 0)


async def test_another_rule_of_the_config_fills_the_windows_again(tmp_path: Path) -> None:
    async with scored(tmp_path) as game:
        with_rule(game, "log")
        await game.loop.finish()
        assert overall(game.leaderboards[-1]) == dict.fromkeys(SPREADS)
        assert game.leaderboards[-1].uncounted == ROUNDS
        now = await done(game)
        last = game.leaderboards[-1]
        anew = game.another_loop()
        await anew.finish()
        stored = await game.rows(
            "SELECT DISTINCT scorer_version FROM leaderboard WHERE created_at_s = ?", END_S + 60
        )
        assert await game.rows("SELECT scorer_version, rule, published FROM scorer") == [
            (1, "crps", 1),
            (2, "log", 1),
            (3, "log", 1),
        ]
        assert await versions(game) == [(1, ROUNDS), (3, ROUNDS)]
    assert (now.state, now.remark, last.scorer_version, last.uncounted) == ("done", "", 3, 0)
    assert stored == [(3,)], "stored with the switch"
    assert all(value is not None for value in overall(last).values())
    assert overall(game.leaderboards[-1]) == overall(last)


async def test_a_rule_chosen_here_lasts_until_the_config_is_changed(tmp_path: Path) -> None:
    async with scored(tmp_path, rounds=3) as game:
        now = await done(game, rule="log")
        assert 'Its config still says scoring.rule = "crps"' in now.remark
        in_force = []
        for rule in ("crps", "crps", "likelihood", "crps"):
            with_rule(game, rule)
            await game.loop.finish()
            in_force.append((await game.db.read(rescores.in_force, configured_rules(game.config))).rule)
            if rule == "likelihood":
                await done(game)
        newest = await game.rows("SELECT rule FROM scorer ORDER BY scorer_version DESC LIMIT 1")
    assert in_force == ["log", "log", "likelihood", "crps"]
    assert newest == [("crps",)]


async def test_what_other_rules_reject_or_accept_is_told_by_version(tmp_path: Path) -> None:
    async with scored(tmp_path, rounds=3) as game:
        wide = game.models["wide"].model_no
        await done(game, rule="likelihood")
        of_wide = (
            "SELECT scorer_version, raw IS NULL, detail FROM score "
            "WHERE round_no = 1 AND model_no = ? ORDER BY 1"
        )
        rows = await game.rows(of_wide, wide)
        predictions = await game.rows("SELECT DISTINCT status FROM prediction")
        with closing(open_read_only(game.config.storage.path)) as conn:
            rejected = explain(conn, game.config, f"BTC-60-10-{START_S}", "id-wide")
            valid = explain(conn, game.config, f"BTC-60-10-{START_S}", "id-wide", 1)
    assert rows == [(1, 0, None), (2, 1, rows[1][2])]
    assert rows[1][2].startswith("invalid: segment 1: ")
    assert predictions == [("SUCCESS",)]
    assert (rejected.answer.status, rejected.reason) == ("FAILED", rows[1][2])
    assert (rejected.result.scorer_version, rejected.result.rule) == (2, "likelihood")
    assert (valid.answer.status, valid.reason, valid.result.rule) == ("SUCCESS", None, "crps")
    for one in (valid,):
        assert one.answer.raw is not None
        assert np.mean([value for value in one.segment_scores or [] if value is not None]) == pytest.approx(
            one.answer.raw, rel=1e-12
        )


async def test_interrupted_anywhere_it_is_resumed_to_the_same_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with scored(tmp_path) as game:
        shown = len(game.leaderboards)
        rescorer = rescorer_of(game)
        original = rescorer._decide
        steps = 0

        async def cut_off(*arguments: Any) -> int:
            nonlocal steps
            steps += 1
            if steps == 2:
                working.cancel()
                await asyncio.sleep(60)
            return await original(*arguments)

        monkeypatch.setattr(rescorer, "_decide", cut_off)
        await rescorer.rescore(rule="log")
        working = asyncio.create_task(rescorer.run())
        await asyncio.gather(working, return_exceptions=True)
        part = dict(await versions(game))
        assert 0 < part[2] < ROUNDS
        await game.another_loop().finish()
        assert game.leaderboards[shown - 1 :][-1].scorer_version == 1
        assert (await explained(game)).result.scorer_version == 1, "nothing of it shows"

        again = rescorer_of(game)
        assert (await again.progress()).state == "interrupted"
        with pytest.raises(RescoreError, match="--resume"):
            await again.rescore()
        now = await ended(again, "rescore_resume")
        assert await versions(game) == [(1, ROUNDS), (2, ROUNDS)]
        in_parts = [row[2:] for row in await game.rows(EVERYTHING, 2)]
        await done(game, rule="log")
        assert [row[2:] for row in await game.rows(EVERYTHING, 3)] == in_parts
        assert (await explained(game)).result.scorer_version == 3
    assert (now.state, now.done, now.scored) == ("done", ROUNDS, ROUNDS)


async def explained(game: Game, version: int | None = None) -> Any:
    with closing(open_read_only(game.config.storage.path)) as conn:
        return explain(conn, game.config, f"BTC-60-10-{START_S}", "id-sharp", version)


async def test_forgotten_it_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with scored(tmp_path) as game:
        before = await game.rows(EVERYTHING, 1)
        rescorer = rescorer_of(game)
        with pytest.raises(RescoreError, match="no rescore to forget"):
            await rescorer.forget()
        with pytest.raises(RescoreError, match="no interrupted rescore"):
            await rescorer.resume()
        reached, original = asyncio.Event(), rescorer._switch

        async def wait(*arguments: Any) -> bool:
            reached.set()
            await asyncio.sleep(60)
            return await original(*arguments)

        monkeypatch.setattr(rescorer, "_switch", wait)
        await rescorer.rescore()
        working = asyncio.create_task(rescorer.run())
        await reached.wait()
        assert await versions(game) == [(1, ROUNDS), (2, ROUNDS)]
        with pytest.raises(RescoreError, match="under way"):
            await rescorer.rescore()
        said = await rescorer.forget()
        assert not working.done()
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
        assert said.startswith("the rescore under scorer version 2 is forgotten")
        assert await versions(game) == [(1, ROUNDS)]
        assert await game.rows("SELECT count(*) FROM score WHERE scorer_version <> 1") == [(0,)]
        assert await game.rows("SELECT count(*) FROM calibration WHERE scorer_version <> 1") == [(0,)]
        assert await game.rows("SELECT (SELECT count(*) FROM rescore), (SELECT count(*) FROM left_out)") == [
            (0, 0)
        ]
        assert await game.rows(EVERYTHING, 1) == before
        now = await done(game)
        assert (now.state, now.scorer_version) == ("done", 3), "a number is not given out twice"


async def test_rounds_scored_meanwhile_are_in_the_switch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with scored(tmp_path) as game:
        async with game.running():
            rescorer = rescorer_of(game)
            original, held = rescorer._decide, False

            async def decide(*arguments: Any) -> int:
                nonlocal held
                if not held:
                    held = True
                    for at_s in (END_S + 80, END_S + 100):
                        await game.round(at_s)
                    await game.prices(END_S + 60, END_S + 300)
                    working_on = asyncio.create_task(game.clock.run_until(END_S + 250))
                    live.append(working_on)
                return await original(*arguments)

            live: list[asyncio.Task[None]] = []
            monkeypatch.setattr(rescorer, "_decide", decide)
            now = await ended(rescorer, "rescore", rule="log")
            await asyncio.gather(*live)
            await game.round(END_S + 260)
            await game.prices(END_S + 300, END_S + 500)
            await game.clock.run_until(END_S + 400)
            await game.loop.finish()  # nobody holds the clock while a pool ends and the next one starts
            assert await game.statuses() == [("scored", None)] * (ROUNDS + 3)
            last = game.leaderboards[-1]
        by_round = dict(
            await game.rows(
                "SELECT scheduled_at_s, max(scorer_version) FROM round JOIN round_score USING (round_no) "
                "GROUP BY 1"
            )
        )
    assert now.state == "done"
    assert set(by_round.values()) == {2}, "no round is without the new version"
    assert (last.scorer_version, last.uncounted) == (2, 0)
    numbers = [one.scorer_version for one in game.leaderboards]
    assert numbers == sorted(numbers), "once, and not back"


async def test_live_rounds_are_scored_before_the_backlog_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with scored(tmp_path) as game:
        rescorer = rescorer_of(game)
        original, live, seen = rescorer._decide, [], []

        async def decide(*arguments: Any) -> int:
            seen.append((await game.statuses())[ROUNDS:])
            if not live:
                await game.round(START_S + 20 * ROUNDS)  # it is due
                live.append(asyncio.create_task(game.loop.finish()))
                await asyncio.sleep(0)
            return await original(*arguments)

        monkeypatch.setattr(rescorer, "_decide", decide)
        now = await ended(rescorer, "rescore")
        await asyncio.gather(*live)
    assert (now.state, now.scored) == ("done", ROUNDS + 1)
    assert seen[0] == []
    assert len(seen) > 2
    assert seen[1:] == [[("scored", None)]] * (len(seen) - 1)


async def test_until_the_switch_nothing_shows_and_then_all_of_it(tmp_path: Path) -> None:
    async with scored(tmp_path, rounds=3) as game:
        job = await game.db.write(
            rescores.begin, configured_rules(game.config), "f", START_S, START_S, game.clock.now()
        )
        board = game.leaderboards[-1]
        assert not await game.db.write(
            rescores.switch, job, configured_rules(game.config), replace(board, scorer_version=2)
        )
        assert await game.db.read(rescores.newest_version) == 1
        await game.db.write(rescores.set_aside, 2, [1, 2], [(3, "why")])
        assert (await explained(game)).result.shown_as == 1

        def fails(*arguments: Any) -> None:
            raise RuntimeError("in the middle of it")

        def switch(conn: sqlite3.Connection) -> None:
            rescores.switch(conn, job, configured_rules(game.config), replace(board, scorer_version=2))
            fails()

        with pytest.raises(RuntimeError):
            await game.db.write(switch)
        assert await game.db.read(rescores.newest_version) == 1
        assert await game.db.read(rescores.pending) == job
        assert await game.db.write(
            rescores.switch, job, configured_rules(game.config), replace(board, scorer_version=2)
        )
        assert await game.db.read(rescores.newest_version) == 2
        first = await explained(game)
    assert (first.result.scorer_version, first.result.shown_as) == (1, 2), "carried over"


async def test_rounds_without_answers_keep_their_scores_and_that_is_said(tmp_path: Path) -> None:
    async with scored(tmp_path) as game:
        gone = "DELETE FROM payload WHERE round_no <= 4"
        await game.db.write(lambda conn: conn.execute(gone).rowcount)
        await game.db.write(
            lambda conn: conn.execute("UPDATE round SET has_payloads = 0 WHERE round_no <= 4").rowcount
        )
        before = overall(game.leaderboards[-1])
        same = await done(game)
        mixed = game.leaderboards[-1]
        old, new = await explained(game), await explained_last(game)
        other = await done(game, rule="log")
        apart = game.leaderboards[-1]
        kept = await explained(game)
    assert (same.scored, same.carried, same.left_out) == (ROUNDS - 4, 4, {})
    assert (mixed.mixed_versions, mixed.uncounted) == ((1,), 0)
    assert overall(mixed) == pytest.approx(before, rel=1e-12)
    assert (old.result.scorer_version, new.result.scorer_version) == (1, 2)
    assert (other.scored, other.carried, other.left_out) == (ROUNDS - 4, 0, {rescore.NO_ANSWERS: 4})
    assert (apart.mixed_versions, apart.uncounted) == ((), 4)
    assert (kept.result.scorer_version, kept.result.rule) == (1, "crps")
    assert any("4 rounds could not be" in text for text in progress.ending(same))
    assert any(rescore.NO_ANSWERS in text for text in progress.ending(other))


async def test_a_round_that_has_lost_prices_since_keeps_its_scores(tmp_path: Path) -> None:
    scores = (
        "SELECT round_no, resolved, model_no, raw, counted, score FROM round_score "
        "JOIN score USING (round_no, scorer_version) WHERE scorer_version = ? AND round_no <= 3 ORDER BY 1, 3"
    )
    async with scored(tmp_path, rounds=6) as game:
        before = await game.rows(scores, 1)
        gone = f"DELETE FROM price WHERE ts_s <= {START_S + 45}"  # all of a round's, most, or one
        await game.db.write(lambda conn: conn.execute(gone))
        same = await done(game)
        after = await game.rows(scores, 2)
        mixed = game.leaderboards[-1]
        other = await done(game, rule="log")
    assert (same.scored, same.carried, same.left_out) == (3, 3, {})
    assert after == before
    assert (mixed.mixed_versions, mixed.uncounted) == ((1,), 0)
    assert (other.scored, other.carried, other.left_out) == (3, 0, {rescore.NO_PRICES: 3})


async def test_an_hour_without_answers_keeps_its_calibration_and_a_mixed_one_counts_what_is_scored_again(
    tmp_path: Path,
) -> None:
    sums = "SELECT * FROM calibration WHERE scorer_version = ? ORDER BY 2, 3, 4, 5, 6"
    async with scored(tmp_path) as game:
        await game.round(START_S + 40, "ETH")
        await game.loop.finish()
        await game.db.write(forget_payloads, "asset = 'BTC'")
        before = await game.rows(sums, 1)
        await done(game)
        carried = await game.rows(sums, 2)
        await game.round(START_S + 60, "ETH")
        await game.loop.finish()
        await game.db.write(forget_payloads, f"scheduled_at_s = {START_S + 40}")
        await done(game)
        mixed = await game.rows(
            "SELECT asset, sum(segments) FROM calibration WHERE scorer_version = 3 GROUP BY 1"
        )
    models = len(game.models)
    assert {row[1] for row in before} == {"BTC", "ETH"}
    assert [row[1:] for row in carried] == [row[1:] for row in before]
    assert dict(mixed) == {"BTC": sum(row[8] for row in before if row[1] == "BTC"), "ETH": 6 * models}


def forget_payloads(conn: sqlite3.Connection, where: str) -> None:
    conn.execute(f"DELETE FROM payload WHERE round_no IN (SELECT round_no FROM round WHERE {where})")
    conn.execute(f"UPDATE round SET has_payloads = 0 WHERE {where}")


async def explained_last(game: Game) -> Any:
    with closing(open_read_only(game.config.storage.path)) as conn:
        return explain(conn, game.config, f"BTC-60-10-{START_S + 20 * (ROUNDS - 1)}", "id-sharp")


async def test_since_limits_what_is_scored_again(tmp_path: Path) -> None:
    async with scored(tmp_path) as game:
        since = END_S - 200
        text = np.datetime_as_string(np.datetime64(since, "s"), unit="s") + "Z"
        now = await done(game, since=text)
        again = await game.rows(
            "SELECT min(resolvable_at_s), count(*) FROM round JOIN round_score USING (round_no) "
            "WHERE scorer_version = 2 AND carried_from IS NULL"
        )
        other = await done(game, since=text, rule="log")
    ((oldest_s, count),) = again
    assert oldest_s >= since
    assert (now.scored, now.carried) == (count, ROUNDS - count)
    assert other.left_out == {rescore.BEFORE_SINCE: ROUNDS - count}


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"target": "price_change"}, "--target price_change: the game's models are asked"),
        ({"rule": "nonsense"}, "scoring.rule 'nonsense': known are crps"),
        ({"since": "yesterday"}, "--since 'yesterday': must be a time"),
        ({"since": "1s"}, "there is none whose answers are still stored"),
    ],
)
async def test_what_makes_no_sense_is_refused(tmp_path: Path, options: dict[str, str], why: str) -> None:
    async with scored(tmp_path, rounds=1) as game:
        game.clock = SteppedClock(END_S + 3600)
        with pytest.raises(Exception, match=re.escape(why)):
            await rescorer_of(game).rescore(**options)
        assert await game.rows("SELECT count(*) FROM scorer") == [(1,)]


async def test_answers_to_another_target_are_not_scored_as_this_one(tmp_path: Path) -> None:
    async with scored(tmp_path, rounds=2) as game:
        scoring = replace(game.config.scoring, target="price_change")
        game.config = replace(game.config, scoring=scoring)
        game.loop = game.another_loop()
        with pytest.raises(RescoreError, match="2 were answered when"):
            await rescorer_of(game).rescore()


async def test_an_interrupted_rescore_of_rules_that_changed_is_not_resumed(tmp_path: Path) -> None:
    async with scored(tmp_path, rounds=2) as game:
        await rescorer_of(game).rescore()
        with_rule(game, "log")
        await game.loop.finish()
        with pytest.raises(RescoreError, match="rules of the game have changed"):
            await rescorer_of(game).resume()
        assert "is forgotten" in await rescorer_of(game).forget()
        assert (await done(game)).state == "done"


async def test_a_failure_is_told_and_can_be_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with scored(tmp_path, rounds=2) as game:
        rescorer = rescorer_of(game)

        async def fail(*arguments: Any, **more: Any) -> None:
            raise OSError("the disk is full")

        with monkeypatch.context() as patch:
            patch.setattr(rescorer, "_catch_up", fail)
            now = await ended(rescorer, "rescore")
        assert (now.state, now.remark[:26]) == ("failed", "OSError: the disk is full;")
        assert game.leaderboards[-1].scorer_version == 1
        assert (await ended(rescorer, "rescore_resume")).state == "done"


def test_since_is_a_time_or_how_long_ago() -> None:
    assert read_since("3d", START_S) == START_S - 3 * 86400
    assert read_since("2023-11-14T23:00:00Z", START_S) == START_S
    assert read_since("2023-11-14T23:00", START_S) == START_S


def test_progress_names_share_rate_and_time_left() -> None:
    now = Progress("running", 2, "crps", 0, 200, 50, rate=1234.5, eta_s=75.2)
    assert progress.line(now) == "25.0%  50 of 200 rounds  1234 answers/s  1 min 15 s left"


FOR_EVER = """
CREATE VIEW for_ever AS
WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT 1 FROM n) SELECT count(*) AS c FROM n
"""
STUCK_HALFWAY = """
CREATE TRIGGER stuck BEFORE INSERT ON round_score
WHEN new.scorer_version = 2 AND (SELECT count(*) FROM round_score WHERE scorer_version = 2) >= 200
BEGIN SELECT c FROM for_ever; END
"""


async def test_killed_it_leaves_whole_rounds_and_is_resumed(tmp_path: Path) -> None:
    async with scored(tmp_path, rounds=400) as game:
        path = game.config.storage.path
        expected = await game.rows(EVERYTHING, 1)
        for statement in (FOR_EVER, STUCK_HALFWAY):
            await game.db.write(lambda conn, sql: conn.execute(sql).rowcount, statement)
    command = [sys.executable, "-m", "condor_lite", "rescore"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL) as run:  # noqa: ASYNC220
        try:
            with closing(sqlite3.connect(path)) as db:
                part, until_s = 0, time.monotonic() + LIMIT_S
                while not part:
                    assert run.poll() is None
                    assert time.monotonic() < until_s, "nothing is stored"
                    (part,) = db.execute(
                        "SELECT count(*) FROM round_score WHERE scorer_version = 2"
                    ).fetchone()
        finally:
            run.kill()
    with closing(sqlite3.connect(path)) as db:
        db.executescript("DROP TRIGGER stuck; DROP VIEW for_ever")
        assert db.execute("SELECT published FROM scorer ORDER BY 1").fetchall() == [(0,), (1,)]
        ragged = (
            "SELECT 1 FROM round_score LEFT JOIN score USING (round_no, scorer_version) "
            "GROUP BY round_no, scorer_version HAVING count(model_no) <> 4"
        )
        assert not db.execute(ragged).fetchall()
    code, said = verb(tmp_path, "rescore", "--resume")
    assert code == 0, said
    assert "done: scorer version 2 (crps) counts from now on; 400 rounds were scored again" in said
    with closing(sqlite3.connect(path)) as db:
        rows = db.execute(EVERYTHING, (2,)).fetchall()
    assert [(row[0], *row[2:]) for row in rows] == [(row[0], *row[2:]) for row in expected]


def test_the_program_rescores_while_it_runs_and_without_a_game(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(GAME.replace("[scoring]", '[scoring]\ninterval = "1s"'))
    for name in ("calm", "wild"):
        (tmp_path / "models" / name).mkdir(parents=True)
        (tmp_path / "models" / name / "main.py").write_text(MODEL)
    code, said = verb(tmp_path, "rescore")
    assert code == 2
    assert "there is no database at" in said
    with program(tmp_path) as run:

        def whole() -> list[dict[str, Any]]:
            """Scored rounds that both models have answered, newest first."""
            return [row for row in run.get("/rounds?status=scored") if row["answered"] == 2]

        run.until(lambda: len(whole()) >= 2)
        code, said = verb(tmp_path, "rescore", "--rule", "log")
        assert code == 0, said
        assert "done: scorer version 2 (log) counts from now on" in said
        assert re.search(r"of \d+ rounds .* answers/s", said)
        assert 'scoring.rule = "crps"' in said
        board = run.get("/leaderboard")
        assert (board["scorer_version"], board["mixed_versions"], board["uncounted_rounds"]) == (2, [], 0)
        assert (run.get("/statistics")["scoring_rule"], run.get("/statistics")["scorer_version"]) == (
            "log",
            2,
        )
        count = len(run.get("/rounds?status=scored"))
        run.until(lambda: len(run.get("/rounds?status=scored")) > count)
        assert {row["scorer_version"] for row in run.get("/reports/predictions") if row["scored_at"]} == {2}
        first = whole()[-1]["round_id"]
        old = run.get(f"/rounds/{first}/predictions/calm?scorer_version=1")
        new = run.get(f"/rounds/{first}/predictions/calm")
        assert (old["scorer_version"], old["rule"]) == (1, "crps")
        assert (new["scorer_version"], new["rule"]) == (2, "log")
        assert "has not scored this round" in verb(tmp_path, "score", first, "--scorer-version", "7")[1]
        assert "Traceback" not in run.console.read_text()
        assert run.end() == 0
    code, said = verb(tmp_path, "rescore")
    assert code == 0, said
    assert "scorer version 3 (crps)" in said
    with closing(database(tmp_path)) as db:
        short = db.execute(
            "SELECT count(*) FROM round WHERE status = 'scored' AND NOT EXISTS (SELECT 1 FROM round_score q "
            "WHERE q.round_no = round.round_no AND scorer_version = 3)"
        ).fetchone()
        assert short == (0,)
    assert verb(tmp_path, "rescore", "--resume") == (
        2,
        "condor-lite: there is no interrupted rescore to resume\n",
    )
