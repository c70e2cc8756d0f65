"""The scoring loop: closed rounds are checked, resolved rounds are scored, and the leaderboard follows.

It may be stopped, killed and run again at any time. Nothing heavy runs on the event loop: answers are decoded
and scored in the process pool, what concerns many models is computed in a thread.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import structlog

from condor_lite.clock import Clock
from condor_lite.config import Config
from condor_lite.game.entities import Leaderboard
from condor_lite.game.scoring import Rules, load_rule
from condor_lite.news import ScoresCycled, Tell, ignore
from condor_lite.pool import ScoringPool
from condor_lite.scorer import Checked, PricesWait, Scorer, ignore_checked, no_prices_wait
from condor_lite.storage import rescores, scores
from condor_lite.storage.database import Database

log = structlog.get_logger()


def configured_rules(config: Config) -> Rules:
    """The rules as the config says them; a rescore may have chosen others (`rescores.in_force`)."""
    return Rules(
        rule=config.scoring.rule,
        target=config.scoring.target,
        log_halfwidth_bp=config.scoring.log_halfwidth,
        max_components=config.scoring.max_components,
        max_segment_bytes=config.predict.max_segment_bytes,
        tick_s=config.feed.tick_s,
        max_staleness_s=config.feed.max_staleness_s,
    )


class ScoreLoop:
    """One game's scoring. `on_leaderboard(leaderboard)` is called on the event loop with each new one, and
    `on_checked` when a round's answers have been looked into; `tell` is told of rounds and cycles.

    `finish()` may be called while `run()` runs or when it does not, but `run()` must not end during it.
    """

    def __init__(
        self,
        config: Config,
        clock: Clock,
        db: Database,
        on_leaderboard: Callable[[Leaderboard], None],
        on_checked: Checked = ignore_checked,
        tell: Tell = ignore,
        prices_wait: PricesWait = no_prices_wait,
    ) -> None:
        self._config = config
        self._clock = clock
        self._db = db
        self._on_leaderboard = on_leaderboard
        self._on_checked = on_checked
        self._tell = tell
        self._prices_wait = prices_wait
        self._news = asyncio.Event()
        self._turn = asyncio.Lock()
        self._scorer: Scorer | None = None
        self._pool: ScoringPool | None = None

    @property
    def waiting(self) -> int:
        """How many answers no process has taken up yet."""
        return self._pool.waiting if self._pool is not None else 0

    def wake(self) -> None:
        """Something may be due: a round closed, or prices arrived."""
        self._news.set()

    async def run(self) -> None:
        """Score what becomes due until cancelled. Started again after a failure, it goes on where it was.

        Raises StartError or RuleError where the rule can't be used.
        """
        while True:  # with other rules, everything is made anew
            await self._run_one_scorer()

    async def _run_one_scorer(self) -> None:
        async with AsyncExitStack() as stack:
            with self._clock.hold():
                async with self._turn:
                    scorer = self._scorer = await self._start(stack)
            stack.callback(self._forget)
            while True:
                begun_s = self._clock.now()
                self._news.clear()
                with self._clock.hold():
                    async with self._turn:
                        if self._scorer is not scorer:
                            return
                        turn_s = time.monotonic()
                        next_s = await scorer.cycle()
                        self._tell(ScoresCycled(time.monotonic() - turn_s))
                # The interval is the wall's; a stepped clock stands in for that, too.
                pause_s = self._config.scoring.interval_s * self._clock.speed
                await self._clock.sleep_until(begun_s + pause_s)
                await self._news_or(next_s)

    async def finish(self) -> None:
        """Score what is due now, and return when it is stored."""
        with self._clock.hold():
            async with self._turn, AsyncExitStack() as stack:
                scorer = self._scorer or await self._start(stack)
                await scorer.cycle()

    async def live_first(self) -> None:
        """Return once no live round is being scored."""
        async with self._turn:
            pass

    @asynccontextmanager
    async def standing_still(self) -> AsyncIterator[None]:
        """Inside, no live round is scored. Whoever changes the scorer in there says so with `replaced`."""
        async with self._turn:
            yield

    def replaced(self, leaderboard: Leaderboard) -> None:
        """Another scorer is published: `leaderboard` is its first, and live rounds are scored by it."""
        self._scorer = None
        self._on_leaderboard(leaderboard)
        self._news.set()

    async def _start(self, stack: AsyncExitStack) -> Scorer:
        scoring = self._config.scoring
        configured = configured_rules(self._config)
        rules = await self._db.read(rescores.in_force, configured)
        if rules != configured:
            log.warning(
                "rule_by_rescore",
                in_force=rules.rule,
                config=configured.rule,
                do=f'set scoring.rule = "{rules.rule}" to keep it, or rescore --rule {configured.rule}',
            )
        # In a thread, as a host's own rule is imported here.
        info, fingerprint = await asyncio.to_thread(lambda: (load_rule(rules.rule), rules.fingerprint()))
        self._pool = pool = await stack.enter_async_context(
            ScoringPool(scoring.workers, rules, scoring.time_limit_s)
        )
        before = await self._db.read(rescores.newest_version)
        version = await self._db.write(
            scores.current_scorer,
            rules.rule,
            rules.target,
            fingerprint,
            self._clock.now(),
            rescores.dump_rules(rules),
        )
        if 0 < before < version:
            log.warning(
                "scoring_rules_changed",
                scorer_version=version,
                windows="count only rounds that are scored from now on",
                do="run `condor-lite rescore` to score the stored ones again",
            )
        return Scorer(
            self._config,
            self._clock,
            self._db,
            pool,
            info,
            version,
            self._on_leaderboard,
            self._on_checked,
            self._tell,
            self._prices_wait,
        )

    def _forget(self) -> None:
        self._scorer = self._pool = None

    async def _news_or(self, at_s: float) -> None:
        """Return when there is news, or at `at_s`."""
        waits = [
            asyncio.ensure_future(self._news.wait()),
            asyncio.ensure_future(self._clock.sleep_until(at_s)),
        ]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
