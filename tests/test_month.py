"""A shorter month, with a few models: what grows stops growing when the retention period is over."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks.month import RETENTION_DAYS, month, stored

pytestmark = pytest.mark.anyio

SHARED_THREADS = min(32, (os.cpu_count() or 1) + 4)  # of asyncio's executor, started as they are needed


async def test_nothing_grows_once_the_retention_period_is_over(tmp_path: Path) -> None:
    models = 3
    sizes = await month(tmp_path, models, RETENTION_DAYS + 2, tick="3h", interval="6h")
    growing, flat = sizes[RETENTION_DAYS - 3], sizes[RETENTION_DAYS:]
    assert flat[0].used_bytes > growing.used_bytes
    for size in flat:
        assert 4 * models * RETENTION_DAYS <= size.predictions <= 4 * models * (RETENTION_DAYS + 1)
        assert size.used_bytes < 1.03 * flat[0].used_bytes
        assert size.file_bytes < 1.03 * flat[0].file_bytes
        assert size.log_bytes < 8 * 2**20
        assert size.descriptors <= sizes[1].descriptors + 2
        assert size.threads <= sizes[1].threads + SHARED_THREADS
        assert size.rss_bytes < 1.1 * sizes[1].rss_bytes


@pytest.mark.parametrize(("digits", "share"), [(0, 0.10), (6, 0.20), (17, 0.20)])
def test_a_prediction_takes_a_small_part_of_its_json(digits: int, share: float) -> None:
    sent, whole, bare = stored(digits, models=10, hours=2)
    assert whole < share * sent
    assert bare < 250
