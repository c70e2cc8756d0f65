"""The leaderboard as scoring keeps it: the window sums in memory, and what is published of them."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import structlog

from condor_lite.clock import Clock
from condor_lite.config import Config
from condor_lite.game.calibration import BriefSums, RoundCalibration, brief_rows
from condor_lite.game.entities import Leaderboard, Model, Round, RoundScores, RuleInfo, Setting, Window
from condor_lite.game.leaderboard import is_gone, reference_benchmark
from condor_lite.game.windows import HOUR_S, HourSums, WindowSums, window_start_s
from condor_lite.storage import repositories, rescores, scores
from condor_lite.storage.calibration import load_brief_rows
from condor_lite.storage.database import Database
from condor_lite.storage.hours import hours_to_sum, load_hours, save_hours

log = structlog.get_logger()

_MODELS = 64  # whose calibration is read at a time: a week of them is some ten milliseconds


class Board:
    """One scorer version's sums and leaderboard. All of it can be made anew from the database."""

    def __init__(
        self,
        config: Config,
        clock: Clock,
        db: Database,
        info: RuleInfo,
        version: int,
        on_leaderboard: Callable[[Leaderboard], None],
    ) -> None:
        self._config = config
        self._clock = clock
        self._db = db
        self._info = info
        self._version = version
        self._on_leaderboard = on_leaderboard
        self._sums: WindowSums | None = None
        self._mixture: tuple[tuple[int, ...], int] | None = None
        self._calibration = BriefSums(config.game.settings)
        self._changed: set[tuple[str, int]] = set()  # settings' hours that are not kept as they are now
        self._kept_until: int | None = None
        self._leaderboard: Leaderboard | None = None
        self._leader: int | None = None
        self._shown: tuple[float, object] | None = None
        self._snapshot: float | None = None
        self.models: list[Model] = []
        self.published_s = -math.inf

    @property
    def is_current(self) -> bool:
        """Whether the sums hold all that is stored."""
        return self._sums is not None

    def distrust(self) -> None:
        """A round may be stored and not yet added: the sums are made anew."""
        self._sums = None

    async def load_models(self) -> None:
        self.models = await self._db.read(repositories.load_models)

    async def add(
        self, round_: Round, result: RoundScores, added: RoundCalibration, times: npt.NDArray[np.float64]
    ) -> None:
        """Add a round that was stored just now; `times` as in `brief_rows`."""
        if self._sums is not None:
            key, at_s = round_.setting.key, round_.resolvable_at_s
            try:
                self._changed.add((key, at_s // HOUR_S))
                await asyncio.to_thread(self._sums.add, key, at_s, result)
                await asyncio.to_thread(self._calibration.add, brief_rows(key, at_s, added, times))
            except BaseException:
                self.distrust()
                raise

    async def publish_anew(self) -> None:
        """A leaderboard from all that is stored now; it is not kept."""
        self._sums = self._snapshot = self._mixture = None
        await self.publish(changed=True)

    async def publish(self, changed: bool) -> None:
        """A new leaderboard where it differs: scores, models or the hour changed. At times it is stored."""
        now_s = self._clock.now()
        await self.load_models()
        benchmark = reference_benchmark(self.models, now_s)
        sums = self._sums
        if sums is None or sums.benchmark != benchmark:
            sums = self._sums = await self._rebuild(benchmark, now_s)
            changed = True
        models = [(model.model_no, model.info, is_gone(model, now_s)) for model in self.models]
        shown = (now_s // HOUR_S, models)
        snapshot = now_s // self._config.scoring.snapshot_interval_s
        if changed or shown != self._shown or snapshot != self._snapshot:
            most = self._config.game.max_models_per_player
            briefs = await asyncio.to_thread(self._calibration.briefs, now_s)
            self._leaderboard = await asyncio.to_thread(sums.leaderboard, now_s, self.models, most, briefs)
            if self._mixture is None or (any(self._mixture) and self._shown and self._shown[0] != shown[0]):
                # New rounds are all of this version: only time can change it, and only towards nothing.
                since_s = window_start_s(Window.ANCHOR, now_s)
                self._mixture = await self._db.read(rescores.mixture, self._version, since_s)
            carried, uncounted = self._mixture
            self._leaderboard = replace(self._leaderboard, mixed_versions=carried, uncounted=uncounted)
            self._shown, self.published_s = shown, now_s
            self._on_leaderboard(self._leaderboard)
            if self._snapshot is not None and snapshot != self._snapshot:
                await self._db.write(scores.save_leaderboard, self._leaderboard, True)
            self._snapshot = snapshot

    async def keep(self) -> None:
        """Store the sums of the hours that have passed, where rounds have come to them."""
        hour = int(self._clock.now()) // HOUR_S
        if self._sums is None or hour == self._kept_until:
            return
        sums, settings = self._sums, self._config.game.settings
        passed = {place for place in self._changed if place[1] < hour}
        for past in sorted({at for _, at in passed if at >= hour - Window.ANCHOR.hours}):
            new = [one for one in settings if (one.key, past) in passed and sums.rounds(one, past)]
            if new:
                made = await asyncio.to_thread(_taken, sums, self._calibration, new, past)
                await self._db.write(save_hours, self._version, sums.benchmark, made)
        self._changed -= passed
        self._kept_until = hour

    async def _rebuild(self, benchmark: int | None, now_s: float) -> WindowSums:
        """Make the sums of all that is stored: kept ones of whole hours, the others from their rows."""
        settings = self._config.game.settings
        sums = WindowSums(settings, self._info, scorer_version=self._version, benchmark=benchmark)
        calibration = BriefSums(settings)
        since_s = window_start_s(Window.ANCHOR, now_s)
        missing = await self._db.read(hours_to_sum, self._version, benchmark, settings, since_s)
        if missing:
            await self._add_briefs(calibration, min(missing))
        self._calibration, self._changed, self._kept_until = calibration, set(), None
        while since_s <= now_s:  # by the hour: a week of a large game is millions of rows
            if since_s in missing:
                rows = await self._db.read(scores.load_window_rows, self._version, since_s, since_s + HOUR_S)
                await asyncio.to_thread(sums.load, rows)
                self._changed.update((setting.key, int(since_s) // HOUR_S) for setting in settings)
            else:
                hours = await self._db.read(load_hours, self._version, settings, since_s)
                await asyncio.to_thread(_put, sums, calibration, hours)
            since_s += HOUR_S
        return sums

    async def _add_briefs(self, sums: BriefSums, since_s: float) -> None:
        """Add the calibration that is stored from then on; it does not depend on the benchmark."""
        numbers = [model.model_no for model in self.models]
        for setting in self._config.game.settings:
            for at in range(0, len(numbers), _MODELS):
                some = numbers[at : at + _MODELS]
                briefs = await self._db.read(
                    load_brief_rows, self._version, setting, (some[0], some[-1]), since_s
                )
                await asyncio.to_thread(sums.add, briefs)

    def tell_leader(self) -> None:
        standings = self._leaderboard.standings if self._leaderboard else ()
        first = next((standing for standing in standings if standing.rank == 1), None)
        if first is not None and first.model.model_no != self._leader:
            self._leader = first.model.model_no
            anchor = first.overall.anchor
            score = None if anchor is None else round(anchor, 2)
            log.info("leader", model=first.model.info.model_name, score=score)


def _put(sums: WindowSums, calibration: BriefSums, hours: Iterable[HourSums]) -> None:
    for hour in hours:
        sums.put(hour)
        calibration.put(hour.setting.key, hour.hour, hour.model_no, hour.briefs)


def _taken(
    sums: WindowSums, calibration: BriefSums, settings: Iterable[Setting], hour: int
) -> list[HourSums]:
    return [sums.of_hour(setting, hour, calibration) for setting in settings]
