"""What is done to a game, one function a fault. Each undoes what it did, and returns what it saw go wrong."""

from __future__ import annotations

import random
import resource
import signal
import socket
import sqlite3
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass

import psutil

from tests.program import LIMIT_S, catches
from tests.torture.worlds import SPEED, Live, Replayed, World

_SOME_ROUNDS_S = 5.0
_INTERVAL_S = 60  # of the replayed game, in its time
_MOST_SAID_BYTES = 2**20
_LESS_THAN_NUMPY_TAKES = 64 * 2**20
_HOUR_S = 3600
_YEAR_S = 365 * 86400


class Impossible(Exception):
    """This machine doesn't permit this fault; the message says why."""


@dataclass(frozen=True, slots=True)
class Spell:
    """How a fault is to be: for how long (wall), and at which moments."""

    span_s: float
    moments: random.Random


@dataclass(frozen=True, slots=True)
class Begun:
    """When a fault began (monotonic), and the newest round that was on disk then."""

    at_s: float
    newest_s: int


Fault = Callable[[World, Spell], list[str]]


def _endured(world: World, spell: Spell, said: str) -> list[str]:
    """Wait until /readyz says it, and then for the span."""
    until_s = time.monotonic() + LIMIT_S
    while said not in world.problems():
        if time.monotonic() > until_s:
            return [f"/readyz did not say {said!r} within {LIMIT_S:g} s"]
        time.sleep(0.05)
    time.sleep(spell.span_s)
    return []


def _begun(world: World) -> Begun:
    return Begun(time.monotonic(), world.newest_round_s())


def _asked_meanwhile(world: World, begun: Begun, end: Callable[[], object], least: int = 1) -> list[str]:
    """End a fault, and see that the game asked meanwhile, at so many times at least, and has stored that."""
    time.sleep(max(0.0, begun.at_s + _SOME_ROUNDS_S - time.monotonic()))
    from_s = begun.newest_s + _INTERVAL_S  # that one may have been open when the fault began
    last_s = begun.newest_s + (time.monotonic() - begun.at_s) * SPEED
    end()
    until_s = time.monotonic() + LIMIT_S
    while world.newest_round_s() <= last_s and time.monotonic() < until_s:
        time.sleep(0.05)
    with closing(world.books.open()) as db:
        (held,) = db.execute(  # on a slow machine, models may have been too late
            "SELECT count(DISTINCT scheduled_at_s) FROM round WHERE answered + failed + timed_out > 0"
            " AND (status IN ('closed', 'scored') OR reason LIKE '%timed out together%')"
            " AND scheduled_at_s > ? AND scheduled_at_s <= ?",
            (from_s, last_s),
        ).fetchone()
    if held >= least:
        return []
    return [f"rounds of only {held} times, not of {least}, were held meanwhile and stored afterwards"]


def kill(world: World, spell: Spell) -> list[str]:
    """kill -9 of the game"""
    world.run.end(signal.SIGKILL)
    world.books.note_killed()
    world.start()
    return []


def kill_worker(world: World, spell: Spell) -> list[str]:
    """kill -9 of a scoring process"""
    return _kill_child(world, "spawn_main")


def kill_model(world: World, spell: Spell) -> list[str]:
    """kill -9 of a model"""
    return _kill_child(world, "condor_lite.models.host")


def _kill_child(world: World, part: str) -> list[str]:
    process = _child(world, part)
    if process is None:
        return [f"there is no process {part}"]
    process.kill()
    return [] if _child(world, part, process) else [f"there is no other process {part}"]


def _child(world: World, part: str, former: psutil.Process | None = None) -> psutil.Process | None:
    """A process of the game with this in its command line, and not the `former` one, once there is one."""
    until_s = time.monotonic() + LIMIT_S
    while (found := world.child(part)) in (None, former) and time.monotonic() < until_s:
        time.sleep(0.02)
    return None if found == former else found


def cut_orchestrator(world: World, spell: Spell) -> list[str]:
    """the connection to the orchestrator cut"""
    try:
        return [] if world.cut() else ["there is no connection to the orchestrator"]
    except PermissionError as error:
        raise Impossible(f"a process's descriptors can't be had here: {error}") from None


def stopped(world: World, spell: Spell) -> list[str]:
    """SIGSTOP, and SIGCONT later"""
    world.run.process.send_signal(signal.SIGSTOP)
    time.sleep(spell.span_s)
    world.run.process.send_signal(signal.SIGCONT)
    return []


def terminate(world: World, spell: Spell) -> list[str]:
    """SIGTERM while it plays, and again while it starts"""
    wrong = []
    if code := world.run.end():
        wrong.append(f"exit code {code} after SIGTERM")
    with closing(world.books.open()) as db:
        if left := db.execute("SELECT count(*) FROM round WHERE status = 'open'").fetchone()[0]:
            wrong.append(f"{left} rounds are open after an orderly end")
    world.start()
    time.sleep(spell.moments.uniform(0.1, min(1.5 * spell.span_s, 10.0)))
    unready = not catches(world.run.process.pid, signal.SIGTERM)
    code = world.run.end()
    if code and not (unready and code == -signal.SIGTERM):
        wrong.append(f"exit code {code} after SIGTERM during the start")
    world.start()
    return wrong


def terminate_twice(world: World, spell: Spell) -> list[str]:
    """SIGTERM, and another one while it stops"""
    process = world.run.process
    process.send_signal(signal.SIGTERM)
    time.sleep(spell.moments.choice([0.05, 0.5, 1.5]))
    code = world.run.end()
    world.books.note_killed()
    world.start()
    return [] if code in (0, 128 + signal.SIGTERM) else [f"exit code {code} after two SIGTERMs"]


def terminate_locked(world: World, spell: Spell) -> list[str]:
    """SIGTERM while the database is locked"""
    with closing(sqlite3.connect(world.books.path, isolation_level=None, timeout=LIMIT_S)) as other:
        other.execute("BEGIN IMMEDIATE")
        wrong = _endured(world, Spell(0.0, spell.moments), "another process holds the database")
        if (code := world.run.end()) != 1:
            wrong.append(f"exit code {code} after SIGTERM with answers that can't be stored")
    world.start()
    return wrong


def locked(world: World, spell: Spell) -> list[str]:
    """the database locked by another process"""
    with closing(sqlite3.connect(world.books.path, isolation_level=None, timeout=LIMIT_S)) as other:
        other.execute("BEGIN IMMEDIATE")
        begun = _begun(world)
        wrong = _endured(world, spell, "another process holds the database")
        return wrong + _asked_meanwhile(world, begun, lambda: other.execute("ROLLBACK"))


def disk_full(world: World, spell: Spell) -> list[str]:
    """the disk full, and room again"""
    if world.disk.problem is not None:
        raise Impossible(f"no file system can be mounted here: {world.disk.problem}")
    with closing(sqlite3.connect(world.books.path, timeout=LIMIT_S)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # else there is room for a while in the log
    world.disk.fill()
    try:
        begun = _begun(world)
        wrong = _endured(world, spell, "the database can't be written")
        return wrong + _asked_meanwhile(world, begun, world.disk.free)
    finally:
        world.disk.free()


def read_only(world: World, spell: Spell) -> list[str]:
    """the file made read-only (chattr +i), and writable again"""
    files = [str(world.books.path), f"{world.books.path}-wal"]
    try:
        said = subprocess.run(["chattr", "+i", *files], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise Impossible(str(error)) from None
    if said.returncode:
        raise Impossible(f"an open file can't be made read-only here: {said.stderr.strip()}")

    def free() -> None:
        subprocess.run(["chattr", "-i", *files], check=True)

    try:
        begun = _begun(world)
        wrong = _endured(world, spell, "the database can't be written")
        return wrong + _asked_meanwhile(world, begun, free)
    finally:
        free()


def pool_memory(world: World, spell: Spell) -> list[str]:
    """no more memory for the scoring processes (RLIMIT_AS), while they work and while they start"""
    process = _child(world, "spawn_main")
    if process is None:
        return ["there is no scoring process"]
    with suppress(psutil.NoSuchProcess, psutil.TimeoutExpired):
        process.rlimit(resource.RLIMIT_AS, (process.memory_info().vms, resource.RLIM_INFINITY))
        process.wait(spell.span_s)
    with suppress(psutil.NoSuchProcess):
        process.kill()
    until_s = time.monotonic() + spell.span_s
    while time.monotonic() < until_s:
        starting = world.child("spawn_main")
        if starting not in (None, process):
            with suppress(psutil.NoSuchProcess):
                starting.rlimit(resource.RLIMIT_AS, (_LESS_THAN_NUMPY_TAKES, resource.RLIM_INFINITY))
                process = starting
        time.sleep(0.01)
    with suppress(psutil.NoSuchProcess):  # one that met no shortage yet may go on
        process.rlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return []


def descriptors(world: World, spell: Spell) -> list[str]:
    """no more file descriptors for the game, with visitors at its port and a scoring process killed"""
    spell = Spell(max(spell.span_s, _SOME_ROUNDS_S), spell.moments)
    game = psutil.Process(world.run.process.pid)
    soft, hard = game.rlimit(resource.RLIMIT_NOFILE)
    said_bytes, begun = world.run.console.stat().st_size, _begun(world)
    game.rlimit(resource.RLIMIT_NOFILE, (game.num_fds(), hard))
    with ExitStack() as visitors:
        for _ in range(20):
            with suppress(OSError):
                visitors.enter_context(socket.create_connection(("127.0.0.1", world.run.port), 2))
        if worker := world.child("spawn_main"):
            worker.kill()
        time.sleep(spell.span_s)

    def end() -> None:
        game.rlimit(resource.RLIMIT_NOFILE, (soft, hard))

    wrong = _asked_meanwhile(world, begun, end, least=2)
    if (grown := world.run.console.stat().st_size - said_bytes) > _MOST_SAID_BYTES:
        wrong.append(f"{grown} bytes were logged meanwhile")
    return wrong


def port_taken(world: World, spell: Spell) -> list[str]:
    """its port taken by another program when it starts"""
    wrong = []
    world.run.end()
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        world.start(CONDOR_LITE__REPORT__PORT=str(port))
        if (code := world.run.process.wait(LIMIT_S)) != 2:
            wrong.append(f"exit code {code} where the port is taken")
        if f"{port}" not in world.run.console.read_text()[-500:]:
            wrong.append("its last line does not name the port")
    world.start()
    return wrong


def clock_forward(world: World, spell: Spell) -> list[str]:
    """the machine's clock set forward, by an hour or a year, and right again"""
    return _set_wrong(world, spell, {_HOUR_S: "ahead of the game's", _YEAR_S: "ahead of the game's"})


def clock_back(world: World, spell: Spell) -> list[str]:
    """the machine's clock set back, by half a minute or a year, and right again"""
    return _set_wrong(world, spell, {-30: "the machine's clock was set back", -_YEAR_S: "behind the game's"})


def _set_wrong(world: World, spell: Spell, said_by: dict[int, str]) -> list[str]:
    by_s = spell.moments.choice(list(said_by))
    world.set_wall(by_s)
    wrong = _endured(world, Spell(min(spell.span_s, 10.0), spell.moments), said_by[by_s])
    world.set_wall(0.0)
    with closing(world.books.open()) as db:
        (ahead_s,) = db.execute("SELECT max(scheduled_at_s) FROM round").fetchone()
    return [*wrong, f"a round of {ahead_s} is stored"] if ahead_s > time.time() + 5 else wrong


def feed_gone(world: World, spell: Spell) -> list[str]:
    """the source of prices gone"""
    assert isinstance(world, Live)
    world.no_prices()
    try:
        return _endured(world, spell, "the newest price is")
    finally:
        world.prices.outage = None


def orchestrator_gone(world: World, spell: Spell) -> list[str]:
    """the orchestrator gone, while its models stay"""
    assert isinstance(world, Live)
    newest_s = world.newest_round_s()
    world.do(world.orchestrator.stop())
    try:
        wrong = _endured(world, spell, "the orchestrator is not connected")
        until_s = time.monotonic() + LIMIT_S
        while world.newest_round_s() <= newest_s:
            if time.monotonic() > until_s:
                return [*wrong, "no round was answered without an orchestrator"]
            time.sleep(0.05)
        return wrong
    finally:
        world.do(world.orchestrator.start())


FAULTS: dict[type[World], tuple[Fault, ...]] = {
    Replayed: (
        kill_model,
        cut_orchestrator,
        kill_worker,
        stopped,
        locked,
        disk_full,
        read_only,
        pool_memory,
        descriptors,
        kill,
        terminate,
        terminate_twice,
        terminate_locked,
        port_taken,
    ),
    Live: (
        feed_gone,
        orchestrator_gone,
        clock_forward,
        clock_back,
        stopped,
        kill,
        terminate,
        terminate_twice,
        port_taken,
    ),
}
