"""The database: transactions that stay whole, limits on readers, the lock, and files that can't be used."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import pytest
from structlog.testing import capture_logs

from condor_lite.errors import QueryTimeout, StorageError, StorageUnavailable
from condor_lite.storage import connection as connections
from condor_lite.storage import repositories
from condor_lite.storage.database import READERS, Database, open_read_only
from condor_lite.storage.lock import lock_holder, lock_path
from condor_lite.storage.schema import MIGRATIONS

pytestmark = pytest.mark.anyio

ENDLESS = "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "condor.db"


@pytest.fixture
async def db(path: Path) -> AsyncIterator[Database]:
    async with Database(path) as db:
        yield db


def put(conn: sqlite3.Connection, key: str) -> None:
    conn.execute("INSERT INTO meta (key, value) VALUES (?, 'x')", (key,))


def keys(conn: sqlite3.Connection) -> list[str]:
    return [key for (key,) in conn.execute("SELECT key FROM meta ORDER BY key")]


def files(path: Path) -> list[str]:
    return sorted(file.name for file in path.parent.iterdir())


def spoil(path: Path, start: int, end: int) -> None:
    """Overwrite the bytes from `start` to `end`, made as far as they do not exist."""
    path.parent.mkdir(exist_ok=True)
    with path.open("r+b" if path.exists() else "wb") as file:
        file.seek(start)
        file.write(b"no database" * ((end - start) // 11))


class Gate:
    """Holds a write on its thread until the test lets it go on."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.go_on = threading.Event()

    def write(self, conn: sqlite3.Connection, key: str) -> None:
        put(conn, f"{key}1")
        self.begun.set()
        assert self.go_on.wait(60)
        put(conn, f"{key}2")

    async def reached(self) -> None:
        assert await asyncio.to_thread(self.begun.wait, 60)


# Transactions


async def test_it_makes_its_folder_and_leaves_one_file_behind(path: Path) -> None:
    async with Database(path) as db:
        await db.write(put, "a")
        assert await db.read(keys) == ["a"]
        assert [row["key"] for row in await db.reports.fetch("SELECT key FROM meta")] == ["a"]
    assert files(path) == ["condor.db", "condor.db.lock"]


async def test_the_writer_is_durable_and_holds_the_rules(db: Database) -> None:
    def settings(conn: sqlite3.Connection) -> dict[str, object]:
        names = ("journal_mode", "synchronous", "foreign_keys", "busy_timeout", "user_version")
        return {name: conn.execute(f"PRAGMA {name}").fetchone()[0] for name in names}

    assert await db.write(settings) == {
        "journal_mode": "wal",
        "synchronous": 2,
        "foreign_keys": 1,
        "busy_timeout": 2000,
        "user_version": len(MIGRATIONS),
    }


async def test_a_function_that_raises_leaves_nothing(db: Database) -> None:
    def fail(conn: sqlite3.Connection) -> None:
        put(conn, "half")
        raise LookupError("why")

    with pytest.raises(LookupError, match="why"):
        await db.write(fail)
    assert await db.read(keys) == []


async def test_a_write_that_has_begun_is_finished_when_its_caller_is_cancelled(db: Database) -> None:
    gate = Gate()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(db.write, gate.write, "begun")
        await gate.reached()
        tasks.start_soon(db.write, put, "waiting")
        await asyncio.sleep(0)
        tasks.cancel_scope.cancel()
    gate.go_on.set()
    await db.write(put, "next")
    assert await db.read(keys) == ["begun1", "begun2", "next"]


async def test_cancelled_at_any_moment_a_write_is_there_whole_or_not_at_all(db: Database) -> None:
    def pair(conn: sqlite3.Connection, name: str) -> None:
        put(conn, f"{name}-1")
        put(conn, f"{name}-2")

    tasks = []
    for number in range(200):
        tasks.append(asyncio.ensure_future(db.write(pair, f"{number:03}")))
        await asyncio.sleep(0)
        if number % 3:
            tasks[max(number - number % 5, 0)].cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await db.write(put, "last")
    written = [key for key in await db.read(keys) if key != "last"]
    first, second = ({key[:3] for key in written if key.endswith(end)} for end in ("-1", "-2"))
    assert first == second
    for number, task in enumerate(tasks):
        if not task.cancelled():
            assert f"{number:03}" in first


async def test_a_write_that_fails_after_its_caller_has_left_is_logged(db: Database) -> None:
    gate = Gate()

    def fail(conn: sqlite3.Connection) -> None:
        gate.write(conn, "half")
        raise LookupError("nobody listens")

    with capture_logs() as logs:
        task = asyncio.ensure_future(db.write(fail))
        await gate.reached()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.go_on.set()
        await db.write(put, "next")
    assert [(line["event"], line["error"]) for line in logs] == [("database_job_failed", "nobody listens")]
    assert await db.read(keys) == ["next"]


async def test_closing_finishes_what_was_asked_for(path: Path) -> None:
    async with Database(path) as db:
        writes = [asyncio.ensure_future(db.write(put, f"{number:02}")) for number in range(20)]
        await asyncio.sleep(0)
    await asyncio.gather(*writes)
    async with Database(path) as db:
        assert len(await db.read(keys)) == 20


async def test_a_cancelled_scope_still_opens_and_closes_whole(path: Path) -> None:
    with anyio.CancelScope() as scope:
        scope.cancel()
        async with Database(path) as db:
            await db.write(put, "perhaps")
    assert scope.cancelled_caught
    assert files(path) == ["condor.db", "condor.db.lock"]
    async with Database(path) as db:
        assert set(await db.read(keys)) <= {"perhaps"}


async def test_a_closed_database_says_so(path: Path) -> None:
    db = await Database.open(path)
    await db.close()
    await db.close()
    with pytest.raises(StorageError, match="closed"):
        await db.write(put, "a")
    with pytest.raises(StorageError, match="closed"):
        await db.read(keys)
    with pytest.raises(StorageError, match="closed"):
        await db.reports.fetch("SELECT 1")


async def test_a_read_is_one_snapshot_and_changes_nothing(db: Database) -> None:
    gate = Gate()

    def twice(conn: sqlite3.Connection) -> tuple[list[str], list[str]]:
        before = keys(conn)
        gate.begun.set()
        assert gate.go_on.wait(60)
        return before, keys(conn)

    reading = asyncio.ensure_future(db.read(twice))
    await gate.reached()
    await db.write(put, "meanwhile")
    gate.go_on.set()
    assert await reading == ([], [])
    assert await db.read(keys) == ["meanwhile"]
    with pytest.raises(StorageUnavailable, match="not writable"):
        await db.read(put, "b")


# Conditions that pass


async def test_a_database_locked_by_another_process_can_be_written_later(path: Path) -> None:
    async with Database(path, busy_timeout_s=0.01) as db:
        other = sqlite3.connect(path, isolation_level=None)
        try:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(StorageUnavailable, match="another process holds the database"):
                await db.write(put, "a")
            assert await db.read(keys) == []
            other.execute("ROLLBACK")
        finally:
            other.close()
        await db.write(put, "a")
        assert await db.read(keys) == ["a"]


async def test_a_full_disk_loses_the_transaction_and_nothing_else(db: Database) -> None:
    def limit(conn: sqlite3.Connection, pages: int) -> None:
        conn.execute(f"PRAGMA max_page_count = {pages}")

    def fill(conn: sqlite3.Connection) -> None:
        for number in range(1000):
            put(conn, f"{number:01000}")

    await db.write(put, "a")
    await db.write(limit, 1)
    with pytest.raises(StorageUnavailable, match="the disk is full"):
        await db.write(fill)
    assert await db.read(keys) == ["a"]
    await db.write(limit, 2**30)
    await db.write(fill)
    assert len(await db.read(keys)) == 1001


# Readers of the report


async def test_a_slow_query_is_given_up_and_the_connection_serves_the_next(path: Path) -> None:
    async with Database(path, query_limit_s=0.02) as db:
        for _ in range(READERS + 1):
            with pytest.raises(QueryTimeout, match=r"longer than 0\.02 s"):
                await db.reports.fetch(ENDLESS)
        assert [tuple(row) for row in await db.reports.fetch("SELECT ?, 2", (1,))] == [(1, 2)]


async def test_whoever_waits_too_long_for_a_connection_is_told(path: Path) -> None:
    async with Database(path, query_limit_s=0.05) as db:
        crowd = [asyncio.ensure_future(db.reports.fetch(ENDLESS)) for _ in range(READERS * 3)]
        ends = await asyncio.gather(*crowd, return_exceptions=True)
        assert {type(end) for end in ends} == {QueryTimeout}
        assert len(await db.reports.fetch("SELECT 1")) == 1


async def test_a_query_whose_caller_left_is_given_up(path: Path) -> None:
    async with Database(path, query_limit_s=3600) as db:
        crowd = [asyncio.ensure_future(db.reports.fetch(ENDLESS)) for _ in range(READERS)]
        await asyncio.sleep(0)
        for query in crowd:
            query.cancel()
        await asyncio.gather(*crowd, return_exceptions=True)
        assert len(await db.reports.fetch("SELECT 1")) == 1


async def test_closing_ends_a_query_in_flight(path: Path) -> None:
    async with Database(path, query_limit_s=3600) as db:
        query = asyncio.ensure_future(db.reports.fetch(ENDLESS))
        await asyncio.sleep(0)
    with pytest.raises(StorageError, match="closed"):
        await query


async def test_a_reader_of_the_report_changes_nothing(db: Database) -> None:
    with pytest.raises(StorageError, match="not writable"):
        await db.reports.fetch("DELETE FROM meta")
    with pytest.raises(sqlite3.OperationalError, match="no such table"):
        await db.reports.fetch("SELECT * FROM nowhere")


# One process a game


async def test_a_second_process_is_refused_by_the_first_ones_name(path: Path) -> None:
    assert lock_holder(path) is None
    async with Database(path):
        assert lock_holder(path) == os.getpid()
        with pytest.raises(StorageError, match=rf"another condor_lite \(pid {os.getpid()}\) runs this game"):
            await Database.open(path)
        assert lock_holder(path) == os.getpid()
    assert lock_holder(path) is None
    assert lock_path(path).read_text() == ""


async def test_a_failed_start_gives_the_lock_back(path: Path) -> None:
    spoil(path, 0, 4096)
    with pytest.raises(StorageError, match="is not a SQLite database"):
        await Database.open(path)
    assert lock_holder(path) is None
    assert files(path) == ["condor.db", "condor.db.lock"]


CRASH = """
import asyncio, itertools, sys
from condor_lite.storage.database import Database

def pair(conn, number):
    conn.execute("INSERT INTO meta VALUES (?, 'x')", (f"{number}a",))
    conn.execute("INSERT INTO meta VALUES (?, 'x')", (f"{number}b",))

async def main():
    db = await Database.open(sys.argv[1])
    for number in itertools.count(int(sys.argv[2])):
        await db.write(pair, number)
        print(number, flush=True)

asyncio.run(main())
"""


def test_what_was_acknowledged_survives_a_kill(path: Path) -> None:
    acknowledged: set[int] = set()
    for turn in range(3):
        command = [sys.executable, "-c", CRASH, str(path), str(turn * 10**6)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                acknowledged.add(int(line))
                if len(acknowledged) % 10 == 5 + turn:
                    process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
    conn = open_read_only(path)
    written = keys(conn)
    assert conn.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    conn.close()
    first, second = ({int(key[:-1]) for key in written if key.endswith(end)} for end in "ab")
    assert first == second
    assert acknowledged <= first
    assert len(first - acknowledged) <= 3


# Files that can't be used


async def test_a_folder_is_no_database(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"is a folder; storage\.path must name a file"):
        await Database.open(tmp_path)


async def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"can't create the folder .*file/data .*storage\.path"):
        await Database.open(tmp_path / "file" / "data" / "condor.db")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="is not writable; change its owner or mode"):
        anyio.run(Database.open, tmp_path / "condor.db")


async def test_another_programs_database_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "theirs.db"
    other = sqlite3.connect(path)
    other.execute("CREATE TABLE theirs (a)")
    other.close()
    before = path.read_bytes()
    with pytest.raises(StorageError, match="the database of another program"):
        await Database.open(path)
    assert path.read_bytes() == before


async def test_a_newer_file_is_refused(path: Path) -> None:
    async with Database(path) as db:
        await db.write(lambda conn: conn.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}") and None)
    for attempt in (Database(path).__aenter__, lambda: asyncio.to_thread(open_read_only, path)):
        with pytest.raises(StorageError, match=r"is from a newer condor_lite \(schema \d+"):
            await attempt()


async def test_a_damaged_file_says_restore(path: Path) -> None:
    async with Database(path) as db:
        await db.write(lambda conn: [put(conn, f"{number:0900}") for number in range(200)] and None)
    spoil(path, 40 * 4096, 80 * 4096)
    async with Database(path) as db:
        with pytest.raises(StorageError, match=r"is damaged .* restore it from a backup"):
            await db.read(keys)
        with pytest.raises(StorageError, match=r"is damaged .* restore it from a backup"):
            await db.reports.fetch("SELECT * FROM meta")


def test_an_old_sqlite_is_refused() -> None:
    connections.require_sqlite()
    with pytest.raises(StorageError, match=r"SQLite 3\.36\.9 is too old; .* 3\.37\.0 or newer"):
        connections.require_sqlite((3, 36, 9))


# Migrations


def test_a_migration_and_its_number_are_one_transaction(path: Path) -> None:
    path.parent.mkdir()
    newer = (*MIGRATIONS, "CREATE TABLE more (a INTEGER) STRICT; INSERT INTO more VALUES (1);")
    broken = (*newer, "CREATE TABLE even_more (a INTEGER) STRICT; INSERT INTO more VALUES ('x');")
    conn = connections.connect_writer(path, 1.0)
    try:
        put(conn, "kept")
        connections.migrate(conn, path, newer)
        with pytest.raises(
            StorageError, match=f"could not be upgraded from schema .* to {len(broken)} .*unchanged"
        ):
            connections.migrate(conn, path, broken)
        assert not conn.in_transaction
        tables = [name for (name,) in conn.execute("SELECT name FROM sqlite_master WHERE name LIKE '%more'")]
        assert tables == ["more"]
        assert conn.execute("PRAGMA user_version").fetchone() == (len(newer),)
        assert keys(conn) == ["kept"]
        connections.migrate(conn, path, newer)
    finally:
        conn.close()


# Commands that only read


async def test_commands_read_beside_a_running_game_and_after_it(path: Path) -> None:
    with pytest.raises(StorageError, match="there is no database at"):
        open_read_only(path)
    async with Database(path) as db:
        await db.write(repositories.save_clock, 5.0)
        conn = open_read_only(path)
        assert repositories.load_clock(conn) == 5.0
        await db.write(repositories.save_clock, 6.0)
        assert repositories.load_clock(conn) == 6.0
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            repositories.save_clock(conn, 7.0)
        conn.close()
    conn = open_read_only(path)
    assert repositories.load_clock(conn) == 6.0
    conn.close()
    assert files(path) == ["condor.db", "condor.db.lock"]


async def test_commands_do_not_read_an_older_file(path: Path) -> None:
    async with Database(path) as db:
        await db.write(lambda conn: conn.execute("PRAGMA user_version = 0") and None)
    with pytest.raises(StorageError, match="start the game to upgrade it"):
        open_read_only(path)
