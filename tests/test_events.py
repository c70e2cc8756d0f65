"""The event stream over a real port: what readers see, miss and get again, and that none hurts another."""

from __future__ import annotations

import asyncio
import re
import socket
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import httpx
import msgspec
import orjson
import pytest

from condor_lite import config as configuration
from condor_lite import supervisor
from condor_lite.clock import SteppedClock
from condor_lite.game.entities import ModelInfo, Round, RoundStatus
from condor_lite.news import ModelJoined, News, RoundsNotHeld, RoundsOpened
from condor_lite.report import connections, server
from condor_lite.report import stream as streams
from condor_lite.report.connections import SECURITY_HEADERS
from condor_lite.report.events import EVENTS
from condor_lite.report.stream import Stream, Subscription
from condor_lite.supervisor import playing
from tests.games import ready, settle
from tests.pages import page
from tests.program import LIMIT_S
from tests.served import START_S, Game, serve
from tests.stage import until
from tests.test_whole_game import BUNDLED, SETTINGS

pytestmark = pytest.mark.anyio

Event = tuple[str, str, Any]
"""id, name, data"""


@pytest.fixture
async def game(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Game]:
    """Its server waits for slow readers for longer than it should: a busy machine makes all of them slow."""
    monkeypatch.setattr(server, "_GRACE_S", 60)
    monkeypatch.setattr(connections, "STALLED_AFTER_S", 600.0)
    async with serve(tmp_path, '[report]\ncors_origins = ["https://there.example"]\n') as made:
        yield made


class Reader:
    """A client of the stream."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self._chunks = response.aiter_raw()
        self._buffer = b""
        self.last_id = ""

    async def block(self) -> dict[str, str]:
        """The next lines up to an empty one, by field; a comment is the field ""."""
        async with asyncio.timeout(LIMIT_S):
            while b"\n\n" not in self._buffer:
                self._buffer += await anext(self._chunks)
        text, self._buffer = self._buffer.split(b"\n\n", 1)
        found = dict(line.split(":", 1) for line in text.decode().split("\n"))
        found = {name: value.removeprefix(" ") for name, value in found.items()}
        self.last_id = found.get("id", self.last_id)
        return found

    async def event(self) -> Event:
        async with asyncio.timeout(LIMIT_S):  # a stream without events goes on with comments
            while "data" not in (found := await self.block()):
                pass
        data = orjson.loads(found["data"])
        msgspec.convert(data, EVENTS[found["event"]], strict=True)
        assert set(data) == set(getattr(EVENTS[found["event"]], "__dataclass_fields__", ()))
        return found["id"], found["event"], data

    async def names(self, count: int) -> list[str]:
        return [(await self.event())[1] for _ in range(count)]

    async def ended(self) -> bool:
        async with asyncio.timeout(LIMIT_S):
            async for _ in self._chunks:
                pass
        return True


@asynccontextmanager
async def reading(
    url: str, last_event_id: str | None = None, *, address: str | None = None, **query: str
) -> AsyncIterator[Reader]:
    transport = httpx.AsyncHTTPTransport(local_address=address)
    headers = {"last-event-id": last_event_id} if last_event_id is not None else {}
    async with (
        httpx.AsyncClient(base_url=url, timeout=LIMIT_S, transport=transport) as client,
        client.stream("GET", "/events", headers=headers, params=query) as response,
    ):
        assert response.status_code == 200
        reader = Reader(response)
        first = await reader.block()
        assert first["retry"] == "3000"
        assert reader.last_id
        yield reader


def joined(name: str) -> ModelJoined:
    return ModelJoined(ModelInfo(name, f"the {name}", "p", "player", "d"))


def rounds(count: int) -> list[Round]:
    return [Round("BTC", 60, 10, START_S + 20 * k, RoundStatus.MISSED, "why") for k in range(count)]


async def test_a_real_game_tells_what_happens(tmp_path: Path) -> None:
    text = SETTINGS.format(assets='"BTC", "XAU"').replace('"12m"', '"30m"').replace('"1h"', '"10m"')
    (tmp_path / "config.toml").write_text(text + '[feed]\nhistory = "1h"\n')
    start_s = 1_800_000_000
    clock = SteppedClock(start_s - 30)
    config = configuration.load(tmp_path / "config.toml", {})
    async with (
        playing(config, clock) as game,
        reading(game.web.url) as reader,
        httpx.AsyncClient(base_url=game.web.url, timeout=60) as client,
    ):
        await until(lambda: ready(game) == len(BUNDLED))
        await settle(game, clock, start_s + 3600)
        seen: list[Event] = []
        by_name: defaultdict[str, list[Any]] = defaultdict(list)
        while len(by_name["round_scored"]) < 4 or not by_name["leaderboard"]:
            seen.append(await reader.event())
            by_name[seen[-1][1]].append(seen[-1][2])
        shown = (await client.get("/rounds?status=scored")).json()

    assert {model["model_id"] for model in by_name["model_joined"]} == {path.name for path in BUNDLED}
    opened = {event["round_id"] for event in by_name["round_opened"]}
    closed = {event["round_id"] for event in by_name["round_closed"]}
    assert opened >= closed >= {event["round_id"] for event in by_name["round_scored"]}
    for event in by_name["round_scored"]:
        (row,) = [row for row in shown if row["round_id"] == event["round_id"]]
        assert event.items() <= row.items()
        assert event["answered"] == len(BUNDLED)
    assert {price["asset"] for event in by_name["prices"] for price in event["assets"]} == {"BTC", "XAU"}
    assert len({number for number, _, _ in seen}) == len(seen)


async def test_a_reader_gets_what_happens_from_now_on(game: Game) -> None:
    game.live.news.tell(joined("before"))
    async with reading(game.server.url) as reader:
        game.live.news.tell(RoundsOpened(rounds(1)))
        _, name, data = await reader.event()
    assert (name, data["round_id"], data["scheduled_at"]) == (
        "round_opened",
        f"BTC-60-10-{START_S}",
        "2023-11-14T23:00:00Z",
    )


async def test_who_comes_back_gets_what_was_missed_once(game: Game) -> None:
    tell = game.live.news.tell
    async with reading(game.server.url) as reader:
        before = reader.last_id
        tell(joined("a"))
        await reader.event()
        after_a = reader.last_id
    tell(joined("b"))
    tell(joined("c"))
    async with reading(game.server.url, after_a) as reader:
        tell(joined("d"))
        assert [(await reader.event())[2]["model_id"] for _ in range(3)] == ["b", "c", "d"]
        up_to_date = reader.last_id
    async with reading(game.server.url, before) as reader:
        assert [(await reader.event())[2]["model_id"] for _ in range(4)] == ["a", "b", "c", "d"]
    async with reading(game.server.url, up_to_date) as reader:
        tell(joined("e"))
        assert (await reader.event())[2]["model_id"] == "e"


async def test_an_id_of_another_start_or_too_long_ago_is_a_reset(
    game: Game, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with reading(game.server.url) as reader:
        old = reader.last_id
    boot = old.split("-")[0]
    for number in range(streams._KEPT + 1):
        game.live.news.tell(joined(str(number)))
    for unknown in (old, "deadbeef-3", f"{boot}-99999", f"{boot}-", "0" * 4000):
        async with reading(game.server.url, unknown) as reader:
            assert (await reader.event())[1:] == ("reset", {})
            game.live.news.tell(joined("next"))
            assert (await reader.event())[2]["model_id"] == "next"


async def test_very_many_rounds_that_were_missed_are_one_reset(game: Game) -> None:
    async with reading(game.server.url) as reader:
        game.live.news.tell(RoundsNotHeld(rounds(3)))
        assert await reader.names(3) == ["round_closed"] * 3
        game.live.news.tell(RoundsNotHeld(rounds(10_000)))
        game.live.news.tell(joined("a"))
        assert await reader.names(2) == ["reset", "model_joined"]
        before = reader.last_id
    game.live.news.tell(RoundsNotHeld(rounds(10_000)))
    async with reading(game.server.url, before) as reader:
        assert await reader.names(1) == ["reset"]
    async with reading(game.server.url, f"{before.split('-')[0]}-1") as reader:
        game.live.news.tell(joined("b"))
        assert await reader.names(2) == ["reset", "model_joined"], "what came before the reset is not kept"


async def test_a_reader_that_never_reads_loses_events_and_hurts_nobody(game: Game) -> None:
    deaf = socket.socket()
    deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    deaf.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(deaf, ("127.0.0.1", game.server.port))
    await loop.sock_sendall(deaf, b"GET /events HTTP/1.1\r\nHost: x\r\n\r\n")
    large = "x" * 2000
    async with reading(game.server.url) as reader:
        count = 0
        while not any(c.transport.get_write_buffer_size() > 65536 for c in game.server.connections):
            game.live.news.tell(joined(large))
            assert (await reader.event())[1] == "model_joined"
            count += 1
            assert count < 2000
        for _ in range(2):  # more than are kept
            for number in range(streams._KEPT - 1):
                game.live.news.tell(joined(str(number)))
            assert len(await reader.names(streams._KEPT - 1)) == streams._KEPT - 1
    got = b""
    while b"event: reset" not in got:
        async with asyncio.timeout(LIMIT_S):
            part = await loop.sock_recv(deaf, 65536)
        assert part, "it was cut off"
        got += part
    assert got.count(b"event: model_joined") < count + streams._KEPT
    deaf.close()
    await until(lambda: not game.server.connections)


async def test_an_idle_stream_shows_that_it_lives() -> None:
    stream = Stream(heartbeat_s=0.01)
    async with aclosing(stream.open(Subscription(None)).body_iterator) as body:
        chunks = [await anext(body) for _ in range(3)]
    assert chunks[1:] == [b":\n\n", b":\n\n"]


async def test_streams_are_bounded(game: Game, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(game.stream, "_most", 2)
    async with reading(game.server.url), reading(game.server.url):
        answer = await game.client.get("/events")
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "30"
        assert "2 event streams are open" in answer.json()["detail"]
    await until(lambda: game.stream.readers == 0)
    async with reading(game.server.url):
        pass


async def test_the_address_with_most_streams_makes_room_for_another(
    game: Game, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(game.stream, "_most", 4)
    url = game.server.url
    async with reading(url) as oldest, reading(url), reading(url), reading(url) as newest:
        assert (await game.client.get("/events")).status_code == 503, "one more of the crowd"
        async with (
            reading(url, address="127.0.0.2") as other,
            httpx.AsyncClient(
                base_url=url, timeout=LIMIT_S, transport=httpx.AsyncHTTPTransport(local_address="127.0.0.2")
            ) as client,
        ):
            assert await oldest.ended()
            async with reading(url, address="127.0.0.2"):
                assert game.stream.readers == 4
                assert (await game.client.get("/events")).status_code == 503, "half belongs to the others"
                assert (await client.get("/events")).status_code == 503
                game.live.news.tell(joined("a"))
                assert await newest.names(1) == await other.names(1) == ["model_joined"]
    await until(lambda: game.stream.readers == 0)


async def test_headers_head_and_cors(game: Game) -> None:
    async with reading(game.server.url) as reader:
        headers = reader.response.headers
    assert headers["content-type"] == "text/event-stream; charset=utf-8"
    assert headers["cache-control"] == "no-store"
    assert headers["x-accel-buffering"] == "no"
    assert "content-encoding" not in headers
    assert headers.items() >= SECURITY_HEADERS.items()
    head = await game.client.head("/events", headers={"origin": "https://there.example"})
    assert head.status_code == 200
    assert head.headers["content-type"] == headers["content-type"]
    assert head.headers["access-control-allow-origin"] == "https://there.example"
    await until(lambda: game.stream.readers == 0)


async def test_open_streams_end_with_the_server(game: Game) -> None:
    async with reading(game.server.url) as one, reading(game.server.url) as other:
        game.server.stop()
        assert await one.ended()
        assert await other.ended()
    await until(lambda: not game.server.connections)


async def test_a_service_that_is_started_again_is_told(game: Game, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "_RESTART_FIRST_S", 0.01)
    failures = iter([ValueError("once")])

    async def run() -> None:
        if (failure := next(failures, None)) is not None:
            raise failure
        await asyncio.Event().wait()

    service = supervisor.Service("score", run, game.live.news.tell)
    async with reading(game.server.url) as reader, anyio.create_task_group() as tasks:
        tasks.start_soon(service.serve)
        _, name, data = await reader.event()
        tasks.cancel_scope.cancel()
    assert (name, data) == ("service_restarted", {"service": "score", "error": "ValueError: once"})


async def test_a_listener_that_fails_is_not_the_tellers_trouble() -> None:
    news, heard = News(), []

    def fail(it: ModelJoined) -> None:
        raise RuntimeError

    news.listen(ModelJoined, fail)
    news.listen(ModelJoined, heard.append)
    news.tell(joined("a"))
    assert heard == [joined("a")]


async def test_what_happens_while_a_page_is_on_its_way_is_told_to_it(game: Game) -> None:
    game.live.news.tell(joined("early"))
    for path in ("/", "/rounds", "/prices", "/status"):
        (since,) = re.findall('data-since="([^"]+)"', await page(game, path))
        game.live.news.tell(joined("late"))
        async with reading(game.server.url, after=since) as reader:
            assert [(await reader.event())[2]["model_id"]] == ["late"]
            newest = reader.last_id
        async with reading(game.server.url, newest, after=since) as reader:  # as a browser comes back
            game.live.news.tell(joined("later"))
            assert [(await reader.event())[2]["model_id"]] == ["later"]
    async with reading(game.server.url, after="of an earlier start-3") as reader:
        assert await reader.names(1) == ["reset"]
