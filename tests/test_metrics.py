"""The metrics over a real port: what Prometheus reads, and that it is what the database holds."""

from __future__ import annotations

import re
import sqlite3
from collections import Counter
from contextlib import closing
from pathlib import Path

import httpx
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from condor_lite import config as configuration
from condor_lite.clock import SteppedClock
from condor_lite.errors import QueryTimeout
from condor_lite.game.entities import AnswerStatus, RoundStatus
from condor_lite.report.answers import horizon_label
from condor_lite.storage.database import open_read_only
from tests.games import joined, settle
from tests.served import serve
from tests.stage import until

pytestmark = pytest.mark.anyio

README = (Path(__file__).parent.parent / "README.md").read_text()
START_S = 1_800_000_000
CONFIG = """
[[game.settings]]
assets = ["BTC", "XAU"]
horizon = "10m"
step = "1m"
interval = "5m"

[feed]
history = "1h"

[predict]
max_consecutive_failures = 4

[orchestrator]
port = 0

[report]
port = 0

[scoring]
workers = 1
"""
MODEL = """
from condor_lite.tracker import TrackerBase


class Model(TrackerBase):
    def predict(self, asset, horizon, step):
        {}
        density = {{"type": "builtin", "name": "norm", "params": {{"loc": 0.0, "scale": {}}}}}
        return self.flat(density, horizon, step)
"""

Sample = tuple[str, frozenset[str]]


def samples(text: str) -> dict[Sample, float]:
    """Values by name and labels' values."""
    return {
        (sample.name, frozenset(sample.labels.values())): sample.value
        for family in parse(text)
        for sample in family.samples
    }


def value(found: dict[Sample, float], name: str, *labels: str) -> float:
    return found["condor_lite_" + name, frozenset(labels)]


async def test_the_numbers_of_a_game_are_those_in_its_database(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(CONFIG)
    for name, line, scale in (("good", "", 0.001), ("raising", "raise RuntimeError", 1), ("wrong", "", -1)):
        (tmp_path / "models" / name).mkdir(parents=True)
        (tmp_path / "models" / name / "main.py").write_text(MODEL.format(line, scale))
    config = configuration.load(tmp_path / "config.toml", {})
    clock = SteppedClock(START_S - 30)
    async with (
        joined(config, clock, 3) as game,
        httpx.AsyncClient(base_url=game.web.url, timeout=60) as client,
    ):
        await settle(game, clock, START_S + 3600)
        await until(lambda: len(game.live.connected()) == 1)  # two have been given up
        text = (await client.get("/metrics")).raise_for_status().text
        with closing(open_read_only(config.storage.path)) as db:
            rounds = Counter(dict(db.execute("SELECT status, count(*) FROM round GROUP BY 1").fetchall()))
            by_setting = db.execute(
                "SELECT asset, horizon_s, step_s, count(*) FROM round WHERE status = 'scored' "
                "GROUP BY 1, 2, 3"
            ).fetchall()
            answers = dict(db.execute("SELECT status, count(*) FROM prediction GROUP BY 1").fetchall())
            (absent,) = db.execute("SELECT sum(absent) FROM round").fetchone()
    found = samples(text)

    def in_status(*statuses: RoundStatus) -> float:
        return sum(rounds[status] for status in statuses)

    def counted(status: RoundStatus) -> float:
        return sum(value(found, "rounds_total", asset, "10m", "1m", status) for asset in config.game.assets)

    closed, scored, void = RoundStatus.CLOSED, RoundStatus.SCORED, RoundStatus.VOID
    assert counted(scored) == in_status(scored) > 10
    assert counted(closed) == in_status(closed, scored)
    assert counted(RoundStatus.OPEN) == in_status(RoundStatus.OPEN, closed, scored, void)
    for asset, horizon_s, step_s, count in by_setting:
        labels = (asset, horizon_label(horizon_s), horizon_label(step_s), "scored")
        assert value(found, "rounds_total", *labels) == count

    invalid = value(found, "answers_invalid_total")
    assert invalid >= 4
    assert value(found, "answers_total", AnswerStatus.SUCCESS) - invalid == answers["SUCCESS"] > 10
    assert value(found, "answers_total", AnswerStatus.FAILED) + invalid == answers["FAILED"] > invalid
    assert value(found, "answers_total", AnswerStatus.TIMEOUT) == answers.get("TIMEOUT", 0)
    assert value(found, "answers_total", AnswerStatus.ABSENT) == absent > 0
    assert value(found, "answer_seconds_count") == answers["SUCCESS"] + invalid
    assert value(found, "answer_stored_seconds_count") == sum(answers.values())
    assert value(found, "round_start_lag_seconds_count") == counted(RoundStatus.OPEN)
    assert value(found, "score_cycle_seconds_count") > 1
    assert value(found, "event_loop_delay_seconds_count") > 1
    assert value(found, "models_connected") == 1
    assert value(found, "pool_waiting_answers") == 0
    assert value(found, "pool_workers") == 1
    assert value(found, "database_bytes") > 0
    assert {value(found, "feed_age_seconds", asset) <= 60 for asset in config.game.assets} == {True}
    for service in game.services:
        assert value(found, "service_up", service.name) == 1
        assert value(found, "service_restarts_total", service.name) == 0


async def test_the_readme_lists_all_of_them(tmp_path: Path) -> None:
    async with serve(tmp_path) as game:
        families = list(parse((await game.client.get("/metrics")).text))
    table = README.split("### Metrics")[1].split("\n## ")[0]
    listed = dict(re.findall(r"^\| `(condor_lite_\w+)` \|([^|]*)\|", table, flags=re.MULTILINE))
    exposed = {
        family.name + ("_total" if family.type == "counter" else ""): {
            label for sample in family.samples for label in sample.labels if label != "le"
        }
        for family in families
    }
    own = {name: labels for name, labels in exposed.items() if not name.startswith("process_")}
    assert {name: set(re.findall(r"\w+", labels)) for name, labels in listed.items()} == own
    assert "process_resident_memory_bytes" in exposed
    assert all(family.documentation for family in families)


async def test_prometheus_and_openmetrics_by_accept(tmp_path: Path) -> None:
    async with serve(tmp_path) as game:
        plain = await game.client.get("/metrics")
        openmetrics = await game.client.get("/metrics", headers={"accept": "application/openmetrics-text"})
        odd = await game.client.get("/metrics", headers={"accept": "application/openmetrics-text;version=x<"})
    assert plain.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert plain.headers["cache-control"] == "no-store"
    assert "Accept, " in plain.headers["vary"]
    for answer in (openmetrics, odd):
        assert answer.headers["content-type"].startswith("application/openmetrics-text; version=")
        assert "<" not in answer.headers["content-type"]
        names = {family.name for family in parse_openmetrics(answer.text)}
        assert "condor_lite_rounds" in names


async def test_they_are_there_where_the_database_cannot_be_read(tmp_path: Path) -> None:
    class Readers:
        async def fetch(self, sql: str, params: object = ()) -> list[sqlite3.Row]:
            raise QueryTimeout(2.0)

    async with serve(tmp_path, readers=Readers()) as game:
        found = samples((await game.client.get("/metrics")).raise_for_status().text)
    assert value(found, "models_connected") == 2
    assert ("condor_lite_database_free_bytes", frozenset()) not in found


async def test_two_games_in_a_process_do_not_share_numbers(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    async with serve(tmp_path / "a") as one, serve(tmp_path / "b") as other:
        one.connected.clear()
        found = [samples((await game.client.get("/metrics")).text) for game in (one, other)]
    assert [value(each, "models_connected") for each in found] == [0, 2]
