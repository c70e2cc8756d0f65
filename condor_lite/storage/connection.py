"""Opening the file: its checks, pragmas and migrations, and SQLite's errors as sentences for the host."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

from condor_lite.errors import StorageError, StorageUnavailable
from condor_lite.storage.schema import MIGRATIONS

BUSY_TIMEOUT_S = 2.0  # whoever writes tries again by itself
APPLICATION_ID = 0x436F6E4C  # "ConL" in the file's header: tells our file from any other program's

_OLDEST_SQLITE = (3, 37, 0)  # STRICT tables
_JOURNAL_SIZE_LIMIT = 64 * 2**20

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


def require_sqlite(version: tuple[int, ...] = sqlite3.sqlite_version_info) -> None:
    """Raises StorageError when SQLite is too old for STRICT tables."""
    if version < _OLDEST_SQLITE:
        have, need = (".".join(map(str, numbers)) for numbers in (version, _OLDEST_SQLITE))
        raise StorageError(
            f"SQLite {have} is too old; install a Python that is linked with SQLite {need} or newer"
        )


def connect_writer(path: Path, busy_timeout_s: float) -> sqlite3.Connection:
    with opening(path):
        connection = sqlite3.connect(path, timeout=busy_timeout_s, isolation_level=None)
        try:
            checked_version(connection, path)  # before anything in the file is changed
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


def connect_reader(path: Path, mode: str, busy_timeout_s: float) -> sqlite3.Connection:
    """`mode` is that of SQLite's URIs: "ro", or "rw" if SQLite may tidy up; neither can change a row."""
    connection = sqlite3.connect(uri(path, mode), uri=True, timeout=busy_timeout_s, isolation_level=None)
    connection.execute("PRAGMA query_only = ON")
    return connection


def migrate(connection: sqlite3.Connection, path: Path, migrations: Sequence[str] = MIGRATIONS) -> None:
    """Bring the file to the newest schema, in one transaction.

    Raises StorageError if that fails; the file is then as it was.
    """
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version == len(migrations):
        return
    steps = "\n".join(migrations[version:])
    try:
        connection.executescript(
            f"BEGIN IMMEDIATE;\n{steps}\n"
            f"PRAGMA application_id = {APPLICATION_ID};\nPRAGMA user_version = {len(migrations)};\nCOMMIT;"
        )
    except sqlite3.Error as error:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise StorageError(
            f"{path} could not be upgraded from schema {version} to {len(migrations)} ({error}); "
            "it is unchanged, and the version that wrote it can still play it"
        ) from error


def checked_version(connection: sqlite3.Connection, path: Path) -> int:
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
def opening(path: Path) -> Iterator[None]:
    """Errors of SQLite while a file is opened, as sentences that say what to do."""
    try:
        yield
    except sqlite3.Error as error:
        if result_code(error) == sqlite3.SQLITE_NOTADB:
            raise StorageError(f"{path} is not a SQLite database; choose another storage.path") from error
        raise explain(error, path) or StorageError(
            f"{path} can't be opened ({error}); choose another storage.path"
        ) from error


def explain(error: Exception, path: Path) -> StorageError | None:
    """What a host can do about an error, or None for one that is a mistake in the code."""
    # Where SQLite runs out of memory, Python's module raises this in place of an error of SQLite's.
    code = sqlite3.SQLITE_NOMEM if isinstance(error, MemoryError) else result_code(error)
    if code in _PASSING:
        return StorageUnavailable(f"{_PASSING[code]}: {path} ({error})")
    undecodable = "Could not decode to UTF-8" in str(error)  # Python's own, without a code
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB) or undecodable:
        return StorageError(f"{path} is damaged ({error}); restore it from a backup")
    return None


def result_code(error: Exception) -> int:
    """SQLite's primary result code; 0 for an error of another kind."""
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF


def uri(path: Path, mode: str) -> str:
    return f"file:{quote(str(path))}?mode={mode}"
