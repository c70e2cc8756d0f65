"""The predict loop: holds the rounds on the grid, asks whoever is ready, and has the answers stored as they
come.

Nothing here waits for the database, the feed, the scoring or a model: writes go to the journal, and every
model has a lane of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial

import anyio
import structlog
from anyio.abc import TaskGroup

from condor_lite.clock import Clock
from condor_lite.config import Config
from condor_lite.game import schedule
from condor_lite.game.answer import ENVELOPE_BYTES
from condor_lite.game.entities import Answer, AnswerStatus, Model, ModelInfo, Round, RoundStatus, Setting
from condor_lite.lanes import NO_TIME_LEFT, Floor, Lane, OpenRound, Participant, Ticks
from condor_lite.models.fleet import Fleet
from condor_lite.models.runner import Connection, Outcome, Reply, predict_request
from condor_lite.news import (
    AnswerStored,
    ModelJoined,
    ModelLeft,
    RoundClosed,
    RoundsNotHeld,
    RoundsOpened,
    Tell,
    ignore,
)
from condor_lite.pacer import Waker
from condor_lite.prices.feed import Feed
from condor_lite.storage import repositories
from condor_lite.storage.database import Database
from condor_lite.storage.journal import Journal

log = structlog.get_logger()

_AFTER_THE_TICK_S = 0.005  # wall: the simulated prices of a round's time are in the book before it opens
_MISSED_BACK_S = 7 * 86400
_KNOWN_FOR_S = 7 * 86400
_WAKES_A_TURN = 32  # of lanes in one turn of the event loop
_HEARTBEAT_S = 30.0
_LANE_RESTART_S = 1.0
_ANSWER_BYTES = 1024  # of an answer that waits to be stored, beside its payload
_SUSPECT_FROM = 3  # models from which on a majority of time-outs is taken for our own fault
_SUSPECT_AT_MOST = 3  # times on end that the same models' silence is

_STATUS = {
    Outcome.SUCCESS: AnswerStatus.SUCCESS,
    Outcome.TIMEOUT: AnswerStatus.TIMEOUT,
    Outcome.BUSY: AnswerStatus.TIMEOUT,
}


class PredictLoop:
    """One game's rounds. `on_closed(round)` is called when a round is closed and stored; `tell` is told of
    rounds, answers and models.
    """

    def __init__(
        self,
        config: Config,
        clock: Clock,
        db: Database,
        journal: Journal,
        feed: Feed,
        orchestrator_port: int,
        on_closed: Callable[[Round], None],
        tell: Tell = ignore,
    ) -> None:
        self._config = config
        self._clock = clock
        self._db = db
        self._journal = journal
        self._feed = feed
        self._on_closed = on_closed
        self._tell = tell
        self.fleet = Fleet(config, orchestrator_port, self._serve, self._renamed, tell)
        self.participants: dict[str, Participant] = {}
        self.paused: dict[str, int] = {}
        """By `model_id`, since when (game's clock) the host has it paused: neither asked nor ticked."""
        self.open_rounds: list[OpenRound] = []
        self.late_s = 0.0
        """How late (wall) the newest rounds were opened."""
        self._floor = Floor(
            clock=clock,
            ticks=Ticks(feed.book, config.game.assets),
            open_rounds=self.open_rounds,
            paused=self.paused,
            timeout_s=config.predict.timeout_s,
            next_due_s=lambda: self._next_due_s,
            history_ready=feed.history_ready,
            settle=self._settle,
            set_up_again=self._set_up_again,
            give_up=self._give_up,
            waker=Waker(clock, _WAKES_A_TURN),
        )
        self._requests = {
            setting: predict_request(setting.asset, setting.horizon_s, setting.step_s)
            for setting in config.game.settings
        }
        self._tasks: TaskGroup | None = None
        self._next_round_no = 1
        self._next_model_no = 1
        self._held_until_s = 0.0
        self._next_due_s = 0
        self._resumed = asyncio.Event()
        self._stopping = False
        self._all_answered = asyncio.Event()
        feed.subscribe(self._on_prices)

    # -- life --------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Hold rounds until cancelled. Started again after a failure, it goes on where it was."""
        async with anyio.create_task_group() as tasks:
            self._tasks = tasks
            try:
                if self._resumed.is_set():
                    for open_round in list(self.open_rounds):
                        self._close(open_round, "the predict loop failed while the round was open")
                else:
                    await self._resume()
                tasks.start_soon(self._heartbeat, name="predict-heartbeat")
                await self._hold_rounds()
            finally:
                self._tasks = None

    async def finish(self, grace_s: float) -> None:
        """Open no more rounds, give those in flight up to `grace_s` (wall), and leave all to the journal.

        Who was asked and can't answer any more because the game stops is left out of its round.
        """
        self._stopping = True
        self._check_all_answered()
        with anyio.move_on_after(grace_s):
            await self._all_answered.wait()
        for open_round in list(self.open_rounds):
            self._close(open_round, cut_short=True)
        self._touch(self._connected())

    async def _resume(self) -> None:
        """Learn from the database what was held, and account for every round since then."""
        for model in await self._db.read(repositories.load_models):
            self.participants[model.info.model_id] = Participant(model)
            self._next_model_no = max(self._next_model_no, model.model_no + 1)
        reason = "the game stopped while the round was open"
        if interrupted := await self._db.write(repositories.void_interrupted, reason):
            log.warning("rounds_interrupted", count=len(interrupted), newest=interrupted[-1])
        newest = await self._db.read(repositories.newest_round_s)
        self._next_round_no = await self._db.read(repositories.next_round_no)
        now_s = self._clock.now()
        due: list[tuple[int, Setting]] = []
        for setting in self._config.game.settings:
            held_s = newest.get(setting.key)
            after_s = now_s - setting.interval_s if held_s is None else max(held_s, now_s - _MISSED_BACK_S)
            due += [
                (at_s, setting)
                for at_s in schedule.due(setting, after_s, now_s)
                if held_s is not None or self._deadline_s(at_s, setting) > now_s
            ]
        self._held_until_s = now_s
        self._next_due_s = schedule.next_due(self._config.game.settings, now_s)
        self._open_all(sorted(due, key=lambda item: item[0]), "the game was not running")
        self._resumed.set()

    async def _hold_rounds(self) -> None:
        settings = self._config.game.settings
        lag_s = _AFTER_THE_TICK_S * self._clock.speed
        while not self._stopping:
            self._next_due_s = schedule.next_due(settings, self._held_until_s)
            await self._clock.sleep_until(self._next_due_s + lag_s)
            if self._stopping:
                break
            with self._clock.hold():
                now_s = self._clock.now()
                after_s = max(self._held_until_s, now_s - _MISSED_BACK_S)
                due = [
                    (due_s, setting)
                    for setting in settings
                    for due_s in schedule.due(setting, after_s, now_s)
                ]
                self._held_until_s = now_s
                self.late_s = self._clock.wall_s(now_s - self._next_due_s)
                self._open_all(sorted(due, key=lambda item: item[0]), "the process was held up")
                await asyncio.sleep(0)

    async def _heartbeat(self) -> None:
        """Keep the game's time and who is connected on disk, so that a crash loses little of either."""
        while True:
            await asyncio.sleep(_HEARTBEAT_S)
            if self._journal.failing is None:  # a day of them would take 100 MB
                self._journal.append(repositories.save_clock, self._clock.now())
                self._touch(self._connected())

    # -- rounds ------------------------------------------------------------------------------------

    def _deadline_s(self, at_s: int, setting: Setting) -> float:
        return schedule.deadline_s(at_s, setting, self._config.predict.timeout_s * self._clock.speed)

    def _round(
        self, at_s: int, setting: Setting, status: RoundStatus, reason: str | None = None, asked: bool = False
    ) -> Round:
        round_no, self._next_round_no = self._next_round_no, self._next_round_no + 1
        return Round(
            asset=setting.asset,
            horizon_s=setting.horizon_s,
            step_s=setting.step_s,
            scheduled_at_s=at_s,
            status=status,
            reason=reason,
            performed_at_ms=int(self._clock.now() * 1000) if asked else None,
            round_no=round_no,
        )

    def _open_all(self, due: list[tuple[int, Setting]], missed_reason: str) -> None:
        """Open the rounds that are due, oldest first; record those that can't be held."""
        now_s = self._clock.now()
        opened: list[OpenRound] = []
        unheld: list[Round] = []
        for at_s, setting in due:
            if self._feed.finished or self._outlasts_the_prices(at_s, setting):
                continue
            if self._deadline_s(at_s, setting) <= now_s:
                unheld.append(self._round(at_s, setting, RoundStatus.MISSED, missed_reason))
            elif reason := self._clock.doubt or self._stale(setting.asset, at_s):
                unheld.append(self._round(at_s, setting, RoundStatus.SKIPPED, reason))
            else:
                opened.append(self._open(at_s, setting))
        if unheld:
            self._journal.append(repositories.record_rounds, unheld)
            self._tell(RoundsNotHeld(unheld))
            last = unheld[-1]
            log.warning(
                "rounds_not_held",
                count=len(unheld),
                newest=last.round_id,
                status=str(last.status),
                reason=last.reason,
            )
        if opened:
            self._journal.append(repositories.open_rounds, [item.round for item in opened])
        for known in self.participants.values():
            if known.lane is not None:
                for open_round in opened:
                    if known.lane.ready:
                        open_round.asked.add(known.model.model_no)
                    known.lane.ask(open_round)
        if opened:
            self._tell(RoundsOpened([item.round for item in opened]))

    def _open(self, at_s: int, setting: Setting) -> OpenRound:
        limits = self._config.predict
        open_round = OpenRound(
            round=self._round(at_s, setting, RoundStatus.OPEN, asked=True),
            request=self._requests[setting],
            deadline_s=self._deadline_s(at_s, setting),
            max_answer_bytes=setting.segments * limits.max_segment_bytes + ENVELOPE_BYTES,
        )
        self.open_rounds.append(open_round)
        assert self._tasks is not None
        self._tasks.start_soon(self._keep, open_round, name=open_round.round.round_id)
        return open_round

    def _outlasts_the_prices(self, at_s: int, setting: Setting) -> bool:
        """Whether a recording ends before the round could be resolved: it is not asked then."""
        end_s = self._feed.end_s(setting.asset)
        return end_s is not None and at_s + setting.horizon_s > end_s

    def _stale(self, asset: str, at_s: int) -> str | None:
        """Why no round can be held on `asset`'s prices, None where one can."""
        newest_s = self._feed.book.newest_s(asset)
        if newest_s is None:
            return f"no {asset} price yet"
        if (age_s := at_s - newest_s) > self._config.feed.max_staleness_s:
            limit_s = self._config.feed.max_staleness_s
            return f"the newest {asset} price is {age_s} s old (feed.max_staleness: {limit_s} s)"
        return None

    async def _keep(self, open_round: OpenRound) -> None:
        """Close the round at its deadline."""
        await self._clock.sleep_until(open_round.deadline_s)
        if open_round in self.open_rounds:
            self._close(open_round)

    def _close(
        self, open_round: OpenRound, void_reason: str | None = None, *, cut_short: bool = False
    ) -> None:
        """Account for every model, move the counters, and have the round stored as closed, or void.

        `cut_short`: before its deadline, so that who has not answered yet is neither late nor absent.
        """
        self.open_rounds.remove(open_round)
        self._check_all_answered()
        now_ms = int(self._clock.now() * 1000)
        by_no = {known.model.model_no: known for known in self.participants.values()}
        silent = [
            no
            for no in open_round.asked
            if no not in open_round.outcomes and not (cut_short and no not in open_round.provisional)
        ]
        answers = [self._no_answer(open_round, by_no[no], now_ms) for no in silent]
        for answer in answers:
            open_round.outcomes[answer.model_no] = answer.status
            by_no[answer.model_no].last_error = answer.detail
        for no in open_round.asked:
            _note_first_round(by_no[no], open_round)
        if answers and not self._store(open_round, answers):
            open_round.unstored += len(answers)
        if void_reason is None:
            void_reason = self._our_fault(open_round, by_no)
        if void_reason is None:
            for no, status in open_round.outcomes.items():
                if no not in open_round.refused:
                    self._count(by_no[no], status, reached=no in open_round.reached)
        self._journal.append(
            repositories.close_round,
            open_round.round_no,
            RoundStatus.VOID if void_reason else RoundStatus.CLOSED,
            void_reason,
            self._absent(open_round),
            then=self._closed,
        )

    def _our_fault(self, open_round: OpenRound, by_no: dict[int, Participant]) -> str | None:
        """Why the round is nobody's fault but the host's: nobody was there, answers found no room, or most
        fell silent together.

        Only those have a vote who answered before; who is silent for several rounds on end loses it.
        """
        if not open_round.asked:
            lanes = [known.lane for known in by_no.values() if known.lane is not None]
            if not lanes:
                return "no model was connected"
            paused = all(lane.paused for lane in lanes)
            return "every connected model is paused" if paused else "no connected model was ready to be asked"
        if count := max(len(open_round.refused), open_round.unstored):
            why = self._journal.failing or "the database is slow"
            log.error("answers_refused", round_id=open_round.round.round_id, count=count, why=why)
            if open_round.unstored or 2 * len(open_round.refused) > len(open_round.outcomes):
                return f"{count} answers could not be stored, too many wait already: {why}"
        voters = [no for no in open_round.outcomes if by_no[no].trusted]
        silent = [by_no[no] for no in voters if open_round.outcomes[no] is AnswerStatus.TIMEOUT]
        if len(voters) < _SUSPECT_FROM or 2 * len(silent) <= len(voters):
            return None
        for known in silent:
            known.suspected.add(open_round.round.scheduled_at_s)
            known.trusted = len(known.suspected) < _SUSPECT_AT_MOST
        return f"{len(silent)} of {len(voters)} models timed out together: the host was at fault"

    def _no_answer(self, open_round: OpenRound, known: Participant, now_ms: int) -> Answer:
        model_no = known.model.model_no
        lost = open_round.provisional.get(model_no)
        detail = "no answer by the round's deadline"
        if known.lane is None:
            detail = "disconnected before it answered"
        elif model_no not in open_round.reached:
            busy = "busy with an earlier call until the round's deadline"
            detail = busy if known.lane.busy else NO_TIME_LEFT
        waited_us = now_ms * 1000 - (open_round.round.performed_at_ms or now_ms) * 1000
        return Answer(
            round_no=open_round.round_no,
            model_no=model_no,
            status=AnswerStatus.FAILED if lost else AnswerStatus.TIMEOUT,
            received_at_ms=now_ms,
            exec_time_us=lost.exec_time_us if lost else max(waited_us, 0),
            detail=lost.detail if lost else detail,
        )

    def _absent(self, open_round: OpenRound) -> list[int]:
        """Who is known to the game, has played before, and was not asked; a pause is an absence too."""
        at_s = open_round.round.scheduled_at_s
        return [
            known.model.model_no
            for known in self.participants.values()
            if known.model.model_no not in open_round.asked
            and known.model.first_round_at_s is not None
            and known.model.first_round_at_s <= at_s
            and (_plays(known) or known.model.last_seen_at_s >= at_s - _KNOWN_FOR_S)
        ]

    def _closed(self, closed: Round) -> None:
        log.info(
            "round_closed" if closed.status is RoundStatus.CLOSED else "round_void",
            round_id=closed.round_id,
            answered=closed.answered,
            failed=closed.failed,
            timed_out=closed.timed_out,
            absent=closed.absent,
            **({"reason": closed.reason} if closed.reason else {}),
        )
        self._on_closed(closed)
        self._tell(RoundClosed(closed))

    # -- answers -----------------------------------------------------------------------------------

    def _settle(self, open_round: OpenRound, participant: Participant, reply: Reply) -> None:
        """A lane's call in a round has ended."""
        model_no = participant.model.model_no
        if open_round not in self.open_rounds or model_no in open_round.outcomes:
            return  # closed in the meantime: accounted for already
        if reply.outcome is not Outcome.SUCCESS:
            participant.last_error = reply.detail
        if reply.outcome in (Outcome.UNREACHABLE, Outcome.SETUP_MISSING):
            if self._stopping:
                return  # a service manager may have ended its process together with the game
            open_round.provisional[model_no] = reply  # it may come back before the deadline
            return
        status = _STATUS.get(reply.outcome, AnswerStatus.FAILED)
        answer = Answer(
            round_no=open_round.round_no,
            model_no=model_no,
            status=status,
            received_at_ms=int(self._clock.now() * 1000),
            exec_time_us=reply.exec_time_us,
            detail=reply.detail,
            payload=reply.payload,
        )
        if not self._store(open_round, [answer]):
            open_round.refused.add(model_no)
            status = AnswerStatus.FAILED
            detail = "the host could not store the answer"
            lost = replace(answer, status=status, payload=None, detail=detail)
            open_round.unstored += not self._store(open_round, [lost])
        open_round.outcomes[model_no] = status
        _note_first_round(participant, open_round)
        self._check_all_answered()

    def _store(self, open_round: OpenRound, answers: list[Answer]) -> bool:
        """Have them written; False where there is no room for them to wait."""
        size = sum(len(answer.payload or b"") + _ANSWER_BYTES for answer in answers)
        results = [(answer.status, answer.exec_time_us) for answer in answers]
        stored = partial(self._stored, open_round, results)
        return self._journal.append(repositories.add_answers, answers, then=stored, size=size)

    def _stored(self, open_round: OpenRound, answers: list[tuple[AnswerStatus, int]], new: int) -> None:
        after_s = self._clock.wall_s(self._clock.now() - (open_round.round.performed_at_ms or 0) / 1000)
        for status, exec_time_us in answers:
            self._tell(AnswerStored(status, exec_time_us, after_s))

    def _count(self, participant: Participant, status: AnswerStatus, *, reached: bool) -> None:
        """Move the model's counters; at the limit it is reported and disconnected.

        A model that was still busy with an earlier call (not `reached`) is counted once a `predict.timeout`;
        one that was not, and that nobody called, not at all.
        """
        limits, now_s = self._config.predict, self._clock.now()
        if status is AnswerStatus.SUCCESS:
            participant.consecutive_failures = participant.consecutive_timeouts = 0
            participant.trusted = True
            participant.suspected.clear()
            return
        if status is AnswerStatus.FAILED:
            participant.consecutive_failures += 1
        elif not reached and participant.lane is not None and not participant.lane.busy:
            return
        elif reached or self._clock.wall_s(now_s - participant.counted_at_s) >= limits.timeout_s:
            participant.consecutive_timeouts += 1
            participant.counted_at_s = now_s
            participant.trusted = False
        if participant.consecutive_failures >= limits.max_consecutive_failures:
            reason = (
                f"{participant.consecutive_failures} failures in a row, the last: {participant.last_error}"
            )
            self._give_up(participant, "MULTIPLE_FAILED", reason)
        elif participant.consecutive_timeouts >= limits.max_consecutive_timeouts:
            reason = f"{participant.consecutive_timeouts} time-outs in a row"
            self._give_up(participant, "MULTIPLE_TIMEOUT", reason)

    def _check_all_answered(self) -> None:
        if not self._stopping:
            return
        worth_waiting = {
            known.model.model_no
            for known in self.participants.values()
            if known.lane is not None and not known.consecutive_timeouts
        }
        for open_round in self.open_rounds:
            waiting = open_round.asked & worth_waiting
            if waiting - open_round.outcomes.keys() - open_round.provisional.keys():
                return
        self._all_answered.set()

    # -- models ------------------------------------------------------------------------------------

    def _connected(self) -> set[int]:
        return {known.model.model_no for known in self.participants.values() if _plays(known)}

    def _touch(self, model_nos: set[int]) -> None:
        now_s = int(self._clock.now())
        for known in self.participants.values():
            if known.model.model_no in model_nos:
                known.model = replace(known.model, last_seen_at_s=now_s)
        self._journal.append(repositories.touch_models, model_nos, now_s)

    def _on_prices(self, assets: frozenset[str]) -> None:
        for known in self.participants.values():
            if known.lane is not None:
                known.lane.wake()

    async def _serve(self, connection: Connection) -> None:
        """Enter the model in the books and serve it in its lane, until the fleet cancels this."""
        await self._resumed.wait()
        known = self._enter(connection)
        known.lane = lane = Lane(known, connection, self._floor, self._clock.now())
        info = known.model.info
        log.info("model_joined", model_id=info.model_id, model=info.model_name, player=info.cruncher_name)
        self._tell(ModelJoined(info))
        try:
            while True:
                try:
                    await lane.run()
                except Exception:
                    log.exception("lane_failed", model_id=info.model_id)
                    await asyncio.sleep(_LANE_RESTART_S)
        finally:
            if known.lane is lane:
                known.lane = None
                self._touch({known.model.model_no})
            if not self._stopping:
                log.info("model_left", model_id=info.model_id)
                self._tell(ModelLeft(known.model.info))

    def _enter(self, connection: Connection) -> Participant:
        """The books of a model that has connected; a new deployment starts with a clean slate."""
        info, now_s = self._info(connection), int(self._clock.now())
        known = self.participants.get(info.model_id)
        if known is None:
            model_no, self._next_model_no = self._next_model_no, self._next_model_no + 1
            known = self.participants[info.model_id] = Participant(Model(model_no, info, now_s, now_s))
        elif known.model.info.deployment_id != info.deployment_id:
            self.forgive(info.model_id)
        known.model = replace(known.model, info=info, last_seen_at_s=now_s)
        if connection.fresh or known.watermark_of != info.deployment_id:
            known.watermark = None
        self._journal.append(repositories.upsert_model, info, now_s, known.model.model_no)
        return known

    def _info(self, connection: Connection) -> ModelInfo:
        info = connection.info
        return replace(info, benchmark=info.benchmark or info.model_id in self._config.game.benchmarks)

    def _renamed(self, connection: Connection) -> None:
        known = self.participants.get(connection.model_id)
        if known is not None and known.lane is not None and known.lane.connection is connection:
            known.model = replace(known.model, info=self._info(connection))
            now_s = int(self._clock.now())
            self._journal.append(
                repositories.upsert_model, known.model.info, now_s, known.model.model_no, then=self._on_named
            )

    def _on_named(self, model: Model) -> None:
        log.info("model_renamed", model_id=model.info.model_id, model=model.info.model_name)

    def on_checked(self, valid: Iterable[int], invalid: Mapping[int, str]) -> None:
        """The scorer has looked into a round's answers; by `model_no`, `invalid` with the reasons.

        An invalid answer is a failure too, though known only later: at the limit the model is given up.
        """
        for known in list(self.participants.values()):
            model_no = known.model.model_no
            if model_no in invalid:
                known.consecutive_invalid += 1
                known.last_error = f"invalid: {invalid[model_no]}"
                if known.consecutive_invalid >= self._config.predict.max_consecutive_failures:
                    in_a_row = f"{known.consecutive_invalid} invalid answers in a row"
                    reason = f"{in_a_row}, the last: {invalid[model_no]}"
                    self._give_up(known, "MULTIPLE_FAILED", reason)
            elif model_no in valid:
                known.consecutive_invalid = 0

    def pause(self, model_id: str) -> None:
        """Start no more calls to this model, connected or not; one under way may finish."""
        self.paused.setdefault(model_id, int(self._clock.now()))
        known = self.participants.get(model_id)
        if known is not None and known.lane is not None:
            self._touch({known.model.model_no})
            known.lane.wake()
        self._check_all_answered()

    def resume(self, model_id: str) -> None:
        """Ask it again: what it missed comes first, then the rounds that are open."""
        self.paused.pop(model_id, None)
        known = self.participants.get(model_id)
        if known is not None and known.lane is not None:
            known.lane.wake()

    def forgive(self, model_id: str) -> None:
        """Forget the failures counted so far: the model is started anew."""
        if known := self.participants.get(model_id):
            known.consecutive_failures = known.consecutive_timeouts = known.consecutive_invalid = 0
            known.last_error = None

    def _set_up_again(self, participant: Participant) -> None:
        if participant.lane is not None:
            self.fleet.reconnect(participant.lane.connection)

    def _give_up(self, participant: Participant, code: str, reason: str) -> None:
        participant.last_error = reason
        participant.consecutive_failures = participant.consecutive_timeouts = 0
        participant.consecutive_invalid = 0
        if participant.lane is not None:
            self.fleet.give_up(participant.lane.connection, code, reason)


def _note_first_round(participant: Participant, open_round: OpenRound) -> None:
    if participant.model.first_round_at_s is None:
        at_s = open_round.round.scheduled_at_s
        participant.model = replace(participant.model, first_round_at_s=at_s)


def _plays(participant: Participant) -> bool:
    """Whether it is connected and not paused."""
    return participant.lane is not None and not participant.lane.paused
