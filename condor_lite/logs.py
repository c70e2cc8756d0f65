"""Structured logs: an event name plus fields, a line each, for a console or as JSON.

Lines are written by a thread of their own: a terminal that is paused or a full pipe must not hold the event
loop. What libraries complain of, asyncio among them, goes the same way.
"""

from __future__ import annotations

import logging
import queue
import re
import sys
import threading
import time
from collections.abc import MutableMapping
from functools import partial
from typing import Any, TextIO

import orjson
import structlog

from condor_lite.config import LogConfig

_MAX_WAITING_LINES = 10_000
_SAME_AGAIN_S = 60.0
_MOST_REMEMBERED = 1000
_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}
_COUNTED = re.compile(r"0x[0-9a-f]+|\d+")  # what is another one each time: tasks, addresses, descriptors


class _Libraries(logging.Handler):
    """What libraries log, from warnings on, as lines like all others: the same once a minute at most."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._again_s: dict[tuple[str, str], float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._tell(record)
        except Exception:  # whoever logs goes on
            self.handleError(record)

    def _tell(self, record: logging.LogRecord) -> None:
        what = record.getMessage()
        key, now_s = (record.name, _COUNTED.sub("#", what)), time.monotonic()
        if now_s < self._again_s.get(key, now_s):
            return
        if len(self._again_s) >= _MOST_REMEMBERED:
            self._again_s.clear()
        self._again_s[key] = now_s + _SAME_AGAIN_S
        level = min(record.levelno // 10 * 10, logging.CRITICAL)
        structlog.get_logger().log(
            level, "library_complains", library=record.name, what=what, exc_info=record.exc_info
        )


class _Writer:
    """A file that never blocks; lines that a stuck reader does not take are counted and dropped."""

    def __init__(self, stream: TextIO) -> None:
        self.libraries = _Libraries()
        self._stream = stream
        # A finalizer may log wherever it runs, also within the putting of another line.
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._dropped = 0
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def write(self, text: str) -> None:
        if self._lines.qsize() < _MAX_WAITING_LINES:
            self._lines.put(text)
        else:
            self._dropped += 1

    def set_up(self, config: LogConfig) -> None:
        """Have structlog write here, at the level and in the format asked for; may be called again."""
        render: list[Any]
        if config.format == "json":
            render = [
                structlog.processors.TimeStamper(fmt="iso", utc=True),
                structlog.processors.format_exc_info,
                structlog.processors.EventRenamer("event"),
                _json,
            ]
        else:
            render = [
                structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False),
                structlog.dev.ConsoleRenderer(
                    colors=self._stream.isatty(),
                    pad_event_to=18,
                    sort_keys=False,
                    exception_formatter=structlog.dev.plain_traceback,
                ),
            ]
        structlog.configure(
            processors=[structlog.processors.add_log_level, partial(_rendered, render)],
            wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[config.level]),
            logger_factory=structlog.WriteLoggerFactory(self),  # type: ignore[arg-type]
            cache_logger_on_first_use=False,
        )

    def flush(self) -> None:
        """The thread flushes after each burst."""

    def close(self, wait_s: float) -> None:
        """Write what waits, for at most `wait_s`."""
        logging.captureWarnings(False)
        logging.getLogger().removeHandler(self.libraries)
        self._lines.put(None)
        self._thread.join(wait_s)

    def _run(self) -> None:
        while (text := self._lines.get()) is not None:
            try:
                self._show(text)
                if self._dropped:
                    dropped, self._dropped = self._dropped, 0
                    self._stream.write(f"{dropped} log lines were dropped: nobody read them\n")
                if self._lines.empty():
                    self._stream.flush()
            except (OSError, ValueError):  # the reader is gone; the game goes on without a log
                continue

    def _show(self, text: str) -> None:
        try:
            self._stream.write(text)
        except UnicodeEncodeError:  # a name that the console can't show
            self._stream.write(text.encode("ascii", "backslashreplace").decode())


def configure(config: LogConfig, stream: TextIO | None = None) -> _Writer:
    """Set structlog up for the process, in place of what was; the writer is to be closed at the end."""
    writer = _Writer(stream if stream is not None else sys.stdout)
    writer.set_up(config)
    root = logging.getLogger()
    for former in [handler for handler in root.handlers if isinstance(handler, _Libraries)]:
        root.removeHandler(former)
    root.addHandler(writer.libraries)
    logging.captureWarnings(True)
    return writer


def _rendered(render: list[Any], logger: Any, name: str, event: MutableMapping[str, Any]) -> str:
    """The line. Nobody must die of logging an error: without descriptors or memory a traceback may fail."""
    what = event.get("event")
    try:
        line: Any = event
        for step in render:
            line = step(logger, name, line)
    except Exception as error:
        return f"{name}: {what} (the rest can't be shown: {error})"
    return str(line)


def _json(logger: Any, name: str, event: MutableMapping[str, Any]) -> str:
    return orjson.dumps(event, default=str, option=orjson.OPT_NON_STR_KEYS).decode()
