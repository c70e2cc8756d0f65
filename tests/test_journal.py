"""What the predict loop wants stored while the database cannot be written: kept, in order, within bounds."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import anyio
import pytest
import structlog

from condor_lite.game.entities import RoundStatus
from condor_lite.storage.database import Database
from condor_lite.storage.journal import Journal
from tests import fleet
from tests.fleet import ModelServer
from tests.stage import Stage, staged, until

pytestmark = pytest.mark.anyio


@contextmanager
def locked(stage: Stage) -> Iterator[None]:
    """Another program holds the database, as a backup or a forgotten shell may."""
    other = sqlite3.connect(stage.db.path, timeout=60, isolation_level=None)
    try:
        other.execute("BEGIN IMMEDIATE")
        yield
    finally:
        other.close()


async def go_on(stage: Stage, seconds: float) -> None:
    """Let so much of the game's time pass, stored or not."""
    await stage.clock.run_until(stage.clock.now() + seconds)


async def test_a_locked_database_delays_storing_but_not_asking(tmp_path: Path) -> None:
    model = ModelServer("a")
    async with staged(tmp_path) as stage:
        await stage.join(model)
        await stage.play(1)
        with locked(stage):
            await go_on(stage, 60)
            assert len(model.predicts) >= 5
            await until(lambda: stage.journal.failing)
            assert "another process holds the database" in (stage.journal.failing or "")
        await stage.journal.flushed()
        assert stage.journal.failing is None
        answered = await stage.rows("SELECT count(*) FROM prediction WHERE status = 'SUCCESS'")
        assert answered == [(len(model.predicts),)]


async def test_a_full_disk_delays_storing_but_not_asking(tmp_path: Path) -> None:
    model = ModelServer("a", fleet.answer_of(16_000))

    def limit(conn: sqlite3.Connection, pages: int) -> None:
        conn.execute(f"PRAGMA max_page_count = {pages}")

    async with staged(tmp_path) as stage:
        await stage.join(model)
        await stage.play(1)
        await stage.db.write(limit, 1)  # SQLite takes the size that the file has
        await go_on(stage, 60)
        assert len(model.predicts) >= 5
        await until(lambda: stage.journal.failing)
        assert "the disk is full" in (stage.journal.failing or "")
        await stage.db.write(limit, 100_000)
        await stage.journal.flushed()
        answered = await stage.rows("SELECT count(*) FROM payload")
        assert answered == [(len(model.predicts),)]


async def test_answers_that_find_no_room_to_wait_void_their_round_and_count_against_nobody(
    tmp_path: Path,
) -> None:
    models = [ModelServer(name, fleet.answer_of(4_000)) for name in ("good", "fine")]
    models.append(ModelServer("bad", fleet.raises))
    with structlog.testing.capture_logs() as logs:
        async with staged(tmp_path, make_journal=partial(Journal, max_bytes=16 * 5_100)) as stage:
            await stage.join(*models)
            await stage.play(5)
            before = {known: known.consecutive_failures for known in stage.predict.participants.values()}
            held = len(stage.closed)
            with locked(stage):
                await go_on(stage, 100)
                assert len(models[0].predicts) > 2 * stage.config.predict.max_consecutive_failures
                assert set(stage.predict.fleet.running) == {"good", "fine", "bad"}
                assert all(known.consecutive_failures <= count + 1 for known, count in before.items())
            await stage.journal.flushed()
            void = stage.closed[held + 1 :]  # for one answer to the first there was room
            assert {closed.status for closed in void} == {RoundStatus.VOID}
            assert all("could not be stored" in (closed.reason or "") for closed in void)
            for _ in range(4):
                await stage.play(5)
            after = stage.closed[held + 1 + len(void) :]
            assert {closed.status for closed in after} == {RoundStatus.CLOSED}
    alarms = [log["event"] for log in logs if log["log_level"] == "error"]
    assert 1 <= alarms.count("journal_full") < len(void), "once for each time that it fills up"
    assert alarms.count("answers_refused") >= len(void)


async def test_a_shortage_of_memory_delays_storing_and_drops_nothing(tmp_path: Path) -> None:
    shortages = 2

    def apply(conn: sqlite3.Connection) -> str:
        nonlocal shortages
        if shortages:
            shortages -= 1
            raise MemoryError
        return "stored"

    async with Database(tmp_path / "condor.db") as db, anyio.create_task_group() as tasks:
        journal = Journal(db)
        tasks.start_soon(journal.run)
        with structlog.testing.capture_logs() as logs:
            assert await journal.write(apply) == "stored"
        tasks.cancel_scope.cancel()
    told = [line["event"] for line in logs]
    assert told == ["database_not_writable", "database_writable_again"]
    assert "there is no memory left" in logs[0]["error"]


async def test_an_entry_that_can_never_be_written_goes_alone(tmp_path: Path) -> None:
    written: list[str] = []
    lost: list[Exception] = []

    def broken(conn: sqlite3.Connection) -> None:
        raise ValueError("no such thing")

    async with Database(tmp_path / "condor.db") as db, anyio.create_task_group() as tasks:
        journal = Journal(db)
        for name in ("first", "second"):
            journal.append(lambda conn, name: name, name, then=written.append)
        journal.append(broken, lost=lost.append)
        journal.append(lambda conn: "last", then=written.append)
        tasks.start_soon(journal.run)
        with structlog.testing.capture_logs() as logs:
            await journal.flushed()
        tasks.cancel_scope.cancel()
    assert written == ["first", "second", "last"]
    assert [str(error) for error in lost] == ["no such thing"]
    assert [line["event"] for line in logs] == ["journal_entry_dropped"]


async def test_a_journal_says_each_time_that_it_fills_up(tmp_path: Path) -> None:
    async with Database(tmp_path / "condor.db") as db, anyio.create_task_group() as tasks:
        journal = Journal(db, max_bytes=16)
        tasks.start_soon(journal.run)
        with structlog.testing.capture_logs() as logs:
            for _ in range(2):
                assert [journal.append(lambda conn: None, size=1) for _ in range(3)] == [True, False, False]
                await journal.flushed()
        tasks.cancel_scope.cancel()
    assert [line["event"] for line in logs] == ["journal_full"] * 2


async def test_the_answers_that_wait_take_bounded_memory(tmp_path: Path) -> None:
    async with Database(tmp_path / "condor.db") as db:
        journal = Journal(db, max_bytes=1_000_000)
        large = [journal.append(lambda conn: None, size=50_000) for _ in range(1_000)]
        assert 0 < sum(large) * 50_000 < 500_000
        small = [journal.append(lambda conn: None, size=1_000) for _ in range(5_000)]
        assert sum(small) > 500, "large ones leave room for small ones"
        assert sum(large) * 50_000 + sum(small) * 1_000 <= 1_000_000
        waiting = journal.waiting
        assert journal.append(lambda conn: None), "what has no size, a round's own entries, is never refused"
        assert journal.waiting == waiting + 1


async def test_large_answers_that_find_no_room_cost_no_other_its_answer(tmp_path: Path) -> None:
    good = [ModelServer(f"good-{number}") for number in range(3)]
    async with staged(tmp_path, make_journal=partial(Journal, max_bytes=16 * 16_000)) as stage:
        await stage.join(ModelServer("large", fleet.answer_of(16_000)), *good)
        await stage.play(60)
        assert {closed.status for closed in stage.closed} == {RoundStatus.CLOSED}
        answers = await stage.answers()
        assert {told for (model_id, _), told in answers.items() if model_id == "large"} == {
            ("FAILED", "the host could not store the answer")
        }
        assert {told for (model_id, _), told in answers.items() if model_id != "large"} == {("SUCCESS", None)}
        assert set(stage.predict.fleet.running) == {"large", *(model.model_id for model in good)}
