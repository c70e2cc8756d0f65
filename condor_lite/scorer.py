"""What a scoring cycle does: check answers, settle and score rounds, keep the leaderboard (`board`).

A round's scores are one transaction, and a second time nothing is stored: a cycle may be cut off anywhere.
"""

from __future__ import annotations

import asyncio
import math
import sqlite3
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence, Set
from contextlib import aclosing
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import structlog

from condor_lite.board import Board
from condor_lite.clock import Clock
from condor_lite.config import Config
from condor_lite.game.calibration import RoundCalibration
from condor_lite.game.entities import Leaderboard, Round, RoundScores, RoundStatus, RuleInfo, VoidRound
from condor_lite.game.outcome import SCORE, WAIT, Realised, Series, realise, verdict
from condor_lite.game.rounds import score_round
from condor_lite.game.windows import HOUR_S
from condor_lite.news import AnswersInvalid, RoundSettled, Tell, ignore
from condor_lite.pool import ScoringPool
from condor_lite.storage import repositories, rescores, scores
from condor_lite.storage.calibration import add_calibration
from condor_lite.storage.compression import whole_bytes
from condor_lite.storage.database import Database
from condor_lite.troubles import Troubles
from condor_lite.worker import ScoringItem, ValidationItem

log = structlog.get_logger()

_Answers = tuple[Round, dict[int, bytes]]  # a round and its payloads by `model_no`, as they are stored

_PAGE = 256  # rounds looked at together
_GROUP_BYTES = 24 * 2**20  # answers in the pool at a time; as many are read, made ready and stored meanwhile
_ANSWER_BYTES = 4096  # what an answer counts as besides its payload: small ones are work, too


@dataclass(frozen=True, slots=True)
class _Task:
    """A round that can be scored: what happened, whom it counts for, and their answers (by `model_no`).

    `unchecked`: nobody has looked into its answers yet.
    """

    round: Round
    realised: Realised
    counted: dict[int, bool]
    payloads: dict[int, bytes]
    unchecked: bool


@dataclass(frozen=True, slots=True)
class _Scored:
    """A round's answers scored, in their order: raw scores, calibration sums, failures by `model_no`."""

    task: _Task
    raw: npt.NDArray[np.float64]
    calibration: npt.NDArray[np.float64]
    failures: dict[int, str]


PricesWait = Callable[[], bool]
"""Whether prices are at hand that the database lacks: until it has them, no round is settled."""

Checked = Callable[[Set[int], Mapping[int, str]], None]
"""Called with the `model_no`s of a round's valid answers, and the reasons of its invalid ones."""


def ignore_checked(valid: Set[int], invalid: Mapping[int, str]) -> None:
    """For scorers that nobody listens to."""


def no_prices_wait() -> bool:
    """For scorers of prices that are all stored."""
    return False


class Scorer:
    """The scoring's state between two cycles. All of it can be made anew from the database."""

    def __init__(
        self,
        config: Config,
        clock: Clock,
        db: Database,
        pool: ScoringPool,
        info: RuleInfo,
        version: int,
        on_leaderboard: Callable[[Leaderboard], None],
        on_checked: Checked = ignore_checked,
        tell: Tell = ignore,
        prices_wait: PricesWait = no_prices_wait,
        *,
        again: bool = False,
    ) -> None:
        """`again`: it scores scored rounds once more (`score_again`), and changes nothing but the scores."""
        self._again = again
        self._config = config
        self._clock = clock
        self._db = db
        self._pool = pool
        self._info = info
        self._version = version
        self._on_checked = on_checked
        self._tell = tell
        self._prices_wait = prices_wait
        self._troubles = Troubles(clock)
        self.board = Board(config, clock, db, info, version, on_leaderboard)

    async def cycle(self) -> float:
        """Do all that is due now; the game's time at which more becomes due without any news."""
        done: Counter[str] = Counter()
        try:
            if not self.board.is_current:
                await self.board.publish(changed=True)
            await self._validate(done)
            pending_s = await self._settle(done)
            await self.board.publish(changed=bool(done))
            await self.board.keep()
        except BaseException:
            self.board.distrust()
            raise
        if done:
            log.debug("scores", **done)
            self.board.tell_leader()
        now_s, every_s = self._clock.now(), self._config.scoring.snapshot_interval_s
        return min(pending_s, (now_s // HOUR_S + 1) * HOUR_S, (now_s // every_s + 1) * every_s)

    async def score_again(self, rounds: Sequence[Round]) -> int:
        """Score settled rounds under this scorer's version, too; how many answers that were.

        A round that can't be scored is left out, with the reason. What has become of models since counts:
        benchmarks are those of today.
        """
        done: Counter[str] = Counter()
        await self.board.load_models()
        answers = await self._score(rounds, frozenset(), done)
        for round_no, trouble in self._troubles.items():
            await self._db.write(rescores.leave_out, round_no, self._version, trouble.reason)
        self._troubles.clear()
        return answers

    # Checking answers

    async def _validate(self, done: Counter[str]) -> None:
        """Look into the answers of closed rounds, so that a participant soon knows what was wrong.

        Those that can be scored already are left to that.
        """
        while True:
            limit = _PAGE + len(self._troubles)
            due_s = self._clock.now() - self._config.scoring.settle_delay_s
            found = await self._db.read(repositories.rounds_to_validate, due_s, limit)
            rounds: Sequence[Round] = await self._worth_a_try(found, done)
            if not rounds:
                return
            await self._check_all(rounds, done)

    async def _check_all(self, rounds: Sequence[Round], done: Counter[str]) -> None:
        async with aclosing(self._groups(rounds)) as groups:
            async for group in groups:
                await self._check(group, done)

    async def _check(self, group: Sequence[_Answers], done: Counter[str]) -> None:
        items = []
        for round_, payloads in group:
            unit = await self._scale_unit(round_)
            items += [ValidationItem(payload, round_.setting, unit) for payload in payloads.values()]
        invalid = _by_round(group, await self._pool.validate(items))
        for (round_, payloads), reasons in zip(group, invalid, strict=True):
            with self._troubles.blaming(round_):
                await self._db.write(repositories.save_validation, _no(round_), reasons)
                self._tell_checked(round_, payloads, reasons, done)

    def _tell_checked(
        self, round_: Round, payloads: Mapping[int, bytes], reasons: Mapping[int, str], done: Counter[str]
    ) -> None:
        self._on_checked(payloads.keys() - reasons.keys(), reasons)
        if reasons:
            done["invalid"] += len(reasons)
            self._tell(AnswersInvalid(len(reasons)))
            log.debug("answers_invalid", round_id=round_.round_id, models=list(reasons))

    async def _scale_unit(self, round_: Round) -> float:
        """What bounds on scales are multiples of: `P(t0)` where price changes are asked for, otherwise 1."""
        if self._config.scoring.target != "price_change":
            return 1.0
        at_s = round_.scheduled_at_s
        _, prices = await self._db.read(
            repositories.load_prices, round_.asset, at_s - self._config.feed.max_staleness_s, at_s
        )
        return float(prices[-1]) if len(prices) else 1.0

    # Settling rounds

    async def _settle(self, done: Counter[str]) -> float:
        """Score or void what can be; the game's time at which the next round becomes due."""
        scoring = self._config.scoring
        waiting: dict[int, Round] = {}
        seen: set[int] = set()
        while True:
            now_s = self._clock.now()
            until_s = now_s - scoring.settle_delay_s
            limit = _PAGE + len(waiting) + len(self._troubles)
            found = await self._db.read(scores.rounds_to_settle, until_s, limit)
            new = [round_ for round_ in found if _no(round_) not in seen]
            if not new:
                break
            seen.update(_no(round_) for round_ in new)
            new = await self._worth_a_try(new, done)
            unchecked = await self._db.read(repositories.not_validated, [_no(round_) for round_ in new])
            if self._prices_wait():
                return now_s + scoring.interval_s * self._clock.speed
            newest_s = await self._db.read(_newest_prices_s, {round_.asset for round_ in new})
            decisions = [
                verdict(
                    newest_s[round_.asset],
                    now_s,
                    round_,
                    settle_delay_s=scoring.settle_delay_s,
                    void_after_s=scoring.void_after_s,
                    leapt_to_s=self._clock.leapt_to_s,
                )
                for round_ in new
            ]
            decided = list(zip(new, decisions, strict=True))
            others = [round_ for round_, decision in decided if decision != SCORE]
            await self._check_all([round_ for round_ in others if _no(round_) in unchecked], done)
            for round_, decision in decided:
                if decision == WAIT:
                    waiting[_no(round_)] = round_
                elif decision != SCORE:
                    await self._void(round_, decision, done)
            ready = [round_ for round_, decision in decided if decision == SCORE]
            await self._score(ready, unchecked, done)
            pause_s = scoring.interval_s * self._clock.speed
            if len(found) == limit and now_s - self.board.published_s >= pause_s:
                await self.board.publish(changed=True)  # a long backlog shows as it shrinks

        # What is left of the rounds that are due already stands before those that are not.
        left = len(waiting) + len(self._troubles)
        coming = await self._db.read(scores.rounds_to_settle, math.inf, left + 1)
        times_s: list[float] = [
            round_.resolvable_at_s + scoring.settle_delay_s
            for round_ in coming
            if round_.resolvable_at_s > until_s
        ]
        times_s += [
            max(round_.resolvable_at_s, self._clock.leapt_to_s) + scoring.void_after_s
            for round_ in waiting.values()
        ]
        times_s += [trouble.retry_at_s for trouble in self._troubles.values()]
        return min(times_s, default=math.inf)

    async def _score(self, rounds: Sequence[Round], unchecked: Set[int], done: Counter[str]) -> int:
        """Score rounds in groups, one being stored while the next is in the pool and the one after that is
        made ready; how many answers it were.

        `unchecked`: the `round_no`s of those whose answers nobody has looked into yet.
        """
        answers = 0
        scoring: asyncio.Task[list[_Scored]] | None = None
        storing: asyncio.Task[None] | None = None
        try:
            async with aclosing(self._groups(rounds)) as groups:
                async for group in groups:
                    answers += sum(len(payloads) for _, payloads in group)
                    tasks = await self._tasks(group, unchecked, done)
                    scored = await scoring if scoring is not None else []
                    scoring = asyncio.create_task(self._evaluate(tasks))
                    if storing is not None:
                        await storing
                    storing = asyncio.create_task(self._save_all(scored, done))
            if scoring is not None and storing is not None:
                await storing
                await self._save_all(await scoring, done)
        finally:
            begun = [task for task in (scoring, storing) if task is not None]
            for task in begun:
                task.cancel()
            await asyncio.gather(*begun, return_exceptions=True)
        return answers

    async def _tasks(self, group: Sequence[_Answers], unchecked: Set[int], done: Counter[str]) -> list[_Task]:
        """What there is to score of a group; rounds that can't be are void from here on."""
        series = await self._series([round_ for round_, _ in group])
        tasks: list[_Task] = []
        for round_, payloads in group:
            with self._troubles.blaming(round_):
                realised = await asyncio.to_thread(self._realise, series[round_.asset], round_)
                is_unchecked = _no(round_) in unchecked
                if realised.void_reason is not None:
                    if is_unchecked:
                        await self._check([(round_, payloads)], done)
                    await self._void(round_, realised.void_reason, done)
                    continue
                counted = await self._db.read(scores.counted_models, _no(round_))
                tasks.append(_Task(round_, realised, counted, payloads, is_unchecked))
        return tasks

    async def _evaluate(self, tasks: Sequence[_Task]) -> list[_Scored]:
        """Score rounds together."""
        items = [
            ScoringItem(payload, task.round.setting, task.realised)
            for task in tasks
            for payload in task.payloads.values()
        ]
        raw, calibration, reasons = await self._pool.score(items)
        begin = 0
        scored = []
        failed = _by_round([(task.round, task.payloads) for task in tasks], reasons)
        for task, failures in zip(tasks, failed, strict=True):
            end = begin + len(task.payloads)
            scored.append(_Scored(task, raw[begin:end], calibration[begin:end], failures))
            begin = end
        return scored

    async def _save_all(self, scored: Sequence[_Scored], done: Counter[str]) -> None:
        for one in scored:
            with self._troubles.blaming(one.task.round):
                await self._save(one, done)

    async def _save(self, scored: _Scored, done: Counter[str]) -> None:
        task, failures = scored.task, scored.failures
        round_, realised = task.round, task.realised
        values: dict[int, float | None] = dict.fromkeys(task.counted)
        answers = dict(zip(task.payloads, scored.raw.tolist(), strict=True))
        values.update((model_no, value) for model_no, value in answers.items() if model_no not in failures)
        benchmarks = {model.model_no for model in self.board.models if model.info.benchmark}
        result = await asyncio.to_thread(score_round, values, benchmarks, realised.no_move, self._info)
        added = _calibration(task, scored.calibration, failures)
        at_ms = int(self._clock.now() * 1000)
        saved, times = await self._db.write(
            _store, task, failures, result, self._version, added, at_ms, self._again
        )
        self._troubles.pop(_no(round_), None)
        if self._again:
            return
        if saved and not isinstance(result, VoidRound):
            await self.board.add(round_, result, added, times)
        if task.unchecked:
            self._tell_checked(round_, task.payloads, failures, done)
        elif failures:
            done["invalid"] += len(failures)
            self._tell(AnswersInvalid(len(failures)))
            log.warning("answers_not_scored", round_id=round_.round_id, reasons=dict(failures))
        settled = replace(
            round_, answered=round_.answered - len(failures), failed=round_.failed + len(failures)
        )
        if isinstance(result, VoidRound):
            done["void"] += 1
            log.info("round_void", round_id=round_.round_id, reason=result.reason)
            self._tell(RoundSettled(replace(settled, status=RoundStatus.VOID, reason=result.reason)))
        elif saved:
            done["rounds"] += 1
            done["answers"] += len(answers) - len(failures)
            log.debug("round_scored", round_id=round_.round_id, answers=len(answers), median=result.median)
            self._tell(RoundSettled(replace(settled, status=RoundStatus.SCORED)))

    async def _void(self, round_: Round, reason: str, done: Counter[str]) -> None:
        if self._again:
            await self._db.write(rescores.leave_out, _no(round_), self._version, f"void: {reason}")
            return
        settled = await self._db.write(_void, _no(round_), reason)
        self._troubles.pop(_no(round_), None)
        done["void"] += 1
        log.info("round_void", round_id=round_.round_id, reason=reason)
        self._tell(RoundSettled(settled))

    async def _series(self, rounds: Iterable[Round]) -> dict[str, Series]:
        """Each asset's prices over all that its rounds span, read once."""
        spans: dict[str, tuple[int, int]] = {}
        for round_ in rounds:
            from_s = round_.scheduled_at_s - self._config.feed.max_staleness_s
            before = spans.get(round_.asset, (from_s, round_.resolvable_at_s))
            spans[round_.asset] = (min(before[0], from_s), max(before[1], round_.resolvable_at_s))
        return {
            asset: (await self._db.read(repositories.load_series, asset, *span))[0]
            for asset, span in spans.items()
        }

    def _realise(self, series: Series, round_: Round) -> Realised:
        """The outcome, from the round's own span: what else is scored along with it makes no difference."""
        return realise(
            series.since(round_.scheduled_at_s - self._config.feed.max_staleness_s),
            round_.setting,
            round_.scheduled_at_s,
            self._config.feed.tick_s,
            self._config.scoring.target,
        )

    async def _groups(self, rounds: Sequence[Round]) -> AsyncGenerator[list[_Answers], None]:
        """The rounds with their payloads, in groups; the next one is read while a group is worked on."""
        coming: asyncio.Task[tuple[list[_Answers], Sequence[Round]]] | None = None
        try:
            while rounds:
                coming = coming or asyncio.create_task(self._with_payloads(rounds))
                group, rounds = await coming
                coming = asyncio.create_task(self._with_payloads(rounds)) if rounds else None
                yield group
        finally:
            if coming is not None:
                coming.cancel()
                await asyncio.gather(coming, return_exceptions=True)

    async def _with_payloads(self, rounds: Sequence[Round]) -> tuple[list[_Answers], Sequence[Round]]:
        """The first rounds with their payloads, as many as may be held at a time, and the other rounds."""
        group: list[_Answers] = []
        size = 0
        for place, round_ in enumerate(rounds):
            if size >= _GROUP_BYTES:
                return group, rounds[place:]
            with self._troubles.blaming(round_):
                read = rescores.payloads if self._again else repositories.payloads
                payloads = await self._db.read(read, _no(round_))
                group.append((round_, payloads))
                size += sum(_ANSWER_BYTES + whole_bytes(payload) for payload in payloads.values())
        return group, []

    async def _worth_a_try(self, rounds: Iterable[Round], done: Counter[str]) -> list[Round]:
        """Those not in trouble, or with another try due. One that failed for good is void."""
        worth, failed = self._troubles.sort(rounds)
        for round_, reason in failed:
            await self._void(round_, reason, done)
        return worth


def _calibration(task: _Task, sums: npt.NDArray[np.float64], failures: Mapping[int, str]) -> RoundCalibration:
    """What a round adds to the calibration of those whose answers it scored."""
    scored = [place for place, model_no in enumerate(task.payloads) if model_no not in failures]
    model_no = list(task.payloads)
    resolved = np.isfinite(task.realised.increments)
    return RoundCalibration(
        model_no=[model_no[place] for place in scored],
        sums=sums[scored],
        ends_s=task.realised.boundary_ts_s[1:][resolved],
    )


def _no(round_: Round) -> int:
    assert round_.round_no is not None, "a stored round has a number"
    return round_.round_no


def _by_round(group: Sequence[_Answers], reasons: Mapping[int, str]) -> list[dict[int, str]]:
    """Reasons by an answer's place among all of the group's -> for each round, by `model_no`."""
    owners = [(place, model_no) for place, (_, payloads) in enumerate(group) for model_no in payloads]
    found: list[dict[int, str]] = [{} for _ in group]
    for index, reason in sorted(reasons.items()):
        place, model_no = owners[index]
        found[place][model_no] = reason
    return found


# Transactions


def _newest_prices_s(conn: sqlite3.Connection, assets: Iterable[str]) -> dict[str, int | None]:
    return {asset: repositories.newest_price_s(conn, asset) for asset in assets}


def _void(conn: sqlite3.Connection, round_no: int, reason: str) -> Round:
    """The round as it is then."""
    scores.void_round(conn, round_no, reason)
    return repositories.select_rounds(conn, "round_no = ?", (round_no,))[0]


def _store(
    conn: sqlite3.Connection,
    task: _Task,
    failures: Mapping[int, str],
    result: RoundScores | VoidRound,
    version: int,
    calibration: RoundCalibration,
    at_ms: int,
    again: bool,
) -> tuple[bool, npt.NDArray[np.float64]]:
    """All that came of a round, in one transaction: whether it was not scored before, and what
    `add_calibration` returns.
    """
    nothing, round_no = np.zeros(0), _no(task.round)
    resolved = len(calibration.ends_s)
    if again:
        if isinstance(result, VoidRound):
            rescores.leave_out(conn, round_no, version, f"void: {result.reason}")
            return False, nothing
        details = {model_no: f"invalid: {reason}" for model_no, reason in failures.items()}
        if not scores.save_round_scores(conn, round_no, version, result, resolved, at_ms, details):
            return False, nothing
        return True, add_calibration(conn, round_no, version, calibration)
    if failures or task.unchecked:
        repositories.save_validation(conn, round_no, failures)
    if isinstance(result, VoidRound):
        scores.void_round(conn, round_no, result.reason)
        return True, nothing
    if not scores.save_round_scores(conn, round_no, version, result, resolved, at_ms):
        return False, nothing
    return True, add_calibration(conn, round_no, version, calibration)
