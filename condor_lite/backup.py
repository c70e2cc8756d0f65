"""The backups that the game makes by itself, in another process, and how many of them stay.

When the next one is due follows from the names of those that are there, so a restart changes nothing. A name
that lies in the future is of a clock that was wrong: it delays no backup, and goes before all others. Runs on
the wall's time, like the disks it guards against.
"""

from __future__ import annotations

import asyncio
import math
import re
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TypeVar

import anyio
import structlog

from condor_lite.aside import Aside
from condor_lite.clock import Clock
from condor_lite.config import BackupConfig
from condor_lite.storage.backup import part_of

log = structlog.get_logger()

_STAMP = "%Y%m%dT%H%M%SZ"
_RETRY_S = 600.0
_LOOK_S = 600.0
_MOST_S = 3600.0  # one that takes longer hangs, and holds the write-ahead log
_PATIENCE_S = 1.0
_LEAVE_WITHIN_S = 4.0
_ANSWER_WITHIN_S = 30.0  # the folder's disk
_LEFT_AFTER_S = 3600.0  # a copy that nobody wrote to for so long is a killed process's


T = TypeVar("T")


class _Failed(Exception):
    """No backup could be made; the message says why."""


@dataclass(frozen=True, slots=True)
class BackupState:
    """`failure`: why the last try failed, None where it didn't; `age_s`: of the newest, None without any."""

    failure: str | None
    age_s: float | None


class Backups:
    """Copies of one database in one folder: `<database>-20261121T080000Z.db`."""

    def __init__(self, config: BackupConfig, database: Path, clock: Clock) -> None:
        self._config = config
        self._database = database
        self._clock = clock
        name = re.escape(database.stem) + r"-(\d{8}T\d{6}Z)\.db"
        self._names = re.compile(name)
        self._left = re.compile(rf"\.{name}\.\d+\.part(-journal)?")
        self._at_the_folder = Aside(_ANSWER_WITHIN_S)
        self._failure: str | None = None
        self._made_s = self._newest_s = -math.inf

    @property
    def state(self) -> BackupState:
        """How it went the last time."""
        age_s = max(self._clock.now() - self._newest_s, 0.0)
        return BackupState(self._failure, age_s if math.isfinite(age_s) else None)

    async def run(self) -> None:
        """Make one whenever it is due, until cancelled."""
        while True:
            with self._clock.hold():
                try:
                    due_s = await self._due_s()
                    if self._clock.now() >= due_s:
                        await self._make()
                        self._made_s = self._clock.now()  # also where the folder can't be listed
                        continue
                    self._failure = None
                except _Failed as failure:
                    retry_in_s = min(_RETRY_S, self._config.every_s)
                    log.error("backup_failed", error=str(failure), retry_in_s=retry_in_s)
                    self._failure = str(failure)
                    due_s = self._clock.now() + retry_in_s
            with anyio.move_on_after(_LOOK_S):  # a clock that was set back would not get there
                await self._clock.sleep_until(due_s)

    async def _due_s(self) -> float:
        found = await self._aside(self._found)
        now_s = self._clock.now()
        made_s = (self._made_s, *found.values())
        self._newest_s = max((at_s for at_s in made_s if at_s <= now_s), default=-math.inf)
        return self._newest_s + self._config.every_s

    def _found(self) -> dict[Path, float]:
        """The backups that are there, and the times in their names."""
        paths = self._files()
        return {path: _time_s(match[1]) for path in paths if (match := self._names.fullmatch(path.name))}

    def _files(self) -> list[Path]:
        try:
            return list(self._config.path.iterdir())
        except OSError:
            return []

    async def _aside(self, work: Callable[[], T]) -> T:
        """Do something in the folder. A network's disk may take its time, or never answer."""
        try:
            return await self._at_the_folder.run(work)
        except TimeoutError:
            raise _Failed(f"{self._config.path} does not answer: is its disk there?") from None

    async def _make(self) -> None:
        """Make one, and forget the oldest."""
        stamp = datetime.fromtimestamp(self._clock.now(), UTC).strftime(_STAMP)
        target = self._config.path / f"{self._database.stem}-{stamp}.db"
        started_s = time.monotonic()
        await self._aside(self._clear)
        await self._copy(target)
        took_s = round(time.monotonic() - started_s, 1)
        size_bytes = (await self._aside(target.stat)).st_size
        forgotten = await self._aside(lambda: self._forget(target))
        log.info("backup_made", path=str(target), size_bytes=size_bytes, took_s=took_s, forgotten=forgotten)
        self._failure = None

    async def _copy(self, target: Path) -> None:
        """Copy in another process. It ends with this task."""
        with anyio.CancelScope(shield=True):  # cancelled just then, it would be nobody's
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "condor_lite.storage.backup", str(self._database), str(target)),
                stdin=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
            )
        try:
            async with asyncio.timeout(_MOST_S):
                _, said = await process.communicate()
        except TimeoutError:
            raise _Failed(f"it took longer than {_MOST_S:.0f} s") from None
        finally:
            if process.returncode is None:
                # On a disk that is gone nothing ends; what is left is deleted before the next copy.
                with anyio.move_on_after(_LEAVE_WITHIN_S, shield=True):
                    await _end(process)
                    part = part_of(target, process.pid)
                    parts = part, part.with_name(f"{part.name}-journal")
                    with suppress(TimeoutError):
                        await self._at_the_folder.run(partial(_delete, *parts))
        if process.returncode:
            why = said.decode(errors="replace").strip()
            raise _Failed(why or f"it ended with code {process.returncode}")

    def _clear(self) -> None:
        """Delete what killed processes left behind, which may be what fills the disk."""
        for path in self._files():
            with suppress(OSError):
                if self._left.fullmatch(path.name) and time.time() - path.stat().st_mtime > _LEFT_AFTER_S:
                    path.unlink()

    def _forget(self, newest: Path) -> int:
        """Delete all but `keep`; how many that were."""
        made_s, now_s = self._found(), self._clock.now()
        made_s.pop(newest, None)
        oldest_first = sorted(made_s, key=lambda path: (made_s[path] <= now_s, made_s[path]))
        old = oldest_first[: max(len(made_s) + 1 - self._config.keep, 0)]
        for path in old:
            path.unlink(missing_ok=True)
        return len(old)


async def _end(process: asyncio.subprocess.Process) -> None:
    """Have it clean up after itself, or else kill it."""
    with suppress(ProcessLookupError):
        process.terminate()
        with suppress(TimeoutError):
            async with asyncio.timeout(_PATIENCE_S):
                await process.wait()
                return
        process.kill()
        await process.wait()


def _delete(*paths: Path) -> None:
    for path in paths:
        with suppress(OSError):
            path.unlink()


def _time_s(stamp: str) -> float:
    try:
        return datetime.strptime(stamp, _STAMP).replace(tzinfo=UTC).timestamp()
    except ValueError:  # somebody else's idea of a time
        return 0.0
