"""What SIGTERM and SIGINT do. Imports almost nothing: the handlers stand before anything heavy is imported.

The first signal asks for an orderly end, whatever the program is doing; the second leaves at once. Models and
scoring workers end with their parent.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_asked = 0
_then: Callable[[], None] | None = None


def install() -> None:
    """Install the handlers; to be called in the main thread."""
    for number in _SIGNALS:
        signal.signal(number, _handle)


def restore() -> None:
    """Back to Python's own handlers: for commands that may simply be interrupted."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if _asked:
        raise KeyboardInterrupt


def asked() -> bool:
    """Whether an end was asked for."""
    return _asked > 0


def when_asked(then: Callable[[], None] | None) -> None:
    """Call `then()` on the first signal, at once where it has come already; from a signal handler."""
    global _then
    _then = then
    if then is not None and _asked:
        then()


def _handle(number: int, frame: FrameType | None) -> None:
    global _asked
    _asked += 1
    if _asked > 1:
        os._exit(128 + number)
    if _then is not None:
        _then()
