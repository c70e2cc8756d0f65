"""The log: whatever happens to a line, whoever logs it goes on."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
import structlog

from condor_lite import logs
from condor_lite.config import LogConfig


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before = structlog.get_config()
    yield
    structlog.configure(**before)


class Unshowable:
    def __repr__(self) -> str:
        raise OSError(24, "Too many open files")

    __str__ = __repr__


@pytest.mark.parametrize("style", ["console", "json"])
def test_a_line_that_cannot_be_rendered_fails_nobody(style: str) -> None:
    stream = io.StringIO()
    writer = logs.configure(LogConfig(format=style), stream)
    log = structlog.get_logger()
    try:
        raise RuntimeError("what happened")
    except RuntimeError:
        log.exception("service_failed", service="score")
        log.exception("service_failed", service=Unshowable())
    log.info("and_on")
    writer.close(5)
    said = stream.getvalue()
    assert "RuntimeError: what happened" in said
    assert "service_failed (the rest can't be shown: " in said
    assert "and_on" in said.splitlines()[-1]
