"""The predict loop in real time, against real gRPC servers in processes of their own.

`python -m benchmarks.predict [part ...]` runs some of the parts; each has a fresh process. Its figures are
ratios to a reference that takes turns with it: the client library's bare calls to the same fleet, or the same
game's rounds without the disturbance. The fleet shares the machine's cores with the game.
"""

from __future__ import annotations

import asyncio
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import orjson
import psutil
from model_runner_client.grpc.generated.commons_pb2 import Argument, Variant, VariantType
from model_runner_client.model_concurrent_runners import DynamicSubclassModelConcurrentRunner

from benchmarks._client import asking
from condor_lite import config as configuration
from condor_lite.clock import GameClock
from condor_lite.config import Config
from condor_lite.game.entities import Answer, AnswerStatus, Leaderboard
from condor_lite.game.scoring import Rules
from condor_lite.logs import configure
from condor_lite.news import News, PricesCame
from condor_lite.pool import ScoringPool
from condor_lite.predict import PredictLoop
from condor_lite.prices.feed import Feed
from condor_lite.prices.sources import make_sources
from condor_lite.report import server as web
from condor_lite.report.api import create_app
from condor_lite.report.live import Live, Vitals
from condor_lite.storage import repositories
from condor_lite.storage.compression import compress
from condor_lite.storage.database import Database
from condor_lite.storage.journal import Journal
from condor_lite.watchdog import spare_the_loop
from condor_lite.worker import ValidationItem
from tests.fleet.process import FleetProcess

SEGMENTS = 60
CONFIG = """
[[game.settings]]
assets = {assets}
horizon = "{horizon}"
step = "{tick}"
interval = "{interval}"

[feed]
tick = "{tick}"
history = "{history}"
max_staleness = "1h"

[predict]
timeout = "{interval}"
max_consecutive_failures = 1000000
max_consecutive_timeouts = 1000000
max_segment_bytes = 32768

[orchestrator]
mode = "remote"
port = {port}

[log]
level = "error"
"""

BEAT_S = 0.005
TURNS = 3
HOSTILE = {
    "hanging": "hangs",
    "slow": "slow",
    "garbage": "truncated",
    "frozen": "well",
    "dead": "well",
    "at the limit (2 MB)": "two_mb",
    "over it (5 MB)": "five_mib",
}
"""Who the ten are, and how they behave: the process of some is stopped or killed."""


def main(parts: Sequence[str] = ()) -> None:
    """Run the parts in turn; all where none is named."""
    if unknown := [part for part in parts if part not in PARTS]:
        sys.exit(f"no part {', '.join(unknown)}; there are: {', '.join(PARTS)}")
    for part in parts or PARTS:
        subprocess.run([sys.executable, "-m", "benchmarks.predict", "run", part], check=True)


class TimedJournal(Journal):
    """Notes when a round was opened, and when its answers were on disk."""

    def __init__(self, db: Database) -> None:
        super().__init__(db)
        self.rounds: dict[int, Times] = {}

    def append(self, apply: Callable[..., Any], *arguments: Any, **options: Any) -> bool:
        if apply is repositories.open_rounds:
            now_s = time.time()
            for opened in arguments[0]:
                self.rounds[opened.round_no] = Times(opened.scheduled_at_s, now_s)
        elif apply is repositories.add_answers:
            options["then"] = partial(self._stored, arguments[0], options.get("then"))
        return super().append(apply, *arguments, **options)

    def _stored(self, answers: Sequence[Answer], then: Callable[[int], None] | None, new: int) -> None:
        now_s = time.time()
        if then is not None:
            then(new)
        for answer in answers:
            if answer.status is AnswerStatus.SUCCESS:
                self.rounds[answer.round_no].stored_s[answer.model_no] = now_s


@dataclass(slots=True)
class Times:
    """Of one round, wall. `stored_s` by `model_no`."""

    scheduled_at_s: int
    opened_s: float
    stored_s: dict[int, float] = field(default_factory=dict)

    @property
    def ended_s(self) -> float:
        """When its last answer was on disk."""
        return max(self.stored_s.values())


@dataclass
class Game:
    config: Config
    db: Database
    journal: TimedJournal
    predict: PredictLoop
    feed: Feed
    news: News
    prices_s: dict[int, float]
    """By the time of the round to come, when its prices were at hand."""
    prices: anyio.CancelScope
    """Cancelled, no new ones come."""

    async def connected(self, models: int) -> None:
        """Return when so many models have their history."""
        lanes = (one.lane for one in self.predict.participants.values())
        while sum(lane is not None and lane.ready for lane in lanes) != models:
            await asyncio.sleep(0.02)
            lanes = (one.lane for one in self.predict.participants.values())

    async def next_rounds(self, count: int) -> list[Times]:
        """The next rounds that are held; half the time to another one after the last of them opened."""
        first = len(self.journal.rounds)
        while len(self.journal.rounds) < first + count:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        settings = self.config.game.settings
        await asyncio.sleep(settings[0].interval_s / len(settings) / 2)
        await self.journal.flushed()
        return list(self.journal.rounds.values())[first : first + count]

    def spent_s(self, times: Times) -> float:
        """From its prices at hand to its last answer on disk."""
        return times.ended_s - self.prices_s[times.scheduled_at_s]

    def numbers(self, prefix: str) -> set[int]:
        known = self.predict.participants.items()
        return {one.model.model_no for model_id, one in known if model_id.startswith(prefix)}


@asynccontextmanager
async def playing(
    port: int,
    interval_s: int = 1,
    tick_s: int = 1,
    history: str = "1h",
    assets: Sequence[str] = ("BTC",),
    prepare: Callable[[sqlite3.Connection], None] = lambda conn: None,
) -> AsyncIterator[Game]:
    """A predict loop with all that it needs, in real time. `prepare` may fill the database before."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        path = folder / "config.toml"
        names = orjson.dumps(list(assets)).decode()
        spans = {"interval": f"{interval_s}s", "tick": f"{tick_s}s", "horizon": f"{SEGMENTS * tick_s}s"}
        path.write_text(CONFIG.format(port=port, history=history, assets=names, **spans))
        config = configuration.load(path, {})
        configure(config.log)
        db = await stack.enter_async_context(Database(config.storage.path))
        await db.write(prepare)
        clock, (source,) = GameClock(), make_sources(config)
        journal, feed = TimedJournal(db), Feed(config, clock, db, source)
        await feed.start()
        prices_s: dict[int, float] = {}
        feed.subscribe(lambda assets: prices_s.setdefault(feed.book.newest_s("BTC") or 0, time.time()))
        news = News()
        feed.subscribe(lambda assets: news.tell(PricesCame(assets)))
        predict = PredictLoop(config, clock, db, journal, feed, port, lambda closed: None, news.tell)
        prices = anyio.CancelScope()

        async def feeding() -> None:
            with prices:
                await feed.run()

        async with anyio.create_task_group() as tasks:
            for run in (journal.run, predict.fleet.run, feeding, predict.run):
                tasks.start_soon(run)
            spare_the_loop()
            yield Game(config, db, journal, predict, feed, news, prices_s, prices)
            await predict.finish(1.0)
            tasks.cancel_scope.cancel()


@asynccontextmanager
async def serving(game: Game, leaderboard: Leaderboard) -> AsyncIterator[int]:
    """The game's report, with this leaderboard; its port."""
    live = Live(
        config=game.config,
        clock=GameClock(),
        started_at_s=time.time(),
        problems=list,
        feeds=game.feed.states,
        connected=lambda: frozenset(game.predict.fleet.running),
        vitals=lambda: Vitals([], 0, 0, 0, None, (0.0, 0.0, 0.0), 0.0),
        news=game.news,
    )
    live.publish(leaderboard)
    app = create_app(live, game.db.reports)
    served = web.Server(app, web.bind("127.0.0.1", 0), before_stop=app.state.stream.end)
    async with anyio.create_task_group() as tasks:
        await tasks.start(served.run)
        yield served.port
        served.stop()


@dataclass
class Beats:
    """How late the event loop was, sampled finely, and how long it computed itself between two samples.

    The difference is what others kept from it: the fleet and whatever else runs on the machine.
    """

    delays_s: list[float] = field(default_factory=list)
    computing_s: list[float] = field(default_factory=list)

    async def run(self) -> None:
        while True:
            before_s, computed_s = time.perf_counter(), time.thread_time()
            await asyncio.sleep(BEAT_S)
            self.delays_s.append(time.perf_counter() - before_s - BEAT_S)
            self.computing_s.append(time.thread_time() - computed_s)

    def __str__(self) -> str:
        delays, computing = (
            f"p99 {ms(quantile(values, 0.99))}, max {ms(max(values))}"
            for values in (self.delays_s, self.computing_s)
        )
        return f"loop delay {delays}; computing {computing}"


@asynccontextmanager
async def watched(beats: Beats | None = None) -> AsyncIterator[Beats]:
    beats = beats or Beats()
    task = asyncio.create_task(beats.run())
    try:
        yield beats
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def quantile(values: Sequence[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(q * len(ordered)), len(ordered) - 1)]


def ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"


def row(name: str, figure: str, note: str = "") -> None:
    print(f"  {name:<34}{figure:>10}   {note}", flush=True)


# -- the reference -------------------------------------------------------------------------------------------


@asynccontextmanager
async def bare_client(game: Game, port: int) -> AsyncIterator[Bare]:
    """The client library alone, connected to the same models as the game."""
    setting = game.config.game.settings[0]
    client = DynamicSubclassModelConcurrentRunner(
        5, game.config.game.crunch_id, "127.0.0.1", port, game.config.game.base_class
    )
    await client.init()
    predict = [
        _argument(1, VariantType.STRING, setting.asset.encode()),
        _argument(2, VariantType.INT, setting.horizon_s.to_bytes(8, "little")),
        _argument(3, VariantType.INT, setting.step_s.to_bytes(8, "little")),
    ]

    async def calls(tick: bool) -> float:
        points = orjson.dumps({setting.asset: [[int(time.time()), 95_000.0]]})
        started_s = time.perf_counter()
        if tick:
            await client.call("tick", ([_argument(1, VariantType.JSON, points)], []))
        results = await client.call("predict", (predict, []))
        spent_s = time.perf_counter() - started_s
        if len(results) != len(client.model_cluster.models_run):
            raise SystemExit(f"{len(results)} of {len(client.model_cluster.models_run)} answered the client")
        return spent_s

    try:
        yield calls
    finally:
        await asyncio.gather(*(one.close() for one in client.model_cluster.models_run.values()))
        await client.model_cluster.ws_client.disconnect()
        client.model_cluster.ws_client.disconnect_sync = lambda: None


Bare = Callable[[bool], Awaitable[float]]
"""Ticks all models, or does not, asks them, and returns how long that took."""


def _argument(position: int, kind: Any, value: bytes) -> Argument:
    return Argument(position=position, data=Variant(type=kind, value=value))


@dataclass
class Beside:
    """Rounds in turns with bare calls, the median time of these, and the loop delay in the rounds."""

    held: list[Times] = field(default_factory=list)
    bare_s: float = 0.0
    beats: Beats = field(default_factory=Beats)

    def lost(self, models: int) -> int:
        return sum(models - len(times.stored_s) for times in self.held)

    @property
    def open_s(self) -> float:
        """From a round's opening to its last answer on disk, the median."""
        return statistics.median(times.ended_s - times.opened_s for times in self.held)


async def _beside_bare(game: Game, port: int, rounds: int) -> tuple[Beside, Beside]:
    """Rounds, each with a tick of new prices before it; then some without, as between two ticks."""
    async with bare_client(game, port) as bare:
        await game.next_rounds(2)
        ticked = await _in_turns_with(bare, True, game, rounds)
        game.prices.cancel()
        await game.next_rounds(1)
        return ticked, await _in_turns_with(bare, False, game, rounds)


async def _in_turns_with(bare: Bare, tick: bool, game: Game, rounds: int) -> Beside:
    beside, reference = Beside(), []
    for _ in range(rounds):
        async with watched(beside.beats):
            beside.held += await game.next_rounds(1)
        reference.append(await bare(tick))
    beside.bare_s = statistics.median(reference)
    return beside


def compare_asked(name: str, quiet: Beside, models: int, target: str = "") -> None:
    """Print one row: a round before which there was no new price."""
    note = f"{quiet.open_s / quiet.bare_s:.2f}   (bare predict {ms(quiet.bare_s)}{target})"
    row(name, ms(quiet.open_s), f"{note}; {quiet.lost(models)} lost; {quiet.beats}")


# -- latency -------------------------------------------------------------------------------------------------


async def latency() -> None:
    """From new prices at hand to the last commit, and the client library's bare calls in turn with it."""
    models = 100
    async with FleetProcess(models) as fleet, playing(fleet.port) as game:
        await game.connected(models)
        ticked, quiet = await _beside_bare(game, fleet.port, 12)
        ours_s = statistics.median(map(game.spent_s, ticked.held))
    print(f"latency: {models} models, 60 segments: prices at hand -> tick, predict, committed; median of 12")
    row("bare tick, bare predict", ms(ticked.bare_s), "1.00 (reference; stores nothing)")
    note = f"(target <= 1.2, and <= 60 ms); {ticked.lost(models)} lost; {ticked.beats}"
    row("this game", ms(ours_s), f"{ours_s / ticked.bare_s:.2f}   {note}")
    compare_asked("no new price: opened -> committed", quiet, models)


# -- isolation -----------------------------------------------------------------------------------------------


async def isolation() -> None:
    """The 90 healthy ones' answers with and without ten others, in turns: these are paused in between."""
    print("isolation: 90 healthy of 100; round opens -> answer committed; with the 10 / without")
    async with AsyncExitStack() as stack:
        fleet = await stack.enter_async_context(FleetProcess(90))
        game = await stack.enter_async_context(playing(fleet.port))
        rabble = {
            name: FleetProcess(10, {behaviour: 10}, prefix="bad-") for name, behaviour in HOSTILE.items()
        }
        await asyncio.gather(*map(stack.enter_async_context, rabble.values()))
        await game.connected(90)
        healthy = game.numbers("well")
        await game.next_rounds(2)
        for name, bad in rabble.items():
            await fleet.do("say", entries=bad.entries)
            await game.connected(100)
            if name == "frozen":
                bad.freeze()
            elif name == "dead":
                bad.kill()
            elif name == "garbage":  # the scorer would have found it out after the first round
                game.predict.on_checked((), dict.fromkeys(game.numbers("bad-truncated"), "not JSON"))
            beside, alone, beats = await _in_turns(game, [entry["model_id"] for entry in bad.entries])
            await fleet.do("say", entries=[{**entry, "state": "STOPPED"} for entry in bad.entries])
            await game.connected(90)
            compare_answers(name, beside, alone, healthy, beats)


async def _in_turns(game: Game, guests: list[str]) -> tuple[list[Times], list[Times], Beats]:
    """Rounds with and without the guests, and the loop's delay in the former."""
    beside, alone, beats = [], [], Beats()
    for _ in range(TURNS):
        for guest in guests:
            game.predict.resume(guest)
        async with watched(beats):
            beside += await game.next_rounds(2)
        for guest in guests:
            game.predict.pause(guest)
        alone += await game.next_rounds(2)
    for guest in guests:
        game.predict.resume(guest)
    return beside, alone, beats


def compare_starts(rounds: Sequence[Times], reference: Sequence[Times]) -> None:
    """Print one row: how late the rounds opened at most, and how late others did."""
    late_s, was_late_s = (
        max(times.opened_s - times.scheduled_at_s for times in held) for held in (rounds, reference)
    )
    note = f"{late_s / was_late_s:.2f}   (without {ms(was_late_s)}; target <= 100 ms)"
    row("rounds opened late, at most", ms(late_s), note)


def compare_answers(
    name: str,
    rounds: Sequence[Times],
    reference: Sequence[Times],
    models: set[int],
    beats: Beats,
    target: str = "(target <= 1.2);",
) -> None:
    """Print one row: median and p99 of the time to an answer's commit, as ratios to other rounds'."""
    figures = []
    for times in (rounds, reference):
        spent = [
            at_s - one.opened_s for one in times for number, at_s in one.stored_s.items() if number in models
        ]
        figures.append((statistics.median(spent), quantile(spent, 0.99), len(spent)))
    (median, p99, answers), (was_median, was_p99, _) = figures
    lost = len(rounds) * len(models) - answers
    row(
        name,
        f"{median / was_median:.2f}",
        f"p99 {p99 / was_p99:.2f}   {target} {ms(median)}, {ms(p99)}; {lost} lost; {beats}",
    )


# -- scale ---------------------------------------------------------------------------------------------------


async def scale() -> None:
    """10, 100 and 1,000 models."""
    print("scale: prices at hand -> all answers committed, median; to the bare client's tick and predict")
    process, costs_s = psutil.Process(), {}
    for models, interval_s, rounds in ((10, 1, 7), (100, 1, 7), (1000, 3, 5)):
        async with FleetProcess(models) as fleet, playing(fleet.port, interval_s, interval_s) as game:
            before = process.memory_info().rss
            await game.connected(models)
            await game.next_rounds(1)
            memory = (process.memory_info().rss - before) / models / 1000
            ticked, quiet = await _beside_bare(game, fleet.port, rounds)
            spent_s = statistics.median(map(game.spent_s, ticked.held))
        late_s = max(times.opened_s - times.scheduled_at_s for times in ticked.held)
        costs_s[models] = spent_s / models
        ratio, cost = f"{spent_s / ticked.bare_s:.2f}", f"{1e6 * costs_s[models]:.0f} us a model"
        note = f"{ratio}   (bare {ms(ticked.bare_s)}); {cost}"
        row(f"{models} models", ms(spent_s), f"{note}; {ticked.lost(models)} lost; {memory:.0f} kB a model")
        note = f"round opened -> all committed {ms(ticked.open_s)}; {ticked.beats}"
        row("", "", f"{note}; opened at most {ms(late_s)} late")
        target = "; target <= 500 ms" if models == 1000 else ""
        compare_asked("  no new price: opened -> committed", quiet, models, target)
    row("a model of 1,000 to one of 100", f"{costs_s[1000] / costs_s[100]:.2f}", "(target: linear)")


# -- newcomers -----------------------------------------------------------------------------------------------


async def newcomers() -> None:
    """Twenty at once, three times, with a month of four assets' history."""
    print("newcomers: 20 at once with 30 days of 4 assets; the 100 others' answers, with / without")
    assets = ("BTC", "ETH", "SOL", "XAU")
    async with (
        FleetProcess(100) as fleet,
        FleetProcess(0) as others,
        playing(fleet.port, 4, 1, "30d", assets) as game,  # a round a second
    ):
        await game.connected(100)
        healthy = game.numbers("well")
        await game.next_rounds(2)
        beside, alone, beats = [], [], Beats()
        for turn in range(TURNS):
            alone += await game.next_rounds(3)
            joined = await others.do("join", models=20, behaviour="well", prefix=f"new{turn}-")
            async with watched(beats):
                await fleet.do("say", entries=joined)
                beside += await game.next_rounds(3)
            await game.connected(120)
            await fleet.do("say", entries=[{**entry, "state": "STOPPED"} for entry in joined])
            await game.connected(100)
        compare_answers("20 newcomers", beside, alone, healthy, beats)


# -- load ----------------------------------------------------------------------------------------------------


async def load() -> None:
    """The pool busy without end, and 64 connections that ask for the leaderboard without a pause."""
    async with FleetProcess(100) as fleet, playing(fleet.port) as game:
        await game.connected(100)
        await game.next_rounds(2)
        alone = await game.next_rounds(6)
        async with (
            serving(game, Leaderboard(int(time.time()), 1, ())) as port,
            anyio.create_task_group() as tasks,
        ):
            tasks.start_soon(_saturate, game.config)
            async with asking(port, 64, ["/reports/leaderboard"]) as asked, watched() as beats:
                beside = await game.next_rounds(6)
            tasks.cancel_scope.cancel()
        healthy = game.numbers("well")
    print("load: 100 models, the pool saturated, 64 connections on /reports/leaderboard; with / without")
    compare_starts(beside, alone)
    compare_answers("round opens -> answer committed", beside, alone, healthy, beats, "")
    row("requests answered", f"{asked.a_second:.0f}", f"a second; failed: {asked.failed or 'none'}")


async def _saturate(config: Config) -> None:
    setting = config.game.settings[0]
    density = {"type": "builtin", "name": "norm", "params": {"loc": 0, "scale": 1}}
    payload = orjson.dumps([density] * setting.segments)
    async with ScoringPool(config.scoring.workers, Rules(), 10.0) as pool:
        while True:
            await pool.validate([ValidationItem(compress(payload), setting)] * 2000)


PARTS: dict[str, Callable[[], Awaitable[None]]] = {
    "latency": latency,
    "isolation": isolation,
    "scale": scale,
    "newcomers": newcomers,
    "load": load,
}

if __name__ == "__main__":
    match sys.argv[1:]:
        case ["run", part]:
            asyncio.run(PARTS[part]())
        case parts:
            main(parts)
