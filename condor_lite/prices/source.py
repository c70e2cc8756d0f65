"""What a source of prices is to the feed, and how it says what went wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from condor_lite.prices.grid import Point

LONGEST_PAUSE_S = 3600.0
"""For which a source is left alone, whatever it asks for."""


class SourceError(Exception):
    """A fetch failed: the message says what and why, for the host. It is tried again.

    `retry_after_s`: how long (wall) the source wants to be left alone, None where it did not say.
    """

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class UnknownAsset(SourceError):
    """The source has no such asset, and asking again will not help. `offers` names some that it has."""

    def __init__(self, message: str, *, offers: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.offers = tuple(offers)


class Source(Protocol):
    """Where prices come from. `str(source)` names it for people.

    A subclass gets defaults for all but `name` and `fetch`.
    """

    name: str
    simulated: bool = False
    """Whether it knows its prices beforehand. `fetch` then never waits: it awaits nothing."""
    latency_s: float = 2.0
    """How long after a tick's end (wall) its price can be had."""
    page_points: int = 300
    """How many points one fetch may be asked for."""
    reach_s: int | None = None
    """How far back it can be asked for, None for as far as anyone wants."""
    skew_s: float | None = None
    """How far the source's own clock is ahead of this machine's, None before it said so."""

    async def fetch(self, asset: str, after_s: int, until_s: int, step_s: int) -> list[Point]:
        """The settled points with `after_s < ts_s <= until_s`, at a resolution of `step_s` or finer.

        A point stands at the time when its price was known: a candle's end. In any order, on or off the grid,
        quiet times left out. Raises SourceError, or whatever else went wrong: it is tried again.
        """
        ...

    def end_s(self, asset: str) -> int | None:
        """The time of the last point there will ever be, None for a source without end."""
        return None

    async def aclose(self) -> None:
        """Give back what it holds."""


async def newest_points(source: Source, asset: str, after_s: int, until_s: int, step_s: int) -> list[Point]:
    """The newest page of a range that has any point; `[]` where none has. Raises what `fetch` does."""
    while until_s > after_s:
        from_s = max(after_s, until_s - source.page_points * step_s)
        points = await source.fetch(asset, from_s, until_s, step_s)
        if inside := [point for point in points if from_s < point[0] <= until_s]:
            return inside
        until_s = from_s
    return []
