"""Scoring rules of a host's own, most of them broken. They do it to answers whose first `loc` is `GUILTY`."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

GUILTY = 13.0


def _rule(harm: Callable[[], Any]) -> Callable[[Any, Any], Any]:
    def rule(densities: Any, x: Any) -> Any:
        if densities.loc[0] == GUILTY and (answer := harm()) is not None:
            return answer
        return np.abs(densities.loc[: densities.n] - x)

    rule.lower_is_better = True  # type: ignore[attr-defined]
    return rule


def _loop() -> None:
    while True:
        try:
            time.sleep(60)
        except Exception:
            continue


def _block() -> None:
    """As good as native code: no signal gets through, and the interpreter's own handlers do not run."""
    signal.pthread_sigmask(signal.SIG_BLOCK, range(1, signal.NSIG))
    _loop()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _die_once() -> None:
    mark = Path(os.environ["RULES_MARK"])
    if not mark.exists():
        mark.touch()
        _die()


def _tell() -> None:
    mark = Path(os.environ["RULES_MARK"])
    mark.with_suffix(".part").write_text("\n".join(sys.modules))
    mark.with_suffix(".part").rename(mark)


def _mark_and_block() -> None:
    Path(os.environ["RULES_MARK"]).touch()
    _block()


distance = _rule(lambda: None)
loops = _rule(_loop)
blocks = _rule(_block)
dies = _rule(_die)
dies_once = _rule(_die_once)
hogs = _rule(lambda: np.ones(2**34))
exits = _rule(sys.exit)
babbles = _rule(lambda: "nonsense")
tells = _rule(_tell)
marks_and_blocks = _rule(_mark_and_block)
