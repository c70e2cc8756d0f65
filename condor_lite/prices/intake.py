"""What a source answers, checked and put on the grid: into the book, and on its way to the database."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass

import structlog

from condor_lite.clock import Clock
from condor_lite.prices.book import PriceBook
from condor_lite.prices.grid import Point, Span, on_grid
from condor_lite.prices.quarantine import sift
from condor_lite.prices.saving import Saver
from condor_lite.prices.supply import Line, Supply

log = structlog.get_logger()

_FETCH_TIMEOUT_S = 30.0  # with the wait for a turn at a source that allows one request a second


@dataclass(frozen=True, slots=True)
class Intake:
    """Fetches spans of an asset's prices. `again_s`: how far back an answer is compared with earlier ones."""

    clock: Clock
    book: PriceBook
    saver: Saver
    again_s: int

    async def ahead(self, line: Line, supply: Supply, span: Span) -> None:
        """Bring what comes after the newest point into the book, page by page.

        The first page asks for the newest points again: the source may have changed its mind about them.
        """
        after_s, again_s = span.after_s, 0 if supply.source.simulated else self.again_s
        while after_s < span.until_s or again_s:
            from_s = after_s - again_s
            until_s = min(from_s + supply.source.page_points * span.step_s, span.until_s)
            page = Span(from_s, until_s, span.step_s)
            points = await self._fetch(line.asset, supply, page)
            if not supply.source.simulated:
                points = self._sift(line, supply, points)
            before = supply.last if supply.last is not None and supply.last[0] <= from_s else None
            found = on_grid(points, page, before)
            self._compare(line.asset, supply, [point for point in found if point[0] <= after_s])
            self._add(line.asset, supply, [point for point in found if point[0] > after_s], points)
            after_s, again_s = page.until_s, 0
            if line.held is not None and page.until_s < span.until_s:
                after_s = max(from_s + 1, line.held[0] - 1)  # the next page has what confirms it
            if after_s < span.until_s:
                await asyncio.sleep(0)  # a long gap is many pages

    async def back(
        self, line: Line, supply: Supply, page: Span, below: Point | None, above: Point | None
    ) -> tuple[Point | None, int]:
        """Bring a page of the past into the book; its oldest point, and where the page before it ends.

        `below` and `above`: the points of this supply next to the page, where they are known. A quiet time at
        the page's edge is filled from the one and proved by the other.
        """
        points, ends_s = await self._fetch(line.asset, supply, page), page.after_s
        if not supply.source.simulated:
            sifted = sift(points[::-1], above[1] if above else None)
            self._tell_dropped(line.asset, supply, sifted.dropped)
            points = sifted.sound[::-1]
            if sifted.held is not None:  # the page before it has what confirms it, unless that was this one
                again_s = -(-sifted.held[0] // page.step_s) * page.step_s
                ends_s = again_s if again_s < page.until_s else ends_s
        if above is None:
            found = on_grid(points, page, below)
        else:
            found = on_grid([*points, above], Span(page.after_s, above[0], page.step_s), below)
        self._add(line.asset, supply, found, points)
        return points[0] if points else above, ends_s

    async def probe(self, line: Line, supply: Supply, span: Span) -> bool:
        """Whether a supply that is not in use has a point as new as the book's, and newer than its last."""
        points = await self._fetch(line.asset, supply, span)
        newest_s = points[-1][0] if points else 0
        last_s = supply.last[0] if supply.last else 0
        return newest_s > last_s and newest_s >= (self.book.newest_s(line.asset) or 0)

    async def _fetch(self, asset: str, supply: Supply, page: Span) -> list[Point]:
        """The points inside `page` that can be prices, ascending."""
        try:
            async with asyncio.timeout(_FETCH_TIMEOUT_S):
                given = await supply.source.fetch(asset, page.after_s, page.until_s, page.step_s)
        except TimeoutError:
            raise TimeoutError(f"no answer within {_FETCH_TIMEOUT_S:g} s") from None
        finally:
            supply.channel.look_at_its_clock(self.clock.now())
        inside = {ts_s: price for ts_s, price in given if page.after_s < ts_s <= page.until_s}
        sound = sorted((ts_s, price) for ts_s, price in inside.items() if price > 0 and math.isfinite(price))
        rejected = inside.keys() - {ts_s for ts_s, _ in sound} - supply.rejected
        if rejected:
            at_s = max(rejected)
            log.warning(
                "prices_rejected",
                asset=asset,
                source=supply.source.name,
                count=len(rejected),
                at_s=at_s,
                price=inside[at_s],
            )
            supply.rejected = {ts_s for ts_s in supply.rejected | rejected if ts_s > page.until_s - 3600}
        return sound

    def _sift(self, line: Line, supply: Supply, points: list[Point]) -> list[Point]:
        known = next(iter(supply.own.values()), None)
        last = self.book.last(line.asset)
        sifted = sift(points, known if known is not None else last[1] if last else None)
        if sifted.held and (line.held is None or line.held[0] != sifted.held[0]):
            log.warning(
                "price_quarantined",
                asset=line.asset,
                source=supply.source.name,
                at_s=sifted.held[0],
                price=sifted.held[1],
                before=last[1] if last else None,
            )
        newest_s = self.book.newest_s(line.asset) or 0
        self._tell_dropped(line.asset, supply, [point for point in sifted.dropped if point[0] > newest_s])
        line.held = sifted.held
        return sifted.sound

    def _tell_dropped(self, asset: str, supply: Supply, points: list[Point]) -> None:
        if points:
            at_s, price = points[0]
            source = supply.source.name
            log.warning(
                "prices_dropped", asset=asset, source=source, count=len(points), at_s=at_s, price=price
            )

    def _compare(self, asset: str, supply: Supply, points: list[Point]) -> None:
        """Correct what is young enough; of the rest say what the source says now, once."""
        revised: list[Point] = []
        for ts_s, price in points:
            stored = supply.own.get(ts_s)
            if stored is None or stored == price:
                continue
            if self.saver.may_revise(ts_s):
                supply.own[ts_s] = price
                revised.append((ts_s, price))
            elif ts_s not in supply.differing:
                supply.differing.add(ts_s)
                log.warning(
                    "price_differs",
                    asset=asset,
                    source=supply.source.name,
                    at_s=ts_s,
                    stands=stored,
                    source_says=price,
                )
        if revised:
            self.saver.revise(asset, supply.source.name, revised)

    def _add(self, asset: str, supply: Supply, found: list[Point], points: list[Point]) -> None:
        if points and (supply.last is None or points[-1] > supply.last):
            supply.last = points[-1]
        if added := self.book.add(asset, found):
            self.saver.add(asset, supply.source.name, added)
            supply.keep(added, added[-1][0] - self.again_s)
