"""What happens in the game, told to whoever listens: the event stream and the metrics.

Telling costs microseconds and never fails, so that the game does not depend on who listens, or on anybody.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import structlog

from condor_lite.game.entities import AnswerStatus, ModelInfo, Round

log = structlog.get_logger()

H = TypeVar("H")


@dataclass(frozen=True, slots=True)
class PricesCame:
    """New prices of these assets are in the book."""

    assets: frozenset[str]


@dataclass(frozen=True, slots=True)
class RoundsOpened:
    rounds: Sequence[Round]


@dataclass(frozen=True, slots=True)
class RoundsNotHeld:
    """They are missed or skipped. After the process was down it may be a great many."""

    rounds: Sequence[Round]


@dataclass(frozen=True, slots=True)
class RoundClosed:
    """No more answers are taken; it may be void. It is on disk."""

    round: Round


@dataclass(frozen=True, slots=True)
class RoundSettled:
    """It is scored, or void after all. It is on disk."""

    round: Round


@dataclass(frozen=True, slots=True)
class AnswerStored:
    """On disk, `after_s` (wall) after its round was opened; silence until the deadline is an answer, too."""

    status: AnswerStatus
    exec_time_us: int
    after_s: float


@dataclass(frozen=True, slots=True)
class AnswersInvalid:
    """So many stored answers of one round turned out to be none: their status is FAILED from now on."""

    count: int


@dataclass(frozen=True, slots=True)
class ModelJoined:
    info: ModelInfo


@dataclass(frozen=True, slots=True)
class ModelLeft:
    info: ModelInfo


@dataclass(frozen=True, slots=True)
class ModelGivenUp:
    """It is not asked any more until it comes back by itself, or a new version of it does."""

    info: ModelInfo
    reason: str


@dataclass(frozen=True, slots=True)
class ScoresCycled:
    """A cycle of the scoring loop took so long (wall)."""

    took_s: float


@dataclass(frozen=True, slots=True)
class LeaderboardMade:
    as_of_s: float


@dataclass(frozen=True, slots=True)
class ServiceRestarted:
    """`error`: why it had failed."""

    service: str
    error: str


@dataclass(frozen=True, slots=True)
class LoopLate:
    """The event loop was late by so much at one beat of the watchdog (wall)."""

    by_s: float


Tell = Callable[[object], None]
"""Called on the event loop with one of the above."""


def ignore(happening: object) -> None:
    """For parts that nobody listens to."""


class News:
    """One game's."""

    def __init__(self) -> None:
        self._listeners: defaultdict[type, list[Callable[[Any], None]]] = defaultdict(list)

    def listen(self, kind: type[H], listener: Callable[[H], None]) -> None:
        """Have `listener` called with each happening of this kind. It must be quick."""
        self._listeners[kind].append(listener)

    def tell(self, happening: object) -> None:
        for listener in self._listeners[type(happening)]:
            try:
                listener(happening)
            except Exception:
                log.exception("listener_failed", happening=type(happening).__name__)
