"""What a host is told of without having to look: when a trouble begins, and when it is over.

Looked at every few seconds. A trouble is one message at its beginning and one at its end, however often it
comes and goes in between; what begins or ends in the same moment is one message for each kind.
"""

from __future__ import annotations

import asyncio
import shutil
import time
import uuid
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from enum import StrEnum
from functools import partial
from pathlib import Path

import msgspec
import orjson

from condor_lite.aside import Aside
from condor_lite.config import Config
from condor_lite.game.entities import RoundStatus
from condor_lite.models.orchestrator import LocalModelState, LocalState, Orchestrator
from condor_lite.news import ModelGivenUp, ModelJoined, RoundClosed, RoundsNotHeld
from condor_lite.prices.feed import Feed, FeedState
from condor_lite.report.live import Live
from condor_lite.report.pages.common import size, span

_LOOK_S = 5.0
_LOOK_MOST_S = 2.0  # at a disk
_OFTEN = 3  # restarts ...
_OFTEN_WITHIN_S = 600.0  # ... in so long are more than bad luck
_SHOWN = 5
_MOST_GIVEN_UP = 10_000
_GONE_AFTER_S = 7 * 86400.0  # a model that was given up and never seen again


class Event(StrEnum):
    """The kinds of troubles, as messages name them."""

    SERVICE_RESTARTS = "service_restarts"
    FEED_STALE = "feed_stale"
    NO_ROUND_HELD = "no_round_held"
    DISK_NEARLY_FULL = "disk_nearly_full"
    BACKUP_FAILED = "backup_failed"
    MODEL_GIVEN_UP = "model_given_up"


class State(StrEnum):
    BEGUN = "begun"
    ENDED = "ended"


Trouble = tuple[Event, str]
"""What, and whose: a service, an asset, a folder, a model; the game's own have no name."""


class Message(msgspec.Struct, frozen=True):
    """The JSON that is sent. `at`: when it was noticed, of the wall's clock; `id`: the same in every try."""

    id: str
    game: str
    event: Event
    state: State
    subjects: list[str]
    what: str
    at: str


class Book:
    """Which troubles have been told. A trouble is over when it has been away for `away_s`."""

    def __init__(self, away_s: float) -> None:
        self._away_s = away_s
        self._seen_s: dict[Trouble, float] = {}

    def look(self, now_s: float, present: Iterable[Trouble]) -> tuple[list[Trouble], list[Trouble]]:
        """Those that begin now, and those that are over."""
        begun = [trouble for trouble in present if trouble not in self._seen_s]
        self._seen_s.update(dict.fromkeys(present, now_s))
        ended = [trouble for trouble, seen_s in self._seen_s.items() if now_s - seen_s > self._away_s]
        for trouble in ended:
            del self._seen_s[trouble]
        return begun, ended


class Alarms:
    """One game's. `send(event, body)` is given each message; `orchestrator` is the embedded one, if any."""

    def __init__(
        self,
        config: Config,
        live: Live,
        feed: Feed,
        orchestrator: Orchestrator | None,
        send: Callable[[str, bytes], None],
    ) -> None:
        self._config = config
        self._live = live
        self._feed = feed
        self._orchestrator = orchestrator
        self._send = send
        self._book = Book(config.webhook.after_s)
        self._restarts: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_OFTEN))
        self._restarts_seen: dict[str, int] = {}
        self._stale_since_s: dict[str, float] = {}
        self._held_s = time.monotonic()
        self._not_held = "none was due"
        folders = [config.storage.path.parent, *([config.backup.path] if config.backup.every_s else [])]
        self._disks_free = DisksFree(folders)
        self._given_up: dict[str, tuple[float, str]] = {}
        news = live.news
        news.listen(RoundClosed, self._on_closed)
        news.listen(RoundsNotHeld, self._on_not_held)
        news.listen(ModelGivenUp, self._on_given_up)
        news.listen(ModelJoined, self._on_joined)

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            self.look(time.monotonic(), await self._disks_free.look())
            await asyncio.sleep(_LOOK_S)

    def look(self, now_s: float, free_bytes: Mapping[Path, int]) -> None:
        """Send what begins and what is over. `now_s`: monotonic."""
        troubles = {
            **dict(self._services(now_s)),
            **dict(self._feeds(now_s)),
            **dict(self._rounds(now_s)),
            **dict(self._disks(free_bytes)),
            **dict(self._backup()),
            **dict(self._models(now_s)),
        }
        begun, ended = self._book.look(now_s, troubles.keys())
        self._tell(State.BEGUN, begun, troubles)
        self._tell(State.ENDED, ended, {trouble: self._over(*trouble) for trouble in ended})

    # -- what there may be -----------------------------------------------------------------------------------

    def _services(self, now_s: float) -> Iterator[tuple[Trouble, str]]:
        for service in self._live.vitals().services:
            times = self._restarts[service.name]
            times.extend([now_s] * (service.restarts - self._restarts_seen.get(service.name, 0)))
            self._restarts_seen[service.name] = service.restarts
            if len(times) == _OFTEN and now_s - times[0] <= _OFTEN_WITHIN_S:
                what = f"{service.name} failed {_OFTEN} times within {span(max(now_s - times[0], 1.0))}"
                yield (
                    (Event.SERVICE_RESTARTS, service.name),
                    what + (f": {service.failure}" if service.failure else ""),
                )

    def _feeds(self, now_s: float) -> Iterator[tuple[Trouble, str]]:
        for state in self._feed.states():
            if not state.stale or self._feed.finished:
                self._stale_since_s.pop(state.asset, None)
                continue
            since_s = self._stale_since_s.setdefault(state.asset, now_s)
            if now_s - since_s >= self._config.webhook.after_s:
                yield (Event.FEED_STALE, state.asset), stale_price(state)

    def _rounds(self, now_s: float) -> Iterator[tuple[Trouble, str]]:
        settings = self._config.game.settings
        wait_s = min(
            setting.interval_s + min(self._config.predict.timeout_s, setting.step_s, setting.interval_s)
            for setting in settings
        )
        for_s = now_s - self._held_s
        if for_s > wait_s / self._live.clock.speed + self._config.webhook.after_s and not self._feed.finished:
            yield (Event.NO_ROUND_HELD, ""), f"no round was held for {span(for_s)}: {self._not_held}"

    def _disks(self, free_bytes: Mapping[Path, int]) -> Iterator[tuple[Trouble, str]]:
        for folder, free in free_bytes.items():
            if free < self._config.webhook.min_free_bytes:
                yield (Event.DISK_NEARLY_FULL, str(folder)), f"{folder} has only {size(free)} left"

    def _backup(self) -> Iterator[tuple[Trouble, str]]:
        backup = self._live.vitals().backup
        if backup is not None and backup.failure is not None:
            yield (Event.BACKUP_FAILED, ""), f"the last backup failed: {backup.failure}"

    def _models(self, now_s: float) -> Iterator[tuple[Trouble, str]]:
        there = self._local_models()
        for model_id, (since_s, what) in list(self._given_up.items()):
            if now_s - since_s > _GONE_AFTER_S or (there is not None and model_id not in there):
                del self._given_up[model_id]
            else:
                yield (Event.MODEL_GIVEN_UP, model_id), what
        for local in (there or {}).values():
            if local.state is LocalState.GIVEN_UP:
                yield (Event.MODEL_GIVEN_UP, local.model_id), f"{local.name} does not run: {local.reason}"

    def _local_models(self) -> dict[str, LocalModelState] | None:
        """By id, those that have a folder; None where the models run elsewhere."""
        if self._orchestrator is None:
            return None
        return {local.model_id: local for local in self._orchestrator.states()}

    def _on_closed(self, closed: RoundClosed) -> None:
        if closed.round.status is RoundStatus.CLOSED:
            self._held_s = time.monotonic()
        elif closed.round.reason:
            self._not_held = closed.round.reason

    def _on_not_held(self, not_held: RoundsNotHeld) -> None:
        self._not_held = not_held.rounds[-1].reason or self._not_held

    def _on_given_up(self, given_up: ModelGivenUp) -> None:
        name = given_up.info.model_name
        what = f"{name} is not asked any more: {given_up.reason}"
        self._given_up[given_up.info.model_id] = (time.monotonic(), what)
        if len(self._given_up) > _MOST_GIVEN_UP:
            del self._given_up[next(iter(self._given_up))]

    def _on_joined(self, joined: ModelJoined) -> None:
        self._given_up.pop(joined.info.model_id, None)

    # -- telling ---------------------------------------------------------------------------------------------

    def _over(self, event: Event, name: str) -> str:
        if event in (Event.FEED_STALE, Event.NO_ROUND_HELD) and self._feed.finished:
            return f"{name}: the recording is over" if name else "the recording is over"
        if event is Event.MODEL_GIVEN_UP and name not in {
            *self._live.connected(),
            *(self._local_models() or ()),
        }:
            return f"{name} is gone"
        return {
            Event.SERVICE_RESTARTS: f"{name} runs without a failure again",
            Event.FEED_STALE: f"{name} has fresh prices again",
            Event.NO_ROUND_HELD: "rounds are held again",
            Event.DISK_NEARLY_FULL: f"{name} has room again",
            Event.BACKUP_FAILED: "a backup was made again",
            Event.MODEL_GIVEN_UP: f"{name} takes part again",
        }[event]

    def _tell(self, state: State, troubles: Iterable[Trouble], whats: Mapping[Trouble, str]) -> None:
        by_event: defaultdict[Event, list[Trouble]] = defaultdict(list)
        for trouble in troubles:
            by_event[trouble[0]].append(trouble)
        for event, same in by_event.items():
            what = "; ".join(whats[trouble] for trouble in same[:_SHOWN])
            message = Message(
                id=uuid.uuid4().hex,
                game=self._config.game.name,
                event=event,
                state=state,
                subjects=[name for _, name in same if name],
                what=what + (f"; and {len(same) - _SHOWN} more" if len(same) > _SHOWN else ""),
                at=datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
            )
            self._send(event, orjson.dumps(msgspec.to_builtins(message)))


def stale_price(state: FeedState) -> str:
    """What is wrong with a feed that is stale."""
    if state.age_s is None:
        what = f"{state.asset} has no price yet"
    else:
        what = f"{state.asset}: the newest price is {span(state.age_s)} old"
    return what + (f" ({state.error})" if state.error else "")


class DisksFree:
    """How much room there is on the disks of some folders."""

    def __init__(self, folders: Iterable[Path]) -> None:
        self._aside = {folder: Aside(_LOOK_MOST_S) for folder in folders}
        self._found: dict[Path, tuple[int, int]] = {}

    async def look(self) -> dict[Path, int]:
        """Free bytes by disk (the first of the folders on it), without those that can't be looked at.

        A disk that does not answer, as a network's may not, has what it had.
        """
        await asyncio.gather(*map(self._look, self._aside))
        free: dict[int, tuple[Path, int]] = {}
        for folder in self._aside:
            if found := self._found.get(folder):
                free.setdefault(found[0], (folder, found[1]))
        return dict(free.values())

    async def _look(self, folder: Path) -> None:
        try:
            self._found[folder] = await self._aside[folder].run(partial(_free, folder))
        except TimeoutError:
            pass
        except OSError:
            self._found.pop(folder, None)


def _free(folder: Path) -> tuple[int, int]:
    """Which disk it is on, and the bytes that are free there."""
    return folder.stat().st_dev, shutil.disk_usage(folder).free
