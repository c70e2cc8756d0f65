"""Prices: recorded ones, where they are (the project does not ship them), and made ones."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

BESIDE = Path(__file__).parent.parent.parent / "shared" / "data" / "prices"


def recorded() -> Path:
    """The folder of `<ASSET>.csv`; skips the test where there is none, except in CI, which must have it."""
    named = os.environ.get("CONDOR_LITE_TEST_PRICES")
    folder = Path(named) if named else BESIDE
    if not folder.is_dir():
        if os.environ.get("CI") and BESIDE.parent.parent.is_dir():
            pytest.fail(f"no recorded prices in {folder}")
        pytest.skip(
            f"needs recorded prices in {folder} (or in the folder that CONDOR_LITE_TEST_PRICES names)"
        )
    return folder


def wild_walk(seed: int, minutes: int, level: float, width: float) -> list[float]:
    """Minute prices whose moves have a heavy tail."""
    moves = np.random.default_rng(seed).standard_t(3, minutes) * width
    walked: list[float] = (level * np.exp(np.cumsum(moves))).tolist()
    return walked


def record(folder: Path, asset: str, prices: Iterable[tuple[int, float]]) -> None:
    """A recording, as a replay reads it."""
    folder.mkdir(exist_ok=True)
    rows = "".join(f"{at_s},{price:.9g}\n" for at_s, price in prices)
    (folder / f"{asset}.csv").write_text(f"timestamp,close\n{rows}")
