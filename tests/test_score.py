"""The scoring loop: a real database, real pool processes, stepped time."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from condor_lite import config as configuration
from condor_lite import scorer
from condor_lite.board import Board
from condor_lite.clock import SteppedClock
from condor_lite.config import Config
from condor_lite.errors import StorageUnavailable
from condor_lite.game.density import decode
from condor_lite.game.entities import (
    Answer,
    AnswerStatus,
    Leaderboard,
    Model,
    ModelInfo,
    Round,
    RoundStatus,
    Window,
)
from condor_lite.game.outcome import Series, realise
from condor_lite.game.scoring import Rules, load_rule, score
from condor_lite.game.windows import HourSums, WindowRows
from condor_lite.score import ScoreLoop
from condor_lite.storage import repositories, scores
from condor_lite.storage.database import Database
from condor_lite.storage.hours import save_hours
from tests.rules import GUILTY

pytestmark = pytest.mark.anyio

START_S = 1_700_002_800  # a full hour
TICK_S = 5
SPREADS = {"sharp": 2e-4, "wide": 1e-3, "hopeless": 1e-1, "benchmark": 4e-4}

CONFIG = """
[[game.settings]]
assets = ["BTC", "ETH"]
horizon = "1m"
step = "10s"
interval = "20s"

[feed]
tick = "5s"
history = "1h"

[scoring]
interval = "10s"
workers = 1
snapshot_interval = "15m"
"""


def answer(scale: float, loc: float = 0.0) -> bytes:
    density = {"type": "builtin", "name": "norm", "params": {"loc": loc, "scale": scale}}
    return json.dumps([{"step": 10 * k, "prediction": density} for k in range(1, 7)]).encode()


def price(ts_s: int) -> float:
    return 100.0 * float(np.exp(2e-4 * np.sin(ts_s * 0.37)))


@dataclass
class Game:
    """A game without a predict loop: rounds, answers and prices are written as it would."""

    config: Config
    clock: SteppedClock
    db: Database
    models: dict[str, Model] = field(default_factory=dict)
    leaderboards: list[Leaderboard] = field(default_factory=list)
    loop: ScoreLoop = field(init=False)

    def __post_init__(self) -> None:
        self.loop = self.another_loop()

    def another_loop(self) -> ScoreLoop:
        return ScoreLoop(self.config, self.clock, self.db, self.leaderboards.append)

    async def join(self, name: str, at_s: int = START_S) -> None:
        info = ModelInfo(f"id-{name}", name, name, name, "1", benchmark=name == "benchmark")
        self.models[name] = await self.db.write(repositories.upsert_model, info, at_s)

    async def prices(self, from_s: int, to_s: int, assets: Sequence[str] = ("BTC", "ETH")) -> None:
        """Points after `from_s` up to `to_s`."""
        points = [(ts_s, price(ts_s)) for ts_s in range(from_s + TICK_S, to_s + 1, TICK_S)]
        for asset in assets:
            await self.db.write(repositories.add_prices, asset, points, "test", 0)
        self.loop.wake()

    async def round(self, at_s: int, asset: str = "BTC", **answers: bytes) -> int:
        """A closed round, answered by all models by their spread unless told otherwise."""
        (no,) = await self.db.write(repositories.open_rounds, [Round(asset, 60, 10, at_s)])
        assert no is not None
        sent = {name: answers.get(name, answer(SPREADS.get(name, 1e-3))) for name in self.models}
        await self.db.write(
            repositories.add_answers,
            [
                Answer(no, self.models[name].model_no, AnswerStatus.SUCCESS, at_s * 1000, 1, None, payload)
                for name, payload in sent.items()
            ],
        )
        await self.db.write(repositories.close_round, no, RoundStatus.CLOSED, None, ())
        self.loop.wake()
        return no

    async def rows(self, sql: str, *parameters: Any) -> list[tuple[Any, ...]]:
        def fetch(connection: sqlite3.Connection) -> list[tuple[Any, ...]]:
            return [tuple(row) for row in connection.execute(sql, parameters)]

        return await self.db.read(fetch)

    async def statuses(self) -> list[tuple[str, str | None]]:
        return await self.rows("SELECT status, reason FROM round ORDER BY round_no")

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.loop.run())
        await asyncio.sleep(0)  # it holds the clock from here on
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def playing(folder: Path, text: str = CONFIG, at_s: float = START_S) -> AsyncIterator[Game]:
    path = folder / "config.toml"
    path.write_text(text)
    config = configuration.load(path, {})
    async with Database(config.storage.path) as db:
        game = Game(config, SteppedClock(at_s), db)
        for name in SPREADS:
            await game.join(name)
        await game.prices(START_S - 600, START_S)
        yield game


def overall(leaderboard: Leaderboard) -> dict[str, float | None]:
    return {one.model.info.model_name: one.overall.of(Window.ANCHOR) for one in leaderboard.standings}


async def test_a_round_is_scored_by_the_definition(tmp_path: Path) -> None:
    async with playing(tmp_path) as game:
        no = await game.round(START_S)
        await game.prices(START_S, START_S + 120)
        game.clock = SteppedClock(START_S + 120)
        await game.another_loop().finish()
        stored = dict(
            await game.rows(
                "SELECT model_name, raw FROM score JOIN model USING (model_no) WHERE round_no = ?", no
            )
        )
        series = Series(*await game.db.read(repositories.load_prices, "BTC", START_S - 60, START_S + 60))
        statuses = await game.statuses()
    (setting,) = (one for one in game.config.game.settings if one.asset == "BTC")
    realised = realise(series, setting, START_S, TICK_S, "log_return")
    for name, spread in SPREADS.items():
        (expected,) = score([(decode(answer(spread), setting, Rules().limits), realised)], Rules())
        assert stored[name] == pytest.approx(expected.raw, rel=1e-12)
    assert statuses == [("scored", None)]
    last = game.leaderboards[-1]
    assert [one.model.info.model_name for one in last.standings if one.rank] == ["sharp", "wide", "hopeless"]
    assert last.created_at_s == START_S + 120


async def test_a_leaderboard_is_there_at_once_and_rounds_are_scored_when_settled(tmp_path: Path) -> None:
    async with playing(tmp_path) as game, game.running():
        await game.clock.run_until(START_S + 1)
        assert [overall(one) for one in game.leaderboards] == [dict.fromkeys(SPREADS)]
        await game.round(START_S)
        await game.prices(START_S, START_S + 60)
        await game.clock.run_until(START_S + 60 + TICK_S - 1)
        assert await game.statuses() == [("closed", None)]
        await game.clock.run_until(START_S + 60 + TICK_S)
        assert await game.statuses() == [("scored", None)]
        assert all(value is not None for value in overall(game.leaderboards[-1]).values())


async def test_a_round_waits_for_its_price_and_is_void_when_that_does_not_come(tmp_path: Path) -> None:
    async with playing(tmp_path) as game, game.running():
        await game.round(START_S, "BTC")
        await game.round(START_S, "ETH")
        await game.prices(START_S, START_S + 55)
        await game.clock.run_until(START_S + 1000)
        assert await game.statuses() == [("closed", None)] * 2
        await game.prices(START_S + 55, START_S + 60, ["ETH"])
        await game.clock.run_until(START_S + 1020)
        assert await game.statuses() == [("closed", None), ("scored", None)]
        await game.clock.run_until(START_S + 60 + 7200)
        (void, _) = await game.statuses()
    assert void == ("void", "no price of BTC came within 7200 s of the end of the round")


async def test_a_round_with_too_few_prices_is_void(tmp_path: Path) -> None:
    async with playing(tmp_path) as game:
        await game.round(START_S)
        await game.prices(START_S, START_S + 20)
        await game.prices(START_S + 55, START_S + 80)
        game.clock = SteppedClock(START_S + 120)
        await game.another_loop().finish()
        assert await game.statuses() == [
            ("void", "prices resolve only 2 of 6 segments; no price came for 40 s of the round")
        ]
        assert await game.rows("SELECT * FROM score") == []


async def test_what_is_wrong_with_an_answer_is_told_before_the_round_is_resolved(tmp_path: Path) -> None:
    async with playing(tmp_path) as game, game.running():
        no = await game.round(START_S, wide=answer(-1.0))
        await game.clock.run_until(START_S + 11)
        told = await game.rows(
            "SELECT status, detail FROM prediction WHERE round_no = ? AND model_no = ?",
            no,
            game.models["wide"].model_no,
        )
        await game.prices(START_S, START_S + 120)
        await game.clock.run_until(START_S + 120)
        ((raw, counted),) = await game.rows(
            "SELECT raw, counted FROM score WHERE model_no = ?", game.models["wide"].model_no
        )
    ((status, detail),) = told
    assert status == "FAILED"
    assert detail.startswith("invalid: segment 1: ")
    assert raw is None
    assert counted > 0


async def test_no_round_is_void_while_its_prices_wait_for_the_database(tmp_path: Path) -> None:
    waiting = True
    async with playing(tmp_path, at_s=START_S + 3 * 3600) as game:
        loop = ScoreLoop(
            game.config, game.clock, game.db, game.leaderboards.append, prices_wait=lambda: waiting
        )
        await game.round(START_S)
        await loop.finish()
        assert await game.statuses() == [("closed", None)]
        await game.prices(START_S, START_S + 120)
        waiting = False
        await loop.finish()
        assert await game.statuses() == [("scored", None)]


@pytest.mark.parametrize(
    ("prices_to_s", "void_after", "status"),
    [(120, "1h", "scored"), (20, "1h", "closed"), (20, "1m", "void"), (70, "1h", "void")],
)
async def test_what_is_wrong_with_an_answer_is_told_whatever_becomes_of_a_round_that_is_due(
    tmp_path: Path, prices_to_s: int, void_after: str, status: str
) -> None:
    checked: list[tuple[set[int], set[int]]] = []
    async with playing(tmp_path, CONFIG + f'void_after = "{void_after}"\n') as game:
        await game.round(START_S, wide=answer(-1.0))
        await game.prices(START_S if prices_to_s != 70 else START_S + 55, START_S + prices_to_s)
        clock = SteppedClock(START_S + 180)
        for _ in range(2):  # the second one has nothing to tell
            await ScoreLoop(
                game.config,
                clock,
                game.db,
                lambda _: None,
                lambda valid, reasons: checked.append((set(valid), set(reasons))),
            ).finish()
        numbers = {name: model.model_no for name, model in game.models.items()}
        assert await game.rows("SELECT status, validated, answered, failed FROM round") == [
            (status, 1, len(numbers) - 1, 1)
        ]
        ((detail,),) = await game.rows("SELECT detail FROM prediction WHERE status = 'FAILED'")
    assert detail.startswith("invalid: segment 1: ")
    assert checked == [(set(numbers.values()) - {numbers["wide"]}, {numbers["wide"]})]


async def test_scoring_again_changes_nothing(tmp_path: Path) -> None:
    everything = "SELECT * FROM round_score JOIN score USING (round_no, scorer_version) ORDER BY 1, 2, 3"
    async with playing(tmp_path) as game:
        for at_s in range(START_S, START_S + 200, 20):
            await game.round(at_s)
        await game.prices(START_S, START_S + 400)
        game.clock = SteppedClock(START_S + 400)
        await game.another_loop().finish()
        first = await game.rows(everything)
        await game.another_loop().finish()
        assert await game.rows(everything) == first
        # As if the process had died between the scores and everything after them.
        await game.db.write(lambda conn: conn.execute("UPDATE round SET status = 'closed'").rowcount)
        await game.another_loop().finish()
        assert await game.rows(everything) == first
        assert await game.rows("SELECT count(*), count(DISTINCT scorer_version) FROM scorer") == [(1, 1)]


@pytest.mark.parametrize("stage", ["score_round", "_store"])
async def test_a_cycle_that_is_cut_off_leaves_whole_rounds(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = getattr(scorer, stage)
    running = asyncio.get_running_loop()
    calls = 0

    def cut_off(*arguments: Any) -> Any:
        """Cancels the loop in the third call, in the thread or transaction that it runs in."""
        nonlocal calls
        calls += 1
        if calls == 3:
            running.call_soon_threadsafe(task.cancel)
        return original(*arguments)

    async with playing(tmp_path) as game:
        for at_s in range(START_S, START_S + 200, 20):
            await game.round(at_s)
        await game.prices(START_S, START_S + 600)
        game.clock = SteppedClock(START_S + 600)
        with monkeypatch.context() as patch:
            patch.setattr(scorer, stage, cut_off)
            task = asyncio.create_task(game.another_loop().run())
            with pytest.raises(asyncio.CancelledError):
                await task
        stored = await game.rows(
            "SELECT status, count(model_no) FROM round LEFT JOIN score USING (round_no) GROUP BY round_no"
        )
        await game.another_loop().finish()
        assert await game.statuses() == [("scored", None)] * 10
        cut_short = overall(game.leaderboards[-1])
        await game.another_loop().finish()
    assert set(stored) <= {("closed", 0), ("scored", len(SPREADS))}
    assert ("closed", 0) in stored
    assert cut_short == pytest.approx(overall(game.leaderboards[-1]), rel=1e-12)


async def test_finishing_scores_at_once_what_is_due(tmp_path: Path) -> None:
    async with playing(tmp_path) as game, game.running():
        await game.clock.run_until(START_S + 120)
        await game.round(START_S)
        await game.prices(START_S, START_S + 120)
        await game.loop.finish()
        assert await game.statuses() == [("scored", None)]


async def test_the_windows_after_a_restart_equal_those_that_ran_on(tmp_path: Path) -> None:
    async with playing(tmp_path) as game:
        async with game.running():
            for at_s in range(START_S, START_S + 4 * 3600, 600):
                await game.round(at_s, ("BTC", "ETH")[at_s // 600 % 2])
                await game.prices(at_s, at_s + 600)
                await game.clock.run_until(at_s + 600)
            ran_on = game.leaderboards[-1]
        game.leaderboards.clear()
        await game.another_loop().finish()
        anew = game.leaderboards[0]
        assert await game.statuses() == [("scored", None)] * 24
        snapshots = await game.rows("SELECT DISTINCT created_at_s FROM snapshot ORDER BY 1")
        ranks = await game.rows("SELECT count(*) FROM leaderboard")
    assert ran_on.created_at_s == anew.created_at_s
    for before, after in zip(ran_on.standings, anew.standings, strict=True):
        assert (before.model, before.rank, before.rounds) == (after.model, after.rank, after.rounds)
        for window in Window:
            assert before.overall.of(window) == pytest.approx(after.overall.of(window), rel=1e-9, abs=1e-9)
            assert before.skill.of(window) == pytest.approx(after.skill.of(window), rel=1e-9, abs=1e-9)
    assert [at_s for (at_s,) in snapshots] == list(range(START_S + 900, START_S + 4 * 3600 + 1, 900))
    assert ranks == [(len(snapshots) * len(SPREADS),)]


async def test_kept_hours_equal_those_summed_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[float] = []
    load = scores.load_window_rows

    def load_noted(conn: sqlite3.Connection, version: int, since_s: float, until_s: float) -> WindowRows:
        read.append(since_s)
        return load(conn, version, since_s, until_s)

    monkeypatch.setattr(scores, "load_window_rows", load_noted)

    async def sums_anew() -> dict[tuple[str, int], HourSums]:
        read.clear()
        made = Board(game.config, game.clock, game.db, load_rule("crps"), 1, lambda _: None)
        await made.publish(changed=True)
        sums, calibration = made._sums, made._calibration
        assert sums is not None
        return {
            (setting.key, hour): sums.of_hour(setting, hour, calibration)
            for setting in game.config.game.settings
            for hour in range(START_S // 3600, int(game.clock.now()) // 3600 + 1)
        }

    def assert_same(some: dict[tuple[str, int], HourSums], others: dict[tuple[str, int], HourSums]) -> None:
        for place, one in some.items():
            other = others[place]
            assert one.rounds == other.rounds
            one_order, other_order = np.argsort(one.model_no), np.argsort(other.model_no)
            for left, right in (
                (one.model_no[one_order], other.model_no[other_order]),
                (one.sums[:, 0], other.sums[:, 0]),
                (one.sums[:, 1:][:, one_order], other.sums[:, 1:][:, other_order]),
            ):
                np.testing.assert_allclose(left, right, rtol=1e-12, atol=1e-12)
            briefs = one.briefs[:, one_order], other.briefs[:, other_order]
            np.testing.assert_allclose(*briefs, rtol=1e-6)

    async with playing(tmp_path) as game:
        async with game.running():
            for at_s in range(START_S, START_S + 3 * 3600, 600):
                await game.round(at_s, ("BTC", "ETH")[at_s // 600 % 2])
                await game.prices(at_s, at_s + 600)
                await game.clock.run_until(at_s + 600)
        kept = await sums_anew()
        assert read == [], "every hour with a round has passed"
        old = await game.rows("SELECT * FROM hour_sum")
        await game.round(START_S + 300)  # is scored late, in an hour that was kept
        await game.another_loop().finish()
        assert_same(after := await sums_anew(), await sums_anew())
        assert read == []

        def restore(conn: sqlite3.Connection) -> None:
            conn.execute("DELETE FROM hour_sum")
            conn.executemany(f"INSERT INTO hour_sum VALUES ({', '.join('?' * len(old[0]))})", old)

        await game.db.write(restore)  # as if it had been killed before it kept the hour anew
        assert_same(await sums_anew(), after)
        assert read == [START_S // 3600 * 3600]
        await game.db.write(lambda conn: conn.execute("DELETE FROM hour_sum") and None)
        assert_same(await sums_anew(), after)
        assert len(read) == 3
    assert sum(one.rounds for one in kept.values()) == 18
    assert sum(one.rounds for one in after.values()) == 19
    assert all(one.briefs.any() for one in after.values() if one.rounds)


async def test_only_hours_that_changed_are_kept_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[tuple[str, int, int]] = []

    def save_noted(conn: sqlite3.Connection, version: int, benchmark: int, hours: list[HourSums]) -> None:
        kept.extend((one.setting.key, one.hour - START_S // 3600, one.rounds) for one in hours)
        save_hours(conn, version, benchmark, hours)

    monkeypatch.setattr("condor_lite.board.save_hours", save_noted)
    async with playing(tmp_path) as game:
        async with game.running():
            await game.round(START_S)
            await game.round(START_S + 3600, "ETH")
            await game.prices(START_S, START_S + 7200)
            await game.clock.run_until(START_S + 7200)
            assert sorted(kept) == [("BTC-60-10", 0, 1), ("ETH-60-10", 1, 1)]
            await game.clock.run_until(START_S + 4 * 3600)
            assert len(kept) == 2, "hours without a new round are left alone"
            await game.round(START_S + 300)
            await game.clock.run_until(START_S + 5 * 3600)
        assert kept[2:] == [("BTC-60-10", 0, 2)]
        await game.round(START_S + 3900, "ETH")
        await game.another_loop().finish()
        assert kept[3:] == [("ETH-60-10", 1, 2)]


async def test_a_clock_that_leaps_keeps_no_hour_of_the_week_before(tmp_path: Path) -> None:
    async with playing(tmp_path) as game:
        await game.round(START_S)
        await game.prices(START_S, START_S + 600)
        await game.clock.run_until(START_S + 600)
        await game.another_loop().finish()
        week_later_s = START_S // 3600 * 3600 + 168 * 3600
        clock = SteppedClock(week_later_s - 1)
        leapt = Board(game.config, clock, game.db, load_rule("crps"), 1, lambda _: None)
        await leapt.publish(changed=True)
        await clock.run_until(week_later_s + 2 * 3600)  # a machine that was suspended, between the two
        await leapt.keep()
        kept = await game.rows("SELECT DISTINCT hour_s FROM hour_sum")
    assert not kept


async def test_an_error_in_one_round_delays_no_other_and_ends_as_a_void(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = 0

    def score_round(raw: Any, benchmarks: Any, no_move: float, info: Any) -> Any:
        nonlocal tried
        if raw[game.models["wide"].model_no] is None:
            tried += 1
            raise ArithmeticError("singular")
        return original(raw, benchmarks, no_move, info)

    original = scorer.score_round
    monkeypatch.setattr(scorer, "score_round", score_round)
    async with playing(tmp_path) as game, game.running():
        await game.round(START_S, wide=b"[]")
        await game.round(START_S + 20)
        await game.prices(START_S, START_S + 200)
        await game.clock.run_until(START_S + 100)
        assert await game.statuses() == [("closed", None), ("scored", None)]
        await game.clock.run_until(START_S + 1000)
        assert (await game.statuses())[0] == ("void", "scoring failed: ArithmeticError: singular")
    assert tried == 5


async def test_a_database_that_fails_is_no_rounds_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_round_scores(*arguments: Any) -> bool:
        raise StorageUnavailable("the disk is full")

    async with playing(tmp_path) as game:
        await game.round(START_S)
        await game.prices(START_S, START_S + 120)
        game.clock = SteppedClock(START_S + 120)
        with monkeypatch.context() as patch:
            patch.setattr(scorer.scores, "save_round_scores", save_round_scores)
            with pytest.raises(StorageUnavailable):
                await game.another_loop().run()
        assert await game.statuses() == [("closed", None)]
        await game.another_loop().finish()
        assert await game.statuses() == [("scored", None)]


async def test_an_answer_that_kills_the_process_that_scores_it_is_failed(tmp_path: Path) -> None:
    text = CONFIG + 'rule = "tests.rules:dies"\n'
    async with playing(tmp_path, text) as game:
        no = await game.round(START_S, hopeless=answer(1.0, loc=GUILTY))
        await game.prices(START_S, START_S + 120)
        game.clock = SteppedClock(START_S + 120)
        await game.another_loop().finish()
        failed = await game.rows("SELECT model_no, detail FROM prediction WHERE status = 'FAILED'")
        raw = dict(await game.rows("SELECT model_no, raw FROM score WHERE round_no = ?", no))
        assert await game.rows("SELECT answered, failed, status FROM round") == [(3, 1, "scored")]
    hopeless = game.models["hopeless"].model_no
    assert failed == [(hopeless, "invalid: ended the process that scored it")]
    assert [model_no for model_no, value in raw.items() if value is None] == [hopeless]


async def test_price_changes_are_scored_relative_to_the_price_at_the_start(tmp_path: Path) -> None:
    text = CONFIG + 'target = "price_change"\n'
    too_sharp = 1e-9 * price(START_S) / 2
    async with playing(tmp_path, text) as game:
        await game.round(START_S, sharp=answer(0.02), wide=answer(0.1), hopeless=answer(too_sharp))
        await game.prices(START_S, START_S + 120)
        game.clock = SteppedClock(START_S + 120)
        await game.another_loop().finish()
        (failed,) = await game.rows("SELECT model_no, detail FROM prediction WHERE status = 'FAILED'")
        raw = dict(await game.rows("SELECT model_no, raw FROM score"))
    assert failed[0] == game.models["hopeless"].model_no
    assert failed[1].startswith("invalid: segment 1: ")
    assert 0 < raw[game.models["sharp"].model_no] < raw[game.models["wide"].model_no] < 100


async def test_a_new_benchmark_is_what_skill_is_measured_against(tmp_path: Path) -> None:
    async with playing(tmp_path) as game, game.running():
        await game.round(START_S)
        await game.prices(START_S, START_S + 120)
        await game.clock.run_until(START_S + 120)
        (old,) = {
            one.skill.anchor for one in game.leaderboards[-1].standings if one.model.info.model_name == "wide"
        }
        sharp = replace(game.models["sharp"].info, model_id="aaa", model_name="first", benchmark=True)
        await game.db.write(repositories.upsert_model, sharp, START_S + 120)
        await game.clock.run_until(START_S + 3600)
        skills = {one.model.info.model_name: one.skill.anchor for one in game.leaderboards[-1].standings}
    assert old is not None
    assert skills["wide"] is None  # the new benchmark has answered nothing yet
