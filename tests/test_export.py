"""`condor-lite export`: files that a replay plays as they were recorded, also beside a running game."""

from __future__ import annotations

import asyncio
import sqlite3
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest

from condor_lite import cli, stopping, supervisor
from condor_lite import config as configuration
from condor_lite.clock import SteppedClock
from condor_lite.config import Config
from condor_lite.export import ExportError, Written, lines, prices, read_range
from condor_lite.game.entities import Round
from condor_lite.prices.replay import read_recording
from condor_lite.storage import repositories
from condor_lite.storage.database import Database, open_read_only
from condor_lite.supervisor import Game, playing
from tests.exchange import Exchange, walk
from tests.fleet import ModelServer, Orchestrator
from tests.fleet.model import Behaviour, CallRequest, Wire, answers_well, normals, success
from tests.stage import START_S, until

pytestmark = pytest.mark.anyio

HOUR_S = 3600

CONFIG = """
[[game.settings]]
assets = ["BTC", "ETH"]
horizon = "10m"
step = "1m"
interval = "2m"

[feed]
history = "2h"

[orchestrator]
mode = "remote"
port = {port}

[report]
port = 0

[scoring]
workers = 1
"""


def as_wide_as(sigma: float) -> Behaviour:
    async def behaviour(model: ModelServer, request: CallRequest) -> Wire:
        if request.methodName == "tick":
            return await answers_well(model, request)
        return success(normals(request, sigma))

    return behaviour


@asynccontextmanager
async def orchestrated(*models: ModelServer) -> AsyncIterator[Orchestrator]:
    orchestrator = Orchestrator()
    await orchestrator.start()
    try:
        for model in models:
            await model.start()
        await orchestrator.announce(*models)
        yield orchestrator
    finally:
        for model in models:
            await model.stop()
        await orchestrator.stop()


def ready(game: Game) -> int:
    return sum(known.lane is not None and known.lane.ready for known in game.predict.participants.values())


async def play(
    config: Config, clock: SteppedClock, models: int, then: Callable[[], Awaitable[None]] | None = None
) -> None:
    """An hour of rounds and the time until the last one is scored; `then` while the game still runs."""
    async with playing(config, clock) as game:
        await until(lambda: ready(game) == models)
        await clock.run_until(START_S + HOUR_S + 900)
        await game.journal.flushed()
        await game.score.finish()
        if then is not None:
            await then()


def books(path: Path) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
    """The hour's rounds with all that was counted, and their scores."""
    part = "WHERE scheduled_at_s >= ? AND scheduled_at_s < ? ORDER BY scheduled_at_s, asset"
    with closing(open_read_only(path)) as db:
        rounds = db.execute(
            "SELECT asset, scheduled_at_s, status, reason, answered, failed, timed_out, absent, median, "
            f"no_move, resolved FROM round LEFT JOIN round_score USING (round_no) {part}",
            (START_S, START_S + HOUR_S),
        ).fetchall()
        scores = db.execute(
            "SELECT asset, scheduled_at_s, model_id, raw, counted, score FROM score JOIN round USING"
            f" (round_no) JOIN model USING (model_no) {part}, model_id",
            (START_S, START_S + HOUR_S),
        ).fetchall()
    return rounds, scores


async def test_a_recorded_live_hour_played_again_gives_the_same_rounds_and_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    span_s = (START_S - 4 * HOUR_S, START_S + 3 * HOUR_S)
    market = {"BTC": walk(1, *span_s), "ETH": walk(2, *span_s, start=1_500.0)}
    for minute in (7, 20, 21, 44):
        del market["BTC"][START_S + 60 * minute]  # nothing was traded
    late = {("BTC", START_S + 60 * minute): 70.0 for minute in (12, 33)}

    clock = SteppedClock(START_S - 30)
    exchange = Exchange(clock, market, late_s=late)

    sharp, wide = ModelServer("sharp", as_wide_as(5e-5)), ModelServer("wide", as_wide_as(3e-4))
    async with orchestrated(sharp, wide) as orchestrator:
        for name in ("live", "again"):
            (tmp_path / name).mkdir()
        (tmp_path / "live" / "config.toml").write_text(CONFIG.format(port=orchestrator.port))
        live = configuration.load(tmp_path / "live" / "config.toml", {})
        recording = tmp_path / "recording"

        async def export() -> None:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "condor_lite", "export", "prices", str(recording)),
                *("--config", str(tmp_path / "live" / "config.toml")),
                stdout=asyncio.subprocess.PIPE,
            )
            said, _ = await process.communicate()
            assert process.returncode == 0
            assert f"wrote {recording / 'BTC.csv'}: " in said.decode()

        with monkeypatch.context() as patch:
            patch.setattr(supervisor, "make_sources", lambda config: [exchange])
            await play(live, clock, 2, export)

        text = CONFIG.format(port=orchestrator.port).replace(
            "[feed]", f'[feed]\nsource = "replay"\npath = "{recording}"'
        )
        (tmp_path / "again" / "config.toml").write_text(text)
        again = configuration.load(tmp_path / "again" / "config.toml", {})
        await play(again, SteppedClock(START_S - 30), 2)

    rounds, scores = books(live.storage.path)
    assert len(rounds) == 60
    assert {row[2] for row in rounds} == {"scored"}
    assert len(scores) == 120
    assert (rounds, scores) == books(again.storage.path)


# The files


Points = list[tuple[int, float]]


@asynccontextmanager
async def stored(folder: Path, **points: Points) -> AsyncIterator[sqlite3.Connection]:
    """Prices in a database that a game has open, seen by a command beside it."""
    async with Database(folder / "game.db") as db:
        for asset, its_points in points.items():
            await db.write(repositories.add_prices, asset, its_points, "test", 0)
        with closing(open_read_only(db.path)) as conn:
            yield conn


def some(count: int, seed: int = 0) -> Points:
    return list(walk(seed, START_S, START_S + 60 * (count - 1)).items())


def everything(conn: sqlite3.Connection, folder: Path, **options: Any) -> list[Written]:
    return prices(conn, folder, *read_range(conn, None, None), **options)


async def test_every_digit_comes_back(tmp_path: Path) -> None:
    points = some(200)
    points[7] = (points[7][0], 0.1 + 0.2)
    points[8] = (points[8][0], 1e-12)
    points[9] = (points[9][0], 1.7976931348623157e308)
    async with stored(tmp_path, BTC=points) as conn:
        (written,) = everything(conn, tmp_path / "new" / "folder")
    assert written == Written(
        tmp_path / "new" / "folder" / "BTC.csv", 200, points[0][0], points[-1][0], changes=0
    )
    recording = read_recording(written.path, 60)
    assert list(zip(recording.ts_s.tolist(), recording.price.tolist(), strict=True)) == points
    assert written.path.read_text().startswith(f"timestamp,close\n{START_S},")


async def test_a_range_includes_both_its_ends(tmp_path: Path) -> None:
    async with stored(tmp_path, BTC=some(100), ETH=some(10)) as conn:
        (written,) = prices(conn, tmp_path, *read_range(conn, "2023-11-14T23:20", "2023-11-14T23:30"))
    assert (written.path.name, written.rows) == ("BTC.csv", 11)
    assert written.path.read_text().count("\n") == 12


async def test_a_time_may_be_said_as_how_long_ago(tmp_path: Path) -> None:
    async with Database(tmp_path / "game.db") as db:
        await db.write(repositories.record_rounds, [Round("BTC", 60, 10, START_S)])
        with closing(open_read_only(db.path)) as conn:
            assert read_range(conn, "3d", "1h") == (START_S - 3 * 86400, START_S - 3600)
            for since, until_, said in (
                ("yesterday", None, "--since 'yesterday': must be a time such as"),
                (None, "1.5h", "--until '1.5h': must be a time such as"),
                ("1h", "2h", "--since 1h is after --until 2h"),
            ):
                with pytest.raises(ExportError, match=said):
                    read_range(conn, since, until_)


async def test_what_is_there_is_replaced_only_when_asked(tmp_path: Path) -> None:
    (tmp_path / "ETH.csv").write_text("mine")
    async with stored(tmp_path, BTC=some(5), ETH=some(5)) as conn:
        with pytest.raises(ExportError, match=r"there already: .*ETH.csv; .*--overwrite"):
            everything(conn, tmp_path)
        assert not (tmp_path / "BTC.csv").exists()
        assert (tmp_path / "ETH.csv").read_text() == "mine"
        assert [one.rows for one in everything(conn, tmp_path, overwrite=True)] == [5, 5]
    assert (tmp_path / "ETH.csv").read_text() != "mine"


async def test_an_export_that_fails_leaves_nothing_and_touches_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "BTC.csv").write_text("old")

    def tell(asset: str, of: int, rows: int) -> None:
        if asset == "ETH":
            raise OSError(28, "No space left on device")

    async with stored(tmp_path, BTC=some(5), ETH=some(5)) as conn:
        with pytest.raises(ExportError, match=r"ETH.csv can't be written: No space left"):
            everything(conn, out, overwrite=True, tell=tell)
        assert [path.name for path in out.iterdir()] == ["BTC.csv"]
        assert (out / "BTC.csv").read_text() == "old"
        with pytest.raises(ExportError, match="can't be written: File exists"):
            everything(conn, out / "BTC.csv")


async def test_an_empty_range_is_said(tmp_path: Path) -> None:
    async with stored(tmp_path) as conn:
        with pytest.raises(ExportError, match="no prices are stored in that range"):
            everything(conn, tmp_path / "out")
    assert not (tmp_path / "out").exists()


async def test_what_a_replay_can_not_show_is_said(tmp_path: Path) -> None:
    async with Database(tmp_path / "game.db") as db:
        for source, first in (("coinbase", 0), ("kraken", 3), ("coinbase", 5)):
            points = [(START_S + 60 * minute, 1.0) for minute in range(first, first + 3)]
            await db.write(repositories.add_prices, "BTC", points, source, 0)
        with closing(open_read_only(db.path)) as conn:
            (written,) = everything(conn, tmp_path / "out")
    assert written.changes == 2
    assert "its source changes 2 times" in list(lines([written]))[1]


async def test_progress_is_told_on_the_way(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    async with stored(tmp_path, BTC=some(25_000), ETH=some(10)) as conn:
        everything(conn, tmp_path / "out", tell=lambda *news: told.append(news))
    assert told == [
        ("BTC", 25_000, 10_000),
        ("BTC", 25_000, 20_000),
        ("BTC", 25_000, 25_000),
        ("ETH", 10, 10),
    ]


async def test_the_command_says_what_it_wrote_or_why_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stopping, "restore", lambda: None)
    (tmp_path / "config.toml").write_text(CONFIG.format(port=1))
    out = tmp_path / "out"
    command = ["export", "prices", str(out), "--config", str(tmp_path / "config.toml")]
    assert cli.main(command) == 2
    assert "there is no database" in capsys.readouterr().err
    async with Database(tmp_path / "data" / "condor.db") as db:
        await db.write(repositories.add_prices, "BTC", some(3), "test", 0)
    assert cli.main(command) == 0
    assert capsys.readouterr().out == (
        f"wrote {out / 'BTC.csv'}: 3 prices, 2023-11-14 23:00:00 to 2023-11-14 23:02:00 UTC\n"
    )
    assert cli.main(command) == 2
    assert "there already" in capsys.readouterr().err
    assert cli.main([*command, "--since", "soon", "--overwrite"]) == 2
    assert "--since 'soon': must be a time" in capsys.readouterr().err
    assert cli.main([*command, "--overwrite"]) == 0
