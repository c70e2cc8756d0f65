"""The formats of `export`: CSV, JSON lines and Parquet, some rows at a time, so that memory is bounded."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, BinaryIO, Protocol

import orjson

from condor_lite.errors import CondorError
from condor_lite.storage.exports import Column, Row


class ExportError(CondorError):
    """What was asked for can't be exported; the message says why, and nothing was left behind."""


class Writer(Protocol):
    """Writes one file. `close` ends what was written, and leaves the file open."""

    def write(self, rows: Sequence[Row]) -> None: ...

    def close(self) -> None: ...


class Csv:
    """A header and a line a row; what is absent is empty. Floats have all their digits."""

    def __init__(self, file: BinaryIO, columns: Sequence[Column]) -> None:
        self._file = file
        self._columns = columns
        self._write([tuple(column.name for column in columns)])

    def write(self, rows: Sequence[Row]) -> None:
        self._write(_with_times(rows, self._columns))

    def close(self) -> None:
        """Nothing is left to write."""

    def _write(self, rows: Iterable[Row]) -> None:
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\n").writerows(rows)
        self._file.write(text.getvalue().encode())


class JsonLines:
    """An object a line, by the columns' names; what is absent is null."""

    def __init__(self, file: BinaryIO, columns: Sequence[Column]) -> None:
        self._file = file
        self._columns = columns
        self._names = [column.name for column in columns]

    def write(self, rows: Sequence[Row]) -> None:
        for row in _with_times(rows, self._columns):
            line = dict(zip(self._names, row, strict=True))
            self._file.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))

    def close(self) -> None:
        """Nothing is left to write."""


class Parquet:
    """A row group a call; times are timestamps in milliseconds, UTC. Raises ExportError without pyarrow."""

    def __init__(self, file: BinaryIO, columns: Sequence[Column]) -> None:
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError:
            raise ExportError(
                "Parquet needs pyarrow: pip install 'condor-lite[parquet]', or take another --format"
            ) from None
        at = pyarrow.timestamp("ms", tz="UTC")
        kinds = {
            "text": pyarrow.string(),
            "integer": pyarrow.int64(),
            "number": pyarrow.float64(),
            "seconds": at,
            "milliseconds": at,
        }
        self._columns = columns
        self._schema = pyarrow.schema([(column.name, kinds[column.kind]) for column in columns])
        self._batch = pyarrow.record_batch
        self._writer = parquet.ParquetWriter(file, self._schema, compression="zstd")

    def write(self, rows: Sequence[Row]) -> None:
        columns: list[Sequence[Any]] = list(zip(*rows, strict=True))
        for place, column in enumerate(self._columns):
            if column.kind == "seconds":
                columns[place] = [None if at is None else 1000 * at for at in columns[place]]
        self._writer.write_batch(self._batch(columns, schema=self._schema))

    def close(self) -> None:
        self._writer.close()


FORMATS: dict[str, Callable[[BinaryIO, Sequence[Column]], Writer]] = {
    "csv": Csv,
    "jsonl": JsonLines,
    "parquet": Parquet,
}
"""By the ending of a file's name."""

_SHOW: dict[str, Callable[[int], str]] = {
    "seconds": lambda at_s: _iso(at_s, "seconds"),
    "milliseconds": lambda at_ms: _iso(at_ms / 1000, "milliseconds"),
}


def _with_times(rows: Sequence[Row], columns: Sequence[Column]) -> Iterator[Row]:
    """The rows with times as text."""
    times = {place: _SHOW[column.kind] for place, column in enumerate(columns) if column.kind in _SHOW}
    if not times:
        yield from rows
        return
    for row in rows:
        shown = list(row)
        for place, show in times.items():
            if row[place] is not None:
                shown[place] = show(row[place])
        yield tuple(shown)


def _iso(at_s: float, unit: str) -> str:
    return datetime.fromtimestamp(at_s, UTC).isoformat(timespec=unit).replace("+00:00", "Z")
