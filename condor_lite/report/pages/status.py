"""How the program does: what is wrong and what to do, services, prices, the database, versions."""

from __future__ import annotations

import platform
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from condor_lite import __version__
from condor_lite.errors import StorageError
from condor_lite.prices.feed import FeedState
from condor_lite.report.context import Context
from condor_lite.report.live import Problem
from condor_lite.report.pages.common import FOR_S, show
from condor_lite.report.params import NoParams
from condor_lite.report.replies import Reply
from condor_lite.storage import queries

_SKEW_S = 2.0
_SERVICES = {
    "predict": "feeds prices to the models and asks them",
    "models": "runs the models on this machine",
    "fleet": "keeps the connections to the models",
    "feed": "fetches prices",
    "score": "scores rounds when their horizon has passed",
    "rescore": "scores old rounds again when the host asks for it",
    "journal": "writes answers to the database",
    "upkeep": "forgets what is old, and tidies the database",
    "backup": "copies the database every few hours, where the host wants that",
    "report": "serves these pages and the API",
    "clock": "asks the sources of prices whether the machine's clock is right, where there is doubt",
    "control": "takes the host's commands",
    "alarms": "notices troubles, for the webhook",
    "webhook": "tells the host of troubles",
    "watchdog": "measures how late the event loop is",
}


@dataclass(frozen=True, slots=True)
class Files:
    """Sizes in bytes."""

    name: str
    size: int
    wal: int


async def page(context: Context, sent: NoParams) -> Reply:
    """How the program does."""
    return await context.remembered("status", FOR_S, partial(_page, context))


async def _page(context: Context) -> Reply:
    live = context.live
    vitals, feeds = live.vitals(), live.feeds()
    problems = list(live.problems())
    scorer, made = None, None
    try:
        scorer = await queries.current_scorer(context.readers)
        made = await context.ready()
    except StorageError as error:
        problems.append(
            Problem(
                f"the database can't be read: {error}",
                "Games go on; these pages don't. See to the disk, and to what else uses it.",
            )
        )
    connected = len(live.connected())
    return await show(
        context,
        "status.html",
        at="/status",
        found=problems,
        hints=_hints(feeds, connected, live.config.orchestrator.mode),
        vitals=vitals,
        services=_SERVICES,
        feeds=feeds,
        files=await context.in_thread(_files, live.config.storage.path),
        connected=connected,
        models=len(made.standings) if made else None,
        streams=context.stream.readers,
        started_s=live.started_at_s,
        leaderboard_s=live.leaderboard.created_at_s if live.leaderboard else None,
        rule=scorer["rule"] if scorer else live.config.scoring.rule,
        scorer_version=scorer["scorer_version"] if scorer else None,
        skew_s=_SKEW_S,
        versions={
            "condor-lite": __version__,
            "Python": platform.python_version(),
            "SQLite": sqlite3.sqlite_version,
            "System": f"{platform.system()} {platform.machine()}",
        },
    )


def _hints(feeds: Sequence[FeedState], connected: int, mode: str) -> list[Problem]:
    """What does not keep the game from being well, and still is worth a look."""
    found = []
    if not connected:
        where = "put a folder with a main.py into orchestrator.models" if mode == "local" else "deploy one"
        found.append(Problem("no model is connected", f"Rounds are asked, and nobody answers: {where}."))
    for source, skew_s in {feed.source: feed.skew_s for feed in feeds}.items():
        if skew_s is not None and abs(skew_s) > _SKEW_S:
            which = "ahead of" if skew_s > 0 else "behind"
            found.append(
                Problem(
                    f"the clock of {source} is {abs(skew_s):.0f} s {which} this machine's",
                    "Have this machine's clock kept by NTP: rounds begin by it.",
                )
            )
    coming = [feed.asset for feed in feeds if feed.history < 1]
    if coming:
        found.append(
            Problem(
                f"the history of {', '.join(coming)} is still on its way",
                "Nothing to do: models get it as it comes, and rounds are held meanwhile.",
            )
        )
    return found


def _files(path: Path) -> Files:
    def size(file: Path) -> int:
        try:
            return file.stat().st_size
        except OSError:
            return 0

    return Files(path.name, size(path), size(path.with_name(f"{path.name}-wal")))
