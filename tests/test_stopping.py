"""What a signal does once a program's end is certain: nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

ENDING = """
import os, signal, sys, types
from condor_lite import stopping

class Late:
    def __del__(self, kill=os.kill, pid=os.getpid(), number=signal.{name}):
        kill(pid, number)

stopping.install()
sys.modules["late"] = types.ModuleType("late")
sys.modules["late"].late = Late()  # goes when the interpreter has given its handlers up
stopping.over()
sys.exit(1)
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_in_the_last_moment_does_not_change_the_exit_code(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ENDING.format(name=name)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1, done.stderr
