"""What `check` finds in the environment, and that it leaves nothing behind."""

import asyncio
import errno
import os
import re
import resource
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from condor_lite import check as checking
from condor_lite.check import check, obstacles
from condor_lite.config import Config, load
from condor_lite.errors import ConfigError
from condor_lite.storage.connection import BUSY_TIMEOUT_S, connect_writer
from condor_lite.storage.lock import GameLock
from condor_lite.storage.schema import MIGRATIONS
from tests.price_server import Fault, PriceServer

CONFIG = """
[[game.settings]]
assets = ["BTC"]
horizon = "1h"
step = "1m"
interval = "12m"

[report]
port = 0

[orchestrator]
port = 0
"""

MODEL = """
from condor_lite.tracker import TrackerBase

class Model(TrackerBase):
    def predict(self, asset, horizon, step):
        return self.flat({"type": "builtin", "name": "norm", "params": {}}, horizon, step)
"""


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., Config]:
    """A config in a folder of its own, with overrides as `REPORT__PORT=...`."""
    (tmp_path / "config.toml").write_text(CONFIG)

    def read_with(**environ: str) -> Config:
        overrides = {f"CONDOR_LITE__{name}": str(value) for name, value in environ.items()}
        return load(tmp_path / "config.toml", overrides)

    return read_with


@pytest.fixture
def model(tmp_path: Path) -> Callable[..., Path]:
    """Write a model's folder."""

    def write(name: str, code: str | bytes | None = MODEL, **files: str) -> Path:
        folder = tmp_path / "models" / name
        folder.mkdir(parents=True)
        if code is not None:
            (folder / "main.py").write_bytes(code if isinstance(code, bytes) else code.encode())
        for file, text in files.items():
            (folder / file.replace("_", ".")).write_text(text)
        return folder

    return write


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def everything_in(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def test_a_healthy_environment_has_no_problem_and_stays_as_it_was(
    read: Callable[..., Config], model: Callable[..., Path], tmp_path: Path
) -> None:
    model("good", model_toml='name = "Good"\n')
    before = everything_in(tmp_path)
    assert check(read()) == []
    assert everything_in(tmp_path) == before


def test_the_bundled_models_pass(read: Callable[..., Config]) -> None:
    assert check(read()) == []


def test_ports_in_use_are_named_together(read: Callable[..., Config], taken_port: int) -> None:
    (report,) = obstacles(read(REPORT__PORT=taken_port))
    assert report == (
        f"report.port = {taken_port}: in use on 127.0.0.1; choose another one, or 0 for any free one"
    )
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        found = obstacles(read(REPORT__PORT=taken_port, ORCHESTRATOR__PORT=port))
    assert [problem.split(":")[0] for problem in found] == [
        f"report.port = {taken_port}",
        f"orchestrator.port = {port}",
    ]


def test_a_remote_orchestrators_port_is_asked_not_bound(read: Callable[..., Config], taken_port: int) -> None:
    remote = {"ORCHESTRATOR__MODE": "remote", "REPORT__PORT": "0"}
    assert check(read(**remote, ORCHESTRATOR__PORT=taken_port)) == []
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        (problem,) = check(read(**remote, ORCHESTRATOR__PORT=unheard.getsockname()[1]))
    assert problem.startswith("orchestrator: nothing answers at 127.0.0.1, port ")


@pytest.mark.parametrize(
    ("host", "right"),
    [("192.0.2.1", "can't listen there"), ("no-such-host.invalid", "this name is not known")],
)
def test_a_host_that_is_not_ours_is_named(host: str, right: str, read: Callable[..., Config]) -> None:
    (problem,) = obstacles(read(REPORT__HOST=host))
    assert problem.startswith(f"report.host = {host}: {right}")
    assert '"127.0.0.1"' in problem


def test_a_data_folder_below_a_file_is_named(read: Callable[..., Config], tmp_path: Path) -> None:
    (problem,) = obstacles(read(STORAGE__PATH="config.toml/data/game.db"))
    assert f"can't write in {tmp_path / 'config.toml'} (Not a directory)" in problem
    assert "choose another storage.path" in problem


def test_a_folder_that_can_not_be_written_is_named(read: Callable[..., Config]) -> None:
    (problem,) = obstacles(read(STORAGE__PATH="/proc/self/game.db"))
    assert "can't write in /proc/self (" in problem


def test_a_running_game_is_named_by_its_process(read: Callable[..., Config], tmp_path: Path) -> None:
    config = read()
    config.storage.path.parent.mkdir()
    code = (
        "import sys; from pathlib import Path; from condor_lite.storage.lock import GameLock; "
        "lock = GameLock(Path(sys.argv[1])); print('locked', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(config.storage.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"locked\n"
        (problem,) = obstacles(config)
        assert problem.startswith(f"another condor_lite (pid {holder.pid}) runs this game")
        holder.kill()
    assert obstacles(config) == []


def test_an_earlier_games_database_is_looked_at_and_left_alone(read: Callable[..., Config]) -> None:
    config = read()
    config.storage.path.parent.mkdir()
    connect_writer(config.storage.path, BUSY_TIMEOUT_S).close()
    lock = GameLock(config.storage.path)
    lock.release()
    before = everything_in(config.storage.path.parent), config.storage.path.read_bytes()
    assert obstacles(config) == []
    assert (everything_in(config.storage.path.parent), config.storage.path.read_bytes()) == before


def test_what_a_crash_left_is_read_too(read: Callable[..., Config], tmp_path: Path) -> None:
    config = read()
    config.storage.path.parent.mkdir()
    elsewhere = tmp_path / "game.db"
    connection = connect_writer(elsewhere, BUSY_TIMEOUT_S)
    try:
        for suffix in ("", "-wal", "-shm"):
            shutil.copy(f"{elsewhere}{suffix}", f"{config.storage.path}{suffix}")
    finally:
        connection.close()
    assert obstacles(config) == []


@pytest.mark.parametrize(
    ("content", "right"),
    [
        (b"hello" * 100, "is not a SQLite database; choose another storage.path"),
        (None, "is from a newer condor_lite"),
        ("other", "is the database of another program"),
    ],
)
def test_a_file_that_is_not_ours_is_named(
    content: bytes | str | None, right: str, read: Callable[..., Config]
) -> None:
    config = read()
    config.storage.path.parent.mkdir()
    if isinstance(content, bytes):
        config.storage.path.write_bytes(content)
    elif content:
        connection = sqlite3.connect(config.storage.path)
        connection.execute("CREATE TABLE x (y)")
        connection.close()
    else:
        connection = connect_writer(config.storage.path, BUSY_TIMEOUT_S)
        connection.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
        connection.close()
    (problem,) = obstacles(config)
    assert str(config.storage.path) in problem
    assert right in problem


@pytest.mark.parametrize(
    ("code", "right"),
    [
        ("x = 1\ndef predict(:\n", "main.py, line 2: "),
        ("x = (\n", "main.py, line 1: "),
        (b"x = '\xff'\n", "main.py"),
        (b"x = 1\0", "main.py"),
        ("(" * 100_000, "main.py"),
        (None, "there is no main.py"),
    ],
)
def test_a_model_with_broken_code_is_named(
    code: str | bytes | None, right: str, read: Callable[..., Config], model: Callable[..., Path]
) -> None:
    model("good", 'print("\\d")\n' + MODEL)
    folder = model("broken", code, model_toml="")
    (problem,) = check(read())
    assert problem.startswith(f"model broken in {folder}: ")
    assert right in problem
    assert obstacles(read()) == []


def test_a_broken_model_toml_is_named(read: Callable[..., Config], model: Callable[..., Path]) -> None:
    model("a", model_toml="nmae = 'x'")
    model("b", model_toml="benchmark = 1")
    model("c", model_toml="name = ")
    found = check(read())
    assert len(found) == 3
    assert "nmae" in found[0]
    assert "benchmark = 1" in found[1]
    assert "model.toml" in found[2]


def test_a_models_folder_that_is_a_file_is_named(read: Callable[..., Config], tmp_path: Path) -> None:
    (problem,) = check(read(ORCHESTRATOR__MODELS="config.toml"))
    assert problem.startswith(f"orchestrator.models: {tmp_path / 'config.toml'} can't be read as a folder")


def test_a_base_class_that_is_not_installed_is_named(read: Callable[..., Config]) -> None:
    (problem,) = check(read(GAME__BASE_CLASS="no_such_package.tracker.Base"))
    assert "no_such_package is not installed" in problem


def test_too_few_descriptors_for_the_models_are_named(
    read: Callable[..., Config], model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        model(f"m{number}")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (50, 100))
    (problem,) = check(read())
    assert problem.startswith("3 models need about 140 open files, 100 are allowed")
    assert "ulimit -n 140" in problem


@pytest.mark.parametrize(
    ("had", "gets"),
    [
        ((256, 4096), (4096, 4096)),
        ((1024, resource.RLIM_INFINITY), (65_536, resource.RLIM_INFINITY)),
        ((100_000, 524_288), None),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), None),
    ],
)
def test_the_game_may_open_as_many_files_as_it_is_allowed(
    had: tuple[int, int], gets: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: had)
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: asked.append(limits))
    checking.allow_open_files()
    assert asked == ([gets] if gets else [])


def test_a_full_disk_is_named(read: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 2**21, 2**21))
    (problem,) = check(read())
    assert "only 2 MiB are free" in problem


def test_a_console_on_a_full_disk_is_named_and_no_traceback(tmp_path: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "condor_lite", "check"],
            cwd=tmp_path,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
        )
    assert done.returncode == 2
    assert done.stderr == "condor-lite: No space left on device: make room, or have the output go elsewhere\n"


def test_an_old_sqlite_is_named(read: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    real = checking.require_sqlite
    monkeypatch.setattr(checking, "require_sqlite", lambda: real((3, 36, 0)))
    (problem,) = obstacles(read())
    assert problem.startswith("SQLite 3.36.0 is too old")


def test_a_database_that_was_never_filled_is_no_problem(read: Callable[..., Config]) -> None:
    config = read(FEED__SOURCE="coinbase", GAME__SPEED="1")
    config.storage.path.parent.mkdir(exist_ok=True)
    config.storage.path.touch()
    assert not [problem for problem in check(config) if "ahead" in problem]


def test_shared_memory_that_can_not_be_written_is_named(
    read: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(context: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("multiprocessing.context.BaseContext.Lock", refused)
    (problem,) = obstacles(read())
    assert problem.startswith("the scoring processes need a /dev/shm that they can write (Permission denied)")


def test_a_recording_is_read_and_its_start_checked(read: Callable[..., Config], tmp_path: Path) -> None:
    replay = {"FEED__SOURCE": "replay", "FEED__PATH": ".", "FEED__HISTORY": "1h"}
    csv = tmp_path / "BTC.csv"
    csv.write_text(
        "timestamp,close\n" + "".join(f"{60 * minute},{100 + minute}\n" for minute in range(1, 600))
    )
    assert check(read(**replay)) == []
    (problem,) = check(read(**replay, GAME__START="2020-01-01T00:00:00Z"))
    assert problem.startswith("game.start = ")
    csv.write_text("timestamp,close\n60,1\n120,x\n180,-1\n")
    found = check(read(**replay))
    assert len(found) == 2
    assert all(str(csv) in problem for problem in found)


def test_a_rule_that_can_not_be_imported_is_named(read: Callable[..., Config]) -> None:
    (problem,) = obstacles(read(SCORING__RULE="no_such_package.rules:mine"))
    assert "no_such_package.rules:mine" in problem
    assert "can't be imported" in problem


def test_everything_wrong_comes_at_once(
    read: Callable[..., Config], model: Callable[..., Path], taken_port: int
) -> None:
    model("broken", "x = (\n")
    found = check(
        read(REPORT__PORT=taken_port, STORAGE__PATH="config.toml/x.db", GAME__BASE_CLASS="nowhere.Base")
    )
    assert len(found) == 4


# -- live feeds ----------------------------------------------------------------------------------------------


def test_a_live_feed_that_can_not_work_is_told_without_asking_it(read: Callable[..., Config]) -> None:
    assert check(read(FEED__SOURCE="coinbase")) == []
    (problem,) = check(read(FEED__SOURCE="pyth"))
    assert problem.startswith("feed.api_key: must be set")
    assert check(read(FEED__SOURCE="pyth", FEED__API_KEY="k")) == []
    with pytest.raises(ConfigError, match=r'feed.tick = "30s": coinbase gives one price a minute'):
        read(FEED__SOURCE="coinbase", FEED__TICK="30s")
    (problem,) = check(read(FEED__SOURCE="no_such_module:feed"))
    assert "there is no module no_such_module" in problem


def test_an_asset_that_no_source_has_is_told(
    read: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "config.toml"
    config.write_text(CONFIG.replace('["BTC"]', '["BTC", "XAU"]'))
    (problem,) = check(read(FEED__SOURCE="coinbase"))
    assert problem.startswith("XAU: coinbase has no symbol for XAU, unless [feed.symbols] names it: ")
    assert check(read(FEED__SOURCE='["coinbase", "crunchdao"]')) == []
    assert len(check(read(FEED__SOURCE='["coinbase", "binance"]'))) == 2
    config.write_text(config.read_text() + '[feed.symbols]\nXAU = "PAXG-USD"\n')
    assert check(read(FEED__SOURCE="coinbase")) == []


@pytest.fixture
async def price_server() -> AsyncIterator[PriceServer]:
    async with PriceServer() as server:
        yield server


async def ask(folder: Path, **environ: str) -> tuple[int, str, str]:
    """`check --online` in `folder`: its exit code, output and complaints."""
    ports = {"CONDOR_LITE__REPORT__PORT": "0", "CONDOR_LITE__ORCHESTRATOR__PORT": "0"}
    overrides = {f"CONDOR_LITE__{name}": value for name, value in environ.items()}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "condor_lite", "check", "--online"),
        cwd=folder,
        env={**os.environ, **ports, **overrides},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    said, complaints = await process.communicate()
    assert process.returncode is not None
    return process.returncode, said.decode(), complaints.decode()


@pytest.mark.anyio
async def test_online_it_shows_a_price_and_its_age(
    read: Callable[..., Config], tmp_path: Path, price_server: PriceServer
) -> None:
    code, said, complaints = await ask(tmp_path, FEED__SOURCE="coinbase", FEED__BASE_URL=price_server.url)
    assert (code, complaints) == (0, "")
    heading, line, end = said.splitlines()
    assert heading.split() == ["asset", "source", "price", "age"]
    asset, source, price, age, unit = line.split()
    assert (asset, source, unit) == ("BTC", "coinbase", "s")
    assert 90_000 < float(price) < 100_000
    assert 0 <= int(age) < 120
    assert end.startswith("all good")


@pytest.mark.anyio
async def test_online_each_asset_that_fails_gets_its_line(tmp_path: Path, price_server: PriceServer) -> None:
    config = CONFIG.replace('["BTC"]', '["BTC", "ETH", "SOL", "DOGE", "XAU"]')
    symbols = '[feed.symbols]\nSOL = "SOL-USB"\nDOGE = "DOGE-USD"\nXAU = "PAXG-USD"\n'
    (tmp_path / "config.toml").write_text(config + symbols)
    price_server.silent = lambda symbol, open_s: symbol == "ETH-USD"
    price_server.closes = {("DOGE-USD", int(time.time()) // 60 * 60 - 60 * k): "much" for k in range(60)}
    price_server.now = lambda: time.time() + 3600
    code, said, complaints = await ask(tmp_path, FEED__SOURCE="coinbase", FEED__BASE_URL=price_server.url)
    assert code == 2
    assert [line.split()[:3] for line in said.splitlines()[1:]] == [
        ["BTC", "coinbase", said.splitlines()[1].split()[2]],
        *([asset, "coinbase", "none"] for asset in ("ETH", "SOL", "DOGE")),
        ["XAU", "coinbase", said.splitlines()[5].split()[2]],
    ]
    first, eth, sol, doge, clock, advice = complaints.splitlines()
    assert first == "condor-lite: problems:"
    assert eth == "  ETH: coinbase has no price in the last 4 h; is its market closed?"
    assert sol.startswith("  SOL: coinbase at ")
    assert sol.endswith('does not know "SOL-USB" for SOL; it has SOL-USD')
    assert "DOGE-USD: the answer is not what it should be" in doge
    told = re.fullmatch(r"  this machine's clock is (\d+) s behind that of coinbase: set it by NTP", clock)
    assert told is not None
    assert 3480 < int(told[1]) <= 3601, "an answer's way here counts, and its time is in whole seconds"
    assert "try again" in advice


@pytest.mark.anyio
async def test_online_a_fallback_may_lack_an_asset_but_must_answer(
    tmp_path: Path, price_server: PriceServer
) -> None:
    (tmp_path / "config.toml").write_text(CONFIG.replace('["BTC"]', '["BTC", "XAU"]'))
    sources = {"FEED__SOURCE": '["crunchdao", "kraken"]', "FEED__BASE_URL": price_server.url}
    code, said, complaints = await ask(tmp_path, **sources)
    assert (code, complaints) == (0, "")
    assert [line.split()[:2] for line in said.splitlines()[1:5]] == [
        *(["BTC", "crunchdao"], ["BTC", "kraken"]),
        *(["XAU", "crunchdao"], ["XAU", "kraken"]),
    ]
    price_server.outage = Fault(451)
    code, _, complaints = await ask(tmp_path, **sources)
    assert code == 2
    assert complaints.count("is blocked in your country") == 3


@pytest.mark.anyio
async def test_online_a_simulation_says_that_it_is_one(read: Callable[..., Config], tmp_path: Path) -> None:
    code, said, _ = await ask(tmp_path)
    assert (code, said.splitlines()[1].split()[:3]) == (0, ["BTC", "synthetic", "(simulated)"])
    (tmp_path / "BTC.csv").write_text(
        "timestamp,close\n" + "".join(f"{60 * k},{100 + k}\n" for k in range(1, 99))
    )
    code, said, _ = await ask(tmp_path, FEED__SOURCE="replay", FEED__PATH=".", FEED__HISTORY="10m")
    assert (code, said.splitlines()[1].split()[:4]) == (0, ["BTC", "replay", "(simulated)", "198"])
