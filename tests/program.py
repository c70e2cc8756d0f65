"""The program as a host starts it: in a folder, with a console and a port of its own."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil

from condor_lite.models.folder import EXAMPLES
from tests.prices import record, wild_walk

COMMAND = (sys.executable, "-m", "condor_lite")
LIMIT_S = 120.0
"""For what takes seconds, on a machine that has much else to do."""

SLOWNESS = ("event_loop_held", "process_was_stopped", "reason='the process was held up'")
"""What a game rightly says of a machine that is too busy for it."""

DEMO = """
[[game.settings]]
assets = ["BTC", "ETH"]
horizon = "5s"
step = "5s"
interval = "10s"

[feed]
tick = "5s"
history = "10m"

[scoring]
interval = "1s"
snapshot_interval = "10s"
workers = 1

[orchestrator]
port = 0
"""

REPLAY = """
[game]
speed = 60
start = "2023-11-14T22:50:00Z"

[[game.settings]]
assets = ["BTC", "USDC"]
horizon = "10m"
step = "1m"
interval = "2m"

[predict]
max_consecutive_timeouts = 1000000

[feed]
source = "replay"
path = "prices"
history = "30m"

[scoring]
interval = "1s"
workers = 1

[orchestrator]
port = 0
"""
RECORDED_MINUTES = 1_500
RECORDED_FROM_S = 1_700_000_400


def replaying(folder: Path) -> None:
    """Make it a game of two models on a day of recorded prices, whose time runs 60 times as fast."""
    (folder / "config.toml").write_text(REPLAY)
    for name in ("constant_normal", "student_t"):
        shutil.copytree(EXAMPLES / name, folder / "models" / name)
    ends_s = range(RECORDED_FROM_S + 60, RECORDED_FROM_S + 60 * (RECORDED_MINUTES + 1), 60)
    for seed, (asset, level, width) in enumerate((("BTC", 30_000, 4e-4), ("USDC", 1, 1e-4))):
        prices = wild_walk(seed, RECORDED_MINUTES, level, width)
        record(folder / "prices", asset, zip(ends_s, prices, strict=True))


def cut_short(folder: Path, last_s: int) -> None:
    """Let the recorded prices end at this time."""
    for path in (folder / "prices").iterdir():
        header, *rows = path.read_text().splitlines(keepends=True)
        path.write_text("".join([header, *(row for row in rows if int(row.split(",")[0]) <= last_s)]))


_PORTS = 2_000  # of each process that runs tests
_given = deque[int](maxlen=100)


def free_port() -> int:
    """Below the range that connections are given theirs from: nobody else takes it before it is bound."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    first = 12_000 + worker % 10 * _PORTS
    while True:
        port = random.randrange(first, first + _PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            if port not in _given:
                _given.append(port)
                return port


class Program:
    """One run of the program in `folder`."""

    def __init__(
        self,
        folder: Path,
        *,
        command: Sequence[str] = COMMAND,
        stdin: int | None = None,
        **environ: str,
    ) -> None:
        self.port = free_port()
        self.console = folder / f"console-{self.port}.log"
        with self.console.open("wb") as console:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                env={**os.environ, "CONDOR_LITE__REPORT__PORT": str(self.port), **environ},
                stdin=stdin,
                stdout=console,
                stderr=subprocess.STDOUT,
            )

    def get(self, path: str) -> Any:
        reply = httpx.get(f"http://127.0.0.1:{self.port}{path}", timeout=LIMIT_S, trust_env=False)
        return reply.raise_for_status().json()

    def until(self, happened: Callable[[], Any]) -> Any:
        """What `happened()` returns once it is something; the program's failures are shown."""
        deadline_s = time.monotonic() + LIMIT_S
        while time.monotonic() < deadline_s:
            assert self.process.poll() is None, self.console.read_text()
            with suppress(httpx.HTTPError):  # not listening or not ready yet
                if result := happened():
                    return result
            time.sleep(0.02)
        raise AssertionError(f"not within {LIMIT_S} s:\n{self.console.read_text()[-4000:]}")

    def until_said(self, *words: str) -> None:
        """Until all of them are on the console."""
        self.until(lambda: all(word in self.console.read_text() for word in words))

    def complaints(self) -> list[str]:
        """The warnings and errors on the console that no machine gives by being slow."""
        lines = self.console.read_text().splitlines()
        return [
            line
            for line in lines
            if re.search("Traceback|warning|error", line) and not any(event in line for event in SLOWNESS)
        ]

    def family(self) -> list[psutil.Process]:
        try:
            this = psutil.Process(self.process.pid)
            return [this, *this.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal; the exit code. Nothing that it started may outlive it."""
        family = self.family()
        self.process.send_signal(number)
        return self.ended(family)

    def ended(self, family: Sequence[psutil.Process] = ()) -> int:
        """Wait for its end and that of its processes; the exit code."""
        code = self.process.wait(LIMIT_S)
        _, alive = psutil.wait_procs(family, timeout=LIMIT_S)
        assert not alive, f"outlived the program: {[process.cmdline() for process in alive]}"
        return code


@contextmanager
def program(folder: Path, **how: Any) -> Iterator[Program]:
    """One run of the program, killed in the end if it still runs."""
    run = Program(folder, **how)
    try:
        yield run
    finally:
        if run.process.poll() is None:
            run.end(signal.SIGKILL)


def verb(folder: Path, *arguments: str) -> tuple[int, str]:
    """One command in `folder`: the exit code and all that was said."""
    done = subprocess.run(
        [*COMMAND, *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_S,
    )
    return done.returncode, done.stdout


def catches(pid: int, signum: int) -> bool:
    """Whether the process has a handler for this signal yet."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (signum - 1) & 1)


def database(folder: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{folder / 'data' / 'condor.db'}?mode=ro", uri=True)
