"""Scoring again, under a new scorer version, while the game goes on or without one.

Live rounds come first: before each step it waits until none is being scored, and its workers only take what
the others leave of the processors. What it has done is in the database after each round, so it may be cut off
anywhere and resumed, or forgotten. Nothing of it shows until the switch, which is one transaction.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import structlog

from condor_lite.clock import Clock
from condor_lite.config import Config
from condor_lite.config_values import WrongValueError, read_when
from condor_lite.errors import CondorError
from condor_lite.game.entities import Leaderboard, Round, Window
from condor_lite.game.outcome import realise
from condor_lite.game.scoring import Rules, load_rule
from condor_lite.game.windows import window_start_s
from condor_lite.pool import ScoringPool
from condor_lite.score import ScoreLoop, configured_rules
from condor_lite.scorer import Scorer
from condor_lite.storage import rescores
from condor_lite.storage.database import Database
from condor_lite.storage.repositories import load_series
from condor_lite.storage.rescores import BEFORE_ALL, Candidate, Counts, Pending

log = structlog.get_logger()

_PAGE = 16  # rounds a step: live rounds wait for nothing, but a step's answers are read at once
_POLITENESS = 19
_SWITCHES = 5  # tries: only a round scored in between makes one fail, and none is
_FORGOTTEN = 20  # rounds a step

NO_PRICES = "its prices are not stored any more, and its scores are by other rules"
NO_ANSWERS = "its answers are not stored any more, and its scores are by other rules"
BEFORE_SINCE = "it is from before --since, and its scores are by other rules"


class RescoreError(CondorError):
    """Scoring again can't be done as it was asked for; the message says why."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How a rescore stands. `state`: idle, running, done, failed, interrupted or forgetting.

    `rate`: answers a second of this run; `left_out`: rounds by reason; `remark`: what the host must know.
    """

    state: str
    scorer_version: int = 0
    rule: str = ""
    since_s: int = 0
    rounds: int = 0
    done: int = 0
    scored: int = 0
    carried: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    rate: float = 0.0
    eta_s: float | None = None
    remark: str = ""


@dataclass(slots=True)
class _Run:
    """One run of a rescore, for its progress."""

    job: Pending
    counts: Counts
    started_s: float
    done_before: int
    answers: int = 0


class Rescorer:
    """One game's rescores. `run()` carries out what the commands ask for; without it, `carry_out` does."""

    def __init__(self, config: Config, clock: Clock, db: Database, score: ScoreLoop) -> None:
        self._config = config
        self._clock = clock
        self._db = db
        self._score = score
        self._job: Pending | None = None
        self._run: _Run | None = None
        self._wanted = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._idle = asyncio.Event()
        self._end = Progress("idle")
        self._asking = asyncio.Lock()

    @property
    def commands(self) -> dict[str, Callable[..., Awaitable[object]]]:
        """What the control socket offers."""
        return {
            "rescore": self.rescore,
            "rescore_resume": self.resume,
            "rescore_forget": self.forget,
            "rescore_progress": self.progress,
        }

    async def run(self) -> None:
        """Carry out what is asked for, until cancelled."""
        if (left := await self._db.read(rescores.pending)) is not None and self._job is None:
            log.warning("rescore_interrupted", scorer_version=left.scorer_version, do=_WHAT_NOW)
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            if self._job is not None:
                self._idle.clear()
                self._task = asyncio.create_task(self._try(self._job))
                try:
                    await asyncio.wait({self._task})
                finally:
                    self._task.cancel()
                    await asyncio.gather(self._task, return_exceptions=True)
                    self._task = self._job = None
                    self._idle.set()

    # What can be asked for

    async def rescore(
        self, since: str | None = None, rule: str | None = None, target: str | None = None
    ) -> Progress:
        """Begin. Raises RescoreError where that is not possible, or makes no sense."""
        async with self._asking:
            if self._job is not None:
                raise RescoreError(f"a rescore is under way; {_SHOW_OR_END}")
            if await self._db.read(rescores.pending) is not None:
                raise RescoreError(f"there is an interrupted rescore: {_WHAT_NOW}")
            rules = self._rules(rule, target)
            fingerprint = await asyncio.to_thread(_checked, rules)
            now_s = self._clock.now()
            window_s = window_start_s(Window.ANCHOR, now_s)
            if since is None:
                oldest_s = await self._db.read(rescores.oldest_payload_s)
                since_s = window_s if oldest_s is None else min(window_s, oldest_s)
            else:
                since_s = read_since(since, now_s)
            can, otherwise = await self._db.read(rescores.worthwhile, rules.target, since_s)
            if not can:
                why = f"no round that was scored since {_shown(since_s)} can be scored again: "
                if otherwise:
                    why += (
                        f"{otherwise} were answered when scoring.target was another than {rules.target}, "
                        "and densities of the one can't be read as the other"
                    )
                else:
                    why += "there is none whose answers are still stored"
                raise RescoreError(why)
            job = await self._db.write(
                rescores.begin, rules, fingerprint, since_s, min(since_s, window_s), now_s
            )
            return await self._take_up(job)

    async def resume(self) -> Progress:
        """Go on with a rescore that was interrupted; one that is under way goes on by itself."""
        async with self._asking:
            if self._job is not None:
                return await self.progress()
            job = await self._db.read(rescores.pending)
            if job is None:
                raise RescoreError("there is no interrupted rescore to resume")
            if job.fingerprint == rescores.FORGOTTEN:
                raise RescoreError("this rescore is half forgotten: `condor-lite rescore --forget` ends that")
            newest = await self._db.read(rescores.newest_version)
            now = replace(configured_rules(self._config), rule=job.rules.rule)
            if newest > job.scorer_version or await asyncio.to_thread(_checked, now) != job.fingerprint:
                raise RescoreError(
                    "the rules of the game have changed since this rescore began, so it can't be resumed: "
                    "`condor-lite rescore --forget`, then begin a new one"
                )
            return await self._take_up(job)

    async def forget(self) -> str:
        """End a rescore without a switch, and delete what it has written."""
        async with self._asking:
            if self._task is not None:
                self._task.cancel()
                await asyncio.gather(self._task, return_exceptions=True)
                await self._idle.wait()
            self._job = None
            job = await self._db.read(rescores.pending)
            if job is None:
                raise RescoreError("there is no rescore to forget: none is under way or was interrupted")
            await self._db.write(rescores.begin_to_forget, job.scorer_version)
            after_no: int | None = -1
            while after_no is not None:
                after_no = await self._db.write(
                    rescores.forget_some, job.scorer_version, after_no, _FORGOTTEN
                )
            self._end = Progress("idle")
            log.info("rescore_forgotten", scorer_version=job.scorer_version)
            return f"the rescore under scorer version {job.scorer_version} is forgotten; nothing else changed"

    async def progress(self) -> Progress:
        """How the rescore stands that is under way, or how the last one ended."""
        if self._run is None:
            if self._job is not None:
                return Progress("running", self._job.scorer_version, self._job.rules.rule, self._job.since_s)
            if self._end.state == "idle" and (left := await self._db.read(rescores.pending)) is not None:
                return Progress(
                    "interrupted", left.scorer_version, left.rules.rule, left.since_s, remark=_WHAT_NOW
                )
            return self._end
        return self._progress(self._run, "running")

    def _rules(self, rule: str | None, target: str | None) -> Rules:
        configured = configured_rules(self._config)
        if target is not None and target != configured.target:
            raise RescoreError(
                f"--target {target}: the game's models are asked for densities of the {configured.target} "
                "(scoring.target), and those can't be read as anything else. Set scoring.target for the "
                "rounds to come; those before keep their scores"
            )
        return configured if rule is None else replace(configured, rule=rule)

    async def _take_up(self, job: Pending) -> Progress:
        self._job, self._end = job, Progress("idle")
        self._wanted.set()
        return await self.progress()

    # Doing it

    async def _try(self, job: Pending) -> None:
        try:
            await self.carry_out(job)
        except CondorError as error:
            self._end = Progress("failed", job.scorer_version, job.rules.rule, remark=f"{error}; {_WHAT_NOW}")
            log.error("rescore_failed", scorer_version=job.scorer_version, reason=str(error))
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            self._end = Progress(
                "failed", job.scorer_version, job.rules.rule, remark=f"{reason}; {_WHAT_NOW}"
            )
            log.exception("rescore_failed", scorer_version=job.scorer_version)

    async def carry_out(self, job: Pending) -> Progress:
        """Score what is left of `job`, and switch to it."""
        made: list[Leaderboard] = []
        scoring = self._config.scoring
        counts = await self._db.read(rescores.counts, job.scorer_version, job.from_s)
        run = self._run = _Run(job, counts, time.monotonic(), counts.done)
        log.info(
            "rescore_begins",
            scorer_version=job.scorer_version,
            rule=job.rules.rule,
            since=_shown(job.since_s),
            rounds=counts.left,
        )
        try:
            info = await asyncio.to_thread(load_rule, job.rules.rule)
            async with ScoringPool(
                scoring.workers, job.rules, scoring.time_limit_s, politeness=_POLITENESS
            ) as pool:
                scorer = Scorer(
                    self._config,
                    self._clock,
                    self._db,
                    pool,
                    info,
                    job.scorer_version,
                    made.append,
                    again=True,
                )
                for _ in range(_SWITCHES):
                    await self._catch_up(run, scorer, behind=True)
                    if await self._switch(run, scorer, made):
                        break
                else:
                    raise RescoreError("rounds were scored faster than they can be scored again")
            self._end = self._progress(run, "done", self._remark(job))
            log.info(
                "rescore_done",
                scorer_version=job.scorer_version,
                rounds=run.counts.scored,
                carried_over=run.counts.carried,
                left_out=run.counts.left_out,
            )
            return self._end
        finally:
            self._run = None

    async def _switch(self, run: _Run, scorer: Scorer, made: list[Leaderboard]) -> bool:
        job = run.job
        with self._clock.hold():
            async with self._score.standing_still():
                await self._catch_up(run, scorer, behind=False)
                await scorer.board.publish_anew()
                configured = configured_rules(self._config)
                switched = await self._db.write(rescores.switch, job, configured, made[-1])
                if switched:
                    self._score.replaced(made[-1])
                return switched

    async def _catch_up(self, run: _Run, scorer: Scorer, *, behind: bool) -> None:
        """Decide about all rounds that are left; `behind` live scoring, or while that stands still."""
        job, after = run.job, BEFORE_ALL
        while True:
            if behind:
                await self._score.live_first()
            with self._clock.hold():
                page = await self._db.read(rescores.candidates, job.scorer_version, job.from_s, after, _PAGE)
                if page:
                    run.answers += await self._decide(run, scorer, page)
                    after = (page[-1].round.resolvable_at_s, _no(page[-1].round))
            if not page:
                # Between the pages it is kept up by hand: counting reads every round.
                run.counts = await self._db.read(rescores.counts, job.scorer_version, job.from_s)
                return

    async def _decide(self, run: _Run, scorer: Scorer, page: Sequence[Candidate]) -> int:
        """Score rounds again, carry their scores over, or leave them out; how many answers were scored."""
        job = run.job
        again: list[Round] = []
        carried: list[int] = []
        left_out: list[tuple[int, str]] = []
        for one in page:
            is_old = one.round.resolvable_at_s < job.since_s
            if one.target != job.rules.target:
                reason = f"its answers are densities of the {one.target}"
                left_out.append((_no(one.round), reason))
                continue
            if is_old:
                reason = BEFORE_SINCE
            elif not one.has_payloads:
                reason = NO_ANSWERS
            elif await self._has_lost_prices(one, job):
                reason = NO_PRICES
            else:
                again.append(one.round)
                continue
            if is_comparable(one, job):
                carried.append(_no(one.round))
            else:
                left_out.append((_no(one.round), reason))
        if carried or left_out:
            await self._db.write(rescores.set_aside, job.scorer_version, carried, left_out)
        answers = await scorer.score_again(again) if again else 0
        counts = run.counts
        reasons = Counter(counts.left_out) + Counter(reason for _, reason in left_out)
        run.counts = Counts(
            max(counts.left - len(page), 0),
            counts.scored + len(again),
            counts.carried + len(carried),
            dict(reasons),
        )
        return answers

    async def _has_lost_prices(self, one: Candidate, job: Pending) -> bool:
        """Whether fewer of a round's segments have prices than when it was scored."""
        rules, round_ = one.rules or job.rules, one.round
        from_s = round_.scheduled_at_s - rules.max_staleness_s
        series, _ = await self._db.read(load_series, round_.asset, from_s, round_.resolvable_at_s)
        realised = await asyncio.to_thread(
            realise, series, round_.setting, round_.scheduled_at_s, rules.tick_s, rules.target
        )
        # Earlier versions took a change of the source for a move.
        between = 0 if one.rules else int(realised.between_sources.sum())
        return realised.resolved + between < one.resolved

    def _remark(self, job: Pending) -> str:
        configured = configured_rules(self._config)
        if job.rules.rule == configured.rule:
            return ""
        return (
            f"The game now scores by {job.rules.rule}, also after a restart. Its config still says "
            f'scoring.rule = "{configured.rule}": change that to "{job.rules.rule}", so that it says what is '
            "so; any other change of the scoring rules there ends it. To go back: condor-lite rescore"
        )

    def _progress(self, run: _Run, state: str, remark: str = "") -> Progress:
        counts = run.counts
        spent_s = max(time.monotonic() - run.started_s, 1e-3)
        rounds_a_s = (counts.done - run.done_before) / spent_s
        return Progress(
            state=state,
            scorer_version=run.job.scorer_version,
            rule=run.job.rules.rule,
            since_s=run.job.since_s,
            rounds=counts.done + counts.left,
            done=counts.done,
            scored=counts.scored,
            carried=counts.carried,
            left_out=counts.left_out,
            rate=run.answers / spent_s,
            eta_s=counts.left / rounds_a_s if rounds_a_s > 0 else None,
            remark=remark,
        )


def is_comparable(one: Candidate, job: Pending) -> bool:
    """Whether a round's scores mean the same as those of `job`, but for mistakes mended since: then they may
    be summed up with them.
    """
    if one.fingerprint == job.fingerprint:
        return True
    if (one.rule, one.target) != (job.rules.rule, job.rules.target) or ":" in one.rule:
        return False
    return one.rule != "log" or (
        one.rules is not None and one.rules.log_halfwidth_bp == job.rules.log_halfwidth_bp
    )


def read_since(text: str, now_s: float) -> int:
    """`--since`: an ISO time, or how long ago ("3d"), to epoch seconds. Raises RescoreError."""
    try:
        return read_when(text, now_s)
    except WrongValueError as error:
        raise RescoreError(f"--since {text[:40]!r}: {error}") from None


_WHAT_NOW = "`condor-lite rescore --resume` goes on with it, `condor-lite rescore --forget` deletes it"
_SHOW_OR_END = "`condor-lite rescore --resume` shows it, `condor-lite rescore --forget` ends it"


def _checked(rules: Rules) -> str:
    """The rules' fingerprint. Raises RuleError where the rule can't be used."""
    load_rule(rules.rule)
    return rules.fingerprint()


def _no(round_: Round) -> int:
    assert round_.round_no is not None, "a stored round has a number"
    return round_.round_no


def _shown(at_s: float) -> str:
    return datetime.fromtimestamp(at_s, UTC).strftime("%Y-%m-%d %H:%M UTC")
