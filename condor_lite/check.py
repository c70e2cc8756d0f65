"""Whether the environment lets a game run: everything that can be told before it starts, all at once."""

from __future__ import annotations

import ast
import errno
import importlib.util
import multiprocessing
import os
import resource
import shutil
import socket
import sqlite3
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path

from condor_lite.clock import machine_s
from condor_lite.config import Config
from condor_lite.errors import ConfigError, StorageError
from condor_lite.game.scoring import RuleError, load_rule
from condor_lite.models import sandbox
from condor_lite.models.folder import ModelFolder, scan
from condor_lite.models.security import load_credentials
from condor_lite.prices.online import refusal
from condor_lite.prices.replay import ReplaySource
from condor_lite.prices.source import Source, UnknownAsset
from condor_lite.prices.sources import live_source
from condor_lite.prices.web import WebSource
from condor_lite.storage import repositories
from condor_lite.storage.connection import checked_version, opening, require_sqlite, uri
from condor_lite.storage.lock import lock_holder

LEAST_FREE_BYTES = 256 * 2**20

_OWN_DESCRIPTORS = 128  # database, pool, report and feed
_DESCRIPTORS_A_MODEL = 4
_MOST_DESCRIPTORS = 65_536
_CONNECT_S = 3.0
_AHEAD_S = 3600.0


def check(config: Config) -> list[str]:
    """All problems: those of `obstacles`, and those with which the game starts but not as its host means.

    Reads the models' code and recorded prices, runs none of it (but for a host's own scoring rule and
    feed), starts nothing, and leaves nothing behind.
    """
    return [
        *obstacles(config),
        *_low_disk(config),
        *_orchestrator(config),
        *_recording(config),
        *_live(config),
        *_stored_time(config),
        *_models(config),
    ]


def obstacles(config: Config) -> list[str]:
    """What keeps the game from starting at all: SQLite, /dev/shm, folder, lock, database, ports, rule, keys,
    sandbox. Quick.
    """
    return [
        *_sqlite(),
        *_shared_memory(),
        *_storage(config),
        *_ports(config),
        *_rule(config),
        *_credentials(config),
        *_sandbox(config),
    ]


def _sqlite() -> Iterator[str]:
    try:
        require_sqlite()
    except StorageError as error:
        yield str(error)


def _shared_memory() -> Iterator[str]:
    try:
        multiprocessing.get_context("fork").Lock()  # of any other kind, it starts a process
    except OSError as error:
        yield (
            f"the scoring processes need a /dev/shm that they can write ({error.strerror}); give the "
            "container or the service one of its own, a tmpfs"
        )


def _storage(config: Config) -> Iterator[str]:
    database = config.storage.path
    folder = _existing(database.parent)
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        yield (
            f"storage.path = {database}: can't write in {folder} ({error.strerror}); "
            "make it a writable folder, or choose another storage.path"
        )
        return
    holder = lock_holder(database)
    if holder is not None:
        yield (
            f"another condor_lite (pid {holder or 'unknown'}) runs this game; "
            f"stop it, or choose another storage.path than {database}"
        )
    elif database.exists():
        yield from _database(database)


def _stored_time(config: Config) -> Iterator[str]:
    database = config.storage.path
    if config.feed.simulated or not database.is_file() or any(_database(database)):
        return
    try:
        with _reading(database) as connection:
            ahead_s = (repositories.load_clock(connection) or 0.0) - machine_s()
    except sqlite3.Error:  # one that was never filled
        return
    if ahead_s > _AHEAD_S:
        yield (
            f"{database}: its game is {timedelta(seconds=round(ahead_s))} ahead of this machine's clock; if "
            "that is wrong, set it right (NTP); if it is right, start the game: it goes back by itself as "
            "soon as a source of prices confirms the time, and keeps every answer"
        )


def _reading(database: Path) -> closing[sqlite3.Connection]:
    # Reading a file in WAL mode makes a -wal that stays, unless SQLite may take the file for unchanging. It
    # may, as nobody holds the lock; but what a crash left in a -wal must be read too.
    unchanging = "" if database.with_name(f"{database.name}-wal").exists() else "&immutable=1"
    return closing(sqlite3.connect(uri(database, "ro") + unchanging, uri=True))


def _database(database: Path) -> Iterator[str]:
    try:
        if not database.is_file():
            raise StorageError(f"{database} is not a file; choose another storage.path")
        database.open("r+b").close()
        with opening(database), _reading(database) as connection:
            checked_version(connection, database)
    except StorageError as error:
        yield str(error)
    except OSError as error:
        what_to_do = "make it writable, or choose another storage.path"
        yield f"{database} can't be written ({error.strerror}); {what_to_do}"


def _ports(config: Config) -> Iterator[str]:
    report, orchestrator = config.report, config.orchestrator
    yield from _port("report", report.host, report.port)
    if orchestrator.mode == "local":
        yield from _port("orchestrator", orchestrator.host, orchestrator.port)


def _port(section: str, host: str, port: int) -> Iterator[str]:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError):
        yield f'{section}.host = {host}: this name is not known; use "127.0.0.1" or "0.0.0.0"'
        return
    try:
        with socket.socket(family, kind, protocol) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            yield f"{section}.port = {port}: in use on {host}; choose another one, or 0 for any free one"
        elif error.errno == errno.EACCES:
            yield f"{section}.port = {port}: not allowed for this user; choose one from 1024 on"
        else:
            reason = f"can't listen there ({error.strerror})"
            yield f'{section}.host = {host}: {reason}; use "127.0.0.1" or "0.0.0.0"'


def _rule(config: Config) -> Iterator[str]:
    try:
        load_rule(config.scoring.rule)
    except RuleError as error:
        yield str(error)


def _credentials(config: Config) -> Iterator[str]:
    try:
        load_credentials(config.orchestrator)
    except ConfigError as error:
        yield from error.problems


def _sandbox(config: Config) -> Iterator[str]:
    orchestrator = config.orchestrator
    needed = orchestrator.mode == "local" and orchestrator.sandbox
    if needed and (problem := sandbox.problem(orchestrator.model_disk_bytes)):
        yield f"orchestrator.sandbox = true: {problem}"


def _low_disk(config: Config) -> Iterator[str]:
    folder = _existing(config.storage.path.parent)
    free = shutil.disk_usage(folder).free
    if free < LEAST_FREE_BYTES:
        yield (
            f"storage.path: only {free // 2**20} MiB are free on the disk of {folder}; free some more "
            f"({LEAST_FREE_BYTES // 2**20} MiB at least), or choose another storage.path"
        )


def _orchestrator(config: Config) -> Iterator[str]:
    host, port = config.orchestrator.host, config.orchestrator.port
    if config.orchestrator.mode == "remote":
        try:
            socket.create_connection((host, port), timeout=_CONNECT_S).close()
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or error
            yield f"orchestrator: nothing answers at {host}, port {port} ({reason}); is it running there?"


def _recording(config: Config) -> Iterator[str]:
    feed = config.feed
    if feed.source == ("replay",) and feed.path is not None:
        try:
            source = ReplaySource.load(feed.path, config.game.assets, feed.tick_s, feed.history_s)
            if config.game.start_s is not None:
                source.check_start(config.game.start_s)
        except ConfigError as error:
            yield from error.problems


def _live(config: Config) -> Iterator[str]:
    if config.feed.simulated:
        return
    try:
        sources = [live_source(name, config.feed) for name in config.feed.source]
    except ConfigError as error:
        yield from error.problems
        return
    for asset in config.game.assets:
        refusals = [said for source in sources if (said := _refusal(source, asset))]
        if len(refusals) == len(sources):
            yield from refusals


def _refusal(source: Source, asset: str) -> str | None:
    """Why a source can't have an asset, as far as can be told without asking it."""
    if isinstance(source, WebSource):
        try:
            source.symbol(asset)
        except UnknownAsset as error:
            return f"{asset}: {refusal(error)}"
    return None


def _models(config: Config) -> Iterator[str]:
    if config.orchestrator.mode != "local":
        return
    package = config.game.base_class.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        yield f"game.base_class = {config.game.base_class}: {package} is not installed; models need it"
    try:
        models = scan(config.orchestrator.models)
    except OSError as error:
        yield f"orchestrator.models: {error.filename} can't be read as a folder of models ({error.strerror})"
        return
    for model in models:
        if problem := model.problem or _syntax_problem(model):
            yield f"model {model.model_id} in {model.path}: {problem}"
    _, limit = _open_files()
    needed = _OWN_DESCRIPTORS + _DESCRIPTORS_A_MODEL * len(models)
    if limit < needed:
        yield (
            f"{len(models)} models need about {needed} open files, {limit} are allowed; "
            f"start it after `ulimit -n {needed}`, or with LimitNOFILE={needed} under systemd"
        )


def allow_open_files() -> None:
    """As many as this process may have at all: often a tenth is the limit until somebody asks for more."""
    soft, most = _open_files()
    if soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def _open_files() -> tuple[int, int]:
    """How many may be open, and how many could be allowed; no more than are ever needed."""
    soft, hard = (
        _MOST_DESCRIPTORS if limit == resource.RLIM_INFINITY else min(limit, _MOST_DESCRIPTORS)
        for limit in resource.getrlimit(resource.RLIMIT_NOFILE)
    )
    return soft, hard


def _syntax_problem(model: ModelFolder) -> str | None:
    """What is wrong with the model's code, as far as reading it can tell."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse((model.path / "main.py").read_bytes(), "main.py")
    except SyntaxError as error:
        return f"main.py, line {error.lineno or 1}: {error.msg}"
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        return f"main.py can't be read as Python: {error or type(error).__name__}"
    return None


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists: the rest is made at the start."""
    return next((path for path in (folder, *folder.parents) if os.path.exists(path)), folder)  # noqa: PTH110
