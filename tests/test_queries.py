"""The report's SQL on a real database file: complete pages, thinned charts, no walk over a large table."""

from __future__ import annotations

import itertools
import sqlite3
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from condor_lite.game.entities import (
    Answer,
    AnswerStatus,
    ModelInfo,
    ModelScore,
    Round,
    RoundScores,
    RoundStatus,
)
from condor_lite.storage import queries, repositories, scores
from condor_lite.storage.database import Database, Readers

pytestmark = pytest.mark.anyio

START_S = 1_700_000_400
ROUNDS = 30
MODELS = 20
LONG_AGO_S, IN_THE_END_S = 0.0, 2e9


class Watched:
    """Readers that remember what was asked."""

    def __init__(self, readers: Readers) -> None:
        self.readers = readers
        self.asked: list[tuple[str, Sequence[object]]] = []

    async def fetch(self, sql: str, params: Sequence[object] = ()) -> list[sqlite3.Row]:
        self.asked.append((sql, params))
        return await self.readers.fetch(sql, params)

    async def plans(self) -> list[str]:
        """The steps of all plans, without those over CTEs and lists that the query made itself."""
        steps = []
        for sql, params in self.asked:
            rows = await self.readers.fetch(f"EXPLAIN QUERY PLAN {sql}", params)
            steps += [str(row["detail"]) for row in rows]
        return steps


def fill(conn: sqlite3.Connection) -> None:
    """Rounds every minute, of two assets by turns; model k answers the rounds that k divides."""
    models = [
        repositories.upsert_model(conn, ModelInfo(f"m{k}", f"m{k}", "p", "p", f"d{k}"), START_S)
        for k in range(1, MODELS + 1)
    ]
    version = scores.current_scorer(conn, "crps", "log_return", "x", START_S)
    for minute in range(ROUNDS):
        held = Round("BTC" if minute % 2 else "ETH", 3600, 60, START_S + 60 * minute)
        (no,) = repositories.open_rounds(conn, [held])
        assert no is not None
        asked = [model.model_no for k, model in enumerate(models, 1) if minute % k == 0]
        repositories.add_answers(conn, [Answer(no, m, AnswerStatus.SUCCESS, 0, 1000) for m in asked])
        repositories.close_round(conn, no, RoundStatus.CLOSED, None, [])
        if minute < ROUNDS // 2:
            result = RoundScores(1.0, 2.0, {m: ModelScore(1.0, 1.0, float(m)) for m in asked})
            scores.save_round_scores(conn, no, version, result, 60, 1000)
    # A late note of rounds that were not held: their numbers do not follow their time.
    missed = [Round("BTC", 60, 60, START_S + 60 * k, RoundStatus.MISSED) for k in range(-5, 5)]
    repositories.record_rounds(conn, missed)
    for model in models[:3]:
        for k in range(100):
            at_s = START_S + 900 * k
            conn.execute(
                "INSERT INTO leaderboard VALUES (?, ?, ?, 1, ?, 2.0, NULL)",
                (at_s, model.model_no, version, k),
            )
            conn.executemany(
                "INSERT INTO snapshot VALUES (?, ?, ?, ?, 3600, 60, ?, 2.0, NULL)",
                [(at_s, model.model_no, version, asset, k) for asset in ("BTC", "ETH")],
            )


@pytest.fixture(scope="module")
async def db(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Database]:
    path: Path = tmp_path_factory.mktemp("db") / "condor.db"
    async with Database(path) as opened:
        await opened.write(fill)
        yield opened


@pytest.fixture
def readers(db: Database) -> Any:
    return Watched(db.reports)


def expected_predictions(model_nos: Sequence[int] | None) -> list[tuple[int, int]]:
    """(minute, model number), newest first."""
    wanted = range(1, MODELS + 1) if model_nos is None else model_nos
    return [
        (minute, no)
        for minute in reversed(range(ROUNDS))
        for no in sorted(wanted, reverse=True)
        if minute % no == 0
    ]


@pytest.mark.parametrize("model_nos", [[1], [7], [2, 3, 19], list(range(1, MODELS + 1)), None, []])
@pytest.mark.parametrize("limit", [1, 7, 1000])
async def test_pages_of_predictions_hold_every_row_once(
    readers: Any, model_nos: list[int] | None, limit: int
) -> None:
    found: list[tuple[int, int]] = []
    before = None
    while True:
        page = await queries.predictions(readers, model_nos, LONG_AGO_S, IN_THE_END_S, limit, before)
        found += [((row["scheduled_at_s"] - START_S) // 60, row["model_no"]) for row in page]
        if len(page) < limit:
            break
        before = (page[-1]["round_no"], page[-1]["model_no"])

    assert found == expected_predictions(model_nos)


async def test_predictions_of_a_range_of_time(readers: Any) -> None:
    page = await queries.predictions(readers, [1, 2], START_S + 60, START_S + 180, 100)

    assert [((row["scheduled_at_s"] - START_S) // 60, row["model_no"]) for row in page] == [
        (3, 1),
        (2, 2),
        (2, 1),
        (1, 1),
    ]
    assert [row["score"] for row in page] == [1.0, 2.0, 1.0, 1.0]
    assert await queries.predictions(readers, [1], IN_THE_END_S, IN_THE_END_S + 1, 100) == []


@pytest.mark.parametrize("table", ["leaderboard", "snapshot"])
@pytest.mark.parametrize("model_nos", [[1], [1, 2, 3], [1, *range(4, 21)], None])
async def test_snapshots_come_newest_first_and_whole_if_they_fit(
    readers: Any, table: Any, model_nos: list[int] | None
) -> None:
    rows = await queries.snapshots(readers, table, model_nos, START_S, START_S + 900 * 9, 1000, 900)

    models = 1 if model_nos and 2 not in model_nos else 3
    assert len(rows) == 10 * models * (2 if table == "snapshot" else 1)
    times = [row["at_s"] for row in rows]
    assert times == sorted(times, reverse=True)
    assert all(row["score_recent"] == (row["at_s"] - START_S) / 900 for row in rows)


@pytest.mark.parametrize("table", ["leaderboard", "snapshot"])
async def test_long_lines_are_thinned_evenly_and_keep_their_newest_point(readers: Any, table: Any) -> None:
    rows = await queries.snapshots(readers, table, [1, 2], LONG_AGO_S, IN_THE_END_S, 50, 900)

    lines: dict[Any, list[int]] = {}
    for row in rows:
        line = (row["model_id"], row["asset"]) if table == "snapshot" else row["model_id"]
        lines.setdefault(line, []).append(row["at_s"])
        assert row["score_recent"] == (row["at_s"] - START_S) / 900  # the row's own values, not another's
    assert len(rows) <= 50
    assert len(lines) == (4 if table == "snapshot" else 2)
    for times in lines.values():
        gaps = [newer - older for newer, older in itertools.pairwise(times)]
        assert times[0] == START_S + 900 * 99
        assert len(times) >= 10
        assert max(gaps) <= 2 * gaps[len(gaps) // 2]


async def test_rounds_of_one_status_and_asset(readers: Any) -> None:
    async def listed(**wanted: Any) -> list[str]:
        chosen = {"asset": None, "horizon_s": None, "status": None, "before_s": None, "before_round_no": None}
        rows = await queries.rounds(readers, **{**chosen, **wanted}, limit=100)
        assert [row["scheduled_at_s"] for row in rows] == sorted(
            (row["scheduled_at_s"] for row in rows), reverse=True
        )
        return [row["status"] for row in rows]

    assert await listed(status=RoundStatus.MISSED) == ["missed"] * 10
    assert await listed(status=RoundStatus.SCORED) == ["scored"] * 15
    assert await listed(status=RoundStatus.SCORED, asset="BTC") == ["scored"] * 7
    assert await listed(horizon_s=60, asset="ETH") == []
    assert len(await listed(before_s=START_S)) == 5


async def test_statistics_count_valid_answers(readers: Any) -> None:
    row = await queries.statistics(readers, START_S + 60 * (ROUNDS - 2))

    assert row["predictions"] == len(expected_predictions(None))
    assert row["recent_predictions"] == len([1 for minute, _ in expected_predictions(None) if minute == 29])
    assert (row["rounds"], row["scored_rounds"], row["recent_rounds"]) == (40, 15, 1)


async def test_no_query_walks_over_a_large_table(readers: Any) -> None:
    many = list(range(1, MODELS + 1))
    for chosen in ([1], [1, 2], many, None):
        await queries.predictions(readers, chosen, LONG_AGO_S, IN_THE_END_S, 10)
        await queries.snapshots(readers, "leaderboard", chosen, LONG_AGO_S, IN_THE_END_S, 10, 900)
        await queries.snapshots(readers, "snapshot", chosen, LONG_AGO_S, IN_THE_END_S, 10, 900)
    await queries.round_by_key(readers, "BTC", 3600, 60, START_S)
    await queries.feed_tail(readers, "BTC", None, 10)
    await queries.deployments(readers, 1)

    steps = await readers.plans()

    walks = [step for step in steps if step.startswith("SCAN")]
    few = ("page", "scorer", "json_each", "(subquery", "CONSTANT")
    assert [step for step in walks if not any(name in step for name in few)] == []


async def test_ordered_pages_are_read_in_order_and_end_early(readers: Any) -> None:
    await queries.snapshots(readers, "snapshot", None, LONG_AGO_S, IN_THE_END_S, 10, 900)
    await queries.rounds(
        readers,
        asset="BTC",
        horizon_s=3600,
        status=RoundStatus.SCORED,
        before_s=IN_THE_END_S,
        before_round_no=None,
        limit=10,
    )

    assert not any("USE TEMP B-TREE" in step for step in await readers.plans())


async def test_a_rounds_answers_are_found_by_its_number(readers: Any) -> None:
    rows = await queries.round_answers(readers, 7)

    assert [row["model_id"] for row in rows] == ["m6", "m3", "m2", "m1"]
    assert not any(step.startswith("SCAN prediction") for step in await readers.plans())
