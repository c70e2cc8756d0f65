"""A machine's clock that is set wrong, by a year, and right again, under a real game with live prices."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.program import LIMIT_S
from tests.torture.worlds import Live

pytestmark = pytest.mark.timeout(1200)

YEAR_S = 365 * 86400


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Live]:
    """A game that is about to start."""
    world = Live(tmp_path / "live")
    try:
        yield world
    finally:
        world.__exit__()


def until(world: Live, condition: Callable[[], Any]) -> None:
    since_s = time.monotonic()
    while not condition():
        assert time.monotonic() - since_s < LIMIT_S, world.run.console.read_text()[-5000:]
        assert world.run.process.poll() is None, world.run.console.read_text()[-5000:]
        time.sleep(0.05)


def read(world: Live, sql: str, *values: Any) -> list[tuple[Any, ...]]:
    """Empty, too, as long as there is no database."""
    if not world.books.path.exists():
        return []
    with closing(world.books.open()) as db:
        return db.execute(sql, values).fetchall()


def plays_on(world: Live) -> None:
    newest_s = world.newest_round_s()
    until(world, lambda: world.playing(newest_s))


def nothing_lies_ahead(world: Live) -> None:
    ahead_s = time.time() + 60
    assert not read(world, "SELECT * FROM round WHERE scheduled_at_s > ?", ahead_s)
    assert not read(world, "SELECT * FROM leaderboard WHERE created_at_s > ?", ahead_s)
    assert not read(world, "SELECT * FROM meta WHERE key = 'clock_s' AND CAST(value AS REAL) > ?", ahead_s)


def test_while_nobody_says_what_time_it_is_no_round_is_held_and_none_is_void(live: Live) -> None:
    live.environ["CONDOR_LITE__SCORING__VOID_AFTER"] = "1h"  # the prices may be away for a while
    live.start()
    until(live, lambda: live.playing(0))
    live.books.note()
    live.no_prices()  # rounds wait for them
    live.set_wall(YEAR_S)
    until(live, lambda: " ahead of the game's, and no source of prices confirms it" in live.problems())
    status = httpx.get(
        f"http://127.0.0.1:{live.run.port}/status", timeout=LIMIT_S, headers={"Accept": "text/html"}
    ).text
    assert "no source of prices confirms it" in status
    skipped = "SELECT 1 FROM round WHERE status = 'skipped' AND reason LIKE 'the machine%'"
    until(live, lambda: read(live, skipped))
    live.set_wall(0.0)
    live.prices.outage = None
    plays_on(live)
    nothing_lies_ahead(live)
    assert not read(live, "SELECT * FROM round WHERE status = 'void' AND reason LIKE 'no price%'")
    assert not live.books.check(live.published)


def test_a_source_that_tells_its_time_has_the_game_go_on_in_spite_of_the_machines(live: Live) -> None:
    live.environ["SOURCE_TELLS_ITS_TIME"] = "1"
    live.set_wall(YEAR_S)
    live.start()  # a new game, with the clock wrong from the start
    until(live, lambda: live.newest_round_s())
    until(live, lambda: "ahead of that of the prices, which the game goes by" in live.problems())
    nothing_lies_ahead(live)
    live.set_wall(-YEAR_S)
    newest_s = live.newest_round_s()
    until(live, lambda: live.newest_round_s() > newest_s + 6)
    live.set_wall(0.0)
    plays_on(live)
    nothing_lies_ahead(live)


def test_a_game_that_began_in_the_future_goes_back_when_the_clock_is_right(live: Live) -> None:
    live.no_prices()
    live.set_wall(YEAR_S)
    live.start()
    until(live, lambda: "the newest" in live.problems() or "no price yet" in live.problems())
    until(live, lambda: read(live, "SELECT 1 FROM round WHERE status = 'skipped'"))
    live.set_wall(0.0)
    until(live, lambda: "behind" in live.problems())
    live.prices.outage = None
    plays_on(live)
    nothing_lies_ahead(live)
    assert "starting_again" in live.run.console.read_text()
    assert live.run.end() == 0


def test_a_file_from_the_future_is_told_of_by_check_and_set_back_at_the_start(live: Live) -> None:
    live.start()
    until(live, lambda: live.playing(0))
    assert live.run.end() == 0
    future_s = int(time.time()) + YEAR_S
    with closing(sqlite3.connect(live.books.path)) as db, db:
        answers = db.execute("SELECT count(*) FROM prediction").fetchone()
        db.execute("UPDATE meta SET value = ? WHERE key = 'clock_s'", (str(future_s),))
        db.execute(
            "INSERT INTO round (asset, horizon_s, step_s, scheduled_at_s, resolvable_at_s, status, reason)"
            " VALUES ('BTC', 6, 2, ?, ?, 'missed', 'the process was held up')",
            (future_s, future_s + 6),
        )
    checked = subprocess.run(
        [sys.executable, "-m", "condor_lite", "check"],
        cwd=live.folder,
        env={**os.environ, **live.environ},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert checked.returncode
    assert "of this machine's clock" in checked.stdout + checked.stderr
    live.start()
    plays_on(live)
    nothing_lies_ahead(live)
    assert "clock_was_ahead" in live.run.console.read_text()
    assert read(live, "SELECT count(*) FROM prediction") >= [answers]
    assert not [row for row in live.books.check(live.published) if "hole" not in row]
