"""What is read out of answers once more, in a process that can't hold anything up."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from condor_lite.game.families import Floats
from condor_lite.game.scoring import Rules, SegmentScores
from condor_lite.pool import ScoringPool
from condor_lite.worker import ScoringItem, ValidationItem

_STAYS_S = 300.0


class Recount:
    """Within the limits of live scoring. The process stays for a while: questions often follow each other."""

    def __init__(self, time_limit_s: float) -> None:
        self._time_limit_s = time_limit_s
        self._pool: ScoringPool | None = None
        self._rules: Rules | None = None
        self._staying: asyncio.Task[None] | None = None
        self._until_s = 0.0

    async def scores(self, rules: Rules, item: ScoringItem) -> SegmentScores | str:
        """What one answer's score is made of, or why it has none. One caller at a time.

        Raises CondorError where the rule can't be loaded, or the process does not stay alive.
        """
        async with self._pool_for(rules) as pool:
            return await pool.explain(item)

    async def fan(self, rules: Rules, item: ValidationItem) -> Floats | str:
        """The same for the quantiles that one answer's fan is drawn from."""
        async with self._pool_for(rules) as pool:
            return await pool.fan(item)

    @asynccontextmanager
    async def _pool_for(self, rules: Rules) -> AsyncIterator[ScoringPool]:
        self._until_s = math.inf
        try:
            if rules != self._rules and self._staying is not None:
                self._staying.cancel()
                await asyncio.wait({self._staying})
            if self._pool is None:
                pool = await ScoringPool(1, rules, self._time_limit_s).__aenter__()
                self._pool, self._rules = pool, rules
                self._staying = asyncio.create_task(self._stay(pool), name="recount")
            yield self._pool
        finally:
            self._until_s = asyncio.get_running_loop().time() + _STAYS_S

    async def _stay(self, pool: ScoringPool) -> None:
        try:
            while (left_s := self._until_s - asyncio.get_running_loop().time()) > 0:  # noqa: ASYNC110 - it moves
                await asyncio.sleep(min(left_s, _STAYS_S))
        finally:
            self._pool = None
            await pool.__aexit__(None, None, None)
