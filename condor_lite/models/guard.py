"""Kills what is left of the models when the game is gone, even when it was killed with no time to tidy up.

The kernel ends each model's own process with its parent (host.py); a process that a model started itself is
not covered by that. So one small process of its own session reads "+<group> <mark>" and "-<group> <mark>"
lines from the game, and when the pipe closes kills the groups that are left, and whatever carries their mark
in its environment. It is run as a script, with few imports.
"""

import os
import signal
import sys
from collections.abc import Iterable

MARK = "CONDOR_LITE_MODEL"  # in the environment of a model and of what it starts

_MOST_PASSES = 5


def remaining(lines: Iterable[str]) -> dict[int, str]:
    """The groups added and not removed again, with their marks, once the lines have ended."""
    groups: dict[int, str] = {}
    for line in lines:
        group, mark = line[1:].split()
        if line.startswith("+"):
            groups[int(group)] = mark
        else:
            groups.pop(int(group), None)
    return groups


def end_marked(marks: Iterable[str]) -> None:
    """Kill the processes that were started with one of the marks, also those that left their group."""
    wanted = {f"{MARK}={mark}".encode() for mark in marks}
    for _ in range(_MOST_PASSES):  # one that starts others all the time is never caught whole
        with os.scandir("/proc") as entries:
            pids = [int(entry.name) for entry in entries if entry.name.isdigit()]
        found = [pid for pid in pids if wanted & _environment(pid)]
        if not found:
            return
        for pid in found:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


def _environment(pid: int) -> set[bytes]:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:  # noqa: PTH123
            return set(file.read().split(b"\0"))
    except OSError:  # ended, or somebody else's
        return set()


def main() -> None:
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    left = remaining(iter(sys.stdin.readline, ""))
    for group in left:
        try:
            os.killpg(group, signal.SIGKILL)
        except ProcessLookupError:
            continue
    if left:
        end_marked(left.values())


if __name__ == "__main__":
    main()
