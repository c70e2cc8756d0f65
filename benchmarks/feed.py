"""A month of history over HTTP into the database, and a minute's new prices on their way to a model.

Own time is the CPU time of this process, all threads: the exchange is a process of its own. Its rate limit
(8 requests a second take 72 s for the month) is lifted. The reference takes turns with it: the same pages
fetched and parsed, and nothing done with them.
"""

from __future__ import annotations

import asyncio
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import httpx
import orjson
import psutil

from condor_lite import config as configuration
from condor_lite.clock import GameClock
from condor_lite.config import Config
from condor_lite.logs import configure
from condor_lite.predict import PredictLoop
from condor_lite.prices.coinbase import CoinbaseSource
from condor_lite.prices.feed import Feed
from condor_lite.storage.database import Database
from condor_lite.storage.journal import Journal
from condor_lite.watchdog import spare_the_loop
from tests.fleet import ModelServer, Orchestrator
from tests.fleet.model import DONE, CallRequest, Wire
from tests.price_server import PriceServer
from tests.stage import until

ASSETS = ("BTC", "ETH", "SOL", "XAU")
DAYS, PAGE = 30, 300
POINTS = DAYS * 1440
TURNS = 3
AT_ONCE = 4

MANY = 100
TICK_S, TICKS = 2, 10

CONFIG = """
[[game.settings]]
assets = {assets}
horizon = "1h"
step = "1m"
interval = "1h"

[feed]
source = "{source}"
tick = {tick}
history = "{history}"
base_url = "{url}"

[feed.symbols]
{symbols}

[orchestrator]
mode = "remote"
port = {port}

[log]
level = "error"
"""


def main(parts: Sequence[str] = ()) -> None:
    """Run the parts in turn, each in a fresh process; all where none is named."""
    for part in parts or PARTS:
        subprocess.run([sys.executable, "-m", "benchmarks.feed", "run", part], check=True)


# -- history -------------------------------------------------------------------------------------------------


async def history() -> None:
    """30 days of 4 assets: 144 pages an asset."""
    with _exchange() as url, tempfile.TemporaryDirectory() as folder:
        async with httpx.AsyncClient() as client:
            await client.get(f"{url}/products")  # it is there
        before = psutil.Process().memory_info().rss
        ours, bare = [], []
        for turn in range(TURNS):
            ours.append(await _fetch_all(Path(folder) / f"{turn}", url))
            if turn == 0:
                grown = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            bare.append(await _only_fetch(url))
    own_s, wall_s, size = (statistics.median(column) for column in zip(*ours, strict=True))
    bare_s, bare_wall_s, _ = (statistics.median(column) for column in zip(*bare, strict=True))
    print(f"{DAYS} days of {len(ASSETS)} assets, {len(ASSETS) * POINTS // PAGE} pages of {PAGE} candles")
    print(
        f"  own time                  {own_s:>9.2f} s   = {own_s / bare_s:.2f} x httpx and orjson alone"
        "   (target < 5 s)"
    )
    print(f"  wall                      {wall_s:>9.2f} s   = {wall_s / bare_wall_s:.2f} x, {AT_ONCE} at once")
    print(f"  memory at most            {grown / 2**20:>9.0f} MiB more than before")
    print(f"  in the file               {size / len(ASSETS) / POINTS:>9.0f} bytes a price")


async def _fetch_all(folder: Path, url: str) -> tuple[float, float, float]:
    """CPU and wall seconds until all is in the database, and the file's size."""
    symbols = {asset: f"{asset}-USD" for asset in ASSETS} | {"XAU": "PAXG-USD"}
    config = _config(folder, ASSETS, url=url, symbols=symbols, tick=60, history=f"{DAYS}d")
    async with Database(config.storage.path) as db:
        source = CoinbaseSource(config.feed)
        source.rate_per_s = 1e9
        started_s, cpu_s = time.perf_counter(), time.process_time()
        feed = Feed(config, GameClock(), db, source)
        await feed.start()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(feed.run)
            await feed.history_ready.wait()
            while (stored := await db.read(_count)) < len(ASSETS) * (POINTS - 1):  # noqa: ASYNC110 - no event
                await asyncio.sleep(0.02)
            own_s, wall_s = time.process_time() - cpu_s, time.perf_counter() - started_s
            tasks.cancel_scope.cancel()
        await source.aclose()
        for state in feed.states():
            assert state.error is None, state
            assert state.count >= POINTS - 1, state
        assert stored >= len(ASSETS) * (POINTS - 1)
    return own_s, wall_s, config.storage.path.stat().st_size


async def _only_fetch(url: str) -> tuple[float, float, float]:
    newest_s = int(time.time()) // 60 * 60
    pages = [
        (f"{url}/products/{symbol}-USD/candles", newest_s - 60 * PAGE * page)
        for page in range(POINTS // PAGE)
        for symbol in ("BTC", "ETH", "SOL", "PAXG")
    ]
    rows = 0

    async def fetch_some() -> None:
        nonlocal rows
        while pages:
            address, end_s = pages.pop()
            times = {"start": _iso(end_s - 60 * (PAGE - 1)), "end": _iso(end_s)}
            reply = await client.get(address, params={"granularity": 60, **times})
            rows += len(orjson.loads(reply.content))

    started_s, cpu_s = time.perf_counter(), time.process_time()
    async with httpx.AsyncClient() as client, anyio.create_task_group() as tasks:
        for _ in range(AT_ONCE):
            tasks.start_soon(fetch_some)
    own_s, wall_s = time.process_time() - cpu_s, time.perf_counter() - started_s
    assert rows >= len(ASSETS) * (POINTS - 1), rows
    return own_s, wall_s, 0.0


# -- a minute of many assets ---------------------------------------------------------------------------------


class Market:
    """Answers for all assets at one moment: when the last one was asked for."""

    name = "market"
    simulated = False
    latency_s = 0.2
    page_points = 5_000
    reach_s: int | None = None
    skew_s: float | None = None

    def __init__(self) -> None:
        self.together = False
        self.arrived_s: dict[int, tuple[float, float]] = {}
        """By tick: on the clock, and in CPU time of the loop."""
        self._asked = 0
        self._all = asyncio.Event()

    async def fetch(self, asset: str, after_s: int, until_s: int, step_s: int) -> list[tuple[int, float]]:
        first_s = after_s // step_s * step_s + step_s
        points = [(ts_s, 100 + ts_s % 1009 / 100) for ts_s in range(first_s, until_s + 1, step_s)]
        if self.together:
            self._asked += 1
            arrives = self._all
            if self._asked == MANY:
                self._asked, self._all = 0, asyncio.Event()
                self.arrived_s[until_s] = time.perf_counter(), time.thread_time()
                arrives.set()
            await arrives.wait()
        return points

    def end_s(self, asset: str) -> int | None:
        return None

    async def aclose(self) -> None:
        pass


async def minute() -> None:
    """A new point of each of 100 assets, from the source's answers to the model that gets the tick."""
    given: dict[int, set[str]] = {}
    whole_s: dict[int, tuple[float, float]] = {}
    calls = 0

    async def notes(model: ModelServer, request: CallRequest) -> Wire:
        nonlocal calls
        if request.methodName != "tick":
            return DONE
        at_s = time.perf_counter(), time.thread_time()
        calls += 1
        tick = orjson.loads(request.methodArguments[0].data.value)
        for asset, points in tick.items():
            assets = given.setdefault(points[-1][0], set())
            assets.add(asset)
            if len(assets) == MANY:
                whole_s.setdefault(points[-1][0], at_s)
        return DONE

    market = Market()
    model = ModelServer("model", notes, remember=False)
    async with _feeding(market, model) as feed:
        market.together = True
        first = calls
        await asyncio.sleep(TICK_S * (TICKS + 1))
        ticks = calls - first
        market.together = False
        book = feed.book
        tick = {asset: [list(book.last(asset) or ())] for asset in book.history(2**40)}
    arrived = {ts_s: at_s for ts_s, at_s in market.arrived_s.items() if ts_s in whole_s}
    spent, own = (
        [1000 * (whole_s[ts_s][which] - at_s[which]) for ts_s, at_s in arrived.items()] for which in (0, 1)
    )
    assert len(spent) >= TICKS - 1, (len(spent), len(market.arrived_s))
    bare = await _bare_call(tick)
    middle = statistics.median(spent)
    print(f"a new price of {MANY} assets, from arrival to the model that has the tick, {len(spent)} times")
    print(
        f"  median                    {middle:>9.1f} ms  = {middle / bare:.1f} x encoding it and a bare gRPC "
        "call   (target < 20 ms)"
    )
    print(f"  at most                   {max(spent):>9.1f} ms  in {ticks / len(spent):.1f} calls")
    print(f"  the loop's own time       {statistics.median(own):>9.1f} ms")


async def _bare_call(tick: dict[str, list[list[float]]]) -> float:
    """Milliseconds for encoding the same tick and calling the same kind of server with it."""
    import grpc.aio
    from model_runner_client.grpc.generated.commons_pb2 import Argument, Variant, VariantType
    from model_runner_client.grpc.generated.dynamic_subclass_pb2_grpc import DynamicSubclassServiceStub

    model = ModelServer("bare", _done, instance=True, remember=False)
    await model.start()
    spent = []
    async with grpc.aio.insecure_channel(f"127.0.0.1:{model.port}") as channel:
        stub = DynamicSubclassServiceStub(channel)
        for _ in range(50):
            started_s = time.perf_counter()
            data = Variant(type=VariantType.JSON, value=orjson.dumps(tick))
            await stub.Call(CallRequest(methodName="tick", methodArguments=[Argument(position=1, data=data)]))
            spent.append(1000 * (time.perf_counter() - started_s))
    await model.stop()
    return statistics.median(spent)


async def _done(model: ModelServer, request: CallRequest) -> Wire:
    return DONE


@asynccontextmanager
async def _feeding(market: Market, model: ModelServer) -> AsyncIterator[Feed]:
    """A running feed and predict loop with one model that has its history."""
    orchestrator = Orchestrator()
    await orchestrator.start()
    assets = [f"A{number:02}" for number in range(MANY)]
    with tempfile.TemporaryDirectory() as folder:
        config = _config(
            Path(folder),
            assets,
            url="",
            symbols={},
            tick=TICK_S,
            history="10m",
            port=orchestrator.port,
            source="benchmarks.feed:Market",  # a source of one's own may have any tick
        )
        async with Database(config.storage.path) as db:
            journal = Journal(db)
            feed = Feed(config, GameClock(), db, market)
            await feed.start()
            predict = PredictLoop(
                config, GameClock(), db, journal, feed, orchestrator.port, lambda closed: None
            )
            async with anyio.create_task_group() as tasks:
                for run in (journal.run, predict.fleet.run, feed.run, predict.run):
                    tasks.start_soon(run)
                await model.start()
                await orchestrator.announce(model)
                await until(lambda: _ready(predict))
                spare_the_loop()
                await asyncio.sleep(TICK_S)
                yield feed
                tasks.cancel_scope.cancel()
            await model.stop()
    await orchestrator.stop()


def _ready(predict: PredictLoop) -> bool:
    return any(known.lane is not None and known.lane.ready for known in predict.participants.values())


# -- both ----------------------------------------------------------------------------------------------------


def _config(
    folder: Path,
    assets: Sequence[str],
    *,
    url: str,
    symbols: dict[str, str],
    tick: int,
    history: str,
    port: int = 9091,
    source: str = "coinbase",
) -> Config:
    folder.mkdir(exist_ok=True)
    names = "\n".join(f'{asset} = "{symbol}"' for asset, symbol in symbols.items())
    text = CONFIG.format(
        assets=list(assets), source=source, url=url, symbols=names, tick=tick, history=history, port=port
    )
    (folder / "config.toml").write_text(text)
    config = configuration.load(folder / "config.toml", {})
    configure(config.log)
    return config


class _exchange:  # noqa: N801 - used as a function
    """The exchange as a process of its own; its address."""

    def __enter__(self) -> str:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.feed", "serve"], stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()


async def _serve() -> None:
    async with PriceServer() as server:
        print(server.url, flush=True)
        await asyncio.Event().wait()


def _count(conn: object) -> int:
    (count,) = conn.execute("SELECT count(*) FROM price").fetchone()  # type: ignore[attr-defined]
    return int(count)


def _iso(at_s: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at_s))


PARTS = {"history": history, "minute": minute}

if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        asyncio.run(_serve())
    elif sys.argv[1:2] == ["run"]:
        asyncio.run(PARTS[sys.argv[2]]())
    else:
        main(sys.argv[1:])
