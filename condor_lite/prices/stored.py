"""The prices that an earlier run stored: brought back, if they are this game's."""

from __future__ import annotations

import math
from collections.abc import Sequence

from condor_lite.config_sections import SIMULATED_SOURCES
from condor_lite.errors import StartError
from condor_lite.game.outcome import Series
from condor_lite.prices.book import PriceBook
from condor_lite.prices.grid import QUIET_S
from condor_lite.prices.supply import Line
from condor_lite.storage import repositories
from condor_lite.storage.database import Database

_SAME_PRICE = 1e-6  # relative; less is another processor's rounding


async def bring_back(
    db: Database, book: PriceBook, line: Line, until_s: int, tick_s: int, again_s: int
) -> bool:
    """Bring an asset's stored points up to `until_s` into the book; whether there are any.

    Raises StartError where they are simulated, and not the source's.
    """
    newest_s = await db.read(repositories.newest_price_s, line.asset)
    from_s = until_s - book.span_s if newest_s is None else min(until_s - book.span_s, newest_s)
    # Stored points that lie ahead of a clock that was set back come again in their time.
    ts_s, price = await db.read(repositories.load_prices, line.asset, from_s, until_s)
    book.add(line.asset, zip(ts_s.tolist(), price.tolist(), strict=True))
    if not len(ts_s):
        return False
    series, names = await db.read(
        repositories.load_series, line.asset, int(ts_s[-1]) - again_s, int(ts_s[-1])
    )
    assert series.source is not None
    _check_kind(db, line, names[series.source[-1]])
    if line.supply.source.simulated:
        await _check_same(db, book, line, tick_s)
    else:
        _remember(line, series, names, again_s)
    return True


def _check_kind(db: Database, line: Line, stored: str) -> None:
    """A game must not go on with simulated prices after live ones, nor the other way round."""
    simulated, source = stored in SIMULATED_SOURCES, line.supply.source
    if simulated != source.simulated and stored != source.name:
        kind = "simulated" if simulated else "live"
        raise StartError(
            f"{db.path}: its {line.asset} prices are {kind} ({stored}); start a new game with another "
            f"storage.path for those of {source}, or go back to the feed that this one was played with"
        )


async def _check_same(db: Database, book: PriceBook, line: Line, tick_s: int) -> None:
    """A game must not go on with prices that come from another simulation."""
    stored, source = book.last(line.asset), line.supply.source
    assert stored is not None
    points = await source.fetch(line.asset, stored[0] - QUIET_S, stored[0], tick_s)
    price = max(points)[1] if points else None
    if price is None or not math.isclose(price, stored[1], rel_tol=_SAME_PRICE):
        there = "has no price" if price is None else f"has {price:.9g}"
        raise StartError(
            f"{db.path}: its prices are not those of {source}, which {there} for {line.asset} at "
            f"{stored[0]} where {stored[1]:.9g} is stored. Go back to the feed that this game was played "
            "with, or start a new game with another storage.path"
        )


def _remember(line: Line, series: Series, names: Sequence[str], again_s: int) -> None:
    """Tell each supply what it gave last: its next answer is compared with that."""
    assert series.source is not None
    for supply in line.supplies:
        own = [
            (ts_s, price)
            for ts_s, price, number in zip(
                series.ts_s.tolist(), series.price.tolist(), series.source.tolist(), strict=True
            )
            if names[number] == supply.source.name
        ]
        supply.last = own[-1] if own else None
        supply.keep(own, int(series.ts_s[-1]) - again_s)
