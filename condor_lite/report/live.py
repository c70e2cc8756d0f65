"""What the report knows of the running game beside the database. It looks; it changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass

from condor_lite.backup import BackupState
from condor_lite.clock import Clock
from condor_lite.config import Config
from condor_lite.game.entities import Leaderboard
from condor_lite.news import News
from condor_lite.prices.feed import FeedState


@dataclass(frozen=True, slots=True)
class Problem:
    """What keeps the game from being well, and what to do about it."""

    what: str
    to_do: str


@dataclass(frozen=True, slots=True)
class ServiceState:
    """`failure`: why it is not running, None while it is; `for_s`: for how long it has been so (wall)."""

    name: str
    failure: str | None
    restarts: int
    for_s: float


@dataclass(frozen=True, slots=True)
class Vitals:
    """How the parts of the game are. `pool_waiting`: answers that no scoring process has taken up yet;
    `journal_waiting`: entries that are not on disk yet; `written_for_s`: how long ago the last write was.
    `loop_delays_s`: how late the event loop was in the last minute: median, 99 of 100, worst; `late_s`: how
    late the newest rounds opened. All of these on the wall. `backup`: None where the game makes none.
    """

    services: Sequence[ServiceState]
    workers: int
    pool_waiting: int
    journal_waiting: int
    written_for_s: float | None
    loop_delays_s: tuple[float, float, float]
    late_s: float
    backup: BackupState | None = None


class Live:
    """`problems`: what keeps the game from being well. `connected`: the `model_id`s connected now.

    The callables are asked on the event loop, often, and must be quick.
    """

    def __init__(
        self,
        config: Config,
        clock: Clock,
        started_at_s: float,
        problems: Callable[[], Sequence[Problem]],
        feeds: Callable[[], Sequence[FeedState]],
        connected: Callable[[], Set[str]],
        vitals: Callable[[], Vitals],
        news: News,
    ) -> None:
        self.config = config
        self.clock = clock
        self.started_at_s = started_at_s
        self.problems = problems
        self.feeds = feeds
        self.connected = connected
        self.vitals = vitals
        self.news = news
        self.leaderboard: Leaderboard | None = None

    def publish(self, leaderboard: Leaderboard) -> None:
        """Let the API serve this leaderboard from the next request on.

        It costs nothing here: the bodies are made from it once, off the event loop, at the first request.
        """
        self.leaderboard = leaderboard
