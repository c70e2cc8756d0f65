"""Fixtures that every test may use."""

from collections.abc import Iterator

import pytest
import structlog


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def _log_as_it_was() -> Iterator[None]:
    """A command that sets the log up in this process must not decide what later tests can see of it."""
    yield
    structlog.reset_defaults()
