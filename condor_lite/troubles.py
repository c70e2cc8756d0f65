"""Rounds that could not be scored, for a reason of their own: tried again later, and void in the end."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import structlog

from condor_lite.clock import Clock
from condor_lite.errors import StorageError
from condor_lite.game.entities import Round
from condor_lite.pool import PoolError

log = structlog.get_logger()

_TRIES = 5
_RETRY_FIRST_S = 10.0  # on the wall; doubled with each try
_OURS = (sqlite3.OperationalError, StorageError, PoolError, OSError)  # no round is to blame for these


@dataclass(frozen=True, slots=True)
class Trouble:
    """What went wrong with a round, how often, and when it is tried again (the game's time)."""

    reason: str
    tries: int
    retry_at_s: float

    @property
    def is_final(self) -> bool:
        return self.tries >= _TRIES


class Troubles(dict[int, Trouble]):
    """The rounds in trouble, by `round_no`."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    @contextmanager
    def blaming(self, round_: Round) -> Iterator[None]:
        """What goes wrong with one round is that round's: it is tried again later, and the others go on."""
        try:
            yield
        except _OURS:
            raise
        except Exception as error:
            assert round_.round_no is not None, "a stored round has a number"
            before = self.get(round_.round_no)
            tries = before.tries + 1 if before else 1
            pause_s = _RETRY_FIRST_S * 2 ** (tries - 1)
            retry_at_s = self._clock.now() + pause_s * self._clock.speed
            reason = f"scoring failed: {type(error).__name__}: {error}"
            self[round_.round_no] = Trouble(reason, tries, retry_at_s)
            log.exception("round_not_scored", round_id=round_.round_id, tries=tries, retry_in_s=pause_s)

    def sort(self, rounds: Iterable[Round]) -> tuple[list[Round], list[tuple[Round, str]]]:
        """Those worth a try now, and those that failed for good, with the reason."""
        worth, failed = [], []
        for round_ in rounds:
            assert round_.round_no is not None, "a stored round has a number"
            trouble = self.get(round_.round_no)
            if trouble is not None and trouble.is_final:
                failed.append((round_, trouble.reason))
            elif trouble is None or self._clock.now() >= trouble.retry_at_s:
                worth.append(round_)
        return worth, failed
