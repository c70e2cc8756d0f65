"""The watchdog tells how late the loop is, and from its own thread what holds it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import pytest
import structlog
from structlog.typing import EventDict

from condor_lite.watchdog import Watchdog
from tests.stage import until

pytestmark = pytest.mark.anyio


def held(logs: Sequence[EventDict]) -> list[str]:
    """What is told of the test's own hold; a busy machine may hold the loop as well, elsewhere."""
    told = [line["doing"] for line in logs if line["event"] == "event_loop_held"]
    return [doing for doing in told if "hold_the_loop" in doing]


async def test_it_says_what_held_the_loop() -> None:
    watchdog = Watchdog()
    with structlog.testing.capture_logs() as logs:
        beating = asyncio.create_task(watchdog.run())
        await asyncio.sleep(0)

        def hold_the_loop() -> None:
            until_s = time.monotonic() + 60
            while not held(logs) and time.monotonic() < until_s:
                time.sleep(0.05)
            time.sleep(1.0)  # it is told once, however long it lasts

        hold_the_loop()
        await until(lambda: watchdog.delay_s(1.0) > 1.0)
        beating.cancel()
    assert len(held(logs)) == 1


async def test_a_quiet_loop_is_not_late() -> None:
    watchdog = Watchdog()
    assert watchdog.delay_s(0.99) == 0.0
    beating = asyncio.create_task(watchdog.run())
    await until(lambda: watchdog.delay_s(0.0) < 0.05 and len(watchdog._delays_s) > 2)
    assert watchdog.delay_s(0.0) <= watchdog.delay_s(0.5) <= watchdog.delay_s(1.0)
    beating.cancel()
