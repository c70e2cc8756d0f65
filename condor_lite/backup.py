"""The backups that the game makes by itself, in another process, and how many of them stay.

When the next one is due follows from the names of those that are there, so a restart changes nothing. Runs on
the wall's time, like the disks it guards against.
"""

from __future__ import annotations

import asyncio
import re
import sys
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import anyio
import structlog

from condor_lite.clock import Clock
from condor_lite.config import BackupConfig

log = structlog.get_logger()

_STAMP = "%Y%m%dT%H%M%SZ"
_RETRY_S = 600.0
_MOST_S = 3600.0  # one that takes longer hangs, and holds the write-ahead log


class Backups:
    """Copies of one database in one folder: `<database>-20261121T080000Z.db`."""

    def __init__(self, config: BackupConfig, database: Path, clock: Clock) -> None:
        self._config = config
        self._database = database
        self._clock = clock
        self._names = re.compile(re.escape(database.stem) + r"-(\d{8}T\d{6}Z)\.db")

    async def run(self) -> None:
        """Make one whenever it is due, until cancelled."""
        with self._clock.hold():
            due_s = await self._due_s()
        while True:
            await self._clock.sleep_until(due_s)
            with self._clock.hold():
                if await self._make():
                    due_s = await self._due_s()
                else:
                    due_s = self._clock.now() + min(_RETRY_S, self._config.every_s)

    async def _due_s(self) -> float:
        found = await asyncio.to_thread(self._found)  # a network's disk may take its time
        made_s = [_time_s(stamp) for stamp in found.values()]
        # A name from the future, of a clock that was set back since, delays nothing.
        newest_s = min(max(made_s, default=0.0), self._clock.now())
        return newest_s + self._config.every_s

    def _found(self) -> dict[Path, str]:
        """The backups that are there, oldest first, and the times in their names."""
        try:
            paths = sorted(self._config.path.iterdir())
        except OSError:
            return {}
        return {path: match[1] for path in paths if (match := self._names.fullmatch(path.name))}

    async def _make(self) -> bool:
        """Make one, and forget the oldest; whether it could be made."""
        stamp = datetime.fromtimestamp(self._clock.now(), UTC).strftime(_STAMP)
        target = self._config.path / f"{self._database.stem}-{stamp}.db"
        started_s = time.monotonic()
        failure = await self._copy(target)
        if failure is not None:
            log.error("backup_failed", error=failure, retry_in_s=min(_RETRY_S, self._config.every_s))
            return False
        took_s = round(time.monotonic() - started_s, 1)
        size_bytes = (await anyio.Path(target).stat()).st_size
        forgotten = await asyncio.to_thread(self._forget, target)
        log.info("backup_made", path=str(target), size_bytes=size_bytes, took_s=took_s, forgotten=forgotten)
        return True

    async def _copy(self, target: Path) -> str | None:
        """Copy in another process; why that failed, or None. It ends with this task."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "condor_lite.storage.backup", str(self._database), str(target)),
            stdin=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(_MOST_S):
                _, said = await process.communicate()
        except TimeoutError:
            return f"it took longer than {_MOST_S:.0f} s"
        finally:
            if process.returncode is None:
                with anyio.CancelScope(shield=True):
                    await _end(process)
        if process.returncode:
            return said.decode(errors="replace").strip() or f"it ended with code {process.returncode}"
        return None

    def _forget(self, newest: Path) -> int:
        """Delete all but `keep`, and what killed processes left behind; how many backups that were."""
        for left in self._config.path.glob(f".{self._database.stem}-*.db.*.part"):
            left.unlink(missing_ok=True)
        others = [path for path in self._found() if path != newest]
        old = others[: max(len(others) + 1 - self._config.keep, 0)]
        for path in old:
            path.unlink(missing_ok=True)
        return len(old)


async def _end(process: asyncio.subprocess.Process) -> None:
    """Have it clean up after itself, or else kill it."""
    with suppress(ProcessLookupError):
        process.terminate()
        with suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                await process.wait()
                return
        process.kill()
        await process.wait()


def _time_s(stamp: str) -> float:
    try:
        return datetime.strptime(stamp, _STAMP).replace(tzinfo=UTC).timestamp()
    except ValueError:  # somebody else's idea of a time
        return 0.0
