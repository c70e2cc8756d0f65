"""A program whose end is certain ends, and with the exit code that is certain, too."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.program import program, replaying

ENDING = """
import os, signal, sys, types
from condor_lite import stopping

class Late:
    def __del__(self, kill=os.kill, pid=os.getpid(), number=signal.{name}):
        kill(pid, number)

stopping.install()
sys.modules["late"] = types.ModuleType("late")
sys.modules["late"].late = Late()  # goes when the interpreter has given its handlers up
stopping.over(2)
sys.exit(1)
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_in_the_last_moment_does_not_change_the_exit_code(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ENDING.format(name=name)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1, done.stderr


def to_its_reader(fifo: Path) -> int | None:
    """A descriptor to write by, None as long as nobody reads."""
    try:
        return os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return None


def test_a_signal_that_a_wrapper_hands_on_as_well_is_one_and_a_later_one_leaves_at_once() -> None:
    script = """
import os, signal, time
from condor_lite import stopping

stopping.install()
asked = []
stopping.when_asked(lambda: asked.append(1))
for _ in range(3):
    os.kill(os.getpid(), signal.SIGTERM)
assert asked == [1]
time.sleep(stopping._SAME_WITHIN_S + 0.1)
os.kill(os.getpid(), signal.SIGTERM)
print("still here")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.SIGTERM, "", "")


def test_a_disk_that_hangs_holds_up_no_orderly_end(tmp_path: Path) -> None:
    replaying(tmp_path)
    with program(tmp_path) as run:
        run.until_said("round_closed")
        config = tmp_path / "config.toml"
        config.unlink()
        os.mkfifo(config)
        run.process.send_signal(signal.SIGHUP)
        with os.fdopen(run.until(lambda: to_its_reader(config)), "wb"):  # and no byte comes
            assert run.end() == 0
    assert "stored=everything" in run.console.read_text()
