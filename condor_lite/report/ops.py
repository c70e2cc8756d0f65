"""Family 3: operations."""

from __future__ import annotations

import platform
import sqlite3
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from condor_lite import __version__
from condor_lite.errors import StorageError
from condor_lite.report import params
from condor_lite.report.answers import Health, NotReady, Readiness, Version
from condor_lite.report.context import Context
from condor_lite.report.metrics import Now
from condor_lite.report.params import NoParams
from condor_lite.report.replies import Reply, pack
from condor_lite.report.stream import Subscription
from condor_lite.storage import queries

_VERSION_FOR_S = 60
_FREE_FOR_S = 5.0


async def healthz(context: Context, sent: NoParams) -> Reply:
    """The process is alive."""
    return pack(Health("ok"))


async def readyz(context: Context, sent: NoParams) -> Reply:
    """Whether all parts of the game do what they should, and which do not."""
    problems = [problem.what for problem in context.live.problems()]
    try:
        await queries.is_readable(context.readers)
    except StorageError as error:
        problems.append(f"the database can't be read: {error}")
    if problems:
        return pack(NotReady("not ready", "; ".join(problems), problems), status=503)
    return pack(Readiness("ready", []))


async def version(context: Context, sent: NoParams) -> Reply:
    """Which program this is."""
    return pack(
        Version(
            name="condor-lite",
            version=__version__,
            python=platform.python_version(),
            sqlite=sqlite3.sqlite_version,
            game=context.live.config.game.name,
        ),
        _VERSION_FOR_S,
    )


@dataclass(frozen=True, slots=True)
class MetricsParams:
    accept: str = field(default="", metadata=params.header("Accept"))


async def metrics(context: Context, sent: MetricsParams) -> Reply:
    """The game in numbers, for Prometheus."""
    live = context.live
    free_bytes = None
    with suppress(StorageError):
        ask = partial(queries.free_bytes, context.readers)
        free_bytes = await context.remembered("free_bytes", _FREE_FOR_S, ask)
    now = Now(live.vitals(), live.feeds(), len(live.connected()), context.stream.readers, free_bytes)

    def work() -> Reply:
        text, media_type = context.metrics.text(sent.accept, now)
        return pack(text, media_type=media_type)

    return await context.in_thread(work)


@dataclass(frozen=True, slots=True)
class EventsParams:
    last_event_id: str | None = field(
        default=None,
        metadata=params.header("Last-Event-ID", "what a client got last: it is sent all that it missed"),
    )
    after: str | None = field(
        default=None,
        metadata=params.word("the same where a client can't send the header"),
    )


async def events(context: Context, sent: EventsParams) -> Subscription:
    """What happens in the game, as it happens: server-sent events.

    Each has the name of one of the kinds below, and one JSON object as its data. A client that comes back is
    sent what it missed; where that is too much, or the program was started anew, `reset`.
    """
    return Subscription(sent.last_event_id or sent.after)
