"""One recent price of each asset from the configured sources, for `condor-lite check --online`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

import anyio

from condor_lite.config_values import shown_duration
from condor_lite.prices.grid import Point
from condor_lite.prices.source import Source, SourceError, UnknownAsset, newest_points

_REACH_S = 4 * 3600
_TIMEOUT_S = 60.0
_SKEW_TOLD_S = 2.0
_UNITS = ((86400, "d"), (3600, "h"), (60, "min"))
_HEADINGS = ("asset", "source", "price", "age")
_NUMBERS = (2, 3)


@dataclass(frozen=True, slots=True)
class Look:
    """What one source says of one asset: `point`, or `problem`."""

    asset: str
    source: str
    simulated: bool
    now_s: float
    point: Point | None = None
    problem: str | None = None
    unknown: bool = False
    """Whether the problem is that the source does not have the asset."""


async def look(
    sources: Sequence[Source],
    assets: Sequence[str],
    tick_s: int,
    max_staleness_s: int,
    now: Callable[[], float],
) -> tuple[list[Look], list[str]]:
    """Ask every source for the newest price of every asset, all at once, and close them.

    One older than `max_staleness_s` is a problem too. Returns what they said, by asset, and what else the
    host should know.
    """
    found: dict[tuple[str, int], Look] = {}

    async def ask(asset: str, number: int, source: Source) -> None:
        point, problem, unknown = None, None, False
        try:
            with anyio.fail_after(_TIMEOUT_S):
                point = await _newest(source, asset, tick_s, now())
            if point is None:
                problem = (
                    f"{source.name} has no price in the last {_REACH_S // 3600} h; is its market closed?"
                )
            elif not source.simulated and now() - point[0] > max_staleness_s:
                problem = (
                    f"the newest price of {source.name} is {_age(now() - point[0])} old, more than "
                    f"feed.max_staleness ({shown_duration(max_staleness_s)}): rounds are skipped; is its "
                    "market closed?"
                )
        except UnknownAsset as error:
            problem, unknown = refusal(error), True
        except TimeoutError:
            problem = f"{source.name}: no answer within {_TIMEOUT_S:g} s"
        except Exception as error:  # an own feed may raise anything
            problem = str(error)
            if not isinstance(error, SourceError):
                problem = f"{source.name}: {type(error).__name__}: {error}"
        found[asset, number] = Look(asset, source.name, source.simulated, now(), point, problem, unknown)

    async with AsyncExitStack() as stack:
        for source in sources:
            stack.push_async_callback(source.aclose)
        async with anyio.create_task_group() as tasks:
            for asset in assets:
                for number, source in enumerate(sources):
                    tasks.start_soon(ask, asset, number, source)
        notes = [
            f"this machine's clock is {abs(skew_s):.0f} s {'behind' if skew_s > 0 else 'ahead of'} that of "
            f"{source.name}: set it by NTP"
            for source in sources
            if (skew_s := source.skew_s) is not None and abs(skew_s) > _SKEW_TOLD_S
        ]
        if any(each.problem and not each.unknown for each in found.values()):
            notes.append("what fails now may work later: try again, or name a second source in feed.source")
    return [found[asset, number] for asset in assets for number in range(len(sources))], notes


def refusal(error: UnknownAsset) -> str:
    """Why a source can't have an asset, and what it has."""
    return f"{error}; it has {', '.join(error.offers)}" if error.offers else str(error)


def problems(looks: Sequence[Look]) -> list[str]:
    """A line for every failure. Not every source need have every asset, but one must."""
    had = {look.asset for look in looks if not look.unknown}
    return [
        f"{look.asset}: {look.problem}"
        for look in looks
        if look.problem and not (look.unknown and look.asset in had)
    ]


def lines(looks: Sequence[Look]) -> Iterator[str]:
    """A table: asset, source, price and age."""
    rows = [_HEADINGS, *(_cells(look) for look in looks)]
    widths = [max(len(row[at]) for row in rows) for at in range(len(_HEADINGS))]
    for row in rows:
        cells = zip(row, widths, strict=True)
        aligned = (
            f"{cell:>{width}}" if at in _NUMBERS else f"{cell:<{width}}"
            for at, (cell, width) in enumerate(cells)
        )
        yield "  ".join(aligned).rstrip()


async def _newest(source: Source, asset: str, tick_s: int, now_s: float) -> Point | None:
    end_s = source.end_s(asset)
    until_s = int(now_s) if end_s is None else min(int(now_s), end_s)
    after_s = until_s - max(_REACH_S, 2 * tick_s)
    return max(await newest_points(source, asset, after_s, until_s, tick_s), default=None)


def _cells(look: Look) -> tuple[str, ...]:
    source = f"{look.source} (simulated)" if look.simulated else look.source
    if look.point is None:
        return look.asset, source, "none", ""
    return look.asset, source, f"{look.point[1]:.8g}", _age(look.now_s - look.point[0])


def _age(age_s: float) -> str:
    unit_s, unit = next((unit for unit in _UNITS if age_s >= 2 * unit[0]), (1, "s"))
    return f"{age_s / unit_s:.0f} {unit}"
