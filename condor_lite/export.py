"""`condor-lite export`: what is stored, as files that other programs and `feed.source = "replay"` read.

Works beside a running game: it reads one snapshot of the file, a row at a time.
"""

from __future__ import annotations

import math
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TextIO

from condor_lite.config_values import WrongValueError, read_when
from condor_lite.errors import CondorError
from condor_lite.storage import exports, repositories

_CHUNK = 10_000  # rows between two looks at the progress
_EVERY_S = 0.5

Told = Callable[[str, int, int], None]
"""Called with what is being written, how many rows it will have, and how many it has."""


def nobody(what: str, of: int, rows: int) -> None:
    """For exports that nobody watches."""


class ExportError(CondorError):
    """What was asked for can't be exported; the message says why, and nothing was left behind."""


@dataclass(frozen=True, slots=True)
class Written:
    """One finished file. `changes`: how often the prices go from one source over to another."""

    path: Path
    rows: int
    first_s: int
    last_s: int
    changes: int


def prices(
    conn: sqlite3.Connection,
    folder: Path,
    since_s: float,
    until_s: float,
    *,
    overwrite: bool = False,
    tell: Told = nobody,
) -> list[Written]:
    """Write `<ASSET>.csv` with `timestamp,close` for each asset's prices with `since_s <= ts <= until_s`.

    Times are epoch seconds; a price has all its digits, so that a replay is exact. All files take their names
    at the end, when the last one is whole: whoever reads meanwhile finds the old ones, or none. Raises
    ExportError where there are no prices, where a file is there already and `overwrite` is not asked for, and
    where it can't be written.
    """
    conn.execute("BEGIN")  # one snapshot for all assets
    try:
        counts = exports.price_counts(conn, since_s, until_s)
        if not counts:
            raise ExportError("no prices are stored in that range")
        paths = {asset: folder / f"{asset}.csv" for asset in counts}
        _refuse_existing(paths.values(), overwrite)
        with ExitStack() as files:
            written = []
            for asset, path in paths.items():
                rows = exports.prices(conn, asset, since_s, until_s)
                told = partial(tell, asset, counts[asset])
                written.append(_write_prices(files.enter_context(_replacing(path)), path, rows, told))
            return written
    finally:
        conn.execute("ROLLBACK")


def read_range(conn: sqlite3.Connection, since: str | None, until: str | None) -> tuple[float, float]:
    """`--since` and `--until` in epoch seconds. Raises ExportError."""
    now_s = repositories.load_clock(conn) or 0.0
    ends = [-math.inf, math.inf]
    for place, (option, text) in enumerate((("--since", since), ("--until", until))):
        if text is not None:
            try:
                ends[place] = read_when(text, now_s)
            except WrongValueError as error:
                raise ExportError(f"{option} {text[:40]!r}: {error}") from None
    since_s, until_s = ends
    if since_s > until_s:
        raise ExportError(f"--since {since} is after --until {until}")
    return since_s, until_s


def lines(written: Iterable[Written]) -> Iterator[str]:
    """What was written, and what a replay of it can't show, for the console."""
    for one in written:
        yield f"wrote {one.path}: {one.rows} prices, {_time(one.first_s)} to {_time(one.last_s)} UTC"
        if one.changes:
            yield (
                f"  its source changes {one.changes} times; a replay is of one source, and scores the moves "
                "between two as well"
            )


def _time(ts_s: int) -> str:
    return datetime.fromtimestamp(ts_s, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _write_prices(
    file: TextIO, path: Path, rows: Iterator[tuple[int, float, str]], tell: Callable[[int], None]
) -> Written:
    file.write("timestamp,close\n")
    count = changes = first_s = last_s = 0
    source: str | None = None
    while chunk := list(islice(rows, _CHUNK)):
        first_s = first_s or chunk[0][0]
        last_s = chunk[-1][0]
        for _, _, its_source in chunk:
            changes += source is not None and its_source != source
            source = its_source
        file.write("".join(f"{ts_s},{price!r}\n" for ts_s, price, _ in chunk))
        count += len(chunk)
        tell(count)
    return Written(path, count, first_s, last_s, changes)


def _refuse_existing(paths: Iterable[Path], overwrite: bool) -> None:
    if there := [str(path) for path in paths if path.exists() and not overwrite]:
        raise ExportError(
            f"there already: {', '.join(there)}; name another place, or replace them with --overwrite"
        )


@contextmanager
def _replacing(path: Path) -> Iterator[TextIO]:
    """A file under a temporary name that becomes `path` in the end, or vanishes where anything fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8", newline="") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise ExportError(f"{path} can't be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


class Console:
    """Shows on a terminal how far it is; anything else gets only the result. `of` = 0: nobody knows."""

    def __init__(self, out: TextIO, unit: str = "rows", size: int = 1) -> None:
        self._out = out
        self._unit = unit
        self._size = size
        self._next_s = time.monotonic() + _EVERY_S
        self._width = 0

    def show(self, what: str, of: int, done: int) -> None:
        if self._out.isatty() and time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + _EVERY_S
            done, of = done // self._size, of // self._size
            text = f"{what}  {done / of:5.1%}  {done} of {of} {self._unit}" if of else f"{what} ..."
            self._out.write("\r" + text.ljust(self._width))
            self._out.flush()
            self._width = len(text)

    def end(self) -> None:
        if self._width:
            self._out.write("\r" + " " * self._width + "\r")
            self._out.flush()
