"""The games that are tortured: one on recorded prices with local models, a live one with remote models."""

from __future__ import annotations

import asyncio
import ctypes
import os
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import threading
import time
from collections.abc import Coroutine
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, Self

import httpx
import psutil

import condor_lite
from tests import fleet
from tests.fleet import ModelServer, Orchestrator
from tests.price_server import Fault, PriceServer, Request, price
from tests.prices import record, wild_walk
from tests.program import LIMIT_S, Program, free_port
from tests.torture.books import Asked, Books

START_S = 1_700_002_800  # a full hour
SPEED = 60
MODELS = ("constant_normal", "ewma_normal")
_PIDFD_GETFD = 438  # Linux 5.6, the same number on every architecture

REPLAY = """
[game]
speed = {speed}
start = "2023-11-14T23:00:00Z"

[[game.settings]]
assets = ["BTC", "USDC"]
horizon = "5m"
step = "1m"
interval = "1m"

[[game.settings]]
assets = ["BTC"]
horizon = "20m"
step = "10m"
interval = "10m"
weight = 2.0

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
port = {port}
"""

LIVE = """
[[game.settings]]
assets = ["BTC", "ETH"]
horizon = "6s"
step = "2s"
interval = "2s"

[feed]
source = "each_second:source"
tick = "1s"
history = "10m"
max_staleness = "4s"

[scoring]
interval = "1s"
workers = 1
void_after = "30s"

[orchestrator]
mode = "remote"
port = {port}
"""

EACH_SECOND = """
import os
from email.utils import parsedate_to_datetime

import httpx
from condor_lite.clock import machine_s
from condor_lite.prices.source import Source


class source(Source):
    name = "each_second"
    latency_s = 0.2

    def __init__(self, feed):
        self.client = httpx.AsyncClient(timeout=5)
        self.base, self.aclose = feed.base_url, self.client.aclose

    async def fetch(self, asset, after_s, until_s, step_s):
        reply = await self.client.get(f"{self.base}/own/{asset}?after={after_s}&until={until_s}")
        if os.environ.get("SOURCE_TELLS_ITS_TIME"):
            self.skew_s = parsedate_to_datetime(reply.headers["Date"]).timestamp() - machine_s()
        return [(row["time"], row["price"]) for row in reply.raise_for_status().json()]
"""

SAME_FOR_EVER = """
from condor_lite.tracker import TrackerBase

class Same(TrackerBase):
    def predict(self, asset, horizon, step):
        density = {"type": "builtin", "name": "laplace", "params": {"loc": 0.0, "scale": 3e-4}}
        return [density] * (horizon // step)
"""


class Disk:
    """A small file system for a folder, to be filled up; where none can be mounted, `problem` says why."""

    def __init__(self, image: Path, folder: Path, megabytes: int = 48) -> None:
        self._folder = folder
        self._filler = folder / "filler"
        self.problem: str | None = None
        folder.mkdir()
        with image.open("wb") as file:
            file.truncate(megabytes * 2**20)
        for command in (["mkfs.ext4", "-q", "-m", "0", image], ["mount", "-o", "loop", image, folder]):
            try:
                said = subprocess.run([*map(str, command)], capture_output=True, text=True)
            except FileNotFoundError as error:
                self.problem = str(error)
                break
            if said.returncode:
                self.problem = said.stderr.strip() or f"{command[0]} failed"
                break

    def fill(self) -> None:
        with suppress(OSError), self._filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(2**16))
        with suppress(OSError), self._filler.open("ab", buffering=0) as file:
            while True:
                file.write(bytes(512))

    def free(self) -> None:
        self._filler.unlink(missing_ok=True)

    def close(self) -> None:
        if self.problem is None:
            subprocess.run(["umount", str(self._folder)], check=True)


class World:
    """A game's folder and its running program. `with` it."""

    settings: tuple[Asked, ...] = ()

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.disk = Disk(folder / "disk.img", folder / "data")
        self.books = Books(folder / "data" / "condor.db", self.settings)
        self.environ: dict[str, str] = {}
        self.wall = folder / "wall"
        self.wall.write_bytes(struct.pack("d", 0.0))
        self.orchestrator_port = free_port()
        self.run: Program

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.run.process.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.run.process.pid, signal.SIGCONT)
            self.run.end(signal.SIGKILL)
        subprocess.run(["chattr", "-i", str(self.books.path)], capture_output=True, check=False)
        self.disk.close()

    def start(self, **environ: str) -> None:
        self.run = Program(self.folder, **{**self.environ, **environ})

    # -- what is seen of it --------------------------------------------------------------------------------

    def problems(self) -> str:
        """What /readyz says is wrong; empty when all is well."""
        with suppress(httpx.TransportError):
            reply = httpx.get(f"http://127.0.0.1:{self.run.port}/readyz", timeout=LIMIT_S)
            return "" if reply.status_code == 200 else reply.text
        return "no answer"

    def newest_round_s(self) -> int:
        """Of those that were answered and closed, as far as they are on disk."""
        with suppress(sqlite3.OperationalError), closing(self.books.open()) as db:
            query = (
                "SELECT max(scheduled_at_s) FROM round WHERE status IN ('closed', 'scored') AND answered > 0"
            )
            return int(db.execute(query).fetchone()[0] or 0)
        return 0

    def playing(self, newest_s: int) -> bool:
        """Whether a later round than that was answered, and all is well."""
        return self.newest_round_s() > newest_s and not self.problems()

    def published(self) -> list[dict[str, Any]]:
        until_s = time.monotonic() + LIMIT_S
        while True:
            try:
                rows: list[dict[str, Any]] = self.run.get("/reports/leaderboard")
                return rows
            except (httpx.TransportError, httpx.HTTPStatusError):
                if time.monotonic() > until_s:
                    raise
                time.sleep(0.1)

    def child(self, part: str) -> psutil.Process | None:
        """A process of the game with this in its command line, the newest."""
        found = []
        for process in self.run.family()[1:]:
            with suppress(psutil.Error):
                if part in " ".join(process.cmdline()):
                    found.append((process.create_time(), process))
        return max(found, key=lambda item: item[0])[1] if found else None

    # -- what is done to it --------------------------------------------------------------------------------

    def cut(self) -> bool:
        """Break the game's connection to its orchestrator from outside, as a network may."""
        libc = ctypes.CDLL(None, use_errno=True)
        pidfd = os.pidfd_open(self.run.process.pid)
        try:
            for connection in psutil.Process(self.run.process.pid).net_connections("tcp"):
                if connection.raddr and connection.raddr.port == self.orchestrator_port:
                    got = libc.syscall(_PIDFD_GETFD, pidfd, connection.fd, 0)
                    if got < 0:
                        raise PermissionError(ctypes.get_errno(), "pidfd_getfd")
                    with socket.socket(fileno=got) as theirs:
                        theirs.shutdown(socket.SHUT_RDWR)
                    return True
            return False
        finally:
            os.close(pidfd)

    def set_wall(self, shift_s: float) -> None:
        with self.wall.open("r+b") as file:  # in place: it is mapped
            file.write(struct.pack("d", shift_s))


class Replayed(World):
    """At high speed, with the embedded orchestrator and local models."""

    settings = (
        Asked("BTC", 300, 60, 60, 0),
        Asked("USDC", 300, 60, 60, 0),  # half an interval is no whole tick
        Asked("BTC", 1200, 600, 600, 0, 2.0),
    )

    def __init__(self, folder: Path, minutes: float, recorded: Path | None = None) -> None:
        super().__init__(folder)
        (folder / "config.toml").write_text(REPLAY.format(speed=SPEED, port=self.orchestrator_port))
        for asset, level, width in (("BTC", 30_000, 4e-4), ("USDC", 1, 1e-4)):
            self._write(asset, level, width, int(60 + minutes * SPEED), recorded)
        for name in MODELS:
            source = Path(condor_lite.__file__).parent / "models" / "examples" / name
            shutil.copytree(source, folder / "models" / name, ignore=shutil.ignore_patterns("__pycache__"))
        (folder / "models" / "same").mkdir()
        (folder / "models" / "same" / "main.py").write_text(SAME_FOR_EVER)

    def _write(self, asset: str, level: float, width: float, minutes: int, recorded: Path | None) -> None:
        times = range(START_S - 3600, START_S - 3600 + 60 * minutes, 60)
        if recorded is None:
            prices = wild_walk(len(asset), minutes, level, width)
        else:  # as many minutes of what was recorded, under the times of this game
            with (recorded / f"{asset}.csv").open() as lines:
                next(lines)
                prices = [float(line.split(",")[1]) for line, _ in zip(lines, times, strict=False)]
        record(self.folder / "prices", asset, zip(times, prices, strict=True))


class _EachSecond(PriceServer):
    def answer(self, request: Request) -> tuple[int, Any]:
        symbol = request.path.split("/")[2]
        after_s, until_s = int(request.query["after"]), int(request.query["until"])
        ends = range(max(after_s + 1, until_s - 3600), min(until_s, int(self.now())) + 1)
        return 200, [
            {"time": end_s, "price": price(symbol, end_s) * (1 + end_s % 7 * 1e-5)} for end_s in ends
        ]


class Live(World):
    """On the wall's time, with a price server and remote models, which live in a thread here."""

    settings = (Asked("BTC", 6, 2, 2, 0), Asked("ETH", 6, 2, 2, 1))

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="the world")
        self._thread.start()
        self.prices = _EachSecond()
        self.orchestrator = Orchestrator()
        self.orchestrator.port = self.orchestrator_port
        self._models = [ModelServer(name, fleet.answers_well, remember=False) for name in ("a", "b", "c")]
        self.do(self._open())
        (folder / "config.toml").write_text(LIVE.format(port=self.orchestrator_port))
        (folder / "each_second.py").write_text(EACH_SECOND)
        self.environ = {
            "CONDOR_LITE__FEED__BASE_URL": self.prices.url,
            "PYTHONPATH": str(Path(__file__).parent / "wall"),
            "TORTURE_WALL": str(self.wall),
        }

    def __exit__(self, *_: object) -> None:
        try:
            super().__exit__()
        finally:
            self.do(self._close())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def do(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(LIMIT_S)

    async def _open(self) -> None:
        await self.prices.__aenter__()
        for model in self._models:
            await model.start()
        await self.orchestrator.announce(*self._models)
        await self.orchestrator.start()

    async def _close(self) -> None:
        await self.orchestrator.stop()
        for model in self._models:
            await model.stop()
        await self.prices.__aexit__()

    def no_prices(self) -> None:
        self.prices.outage = Fault(503, b"<html>maintenance</html>")
