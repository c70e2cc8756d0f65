"""A method for each odd thing that a model may do when it is called."""

import os
import subprocess
import sys
import threading
from pathlib import Path

from condor_lite.tracker import TrackerBase

go_on = threading.Event()


class Odd(TrackerBase):
    def predict(self, asset, horizon, step):
        return 1 / 0

    def echo(self, value):
        return value

    def keywords(self, a, b=2):
        return [a, b]

    def nothing(self):
        return None

    def not_a_number(self):
        return [float("nan"), float("inf")]

    def a_set(self):
        return {1}

    def huge(self):
        return 2**70

    def leaves(self):
        sys.exit(1)

    def hangs(self):
        go_on.wait(30)

    def shouts(self, times):
        for i in range(times):
            print(f"line {i} " + "x" * 100)
        os.write(2, b"and C code too\n")

    def shouts_from_a_child(self, times):
        """The child is there before the log is moved, and writes after it was."""
        code = f"import sys; sys.stdin.read(); print('child ' * {times})"
        child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
        self.shouts(25_000)
        child.communicate()
        self.shouts(1)

    def start_child(self):
        return subprocess.Popen(["sleep", "300"]).pid

    def environment(self):
        return dict(os.environ)

    def modules(self):
        return sorted(sys.modules)

    def folder(self):
        return str(Path.cwd())
