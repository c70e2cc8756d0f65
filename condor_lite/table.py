"""The roster in plain text, for `condor-lite models`."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

from condor_lite.roster import Listing, ModelLine

_MOST_CHARS = 40
_NOTE_CHARS = 160
_HEADINGS = (
    *("model", "state", "since (UTC)", "deployment"),
    *("answered", "failed", "timed out", "absent", "median ms", "note"),
)
_NUMBERS = range(4, 9)


def lines(listing: Listing) -> Iterator[str]:
    """A line a model, below a heading. Names and reasons come from outside: only what can be shown is."""
    if not listing.running:
        yield f"no game is running; this is how {listing.game} was left at {_time(listing.now_s)} UTC"
        yield ""
    if not listing.models:
        yield "no model has taken part yet"
        return
    rows = [_HEADINGS, *(_cells(line) for line in listing.models)]
    widths = [max(len(row[at]) for row in rows) for at in range(len(_HEADINGS) - 1)]
    for row in rows:
        cells = [
            f"{cell:>{width}}" if at in _NUMBERS else f"{cell:<{width}}"
            for at, (cell, width) in enumerate(zip(row[:-1], widths, strict=True))
        ]
        yield "  ".join([*cells, row[-1]]).rstrip()
    yield ""
    yield "answered to absent: in the rounds of the last 24 h that count; median ms: of the newest answers"


def _cells(line: ModelLine) -> tuple[str, ...]:
    return (
        _shown(line.model_id, _MOST_CHARS),
        line.state,
        "-" if line.since_s is None else _time(line.since_s),
        _shown(line.deployment_id or "-", _MOST_CHARS),
        *(str(count) for count in (line.answered, line.failed, line.timed_out, line.absent)),
        "-" if line.median_ms is None else f"{line.median_ms:.1f}",
        _shown("; ".join(_notes(line)), _NOTE_CHARS),
    )


def _notes(line: ModelLine) -> Iterator[str]:
    if line.reason:
        yield line.reason
    if line.last_error and line.last_error != line.reason:
        at = "" if line.last_error_at_s is None else f" ({_time(line.last_error_at_s)})"
        yield f"last error{at}: {line.last_error}"


def _shown(text: str, most: int) -> str:
    text = "".join(char if char.isprintable() else "?" for char in text[: most + 1])
    return text if len(text) <= most else text[: most - 3] + "..."


def _time(ts_s: int) -> str:
    return datetime.fromtimestamp(ts_s, UTC).strftime("%Y-%m-%d %H:%M:%S")
