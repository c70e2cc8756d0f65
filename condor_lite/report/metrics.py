"""The game in numbers for Prometheus. One registry a game, and no label that participants could multiply."""

from __future__ import annotations

import platform
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector

from condor_lite import __version__
from condor_lite.game.entities import AnswerStatus, Round, RoundStatus
from condor_lite.news import (
    AnswersInvalid,
    AnswerStored,
    LoopLate,
    RoundClosed,
    RoundSettled,
    RoundsNotHeld,
    RoundsOpened,
    ScoresCycled,
)
from condor_lite.prices.feed import FeedState
from condor_lite.report.answers import horizon_label
from condor_lite.report.live import Live, Vitals

PREFIX = "condor_lite_"
TEXT = "text/plain"
OPENMETRICS = "application/openmetrics-text"

_ANSWER_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0)
_LATE_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)
_CYCLE_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0)
_SETTING = ("asset", "horizon", "step")


@dataclass(frozen=True, slots=True)
class Now:
    """What is looked up at a scrape. `free_bytes`: of the database's file; None where it can't be read."""

    vitals: Vitals
    feeds: Iterable[FeedState]
    connected: int
    streams: int
    free_bytes: int | None


class Metrics:
    """Counts what happens in the game from now on."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self.registry = registry = CollectorRegistry(auto_describe=False)

        def counter(name: str, doc: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(PREFIX + name, doc, labels, registry=registry)

        def histogram(name: str, doc: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(PREFIX + name, doc, registry=registry, buckets=buckets)

        self._rounds = counter("rounds", "Rounds that came to a status.", (*_SETTING, "status"))
        answers = counter("answers", "Answers stored, or missing (ABSENT).", ("status",))
        self._answers = {status: answers.labels(status) for status in AnswerStatus}
        self._invalid = counter("answers_invalid", "Stored answers of status SUCCESS that became FAILED.")
        self._answer_s = histogram("answer_seconds", "How long models took for their answers.", _ANSWER_S)
        self._stored_s = histogram(
            "answer_stored_seconds", "From a round's start until an answer to it is on disk.", _ANSWER_S
        )
        self._lag_s = histogram("round_start_lag_seconds", "How late rounds were opened.", _LATE_S)
        self._cycle_s = histogram("score_cycle_seconds", "Duration of the scoring cycles.", _CYCLE_S)
        self._loop_s = histogram("event_loop_delay_seconds", "How late the event loop was.", _LATE_S)
        for setting in live.config.game.settings:
            labels = (setting.asset, horizon_label(setting.horizon_s), horizon_label(setting.step_s))
            for status in RoundStatus:
                self._rounds.labels(*labels, status)
        ProcessCollector(registry=registry)
        self._listen()

    def _listen(self) -> None:
        listen = self._live.news.listen
        listen(RoundsOpened, self._opened)
        listen(RoundsNotHeld, lambda it: self._count(it.rounds))
        listen(RoundClosed, self._closed)
        listen(RoundSettled, lambda it: self._count([it.round]))
        listen(AnswerStored, self._stored)
        listen(AnswersInvalid, lambda it: self._invalid.inc(it.count))
        listen(ScoresCycled, lambda it: self._cycle_s.observe(it.took_s))
        listen(LoopLate, lambda it: self._loop_s.observe(it.by_s))

    def _opened(self, it: RoundsOpened) -> None:
        self._count(it.rounds)
        for round_ in it.rounds:
            late_s = (round_.performed_at_ms or 0) / 1000 - round_.scheduled_at_s
            self._lag_s.observe(max(self._live.clock.wall_s(late_s), 0.0))

    def _closed(self, it: RoundClosed) -> None:
        self._count([it.round])
        self._answers[AnswerStatus.ABSENT].inc(it.round.absent)

    def _stored(self, it: AnswerStored) -> None:
        self._answers[it.status].inc()
        self._stored_s.observe(it.after_s)
        if it.status is AnswerStatus.SUCCESS:
            self._answer_s.observe(it.exec_time_us / 1e6)

    def _count(self, rounds: Iterable[Round]) -> None:
        for it in rounds:
            horizon, step = horizon_label(it.horizon_s), horizon_label(it.step_s)
            self._rounds.labels(it.asset, horizon, step, it.status).inc()

    def text(self, accept: str, now: Now) -> tuple[bytes, str]:
        """All of it as this client reads it, and the media type. Takes milliseconds; may run in a thread."""
        path = self._live.config.storage.path
        both = _Both(self.registry, lambda: _families(now, path))
        if OPENMETRICS in accept:
            text = openmetrics.generate_latest(both)  # type: ignore[no-untyped-call]
            return text, openmetrics.CONTENT_TYPE_LATEST
        return generate_latest(both), CONTENT_TYPE_PLAIN_0_0_4


class _Both(Collector):
    """The registry's families, then those of this moment."""

    def __init__(self, registry: Collector, more: Callable[[], Iterable[Metric]]) -> None:
        self._registry = registry
        self._more = more

    def collect(self) -> Iterator[Metric]:
        for family in self._registry.collect():
            family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
            yield family
        yield from self._more()


def _families(now: Now, database: Path) -> Iterator[Metric]:
    def gauge(name: str, doc: str, value: float) -> GaugeMetricFamily:
        return GaugeMetricFamily(PREFIX + name, doc, value)

    yield gauge("pool_waiting_answers", "Answers that wait for a scoring process.", now.vitals.pool_waiting)
    yield gauge("pool_workers", "Processes that score.", now.vitals.workers)
    yield gauge("journal_waiting_entries", "Writes that are not on disk yet.", now.vitals.journal_waiting)
    age = GaugeMetricFamily(PREFIX + "feed_age_seconds", "Age of the newest price.", labels=["asset"])
    for state in now.feeds:
        if state.age_s is not None:
            age.add_metric([state.asset], state.age_s)
    yield age
    yield gauge("database_bytes", "Size of the database's file.", _size(database))
    yield gauge("database_wal_bytes", "Size of its write-ahead log.", _size(Path(f"{database}-wal")))
    if (backup := now.vitals.backup) is not None:
        failing = backup.failure is not None
        yield gauge("backup_failing", "Whether the last try to make a backup failed.", failing)
        if backup.age_s is not None:
            yield gauge("backup_age_seconds", "Age of the newest backup.", backup.age_s)
    if now.free_bytes is not None:
        yield gauge("database_free_bytes", "Unused bytes inside of the file.", now.free_bytes)
    up = GaugeMetricFamily(PREFIX + "service_up", "Whether a part of the game runs.", labels=["service"])
    restarts = CounterMetricFamily(
        PREFIX + "service_restarts", "Failures after which a part was started again.", labels=["service"]
    )
    for service in now.vitals.services:
        up.add_metric([service.name], service.failure is None)
        restarts.add_metric([service.name], service.restarts)
    yield up
    yield restarts
    yield gauge("models_connected", "Models that are connected and not paused.", now.connected)
    yield gauge("event_streams", "Readers of /events.", now.streams)
    about = {
        "version": __version__,
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
    }
    yield InfoMetricFamily(PREFIX + "build", "What runs.", about)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
