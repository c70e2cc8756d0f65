"""Kills the models' process groups when the game is gone, even when it was killed with no time to tidy up.

The kernel ends each model's own process with its parent (host.py); a process that a model started itself is
not covered by that. So one small process of its own session reads "+<group>" and "-<group>" lines from the
game, and when the pipe closes kills the groups that are left. It is run as a script, with few imports.
"""

import os
import signal
import sys
from collections.abc import Iterable


def remaining(lines: Iterable[str]) -> set[int]:
    """The groups added and not removed again, once the lines have ended."""
    groups: set[int] = set()
    for line in lines:
        group = int(line[1:])
        if line.startswith("+"):
            groups.add(group)
        else:
            groups.discard(group)
    return groups


def main() -> None:
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    for group in remaining(iter(sys.stdin.readline, "")):
        try:
            os.killpg(group, signal.SIGKILL)
        except ProcessLookupError:
            continue


if __name__ == "__main__":
    main()
