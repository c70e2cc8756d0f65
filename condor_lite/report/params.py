"""Query parameters: how their text becomes a value, and what is said where it does not.

An endpoint's parameters are a frozen dataclass; `whole`, `choice`, ... below are the metadata of its fields.
What a caller sent is never repeated in a message.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Literal, TypeVar

from condor_lite.errors import CondorError

T = TypeVar("T")

MOST_IDS = 1000
LONGEST_WORD = 256

_MOMENT = {"type": "string", "format": "date-time"}
_CURSOR = "[0-9]{1,12}(_[0-9]{1,18}){1,2}"
_SPACE_FOR_PLUS = re.compile(r"(\d{4}-\d\d-\d\d[T ]\d\d:\d\d(?::\d\d(?:[.,]\d+)?)?) (\d\d:?\d\d)")


class BadParameter(CondorError):
    """A request's parameter that can't be used; the message says what would be right."""


@dataclass(frozen=True, slots=True)
class Kind:
    """`read` takes all values sent for the parameter, and raises ValueError with what would be right."""

    read: Callable[[Sequence[str]], Any]
    schema: Mapping[str, Any]
    name: str | None = None
    """Its name in the URL, where it differs from the field's."""
    place: Literal["query", "path", "header"] = "query"
    may_be_empty: bool = False
    doc: str = ""


@dataclass(frozen=True, slots=True)
class Cursor:
    """Where a page ends: rows before this time, or before this row of it."""

    at_s: float
    round_no: int | None = None
    model_no: int | None = None


@dataclass(frozen=True, slots=True)
class NoParams:
    pass


Metadata = Mapping[str, Kind]


def whole(low: int, high: int, doc: str = "") -> Metadata:
    def read(values: Sequence[str]) -> int:
        text = values[-1].strip()
        if not re.fullmatch(r"[+-]?[0-9]{1,18}", text) or not low <= int(text) <= high:
            raise ValueError(f"must be a whole number from {low} to {high}")
        return int(text)

    return {"kind": Kind(read, {"type": "integer", "minimum": low, "maximum": high}, doc=doc)}


def seconds(doc: str = "") -> Metadata:
    """A length of time in whole seconds."""

    def read(values: Sequence[str]) -> int:
        text = values[-1].strip()
        if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) == 0:
            raise ValueError("must be a whole number of seconds, such as 3600")
        return int(text)

    return {"kind": Kind(read, {"type": "integer", "minimum": 1, "maximum": 999_999_999}, doc=doc)}


def choice(options: type[StrEnum], doc: str = "") -> Metadata:
    names = [option.value for option in options]

    def read(values: Sequence[str]) -> StrEnum:
        text = values[-1].strip()
        if text not in names:
            raise ValueError(f"must be one of {', '.join(names)}")
        return options(text)

    return {"kind": Kind(read, {"type": "string", "enum": names}, doc=doc)}


def instant(doc: str = "") -> Metadata:
    """A time -> epoch seconds."""
    return {"kind": Kind(lambda values: read_moment(values[-1]), _MOMENT, doc=doc)}


def cursor(doc: str = "") -> Metadata:
    """A time, or what `X-Next-Before` of the page before said."""

    def read(values: Sequence[str]) -> Cursor:
        text = values[-1].strip()
        if re.fullmatch(_CURSOR, text):
            at_s, *numbers = (int(part) for part in text.split("_"))
            return Cursor(at_s, *numbers)
        return Cursor(read_moment(text))

    number = {"type": "string", "pattern": f"^{_CURSOR}$"}
    return {"kind": Kind(read, {"type": "string", "anyOf": [_MOMENT, number]}, doc=doc)}


def ids(name: str, doc: str = "") -> Metadata:
    """Model ids, comma-joined or repeated. Sent empty, it names no model."""

    def read(values: Sequence[str]) -> tuple[str, ...]:
        found = dict.fromkeys(part.strip() for value in values for part in value.split(","))
        found.pop("", None)
        if len(found) > MOST_IDS:
            raise ValueError(f"must hold at most {MOST_IDS} ids")
        return tuple(found)

    schema = {"type": "array", "items": {"type": "string"}, "maxItems": MOST_IDS}
    return {"kind": Kind(read, schema, name=name, may_be_empty=True, doc=doc)}


def word(doc: str = "") -> Metadata:
    """A word to filter by."""

    def read(values: Sequence[str]) -> str:
        if len(values[-1]) > LONGEST_WORD:
            raise ValueError(f"must be at most {LONGEST_WORD} characters")
        return values[-1]

    return {"kind": Kind(read, {"type": "string", "maxLength": LONGEST_WORD}, doc=doc)}


def path(doc: str = "") -> Metadata:
    """A part of the path."""
    return {
        "kind": Kind(lambda values: values[-1], {"type": "string", "minLength": 1}, place="path", doc=doc)
    }


def header(name: str, doc: str = "") -> Metadata:
    """A header, as it was sent."""
    return {"kind": Kind(lambda values: values[-1], {"type": "string"}, name=name, place="header", doc=doc)}


def read_moment(value: str) -> float:
    """ISO 8601 -> epoch seconds. Without a zone it is UTC; the `+` of an offset may have become a space.

    Raises ValueError with what would be right.
    """
    value = value.strip()
    if spaced := _SPACE_FOR_PLUS.fullmatch(value):
        value = f"{spaced[1]}+{spaced[2]}"
    try:
        at = datetime.fromisoformat(value.upper())
        return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        raise ValueError("must be an ISO 8601 time, such as 2026-11-21T01:00:00Z") from None


def read(
    kind: type[T],
    sent: Callable[[str], Sequence[str]],
    in_path: Mapping[str, str],
    in_headers: Callable[[str], Sequence[str]] = lambda name: (),
) -> T:
    """Fill the dataclass `kind`; what was not sent, or sent empty, keeps its default. Raises BadParameter.

    `sent(name)`: all values in the query, `in_headers(name)`: in the headers.
    """
    given: dict[str, Any] = {}
    for entry in fields(kind):  # type: ignore[arg-type]
        how: Kind = entry.metadata["kind"]
        name = how.name or entry.name
        if how.place == "path":
            values: Sequence[str] = [in_path[entry.name]]
        else:
            values = (sent if how.place == "query" else in_headers)(name)
        if not values or not (any(values) or how.may_be_empty or how.place == "path"):
            continue
        try:
            given[entry.name] = how.read(values)
        except ValueError as error:
            raise BadParameter(f"{name} {error}") from None
    return kind(**given)
