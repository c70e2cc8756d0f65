"""What SIGTERM, SIGINT and SIGHUP do. Imports almost nothing: the handlers come before anything heavy.

The first SIGTERM or SIGINT asks for an orderly end, whatever the program does; a later one leaves at once.
What comes within a second is the same one: a terminal or a manager signals all processes, and a wrapper among
them hands it on.
Models and scoring workers end with their parent. SIGHUP asks for the config to be reread, or for an end where
it comes because the terminal was closed.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

_END_WITHIN_S = 5.0
_SAME_WITHIN_S = 1.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_asked_at_s: float | None = None
_then: Callable[[], None] | None = None
_hung_up = False
_reread: Callable[[], None] | None = None
_had_terminal = False


def install() -> None:
    """Install the handlers; to be called in the main thread."""
    global _had_terminal
    _had_terminal = _has_terminal() and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN  # not by nohup
    for number in _SIGNALS:
        signal.signal(number, _handle)
    signal.signal(signal.SIGHUP, _hang_up)


def restore() -> None:
    """Back to Python's own handlers: for commands that may simply be interrupted."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if asked():
        raise KeyboardInterrupt


def over(code: int) -> None:
    """All is done: the process ends with this code, whatever signal still comes, and soon, whatever hangs.

    The interpreter gives its handlers up before it ends: a signal that came then would end it by itself.
    And it waits for every thread, such as one that reads from a disk of a network that is gone.
    """
    for number in (*_SIGNALS, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    end = threading.Timer(_END_WITHIN_S, os._exit, (code,))
    end.daemon = True
    end.start()


def asked() -> bool:
    """Whether an end was asked for."""
    return _asked_at_s is not None


def when_asked(then: Callable[[], None] | None) -> None:
    """Call `then()` on the first signal, at once where it has come already; from a signal handler."""
    global _then
    _then = then
    if then is not None and asked():
        then()


def when_hung_up(reread: Callable[[], None] | None) -> None:
    """Call `reread()` on every SIGHUP, at once where one has come already; from a signal handler."""
    global _reread
    _reread = reread
    if reread is not None and _hung_up:
        reread()


def _hang_up(number: int, frame: FrameType | None) -> None:
    global _hung_up
    if _had_terminal and not _has_terminal():
        _handle(number, frame)
        return
    _hung_up = True
    if _reread is not None:
        _reread()


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True


def _handle(number: int, frame: FrameType | None) -> None:
    global _asked_at_s
    now_s = time.monotonic()
    if _asked_at_s is not None:
        if now_s > _asked_at_s + _SAME_WITHIN_S:
            os._exit(128 + number)
        return
    _asked_at_s = now_s
    if _then is not None:
        _then()
