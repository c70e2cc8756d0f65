"""What `python -m benchmarks predict` measures by: a real fleet's answers and the times of their commits."""

from __future__ import annotations

import asyncio

import pytest

from benchmarks.predict import playing
from tests.fleet.process import FleetProcess

pytestmark = pytest.mark.anyio


async def test_every_answer_of_a_measured_round_has_the_time_of_its_commit() -> None:
    models = 3
    async with FleetProcess(models) as fleet, playing(fleet.port) as game:
        await game.connected(models)
        async with asyncio.timeout(120):  # on a busy machine somebody may not answer within the second
            while len((times := (await game.next_rounds(1))[0]).stored_s) < models:
                pass
        assert all(at_s > times.opened_s for at_s in times.stored_s.values())
        assert game.spent_s(times) > 0
