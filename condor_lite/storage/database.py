"""The one file: a single writer, a reader for the loops, and a few limited readers for the report.

All writes go through `Database.write`, which runs a function whole, from `BEGIN IMMEDIATE` to `COMMIT`, on
the one thread that owns the one writing connection. So neither a cancelled task nor a second one can leave or
enter half a transaction.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar
from urllib.parse import quote

import aiosqlite
import anyio
import structlog

from condor_lite.errors import QueryTimeout, StorageError, StorageUnavailable
from condor_lite.storage.schema import MIGRATIONS

P = ParamSpec("P")
T = TypeVar("T")

APPLICATION_ID = 0x436F6E4C  # "ConL" in the file's header: tells our file from any other program's
BUSY_TIMEOUT_S = 5.0
QUERY_LIMIT_S = 2.0
READERS = 3

_OLDEST_SQLITE = (3, 37, 0)  # STRICT tables
_JOURNAL_SIZE_LIMIT = 64 * 2**20
_STEPS_BETWEEN_CHECKS = 10_000  # of SQLite's virtual machine: about a millisecond

# Conditions that pass, or that the host can end, without the file being wrong.
_PASSING = {
    sqlite3.SQLITE_BUSY: "another process holds the database",
    sqlite3.SQLITE_LOCKED: "another process holds the database",
    sqlite3.SQLITE_FULL: "the disk is full",
    sqlite3.SQLITE_IOERR: "the disk reports an error",
    sqlite3.SQLITE_READONLY: "the database is not writable",
    sqlite3.SQLITE_CANTOPEN: "the database's files can't be opened",
    sqlite3.SQLITE_NOMEM: "there is no memory left",
}

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
            reader = _Reader(await aiosqlite.connect(_uri(self._path, "ro"), uri=True, isolation_level=None))
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
        except sqlite3.Error as error:
            if _code(error) == sqlite3.SQLITE_INTERRUPT:
                raise QueryTimeout(self._limit_s) from error
            if (told := _told(error, self._path)) is None:
                raise
            raise told from error

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
        self._lock: GameLock | None = None
        self._writer = _Worker("condor-writer")
        self._reader = _Worker("condor-reader")

    @classmethod
    async def open(cls, path: Path | str) -> Self:
        return await cls(path).__aenter__()

    async def __aenter__(self) -> Self:
        try:
            # Shielded: a cancelled start must know what it has opened, and close it.
            with anyio.CancelScope(shield=True):
                self._lock = await asyncio.to_thread(_prepare, self.path)
                await self._writer.open(lambda: _connect_writer(self.path, self._busy_timeout_s))
                await self._reader.open(lambda: _connect_reader(self.path, "ro", self._busy_timeout_s))
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
        return await self._writer.run(lambda connection: self._write(connection, fn, *args, **kwargs))

    async def read(
        self, fn: Callable[Concatenate[sqlite3.Connection, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Run `fn(connection, *args)` on the reader thread, on one snapshot that holds all earlier writes."""
        return await self._reader.run(lambda connection: self._read(connection, fn, *args, **kwargs))

    async def close(self) -> None:
        """Finish the writes that were asked for and close everything. A second call does nothing."""
        with anyio.CancelScope(shield=True):
            # Readers first: the connection that closes last takes the -wal with it, if it may write.
            await self.reports.close()
            await self._reader.close(sqlite3.Connection.close)
            await self._writer.close(_close_writer)
            if self._lock is not None:
                self._lock.release()
                self._lock = None

    def _write(
        self,
        connection: sqlite3.Connection,
        fn: Callable[Concatenate[sqlite3.Connection, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        try:
            connection.execute("BEGIN IMMEDIATE")
            try:
                result = fn(connection, *args, **kwargs)
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:  # SQLite itself rolls back when the disk is full
                    connection.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            if (told := _told(error, self.path)) is None:
                raise
            raise told from error
        return result

    def _read(
        self,
        connection: sqlite3.Connection,
        fn: Callable[Concatenate[sqlite3.Connection, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        try:
            connection.execute("BEGIN")
            try:
                return fn(connection, *args, **kwargs)
            finally:
                connection.execute("ROLLBACK")
        except sqlite3.Error as error:
            if (told := _told(error, self.path)) is None:
                raise
            raise told from error


class _Worker:
    """A thread and the connection that only it touches."""

    def __init__(self, name: str) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._connection: sqlite3.Connection | None = None
        self._closed = False

    async def open(self, connect: Callable[[], sqlite3.Connection]) -> None:
        self._connection = await asyncio.wrap_future(self._executor.submit(connect))

    async def run(self, job: Callable[[sqlite3.Connection], T]) -> T:
        connection = self._connection
        if connection is None or self._closed:
            raise StorageError("the database is closed")
        # wrap_future's cancellation is just what is promised: it drops what has not begun, and nothing else.
        future = self._executor.submit(lambda: job(connection))
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            future.add_done_callback(_report_unseen)
            raise

    async def close(self, close: Callable[[sqlite3.Connection], None]) -> None:
        self._closed = True
        if self._connection is not None:
            connection, self._connection = self._connection, None
            await asyncio.wrap_future(self._executor.submit(lambda: close(connection)))
        self._executor.shutdown(wait=False)


def _report_unseen(future: Future[T]) -> None:
    """A job whose caller was cancelled may still fail; then nobody else would say so."""
    if not future.cancelled() and (error := future.exception()) is not None:
        log.error("database_job_failed", error=str(error), kind=type(error).__name__)


class GameLock:
    """The lock file beside a database: one process runs a game. The kernel frees it when the holder dies.

    The file stays, empty, when the lock is released: were it deleted, a second process could lock the deleted
    file and a third the new one.
    """

    def __init__(self, database: Path) -> None:
        """Take the lock. Raises StorageError, naming the holder, when it is taken."""
        self.path = lock_path(database)
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise StorageError(
                f"can't write {self.path} ({_why(error)}); make it writable, or choose another storage.path"
            ) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _pid(self._file)
            os.close(self._file)
            if isinstance(error, BlockingIOError):
                raise StorageError(
                    f"another condor_lite (pid {holder or 'unknown'}) runs this game; "
                    f"stop it, or choose another storage.path than {database}"
                ) from error
            raise StorageError(
                f"can't lock {self.path} ({_why(error)}); choose a storage.path on a local disk"
            ) from error
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        os.ftruncate(self._file, 0)
        os.close(self._file)


def lock_path(database: Path) -> Path:
    return database.with_name(database.name + ".lock")


def lock_holder(database: Path) -> int | None:
    """The pid of the process that runs this game (0 when it can't be told), None when nobody does."""
    try:
        file = os.open(lock_path(database.resolve()), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _pid(file) or 0
    finally:
        os.close(file)
    return None


def require_sqlite(version: tuple[int, ...] = sqlite3.sqlite_version_info) -> None:
    """Raises StorageError when SQLite is too old for STRICT tables."""
    if version < _OLDEST_SQLITE:
        have, need = (".".join(map(str, numbers)) for numbers in (version, _OLDEST_SQLITE))
        raise StorageError(
            f"SQLite {have} is too old; install a Python that is linked with SQLite {need} or newer"
        )


def open_read_only(path: Path | str) -> sqlite3.Connection:
    """A connection for commands that only read, whether or not the game is running.

    SQLite may tidy up after itself here (with `mode=ro` it would leave a `-wal` and a `-shm` beside the file
    of a game that has ended), but `query_only` refuses every change.
    """
    path = Path(path).resolve()
    require_sqlite()
    if not path.is_file():
        raise StorageError(f"there is no database at {path}; start the game first, or correct storage.path")
    with _opening(path):
        connection = _connect_reader(path, "rw", BUSY_TIMEOUT_S)
        try:
            version = _checked_version(connection, path)
            if version < len(MIGRATIONS):
                raise StorageError(
                    f"{path} is from an older condor_lite (schema {version}); start the game to upgrade it"
                )
        except BaseException:
            connection.close()
            raise
    return connection


def _prepare(path: Path) -> GameLock:
    """Check what can be checked before SQLite touches the file, make its folder, and take the lock."""
    require_sqlite()
    if path.is_dir():
        raise StorageError(f"{path} is a folder; storage.path must name a file, such as {path / 'condor.db'}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"can't create the folder {path.parent} ({_why(error)}); choose another storage.path"
        ) from error
    for file in (path.parent, path):
        if file.exists() and not os.access(file, os.W_OK):
            raise StorageError(
                f"{file} is not writable; change its owner or mode, or choose another storage.path"
            )
    return GameLock(path)


def _connect_writer(path: Path, busy_timeout_s: float) -> sqlite3.Connection:
    with _opening(path):
        connection = sqlite3.connect(path, timeout=busy_timeout_s, isolation_level=None)
        try:
            _checked_version(connection, path)  # before anything in the file is changed
            (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
            if mode != "wal":
                raise StorageError(
                    f"{path} can't use a write-ahead log; choose a storage.path on a local disk"
                )
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute(f"PRAGMA journal_size_limit = {_JOURNAL_SIZE_LIMIT}")
            migrate(connection, path)
        except BaseException:
            connection.close()
            raise
    return connection


def _connect_reader(path: Path, mode: str, busy_timeout_s: float) -> sqlite3.Connection:
    connection = sqlite3.connect(_uri(path, mode), uri=True, timeout=busy_timeout_s, isolation_level=None)
    connection.execute("PRAGMA query_only = ON")
    return connection


def _close_writer(connection: sqlite3.Connection) -> None:
    # With a full disk, or another process reading, the log stays for the next start: nothing is lost.
    with contextlib.suppress(sqlite3.Error):
        connection.execute("PRAGMA optimize")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()


def migrate(connection: sqlite3.Connection, path: Path, migrations: Sequence[str] = MIGRATIONS) -> None:
    """Bring the file to the newest schema, each version in one transaction together with its number.

    Raises StorageError if one fails; the file is then as it was before that one.
    """
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    for number, script in enumerate(migrations[version:], start=version + 1):
        try:
            connection.executescript(
                f"BEGIN IMMEDIATE;\n{script}\n"
                f"PRAGMA application_id = {APPLICATION_ID};\nPRAGMA user_version = {number};\nCOMMIT;"
            )
        except sqlite3.Error as error:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise StorageError(
                f"{path} could not be upgraded to schema {number} ({error}); it is unchanged"
            ) from error


def _checked_version(connection: sqlite3.Connection, path: Path) -> int:
    """The file's schema version; 0 for a new file. Raises StorageError if the file is not for this code."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (owner,) = connection.execute("PRAGMA application_id").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if owner != APPLICATION_ID and (version or owner or tables):
        raise StorageError(f"{path} is the database of another program; choose another storage.path")
    if version > len(MIGRATIONS):
        raise StorageError(
            f"{path} is from a newer condor_lite (schema {version}, this one knows {len(MIGRATIONS)}); "
            "install that version, or choose another storage.path"
        )
    return int(version)


@contextlib.contextmanager
def _opening(path: Path) -> Iterator[None]:
    """Errors of SQLite while a file is opened, as sentences that say what to do."""
    try:
        yield
    except sqlite3.Error as error:
        if _code(error) == sqlite3.SQLITE_NOTADB:
            raise StorageError(f"{path} is not a SQLite database; choose another storage.path") from error
        told = _told(error, path)
        raise told or StorageError(
            f"{path} can't be opened ({error}); choose another storage.path"
        ) from error


def _told(error: sqlite3.Error, path: Path) -> StorageError | None:
    """What a host can do about an error, or None for one that is a mistake in the code."""
    code = _code(error)
    if code in _PASSING:
        return StorageUnavailable(f"{_PASSING[code]}: {path} ({error})")
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return StorageError(f"{path} is damaged ({error}); restore it from a backup")
    return None


def _code(error: sqlite3.Error) -> int:
    """SQLite's primary result code; 0 for an error of the Python module itself."""
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF


def _uri(path: Path, mode: str) -> str:
    return f"file:{quote(str(path))}?mode={mode}"


def _pid(file: int) -> int | None:
    text = os.pread(file, 32, 0).strip()
    return int(text) if text.isdigit() else None


def _why(error: OSError) -> str:
    return error.strerror or str(error)
