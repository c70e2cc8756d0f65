"""`init`: a new challenge that runs as it is, and never overwrites anything."""

import json
import re
import runpy
from pathlib import Path

import pytest

from condor_lite.check import check
from condor_lite.config import load
from condor_lite.errors import StartError
from condor_lite.game.density import decode
from condor_lite.game.scoring import Limits
from condor_lite.models.folder import scan
from condor_lite.scaffold import init

FILES = {"README.md", "config.toml", "models/example/main.py", "models/example/model.toml"}
FREE_PORTS = {"CONDOR_LITE__REPORT__PORT": "0", "CONDOR_LITE__ORCHESTRATOR__PORT": "0"}


@pytest.fixture
def challenge(tmp_path: Path) -> Path:
    folder = tmp_path / "new" / "challenge"
    init(folder)
    return folder


def test_it_names_what_it_writes(tmp_path: Path) -> None:
    written = init(tmp_path / "a" / "b")
    assert {path.relative_to(tmp_path / "a" / "b").as_posix() for path in written} == FILES
    assert all(path.is_file() for path in written)


def test_its_config_and_model_pass_the_check(challenge: Path) -> None:
    config = load(challenge / "config.toml", FREE_PORTS)
    assert check(config) == []
    assert [(model.model_id, model.name) for model in scan(config.orchestrator.models)] == [
        ("example", "Example")
    ]


def test_its_models_answers_are_valid(challenge: Path) -> None:
    config = load(challenge / "config.toml", FREE_PORTS)
    model = runpy.run_path(str(challenge / "models" / "example" / "main.py"))["Example"]()
    limits = Limits(config.scoring.max_components, config.predict.max_segment_bytes)
    for prices in ([], [[60 * minute, 100 + minute % 7] for minute in range(1, 2000)]):
        model.tick({"BTC": prices})
        for setting in config.game.settings:
            answer = model.predict(setting.asset, setting.horizon_s, setting.step_s)
            assert decode(json.dumps(answer).encode(), setting, limits).n == setting.segments


def test_its_readme_says_what_is_asked(challenge: Path) -> None:
    config = load(challenge / "config.toml", FREE_PORTS)
    readme = (challenge / "README.md").read_text(encoding="utf-8")
    units = {"second": 1, "seconds": 1, "minute": 60, "minutes": 60}
    told = set()
    for assets, *durations in re.findall(
        r"^\| ([A-Z, ]+) \| (.+) \| (.+) \| every (.+) \|$", readme, re.MULTILINE
    ):
        horizon, steps, interval = (
            [int(count) * units[unit] for count, unit in re.findall(r"(\d+) (\w+)", text)]
            for text in durations
        )
        told |= {(asset, horizon[0], step, interval[0]) for asset in assets.split(", ") for step in steps}
    assert told == {(s.asset, s.horizon_s, s.step_s, s.interval_s) for s in config.game.settings}


def test_its_readme_tells_a_model_that_loads(challenge: Path) -> None:
    readme = (challenge / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    folder = challenge / "models" / "mine"
    folder.mkdir()
    (folder / "main.py").write_text(code)
    config = load(challenge / "config.toml", FREE_PORTS)
    assert check(config) == []


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("mine")
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(StartError) as caught:
        init(tmp_path)
    assert str(tmp_path / "config.toml") in str(caught.value)
    assert str(tmp_path / "README.md") in str(caught.value)
    assert "nothing was written" in str(caught.value)
    assert {path.read_text() for path in tmp_path.iterdir()} == {"mine"}


def test_other_files_are_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert len(init(tmp_path)) == len(FILES)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StartError, match="is a file"):
        init(tmp_path / "file")
    with pytest.raises(StartError, match="can't be written"):
        init(tmp_path / "file" / "below")
