"""What `python -m benchmarks predict` measures by: a real fleet's answers and the times of their commits."""

from __future__ import annotations

import pytest

from benchmarks.predict import playing
from tests.fleet.process import FleetProcess

pytestmark = pytest.mark.anyio


async def test_every_answer_of_a_measured_round_has_the_time_of_its_commit() -> None:
    models = 3
    async with FleetProcess(models) as fleet, playing(fleet.port) as game:
        await game.connected(models)
        await game.next_rounds(1)
        times = max(await game.next_rounds(2), key=lambda held: len(held.stored_s))
        assert len(times.stored_s) == models
        assert all(at_s > times.opened_s for at_s in times.stored_s.values())
        assert game.spent_s(times) > 0
