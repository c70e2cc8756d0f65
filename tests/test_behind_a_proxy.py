"""The report behind a reverse proxy that shows it at a path of its own, as a browser sees it from outside."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from html import unescape
from pathlib import Path
from urllib.parse import urljoin

import anyio
import httpx
import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse

from condor_lite.config_sections import OWN_PATHS
from condor_lite.errors import ConfigError
from condor_lite.report import server
from condor_lite.report.api import ENDPOINTS, PAGES
from tests import served
from tests.pages import BROWSER
from tests.served import BTC_ROUND, CLOSED_ROUND, OPEN_ROUND

pytestmark = pytest.mark.anyio

PREFIX = "/contests/game"
CONFIG = f'\n[report]\nbase_path = "{PREFIX}/"\n'
PATHS = (
    *("/", "/?window=recent", "/models/1", "/models/b%2F2", "/rounds", "/rounds?status=void", "/prices"),
    *(f"/rounds/{BTC_ROUND}", f"/rounds/{CLOSED_ROUND}", f"/rounds/{OPEN_ROUND}"),
    *("/status", "/about", "/docs", "/nothing-here", "/models/nobody"),
)


@asynccontextmanager
async def proxied(game: served.Game, *, strips: bool) -> AsyncIterator[httpx.AsyncClient]:
    """A proxy at a port of its own, which knows nothing outside of the prefix."""

    async def proxy(scope, receive, send) -> None:  # type: ignore[no-untyped-def]
        request = Request(scope, receive)
        path = scope["raw_path"].decode()
        response: Response = PlainTextResponse("somebody else's", 418)
        if path == PREFIX or path.startswith(f"{PREFIX}/"):
            inside = (path.removeprefix(PREFIX) or "/") if strips else path
            query = f"?{scope['query_string'].decode()}" if scope["query_string"] else ""
            headers = {**request.headers, "x-forwarded-for": "203.0.113.9", "x-forwarded-proto": "https"}
            asked = game.client.build_request("GET", inside + query, headers=headers)
            answer = await game.client.send(asked, stream=True)
            response = StreamingResponse(answer.aiter_raw(), answer.status_code, dict(answer.headers))
        await response(scope, receive, send)

    sock = server.bind("127.0.0.1", 0)
    serving = server.Server(proxy, sock)
    async with anyio.create_task_group() as tasks:
        await tasks.start(serving.run)
        async with httpx.AsyncClient(base_url=serving.url, timeout=60) as client:
            yield client
        serving.stop()


@pytest.mark.parametrize("strips", [True, False])
async def test_every_link_and_asset_of_every_page_stays_under_the_prefix(
    strips: bool, tmp_path: Path
) -> None:
    seen: set[str] = set()
    async with served.serve(tmp_path, CONFIG) as game:
        await served.play(game)
        game.problems.append("something is wrong")
        async with proxied(game, strips=strips) as client:
            assert (await client.get("/rounds")).status_code == 418
            for path in PATHS:
                at = PREFIX + path
                page = await client.get(at, headers=BROWSER)
                assert page.status_code == (404 if path in ("/nothing-here", "/models/nobody") else 200), path
                html = page.text
                links = {unescape(link) for link in re.findall(r'(?:href|src|action)="([^"]*)"', html)}
                assert any(link.startswith(f"{PREFIX}/static/") for link in links)
                root = re.search(r'data-root="([^"]*)"', html)
                assert root is not None
                links.add(f"{root[1]}/version")
                seen |= {urljoin(at, link).split("#")[0] for link in links if not link.startswith("#")}
            assert len(seen) > 40
            game.problems.clear()
            seen.remove(f"{PREFIX}/events")  # has no end, and a test of its own
            for link in sorted(seen):
                answer = await client.get(link, headers=BROWSER)
                assert answer.status_code == 200, link


def test_no_template_names_an_address_without_the_prefix() -> None:
    for file in (Path(server.__file__).parent / "templates").iterdir():
        assert not re.findall(r'.*(?:href|src|action)="(?:/|{{ *(?:static|plotly)).*', file.read_text()), (
            file.name
        )


async def test_the_api_and_its_description_are_under_the_prefix(tmp_path: Path) -> None:
    async with served.serve(tmp_path, CONFIG) as game:
        await served.play(game)
        async with proxied(game, strips=False) as client:
            described = (await client.get(f"{PREFIX}/openapi.json")).json()
            (base,) = described["servers"]
            assert base == {"url": PREFIX}
            for path in ("/reports/leaderboard", "/leaderboard", "/rounds", "/statistics"):
                assert path in described["paths"]
                inside = await game.client.get(path)
                assert (await client.get(base["url"] + path)).json() == inside.json()
            missing = await client.get(f"{PREFIX}/nothing-here")
            assert (missing.status_code, missing.headers["content-type"]) == (404, "application/json")


async def test_events_pass_the_proxy_as_they_happen(tmp_path: Path) -> None:
    script = (Path(server.__file__).parent / "static" / "live.js").read_text()
    assert re.findall(r"new EventSource\((.*?)\?", script) == ["`${root.dataset.root}/events"]
    async with (
        asyncio.timeout(120),
        served.serve(tmp_path, CONFIG) as game,
        proxied(game, strips=True) as client,
        client.stream("GET", f"{PREFIX}/events") as stream,
    ):
        assert stream.headers["x-accel-buffering"] == "no"
        lines = stream.aiter_lines()
        await anext(lines)
        game.stream.publish("leaderboard", {})
        async for line in lines:
            if line == "event: leaderboard":
                break


async def test_nothing_depends_on_what_a_proxy_or_a_liar_says_of_the_client(tmp_path: Path) -> None:
    lies = {"x-forwarded-for": "evil", "x-forwarded-proto": "gopher", "x-forwarded-host": "evil.example"}
    async with served.serve(tmp_path, CONFIG) as game:
        await served.play(game)
        for path in ("/about", "/reports/leaderboard"):
            honest = await game.client.get(path, headers=BROWSER)
            lied_to = await game.client.get(path, headers={**BROWSER, **lies, "host": "evil.example"})
            assert lied_to.content == honest.content
            assert "evil" not in lied_to.text


def test_a_prefix_that_hides_an_address_of_the_report_is_refused(tmp_path: Path) -> None:
    paths = [route.path for route in (*ENDPOINTS, *PAGES)]
    assert {path.split("/")[1] for path in paths} - {""} | {"static"} == OWN_PATHS
    for wrong in ("/rounds", "/static/game", "game", "/a b", "/..", "//game", "https://example.org/game"):
        with pytest.raises(ConfigError, match=r"report\.base_path"):
            served.load(tmp_path, f'\n[report]\nbase_path = "{wrong}"\n')
    assert served.load(tmp_path, '\n[report]\nbase_path = "/"\n').report.base_path == ""
