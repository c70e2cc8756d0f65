"""What a value in `config.toml` may look like: one reader a kind of value, strict about types and ranges.

A reader gets the value as TOML gave it and the folder that relative paths start from. It returns the value as
the program uses it, or raises `WrongValueError` with what would be right.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

LONGEST_S = 3650 * 86400  # no duration of a game is longer; keeps sums of times far from any overflow

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_UNITS_BYTES = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_SIZE = re.compile(r"([0-9]{1,12})\s*(KiB|MiB|GiB)")
_DURATION = re.compile(r"([0-9]{1,12})\s*([smhd])")
_HOST_LABEL = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")
_SHOWN_CHARACTERS = 80


class WrongValueError(ValueError):
    """A value that can't be used. The message says what would be right: "must be an integer from 0 to 9"."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of value: its name for the reader, and how it is read.

    `textual`: in the environment `CONDOR_LITE__FEED__API_KEY=123` is a string, though a number in TOML.
    """

    name: str
    read: Callable[[Any, Path], Any]
    textual: bool = False


@dataclass(frozen=True, slots=True)
class Key:
    """One key of `config.toml`, as the documentation shows it. `default` is TOML, or words where it depends.

    `field` is the name of the dataclass's field: `tick` is `tick_s` there.
    """

    section: str
    key: str
    field: str
    default: str
    meaning: str
    kind: Kind
    secret: bool = False

    @property
    def name(self) -> str:
        """The key with its section, as errors and the documentation name it: `report.port`."""
        return f"{self.section}.{self.key}"


@dataclass(frozen=True, slots=True)
class Documented:
    """What a section's field says of itself, in its metadata under the name "documented"."""

    kind: Kind
    meaning: str
    default: str | None = None
    secret: bool = False


def documented(
    kind: Kind,
    meaning: str,
    *,
    default: Any = None,
    default_factory: Callable[[], Any] | None = None,
    shown: str | None = None,
    secret: bool = False,
) -> Any:
    """A dataclass field with its documentation. `shown` stands in for a default that is not a plain value."""
    metadata = {"documented": Documented(kind, meaning, shown, secret)}
    if default_factory is not None:
        return field(default_factory=default_factory, metadata=metadata, repr=not secret)
    return field(default=default, metadata=metadata, repr=not secret)


def shown(value: object, *, secret: bool = False) -> str:
    """The value as it would be written in TOML, shortened; of a secret only the first characters."""
    if secret:
        start = value[: min(4, len(value) // 4)] if isinstance(value, str) else ""
        return json.dumps(f"{start}...") + " (hidden)"
    if isinstance(value, float) and not math.isfinite(value):
        text = str(value)
    elif isinstance(value, (date, datetime)):
        text = value.isoformat()
    elif isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 256:
        text = "an enormous integer"
    else:
        text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[: _SHOWN_CHARACTERS - 3]}..."


def shown_duration(seconds: float) -> str:
    """A duration in the largest unit of which it is at least two: 60 -> "60s", 7200 -> "2h"."""
    whole = int(seconds)
    for unit, unit_s in reversed(_UNITS_S.items()):
        if whole % unit_s == 0 and whole >= 2 * unit_s:
            return f"{whole // unit_s}{unit}"
    return f"{whole}s"


def integer(minimum: int, maximum: int) -> Kind:
    def read(value: Any, _: Path) -> int:
        if type(value) is not int or not minimum <= value <= maximum:
            raise WrongValueError(f"must be an integer from {minimum} to {maximum}")
        return value

    return Kind("integer", read)


def number(maximum: float) -> Kind:
    """A finite number above 0 and at most `maximum`."""

    def read(value: Any, _: Path) -> float:
        if type(value) not in (int, float) or not 0 < value <= maximum:
            raise WrongValueError(f"must be a number above 0 and at most {maximum:.0f}")
        return float(value)

    return Kind("number", read)


def read_duration(value: Any, minimum_s: int = 1, maximum_s: int = LONGEST_S) -> int:
    """Seconds of a duration: an integer, or a string with one of the units s, m, h, d."""
    if type(value) is int:
        seconds = value
    elif isinstance(value, str) and (match := _DURATION.fullmatch(value.strip())):
        seconds = int(match[1]) * _UNITS_S[match[2]]
    else:
        raise WrongValueError(
            'must be a duration: whole seconds such as 90, or a string such as "90s", "5m", "1h", "30d"'
        )
    if not minimum_s <= seconds <= maximum_s:
        raise WrongValueError(
            f'must be a duration from "{shown_duration(minimum_s)}" to "{shown_duration(maximum_s)}"'
        )
    return seconds


def duration(minimum_s: int = 1, maximum_s: int = LONGEST_S) -> Kind:
    return Kind("duration", lambda value, _: read_duration(value, minimum_s, maximum_s))


def shown_size(count: int) -> str:
    """A number of bytes in the largest unit that divides it: 2**30 -> "1GiB"."""
    for unit, unit_bytes in reversed(_UNITS_BYTES.items()):
        if count % unit_bytes == 0 and count:
            return f"{count // unit_bytes}{unit}"
    return str(count)


def size(minimum: int, maximum: int) -> Kind:
    """Bytes: an integer, or a string with one of the units KiB, MiB, GiB."""

    def read(value: Any, _: Path) -> int:
        if isinstance(value, str) and (match := _SIZE.fullmatch(value.strip())):
            value = int(match[1]) * _UNITS_BYTES[match[2]]
        if type(value) is not int or not minimum <= value <= maximum:
            limits = f'"{shown_size(minimum)}" to "{shown_size(maximum)}"'
            raise WrongValueError(f"must be a size from {limits}, with one of the units KiB, MiB and GiB")
        return value

    return Kind("size", read)


def boolean() -> Kind:
    def read(value: Any, _: Path) -> bool:
        if not isinstance(value, bool):
            raise WrongValueError("must be true or false")
        return value

    return Kind("boolean", read)


def text(
    pattern: str = r".*", right: str = "must be a string", *, longest: int = 500, name: str = "string"
) -> Kind:
    """A string that matches `pattern` whole, without control characters."""
    allowed = re.compile(pattern, re.DOTALL)

    def read(value: Any, _: Path) -> str:
        if not isinstance(value, str) or not allowed.fullmatch(value):
            raise WrongValueError(right)
        if len(value) > longest:
            raise WrongValueError(f"must have at most {longest} characters, has {len(value)}")
        if not value.isprintable():
            raise WrongValueError("must not hold control characters such as a line break")
        return value

    return Kind(name, read, textual=True)


def choice(*options: str) -> Kind:
    def read(value: Any, _: Path) -> str:
        if not isinstance(value, str) or value not in options:
            raise WrongValueError("must be " + either([f'"{option}"' for option in options]))
        return value

    return Kind("string", read, textual=True)


def strings(right: str, allowed: Callable[[str], bool] = bool, *, at_least: int = 0) -> Kind:
    """A list of different strings, each of which is `allowed`."""

    def read(value: Any, _: Path) -> tuple[str, ...]:
        if not isinstance(value, list) or not all(isinstance(item, str) and allowed(item) for item in value):
            raise WrongValueError(right)
        if len(value) < at_least:
            raise WrongValueError(right)
        if repeated := [item for place, item in enumerate(value) if item in value[:place]]:
            raise WrongValueError(f"must name each only once, {shown(repeated[0])} is there twice")
        return tuple(value)

    return Kind("list of strings", read)


def path(*, optional: bool = False) -> Kind:
    """An absolute path, from one relative to the config file's folder. Optional: "" stands for none."""

    def read(value: Any, base: Path) -> Path | None:
        if value == "" and optional:
            return None
        if not isinstance(value, str) or not value or not value.isprintable():
            raise WrongValueError("must be a path, as a string")
        # normpath: "../data" in a message is hard to find; expanduser leaves an unknown ~user as it is.
        return Path(os.path.normpath(base / os.path.expanduser(value)))  # noqa: PTH111

    return Kind("path", read, textual=True)


def host() -> Kind:
    right = 'must be a host name or an address without a port, such as "127.0.0.1" (all addresses: "0.0.0.0")'

    def read(value: Any, _: Path) -> str:
        if not isinstance(value, str):
            raise WrongValueError(right)
        ipv6 = (
            ":" in value
            and re.fullmatch(r"[0-9A-Fa-f:.]+(%[A-Za-z0-9._-]+)?", value)
            and value.count(":") > 1
        )
        labels = value.removesuffix(".").split(".")
        if not ipv6 and not (len(value) <= 253 and all(_HOST_LABEL.fullmatch(label) for label in labels)):
            raise WrongValueError(right)
        return value

    return Kind("host", read, textual=True)


def moment() -> Kind:
    """A time, epoch seconds UTC, from an ISO string or a TOML date-time; without a zone it is UTC."""

    def read(value: Any, _: Path) -> int:
        try:
            if isinstance(value, str):
                value = datetime.fromisoformat(value)
            elif type(value) is date:
                value = datetime(value.year, value.month, value.day, tzinfo=UTC)
            if not isinstance(value, datetime):
                raise ValueError
            at = value if value.tzinfo else value.replace(tzinfo=UTC)
            seconds = at.timestamp()
        except (ValueError, OverflowError):
            raise WrongValueError('must be an ISO time such as "2023-03-10T12:00:00Z"') from None
        if seconds < 0 or seconds % 1:
            raise WrongValueError("must be a whole second, after 1970")
        return int(seconds)

    return Kind("ISO time", read, textual=True)


def read_when(text: str, now_s: float) -> int:
    """A time on the command line, epoch seconds: an ISO time, or how long before `now_s` ("3d")."""
    try:
        return int(now_s) - read_duration(text)
    except WrongValueError:
        pass
    try:
        return int(moment().read(text, Path()))
    except WrongValueError:
        raise WrongValueError(
            'must be a time such as "2026-11-21" or "2026-11-21T08:00:00Z", or how long ago, such as "3d" or '
            '"12h"'
        ) from None


def is_web_address(value: str, *, origin: bool = False) -> bool:
    """Whether this is an http(s) address without query and fragment; as an `origin`, also without a path."""
    try:
        parts = urlsplit(value)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
    bare = not (parts.query or parts.fragment) and value.isprintable() and " " not in value
    return valid and bare and not (origin and (parts.path or parts.username is not None))


def is_file(path: Path) -> bool:
    """Whether this is a file; False also where a folder on the way is closed to us, unlike `Path.is_file`."""
    return os.path.isfile(path)  # noqa: PTH113


def is_folder(path: Path) -> bool:
    """Whether this is a folder; False also where a folder on the way is closed to us."""
    return os.path.isdir(path)  # noqa: PTH112


def either(options: Sequence[str]) -> str:
    """`a, b or c`."""
    return " or ".join(filter(None, [", ".join(options[:-1]), options[-1]]))
