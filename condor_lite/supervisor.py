"""Builds the game, runs its services, restarts what dies, and shuts all of it down in order."""

from __future__ import annotations

import asyncio
import math
import socket as socket_module
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence, Set
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

import anyio
import structlog
from anyio.abc import TaskGroup, TaskStatus

from condor_lite import __version__, stopping
from condor_lite.alarms import Alarms, stale_price
from condor_lite.backup import Backups
from condor_lite.clock import Clock, GameClock, LiveClock, machine_s
from condor_lite.config import Config
from condor_lite.control import Control
from condor_lite.errors import CondorError, StorageUnavailable
from condor_lite.game.entities import Leaderboard, Round
from condor_lite.models.orchestrator import Orchestrator
from condor_lite.news import LeaderboardMade, LoopLate, News, PricesCame, ServiceRestarted, Tell
from condor_lite.predict import PredictLoop
from condor_lite.prices.feed import Feed
from condor_lite.prices.source import Source
from condor_lite.prices.sources import make_sources
from condor_lite.prices.witness import MEND_THE_CLOCK, Witness, simulated_clock
from condor_lite.reload import Reloader
from condor_lite.report import server
from condor_lite.report.api import create_app
from condor_lite.report.live import Live, Problem, ServiceState, Vitals
from condor_lite.rescore import Rescorer
from condor_lite.roster import Roster
from condor_lite.score import ScoreLoop
from condor_lite.storage import repositories
from condor_lite.storage.database import Database
from condor_lite.storage.journal import Journal
from condor_lite.upkeep import Upkeep
from condor_lite.watchdog import Watchdog, spare_the_loop
from condor_lite.webhook import Webhook

log = structlog.get_logger()

_RESTART_FIRST_S = 1.0
_RESTART_MOST_S = 60.0
_RESTART_MOST_UNSTORED_S = 5.0  # a disk that was full is tried again soon, however long it was full
_HEALTHY_AFTER_S = 60.0
_STORE_WAIT_S = 3.0
_TO_DO = {
    "service": "It is started again by itself, every minute at least; the others go on. If that does not "
    "help, the log says what went wrong: mend that, or restart the game, which goes on where it was.",
    "price": "Its rounds are skipped until a price comes; nothing that was asked is lost. If it lasts, see "
    "whether the source is reachable from here and knows the asset (condor-lite check --online), or name a "
    "second source in feed.source.",
    "orchestrator": "No model can be asked until it is; it is tried again all the time. See whether it runs, "
    "and whether orchestrator.host and orchestrator.port are right.",
    "late": "The machine is too busy. See what else runs on it, or lower scoring.workers.",
    "clock": MEND_THE_CLOCK,
    "journal": "Answers are kept in memory and written as soon as that works. See to the disk's space and "
    "rights, and to other programs that have the file open; don't stop the game before.",
    "backup": "It is tried again, every 10 minutes at least; the game goes on. See to the folder "
    "backup.path: whether its disk is there and has room, and whether the game may write to it.",
}


class Service:
    """One named part of the game. When it fails, that is logged, and it is started again after a pause.

    A part that says when it has started (`run` takes `task_status`) may fail before that: nothing is retried
    then. Only one that `may_end` may return. `tell` is told of each restart.
    """

    def __init__(
        self, name: str, run: Callable[..., Awaitable[None]], tell: Tell, *, may_end: bool = False
    ) -> None:
        self.name = name
        self.failure: str | None = None
        """Why it is not running, None while it is."""
        self.restarts = 0
        self.changed_s = time.monotonic()
        """Since when it has been running, or down (monotonic)."""
        self._run = run
        self._tell = tell
        self._may_end = may_end
        self._scope = anyio.CancelScope()
        self._ended = anyio.Event()

    async def serve(self, *, task_status: TaskStatus[object] | None = None) -> None:
        """Run until stopped."""
        pause_s = _RESTART_FIRST_S
        starting = _Starting(task_status) if task_status is not None else None
        try:
            with self._scope:
                while True:
                    started_s = time.monotonic()
                    try:
                        await (self._run(task_status=starting) if starting else self._run())
                        if self._may_end:
                            return
                        raise RuntimeError("it ended by itself")
                    except (Exception, asyncio.CancelledError) as error:
                        if isinstance(error, asyncio.CancelledError) and _is_to_end():
                            raise
                        if starting is not None and not starting.done:
                            raise
                        if time.monotonic() - started_s > _HEALTHY_AFTER_S:
                            pause_s = _RESTART_FIRST_S
                        if isinstance(error, StorageUnavailable):
                            pause_s = min(pause_s, _RESTART_MOST_UNSTORED_S)
                        self.failure = f"{type(error).__name__}: {error}"
                        self.restarts += 1
                        self.changed_s = time.monotonic()
                        if isinstance(error, CondorError):  # its message says all
                            log.error(
                                "service_failed", service=self.name, error=str(error), restart_in_s=pause_s
                            )
                        else:
                            log.exception("service_failed", service=self.name, restart_in_s=pause_s)
                    await asyncio.sleep(pause_s)
                    pause_s = min(2 * pause_s, _RESTART_MOST_S)
                    failure, self.failure, starting = self.failure, None, None
                    self.changed_s = time.monotonic()
                    log.info("service_restarted", service=self.name)
                    self._tell(ServiceRestarted(self.name, failure))
        finally:
            self._ended.set()

    async def stop(self) -> None:
        """Cancel it and wait until it has ended."""
        self._scope.cancel()
        await self._ended.wait()


def _is_to_end() -> bool:
    """Whether this task is cancelled, and not only something that it waited for."""
    task = asyncio.current_task()
    return anyio.current_effective_deadline() == -math.inf or (task is not None and task.cancelling() > 0)


class _Starting:
    """Passes on that a service has started, and remembers it."""

    def __init__(self, task_status: TaskStatus[object]) -> None:
        self._task_status = task_status
        self.done = False

    def started(self, value: object = None) -> None:
        self.done = True
        self._task_status.started(value)


class Game:
    """All parts of one running game."""

    def __init__(
        self,
        config: Config,
        clock: Clock,
        db: Database,
        sources: Sequence[Source],
        orchestrator_port: int,
        news: News,
    ) -> None:
        self.config = config
        self.clock = clock
        self.db = db
        self.journal = Journal(db)
        self.feed = Feed(config, clock, db, *sources)
        self.news = news
        self.watchdog = Watchdog(lambda late_s: news.tell(LoopLate(late_s)))
        self.live = Live(
            config=config,
            clock=clock,
            started_at_s=clock.now(),
            problems=self.problems,
            feeds=self.feed.states,
            connected=self._connected,
            vitals=self._vitals,
            news=news,
        )
        self.score = ScoreLoop(
            config, clock, db, self._on_leaderboard, self._on_checked, news.tell, self.feed.prices_wait
        )
        self.predict = PredictLoop(
            config, clock, db, self.journal, self.feed, orchestrator_port, self._on_closed, news.tell
        )
        self.feed.subscribe(lambda assets: self.score.wake())
        self.feed.subscribe(lambda assets: news.tell(PricesCame(assets)))
        self.services: list[Service] = []
        # On the wall's time.
        self.backups = Backups(config.backup, db.path, GameClock()) if config.backup.every_s else None
        self.web: server.Server
        self.orchestrator: Orchestrator | None = None
        self.ahead: asyncio.Event
        """Set when the game has gone ahead of the time, and must start again to go back."""

    def _on_checked(self, valid: Set[int], invalid: Mapping[int, str]) -> None:
        self.predict.on_checked(valid, invalid)

    def _on_leaderboard(self, leaderboard: Leaderboard) -> None:
        self.live.publish(leaderboard)
        self.news.tell(LeaderboardMade(leaderboard.created_at_s))

    def _on_closed(self, closed: Round) -> None:
        self.score.wake()

    def _connected(self) -> frozenset[str]:
        return frozenset(self.predict.fleet.running.keys() - self.predict.paused.keys())

    def _vitals(self) -> Vitals:
        return Vitals(
            services=[
                ServiceState(
                    service.name, service.failure, service.restarts, time.monotonic() - service.changed_s
                )
                for service in self.services
            ],
            workers=self.config.scoring.workers,
            pool_waiting=self.score.waiting,
            journal_waiting=self.journal.waiting,
            written_for_s=self.db.written_for_s,
            loop_delays_s=(
                self.watchdog.delay_s(0.5),
                self.watchdog.delay_s(0.99),
                self.watchdog.delay_s(1.0),
            ),
            late_s=self.predict.late_s,
            backup=self.backups.state if self.backups is not None else None,
        )

    def problems(self) -> list[Problem]:
        """What keeps the game from being well; empty when it is."""
        found = [
            Problem(f"{service.name} is down: {service.failure}", _TO_DO["service"])
            for service in self.services
            if service.failure
        ]
        found += [
            Problem(stale_price(state), _TO_DO["price"])
            for state in self.feed.states()
            if state.stale and not self.feed.finished
        ]
        if not self.predict.fleet.connected:
            found.append(Problem("the orchestrator is not connected", _TO_DO["orchestrator"]))
        if self.predict.late_s > 1.0:
            what = f"the newest rounds opened {self.predict.late_s:.1f} s late"
            found.append(Problem(what, _TO_DO["late"]))
        if trouble := self.clock.trouble:
            found.append(Problem(trouble, _TO_DO["clock"]))
        if self.journal.failing:
            found.append(Problem(f"the database can't be written: {self.journal.failing}", _TO_DO["journal"]))
        if self.backups is not None and (failure := self.backups.state.failure):
            found.append(Problem(f"the last backup failed: {failure}", _TO_DO["backup"]))
        return found


async def run(config: Config, reloader: Reloader) -> bool:
    """Run the game until it is asked to stop; whether everything could be stored.

    Raises CondorError (StartError, StorageError, ConfigError) where it can't start.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    rereading = asyncio.create_task(reloader.run())
    stopping.when_asked(partial(_on_loop, loop, stop.set))
    stopping.when_hung_up(partial(_on_loop, loop, reloader.ask))
    try:
        again = True
        while again:
            async with playing(config) as game:
                again = await _is_to_start_again(game, stop)
                log.info("stopping", grace_s=config.game.shutdown_grace_s)
    finally:
        stopping.when_asked(None)
        stopping.when_hung_up(None)
        rereading.cancel()
    if game.journal.waiting:
        log.error("stopped", not_stored=game.journal.waiting, why=game.journal.failing)
    else:
        log.info("stopped", stored="everything")
    return not game.journal.waiting


async def _ahead_and_stored(game: Game) -> None:
    await game.ahead.wait()
    await game.journal.flushed()  # what waits there would end with the game


async def _is_to_start_again(game: Game, stop: asyncio.Event) -> bool:
    """Wait until the game is to end; whether another one is to begin then."""
    waits = [asyncio.ensure_future(wait) for wait in (stop.wait(), _ahead_and_stored(game))]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
    if again := not stop.is_set():
        log.warning("starting_again", why="the game's time had gone ahead: the machine's clock was wrong")
    return again


def _on_loop(loop: asyncio.AbstractEventLoop, then: Callable[[], None]) -> None:
    loop.call_soon_threadsafe(then)  # a signal handler may run in the middle of anything


@asynccontextmanager
async def playing(config: Config, clock: Clock | None = None) -> AsyncIterator[Game]:
    """A running game; on leaving, the rounds in flight are finished and everything is shut down in order.

    `clock` replaces the one that the feed and the stored game call for.
    """
    async with AsyncExitStack() as stack:
        socket = server.bind(config.report.host, config.report.port)
        stack.callback(socket.close)
        db = await stack.enter_async_context(Database(config.storage.path))
        sources = make_sources(config)
        for source in sources:
            stack.push_async_callback(source.aclose)
        witness, ahead = None, asyncio.Event()
        if clock is None and sources[0].simulated:
            clock = simulated_clock(config, sources[0], await db.read(repositories.load_clock))
        elif clock is None:
            clock = LiveClock(await db.read(repositories.load_clock))
            witness = Witness(config, clock, sources, ahead.set)
            await witness.confirm(db)
        failure: BaseException | None = None
        async with anyio.create_task_group() as tasks:
            try:
                game = await _start(config, clock, db, sources, socket, tasks, witness)
                game.ahead = ahead
                try:
                    yield game
                finally:
                    with anyio.CancelScope(shield=True):
                        await _stop(game)
            except BaseException as error:  # raised outside of the group, which would wrap it
                failure = error
            tasks.cancel_scope.cancel()
        if failure is not None:
            raise failure


async def _start(
    config: Config,
    clock: Clock,
    db: Database,
    sources: Sequence[Source],
    socket: socket_module.socket,
    tasks: TaskGroup,
    witness: Witness | None,
) -> Game:
    """Start every service, the models' processes first: they take longest."""
    news = News()
    models: list[Service] = []
    orchestrator: Orchestrator | None = None
    port = config.orchestrator.port
    if config.orchestrator.mode == "local":
        believed_s = machine_s if witness is None else clock.now
        orchestrator = Orchestrator(config, config.storage.path.parent, believed_s=believed_s)
        models = [Service("models", orchestrator.run, news.tell)]
        await tasks.start(models[0].serve)
        port = orchestrator.port
    game = Game(config, clock, db, sources, port, news)
    game.orchestrator = orchestrator
    await game.feed.start()
    roster = Roster(config.game.name, clock, db, game.journal, game.predict, orchestrator)
    await roster.start()
    rescorer = Rescorer(config, clock, db, game.score)
    app = create_app(game.live, db.reports)
    game.web = server.Server(app, socket, before_stop=app.state.stream.end)
    started = [
        Service("control", Control(db.path, {**roster.commands, **rescorer.commands}).run, news.tell),
        Service("predict", game.predict.run, news.tell),
        Service("fleet", game.predict.fleet.run, news.tell),
        Service("rescore", rescorer.run, news.tell),
        Service("score", game.score.run, news.tell),
        Service("feed", game.feed.run, news.tell, may_end=True),
        Service("upkeep", Upkeep(config, clock, db, game.journal).run, news.tell),
        Service("journal", game.journal.run, news.tell),
        Service("report", game.web.run, news.tell),
        Service("watchdog", game.watchdog.run, news.tell),
    ]
    if witness is not None:
        started.append(Service("clock", witness.run, news.tell))
    if game.backups is not None:
        started.append(Service("backup", game.backups.run, news.tell))
    if config.webhook.url:
        webhook = Webhook(config.webhook)
        alarms = Alarms(config, game.live, game.feed, orchestrator, webhook.put)
        started += [
            Service("alarms", alarms.run, news.tell),
            Service("webhook", webhook.run, news.tell),
        ]
    for service in started:
        tasks.start_soon(service.serve, name=service.name)
    game.services = [*started[:3], *models, *started[3:]]  # in the order in which they are stopped
    _announce(config, sources, game.web.url)
    spare_the_loop()
    return game


async def _stop(game: Game) -> None:
    grace_s = game.config.game.shutdown_grace_s
    if game.orchestrator is not None:
        game.orchestrator.retire()
    await game.predict.finish(grace_s)
    game.journal.append(repositories.save_clock, game.clock.now())
    for service in game.services:
        if service.name == "journal":  # nobody writes to it any more
            with anyio.move_on_after(_STORE_WAIT_S):
                await game.journal.flushed()
        await service.stop()


def _announce(config: Config, sources: Sequence[Source], url: str) -> None:
    prices = ", then ".join(source.name for source in sources)
    if sources[0].simulated:
        prices += " (simulated)"
    assets = " ".join(config.game.assets)
    log.info("game_started", game=config.game.name, version=__version__, prices=prices, assets=assets)
    log.info("look_here", url=url, database=str(config.storage.path))
    soonest = min(config.game.settings, key=lambda setting: setting.horizon_s)
    wait_s = soonest.horizon_s + config.scoring.settle_delay_s + soonest.interval_s
    log.info("first_scores", in_about_s=round(wait_s / config.game.speed), stop_with="Ctrl-C")
