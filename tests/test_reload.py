"""SIGHUP to a running game: what can change does, and the log says what cannot."""

from __future__ import annotations

import asyncio
import os
import pty
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest
import structlog

from condor_lite import config as configuration
from condor_lite import reload
from condor_lite.config import Config
from condor_lite.config import keys as all_keys
from tests.program import DEMO, Program, program
from tests.stage import load, until


def events(run: Program, name: str) -> list[dict[str, Any]]:
    lines = [orjson.loads(line) for line in run.console.read_bytes().splitlines(keepends=True) if whole(line)]
    return [line for line in lines if line["event"] == name]


def whole(line: bytes) -> bool:
    """Whether it is in JSON, and all of it is written."""
    return line.startswith(b"{") and line.endswith(b"}\n")


def test_a_running_game_rereads_its_config(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    json = '\n[log]\nformat = "json"\n'
    config.write_text(DEMO + json)
    with program(tmp_path) as run:
        run.until(lambda: events(run, "look_here"))
        changed = DEMO.replace('snapshot_interval = "10s"', 'snapshot_interval = "20s"')
        more = '\n[storage]\nkeep_payloads = "2h"\npath = "elsewhere.db"\n'
        config.write_text(changed + json + 'level = "debug"\n' + more)
        run.process.send_signal(signal.SIGHUP)
        (told,) = run.until(lambda: events(run, "config_reread"))
        assert told["applied"] == ["scoring.snapshot_interval", "storage.keep_payloads", "log.level"]
        assert told["need_restart"] == ["storage.path"]
        run.until(lambda: events(run, "round_scored"))  # told at the level "debug" only

        config.write_text(
            DEMO + '[storage]\nkeep_payload = "1h"\n[log]\nlevel = "loud"\nformat = "console"\n'
        )
        run.process.send_signal(signal.SIGHUP)
        (refused,) = run.until(lambda: events(run, "config_not_reread"))
        assert len(refused["problems"]) == 2
        assert "storage.keep_payloads" in "".join(refused["problems"])

        config.write_text(changed + '\n[log]\nformat = "console"\nlevel = "info"\n')
        run.process.send_signal(signal.SIGHUP)
        run.until_said("config_reread      applied=")
        assert run.end() == 0


def test_a_closed_terminal_ends_the_game(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(DEMO)
    ours, terminal = pty.openpty()
    in_it = (
        "import fcntl, os, signal, sys, termios; signal.signal(signal.SIGHUP, signal.SIG_DFL);"  # no nohup's
        "os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
        "os.execv(sys.executable, [sys.executable, '-m', 'condor_lite'])"
    )
    with program(tmp_path, command=(sys.executable, "-c", in_it), stdin=terminal) as run:
        os.close(terminal)
        run.until_said("look_here")
        run.process.send_signal(signal.SIGHUP)  # the terminal is still there: no reason to end
        run.until_said("config_reread")
        family = run.family()
        os.close(ours)
        assert run.ended(family) == 0
        assert "stored=everything" in run.console.read_text()


def test_every_key_that_can_change_is_a_key_and_documented() -> None:
    keys = {key.name for key in all_keys()}
    assert keys.issuperset(reload.CHANGEABLE)
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    about = readme.split("SIGHUP")[1].split("\n\n")[0]
    assert [key for key in reload.CHANGEABLE if f"`{key}`" not in about] == []
    assert about.count("`") == 2 * len(reload.CHANGEABLE)


KEPT = '[[game.settings]]\nassets = ["BTC"]\nhorizon = "1h"\nstep = "1m"\ninterval = "5m"\n'


def test_prices_are_kept_as_long_as_the_answers_that_need_them(tmp_path: Path) -> None:
    history = '[feed]\nhistory = "1d"\n'
    keep = '[storage]\nkeep_payloads = "{}"\nkeep_prices = "{}"\n'
    running = load(tmp_path, KEPT + history)
    shorter = load(tmp_path, KEPT + history + keep.format("2d", "3d"))
    assert reload.apply(running, shorter) == reload.Changes(
        ("storage.keep_payloads", "storage.keep_prices"), ()
    )
    assert (running.storage.keep_payloads_s, running.storage.keep_prices_s) == (2 * 86400, 3 * 86400)

    # Right after a restart, which changes what they must be long enough for, too.
    text = KEPT + history + '[scoring]\nvoid_after = "5m"\n' + keep.format("3d", "263100s")
    other = load(tmp_path, text)
    assert reload.apply(running, other) == reload.Changes(
        (), ("scoring.void_after", "storage.keep_payloads", "storage.keep_prices")
    )
    assert (running.storage.keep_payloads_s, running.storage.keep_prices_s) == (2 * 86400, 3 * 86400)


@pytest.mark.anyio
async def test_no_file_whatever_ends_the_rereading(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    running = load(tmp_path, KEPT)
    raised: list[Exception] = []

    def read() -> Config:
        if raised:
            raise raised.pop()
        return configuration.load(path, {})

    reloader = reload.Reloader(running, read, lambda config: None)
    with structlog.testing.capture_logs() as logs:
        task = asyncio.create_task(reloader.run())

        async def said() -> dict[str, Any]:
            before = len(logs)
            reloader.ask()
            await until(lambda: len(logs) > before or task.done())
            assert not task.done()
            return dict(logs[-1])

        path.write_bytes(b"\xff\x00garbage")
        assert "not UTF-8" in (await said())["problems"][0]
        path.write_text("\x00" * 1000)
        assert "not valid TOML" in (await said())["problems"][0]
        path.unlink()
        assert "no such file" in (await said())["problems"][0]
        path.mkdir()
        assert "is a folder" in (await said())["problems"][0]
        path.rmdir()
        path.symlink_to(path)
        assert "can't be read: Too many levels" in (await said())["problems"][0]
        for error in (RuntimeError("can't start new thread"), MemoryError(), RecursionError("deep")):
            raised.append(error)
            assert (await said())["problems"] == [f"{type(error).__name__}: {error}"]
        path.unlink()
        path.write_text(KEPT + '[log]\nlevel = "error"\n')
        assert (await said())["applied"] == ["log.level"]
        task.cancel()


def test_what_needs_a_restart_is_left_alone(tmp_path: Path) -> None:
    text = '[[game.settings]]\nassets = ["BTC"]\nhorizon = "5m"\nstep = "1m"\ninterval = "5m"\n'
    running = load(tmp_path, text)
    other = load(tmp_path, text.replace("BTC", "ETH") + '[scoring]\nrule = "log"\ninterval = "3s"\n')
    other.webhook = replace(other.webhook, min_free_bytes=1)
    changes = reload.apply(running, other)
    assert changes == reload.Changes(
        ("scoring.interval",), ("game.settings", "scoring.rule", "webhook.min_free")
    )
    assert (running.scoring.rule, running.scoring.interval_s) == ("crps", 3)
    assert running.game.assets == ("BTC",)
