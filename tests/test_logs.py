"""The log: whatever happens to a line, whoever logs it goes on."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
import warnings
from typing import TYPE_CHECKING

import pytest
import structlog

from condor_lite import logs
from condor_lite.config import LogConfig

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


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
    writer.close(60)
    said = stream.getvalue()
    assert "RuntimeError: what happened" in said
    assert "service_failed (the rest can't be shown: " in said
    assert "and_on" in said.splitlines()[-1]


class FullAtFirst(io.BytesIO):
    """A disk that has no room for the first line."""

    full = True

    def write(self, data: ReadableBuffer, /) -> int:
        if self.full:
            self.full = False
            raise OSError(28, "No space left on device")
        return super().write(data)


def test_a_name_that_the_console_cannot_show_on_a_full_disk_does_not_end_the_log() -> None:
    disk = FullAtFirst()
    writer = logs.configure(LogConfig(), io.TextIOWrapper(disk, "ascii", write_through=True))
    log = structlog.get_logger()
    log.info("lost", model="Modèle 1")
    log.info("shown", model="Modèle 2")
    writer.close(60)
    assert not disk.full
    assert b"Mod\\xe8le 2" in disk.getvalue()
    assert b"lost" not in disk.getvalue()


@pytest.mark.parametrize("style", ["console", "json"])
def test_what_libraries_complain_of_is_in_the_log_and_nowhere_else(
    style: str, capfd: pytest.CaptureFixture[str]
) -> None:
    former, stream = logs.configure(LogConfig(), io.StringIO()), io.StringIO()
    writer = logs.configure(LogConfig(format=style), stream)
    for _ in range(3):
        logging.getLogger("asyncio").error("no descriptors are %s", "left", exc_info=OSError(24, "too many"))
    logging.getLogger("asyncio").error("something else")
    logging.getLogger("asyncio").info("nothing of note")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("this is old", stacklevel=1)
    writer.close(60)
    former.close(60)
    logging.getLogger("asyncio").error("too late")
    said = stream.getvalue()
    assert said.count("library_complains") == 3
    assert said.count("no descriptors are left") == 1
    assert "OSError: [Errno 24] too many" in said
    assert "something else" in said
    assert "this is old" in said
    assert "nothing of note" not in said
    assert "descriptors" not in "".join(capfd.readouterr())


def test_a_flood_that_differs_in_its_numbers_is_one_line_and_nothing_is_raised_into_a_library() -> None:
    stream = io.StringIO()
    writer = logs.configure(LogConfig(), stream)
    library = logging.getLogger("library")
    library.propagate, library.handlers = False, [writer.libraries]
    for number in range(100):
        library.warning("Task-%d at %s is gone", number, hex(number))
    library.log(35, "between two levels")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging, "raiseExceptions", False)
        library.error("%d of %d", "one")
    writer.close(60)
    said = stream.getvalue()
    assert said.count("Task-0 at 0x0 is gone") == said.count("is gone") == 1
    assert "between two levels" in said


def test_grpc_is_silent_from_the_start() -> None:
    script = """
import os, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "grpc":
            print(os.environ.get("GRPC_VERBOSITY"))

sys.meta_path.insert(0, Watch())
import condor_lite.supervisor
"""
    environ = {name: value for name, value in os.environ.items() if name != "GRPC_VERBOSITY"}
    ran = subprocess.run([sys.executable, "-c", script], env=environ, capture_output=True, check=True)
    assert ran.stdout == b"NONE\n"
