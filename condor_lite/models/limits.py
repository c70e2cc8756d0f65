"""What a model's process may use: set by that process itself, before any of the model's code runs."""

from __future__ import annotations

import contextlib
import math
import os
import resource
import time
from dataclasses import dataclass
from pathlib import Path

POLITENESS = 5  # added to the nice value: the game first, then the models, then the scoring pool

_ADDRESS_SPACE = 4  # times the memory: libraries reserve much that they never use
_MODELS_OF_ONE_USER = 64
_OPEN_FILES = 4096


@dataclass(frozen=True, slots=True)
class Limits:
    """`processes` counts threads too. `uid`: become this user and nobody else; None: stay who it is."""

    memory_bytes: int
    disk_bytes: int
    processes: int
    cpu_s: int
    sandboxed: bool
    uid: int | None

    def apply(self) -> None:
        """Hold for this process and all that it starts; none of it can be undone by an ordinary user."""
        with contextlib.suppress(OSError):  # short of memory, the kernel ends models before the game
            Path("/proc/self/oom_score_adj").write_text("1000")
        os.nice(POLITENESS)
        _limit(resource.RLIMIT_CORE, 0)
        # RLIMIT_DATA counts what is private and writable; RLIMIT_AS also bounds shared memory, but counts
        # what is only reserved: dozens of times a small model's memory.
        _limit(resource.RLIMIT_DATA, self.memory_bytes)
        _limit(resource.RLIMIT_AS, _ADDRESS_SPACE * self.memory_bytes)
        _limit(resource.RLIMIT_FSIZE, self.disk_bytes)
        _limit(resource.RLIMIT_NOFILE, _OPEN_FILES)
        # In a sandbox the kernel counts the model alone; outside of it all that the user runs.
        room = self.processes if self.sandboxed else _threads_of_user() + _MODELS_OF_ONE_USER * self.processes
        _limit(resource.RLIMIT_NPROC, room)
        if self.uid is not None:
            os.setgroups([])
            os.setresgid(self.uid, self.uid, self.uid)
            os.setresuid(self.uid, self.uid, self.uid)

    def renew_cpu(self) -> None:
        """From now on the process may use `cpu_s` of a processor; then SIGXCPU ends it."""
        allowed, hard = _allowed(resource.RLIMIT_CPU, math.ceil(time.process_time()) + self.cpu_s)
        resource.setrlimit(resource.RLIMIT_CPU, (allowed, hard))


def _limit(what: int, most: int) -> None:
    allowed, _ = _allowed(what, most)
    resource.setrlimit(what, (allowed, allowed))


def _allowed(what: int, most: int) -> tuple[int, int]:
    """`most`, or the hard limit where that is lower; and the hard limit."""
    _, hard = resource.getrlimit(what)
    return (most if hard == resource.RLIM_INFINITY else min(most, hard)), hard


def _threads_of_user() -> int:
    own, threads = os.getuid(), 0
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if process.stat().st_uid == own:
                threads += sum(1 for _ in (process / "task").iterdir())
    return threads
