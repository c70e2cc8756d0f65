"""`condor-lite models` against the program as it is started."""

from __future__ import annotations

import io
import json
import signal
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from condor_lite import cli, control, stopping
from tests.program import program

GAME = """
[[game.settings]]
assets = ["BTC"]
horizon = "5s"
step = "5s"
interval = "5s"

[feed]
tick = "5s"
history = "10m"

[predict]
timeout = "5s"

[scoring]
workers = 1

[orchestrator]
port = 0
models = "models"
"""

MODEL = """
from condor_lite.tracker import TrackerBase


class Model(TrackerBase):
    def predict(self, asset, horizon, step):
        density = {"type": "builtin", "name": "norm", "params": {"loc": 0.0, "scale": 0.001}}
        return self.flat(density, horizon, step)
"""


@pytest.fixture
def challenge(tmp_path: Path) -> Path:
    (tmp_path / "config.toml").write_text(GAME)
    for model_id in ("calm", "wild"):
        (tmp_path / "models" / model_id).mkdir(parents=True)
        (tmp_path / "models" / model_id / "main.py").write_text(MODEL)
    (tmp_path / "models" / "empty").mkdir()
    (tmp_path / "models" / "empty" / "model.toml").write_text('name = "No code"')
    return tmp_path


def verb(folder: Path, *arguments: str) -> tuple[int, str]:
    """The exit code and all that was said: the command itself, without the time that a process takes."""
    said = io.StringIO()
    with chdir(folder), redirect_stdout(said), redirect_stderr(said), pytest.MonkeyPatch.context() as patch:
        patch.setattr(stopping, "restore", lambda: None)
        code = cli.main(["models", *arguments])
    return code, said.getvalue()


def models(folder: Path) -> dict[str, dict[str, Any]]:
    """What the running game says of its models; nothing while it starts."""
    try:
        listing = control.call(folder / "data" / "condor.db", "models")
    except control.ControlError:
        return {}
    return {line["model_id"]: line for line in listing["models"]}


def test_models_are_shown_paused_resumed_and_restarted(challenge: Path) -> None:
    code, said = verb(challenge)
    assert code == 2
    assert "there is no database at" in said

    with program(challenge) as first:
        states = {"calm": "ready", "wild": "ready", "empty": "rejected"}
        first.until(
            lambda: {model_id: line["state"] for model_id, line in models(challenge).items()} == states
        )
        assert "no main.py" in models(challenge)["empty"]["reason"]
        first.until(lambda: models(challenge)["wild"]["answered"])
        code, said = verb(challenge)
        assert code == 0
        assert [line.split()[0] for line in said.splitlines()[:4]] == ["model", "calm", "empty", "wild"]

        assert verb(challenge, "pause", "wlid") == (
            2,
            "condor-lite: no model has the id 'wlid'; did you mean wild?\n",
        )
        code, said = verb(challenge, "pause", "wild")
        assert (code, said[:15]) == (0, "wild is paused:")
        first.until(
            lambda: (
                ("wild", "STOPPED")
                in {(row["model_id"], row["status"]) for row in first.get("/reports/leaderboard")}
            )
        )
        first.end(signal.SIGKILL)

    assert (challenge / "data" / "condor.db.sock").exists(), "a killed game leaves its socket"
    code, said = verb(challenge)
    assert code == 0
    assert said.startswith("no game is running; this is how condor-lite was left at")
    code, said = verb(challenge, "--json")
    assert code == 0
    assert {line["model_id"]: line["state"] for line in json.loads(said)["models"]}["wild"] == "paused"
    code, said = verb(challenge, "resume", "wild")
    assert code == 2
    assert "no game is running on" in said

    with program(challenge) as second:
        second.until(lambda: models(challenge).get("calm", {}).get("state") == "ready")
        wild = models(challenge)["wild"]
        assert wild["state"] == "paused"
        code, said = verb(challenge, "restart", "wild")
        assert (code, said) == (0, "a new process of wild is being started, and stays paused\n")
        second.until(lambda: models(challenge)["wild"]["deployment_id"] != wild["deployment_id"])
        control.call(challenge / "data" / "condor.db", "resume", model_id="wild")
        second.until(lambda: models(challenge)["wild"]["answered"] > wild["answered"])
        second.until(lambda: models(challenge)["wild"]["state"] == "ready")
        assert models(challenge)["wild"]["last_error"] is None
        code, said = verb(challenge, "restart", "empty")
        assert code == 2
        assert "empty can't be started: there is no main.py" in said
        assert second.end() == 0
    assert not (challenge / "data" / "condor.db.sock").exists()
    assert "Traceback" not in second.console.read_text()
