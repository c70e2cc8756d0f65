"""Who gives an asset its prices: its sources in the order of `feed.source`, and which one is in use."""

from __future__ import annotations

import asyncio
import math
import random
from dataclasses import dataclass, field

import structlog

from condor_lite.prices.grid import Point, Span
from condor_lite.prices.source import LONGEST_PAUSE_S, Source, SourceError

log = structlog.get_logger()

TELL_AGAIN_S = 600.0
"""What comes and goes is told so often at most."""

_RETRY_FIRST_S = 1.0
_RETRY_MOST_S = 60.0
_SKEW_TOLD_S = 2.0
_SKEW_WAITED_S = 30.0  # a clock that is further ahead is wrong in ways that no waiting cures


@dataclass(slots=True, eq=False)
class Channel:
    """A source, and what concerns all assets that it has."""

    source: Source
    not_before_s: float = 0.0
    """It asked to be left alone until then, game time."""
    refusal: str = ""
    """How it asked for that."""
    skew_told_s: float = 0.0
    told_at_s: float = -math.inf
    """When a difference of the clocks was told, game time."""

    @property
    def lag_s(self) -> float:
        """How long after a tick's end (wall) its price can be had, by this machine's clock."""
        ahead_s = -(self.source.skew_s or 0.0)
        return self.source.latency_s + (ahead_s if 0 < ahead_s <= _SKEW_WAITED_S else 0.0)

    def retry_s(self, error: Exception, failures: int, now_s: float) -> float:
        """When to try again after so many failures in a row before this one, game time."""
        pause_s = min(_RETRY_FIRST_S * 2.0 ** min(failures, 30), _RETRY_MOST_S) * random.uniform(0.75, 1.25)
        if isinstance(error, SourceError) and error.retry_after_s is not None:
            pause_s = max(pause_s, min(error.retry_after_s, LONGEST_PAUSE_S))
            self.not_before_s, self.refusal = max(self.not_before_s, now_s + pause_s), str(error)
        return now_s + pause_s

    def look_at_its_clock(self, now_s: float) -> None:
        """Say so once when the source's clock and this machine's part, or meet again."""
        skew_s = self.source.skew_s
        if skew_s is None or abs(skew_s - self.skew_told_s) <= _SKEW_TOLD_S:
            return
        if abs(skew_s) > _SKEW_TOLD_S:
            if now_s < self.told_at_s + TELL_AGAIN_S:
                return
            log.warning(
                "clock_differs",
                source=self.source.name,
                this_machine_is_behind_s=round(skew_s, 1),
                what_to_do="set this machine's clock by NTP",
            )
            self.skew_told_s, self.told_at_s = skew_s, now_s
        elif self.skew_told_s:
            log.info("clock_agrees_again", source=self.source.name)
            self.skew_told_s = 0.0


@dataclass(slots=True, eq=False)
class Supply:
    """One source's prices of one asset."""

    channel: Channel
    last: Point | None = None
    """The newest point it gave."""
    own: dict[int, float] = field(default_factory=dict)
    """Its newest points in the book: what its later answers are compared with."""
    differing: set[int] = field(default_factory=set)
    """Those of them whose difference was told."""
    rejected: set[int] = field(default_factory=set)
    """Times of the last hour at which it gave what can be no price."""
    failures: int = 0
    error: str | None = None
    """Why the last attempt failed, None when it did not."""
    told: bool = False
    """Whether these failures were told."""
    told_at_s: float = -math.inf
    """When failures were told, game time."""

    @property
    def source(self) -> Source:
        return self.channel.source

    def keep(self, points: list[Point], since_s: int) -> None:
        """Remember the newest points, those later than `since_s`."""
        newest_s = max(self.own, default=0)
        self.own.update(point for point in points if point[0] > max(since_s, newest_s))
        for ts_s in [ts_s for ts_s in self.own if ts_s <= since_s]:
            del self.own[ts_s]
            self.differing.discard(ts_s)

    def failed(self, asset: str, error: Exception, now_s: float) -> float:
        """Note a failure, and say the first in a row; the game time of the next attempt."""
        self.error = str(error) or type(error).__name__
        if not self.told and now_s >= self.told_at_s + TELL_AGAIN_S:
            self.told, self.told_at_s = True, now_s
            log.warning("feed_failing", asset=asset, source=self.source.name, error=self.error)
        at_s = self.channel.retry_s(error, self.failures, now_s)
        self.failures += 1
        return at_s

    def recovered(self, asset: str) -> None:
        """Note a success."""
        if self.told:
            log.info("feed_recovered", asset=asset, source=self.source.name)
        self.failures, self.error, self.told = 0, None, False


@dataclass(slots=True, eq=False)
class Line:
    """One asset's way to its prices."""

    asset: str
    supplies: list[Supply]
    """The sources that have it, in the order of `feed.source`."""
    at: int = 0
    """Which of them is in use."""
    next_s: float = 0.0
    """When to ask again, game time."""
    delivered_s: float = 0.0
    """When the newest point came, or this supply took over, game time."""
    waiting_for_s: int = 0
    """The tick whose point was not there yet, and how often it was asked for."""
    waited: int = 0
    held: Point | None = None
    """The absurd price that waits to be confirmed."""
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once there is a point."""
    fallen_back: asyncio.Event = field(default_factory=asyncio.Event)
    """Set while it is not the first supply that is in use."""
    todo: list[Span] = field(default_factory=list)
    """The history that is still to be fetched, newest first."""
    above: Point | None = None
    """The oldest point of the page that was fetched last."""
    next_page: tuple[int, Supply] | None = None
    """Where the page below that one ends, and who gave them."""

    @property
    def supply(self) -> Supply:
        return self.supplies[self.at]

    def fails_over_s(self, after_s: float) -> float:
        """When the next supply takes over unless a point comes before, game time; never for the last one."""
        return self.delivered_s + after_s if self.at + 1 < len(self.supplies) else float("inf")

    def use(self, at: int, now_s: float) -> None:
        """Take the prices from another supply from now on."""
        silent, self.at = self.supply, at
        self.delivered_s = self.next_s = now_s
        if at:
            self.fallen_back.set()
        else:
            self.fallen_back.clear()
        log.warning(
            "feed_source_changed",
            asset=self.asset,
            source=self.supply.source.name,
            instead_of=silent.source.name,
            error=silent.error,
        )

    def reaching(self, until_s: int, now_s: int) -> Supply | None:
        """Who can be asked for the history before `until_s`: the supply in use, if it reaches so far."""
        for supply in (self.supply, *self.supplies):
            reach_s = supply.source.reach_s
            if reach_s is None or until_s > now_s - reach_s:
                return supply
        return None
