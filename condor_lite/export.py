"""`condor-lite export`: what is stored, as files that other programs and `feed.source = "replay"` read.

Works beside a running game: it reads some thousand rows at a time, those of one moment, and nothing that is
newer than its beginning. In between nothing is held, so that the write-ahead log does not grow.
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
from pathlib import Path
from typing import BinaryIO, TextIO

from condor_lite.config_values import WrongValueError, read_when
from condor_lite.formats import FORMATS, ExportError
from condor_lite.storage import exports, repositories
from condor_lite.storage.backup import refuse_own
from condor_lite.storage.exports import Row, Table, Wanted

_GROUP_CHARACTERS = 16 * 2**20
_EVERY_S = 0.5

Told = Callable[[str, int, int], None]
"""Called with what is being written, how many rows it will have, and how many it has."""


KINDS: dict[str, Callable[[sqlite3.Connection, Wanted], list[Table]]] = {
    "prices": exports.prices,
    "leaderboard": exports.leaderboard,
    "scores": exports.scores,
    "predictions": exports.predictions,
}
_NAMES = {kind: kind for kind in KINDS} | {"leaderboard": "standings"}


def nobody(what: str, of: int, rows: int) -> None:
    """For exports that nobody watches."""


@dataclass(frozen=True, slots=True)
class Written:
    """One finished file. `changes`: how often the prices go from one source over to another."""

    path: Path
    what: str
    rows: int
    first_s: int
    last_s: int
    changes: int


def export(
    conn: sqlite3.Connection,
    kind: str,
    place: Path,
    wanted: Wanted,
    *,
    format_: str = "csv",
    overwrite: bool = False,
    tell: Told = nobody,
) -> list[Written]:
    """Write the rows of one of `KINDS` to the file `place`; prices to `<ASSET>.<format>` in that folder.

    All files take their names at the end, when the last one is whole: whoever reads meanwhile finds the old
    ones, or none. `conn` is in autocommit mode. Raises ExportError where nothing is stored that is wanted,
    where a file is there already and `overwrite` is not asked for, and where it can't be written.
    """
    if kind != "prices" and place.suffix[1:] in FORMATS.keys() - {format_}:
        raise ExportError(f"{place} would hold {format_}; say --format {place.suffix[1:]}, or rename it")
    tables = KINDS[kind](conn, wanted)
    if not tables:
        raise ExportError(f"no {_NAMES[kind]} are stored in that range, of what was asked for")
    paths = [place / f"{table.name}.{format_}" if kind == "prices" else place for table in tables]
    (database,) = conn.execute("SELECT file FROM pragma_database_list WHERE name = 'main'").fetchone()
    for path in paths:
        refuse_own(Path(database), path)
    _refuse_existing(paths, overwrite)
    with ExitStack() as files:
        return [
            _write(files.enter_context(_replacing(path)), path, table, kind, format_, tell)
            for table, path in zip(tables, paths, strict=True)
        ]


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
        yield f"wrote {one.path}: {one.rows} {one.what}, {_time(one.first_s)} to {_time(one.last_s)} UTC"
        if one.changes:
            yield (
                f"  its source changes {one.changes} times; a replay is of one source, and scores the moves "
                "between two as well"
            )


def _time(ts_s: int) -> str:
    return datetime.fromtimestamp(ts_s, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _write(file: BinaryIO, path: Path, table: Table, kind: str, format_: str, tell: Told) -> Written:
    writer = FORMATS[format_](file, table.columns)
    count = first_s = last_s = 0
    for group in _groups(table.rows()):
        if not count:
            first_s = group[0][table.time]
        last_s = group[-1][table.time]
        writer.write(group)
        count += len(group)
        tell(table.name, table.count, count)
    writer.close()
    return Written(path, _NAMES[kind], count, first_s, last_s, table.changes)


def _groups(rows: Iterator[Row]) -> Iterator[list[Row]]:
    """As many rows at a time as memory takes: payloads can be long."""
    group: list[Row] = []
    characters = 0
    for row in rows:
        group.append(row)
        characters += len(row[-1]) if isinstance(row[-1], str) else 0
        if len(group) == exports.PAGE_ROWS or characters > _GROUP_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group


def _refuse_existing(paths: Iterable[Path], overwrite: bool) -> None:
    if there := [str(path) for path in paths if path.exists() and not overwrite]:
        raise ExportError(
            f"there already: {', '.join(there)}; name another place, or replace them with --overwrite"
        )


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file under a temporary name that becomes `path` in the end, or vanishes where anything fails."""
    target = path.resolve()  # a link stays one
    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
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
