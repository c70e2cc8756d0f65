"""The one file: a single writer, a reader for the loops, and a few limited readers for the report.

All writes go through `Database.write`, which runs a function whole, from `BEGIN IMMEDIATE` to `COMMIT`, on
the one thread that owns the one writing connection. So neither a cancelled task nor a second one can leave or
enter half a transaction.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import aiosqlite
import anyio
import structlog

from condor_lite.errors import QueryTimeout, StorageError
from condor_lite.storage.connection import (
    BUSY_TIMEOUT_S,
    checked_version,
    connect_reader,
    connect_writer,
    explain,
    opening,
    require_sqlite,
    result_code,
    uri,
)
from condor_lite.storage.lock import GameLock
from condor_lite.storage.schema import MIGRATIONS

P = ParamSpec("P")
T = TypeVar("T")

QUERY_LIMIT_S = 2.0
READERS = 3

_STEPS_BETWEEN_CHECKS = 10_000  # of SQLite's virtual machine: about a millisecond

log = structlog.get_logger()


class Readers:
    """A few read-only connections for the report, each query under a time limit."""

    def __init__(self, path: Path, count: int = READERS, limit_s: float = QUERY_LIMIT_S) -> None:
        self._path = path
        self._count = count
        self._limit_s = limit_s
        self._all: list[_Reader] = []
        self._idle: asyncio.Queue[_Reader] = asyncio.Queue()
        self._closed = False

    async def open(self) -> None:
        for _ in range(self._count):
            reader = _Reader(await aiosqlite.connect(uri(self._path, "ro"), uri=True, isolation_level=None))
            self._all.append(reader)
            await reader.connection.execute_fetchall("PRAGMA query_only = ON")
            reader.connection.row_factory = sqlite3.Row
            await reader.connection.set_progress_handler(reader.is_late, _STEPS_BETWEEN_CHECKS)
            self._idle.put_nowait(reader)

    async def fetch(self, sql: str, params: Sequence[object] = ()) -> list[sqlite3.Row]:
        """All rows of one query. The caller bounds their number (`LIMIT`).

        Raises QueryTimeout when it, or the wait for an idle connection, takes longer than the limit.
        """
        try:
            async with asyncio.timeout(self._limit_s):
                reader = await self._idle.get()
        except TimeoutError:
            raise QueryTimeout(self._limit_s) from None
        if self._closed:
            self._idle.put_nowait(reader)
            raise StorageError("the database is closed")
        reader.deadline_s = time.monotonic() + self._limit_s
        query = asyncio.ensure_future(reader.connection.execute_fetchall(sql, params))
        query.add_done_callback(lambda done: self._give_back(reader, done))
        try:
            # Shielded: the connection is idle again only when its thread is, not when its caller has left.
            return list(await asyncio.shield(query))
        except asyncio.CancelledError:
            reader.deadline_s = 0.0
            raise
        except (sqlite3.Error, ValueError) as error:
            if self._closed:
                raise StorageError("the database is closed") from error
            if (reason := _reason(error, self._path, self._limit_s)) is None:
                raise
            raise reason from error

    async def close(self) -> None:
        self._closed = True
        for reader in self._all:
            reader.deadline_s = 0.0
        while self._all:
            await self._all.pop().connection.close()

    def _give_back(self, reader: _Reader, query: asyncio.Future[Any]) -> None:
        if not query.cancelled():
            query.exception()  # looked at: an error that nobody waits for any more need not be reported
        self._idle.put_nowait(reader)


class _Reader:
    """A connection and the time (monotonic) at which its query is given up."""

    def __init__(self, connection: aiosqlite.Connection) -> None:
        self.connection = connection
        self.deadline_s = float("inf")

    def is_late(self) -> bool:
        return time.monotonic() > self.deadline_s


class Database:
    """One game's database: `async with Database(path) as db`, or `await Database.open(path)` and a `close()`.

    Opening creates the folder and the file, takes the game's lock, and migrates an older file; it raises
    StorageError with what to do about it when any of that fails.
    """

    reports: Readers

    def __init__(
        self,
        path: Path | str,
        *,
        busy_timeout_s: float = BUSY_TIMEOUT_S,
        query_limit_s: float = QUERY_LIMIT_S,
    ) -> None:
        self.path = Path(path).resolve()
        self.reports = Readers(self.path, limit_s=query_limit_s)
        self._busy_timeout_s = busy_timeout_s
        self._opened = contextlib.AsyncExitStack()
        self._writer = _Worker("condor-writer", self.path, "BEGIN IMMEDIATE")
        self._reader = _Worker("condor-reader", self.path, "BEGIN")

    @classmethod
    async def open(cls, path: Path | str) -> Self:
        return await cls(path).__aenter__()

    async def __aenter__(self) -> Self:
        try:
            # Shielded: a cancelled start must know what it has opened, and close it.
            with anyio.CancelScope(shield=True):
                # What is opened last is closed first: the readers before the writer, as the connection that
                # closes last takes the -wal with it, if it may write.
                self._opened.callback((await asyncio.to_thread(_prepare, self.path)).release)
                self._opened.push_async_callback(self._writer.close, _close_writer)
                await self._writer.open(lambda: connect_writer(self.path, self._busy_timeout_s))
                self._opened.push_async_callback(self._reader.close, sqlite3.Connection.close)
                await self._reader.open(lambda: connect_reader(self.path, "ro", self._busy_timeout_s))
                self._opened.push_async_callback(self.reports.close)
                await self.reports.open()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def write(
        self, fn: Callable[Concatenate[sqlite3.Connection, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Run `fn(connection, *args)` as one transaction on the writer thread; return once it is on disk.

        If `fn` raises, nothing is written and the error is raised here. If the caller is cancelled, a
        function that has begun is finished and committed, one that has not is dropped. Raises
        StorageUnavailable when another process keeps the database locked for longer than the busy time-out,
        or the disk is full: nothing is written then, and the same call may be made again.
        """
        return await self._writer.run(lambda connection: fn(connection, *args, **kwargs))

    async def read(
        self, fn: Callable[Concatenate[sqlite3.Connection, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Run `fn(connection, *args)` on the reader thread, on one snapshot that holds all earlier writes."""
        return await self._reader.run(lambda connection: fn(connection, *args, **kwargs))

    async def tidy(self) -> bool:
        """Renew what the query planner knows, write the log back into the file, and empty it.

        Other writes fit between these steps, and none waits for a reader: False where one was in the way of
        the last step, which is then to be tried again later.
        """
        await self._writer.run(_optimize)
        await self._writer.run(_write_back, transaction=False)
        return await self._writer.run(_empty_log, transaction=False)

    @property
    def written_for_s(self) -> float | None:
        """How long ago the last write was, None before the first."""
        at_s = self._writer.committed_s
        return None if at_s is None else time.monotonic() - at_s

    async def close(self) -> None:
        """Finish the writes that were asked for and close everything. A second call does nothing."""
        with anyio.CancelScope(shield=True):
            await self._opened.aclose()


class _Worker:
    """A thread, and the connection that only it touches."""

    def __init__(self, name: str, path: Path, begin: str) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._path = path
        self._begin = begin
        self._connection: sqlite3.Connection | None = None
        self._is_open = False
        self.committed_s: float | None = None
        """When the newest transaction ended (monotonic)."""

    async def open(self, connect: Callable[[], sqlite3.Connection]) -> None:
        def job() -> None:
            self._connection = connect()

        await asyncio.wrap_future(self._executor.submit(job))
        self._is_open = True

    async def run(self, fn: Callable[[sqlite3.Connection], T], *, transaction: bool = True) -> T:
        """Run `fn` on the thread, as one transaction."""
        if not self._is_open:
            raise StorageError("the database is closed")
        # A cancelled wrap_future does just what is promised: it drops what has not begun, and nothing else.
        future = self._executor.submit(self._transact if transaction else self._call, fn)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            future.add_done_callback(_report_unseen)
            raise

    async def close(self, close: Callable[[sqlite3.Connection], None]) -> None:
        def job() -> None:
            if self._connection is not None:
                close(self._connection)

        self._is_open = False
        await asyncio.wrap_future(self._executor.submit(job))
        self._executor.shutdown(wait=False)

    def _transact(self, fn: Callable[[sqlite3.Connection], T]) -> T:
        def whole(connection: sqlite3.Connection) -> T:
            connection.execute(self._begin)
            try:
                result = fn(connection)
                connection.execute("COMMIT")
                self.committed_s = time.monotonic()
            except BaseException:
                if connection.in_transaction:  # SQLite itself rolls back when the disk is full
                    connection.execute("ROLLBACK")
                raise
            return result

        return self._call(whole)

    def _call(self, fn: Callable[[sqlite3.Connection], T]) -> T:
        assert self._connection is not None
        try:
            return fn(self._connection)
        except (sqlite3.Error, MemoryError) as error:
            if (reason := explain(error, self._path)) is None:
                raise
            raise reason from error


def _report_unseen(future: Future[T]) -> None:
    """A job whose caller was cancelled may still fail; then nobody else would say so."""
    if not future.cancelled() and (error := future.exception()) is not None:
        log.error("database_job_failed", error=str(error), kind=type(error).__name__)


@contextlib.contextmanager
def reading(path: Path, limit_s: float = math.inf) -> Iterator[sqlite3.Connection]:
    """A read-only connection of its own, for a thread, all of whose queries together may take `limit_s`.

    Raises QueryTimeout, and other StorageErrors: also where the file can't be read in the middle.
    """
    until_s = time.monotonic() + limit_s
    with contextlib.closing(open_read_only(path)) as connection:
        connection.set_progress_handler(lambda: time.monotonic() > until_s, _STEPS_BETWEEN_CHECKS)
        try:
            yield connection
        except sqlite3.Error as error:
            if (reason := _reason(error, path, limit_s)) is None:
                raise
            raise reason from error


def _reason(error: Exception, path: Path, limit_s: float) -> StorageError | None:
    """Why a query failed, None for a mistake in the code."""
    if result_code(error) == sqlite3.SQLITE_INTERRUPT:
        return QueryTimeout(limit_s)
    return explain(error, path)


def open_read_only(path: Path | str) -> sqlite3.Connection:
    """A connection for commands that only read, whether or not the game is running.

    SQLite may tidy up after itself here (with `mode=ro` it would leave a `-wal` and a `-shm` beside the file
    of a game that has ended), but `query_only` refuses every change.
    """
    path = Path(path).resolve()
    require_sqlite()
    if not path.is_file():
        raise StorageError(f"there is no database at {path}; start the game first, or correct storage.path")
    with opening(path):
        connection = connect_reader(path, "rw", BUSY_TIMEOUT_S)
        try:
            version = checked_version(connection, path)
            if version < len(MIGRATIONS):
                raise StorageError(
                    f"{path} is from an older condor_lite (schema {version}); start the game to upgrade it"
                )
        except BaseException:
            connection.close()
            raise
    return connection


def _close_writer(connection: sqlite3.Connection) -> None:
    # With a full disk, or another process reading, the log stays for the next start: nothing is lost.
    with contextlib.suppress(sqlite3.Error):
        _optimize(connection)
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()


def _optimize(connection: sqlite3.Connection) -> None:
    connection.execute("PRAGMA analysis_limit = 400")
    connection.execute("PRAGMA optimize")


def _write_back(connection: sqlite3.Connection) -> None:
    connection.execute("PRAGMA wal_checkpoint(PASSIVE)")


def _empty_log(connection: sqlite3.Connection) -> bool:
    (patience_ms,) = connection.execute("PRAGMA busy_timeout").fetchone()
    connection.execute("PRAGMA busy_timeout = 0")
    try:
        (busy, _, _) = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    finally:
        connection.execute(f"PRAGMA busy_timeout = {patience_ms}")
    return not busy


def _prepare(path: Path) -> GameLock:
    """Check what can be checked before SQLite touches the file, make its folder, and take the lock."""
    require_sqlite()
    if path.is_dir():
        raise StorageError(f"{path} is a folder; storage.path must name a file, such as {path / 'condor.db'}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"can't create the folder {path.parent} ({error.strerror}); choose another storage.path"
        ) from error
    for file in (path.parent, path):
        if file.exists() and not os.access(file, os.W_OK):
            raise StorageError(
                f"{file} is not writable; change its owner or mode, or choose another storage.path"
            )
    return GameLock(path)
