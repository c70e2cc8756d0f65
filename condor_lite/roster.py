"""All models of a game: how each one stands and fares, and what its host can do to it."""

from __future__ import annotations

import asyncio
import difflib
import sqlite3
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from condor_lite.clock import Clock
from condor_lite.errors import CondorError
from condor_lite.game.entities import AnswerStatus, Model, ModelInfo
from condor_lite.models.local import LocalModelState, LocalState
from condor_lite.storage import repositories, roster
from condor_lite.storage.roster import Recent, Tally

if TYPE_CHECKING:  # a command that asks a game need not load what runs one
    from condor_lite.lanes import Lane
    from condor_lite.models.orchestrator import Orchestrator
    from condor_lite.predict import PredictLoop
    from condor_lite.storage.database import Database
    from condor_lite.storage.journal import Journal

_LATELY_S = 86400  # of the game's time
_STORE_WAIT_S = 5.0
_MOST_COMPARED = 2_000  # ids that an unknown one is compared with
_ID_CHARS = 200


class UnknownModel(CondorError):
    """No model has this id."""

    def __init__(self, model_id: str, known: Mapping[str, str]) -> None:
        """`known` has the names by id."""
        shown = "".join(char if char.isprintable() else "?" for char in model_id[:_ID_CHARS])
        ids = list(known)[:_MOST_COMPARED]
        near = [other for other in ids if known[other] == model_id]
        near = near or difflib.get_close_matches(model_id[:_ID_CHARS], ids, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "`condor-lite models` lists all of them"
        super().__init__(f"no model has the id {shown!r}; {hint}")


class NotDone(CondorError):
    """The model is known, but what was asked for can't be done to it; the message says why."""


@dataclass(frozen=True, slots=True)
class ModelLine:
    """One model. Times are the game's clock, epoch seconds; counts are of the rounds of the last 24 h.

    `state` is one of: ready, being fed its history, connecting, paused, disconnected, given up, starting,
    restarting, reported, rejected; "not running" where no game runs.
    """

    model_id: str
    model_name: str
    player: str
    state: str
    since_s: int | None
    reason: str | None
    paused: bool
    deployment_id: str | None
    answered: int
    failed: int
    timed_out: int
    absent: int
    median_ms: float | None
    last_error: str | None
    last_error_at_s: int | None


@dataclass(frozen=True, slots=True)
class Listing:
    """All models that a game knows, by id. `running`: whether the game runs; otherwise it is as stored."""

    game: str
    running: bool
    now_s: int
    models: list[ModelLine]


@dataclass(frozen=True, slots=True)
class _Condition:
    state: str
    since_s: float | None = None
    reason: str | None = None


class Roster:
    """The running game's models. `orchestrator` is the embedded one, None where a remote one runs them."""

    def __init__(
        self,
        game: str,
        clock: Clock,
        db: Database,
        journal: Journal,
        predict: PredictLoop,
        orchestrator: Orchestrator | None,
    ) -> None:
        self._game = game
        self._clock = clock
        self._db = db
        self._journal = journal
        self._predict = predict
        self._orchestrator = orchestrator

    async def start(self) -> None:
        """Pause who was paused when the game stopped; to be called before anyone is asked."""
        self._predict.paused.update(await self._db.read(roster.load_pauses))

    @property
    def commands(self) -> dict[str, Callable[..., Awaitable[object]]]:
        """What the control socket offers."""
        return {
            "models": self.models,
            "pause": self.pause,
            "resume": self.resume,
            "restart": self.restart,
        }

    async def models(self) -> Listing:
        """Every model's state now, and how it fared in the last 24 h of the game's time."""
        now_s = self._clock.now()
        tally: Tally = {}
        for span in roster.spans(now_s - _LATELY_S, now_s):  # so that nobody waits long for the reader
            for model_no, counts in (await self._db.read(roster.tally, *span)).items():
                tally.setdefault(model_no, Counter()).update(counts)
        recent = await self._db.read(roster.recent, now_s - _LATELY_S)
        lines = []
        local = self._local()
        for model_id, info in sorted(self._known(local).items()):
            known = self._predict.participants.get(model_id)
            line = _line(
                info,
                self._condition(model_id, local.get(model_id)),
                known.model if known else None,
                tally,
                recent,
                model_id in self._predict.paused,
                known.last_error if known else None,
            )
            lines.append(line)
        return Listing(self._game, True, int(now_s), lines)

    async def pause(self, model_id: str) -> str:
        """Neither ask nor feed a model until it is resumed, whatever is restarted meanwhile."""
        await self._check(model_id)
        already = model_id in self._predict.paused
        self._predict.pause(model_id)
        unstored = await self._store(roster.save_pause, model_id, self._predict.paused[model_id])
        if already:
            return f"{model_id} was paused already{unstored}"
        return (
            f"{model_id} is paused: it is asked and fed no more, and counts as absent, "
            f"until `condor-lite models resume {model_id}`{unstored}"
        )

    async def resume(self, model_id: str) -> str:
        """Undo a pause: the model is fed what it missed, and asked again."""
        await self._check(model_id)
        already = model_id not in self._predict.paused
        self._predict.resume(model_id)
        unstored = await self._store(roster.delete_pause, model_id)
        if already:
            return f"{model_id} was not paused{unstored}"
        if self._lane(model_id):
            return f"{model_id} is resumed: it gets the prices that it missed, and is asked again{unstored}"
        now = self._condition(model_id, self._local().get(model_id))
        because = f" ({now.reason})" if now.reason else ""
        return f"{model_id} is resumed, but it is not connected: {now.state}{because}{unstored}"

    async def restart(self, model_id: str) -> str:
        """Start a local model's process anew, given up or not; connect a remote one and set it up anew."""
        await self._check(model_id)
        stays = ", and stays paused" if model_id in self._predict.paused else ""
        lane = self._lane(model_id)
        if self._orchestrator is not None:
            local = self._local().get(model_id)
            if local is not None and local.state is LocalState.REJECTED:
                raise NotDone(f"{model_id} can't be started: {local.reason}; mended, it starts by itself")
            if not self._orchestrator.restart(model_id):
                raise NotDone(f"{model_id} can't be started: its folder is gone; put it back, and it starts")
            done = f"a new process of {model_id} is being started{stays}"
        elif lane is not None:
            self._predict.fleet.reconnect(lane.connection)
            done = f"{model_id} is being connected and set up anew{stays}"
        else:
            self._predict.fleet.refresh(model_id)
            done = (
                f"{model_id} is not connected: the orchestrator is asked again who runs; "
                f"if it names {model_id}, that is connected{stays}"
            )
        self._predict.forgive(model_id)
        return done

    async def _check(self, model_id: str) -> None:
        known = self._known(self._local())
        if model_id not in known:
            names = {other: info.model_name for other, info in known.items()}
            raise await asyncio.to_thread(UnknownModel, model_id, names)

    async def _store(self, apply: Callable[..., None], *arguments: object) -> str:
        """Have it written; what to say where that takes too long (it is written later then)."""
        try:
            async with asyncio.timeout(_STORE_WAIT_S):
                await self._journal.write(apply, *arguments)
        except TimeoutError:
            why = self._journal.failing or "it is slow"
            return f"; not stored yet, as the database can't be written ({why}): a crash now would undo it"
        return ""

    def _local(self) -> dict[str, LocalModelState]:
        states = self._orchestrator.states() if self._orchestrator is not None else []
        return {state.model_id: state for state in states}

    def _known(self, local: Mapping[str, LocalModelState]) -> dict[str, ModelInfo]:
        """Who took part, runs, connects, was refused, or has a folder."""
        fleet = self._predict.fleet
        return {
            **{
                model_id: ModelInfo(model_id, state.name, "", "", state.deployment_id or "")
                for model_id, state in local.items()
            },
            **{model_id: refused.info for model_id, refused in fleet.refused.items()},
            **{model_id: known.model.info for model_id, known in self._predict.participants.items()},
            **{model_id: connection.info for model_id, connection in fleet.connecting.items()},
        }

    def _lane(self, model_id: str) -> Lane | None:
        known = self._predict.participants.get(model_id)
        return known.lane if known is not None else None

    def _condition(self, model_id: str, local: LocalModelState | None) -> _Condition:
        beneath = self._unpaused(model_id, local)
        if (since_s := self._predict.paused.get(model_id)) is None:
            return beneath
        if self._lane(model_id):
            return _Condition("paused", since_s)
        because = f": {beneath.reason}" if beneath.reason else ""
        return _Condition("paused", since_s, f"{beneath.state}{because}")

    def _unpaused(self, model_id: str, local: LocalModelState | None) -> _Condition:
        fleet = self._predict.fleet
        known = self._predict.participants.get(model_id)
        reason = local.reason if local else None
        if known is not None and (lane := known.lane) is not None:
            if lane.fed:
                return _Condition("ready", lane.since_s, reason)
            return _Condition("being fed its history", lane.since_s, reason or known.last_error)
        if local is not None and local.state is not LocalState.RUNNING:
            return _Condition(local.state.value, self._game_s(local.since), reason)
        if model_id in fleet.running or model_id in fleet.connecting:
            return _Condition("connecting", self._game_s(local.since) if local else None, reason)
        if (refused := fleet.refused.get(model_id)) is not None:
            return _Condition("given up", self._game_s(refused.since_s), refused.reason)
        if local is not None:
            return _Condition("connecting", self._game_s(local.since), reason)
        return _Condition("disconnected", known.model.last_seen_at_s if known else None)

    def _game_s(self, wall_s: float) -> float:
        """The game's time at a time on the wall."""
        return self._clock.now() - (time.time() - wall_s) * self._clock.speed


def stored(conn: sqlite3.Connection, game: str) -> Listing:
    """The models of a game that does not run, as its file knows them."""
    now_s = repositories.load_clock(conn) or 0.0
    paused = roster.load_pauses(conn)
    tally = roster.tally(conn, now_s - _LATELY_S, now_s)
    recent = roster.recent(conn, now_s - _LATELY_S)
    lines = []
    for model in repositories.load_models(conn):
        model_id = model.info.model_id
        now = _Condition("not running", model.last_seen_at_s)
        if model_id in paused:
            now = _Condition("paused", paused[model_id])
        lines.append(_line(model.info, now, model, tally, recent, model_id in paused, None))
    return Listing(game, False, int(now_s), sorted(lines, key=lambda line: line.model_id))


def _line(
    info: ModelInfo,
    now: _Condition,
    model: Model | None,
    tally: Tally,
    recent: Mapping[int, Recent],
    paused: bool,
    last_error: str | None,
) -> ModelLine:
    counts = tally.get(model.model_no, Counter()) if model else Counter()
    lately = recent.get(model.model_no) if model else None
    stored_error = lately is not None and lately.error is not None
    return ModelLine(
        model_id=info.model_id,
        model_name=info.model_name,
        player=info.cruncher_name,
        state=now.state,
        since_s=None if now.since_s is None else int(now.since_s),
        reason=now.reason,
        paused=paused,
        deployment_id=info.deployment_id or None,
        answered=counts[AnswerStatus.SUCCESS],
        failed=counts[AnswerStatus.FAILED],
        timed_out=counts[AnswerStatus.TIMEOUT],
        absent=counts[AnswerStatus.ABSENT],
        median_ms=lately.median_us / 1000 if lately is not None and lately.median_us is not None else None,
        last_error=lately.error if lately is not None and stored_error else last_error,
        last_error_at_s=lately.error_at_s if lately is not None and stored_error else None,
    )
