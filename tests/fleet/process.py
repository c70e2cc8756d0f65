"""Many models, and an orchestrator that announces them, in a process of their own.

`async with FleetProcess(models=100, behaviours={"hangs": 2}) as fleet` from a test or benchmark; the process
itself is `python -m tests.fleet_process`.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_ROOT = Path(__file__).resolve().parents[2]
_LINE_BYTES = 64 * 2**20


class FleetProcess:
    """`models` in all, `behaviours` how many of them do what; the rest answer well.

    It ends with this process, whatever becomes of that.
    """

    def __init__(self, models: int, behaviours: Mapping[str, int] | None = None, prefix: str = "") -> None:
        self.entries: list[dict[str, Any]] = []
        self.port = 0
        self._arguments = ["--models", str(models), "--prefix", prefix]
        for name, count in (behaviours or {}).items():
            self._arguments += ["--behaviour", f"{name}:{count}"]
        self._process: asyncio.subprocess.Process | None = None

    @property
    def _running(self) -> asyncio.subprocess.Process:
        assert self._process is not None
        return self._process

    async def __aenter__(self) -> Self:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "tests.fleet_process", *self._arguments),
            cwd=_ROOT,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=_LINE_BYTES,
        )
        started = await self._read()
        self.port, self.entries = started["port"], started["entries"]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        process = self._running
        if process.returncode is None:
            process.kill()
        await process.communicate()  # to the end of its pipes, which else are left to the garbage collector

    async def do(self, command: str, **arguments: Any) -> Any:
        """Have the process do something; see `tests.fleet_process` for what there is."""
        process = self._running
        assert process.stdin is not None
        process.stdin.write(json.dumps({"do": command, **arguments}).encode() + b"\n")
        await process.stdin.drain()
        return await self._read()

    async def _read(self) -> Any:
        process = self._running
        assert process.stdout is not None
        line = await process.stdout.readline()
        if not line:
            raise RuntimeError(f"the fleet's process ended with exit code {await process.wait()}")
        return json.loads(line)

    def freeze(self) -> None:
        os.kill(self._running.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self._running.pid, signal.SIGCONT)

    def kill(self) -> None:
        os.kill(self._running.pid, signal.SIGKILL)
