"""The predict loop's writes: queued in order, written in groups, kept while the database can't be written.

Asking must never wait for the disk. What the predict loop wants stored is appended here without waiting;
one task writes it, many entries a transaction. A locked, full or failing database delays the journal, not
the loop. Only when the journal is full is the newest answer refused, and that is logged as an error.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import structlog

from condor_lite.errors import StorageError
from condor_lite.storage.database import Database

log = structlog.get_logger()

_GROUP = 128  # entries a transaction: other writers get their turn in between
_LARGEST_SHARE = 16  # an entry takes at most so small a part of the room that is left
_RETRY_FIRST_S = 0.1
_RETRY_MOST_S = 1.0


@dataclass(frozen=True, slots=True)
class _Entry:
    apply: Callable[..., Any]
    arguments: tuple[Any, ...]
    then: Callable[[Any], None] | None
    lost: Callable[[Exception], None] | None
    size: int


class Journal:
    """Writes to `db`, in order. `max_bytes` bounds the answers that may wait, and so the memory they take."""

    def __init__(self, db: Database, max_bytes: int = 512 * 2**20) -> None:
        self._db = db
        self._max_bytes = max_bytes
        self._entries: deque[_Entry] = deque()
        self._waiting_bytes = 0
        self._wake = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()
        self._full = False
        self.failing: str | None = None
        """Why the database can't be written at the moment, None while it can."""

    @property
    def waiting(self) -> int:
        """How many entries are not yet on disk."""
        return len(self._entries)

    def append(
        self,
        apply: Callable[..., Any],
        *arguments: Any,
        then: Callable[[Any], None] | None = None,
        lost: Callable[[Exception], None] | None = None,
        size: int = 0,
    ) -> bool:
        """Queue `apply(connection, *arguments)`; `then(result)` runs on the loop once it is on disk.

        `lost(error)` runs where it raised something that trying again won't cure, and was dropped. `size` is
        about how many bytes it keeps in memory; an entry that has one is refused (False) when the journal is
        full, which is logged once for each time that it fills up. It is full for large entries first, so that
        a few of them leave room for all others.
        """
        if size * _LARGEST_SHARE > self._max_bytes - self._waiting_bytes:
            if not self._full:
                log.error(
                    "journal_full",
                    waiting=len(self._entries),
                    waiting_bytes=self._waiting_bytes,
                    why=self.failing or "it is slow",
                )
            self._full = True
            return False
        self._entries.append(_Entry(apply, arguments, then, lost, size))
        self._waiting_bytes += size
        self._empty.clear()
        self._wake.set()
        return True

    async def write(self, apply: Callable[..., Any], *arguments: Any) -> Any:
        """Queue `apply` behind what waits already, and return its result once it is on disk."""
        done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.append(
            apply,
            *arguments,
            then=lambda result: None if done.done() else done.set_result(result),
            lost=lambda error: None if done.done() else done.set_exception(error),
        )
        return await done

    async def flushed(self) -> None:
        """Return once nothing waits."""
        await self._empty.wait()

    async def run(self) -> None:
        """Write what is appended, until cancelled. Entries stay queued until they are on disk."""
        pause_s = _RETRY_FIRST_S
        while True:
            if not self._entries:
                self._wake.clear()
                self._empty.set()
                await self._wake.wait()
            group = [self._entries[index] for index in range(min(_GROUP, len(self._entries)))]
            try:
                results = await self._write(group)
            except (sqlite3.OperationalError, StorageError, OSError) as error:
                if self.failing is None:
                    log.error("database_not_writable", error=str(error), waiting=len(self._entries))
                self.failing = str(error)
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, _RETRY_MOST_S)
                continue
            if self.failing is not None:
                log.info("database_writable_again", waiting=len(self._entries))
                self.failing, pause_s = None, _RETRY_FIRST_S
            for entry, result in results:
                if entry.then is not None:
                    _call(entry.then, result)
            self._full = False

    async def _write(self, group: list[_Entry]) -> list[tuple[_Entry, Any]]:
        """Write `group` in one transaction, or entry by entry where one of them can't be written at all."""
        try:
            results = await self._db.write(_apply, group)
        except (sqlite3.OperationalError, StorageError, OSError):
            raise
        except Exception as error:
            if len(group) > 1:
                return await self._write(group[:1])
            log.exception("journal_entry_dropped", what=group[0].apply.__name__)
            if group[0].lost is not None:
                _call(group[0].lost, error)
            results = []
        for entry in group:
            self._entries.popleft()
            self._waiting_bytes -= entry.size
        return list(zip(group, results, strict=False))


def _call(callback: Callable[[Any], None], result: Any) -> None:
    try:
        callback(result)
    except Exception:  # one listener's trouble is not the others'
        log.exception("journal_callback_failed")


def _apply(connection: sqlite3.Connection, group: list[_Entry]) -> list[Any]:
    return [entry.apply(connection, *entry.arguments) for entry in group]
