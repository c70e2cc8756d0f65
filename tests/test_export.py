"""`condor-lite export`: files that a replay plays as they were recorded, also beside a running game."""

from __future__ import annotations

import asyncio
import csv
import math
import os
import sqlite3
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
import pytest
from pyarrow import parquet

from condor_lite import cli, stopping, supervisor
from condor_lite import config as configuration
from condor_lite import export as exporting
from condor_lite.clock import SteppedClock
from condor_lite.config import Config
from condor_lite.errors import StorageError
from condor_lite.export import ExportError, Written, export, lines, read_range
from condor_lite.game.entities import (
    Answer,
    AnswerStatus,
    ModelInfo,
    ModelScore,
    Round,
    RoundScores,
    RoundStatus,
)
from condor_lite.prices.replay import read_recording
from condor_lite.storage import repositories, scores
from condor_lite.storage.database import Database, open_read_only
from condor_lite.storage.exports import Wanted
from tests.exchange import Exchange, walk
from tests.fleet import ModelServer
from tests.games import REMOTE, as_wide_as, joined, orchestrated, settle
from tests.program import verb
from tests.stage import START_S

pytestmark = pytest.mark.anyio

HOUR_S = 3600


async def play(
    config: Config, clock: SteppedClock, models: int, then: Callable[[], Awaitable[None]] | None = None
) -> None:
    """An hour of rounds and the time until the last one is scored; `then` while the game still runs."""
    async with joined(config, clock, models) as game:
        await settle(game, clock, START_S + HOUR_S + 900)
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
        (tmp_path / "live" / "config.toml").write_text(REMOTE.format(port=orchestrator.port))
        live = configuration.load(tmp_path / "live" / "config.toml", {})
        recording = tmp_path / "recording"

        async def record() -> None:
            code, said = await asyncio.to_thread(verb, tmp_path / "live", "export", "prices", str(recording))
            assert (code, f"wrote {recording / 'BTC.csv'}: " in said) == (0, True), said

        with monkeypatch.context() as patch:
            patch.setattr(supervisor, "make_sources", lambda config: [exchange])
            await play(live, clock, 2, record)

        text = REMOTE.format(port=orchestrator.port).replace(
            "[feed]", f'[feed]\nsource = "replay"\npath = "{recording}"'
        )
        (tmp_path / "again" / "config.toml").write_text(text)
        again = configuration.load(tmp_path / "again" / "config.toml", {})
        await play(again, SteppedClock(START_S - 30), 2)

    rounds, its_scores = books(live.storage.path)
    assert len(rounds) == 60
    assert {row[2] for row in rounds} == {"scored"}
    assert len(its_scores) == 120
    assert (rounds, its_scores) == books(again.storage.path)


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
    return export(conn, "prices", folder, Wanted(*read_range(conn, None, None)), **options)


async def test_every_digit_comes_back(tmp_path: Path) -> None:
    points = some(200)
    points[7] = (points[7][0], 0.1 + 0.2)
    points[8] = (points[8][0], 1e-12)
    points[9] = (points[9][0], 1.7976931348623157e308)
    async with stored(tmp_path, BTC=points) as conn:
        (written,) = everything(conn, tmp_path / "new" / "folder")
    assert written == Written(
        tmp_path / "new" / "folder" / "BTC.csv", "prices", 200, points[0][0], points[-1][0], changes=0
    )
    recording = read_recording(written.path, 60)
    assert list(zip(recording.ts_s.tolist(), recording.price.tolist(), strict=True)) == points
    assert written.path.read_text().startswith(f"timestamp,close\n{START_S},")


async def test_a_range_includes_both_its_ends(tmp_path: Path) -> None:
    async with stored(tmp_path, BTC=some(100), ETH=some(10)) as conn:
        (written,) = export(
            conn, "prices", tmp_path, Wanted(*read_range(conn, "2023-11-14T23:20", "2023-11-14T23:30"))
        )
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


async def test_the_log_can_be_emptied_while_an_export_runs_and_no_row_comes_twice(tmp_path: Path) -> None:
    emptied: list[int] = []
    out = tmp_path / "out"
    async with stored(tmp_path, BTC=some(25_000)) as conn:
        with closing(sqlite3.connect(tmp_path / "game.db", timeout=0, isolation_level=None)) as db:

            def tell(asset: str, of: int, rows: int) -> None:
                repositories.add_prices(db, "BTC", [(START_S - 60 * len(emptied), 1.0)], "test", 0)
                repositories.add_prices(db, "BTC", [(START_S + 10**7 + len(emptied), 1.0)], "test", 0)
                (busy, _, _) = db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
                emptied.append(not busy)

            (written,) = everything(conn, out, tell=tell)
    assert emptied == [True] * 3
    assert written.rows == 25_000, "what came after the beginning is not in it"
    times = [int(row["timestamp"]) for row in read_back(out / "BTC.csv")]
    assert times == [START_S + 60 * minute for minute in range(25_000)]


async def test_a_file_that_breaks_in_the_middle_is_told_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stopping, "restore", lambda: None)
    (tmp_path / "config.toml").write_text(REMOTE.format(port=1) + '[storage]\npath = "game.db"\n')
    path, out = tmp_path / "game.db", tmp_path / "out"
    out.mkdir()
    (out / "BTC.csv").write_text("old")
    async with stored(tmp_path, BTC=some(50_000)):
        pass
    sound = path.read_bytes()
    arguments = ["export", "prices", str(out), "--overwrite", "--config", str(tmp_path / "config.toml")]

    def refused(said: str) -> None:
        assert cli.main(arguments) == 2
        assert said in capsys.readouterr().err
        assert [file.name for file in out.iterdir()] == ["BTC.csv"]
        assert (out / "BTC.csv").read_text() == "old"

    middle = len(sound) // 2 // 4096 * 4096
    path.write_bytes(sound[:middle] + b"\xff" * 4096 + sound[middle + 4096 :])
    refused("is damaged (database disk image is malformed); restore it from a backup")

    path.write_bytes(sound)
    write = exporting._write

    def cut(*given: Any) -> Any:
        tell = given[-1]

        def told(*news: Any) -> None:
            os.truncate(path, middle)
            tell(*news)

        return write(*given[:-1], told)

    monkeypatch.setattr(exporting, "_write", cut)
    refused(f"{path} is damaged")


async def test_an_answer_that_can_not_be_read_is_named(tmp_path: Path) -> None:
    async with played(tmp_path) as conn:
        with closing(sqlite3.connect(tmp_path / "game.db")) as db:
            db.execute("UPDATE payload SET body = x'01020304ff' WHERE round_no = 1")
            db.commit()
        with pytest.raises(StorageError, match=r"the stored answer of a in BTC-60-60-.* is damaged"):
            export(conn, "predictions", tmp_path / "out.csv", replace(ALL, payloads=True))
    assert not (tmp_path / "out.csv").exists()


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
    (tmp_path / "config.toml").write_text(REMOTE.format(port=1))
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


# Scores, predictions, leaderboards


PAYLOAD = b'[{"step": 60, "prediction": {"name": "norm", "params": {"loc": 0, "scale": 0.001}}}]'
ODD_NAME = 'of "many", kinds\nand = lines; \u00fc'


async def play_by_hand(db: Database, rounds: int = 3) -> None:
    """Rounds every minute: one valid answer, one failed, one model absent; all but the last are scored."""

    def fill(conn: sqlite3.Connection) -> None:
        names = {"a": ODD_NAME, "b": "plain", "c": "absent"}
        models = [
            repositories.upsert_model(conn, ModelInfo(model_id, name, "1", "one", "d"), START_S).model_no
            for model_id, name in names.items()
        ]
        version = scores.current_scorer(conn, "crps", "log_return", "x", START_S)
        for place in range(rounds):
            at_s = START_S + 60 * place
            asset = ("BTC", "ETH")[place % 2]
            opened = Round(asset, 60, 60, at_s, performed_at_ms=at_s * 1000 + 5)
            (round_no,) = repositories.open_rounds(conn, [opened])
            assert round_no is not None
            came_ms = at_s * 1000 + 123
            answers = [
                Answer(round_no, models[0], AnswerStatus.SUCCESS, came_ms, 1500, payload=PAYLOAD),
                Answer(round_no, models[1], AnswerStatus.FAILED, came_ms, 10, detail="model raised, oh"),
            ]
            repositories.add_answers(conn, answers)
            repositories.close_round(conn, round_no, RoundStatus.CLOSED, None, models[2:])
            if place < rounds - 1:
                result = {
                    models[0]: ModelScore(0.1 + 0.2, 0.1 + 0.2, 1.5),
                    models[1]: ModelScore(None, 2.0, -3.0),
                    models[2]: ModelScore(None, 2.0, -3.0),
                }
                scores.save_round_scores(conn, round_no, version, RoundScores(0.4, 0.5, result), 1, came_ms)
            conn.executemany(
                "INSERT INTO leaderboard VALUES (?, ?, ?, ?, ?, ?, ?)",
                [(at_s, model_no, version, model_no, 1.0 / model_no, None, None) for model_no in models],
            )

    await db.write(fill)


def read_back(path: Path) -> list[dict[str, Any]]:
    """A file's rows; of CSV all values are text."""
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    if path.suffix == ".jsonl":
        return [orjson.loads(line) for line in path.read_bytes().splitlines()]
    return list(parquet.read_table(path).to_pylist())


def names(folder: Path, part: str) -> list[str]:
    return [path.name for path in folder.iterdir() if part in path.name]


def as_shown(suffix: str, column: str, value: Any) -> Any:
    """What a stored value is in a file."""
    if isinstance(value, int) and column.endswith("_at"):
        unit = 1000 if column in ("received_at", "scored_at") else 1
        at = datetime.fromtimestamp(value / unit, UTC)
        value = at if suffix == "parquet" else f"{at:%Y-%m-%dT%H:%M:%S}" + (".123Z" if unit > 1 else "Z")
    if suffix == "csv":
        return "" if value is None else str(value)
    return value


ROUND = "asset || '-60-60-' || scheduled_at_s AS round_id, asset, 60 AS horizon, 60 AS step, scheduled_at_s"
STORED = {
    "predictions": f"""
        SELECT {ROUND} AS scheduled_at, model_id, prediction.status, prediction.detail, scorer_version,
               received_at_ms AS received_at, exec_time_us, raw AS raw_score, score
        FROM prediction JOIN round USING (round_no) JOIN model USING (model_no)
        LEFT JOIN score USING (round_no, model_no) ORDER BY scheduled_at_s, model_no""",
    "scores": f"""
        SELECT {ROUND} AS scheduled_at, model_id, resolvable_at_s AS resolvable_at, scored_at_ms AS scored_at,
               scorer_version, median, no_move, resolved, raw AS raw_score, counted AS counted_score, score,
               score.detail
        FROM score JOIN round USING (round_no) JOIN model USING (model_no)
        JOIN round_score USING (round_no, scorer_version) ORDER BY scheduled_at_s, model_no""",
    "leaderboard": """
        SELECT created_at_s AS created_at, rank, model_id, model_name, cruncher_name, score_recent,
               score_steady, score_anchor, scorer_version
        FROM leaderboard JOIN model USING (model_no) ORDER BY created_at_s, model_no""",
    "prices": "SELECT ts_s AS timestamp, price AS close FROM price WHERE asset = 'BTC' ORDER BY ts_s",
}


@asynccontextmanager
async def played(folder: Path, rounds: int = 3) -> AsyncIterator[sqlite3.Connection]:
    async with Database(folder / "game.db") as db:
        await db.write(repositories.add_prices, "BTC", some(30), "test", 0)
        await play_by_hand(db, rounds)
        with closing(open_read_only(db.path)) as conn:
            yield conn


ALL = Wanted(-math.inf, math.inf)


@pytest.mark.parametrize("kind", STORED)
@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
async def test_each_format_holds_what_is_stored(tmp_path: Path, kind: str, suffix: str) -> None:
    place = tmp_path / ("out" if kind == "prices" else f"out.{suffix}")
    async with played(tmp_path) as conn:
        (written,) = export(conn, kind, place, ALL, format_=suffix)
        conn.row_factory = sqlite3.Row
        expected = [
            {column: as_shown(suffix, column, row[column]) for column in row.keys()}  # noqa: SIM118
            for row in conn.execute(STORED[kind])
        ]
    assert expected
    assert read_back(written.path) == expected
    assert list(read_back(written.path)[0]) == list(expected[0])
    assert written.rows == len(expected)


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
async def test_payloads_come_as_they_were_sent(tmp_path: Path, suffix: str) -> None:
    async with played(tmp_path) as conn:
        path = tmp_path / f"out.{suffix}"
        export(conn, "predictions", path, replace(ALL, payloads=True), format_=suffix)
    rows = read_back(path)
    assert [row["densities"] for row in rows] == [PAYLOAD.decode(), "" if suffix == "csv" else None] * 3


async def test_the_games_own_files_and_devices_are_never_replaced(tmp_path: Path) -> None:
    pipe, link = tmp_path / "pipe", tmp_path / "link.csv"
    os.mkfifo(pipe)
    async with played(tmp_path) as conn:
        game = tmp_path / "game.db"
        content = game.read_bytes()
        (tmp_path / "another.name").symlink_to(game)
        for name, said in (
            (game.name, "belongs to the game itself"),
            (f"{game.name}-wal", "belongs to the game itself"),
            (f"{game.name}.lock", "belongs to the game itself"),
            ("another.name", "belongs to the game itself"),
            ("pipe", "is no ordinary file"),
            (".", "is no ordinary file"),
        ):
            with pytest.raises(StorageError, match=said):
                export(conn, "scores", tmp_path / name, ALL, overwrite=True)
        assert game.read_bytes() == content
        assert pipe.is_fifo()
        link.symlink_to(tmp_path / "meant.csv")
        (tmp_path / "meant.csv").write_text("old")
        export(conn, "scores", link, ALL, overwrite=True)
    assert link.is_symlink()
    assert len(read_back(link)) == 6


async def test_an_export_can_be_of_some_times_assets_and_models(tmp_path: Path) -> None:
    out = tmp_path / "out.csv"

    def rows(kind: str, **wanted: Any) -> list[tuple[str, ...]]:
        export(conn, kind, out, replace(ALL, **wanted), overwrite=True)
        return [(row["asset"], row["scheduled_at"][14:16], row["model_id"]) for row in read_back(out)]

    async with played(tmp_path) as conn:
        assert rows("predictions", models=("b",), assets=("BTC",)) == [("BTC", "00", "b"), ("BTC", "02", "b")]
        assert rows("predictions", since_s=START_S + 60, until_s=START_S + 60) == [
            ("ETH", "01", "a"),
            ("ETH", "01", "b"),
        ]
        assert rows("scores", models=("a", "c"), assets=("ETH", "XAU")) == [
            ("ETH", "01", "a"),
            ("ETH", "01", "c"),
        ]
        with pytest.raises(ExportError, match=r"no scores are stored in that range, of what was asked for"):
            rows("scores", assets=("XAU",))
        with pytest.raises(ExportError, match=r"no standings are stored"):
            rows("leaderboard", models=("nobody",))
        assert [one.path.name for one in export(conn, "prices", tmp_path, replace(ALL, assets=("BTC",)))] == [
            "BTC.csv"
        ]


async def test_only_the_scores_that_count_are_exported(tmp_path: Path) -> None:
    async with played(tmp_path) as conn:
        with closing(sqlite3.connect(tmp_path / "game.db")) as db:
            for version, published in ((2, 1), (3, 0)):
                db.execute(
                    "INSERT INTO scorer VALUES (?, 'log', 'log_return', 'y', 0, NULL, ?)",
                    (version, published),
                )
                db.execute("INSERT INTO round_score VALUES (1, ?, 1.0, 1.0, 1, 0, NULL)", (version,))
                db.execute("INSERT INTO score VALUES (1, ?, 1, NULL, 9.0, 9.0, 'too wide')", (version,))
            db.commit()
        for kind in ("scores", "predictions"):
            export(conn, kind, tmp_path / f"{kind}.jsonl", ALL, format_="jsonl")
    rescored = [row for row in read_back(tmp_path / "scores.jsonl") if row["round_id"].endswith(str(START_S))]
    assert [(row["scorer_version"], row["model_id"], row["score"]) for row in rescored] == [(2, "a", 9.0)]
    first = read_back(tmp_path / "predictions.jsonl")[0]
    assert (first["status"], first["detail"], first["scorer_version"]) == ("FAILED", "too wide", 2)


async def test_rows_are_sorted_by_an_index_and_not_in_memory(tmp_path: Path) -> None:
    async with played(tmp_path) as conn:
        asked: list[str] = []
        conn.set_trace_callback(asked.append)
        for kind in STORED:
            export(conn, kind, tmp_path / f"{kind}.csv", Wanted(0, 2**40, payloads=True))
        conn.set_trace_callback(None)
        queries = [sql for sql in asked if "ORDER BY" in sql and "count(*)" not in sql]
        assert len(queries) == 4
        for sql in queries:
            plan = [row[3] for row in conn.execute(f"EXPLAIN QUERY PLAN {sql}")]
            assert not [step for step in plan if "TEMP B-TREE" in step], plan


async def test_long_payloads_are_written_a_few_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "_GROUP_CHARACTERS", 3 * len(PAYLOAD))
    async with played(tmp_path, rounds=20) as conn:
        path = tmp_path / "out.parquet"
        export(conn, "predictions", path, replace(ALL, payloads=True), format_="parquet")
    with parquet.ParquetFile(path) as file:
        assert file.num_row_groups > 3
        assert file.metadata.num_rows == 40


async def test_parquet_without_pyarrow_and_a_name_that_misleads_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with played(tmp_path) as conn:
        with pytest.raises(ExportError, match=r"out.parquet would hold csv; say --format parquet"):
            export(conn, "scores", tmp_path / "out.parquet", ALL)
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(ExportError, match=r"pip install 'condor-lite\[parquet\]'"):
            export(conn, "scores", tmp_path / "out.parquet", ALL, format_="parquet")
    assert not names(tmp_path, "out")


async def test_the_command_exports_what_its_options_say(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stopping, "restore", lambda: None)
    (tmp_path / "config.toml").write_text(
        REMOTE.format(port=1) + f'[storage]\npath = "{tmp_path / "game.db"}"\n'
    )
    out = tmp_path / "out.jsonl"
    options = ["--format", "jsonl", "--config", str(tmp_path / "config.toml"), "--since", "1m"]
    async with played(tmp_path):
        assert cli.main(["export", "predictions", str(out), "--payloads", "--model", "a", *options]) == 0
    assert f"wrote {out}: 2 predictions, " in capsys.readouterr().out
    assert [row["densities"] for row in read_back(out)] == [PAYLOAD.decode()] * 2
