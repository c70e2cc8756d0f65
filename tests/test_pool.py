"""The scoring pool: real processes, and answers that try to break them."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import numpy as np
import psutil
import pytest

from condor_lite import worker
from condor_lite.errors import StartError
from condor_lite.game.density import decode
from condor_lite.game.entities import Setting
from condor_lite.game.outcome import Realised, Series, realise
from condor_lite.game.scoring import Rules, SegmentScores, score
from condor_lite.pool import ScoringPool, _Flight
from condor_lite.storage.compression import compress, decompress
from condor_lite.worker import ScoringItem, ValidationItem
from tests.rules import GUILTY

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def _little_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("condor_lite.pool._GRACE_S", 1.0)


ROOT = Path(__file__).parent.parent
SETTING = Setting("BTC", 60, 10)
START_S = 1_700_002_800


def answer(loc: float = 0.0, scale: float = 1e-4) -> bytes:
    density = {"type": "builtin", "name": "norm", "params": {"loc": loc, "scale": scale}}
    return json.dumps([{"step": 10 * k, "prediction": density} for k in range(1, 7)]).encode()


def outcome() -> Realised:
    ts_s = np.arange(START_S, START_S + 61, 10, dtype=np.int64)
    return realise(Series(ts_s, 100 + np.sin(ts_s)), SETTING, START_S, 10, "log_return")


def items(*locs: float) -> list[ScoringItem]:
    realised = outcome()
    return [ScoringItem(compress(answer(loc)), SETTING, realised) for loc in locs]


def rules(name: str) -> Rules:
    return Rules(f"tests.rules:{name}")


async def test_a_batch_scores_as_each_answer_alone() -> None:
    batch = items(*np.linspace(-1e-3, 1e-3, 700))
    async with ScoringPool(2, Rules(), 5.0) as pool:
        raw, _, reasons = await pool.score(batch)
    assert reasons == {}
    for index in (0, 1, 350, 511, 512, 699):
        densities = decode(decompress(batch[index].body), SETTING, Rules().limits)
        assert raw[index] == pytest.approx(
            score([(densities, batch[index].realised)], Rules())[0].raw, rel=1e-12
        )


async def test_how_many_answers_wait_for_a_worker_is_known() -> None:
    async with ScoringPool(1, Rules(), 5.0) as pool:
        calls = [asyncio.create_task(pool.score(items(*np.zeros(600)))) for _ in range(2)]
        await asyncio.sleep(0)  # both have begun: one call waits for the other, and so do all of its answers
        assert 600 <= pool.waiting < 1200
        await asyncio.gather(*calls)
        assert pool.waiting == 0


async def test_what_is_no_answer_is_told_by_its_place() -> None:
    broken = answer().replace(b"0.0001", b"-1", 1)
    async with ScoringPool(1, Rules(), 5.0) as pool:
        reasons = await pool.validate(
            [ValidationItem(compress(payload), SETTING) for payload in (answer(), broken, b"[")]
        )
        batch = [*items(0.0), ScoringItem(compress(broken), SETTING, outcome()), *items(1e-4)]
        raw, _, scoring_reasons = await pool.score(batch)
        assert await pool.validate([]) == {}
    assert list(reasons) == [1, 2]
    assert reasons[1].startswith("segment 1: ")
    assert scoring_reasons == {1: reasons[1]}
    assert np.isnan(raw).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("harm", "limit_s", "reason"),
    [
        ("loops", 1.0, "takes longer than 1 s to score"),
        ("blocks", 1.0, "takes longer than 1 s to score"),
        ("dies", 60.0, "ended the process that scored it"),
        ("hogs", 60.0, "the scoring rule raised MemoryError: Unable to allocate 128. GiB"),
        ("exits", 60.0, "can't be scored: SystemExit: "),
        (
            "babbles",
            60.0,
            "the scoring rule raised ValueError: could not convert string to float: 'nonsense'",
        ),
    ],
)
async def test_an_answer_that_breaks_its_worker_is_found_and_harms_no_other(
    harm: str, limit_s: float, reason: str
) -> None:
    locs = [0.0] * 20
    locs[7] = GUILTY
    async with ScoringPool(1, rules(harm), limit_s, memory_mb=256) as pool:
        raw, _, reasons = await pool.score(items(*locs))
        again, *_ = await pool.score(items(0.0))
    assert list(reasons) == [7]
    assert reasons[7].startswith(reason)
    assert np.isnan(raw).nonzero()[0].tolist() == [7]
    assert again == raw[0]


async def test_every_one_of_several_killers_is_found() -> None:
    locs = [GUILTY if index in (0, 7, 16) else 0.0 for index in range(20)]
    async with ScoringPool(2, rules("dies"), 60.0) as pool:
        raw, _, reasons = await pool.score(items(*locs))
    assert sorted(reasons) == np.isnan(raw).nonzero()[0].tolist() == [0, 7, 16]


async def test_a_worker_that_an_accident_kills_costs_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RULES_MARK", str(tmp_path / "mark"))
    locs = [0.0] * 20
    locs[7] = GUILTY
    async with ScoringPool(2, rules("dies_once"), 60.0) as pool:
        raw, _, reasons = await pool.score(items(*locs))
    assert (tmp_path / "mark").exists()
    assert reasons == {}
    assert np.isfinite(raw).all()


async def test_while_a_batch_is_scored_the_next_lies_ready_and_is_not_blamed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("condor_lite.pool._BATCH_ITEMS", 4)
    batch = items(GUILTY, *np.zeros(11))
    async with ScoringPool(1, rules("blocks"), 60.0) as pool:
        stuck = asyncio.create_task(pool.score(batch))
        with anyio.fail_after(120):
            while pool.waiting != 4:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.01)
        stuck.cancel()
        await asyncio.gather(stuck, return_exceptions=True)
    async with ScoringPool(1, rules("blocks"), 1.0) as pool:
        raw, _, reasons = await pool.score(batch)
    assert reasons == {0: "takes longer than 1 s to score"}
    assert np.isfinite(raw[1:]).all()


@pytest.mark.parametrize(("workers", "stuck"), [(1, [None, None]), (2, [None, worker.UNTOUCHED])])
async def test_only_a_batch_that_a_worker_is_free_for_can_be_late(
    workers: int, stuck: list[float | None]
) -> None:
    now_s, loop = time.monotonic(), asyncio.get_running_loop()
    notes = [(3.0, now_s), (worker.UNTOUCHED, 0.0)]
    pool = ScoringPool(workers, Rules(), 5.0)
    pool._crew = SimpleNamespace(note=notes.__getitem__)  # type: ignore[assignment]
    flights = [_Flight([0], False, slot, now_s - 1000, Future(), loop.create_future()) for slot in (0, 1)]
    flights[0].landed.set_result(None)
    await pool._landing(flights)
    assert [flight.stuck_on for flight in flights] == stuck


async def test_a_call_that_is_cancelled_leaves_the_pool_usable() -> None:
    async with ScoringPool(1, rules("loops"), 60.0) as pool:
        stuck = asyncio.create_task(pool.score(items(GUILTY)))
        await asyncio.sleep(0)
        stuck.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stuck
        raw, _, reasons = await pool.score(items(0.0))
    assert reasons == {}
    assert np.isfinite(raw).all()


async def test_leaving_ends_workers_that_are_stuck() -> None:
    async with ScoringPool(1, rules("blocks"), 60.0) as pool:
        (worker,) = multiprocessing.active_children()
        with anyio.move_on_after(0):
            await pool.score(items(GUILTY))
    assert not worker.is_alive()


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("import no_such_module", "No module named 'no_such_module'"),
        ("raise SystemExit('not today')", "not today"),
        ("import os; os._exit(3)", "the scoring process ended while it started"),
        ("def rule(densities, x): return x", "set rule.lower_is_better"),
    ],
)
async def test_a_rule_that_can_not_be_used_is_told_at_the_start(
    source: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_rule.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(StartError, match=told):
        async with ScoringPool(1, Rules("broken_rule:rule"), 2.0):
            pytest.fail("it started")
    assert multiprocessing.active_children() == []


async def test_an_evaluation_in_common_that_fails_is_repeated_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def score_one(pairs: list[Any], rules: Rules) -> list[SegmentScores]:
        if len(pairs) > 1 or pairs[0][0].loc[0] == GUILTY:
            raise ArithmeticError("singular")
        return score(pairs, rules)

    monkeypatch.setattr(worker, "score", score_one)
    lone = worker.Worker(multiprocessing.RawArray("d", worker.NOTE_WIDTH), Rules(), 2.0, 256)
    raw, _, reasons = lone.score(0, items(0.0, GUILTY, 1.0), careful=False)
    assert reasons == {1: "can't be scored: ArithmeticError: singular"}
    assert np.isnan(raw).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("rule", "stops", "over"),
    [("crps", 5, False), ("tests.rules:distance", 1, False), ("tests.rules:distance", 5, True)],
)
def test_time_that_others_take_of_the_processor_costs_an_own_rule_one_alarm_and_others_nothing(
    rule: str, stops: int, over: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def score_late(pairs: list[Any], rules: Rules) -> list[SegmentScores]:
        for _ in range(stops):
            lone.ring()  # none of the processor's time has passed
        return score(pairs, rules)

    monkeypatch.setattr(worker, "score", score_late)
    notes = multiprocessing.RawArray("d", worker.NOTE_WIDTH)
    lone = worker.Worker(notes, Rules(rule), 60.0, 256)
    raw, _, reasons = lone.score(0, items(0.0), careful=True)
    assert reasons == ({0: "takes longer than 60 s to score"} if over else {})
    assert np.isnan(raw).tolist() == [over]


# As in `condor_lite.__main__`: workers import the main module, too, so it imports nothing by itself.
PROGRAM = """
import os, sys

def main():
    import asyncio
    asyncio.run(play())

async def play():
    import asyncio, multiprocessing
    from condor_lite.game.scoring import Rules
    from condor_lite.pool import ScoringPool
    from tests.rules import GUILTY
    from tests.test_pool import items

    async with ScoringPool(1, Rules("tests.rules:" + sys.argv[1]), 60.0) as pool:
        scoring = asyncio.create_task(pool.score(items(GUILTY)))
        while not os.path.exists(os.environ["RULES_MARK"]):
            await asyncio.sleep(0.01)
        print(*[child.pid for child in multiprocessing.active_children()], flush=True)
        await scoring

if __name__ == "__main__":
    main()
"""


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Starts a program of its own with a pool that scores one guilty answer."""
    started = []

    def start(harm: str) -> subprocess.Popen[str]:
        script = tmp_path / "program.py"
        script.write_text(PROGRAM)
        environ = os.environ | {"RULES_MARK": str(tmp_path / "mark"), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(script), harm]
        started.append(subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


async def test_workers_end_with_a_parent_that_is_killed(
    program: Callable[[str], subprocess.Popen[str]],
) -> None:
    process = program("marks_and_blocks")
    assert process.stdout is not None
    line = await asyncio.to_thread(process.stdout.readline)
    workers = [psutil.Process(int(pid)) for pid in line.split()]
    assert workers
    process.kill()
    _, alive = await asyncio.to_thread(psutil.wait_procs, workers, timeout=60)
    assert alive == []


async def test_workers_import_no_loop_no_database_and_no_server(
    program: Callable[[str], subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = program("tells")
    assert await asyncio.to_thread(process.wait) == 0
    modules = set((tmp_path / "mark").read_text().split())
    assert "condor_lite.game.scoring" in modules
    heavy = {"asyncio", "anyio", "sqlite3", "structlog", "grpc", "starlette", "scipy.stats", "scoringrules"}
    assert modules & heavy == set()


def test_what_is_evaluated_together_may_take_longer_than_one_answer_but_not_for_ever() -> None:
    limits = [worker.batch_limit_s(2.0, answers) for answers in (1, 8, 40, 512)]
    assert limits == sorted(limits)
    assert limits[1] == 4.0
    assert limits[2:] == [10.0, 10.0]
