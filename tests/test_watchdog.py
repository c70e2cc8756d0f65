"""The watchdog tells how late the loop is, and from its own thread what holds it."""

from __future__ import annotations

import asyncio
import time

import pytest
import structlog

from condor_lite.watchdog import Watchdog
from tests.stage import until

pytestmark = pytest.mark.anyio


async def test_it_says_what_held_the_loop() -> None:
    watchdog = Watchdog()
    with structlog.testing.capture_logs() as logs:
        beating = asyncio.create_task(watchdog.run())
        await asyncio.sleep(0)

        def hold_the_loop() -> None:
            time.sleep(1.6)  # what is tested: the loop is held

        hold_the_loop()
        await until(lambda: watchdog.delay_s(1.0) > 1.0)
        beating.cancel()
    held = [line for line in logs if line["event"] == "event_loop_held"]
    assert len(held) == 1
    assert "hold_the_loop" in held[0]["doing"]


async def test_a_quiet_loop_is_not_late() -> None:
    watchdog = Watchdog()
    assert watchdog.delay_s(0.99) == 0.0
    beating = asyncio.create_task(watchdog.run())
    await until(lambda: watchdog.delay_s(0.0) < 0.05 and len(watchdog._delays_s) > 2)
    assert watchdog.delay_s(0.0) <= watchdog.delay_s(0.5) <= watchdog.delay_s(1.0)
    beating.cancel()
