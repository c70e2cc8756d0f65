"""The coordinator web app's contract: what it asks, as it asks it, and what it needs of the answers."""

from __future__ import annotations

import asyncio
import re
from collections import defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any
from urllib.parse import quote

import httpx
import orjson
import pytest

from tests.served import EVIL, NOW_S, Game, day, play, serve

pytestmark = pytest.mark.anyio

DAYS = 30
FORMATS = r"percentage|integer|compact|number|decimal-\d+"
Row = dict[str, Any]


@pytest.fixture(scope="module")
async def game(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Game]:
    async with serve(tmp_path_factory.mktemp("game")) as served:
        await play(served)
        yield served


@dataclass
class WebApp:
    """A client that knows the report's address and what a coordinator's web app knows, nothing else."""

    http: httpx.AsyncClient
    columns: list[Row]
    widgets: list[Row]
    leaderboard: list[Row]

    @classmethod
    async def open(cls, http: httpx.AsyncClient) -> WebApp:
        """The schema first: it says what to ask for."""
        schema = await _get(http, "/reports/schema")
        assert schema["schema_version"] == "1"
        leaderboard = await rows(http, "/reports/leaderboard")
        return cls(http, schema["leaderboard_columns"], schema["metrics_widgets"], leaderboard)

    async def draw(self, *project_ids: str) -> dict[int, list[Row]]:
        """The rows of each widget, all asked for at once."""
        query = f"?projectIds={quote(','.join(project_ids), safe='')}&start={day(-DAYS)}&end={day(0)}"
        answers = await asyncio.gather(
            *(rows(self.http, widget["endpointUrl"] + query) for widget in self.widgets)
        )
        return {widget["id"]: answer for widget, answer in zip(self.widgets, answers, strict=True)}


async def _get(http: httpx.AsyncClient, path: str) -> Any:
    answer = await http.get(path, headers={"Accept": "application/json, text/plain, */*"})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/json"
    return orjson.loads(answer.content)  # strict: no NaN, no Infinity


async def rows(http: httpx.AsyncClient, path: str) -> list[Row]:
    """A bare array of flat rows that all have the same fields."""
    found = await _get(http, path)
    assert isinstance(found, list)
    assert len({tuple(row) for row in found}) <= 1
    assert not any(isinstance(value, list | dict) for row in found for value in row.values())
    return found


def drawn_at(text: str) -> float:
    """As the chart reads a time: it appends the zone itself."""
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", text)
    return datetime.fromisoformat(text + "Z").astimezone(UTC).timestamp()


@pytest.fixture
async def app(game: Game) -> WebApp:
    return await WebApp.open(game.client)


def ids(app: WebApp) -> list[str]:
    return [row["model_id"] for row in app.leaderboard]


async def test_the_leaderboard_comes_in_rank_order(app: WebApp) -> None:
    ranked = [row["rank"] for row in app.leaderboard if row["rank"] is not None]

    assert ranked == list(range(1, len(ranked) + 1))
    anchors = [row["score_anchor"] for row in app.leaderboard if row["rank"] is not None]
    assert anchors == sorted(anchors, reverse=True)
    assert len(set(ids(app))) == len(app.leaderboard)
    for row in app.leaderboard:
        assert row["username"] == row["cruncher_name"]
        assert row["model_id"]
        assert not re.search(",|::", row["model_id"])


async def test_every_column_can_be_shown(app: WebApp) -> None:
    orders = [column["order"] for column in app.columns]

    assert orders == sorted(set(orders))
    assert len({column["id"] for column in app.columns}) == len(app.columns)
    assert [column["type"] for column in app.columns][:2] == ["PROJECT", "USERNAME"]
    for column in app.columns:
        values = [row[column["property"]] for row in app.leaderboard]
        if column["type"] == "VALUE":
            assert re.fullmatch(FORMATS, column["format"])
            assert all(value is None or type(value) in (int, float) for value in values)
            assert any(value is not None for value in values)
        else:
            assert column["type"] in ("PROJECT", "USERNAME")
            assert all(isinstance(value, str) and value for value in values)
        native = column["nativeConfiguration"]
        if native is not None:
            assert native["type"] == "model"
            assert all(isinstance(row[native["statusProperty"]], str) for row in app.leaderboard)


async def test_every_widget_can_be_drawn(app: WebApp) -> None:
    drawn = await app.draw(*ids(app))

    orders = [widget["order"] for widget in app.widgets]
    assert orders == sorted(set(orders))
    assert len(drawn) == len(app.widgets)
    assert min(drawn) >= 50
    for widget in app.widgets:
        assert widget["type"] == "CHART"
        assert widget["endpointUrl"].startswith("/")
        chart, found = widget["nativeConfiguration"], drawn[widget["id"]]
        assert chart["type"] == "line"
        assert found
        times = [drawn_at(row[chart["xAxis"]["name"]]) for row in found]
        assert times == sorted(times)
        assert NOW_S - DAYS * 86400 <= times[0] <= times[-1] <= NOW_S
        assert re.fullmatch(FORMATS, chart["yAxis"]["format"])
        for series in chart["yAxis"]["series"]:
            values = [row[series["name"]] for row in found]
            assert all(value is None or type(value) in (int, float) for value in values)
            assert any(value is not None for value in values)
            assert series["label"]
            assert re.fullmatch("#[0-9a-f]{6}", series["color"])
        assert all(row[chart["groupByProperty"]] for row in found)
        if alert := chart["alertConfig"]:
            assert {type(row[alert["field"]]) for row in found} == {bool}
            assert {True, False} == {row[alert["field"]] for row in found}
            assert all(bool(row[alert["reasonField"]]) == row[alert["field"]] for row in found)


async def test_what_is_left_by_the_filters_are_lines(app: WebApp) -> None:
    drawn = await app.draw("1")

    for widget in app.widgets:
        chart, found = widget["nativeConfiguration"], drawn[widget["id"]]
        for chosen in chart["filterConfig"]:
            assert chosen["type"] == "select"
            assert chosen["label"]
            options = list(dict.fromkeys(row[chosen["property"]] for row in found))
            if chosen["autoSelectFirst"]:
                found = [row for row in found if row[chosen["property"]] == options[0]]
        lines = defaultdict(list)
        for row in found:
            lines[row[chart["groupByProperty"]]].append(drawn_at(row[chart["xAxis"]["name"]]))
        assert lines
        for times in lines.values():
            assert all(before < after for before, after in pairwise(times))


async def test_a_chart_holds_the_chosen_models_only(app: WebApp) -> None:
    for chosen in (["1"], ["1", "b/2"], ["b/2", "bench", "nobody"]):
        for found in (await app.draw(*chosen)).values():
            assert {row["model_id"] for row in found} == set(chosen) - {"nobody"}
    assert all(found == [] for found in (await app.draw("nobody")).values())


async def test_it_can_ask_again_and_again_with_four_widgets_at_once(app: WebApp, game: Game) -> None:
    app.widgets = (app.widgets * 2)[:4]
    first = await app.draw(*ids(app))

    async with httpx.AsyncClient(base_url=game.server.url, timeout=60) as another:
        for client in (app.http, another) * 5:
            app.http = client
            assert await app.draw(*ids(app)) == first


async def test_names_are_passed_on_as_they_are(app: WebApp) -> None:
    models = {row["model_id"]: row for row in await rows(app.http, "/reports/models")}

    assert set(models) == set(ids(app))
    assert models["b/2"]["model_name"] == EVIL
    for row in app.leaderboard:
        model = models[row["model_id"]]
        assert all(isinstance(value, str) for value in model.values())
        assert model["model_name"] == row["model_name"]
        assert model["cruncher_name"] == row["cruncher_name"]


async def test_each_feed_has_a_tail(app: WebApp) -> None:
    feeds = await rows(app.http, "/reports/feeds")

    assert feeds
    for feed in feeds:
        named = {name: feed[name] for name in ("source", "subject", "kind", "granularity")}
        answer = await app.http.get("/reports/feeds/tail", params={**named, "limit": 5})
        tail = answer.json()
        assert len(tail) == min(5, feed["record_count"])
        assert all(row[name] == value for row in tail for name, value in named.items())
        times = [row["ts_event"] for row in tail]
        assert times == sorted(times, reverse=True)
        assert times[0] == feed["newest_ts"]
