"""The webhook: what a host is told, how it is signed, and that no receiver can hold anything up."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import shutil
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import anyio
import grpc
import httpx
import pytest
import structlog
from model_runner_client.grpc.generated.dynamic_subclass_pb2 import CallRequest

from condor_lite import alarms, backup, supervisor
from condor_lite import config as configuration
from condor_lite import webhook as hooks
from condor_lite.alarms import Book, Event
from condor_lite.aside import Aside
from condor_lite.clock import SteppedClock
from condor_lite.config import WebhookConfig
from condor_lite.errors import ConfigError
from condor_lite.report.live import ServiceState
from condor_lite.supervisor import playing
from condor_lite.webhook import Webhook
from tests.fleet import ModelServer, Orchestrator
from tests.fleet.model import DONE, Abort, Wire
from tests.program import LIMIT_S
from tests.served import serve
from tests.stage import until

pytestmark = pytest.mark.anyio

SECRET = "a secret of the receiver"
README = (Path(__file__).parent.parent / "README.md").read_text()


@dataclass
class Receiver:
    """A host's own server. `answers`: the status of each request to come, 204 after them; None: it hangs."""

    url: str
    answers: list[int | None] = field(default_factory=list)
    requests: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    free: asyncio.Event = field(default_factory=asyncio.Event)
    """Until it is set, nothing is answered."""

    def told(self) -> list[dict[str, Any]]:
        return [json.loads(body) for _, body in self.requests]

    def events(self) -> list[tuple[str, str]]:
        return [(message["event"], message["state"]) for message in self.told()]

    def standing(self) -> set[str]:
        """What has begun and is not over."""
        return {event for event, state in dict(self.events()).items() if state == "begun"}


@asynccontextmanager
async def receiving(*answers: int | None) -> AsyncIterator[Receiver]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                assert lines[0].startswith("POST /hook?token=quiet ")
                headers = dict(line.lower().split(": ", 1) for line in lines[1:-2])
                body = await reader.readexactly(int(headers["content-length"]))
                receiver.requests.append((headers, body))
                status = receiver.answers.pop(0) if receiver.answers else 204
                if status is None:
                    await reader.read()
                    return
                await receiver.free.wait()
                location = "location: /hook\r\n" if status == 302 else ""
                writer.write(f"HTTP/1.1 {status} as told\r\n{location}content-length: 0\r\n\r\n".encode())
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    receiver = Receiver(f"http://127.0.0.1:{port}/hook?token=quiet", list(answers))
    receiver.free.set()
    try:
        yield receiver
    finally:
        server.close()


@asynccontextmanager
async def delivering(url: str) -> AsyncIterator[Webhook]:
    webhook = Webhook(WebhookConfig(url, SECRET))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(webhook.run)
        yield webhook
        tasks.cancel_scope.cancel()


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "_PAUSE_FIRST_S", 0.01)
    monkeypatch.setattr(hooks, "_PAUSE_MOST_S", 0.02)


def documented() -> Callable[..., bool]:
    """The example in the README, as a receiver would use it."""
    block = README.split("### Messages to you")[1].split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(block, names)
    return names["is_from_the_game"]  # type: ignore[no-any-return]


async def test_a_message_is_signed_as_the_readme_says() -> None:
    is_from_the_game = documented()
    async with receiving() as receiver, delivering(receiver.url) as webhook:
        webhook.put("feed_stale", b'{"event":"feed_stale"}')
        await until(lambda: receiver.requests and not webhook.waiting)
    ((headers, body),) = receiver.requests
    assert headers["content-type"] == "application/json"
    timestamp = headers["condor-lite-timestamp"]
    expected = hmac.new(SECRET.encode(), timestamp.encode() + b"." + body, hashlib.sha256).hexdigest()
    assert headers["condor-lite-signature"] == f"sha256={expected}"
    now_s = int(timestamp)
    assert abs(now_s - time.time()) < 60
    sent = (timestamp, headers["condor-lite-signature"])
    assert is_from_the_game(SECRET, *sent, body, now_s)
    assert not is_from_the_game("another", *sent, body, now_s)
    assert not is_from_the_game(SECRET, *sent, body + b" ", now_s)
    assert not is_from_the_game(SECRET, str(now_s + 1), sent[1], body, now_s)
    assert not is_from_the_game(SECRET, *sent, body, now_s + 301)


@pytest.mark.parametrize("answer", [500, 404, 302])
async def test_what_is_not_taken_is_sent_again_in_order(answer: int) -> None:
    with structlog.testing.capture_logs() as logs:
        async with receiving(answer, answer) as receiver, delivering(receiver.url) as webhook:
            webhook.put("a", b'{"n": 1}')
            webhook.put("b", b'{"n": 2}')
            await until(lambda: not webhook.waiting)
    assert [message["n"] for message in receiver.told()] == [1, 1, 1, 2]
    failed = [entry for entry in logs if entry["event"] == "webhook_failed"]
    assert [entry["error"] for entry in failed] == [f"HTTP {answer}"] * 2
    assert [entry["retry_in_s"] for entry in failed] == [0.01, 0.02]
    assert SECRET not in repr(logs)
    assert "quiet" not in repr(logs), "a receiver's address may hold a secret, too"


async def test_a_receiver_that_hangs_or_is_gone_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "_TIMEOUT_S", 0.4)
    with structlog.testing.capture_logs() as logs:
        async with receiving(None) as receiver, delivering(receiver.url) as webhook:
            webhook.put("a", b"{}")
            await until(lambda: not webhook.waiting)
        monkeypatch.setattr(hooks, "_TIMEOUT_S", 60.0)
        async with delivering(receiver.url) as webhook:
            webhook.put("b", b"{}")
            await until(lambda: [e for e in logs if e.get("about") == "b"])
    assert len(receiver.requests) >= 2
    errors = {entry["about"]: entry["error"] for entry in logs if entry["event"] == "webhook_failed"}
    assert errors["a"] == "no answer within 0 s"
    assert errors["b"].startswith("ConnectError")
    assert [entry["messages"] for entry in logs if entry["event"] == "webhook_not_delivered"] == [1]
    assert "quiet" not in repr(logs)


async def test_the_oldest_of_too_many_messages_goes_loudly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "_MOST_WAITING", 3)
    with structlog.testing.capture_logs() as logs:
        async with receiving(None) as receiver, delivering(receiver.url) as webhook:
            webhook.put("0", b"0")
            await until(lambda: receiver.requests)
            for n in range(1, 5):
                webhook.put(str(n), b"%d" % n)
            assert webhook.waiting == 3
    assert [entry["dropped"] for entry in logs if entry["event"] == "webhook_dropped"] == ["0", "1"]


async def test_a_message_dropped_while_it_is_sent_takes_no_other_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hooks, "_MOST_WAITING", 2)
    async with receiving() as receiver, delivering(receiver.url) as webhook:
        receiver.free.clear()
        webhook.put("0", b"0")
        await until(lambda: receiver.requests)
        for n in (1, 2):
            webhook.put(str(n), b"%d" % n)
        receiver.free.set()
        await until(lambda: not webhook.waiting)
    assert receiver.told() == [0, 1, 2]


async def test_a_message_that_nobody_takes_for_a_day_lets_the_next_one_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hooks, "_GIVEN_UP_AFTER_S", -1.0)
    with structlog.testing.capture_logs() as logs:
        async with receiving(500) as receiver, delivering(receiver.url) as webhook:
            webhook.put("a", b"1")
            webhook.put("b", b"2")
            await until(lambda: not webhook.waiting)
    assert receiver.told() == [1, 2]
    assert [entry["why"] for entry in logs if entry["event"] == "webhook_dropped"] == [
        "not taken for a day: HTTP 500"
    ]


async def test_a_sender_that_is_started_again_delivers_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fails(*args: object) -> None:
        raise RuntimeError("injected")

    async with receiving() as receiver:
        webhook = Webhook(WebhookConfig(receiver.url, SECRET))
        webhook.put("a", b"1")
        with monkeypatch.context() as broken:
            broken.setattr(webhook, "_try", fails)
            with pytest.raises(RuntimeError):
                await webhook.run()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(webhook.run)
            await until(lambda: not webhook.waiting)
            tasks.cancel_scope.cancel()
    assert receiver.told() == [1]


# What is told


def test_a_trouble_that_comes_and_goes_is_told_once() -> None:
    book, trouble = Book(away_s=10.0), (Event.FEED_STALE, "BTC")
    assert book.look(0.0, []) == ([], [])
    assert book.look(1.0, [trouble]) == ([trouble], [])
    for now_s in (2.0, 8.0, 14.0, 20.0):
        assert book.look(now_s, []) == ([], [])
        assert book.look(now_s + 1, [trouble]) == ([], [])
    assert book.look(31.0, []) == ([], [])
    assert book.look(31.5, []) == ([], [trouble])
    assert book.look(32.0, [trouble]) == ([trouble], [])


async def test_a_price_must_be_old_for_a_while_and_a_service_fail_often(tmp_path: Path) -> None:
    sent: list[str] = []
    async with serve(tmp_path, '\n[webhook]\nafter = "60s"\n') as game:
        vitals = game.live.vitals()
        watching = alarms.Alarms(
            game.config,
            game.live,
            SimpleNamespace(states=game.live.feeds, finished=False),  # type: ignore[arg-type]
            None,
            lambda event, body: sent.append(event),
        )
        begun_s = time.monotonic()

        def told(after_s: float, restarts: int = 0) -> list[str]:
            sent.clear()
            services = [ServiceState("predict", None, restarts, 61.0)]
            game.live.vitals = lambda: replace(vitals, services=services)
            watching.look(begun_s + after_s, {})
            return sent

        assert told(0) == told(59) == []
        assert told(60) == ["feed_stale"]
        assert told(61, restarts=2) == []
        assert told(62, restarts=3) == ["service_restarts"]


GAME = """
[game]
name = "Told"
shutdown_grace = 0

[[game.settings]]
assets = ["BTC"]
horizon = "4s"
step = "2s"
interval = "2s"

[feed]
source = "prices_here:Prices"
tick = "1s"
history = "1m"
max_staleness = "6s"

[predict]
max_consecutive_failures = 2

[orchestrator]
mode = "remote"
port = {port}

[scoring]
workers = 1

[webhook]
url = "{url}"
secret = "{secret}"
after = "1s"

[backup]
every = "1h"

[report]
port = 0
"""

LOCAL = """
[game]
name = "Told"
shutdown_grace = 0

[[game.settings]]
assets = ["BTC"]
horizon = "20s"
step = "5s"
interval = "5s"

[feed]
tick = "5s"
history = "1m"

[predict]
max_consecutive_failures = 1

[orchestrator]
port = 0

[scoring]
workers = 1

[webhook]
url = "{url}"
secret = "{secret}"
after = 0

[report]
port = 0
"""

MODEL = """
from condor_lite.tracker import TrackerBase


class Model(TrackerBase):
    def predict(self, asset, horizon, step):
        {}
        density = {{"type": "builtin", "name": "norm", "params": {{"loc": 0.0, "scale": 0.001}}}}
        return self.flat(density, horizon, step)
"""

PRICES = """
from pathlib import Path
from condor_lite.prices.source import Source, SourceError

class Prices(Source):
    name = "prices_here"
    latency_s = 0.1

    def __init__(self, feed):
        pass

    async def fetch(self, asset, after_s, until_s, step_s):
        if Path({down!r}).exists():
            raise SourceError("HTTP 503")
        first = after_s // step_s * step_s + step_s
        return [(at_s, 100 + at_s % 7) for at_s in range(first, until_s + 1, step_s)]
"""


def fail(late_s: float) -> None:
    raise RuntimeError("injected")


async def refuses(model: ModelServer, request: CallRequest) -> Wire:
    if request.methodName == "predict":
        raise Abort(grpc.StatusCode.INTERNAL, "broken")
    return DONE


async def test_each_trouble_of_a_real_game_is_told_when_it_begins_and_when_it_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alarms, "_LOOK_S", 0.05)
    monkeypatch.setattr(alarms, "_OFTEN_WITHIN_S", 2.0)
    monkeypatch.setattr(backup, "_RETRY_S", 0.1)
    monkeypatch.setattr(supervisor, "_RESTART_FIRST_S", 0.02)
    monkeypatch.setattr(supervisor, "_RESTART_MOST_S", 0.02)
    monkeypatch.syspath_prepend(tmp_path)
    down, orchestrator = tmp_path / "down", Orchestrator()
    (tmp_path / "prices_here.py").write_text(PRICES.format(down=str(down)))
    (tmp_path / "backups").write_text("in the way")
    good, bad = ModelServer("good"), ModelServer("bad", refuses)
    await orchestrator.start()
    try:
        async with receiving() as receiver:
            text = GAME.format(port=orchestrator.port, url=receiver.url, secret=SECRET)
            (tmp_path / "config.toml").write_text(text)
            config = configuration.load(tmp_path / "config.toml", {})
            async with playing(config) as game:
                for model in (good, bad):
                    await model.start()
                await orchestrator.announce(good, bad)
                await until(lambda: ("model_given_up", "begun") in receiver.events())

                on_beat, game.watchdog._on_beat = game.watchdog._on_beat, fail
                await until(lambda: ("service_restarts", "begun") in receiver.events())
                game.watchdog._on_beat = on_beat

                await until(lambda: ("backup_failed", "begun") in receiver.events())
                async with httpx.AsyncClient(base_url=game.web.url, timeout=60) as client:
                    not_ready = (await client.get("/readyz")).json()
                    status = (await client.get("/status")).text
                    metrics = (await client.get("/metrics")).text
                assert "the last backup failed: " in not_ready["detail"]
                assert "can&#39;t be written: File exists.</b> It is tried again" in status
                assert "condor_lite_backup_failing 1.0" in metrics
                (tmp_path / "backups").unlink()
                await until(lambda: ("backup_failed", "ended") in receiver.events())
                assert not [one for one in game.problems() if "backup" in one.what]

                # On a slow machine they may come and go before.
                await until(lambda: not {"feed_stale", "no_round_held"} & receiver.standing())
                before = len(receiver.requests)
                down.touch()
                config.webhook = replace(config.webhook, min_free_bytes=2**50)
                for event in ("disk_nearly_full", "feed_stale", "no_round_held"):
                    await until(lambda event=event: (event, "begun") in receiver.events()[before:])
                down.unlink()
                config.webhook = replace(config.webhook, min_free_bytes=0)
                await until(lambda: receiver.standing() == {"model_given_up"})
    finally:
        for model in (good, bad):
            await model.stop()
        await orchestrator.stop()
    told = receiver.told()
    assert len({message["id"] for message in told}) == len(told)
    assert {message["game"] for message in told} == {"Told"}
    for event in Event:
        states = [message["state"] for message in told if message["event"] == event]
        ended = [] if event is Event.MODEL_GIVEN_UP else ["ended"]
        assert states[: 1 + len(ended)] == ["begun", *ended]
        assert all(state != following for state, following in pairwise(states)), "told once"
    whats = {(message["event"], message["state"]): message for message in told}
    assert whats["model_given_up", "begun"]["subjects"] == ["bad"]
    assert whats["service_restarts", "begun"]["subjects"] == ["watchdog"]
    assert whats["feed_stale", "begun"]["subjects"] == ["BTC"]
    assert "BTC: the newest price is" in whats["feed_stale", "begun"]["what"]
    assert "HTTP 503" in whats["feed_stale", "begun"]["what"]
    assert "the newest BTC price is" in whats["no_round_held", "begun"]["what"]
    assert whats["disk_nearly_full", "begun"]["subjects"] == [str(tmp_path / "data")]
    assert whats["backup_failed", "begun"]["subjects"] == []
    assert "can't be written" in whats["backup_failed", "begun"]["what"]


async def test_a_model_that_is_deleted_is_no_trouble_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alarms, "_LOOK_S", 0.05)
    for name, code in (
        ("broken", "1 +"),
        ("raises", MODEL.format("raise RuntimeError")),
        ("good", MODEL.format("pass")),
    ):
        (tmp_path / "models" / name).mkdir(parents=True)
        (tmp_path / "models" / name / "main.py").write_text(code)
    async with receiving() as receiver:
        text = LOCAL.format(url=receiver.url, secret=SECRET)
        (tmp_path / "config.toml").write_text(text)
        async with playing(configuration.load(tmp_path / "config.toml", {})):

            def about(state: str) -> dict[str, str]:
                return {
                    subject: message["what"]
                    for message in receiver.told()
                    if (message["event"], message["state"]) == ("model_given_up", state)
                    for subject in message["subjects"]
                }

            await until(lambda: about("begun").keys() == {"broken", "raises"})
            for name in ("broken", "raises"):
                shutil.rmtree(tmp_path / "models" / name)
            await until(lambda: about("ended").keys() == {"broken", "raises"})
    for name, what in about("ended").items():
        assert f"{name} is gone" in what
        assert "takes part" not in what


async def test_at_the_end_of_a_recording_nothing_is_called_fresh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alarms, "_LOOK_S", 0.02)
    (tmp_path / "recording").mkdir()
    for asset, seconds in (("BTC", 400), ("ETH", 200)):
        lines = [f"{1_700_000_000 + second},{100 + second % 3}" for second in range(0, seconds, 5)]
        (tmp_path / "recording" / f"{asset}.csv").write_text("\n".join(["timestamp,close", *lines]) + "\n")
    async with receiving() as receiver:
        replay = 'source = "replay"\npath = "recording"\n'
        text = LOCAL.format(url=receiver.url, secret=SECRET)
        text = text.replace('assets = ["BTC"]', 'assets = ["BTC", "ETH"]').replace(
            "[feed]\n", "[feed]\n" + replay
        )
        (tmp_path / "config.toml").write_text(text)
        clock = SteppedClock(1_700_000_100)
        async with playing(configuration.load(tmp_path / "config.toml", {}), clock) as game:
            await clock.run_until(1_700_000_300)
            await until(lambda: ("feed_stale", "begun") in receiver.events())
            assert not game.feed.finished
            await clock.run_until(1_700_000_500)
            await until(lambda: ("feed_stale", "ended") in receiver.events())
            assert game.feed.finished
    ended = [message for message in receiver.told() if message["state"] == "ended"]
    whats = [message["what"] for message in ended if message["event"] == "feed_stale"]
    assert whats == ["ETH: the recording is over"]


async def test_each_disk_is_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = alarms._free

    def late(folder: Path) -> tuple[int, int]:
        time.sleep(0.2 if folder == tmp_path else 0.0)  # so that another folder on its disk is told of first
        return free(folder)

    monkeypatch.setattr(alarms, "_LOOK_MOST_S", 60.0)
    monkeypatch.setattr(alarms, "_free", late)
    (tmp_path / "backups").mkdir()
    folders = [tmp_path, tmp_path / "backups", Path("/proc"), tmp_path / "none"]
    looked_at = await alarms.DisksFree(folders).look()
    assert looked_at.keys() == {tmp_path, Path("/proc")}
    assert looked_at[tmp_path] > 0


async def test_a_look_for_which_there_is_no_thread_does_not_end_all_later_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    aside = Aside(60.0)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", Mock(side_effect=RuntimeError("can't start new thread")))
        with pytest.raises(RuntimeError, match="new thread"):
            await aside.run(lambda: 1)
    with anyio.fail_after(30):
        assert await aside.run(lambda: 2) == 2


async def test_a_disk_that_does_not_answer_silences_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead, disk_usage, there, looks = Path("/proc"), shutil.disk_usage, threading.Event(), []

    def looked(folder: Path) -> Any:
        if folder == dead:
            looks.append(folder)
            assert there.wait(60)
        return disk_usage(folder)

    monkeypatch.setattr(shutil, "disk_usage", looked)
    monkeypatch.setattr(alarms, "_LOOK_MOST_S", 0.5)
    disks = alarms.DisksFree([dead, tmp_path])
    with anyio.fail_after(LIMIT_S):
        while tmp_path not in (found := await disks.look()):  # that takes longer on a very busy machine
            pass
    assert dead not in found
    await disks.look()
    assert len(looks) == 1, "one thread waits for it, and no second one"
    there.set()
    with anyio.fail_after(LIMIT_S):
        while dead not in await disks.look():
            pass


# The configuration


@pytest.mark.parametrize(
    ("section", "right"),
    [
        ('url = "ftp://example.org/hook"\nsecret = "0123456789abcdef"', "must be an http(s) address"),
        ('url = "https://example.org/a b"\nsecret = "0123456789abcdef"', "must be an http(s) address"),
        ('url = "https://example.org/hook"', 'webhook.secret = "" (the default): must be set'),
        ('url = "https://example.org/hook"\nsecret = "topsecret"', "must have at least 16 characters"),
        ('url = "https:///topsecret"\nsecret = "0123456789abcdef"', "must be an http(s) address"),
    ],
)
def test_a_webhook_that_cannot_work_is_refused(section: str, right: str, tmp_path: Path) -> None:
    setting = '[[game.settings]]\nassets = ["BTC"]\nhorizon = "1h"\nstep = "1m"\ninterval = "12m"\n'
    (tmp_path / "config.toml").write_text(f"{setting}[webhook]\n{section}\n")
    with pytest.raises(ConfigError) as caught:
        configuration.load(tmp_path / "config.toml", {})
    (problem,) = caught.value.problems
    assert right in problem
    assert "topsecret" not in problem
    assert "0123456789abcdef" not in problem


def test_the_secret_is_not_in_the_configs_repr() -> None:
    assert "quiet" not in repr(WebhookConfig("https://example.org/?quiet", "quiet" * 4))
