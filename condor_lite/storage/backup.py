"""Copies of the file, made beside a running game, and put back where none runs.

A copy is written by `VACUUM INTO`, from one snapshot and without free pages, under a temporary name; it is
checked and on disk before it takes its name, and who may read the database may read it. The snapshot is a
reader's: the game writes on, and what it writes meanwhile stays in the write-ahead log.

`python -m condor_lite.storage.backup DATABASE FILE` makes one in a process of its own, as the game's service
does: neither the interpreter's lock nor its place in the processor's queue is then shared with the game.
"""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from condor_lite.errors import StorageError, StorageUnavailable
from condor_lite.storage.connection import APPLICATION_ID, BUSY_TIMEOUT_S, explain, result_code, uri
from condor_lite.storage.lock import GameLock, lock_holder, lock_path
from condor_lite.storage.schema import MIGRATIONS

Told = Callable[[str, int, int], None]
"""Called with what is being done, how many bytes there are to do (0: unknown), and how many are done."""

MOST_LOG_BYTES = 2**30  # that the write-ahead log may grow by while a copy is made
ROOM_BYTES = 64 * 2**20  # that a copy leaves free on its disk

_STEPS_BETWEEN_LOOKS = 1_000  # of SQLite's virtual machine: some hundred rows
_BESIDE = ("-wal", "-shm", "-journal")
_NICENESS = 10


@dataclass(frozen=True, slots=True)
class Restored:
    """What was put back. `former`: where the database that was there is kept, None where there was none."""

    size_bytes: int
    former: Path | None


def back_up(database: Path, target: Path, *, overwrite: bool = False, tell: Told) -> int:
    """Copy `database`, whether or not its game runs, to `target`; the copy's size in bytes.

    Raises StorageError where the copy can't be made or is not sound; there is no new file then, and what
    stands at `target` is as it was.
    """
    database, target = database.resolve(), target.resolve()
    if not database.is_file():
        raise StorageError(
            f"there is no database at {database}; start the game first, or correct storage.path"
        )
    _refuse(database, target, overwrite)
    with _trouble_with(database), closing(sqlite3.connect(uri(database, "rw"), uri=True)) as connection:
        _check_version(connection, database)
        with _copied(connection, target, Path(f"{database}-wal"), _mode(database), tell) as copy:
            size_bytes = copy.stat().st_size
            _take_name(copy, target)
    return size_bytes


def restore(source: Path, database: Path, *, tell: Told) -> Restored:
    """Put a backup in the place of `database`, which is kept beside it under another name.

    The backup is copied and checked before anything is touched, and takes its place in one step: after a
    crash at any moment either the one or the other is there, whole. Raises StorageError where the game runs,
    another program reads its database, or the backup is not sound; nothing is changed then.
    """
    source, database = source.absolute(), database.resolve()
    if not source.is_file():
        raise StorageError(f"there is no file {source}")
    if database.exists() and source.samefile(database):
        raise StorageError(f"{source} is the game's own database; name a backup")
    with _folder_of(database):
        database.parent.mkdir(parents=True, exist_ok=True)
    lock = GameLock(database)
    try:
        with _trouble_with(source), closing(sqlite3.connect(uri(source, "ro"), uri=True)) as connection:
            _check_version(connection, source)
            mode = _mode(database if database.exists() else source)
            with _copied(connection, database, Path(f"{source}-wal"), mode, tell) as copy:
                size_bytes = copy.stat().st_size
                former = _set_aside(database)
                _take_name(copy, database)
    finally:
        lock.release()
    return Restored(size_bytes, former)


def refuse_own(database: Path, target: Path) -> None:
    """Raise StorageError where `target` is one of the game's own files, or no ordinary file at all."""
    own = {database, lock_path(database), *(Path(f"{database}{suffix}") for suffix in _BESIDE)}
    if target.resolve() in own:
        raise StorageError(f"{target} belongs to the game itself; name another file")
    if target.exists() and not target.is_file():
        raise StorageError(f"{target} is no ordinary file, and can't be replaced by one; name another")


def _refuse(database: Path, target: Path, overwrite: bool) -> None:
    """Raise StorageError where a copy must not take the name `target`."""
    if target.is_dir():
        raise StorageError(f"{target} is a folder; name a file, such as {target / database.name}")
    refuse_own(database, target)
    if os.path.lexists(target) and not overwrite:
        raise StorageError(f"{target} is there already; name another file, or replace it with --overwrite")
    if lock_holder(target) is not None:
        raise StorageError(f"a game runs on {target}; name another file")
    for suffix in ("-wal", "-journal"):  # SQLite would apply it to the copy
        if (left := Path(f"{target}{suffix}")).exists():
            raise StorageError(
                f"{left} is there: a program has {target} open, or left that behind; name another file"
            )


def _check_version(connection: sqlite3.Connection, path: Path) -> None:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (owner,) = connection.execute("PRAGMA application_id").fetchone()
    if owner != APPLICATION_ID or not version:
        raise StorageError(f"{path} is not the database of a condor_lite game")
    if version > len(MIGRATIONS):
        raise StorageError(
            f"{path} is from a newer condor_lite (schema {version}, this one knows {len(MIGRATIONS)}); "
            "use that version"
        )


def part_of(target: Path, pid: int) -> Path:
    """What process `pid` writes before it becomes `target`."""
    return target.with_name(f".{target.name}.{pid}.part")


@contextmanager
def _copied(connection: sqlite3.Connection, target: Path, log: Path, mode: int, tell: Told) -> Iterator[Path]:
    """A sound copy beside `target`, on disk; it is gone at the end unless it was given another name."""
    (size_bytes,) = connection.execute(
        "SELECT (page_count - freelist_count) * page_size "
        "FROM pragma_page_count, pragma_freelist_count, pragma_page_size"
    ).fetchone()
    copy = part_of(target, os.getpid())
    with _folder_of(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        free_bytes = shutil.disk_usage(target.parent).free
        if free_bytes < size_bytes + ROOM_BYTES:
            raise StorageError(
                f"{target.parent} has no room for it: {_mb(size_bytes)} and {_mb(ROOM_BYTES)} that must stay "
                f"free, but only {_mb(free_bytes)} are"
            )
        copy.unlink(missing_ok=True)  # of a process that was killed
        copy.touch(mode=0o600)
        copy.chmod(mode)
    most_bytes = _size(log) + MOST_LOG_BYTES

    def look() -> None:
        tell("copying", size_bytes, min(_size(copy), size_bytes))
        if _size(log) > most_bytes:
            raise StorageUnavailable(
                f"given up: {log} has grown by {_mb(MOST_LOG_BYTES)} meanwhile; try again when the game "
                "writes less, or onto a faster disk"
            )

    try:
        with _watched(connection, look):
            connection.execute("VACUUM INTO ?", (str(copy),))
        _check(copy, tell)
        with _folder_of(target), copy.open("rb") as file:
            os.fsync(file.fileno())
        yield copy
    finally:
        with suppress(OSError):
            copy.unlink()


def _check(copy: Path, tell: Told) -> None:
    with (
        closing(sqlite3.connect(uri(copy, "ro"), uri=True)) as connection,
        _watched(connection, lambda: tell("checking", 0, 0)),
    ):
        (found,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
    if found != "ok":
        raise StorageError(f"the copy is not sound, and so its source is not: {found.strip()}")


@contextmanager
def _watched(connection: sqlite3.Connection, look: Callable[[], None]) -> Iterator[None]:
    """Call `look()` while the connection works; what it raises ends the work."""
    raised: list[BaseException] = []

    def step() -> bool:
        try:
            look()
        except BaseException as error:  # SQLite's own frames are in between: raised again below
            raised.append(error)
        return bool(raised)

    connection.set_progress_handler(step, _STEPS_BETWEEN_LOOKS)
    try:
        yield
    except sqlite3.Error:
        if raised:
            raise raised[0] from None
        raise
    finally:
        connection.set_progress_handler(None, 0)


def _take_name(copy: Path, target: Path) -> None:
    with _folder_of(target):
        copy.replace(target)
        folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _set_aside(database: Path) -> Path | None:
    """Give `database` a second name, and what lies beside it a new one; the second name, if there was any."""
    former = _free_name(database)
    if database.exists():
        _fold(database)
        try:
            former.hardlink_to(database)
        except OSError as error:
            raise StorageError(
                f"{database} can't be kept as {former.name} ({error.strerror}); move it away, then try again"
            ) from error
    # Only of a damaged file, or one that was moved away without it: SQLite would apply it to the new one.
    for suffix in _BESIDE:
        with suppress(FileNotFoundError):
            Path(f"{database}{suffix}").rename(f"{former}{suffix}")
    return former if former.exists() else None


def _free_name(database: Path) -> Path:
    number = 1
    while any(os.path.lexists(f"{database}.replaced-{number}{suffix}") for suffix in ("", *_BESIDE)):
        number += 1
    return database.with_name(f"{database.name}.replaced-{number}")


def _fold(database: Path) -> None:
    """Write the log back into the file and end it, which only the last program that has it open can."""
    try:
        with closing(sqlite3.connect(uri(database, "rw"), uri=True, timeout=BUSY_TIMEOUT_S)) as connection:
            connection.execute("PRAGMA journal_mode = DELETE")
    except sqlite3.Error as error:
        if result_code(error) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise StorageUnavailable(f"another program reads {database}; end it, then try again") from error
        # Damaged, perhaps the reason for this: it is kept as it is, with its log.


@contextmanager
def _trouble_with(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        if result_code(error) == sqlite3.SQLITE_NOTADB:
            raise StorageError(f"{path} is not the database of a condor_lite game") from error
        if result_code(error) == sqlite3.SQLITE_CORRUPT:
            raise StorageError(f"{path} is damaged ({error})") from error
        raise explain(error, path) or StorageError(f"{path} can't be copied ({error})") from error


@contextmanager
def _folder_of(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"{path} can't be written: {error.strerror or error}") from error


def _mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.0f} MB"


def main(argv: list[str]) -> int:
    """Make one copy; the exit code is 0, or 2 with a sentence on stderr."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # leaves no half copy behind
    os.nice(_NICENESS)
    database, target = map(Path, argv)
    try:
        back_up(database, target, tell=lambda what, of, done: None)
    except StorageError as error:
        sys.stderr.write(str(error))
        return 2
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
