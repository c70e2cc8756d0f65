"""Real recorded prices, where they are: a folder of `<ASSET>.csv` that the project does not ship."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

BESIDE = Path(__file__).parent.parent.parent / "shared" / "data" / "prices"


def recorded() -> Path:
    """The folder; skips the test where there is none, except in CI, which must have it."""
    named = os.environ.get("CONDOR_LITE_TEST_PRICES")
    folder = Path(named) if named else BESIDE
    if not folder.is_dir():
        if os.environ.get("CI") and BESIDE.parent.parent.is_dir():
            pytest.fail(f"no recorded prices in {folder}")
        pytest.skip(
            f"needs recorded prices in {folder} (or in the folder that CONDOR_LITE_TEST_PRICES names)"
        )
    return folder
