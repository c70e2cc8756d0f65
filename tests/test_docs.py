"""The documentation is true: what the README lists exists, and the other way round."""

from __future__ import annotations

import re
from pathlib import Path

from condor_lite import __version__, cli
from condor_lite import config as configuration
from condor_lite.config_sections import LIVE_SOURCES, SIMULATED_SOURCES
from condor_lite.prices.sources import LIVE
from condor_lite.report.api import ENDPOINTS, PAGES
from condor_lite.report.events import EVENTS
from condor_lite.storage import exports
from tests.test_hostile import FAILURES
from tests.torture.faults import FAULTS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_config_table_is_the_one_that_the_code_makes() -> None:
    assert configuration.table().strip() in README


def test_every_verb_is_in_the_readme_and_the_other_way_round() -> None:
    parser = cli.parser()
    verbs = next(action.choices for action in parser._actions if isinstance(action.choices, dict))
    listed = set(re.findall(r"^\| .*`condor-lite (\w+)[^`]*` \|", README, flags=re.MULTILINE))
    assert listed == set(verbs)


def test_the_changelog_knows_this_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert "## Unreleased" in changelog or f"## {__version__}" in changelog


def test_every_event_is_in_the_readme() -> None:
    about = README.split("`/events` names each event")[1].split("\n\n")[0]
    assert EVENTS.keys() <= set(re.findall(r"`(\w+)`", about))


def test_every_endpoint_is_in_the_readme_and_the_other_way_round() -> None:
    table = README.split("## HTTP API")[1].split("\n### Metrics")[0]
    listed = {path.split("?")[0] for path in re.findall(r"`(/[^`]+)`", table)}
    assert listed == {route.path.replace(":path", "") for route in (*ENDPOINTS, *PAGES)} - {"/"}


def test_every_source_is_in_the_readme_and_the_other_way_round() -> None:
    table = README.split("## Live prices")[1].split("\n## ")[0]
    listed = set(
        re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`.*?) \|", table, flags=re.MULTILINE)[1:]))
    )
    assert listed == set(SIMULATED_SOURCES + LIVE_SOURCES) == {*SIMULATED_SOURCES, *LIVE}


def test_every_column_of_an_export_is_in_the_readme() -> None:
    about = README.split("### Exports")[1].split("\n## ")[0]
    for kind, selected in (
        ("prices", exports._PRICE),
        ("leaderboard", exports._STANDING),
        ("scores", exports._SCORE),
        ("predictions", (*exports._PREDICTION, exports._DENSITIES)),
    ):
        row = next(line for line in about.splitlines() if line.startswith(f"| `{kind}` |"))
        listed = re.findall(r"`(\w+)`", row.split("|")[3])
        assert listed == [column.name for column, _ in selected]


def test_every_fault_of_the_torture_run_is_in_the_readme_and_the_other_way_round() -> None:
    table = README.split("### Faults tried")[1].split("\n### ")[0]
    listed = re.findall(r"^\| (.*?) \| .* \|$", table, flags=re.MULTILINE)[2:]
    assert set(listed) == {fault.__doc__ for faults in FAULTS.values() for fault in faults}


def test_every_reason_that_the_worst_models_get_is_in_the_readme() -> None:
    table = README.split("### What a round says")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` (.*?) \|", table, flags=re.MULTILINE)
    listed = [
        (status, start) for status, told in rows for start in re.findall(r'"(.*?)[: ]*(?:\.\.\.)?"', told)
    ]
    assert len(listed) > 10
    missing = [
        (status, reason)
        for reasons in FAILURES.values()
        for status, told in re.findall(r"(TIMEOUT|FAILED) (.*?)(?=\|TIMEOUT|\|FAILED|$)", reasons)
        for reason in re.sub(r"^\((.*)\).*", r"\1", told).split("|")
        if not any(status == known and reason.startswith(start) for known, start in listed)
    ]
    assert not missing
