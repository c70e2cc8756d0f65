"""The lock file beside a database: one process runs a game."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

from condor_lite.errors import StorageError


class GameLock:
    """A lock that is held until `release`, or until the process dies: then the kernel frees it.

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
                f"can't write {self.path} ({error.strerror}); make it writable or choose another storage.path"
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
                f"can't lock {self.path} ({error.strerror}); choose a storage.path on a local disk"
            ) from error
        with contextlib.suppress(OSError):  # a full disk: the lock holds without saying whose it is
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        with contextlib.suppress(OSError):
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


def _pid(file: int) -> int | None:
    text = os.pread(file, 32, 0).strip()
    return int(text) if text.isdigit() else None
