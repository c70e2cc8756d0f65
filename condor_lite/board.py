"""The leaderboard as scoring keeps it: the window sums in memory, and what is published of them."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import structlog

from condor_lite.clock import Clock
from condor_lite.config import Config
from condor_lite.game.calibration import BriefSums, RoundCalibration, brief_rows
from condor_lite.game.entities import Leaderboard, Model, Round, RoundScores, RuleInfo, Window
from condor_lite.game.leaderboard import is_gone, reference_benchmark
from condor_lite.game.windows import HOUR_S, WindowSums, window_start_s
from condor_lite.storage import repositories, rescores, scores
from condor_lite.storage.calibration import load_brief_rows
from condor_lite.storage.database import Database

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
            await asyncio.to_thread(self._sums.add, key, at_s, result)
            await asyncio.to_thread(self._calibration.add, brief_rows(key, at_s, added, times))

    async def publish_anew(self) -> None:
        """A leaderboard from all that is stored now; it is not kept."""
        self._sums = self._snapshot = self._mixture = None
        await self.publish(changed=True)

    async def publish(self, changed: bool) -> None:
        """A new leaderboard where it differs: scores, models or the hour changed. At times it is stored."""
        now_s = self._clock.now()
        await self.load_models()
        benchmark = reference_benchmark(self.models, now_s)
        if self._sums is None or self._sums.benchmark != benchmark:
            if self._sums is None:
                self._calibration = await self._calibrated(now_s)
            self._sums = await self._summed(benchmark, now_s)
            changed = True
        models = [(model.model_no, model.info, is_gone(model, now_s)) for model in self.models]
        shown = (now_s // HOUR_S, models)
        snapshot = now_s // self._config.scoring.snapshot_interval_s
        if changed or shown != self._shown or snapshot != self._snapshot:
            most = self._config.game.max_models_per_player
            briefs = await asyncio.to_thread(self._calibration.briefs, now_s)
            self._leaderboard = await asyncio.to_thread(
                self._sums.leaderboard, now_s, self.models, most, briefs
            )
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

    async def _summed(self, benchmark: int | None, now_s: float) -> WindowSums:
        """The sums of all that is stored."""
        sums = WindowSums(
            self._config.game.settings, self._info, scorer_version=self._version, benchmark=benchmark
        )
        since_s = window_start_s(Window.ANCHOR, now_s)
        while since_s <= now_s:  # by the hour: a week of a large game is millions of rows
            until_s = since_s + HOUR_S
            rows = await self._db.read(scores.load_window_rows, self._version, since_s, until_s)
            await asyncio.to_thread(sums.load, rows)
            since_s = until_s
        return sums

    async def _calibrated(self, now_s: float) -> BriefSums:
        """The calibration of all that is stored; it does not depend on the benchmark."""
        sums = BriefSums(self._config.game.settings)
        numbers = [model.model_no for model in self.models]
        since_s = window_start_s(Window.ANCHOR, now_s)
        for setting in self._config.game.settings:
            for at in range(0, len(numbers), _MODELS):
                some = numbers[at : at + _MODELS]
                briefs = await self._db.read(
                    load_brief_rows, self._version, setting, (some[0], some[-1]), since_s
                )
                await asyncio.to_thread(sums.add, briefs)
        return sums

    def tell_leader(self) -> None:
        standings = self._leaderboard.standings if self._leaderboard else ()
        first = next((standing for standing in standings if standing.rank == 1), None)
        if first is not None and first.model.model_no != self._leader:
            self._leader = first.model.model_no
            anchor = first.overall.anchor
            score = None if anchor is None else round(anchor, 2)
            log.info("leader", model=first.model.info.model_name, score=score)
