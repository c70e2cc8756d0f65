"""What `python -m benchmarks report` measures by, without its timing: the file of a month, and the client."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks._client import asking
from benchmarks.report import DAY_S, LEADERBOARD, MIX, START_S, board, fill, reporting
from condor_lite.errors import QueryTimeout
from condor_lite.report import context as contexts
from condor_lite.report.context import Context
from condor_lite.storage import queries
from condor_lite.storage.database import Database
from tests.program import LIMIT_S
from tests.served import serve
from tests.test_queries import Watched

pytestmark = pytest.mark.anyio

ROUNDS = 400
MONTH = (START_S, START_S + 30 * DAY_S)


async def plans(readers: Any, ask: Any) -> list[str]:
    watched = Watched(readers)
    assert await ask(watched)
    return await watched.plans()


async def test_a_models_month_is_found_by_its_own_index(tmp_path: Path) -> None:
    async with Database(tmp_path / "condor.db") as db:
        await db.write(fill, 5, ROUNDS, START_S)

        async def predictions(readers: Any) -> Sequence[Any]:
            page = await queries.predictions(readers, [3], *MONTH, 100)
            assert len(page) == 100
            assert all(row["model_id"] == "00003" and row["score"] is not None for row in page)
            return page

        steps = await plans(db.reports, predictions)
        own = "SEARCH p USING INDEX prediction_by_model (model_no=? AND round_no>? AND round_no<?)"
        assert own in steps
        for table in ("leaderboard", "snapshot"):

            async def snapshots(readers: Any, table: Any = table) -> Sequence[Any]:
                return await queries.snapshots(readers, table, [3], *MONTH, 10_000, 900)

            steps = await plans(db.reports, snapshots)
            own = "SEARCH t USING PRIMARY KEY (model_no=? AND created_at_s>? AND created_at_s<?)"
            assert len([step for step in steps if " t " in step]) == steps.count(own) == 2


async def test_the_client_counts_answers_of_all_kinds(tmp_path: Path) -> None:
    end_s = START_S + 30 * DAY_S
    async with reporting(tmp_path, board(5, end_s), end_s) as (url, _), asyncio.timeout(LIMIT_S):
        port = int(url.rpartition(":")[2])
        for_s = 0.2
        while True:
            async with asking(port, 4, [*MIX, "/nowhere"], readers=2, zipped=True) as asked:
                await asyncio.sleep(for_s)
            if len(asked.latencies_s) == len(set(MIX)) + 1 and asked.event_bytes:
                break
            for_s *= 2  # a slow machine does not come to all of them in that time
        assert set(asked.failed) - {"503"} == {"404"}, "who asks for too much of a slow machine is told so"
        assert len(MIX) < asked.answered <= len(asked.all_s)
        assert asked.latencies_s[LEADERBOARD]


async def test_large_answers_wait_for_each_other_and_nothing_ready_made_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serve(tmp_path) as game:
        context = Context(game.live, game.db.reports)
        async with context.large():
            game.live.publish(board(3, START_S))
            assert len((await context.ready()).standings) == 3
            monkeypatch.setattr(contexts, "_TURN_WITHIN_S", 0.01)
            with pytest.raises(QueryTimeout):
                async with context.large():
                    pass
        async with context.large():
            pass
