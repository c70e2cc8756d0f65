"""Running it for weeks: the image's steps and the systemd unit name what there is, and work."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

from condor_lite import config as configuration
from condor_lite.cli import main
from tests import served
from tests.program import LIMIT_S

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parent.parent
ALL_KEYS = configuration.keys()
README = (ROOT / "README.md").read_text()


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile as (instruction, arguments), without comments, lines put together."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1].strip()) for line in lines if line.strip()]


def of(instruction: str) -> list[str]:
    return [arguments for name, arguments in instructions() if name == instruction]


def final(instruction: str) -> list[str]:
    """Those of the last stage."""
    steps = instructions()
    last = max(place for place, (name, _) in enumerate(steps) if name == "FROM")
    return [arguments for name, arguments in steps[last:] if name == instruction]


def environment() -> dict[str, str]:
    return dict(word.split("=", 1) for line in final("ENV") for word in shlex.split(line))


def test_the_image_is_made_of_a_pinned_python_and_files_that_exist() -> None:
    (version,) = of("ARG")
    assert re.fullmatch(r"PYTHON=3\.1[1-9]\.\d+-slim-\w+", version)
    assert [source.split(" ")[0] for source in of("FROM")] == ["python:${PYTHON}"] * 2
    copied = [path for line in of("COPY") if "--from" not in line for path in line.split()[:-1]]
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"]
    for path in copied:
        assert (ROOT / path).exists()
        assert any(fnmatch(path, pattern) for pattern in allowed), f".dockerignore hides {path}"


def test_the_image_runs_as_an_ordinary_user_and_writes_only_to_its_volume() -> None:
    (user,) = final("USER")
    uid = user.split(":")[0]
    (run,) = final("RUN")
    assert f"--uid {uid} " in run
    assert uid != "0"
    (volume,) = final("VOLUME")
    assert f"chown condor:condor {volume}" in run
    assert final("STOPSIGNAL") == ["SIGTERM"]
    names = {f"CONDOR_LITE__{key.section}__{key.key}".upper() for key in ALL_KEYS}
    variables = {name: value for name, value in environment().items() if name.startswith("CONDOR_LITE")}
    assert variables.keys() <= names
    config = configuration.load(None, variables)
    assert config.report.host == "0.0.0.0"
    assert final("EXPOSE") == [str(config.report.port)]
    written = {config.storage.path.parent, config.backup.path}
    assert all(path == Path(volume) or Path(volume) in path.parents for path in written)


def test_the_readme_runs_the_image_with_what_it_needs() -> None:
    command = README.split("docker run -d")[1].split("\n\n")[0]
    words = shlex.split(command.replace("\\\n", " "))
    for flag in ("--init", "--read-only", "--memory", "--pids-limit"):
        assert flag in words
    assert words[words.index("--tmpfs") + 1] == "/tmp"
    (volume,) = final("VOLUME")
    (folder,) = final("WORKDIR")
    mounts = [words[place + 1].split(":")[1] for place, word in enumerate(words) if word == "-v"]
    assert mounts == [volume, f"{folder}/config.toml", f"{folder}/models"]


def test_the_image_starts_the_program() -> None:
    (entrypoint,) = final("ENTRYPOINT")
    python, *arguments = json.loads(entrypoint)
    assert python == "python"
    said = subprocess.run(
        [sys.executable, *arguments, "--version"], capture_output=True, text=True, check=True
    )
    assert said.stdout.startswith("condor-lite ")


async def test_the_health_check_tells_a_game_that_answers_from_one_that_does_not(tmp_path: Path) -> None:
    (check,) = final("HEALTHCHECK")
    python, option, code = json.loads(check.split("CMD ")[1])
    assert (python, option) == ("python", "-c")

    async def healthy(port: int) -> bool:
        environ = os.environ | {"http_proxy": "http://127.0.0.1:1", "HTTP_PROXY": "http://127.0.0.1:1"}
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", code),
            env=environ | {"CONDOR_LITE__REPORT__PORT": str(port)},
            stderr=asyncio.subprocess.DEVNULL,
        )
        return await process.wait() == 0

    async with served.serve(tmp_path) as game:
        port = game.server.port
        assert any([await healthy(port) for _ in range(3)])  # so often it is tried, on a slow machine, too
    assert not await healthy(port)


# systemd

SETTING = '[[game.settings]]\nassets = ["BTC"]\nhorizon = "1h"\nstep = "1m"\ninterval = "12m"\n'


def unit(folder: Path, capsys: pytest.CaptureFixture[str], more: str = "") -> str:
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(SETTING + more)
    assert main(["systemd", "--user", "daemon", "--config", str(folder / "config.toml")]) == 0
    return capsys.readouterr().out


def values(text: str) -> dict[str, str]:
    return dict(line.split("=", 1) for line in text.splitlines() if re.match(r"[A-Z]\w+=", line))


def verify(text: str, folder: Path) -> str:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    file = folder / "condor-lite.service"
    file.write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(file)],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    return "\n".join(line for line in done.stderr.splitlines() if "condor" in line)


@pytest.mark.parametrize("name", ["plain", 'with 100% "odd" $name'])
@pytest.mark.parametrize("sandbox", ["false", "true"])
def test_systemd_takes_the_unit(
    name: str, sandbox: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = f'[orchestrator]\nsandbox = {sandbox}\n[backup]\nevery = "6h"\n'
    text = unit(tmp_path / name, capsys, more)
    assert verify(text, tmp_path) == ""
    assert verify(text.replace("KillMode=mixed", "KillMode=mixd"), tmp_path) != "", "it does look"


def test_the_unit_is_of_this_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "game"
    said = values(unit(folder, capsys, '[backup]\nevery = "6h"\n'))
    assert shlex.split(said["ExecStart"]) == [
        *(sys.executable, "-m", "condor_lite", "--config", str(folder / "config.toml")),
    ]
    assert said["ReadWritePaths"].split() == [str(folder / "data"), str(folder / "backups")]
    assert (said["User"], said["KillMode"], said["Restart"]) == ("daemon", "mixed", "on-failure")
    assert said["RestartPreventExitStatus"] == "2"
    assert int(said["TimeoutStopSec"]) > 5
    assert said["ExecReload"] == "/bin/kill -HUP $MAINPID"
    assert {"MemoryMax", "ProtectSystem", "NoNewPrivileges", "RestrictNamespaces"} <= said.keys()


def test_the_folders_can_be_made_as_the_unit_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / 'with 100% "odd" $name'
    text = unit(folder, capsys, '[backup]\nevery = "6h"\n')
    (line,) = [line for line in text.splitlines() if "install -d" in line]
    command = line.removeprefix("#").replace("-o daemon ", "")
    subprocess.run(["sh", "-c", command], check=True, timeout=LIMIT_S)
    assert (folder / "data").is_dir()
    assert (folder / "backups").stat().st_mode & 0o777 == 0o700


def test_the_unit_lets_sandboxes_be_made_where_the_config_wants_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = values(unit(tmp_path / "game", capsys, "[orchestrator]\nsandbox = true\n"))
    in_the_way = {"RestrictNamespaces", "ProtectKernelTunables", "ProtectKernelLogs", "ProtectHostname"}
    assert not in_the_way & said.keys()
    assert "AF_NETLINK" in said["RestrictAddressFamilies"]
    about = README.split("With `orchestrator.sandbox = true` the unit leaves out")[1].split(":")[0]
    assert in_the_way == set(re.findall(r"`(\w+)`", about))
