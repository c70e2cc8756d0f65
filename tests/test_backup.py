"""Backups of a real file beside a running game, and games that go on from one."""

from __future__ import annotations

import asyncio
import os
import shutil
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import anyio
import pytest
from structlog.testing import capture_logs

from condor_lite import backup as backups_module
from condor_lite import cli, stopping
from condor_lite.backup import Backups, BackupState
from condor_lite.clock import GameClock, SteppedClock
from condor_lite.config import BackupConfig
from condor_lite.errors import StorageError
from condor_lite.game import schedule
from condor_lite.storage import backup, repositories
from condor_lite.storage.backup import back_up, restore
from condor_lite.storage.connection import APPLICATION_ID
from condor_lite.storage.database import Database, open_read_only
from tests.fleet import ModelServer
from tests.games import REMOTE, as_wide_as, joined, orchestrated, settle, window_scores
from tests.program import LIMIT_S, verb
from tests.stage import START_S, load, until

pytestmark = pytest.mark.anyio

HOUR_S = 3600
CORRUPT_AT = 8192  # the third page


def nobody(what: str, of: int, done: int) -> None:
    """Told of progress."""


def rows(path: Path, sql: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
        return db.execute(sql).fetchall()


PLAYED = (
    "SELECT asset, scheduled_at_s, round.status, answered, model_id, prediction.status, raw, score "
    "FROM round LEFT JOIN prediction USING (round_no) LEFT JOIN model USING (model_no) "
    "LEFT JOIN score USING (round_no, model_no) ORDER BY asset, scheduled_at_s, model_id"
)


async def test_a_game_plays_on_from_a_backup(tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere" / "copy.db"
    async with orchestrated(
        ModelServer("sharp", as_wide_as(5e-5)), ModelServer("wide", as_wide_as(3e-4))
    ) as orchestrator:
        config = load(tmp_path, REMOTE.format(port=orchestrator.port))
        path = config.storage.path

        clock = SteppedClock(START_S - 30)
        async with joined(config, clock, 2) as game:
            await settle(game, clock, START_S + HOUR_S // 2 + 1)
            code, said = await asyncio.to_thread(verb, tmp_path, "backup", str(copy))
            assert (code, f"wrote {copy}: " in said) == (0, True), said
            with pytest.raises(StorageError, match="runs this game; stop it"):
                restore(copy, path, tell=nobody)
            await clock.run_until(START_S + HOUR_S)
            await game.journal.flushed()
        held = rows(copy, PLAYED)
        assert 0 < len(held) < len(rows(path, PLAYED))

        code, said = await asyncio.to_thread(verb, tmp_path, "restore", str(copy))
        former = path.with_name(f"{path.name}.replaced-1")
        assert (code, str(former) in said) == (0, True), said
        assert rows(path, PLAYED) == held
        assert len(rows(former, PLAYED)) > len(held)

        clock = SteppedClock(START_S + 2 * HOUR_S)
        async with joined(config, clock, 2) as game:
            await settle(game, clock, START_S + 2 * HOUR_S + 2400)
            assert game.live.leaderboard is not None
            published = {
                standing.model.info.model_id: standing.overall.recent
                for standing in game.live.leaderboard.standings
            }

    played = rows(path, PLAYED)
    known = {row[:2]: row[2] for row in held}
    settled = [row for row in held if row[2] not in ("open", "closed")]
    assert settled
    assert set(settled) <= set(played)
    assert max(Counter((row[0], row[1], row[4]) for row in played).values()) == 1
    status = {row[:2]: row[2] for row in played}
    for setting in config.game.settings:
        for at_s in schedule.due(setting, START_S, START_S + 2 * HOUR_S + 2400 - 900):
            lost = at_s < START_S + 2 * HOUR_S and (setting.asset, at_s) not in known
            interrupted = known.get((setting.asset, at_s)) == "open"
            expected = "missed" if lost else "void" if interrupted else "scored"
            assert (at_s, status[setting.asset, at_s]) == (at_s, expected)
    with closing(open_read_only(path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
        assert published == pytest.approx(window_scores(db), rel=1e-9)


# Making one


@asynccontextmanager
async def stored(folder: Path, count: int = 60_000) -> AsyncIterator[Database]:
    """A game's database that is open, with so many prices."""
    async with Database(folder / "game.db") as db:
        points = [(START_S + second, 100.0 + second) for second in range(count)]
        await db.write(repositories.add_prices, "BTC", points, "test", 0)
        yield db


def count(path: Path) -> int:
    return int(rows(path, "SELECT count(*) FROM price")[0][0])


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


class Writer:
    """Writes prices into a database whenever told of progress, and gives up at once where it has to wait."""

    def __init__(self, path: Path, most: int = 5) -> None:
        self.db = sqlite3.connect(path, timeout=0)
        self.most = most
        self.written = 0
        self.told: list[tuple[str, int, int]] = []

    def __call__(self, what: str, of: int, done: int) -> None:
        self.told.append((what, of, done))
        if what == "copying" and self.written < self.most:
            self.written += 1
            repositories.add_prices(self.db, "ETH", [(START_S + self.written, 1.0)], "test", 0)
            self.db.commit()


async def test_the_game_writes_on_while_a_copy_is_made(tmp_path: Path) -> None:
    copy = tmp_path / "copy.db"
    async with stored(tmp_path) as db:
        writer = Writer(db.path)
        with closing(writer.db):
            size_bytes = back_up(db.path, copy, tell=writer)
    assert files(tmp_path) == {"game.db", "game.db.lock", "copy.db"}
    assert writer.written == 5
    assert count(db.path) == 60_005
    assert count(copy) == 60_000, "it is of one moment"
    assert copy.stat().st_size == size_bytes
    assert writer.told[-1] == ("checking", 0, 0)
    assert all(done <= of for what, of, done in writer.told)
    assert rows(copy, "PRAGMA application_id") == [(APPLICATION_ID,)]


async def test_who_may_not_read_the_database_may_not_read_a_copy(tmp_path: Path) -> None:
    copy = tmp_path / "copy.db"
    modes: set[int] = set()

    def look(what: str, of: int, done: int) -> None:
        modes.update(part.stat().st_mode & 0o777 for part in tmp_path.glob(".copy.db.*"))

    async with stored(tmp_path, 10_000) as db:
        db.path.chmod(0o600)
        back_up(db.path, copy, tell=look)
    assert modes == {copy.stat().st_mode & 0o777} == {0o600}
    copy.chmod(0o644)
    restore(copy, db.path, tell=nobody)
    assert db.path.stat().st_mode & 0o777 == 0o600


async def test_a_copy_takes_no_name_that_it_must_not(tmp_path: Path) -> None:
    (tmp_path / "there.db").write_text("mine")
    (tmp_path / "open.db-wal").write_text("somebody's")
    (tmp_path / "folder").mkdir()
    async with stored(tmp_path, 10) as db, Database(tmp_path / "other.db") as other:
        for name, said in (
            ("there.db", "there already"),
            ("folder", "is a folder; name a file, such as .*game.db"),
            ("game.db", "belongs to the game itself"),
            ("game.db-wal", "belongs to the game itself"),
            ("there.db/copy.db", "can't be written: "),
        ):
            with pytest.raises(StorageError, match=said):
                back_up(db.path, tmp_path / name, tell=nobody)
        os.mkfifo(tmp_path / "pipe")
        for target, said in (
            (other.path, "a game runs on"),
            (tmp_path / "open.db", "open.db-wal is there"),
            (tmp_path / "pipe", "is no ordinary file"),
        ):
            with pytest.raises(StorageError, match=said):
                back_up(db.path, target, overwrite=True, tell=nobody)
        assert (tmp_path / "there.db").read_text() == "mine"
        back_up(db.path, tmp_path / "there.db", overwrite=True, tell=nobody)
    assert count(tmp_path / "there.db") == 10
    with pytest.raises(StorageError, match="there is no database at"):
        back_up(tmp_path / "none.db", tmp_path / "copy.db", tell=nobody)


async def test_a_copy_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    async with stored(tmp_path) as db:
        with monkeypatch.context() as patch:
            patch.setattr(backup, "ROOM_BYTES", 2**62)
            with pytest.raises(StorageError, match=r"out has no room for it: \d+ MB and"):
                back_up(db.path, out / "copy.db", tell=nobody)
        with monkeypatch.context() as patch:
            patch.setattr(backup, "MOST_LOG_BYTES", 0)
            await db.tidy()  # empties the log
            writer = Writer(db.path)
            with closing(writer.db), pytest.raises(StorageError, match=r"game.db-wal has grown by 0 MB"):
                back_up(db.path, out / "copy.db", tell=writer)

        def interrupt(what: str, of: int, done: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            back_up(db.path, out / "copy.db", tell=interrupt)
    assert files(out) == set()


def corrupt(path: Path, at: int = CORRUPT_AT) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(b"\xff" * 4096)


async def test_a_damaged_database_is_told_and_gives_no_backup(tmp_path: Path) -> None:
    async with stored(tmp_path):
        pass
    for page in range(2, 200, 7):
        corrupt(tmp_path / "game.db", page * 4096)
    with pytest.raises(StorageError, match=r"damaged|not sound"):
        back_up(tmp_path / "game.db", tmp_path / "copy.db", tell=nobody)
    assert files(tmp_path) == {"game.db", "game.db.lock"}


async def test_an_index_that_lost_a_row_is_found(tmp_path: Path) -> None:
    async with Database(tmp_path / "game.db"):
        pass
    with closing(sqlite3.connect(tmp_path / "game.db")) as db:
        db.execute("INSERT INTO scorer VALUES (1, 'crps', 'log_return', 'x', 0, NULL, 1)")
        db.execute("CREATE INDEX scorer_by_rule ON scorer (rule)")
        db.execute("PRAGMA writable_schema = ON")
        db.execute(
            "UPDATE sqlite_master SET sql = replace(sql, '(rule)', '(target)') WHERE sql LIKE '%(rule)'"
        )
        db.commit()
    with pytest.raises(StorageError, match="the copy is not sound, and so its source is not: "):
        back_up(tmp_path / "game.db", tmp_path / "copy.db", tell=nobody)
    assert not (tmp_path / "copy.db").exists()


# Putting one back


@pytest.fixture
async def copied(tmp_path: Path) -> Path:
    """A backup of ten prices."""
    (tmp_path / "source").mkdir()
    async with stored(tmp_path / "source", 10) as db:
        back_up(db.path, tmp_path / "copy.db", tell=nobody)
    return tmp_path / "copy.db"


async def test_what_is_no_backup_is_refused_and_nothing_changes(tmp_path: Path, copied: Path) -> None:
    async with stored(tmp_path, 20) as db:
        path = db.path
        with pytest.raises(StorageError, match=r"another condor_lite .* runs this game; stop it"):
            restore(copied, path, tell=nobody)
    before = path.read_bytes()
    bad = tmp_path / "bad.db"

    def foreign() -> None:
        with closing(sqlite3.connect(bad)) as db:
            db.execute("CREATE TABLE t (a)")

    def newer() -> None:
        shutil.copy(copied, bad)
        with closing(sqlite3.connect(bad)) as db:
            db.execute("PRAGMA user_version = 1000")

    def damaged() -> None:
        shutil.copy(copied, bad)
        corrupt(bad)

    for make, said in (
        (lambda: None, "there is no file"),
        (lambda: bad.write_text("not a database" * 100), "is not the database of a condor_lite game"),
        (lambda: bad.write_bytes(b""), "is not the database of a condor_lite game"),
        (foreign, "is not the database of a condor_lite game"),
        (newer, r"from a newer condor_lite \(schema 1000, this one knows"),
        (damaged, "damaged|not sound"),
    ):
        bad.unlink(missing_ok=True)
        make()
        with pytest.raises(StorageError, match=said):
            restore(bad, path, tell=nobody)
        assert path.read_bytes() == before
    with pytest.raises(StorageError, match="is the game's own database"):
        restore(path, path, tell=nobody)
    with closing(open_read_only(path)) as reader:
        reader.execute("SELECT count(*) FROM price").fetchone()
        with pytest.raises(StorageError, match=r"another program reads .*game.db; end it"):
            restore(copied, path, tell=nobody)
    assert count(path) == 20
    assert {name for name in files(tmp_path) if "part" in name or "replaced" in name} == set()


async def test_each_database_that_was_there_is_kept(tmp_path: Path, copied: Path) -> None:
    path = tmp_path / "new" / "game.db"
    assert restore(copied, path, tell=nobody).former is None
    assert count(path) == 10
    for number, prices in ((1, 10), (2, 30)):
        async with Database(path) as db:
            points = [(START_S + second, 1.0) for second in range(prices)]
            await db.write(repositories.add_prices, "BTC", points, "test", 0)
        former = restore(copied, path, tell=nobody).former
        assert former == tmp_path / "new" / f"game.db.replaced-{number}"
        assert count(former) == prices
        assert count(path) == 10
    assert count(copied) == 10
    assert files(path.parent) == {"game.db", "game.db.lock", "game.db.replaced-1", "game.db.replaced-2"}


async def test_what_a_killed_game_had_in_its_log_is_kept_with_it(tmp_path: Path, copied: Path) -> None:
    async with stored(tmp_path, 20) as db:
        for suffix in ("", "-wal"):
            (tmp_path / "killed").mkdir(exist_ok=True)
            shutil.copy(f"{db.path}{suffix}", tmp_path / "killed" / f"game.db{suffix}")
    former = restore(copied, tmp_path / "killed" / "game.db", tell=nobody).former
    assert former is not None
    assert count(former) == 20
    assert count(tmp_path / "killed" / "game.db") == 10


async def test_a_damaged_database_makes_room_with_all_that_lies_beside_it(
    tmp_path: Path, copied: Path
) -> None:
    path = tmp_path / "game.db"
    for name in ("game.db", "game.db-wal", "game.db-shm"):
        (tmp_path / name).write_text("not a database" * 1000)
    former = restore(copied, path, tell=nobody).former
    assert count(path) == 10
    assert former is not None
    assert former.read_text().startswith("not a database")


async def test_a_log_whose_database_was_moved_away_is_not_applied_to_the_backup(
    tmp_path: Path, copied: Path
) -> None:
    async with stored(tmp_path, 20) as db:
        (tmp_path / "lost").mkdir()
        shutil.copy(f"{db.path}-wal", tmp_path / "lost" / "game.db-wal")
    assert restore(copied, tmp_path / "lost" / "game.db", tell=nobody).former is None
    assert count(tmp_path / "lost" / "game.db") == 10
    assert (tmp_path / "lost" / "game.db.replaced-1-wal").exists()


def test_the_commands_say_what_they_did_or_why_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stopping, "restore", lambda: None)
    (tmp_path / "config.toml").write_text(REMOTE.format(port=1))
    config, copy = ["--config", str(tmp_path / "config.toml")], str(tmp_path / "copy.db")
    assert cli.main(["backup", copy, *config]) == 2
    assert "there is no database" in capsys.readouterr().err

    async def make() -> None:
        async with Database(tmp_path / "data" / "condor.db"):
            pass

    asyncio.run(make())
    assert cli.main(["backup", copy, *config]) == 0
    assert capsys.readouterr().out.startswith(f"wrote {copy}: 0.")
    assert cli.main(["backup", copy, *config]) == 2
    assert "replace it with --overwrite" in capsys.readouterr().err
    assert cli.main(["backup", copy, "--overwrite", *config]) == 0
    assert cli.main(["restore", copy, *config]) == 0
    assert "condor.db.replaced-1; delete it" in capsys.readouterr().out
    assert cli.main(["restore", str(tmp_path / "none.db"), *config]) == 2
    assert "there is no file" in capsys.readouterr().err


# By itself


@asynccontextmanager
async def service(db: Database, clock: SteppedClock, folder: Path, keep: int = 3) -> AsyncIterator[Backups]:
    backups = Backups(BackupConfig(HOUR_S, keep, folder), db.path, clock)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(backups.run)
        yield backups
        tasks.cancel_scope.cancel()


def times(folder: Path) -> Iterator[str]:
    return (name.removeprefix("game-20231114T").removesuffix("00Z.db") for name in sorted(files(folder)))


async def test_backups_are_made_when_due_and_the_oldest_go(tmp_path: Path) -> None:
    folder = tmp_path / "backups"
    folder.mkdir()
    (folder / "mine.db").write_text("mine")
    clock = SteppedClock(START_S - 5 * HOUR_S)  # 18:00
    async with stored(tmp_path, 10) as db:
        async with service(db, clock, folder):
            await clock.run_until(START_S - 2 * HOUR_S)
        assert list(times(folder)) == ["1900", "2000", "2100", "mine.db"]
        assert count(folder / "game-20231114T210000Z.db") == 10

        clock = SteppedClock(START_S - 2 * HOUR_S + 600)  # started again
        async with service(db, clock, folder, keep=2):
            await clock.run_until(START_S - HOUR_S - 1)
            assert list(times(folder)) == ["1900", "2000", "2100", "mine.db"]
            await clock.run_until(START_S - HOUR_S)
        assert list(times(folder)) == ["2100", "2200", "mine.db"]

        (folder / "game-20991231T000000Z.db").write_text("of a clock that was wrong")
        clock = SteppedClock(START_S)
        async with service(db, clock, folder, keep=1):
            await clock.run_until(START_S + HOUR_S)
    assert files(folder) == {"game-20231115T000000Z.db", "mine.db"}


async def test_names_from_the_future_delay_nothing_and_go_first(tmp_path: Path) -> None:
    folder = tmp_path / "backups"
    folder.mkdir()
    (folder / "game-20231114T213000Z.db").write_text("half an hour old")
    for year in (2098, 2099):
        (folder / f"game-{year}1231T000000Z.db").write_text("of a clock that was wrong")
    async with stored(tmp_path, 10) as db:
        clock = SteppedClock(START_S - HOUR_S)
        async with service(db, clock, folder):
            await clock.run_until(START_S - HOUR_S // 2)
        assert files(folder) == {
            f"game-{day}Z.db" for day in ("20231114T213000", "20231114T223000", "20991231T000000")
        }
        clock = SteppedClock(START_S)
        async with service(db, clock, folder) as backups:
            await clock.run_until(START_S + 60)
            assert backups.state == BackupState(None, 1860.0)
            await clock.run_until(START_S + 2 * HOUR_S)
        assert files(folder) == {
            f"game-{day}Z.db" for day in ("20231114T223000", "20231114T233000", "20231115T003000")
        }


async def test_a_clock_that_is_set_back_stops_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backups_module, "_LOOK_S", 0.05)
    folder = tmp_path / "backups"
    ahead_s = [365 * 86400.0]
    clock = GameClock()
    monkeypatch.setattr(clock, "now", lambda: time.time() + ahead_s[0])
    async with stored(tmp_path, 10) as db, anyio.create_task_group() as tasks:
        backups = Backups(BackupConfig(HOUR_S, 3, folder), db.path, clock)
        tasks.start_soon(backups.run)
        await until(lambda: backups.state.age_s is not None)
        ahead_s[0] = 0.0
        await until(lambda: len(list(folder.glob("game-*.db"))) == 2)
        tasks.cancel_scope.cancel()


async def test_only_what_killed_processes_left_of_these_backups_is_cleared(tmp_path: Path) -> None:
    folder = tmp_path / "backups"
    folder.mkdir()
    mine = {
        ".game-20231114T220000Z.db.8.part",  # another `backup FILE` writes it just now
        ".game-of-mine.db.7.part",
        ".game-20231114T220000Z.db.bak.7.part",
        ".other-20231114T220000Z.db.7.part",
    }
    left = {".game-20231114T220000Z.db.7.part", ".game-20231114T220000Z.db.7.part-journal"}
    for name in mine | left:
        (folder / name).write_text("a part")
        if not name.endswith("8.part"):
            os.utime(folder / name, (time.time() - 7200,) * 2)
    async with stored(tmp_path, 10) as db, service(db, SteppedClock(START_S), folder):
        await until(lambda: "game-20231114T230000Z.db" in files(folder))
    assert files(folder) == mine | {"game-20231114T230000Z.db"}


async def test_a_backup_that_fails_is_told_and_tried_again(tmp_path: Path) -> None:
    folder = tmp_path / "backups"
    folder.write_text("in the way")
    clock = SteppedClock(START_S)
    async with stored(tmp_path, 10) as db, service(db, clock, folder) as backups:
        with capture_logs() as logs:
            await clock.run_until(START_S)
        assert [entry["event"] for entry in logs] == ["backup_failed"]
        assert "can't be written" in logs[0]["error"]
        assert backups.state == BackupState(logs[0]["error"], None)
        folder.unlink()
        await clock.run_until(START_S + 600)
        assert list(times(folder)) == ["2310"]
        assert backups.state == BackupState(None, 0.0)


@pytest.mark.parametrize("patience_s", [60.0, 0.0])
async def test_a_backup_ends_with_its_game(
    patience_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("condor_lite.backup._PATIENCE_S", patience_s)
    folder = tmp_path / "backups"
    async with stored(tmp_path, 400_000) as db:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(Backups(BackupConfig(HOUR_S, 3, folder), db.path, SteppedClock(START_S)).run)
            await until(lambda: folder.exists() and files(folder))
            tasks.cancel_scope.cancel()
        assert all(name.startswith("game-") for name in files(folder))


async def test_a_folder_that_is_slow_to_read_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, answered, seen = threading.Event(), threading.Event(), []

    def slowly(backups: Backups) -> dict[Path, str]:
        asked.set()
        seen.append(answered.wait(60))
        return {}

    monkeypatch.setattr(Backups, "_found", slowly)
    async with stored(tmp_path, 10) as db, service(db, SteppedClock(START_S), tmp_path / "backups"):
        await until(asked.is_set)
        answered.set()
        await until(lambda: len(seen) == 3)  # when it starts, to find the oldest, and for the next one
    assert seen[0]
    assert len(files(tmp_path / "backups")) == 1


async def test_a_folder_that_does_not_answer_is_a_failure_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, found = threading.Event(), Backups._found

    def dead(backups: Backups) -> dict[Path, float]:
        assert there.wait(60)
        return found(backups)

    monkeypatch.setattr(Backups, "_found", dead)
    monkeypatch.setattr("condor_lite.backup._ANSWER_WITHIN_S", 0.2)
    clock, folder = SteppedClock(START_S), tmp_path / "backups"
    async with stored(tmp_path, 10) as db, service(db, clock, folder) as backups:
        await clock.run_until(START_S + 1)
        assert "does not answer" in (backups.state.failure or "")
        monkeypatch.setattr(backups._at_the_folder, "_limit_s", 60.0)
        there.set()
        with anyio.fail_after(LIMIT_S):
            while backups.state.failure:
                await clock.run_until(clock.now() + 600)
        assert len(files(folder)) == 1


async def test_a_game_makes_them_when_the_config_says_so(tmp_path: Path) -> None:
    async with orchestrated() as orchestrator:
        text = REMOTE.format(port=orchestrator.port) + '[backup]\nevery = "1h"\n'
        config = load(tmp_path, text)
        assert config.backup.path == tmp_path / "backups"
        async with joined(config, SteppedClock(START_S), 0):
            await until(lambda: config.backup.path.exists() and list(config.backup.path.glob("condor-*.db")))
