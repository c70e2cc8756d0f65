"""SIGHUP to a running game: what can change does, and the log says what cannot."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson

from condor_lite import reload
from condor_lite.config import keys as all_keys
from tests.stage import load
from tests.test_program import DEMO as SLOW_DEMO
from tests.test_program import Program

DEMO = SLOW_DEMO.replace('horizon = "20s"', 'horizon = "5s"')


def events(program: Program, name: str) -> list[dict[str, Any]]:
    lines = [orjson.loads(line) for line in program.console.read_bytes().splitlines() if line[:1] == b"{"]
    return [line for line in lines if line["event"] == name]


def test_a_running_game_rereads_its_config(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    json = '\n[log]\nformat = "json"\n'
    config.write_text(DEMO + json)
    program = Program(tmp_path)
    try:
        program.until(lambda: events(program, "look_here"))
        changed = DEMO.replace('snapshot_interval = "10s"', 'snapshot_interval = "20s"')
        more = '\n[storage]\nkeep_payloads = "2h"\npath = "elsewhere.db"\n'
        config.write_text(changed + json + 'level = "debug"\n' + more)
        program.process.send_signal(signal.SIGHUP)
        (told,) = program.until(lambda: events(program, "config_reread"))
        assert told["applied"] == ["scoring.snapshot_interval", "storage.keep_payloads", "log.level"]
        assert told["need_restart"] == ["storage.path"]
        program.until(lambda: events(program, "round_scored"))  # told at the level "debug" only

        config.write_text(
            DEMO + '[storage]\nkeep_payload = "1h"\n[log]\nlevel = "loud"\nformat = "console"\n'
        )
        program.process.send_signal(signal.SIGHUP)
        (refused,) = program.until(lambda: events(program, "config_not_reread"))
        assert len(refused["problems"]) == 2
        assert "storage.keep_payloads" in "".join(refused["problems"])

        config.write_text(changed + '\n[log]\nformat = "console"\nlevel = "info"\n')
        program.process.send_signal(signal.SIGHUP)
        program.until(lambda: "config_reread      applied=" in program.console.read_text())
        program.process.send_signal(signal.SIGTERM)
        assert program.process.wait(30) == 0
    finally:
        program.process.kill()
        program.process.wait()


def test_a_closed_terminal_ends_the_game(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(DEMO)
    ours, terminal = pty.openpty()
    environ = {**os.environ, "CONDOR_LITE__REPORT__PORT": "0"}
    log = tmp_path / "console.log"
    start = (
        "import fcntl, os, signal, sys, termios; signal.signal(signal.SIGHUP, signal.SIG_DFL);"  # no nohup's
        "fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.executable, "
    )
    with log.open("wb") as console:
        process = subprocess.Popen(
            [sys.executable, "-c", start + "[sys.executable, '-m', 'condor_lite'])"],
            cwd=tmp_path,
            env=environ,
            stdin=terminal,
            stdout=console,
            stderr=console,
            start_new_session=True,
        )
    os.close(terminal)
    try:
        deadline_s = time.monotonic() + 60
        while b"look_here" not in log.read_bytes():
            assert time.monotonic() < deadline_s, log.read_text()
            time.sleep(0.05)
        process.send_signal(signal.SIGHUP)  # the terminal is still there: no reason to end
        while b"config_reread" not in log.read_bytes():
            assert time.monotonic() < deadline_s, log.read_text()
            time.sleep(0.05)
        os.close(ours)
        assert process.wait(30) == 0
        assert b"stored=everything" in log.read_bytes()
    finally:
        process.kill()
        process.wait()


def test_every_key_that_can_change_is_a_key_and_documented() -> None:
    keys = {key.name for key in all_keys()}
    assert keys.issuperset(reload.CHANGEABLE)
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    about = readme.split("SIGHUP")[1].split("\n\n")[0]
    assert [key for key in reload.CHANGEABLE if f"`{key}`" not in about] == []
    assert about.count("`") == 2 * len(reload.CHANGEABLE)


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
