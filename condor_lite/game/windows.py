"""Rolling windows from hourly sums (SCORING.md, "Windows"): day 100 costs the same as day 1.

Every scored round is added to sums by (setting, hour of `resolvable_at`, model). As windows start on the
hour, and the longest is 168 hours, 169 slots of an hour hold all that a leaderboard needs: 8 kB a model and
setting.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

from condor_lite.game.calibration import BriefSums
from condor_lite.game.entities import Brief, Leaderboard, Model, RoundScores, RuleInfo, Setting, Window
from condor_lite.game.leaderboard import WindowTable, rank
from condor_lite.game.rounds import gain
from condor_lite.game.uncertainty import block_count, standard_error

HOUR_S = 3600
# The hours of the longest window and the one in progress. An hour's slot is its number modulo this.
SLOTS = Window.ANCHOR.hours + 1
# The first place on the model axis holds the game itself: all rounds that it scored.
GAME = 0


class Sum(IntEnum):
    """What is summed, over the rounds of an hour that count for the model."""

    ROUNDS = 0  # how many (SCORING.md's n; the game's: N)
    GAIN = 1  # m - raw as it counts; raw - m where higher is better
    UNIT = 2  # what sums of gains are divided by: a, or 1 where the rule is not capped
    ANSWERED = 3  # how many have a raw score
    RAW = 4  # raw scores of rounds that the benchmark answered too
    BENCHMARK = 5  # the benchmark's raw scores of the same rounds


@dataclass(frozen=True, slots=True, eq=False)
class WindowRows:
    """Stored scores for the rebuild: columns of equal length, one row a (round, model).

    Arrays or sequences; in `raw`, None or NaN where the model gave no valid answer.
    """

    asset: ArrayLike
    horizon_s: ArrayLike
    step_s: ArrayLike
    resolvable_at_s: ArrayLike
    round_no: ArrayLike
    no_move: ArrayLike
    median: ArrayLike
    model_no: ArrayLike
    raw: ArrayLike | Sequence[float | None]
    counted: ArrayLike


@dataclass(frozen=True, slots=True, eq=False)
class HourSums:
    """One setting's sums of an hour, as they are kept: float64[len(Sum), 1 + models], the game's own first.

    `briefs`: float32[4, models], the same models' in `BriefSums`.
    """

    setting: Setting
    hour: int  # hours since the epoch
    model_no: NDArray[np.int64]
    sums: NDArray[np.float64]
    briefs: NDArray[np.float32]

    @property
    def rounds(self) -> int:
        """How many rounds the game scored."""
        return int(self.sums[Sum.ROUNDS, GAME])


def window_start_s(window: Window, now_s: float) -> int:
    """The full hour at which the window starts: it holds the rounds with `resolvable_at` from then on."""
    return (math.floor(now_s) // HOUR_S - window.hours) * HOUR_S


class WindowSums:
    """The hourly sums of one scorer version, for the settings of the current config.

    `benchmark`: the `model_no` that skill is measured against (`reference_benchmark`), fixed for the life of
    the sums: when it changes, make them anew and `load` them. Not for use from two threads at once.
    """

    def __init__(
        self,
        settings: Sequence[Setting],
        info: RuleInfo,
        *,
        scorer_version: int,
        benchmark: int | None = None,
    ) -> None:
        self.info = info
        self.scorer_version = scorer_version
        self.benchmark = benchmark
        self._keys = tuple(setting.key for setting in settings)
        self._by_key = {setting.key: place for place, setting in enumerate(settings)}
        self._by_parts = {(s.asset, s.horizon_s, s.step_s): place for place, s in enumerate(settings)}
        self._weights = np.array([setting.weight for setting in settings], dtype=float)
        self._longest_horizon_s = max((setting.horizon_s for setting in settings), default=0)
        self._columns: dict[int, int] = {}
        self._newest_hour = 0
        # The models of one hour lie side by side: adding a round and summing hours are operations on rows.
        self._sums = np.zeros((len(Sum), len(settings), SLOTS, 1))

    def add(self, setting_key: str, resolvable_at_s: int, scores: RoundScores) -> None:
        """Add a round that was scored just now; the caller sees to it that a round is added once.

        Rounds of other settings, or too old for any window, count for nothing.
        """
        setting = self._by_key.get(setting_key)
        hour = resolvable_at_s // HOUR_S
        if setting is None or not self._enter(hour):
            return
        model_no = np.fromiter(scores.models, dtype=np.int64, count=len(scores.models))
        raw = np.array([score.raw for score in scores.models.values()], dtype=np.float64)
        counted = np.array([score.counted for score in scores.models.values()], dtype=np.float64)
        columns = self._places(model_no)
        self._accumulate(
            self._starts(np.array([setting]), np.array([hour])),
            np.zeros(len(model_no), dtype=np.intp),
            columns,
            unit=np.array([scores.no_move]),
            gains=gain(scores.median, counted, self.info),
            raw=raw,
            benchmark=model_no == self.benchmark,
        )

    def load(self, rows: WindowRows) -> None:
        """Add stored rounds, in any order, in as many calls as suit; a round's rows must come in one call."""
        _, first, of_round = np.unique(np.asarray(rows.round_no), return_index=True, return_inverse=True)
        parts = (np.asarray(column)[first].tolist() for column in (rows.asset, rows.horizon_s, rows.step_s))
        setting = np.array([self._by_parts.get(part, -1) for part in zip(*parts, strict=True)], dtype=np.intp)
        hour = np.asarray(rows.resolvable_at_s, dtype=np.int64)[first] // HOUR_S
        if not (setting >= 0).any():
            return
        self._enter(int(hour[setting >= 0].max()))
        held = (setting >= 0) & (hour > self._newest_hour - SLOTS)
        used = np.flatnonzero(held[of_round])
        # In one order for all models, so that equal models get equal sums, to the last bit.
        used = used[np.argsort(of_round[used], kind="stable")]
        first, setting, hour = first[held], setting[held], hour[held]
        of_round = (np.cumsum(held) - 1)[of_round[used]]
        model_no = np.asarray(rows.model_no, dtype=np.int64)[used]
        median, raw, counted = (
            np.asarray(column, dtype=np.float64)[used] for column in (rows.median, rows.raw, rows.counted)
        )
        columns = self._places(model_no)
        self._accumulate(
            self._starts(setting, hour),
            of_round,
            columns,
            unit=np.asarray(rows.no_move, dtype=np.float64)[first],
            gains=gain(median, counted, self.info),
            raw=raw,
            benchmark=model_no == self.benchmark,
        )

    def rounds(self, setting: Setting, hour: int) -> int:
        """How many rounds are in the sums of an hour; 0 where it is not held."""
        if not self._newest_hour - SLOTS < hour <= self._newest_hour:
            return 0
        return int(self._sums[Sum.ROUNDS, self._by_key[setting.key], hour % SLOTS, GAME])

    def of_hour(self, setting: Setting, hour: int, briefs: BriefSums) -> HourSums:
        """The sums of an hour that is held, and those of `briefs`."""
        sums = self._sums[:, self._by_key[setting.key], hour % SLOTS]
        taking_part = {no: column for no, column in self._columns.items() if sums[Sum.ROUNDS, column]}
        model_no = np.array(list(taking_part), np.int64)
        return HourSums(
            setting,
            hour,
            model_no,
            sums[:, [GAME, *taking_part.values()]],
            briefs.of_hour(setting.key, hour, model_no),
        )

    def put(self, kept: HourSums) -> None:
        """Let an hour's sums be these, as `of_hour` gave them."""
        self._enter(kept.hour)
        if kept.hour > self._newest_hour - SLOTS:
            columns = [GAME, *self._places(kept.model_no)]
            self._sums[:, self._by_key[kept.setting.key], kept.hour % SLOTS][:, columns] = kept.sums

    def leaderboard(
        self,
        now_s: float,
        models: Sequence[Model],
        max_per_player: int = 0,
        calibration: Mapping[int, Brief] | None = None,
    ) -> Leaderboard:
        """The standings of `models` (all that the game knows) at `now_s`, from the sums alone."""
        return rank(
            self.table(now_s),
            models,
            now_s,
            scorer_version=self.scorer_version,
            max_per_player=max_per_player,
            calibration=calibration,
        )

    def table(self, now_s: float) -> WindowTable:
        """Every window's scores, skill and errors, for the windows that end at `now_s`."""
        self._enter(math.floor(now_s) // HOUR_S)
        width = len(self._columns)
        by_setting = np.empty((len(Window), len(self._keys), width))
        overall, errors, skill = (np.empty((len(Window), width)) for _ in range(3))
        totals = np.zeros(self._sums.shape[:2] + self._sums.shape[3:])
        summed_h = -1
        for place, window in enumerate(Window):
            totals += self._span(self._sums, summed_h + 1, window.hours)
            summed_h = window.hours
            own, game = totals[..., GAME + 1 : width + 1], totals[..., GAME, None]
            factors = self._factors(own, game)
            with np.errstate(invalid="ignore"):
                by_setting[place] = np.where(own[Sum.ROUNDS] > 0, factors * own[Sum.GAIN], math.nan)
            shares = self._shares(game)
            counts = (own[Sum.ROUNDS] * (shares > 0)).any(axis=0)
            overall[place] = np.where(counts, (shares * factors * own[Sum.GAIN]).sum(axis=0), math.nan)
            skill[place] = self._skill(own)
            blocks = self._blocks(window)[..., GAME + 1 : width + 1]
            contributions = (blocks[Sum.GAIN] * (shares * factors)[:, None]).sum(axis=0)
            taken = (blocks[Sum.ROUNDS] * (shares > 0)[:, None] > 0).any(axis=0)
            errors[place] = standard_error(contributions, taken)
        # The last window is the anchor, by which neighbours in the ranking are compared.
        return WindowTable(
            setting_keys=self._keys,
            columns={model_no: column - 1 for model_no, column in self._columns.items()},
            overall=overall,
            by_setting=by_setting,
            standard_error=errors,
            skill=skill,
            rounds=own[Sum.ROUNDS].sum(axis=0),
            answered=own[Sum.ANSWERED].sum(axis=0),
            block_rounds=blocks[Sum.ROUNDS],
            block_gains=blocks[Sum.GAIN],
            gain_weights=np.divide(
                shares[:, 0], game[Sum.UNIT, :, 0], out=np.zeros(len(shares)), where=shares[:, 0] > 0
            ),
        )

    def _enter(self, hour: int) -> bool:
        """Let time reach `hour`, emptying the slots it takes over. False if it is too old to be held."""
        for passed in range(max(self._newest_hour + 1, hour - SLOTS + 1), hour + 1):
            self._sums[:, :, passed % SLOTS] = 0
        self._newest_hour = max(self._newest_hour, hour)
        return hour > self._newest_hour - SLOTS

    def _places(self, model_no: NDArray[np.int64]) -> NDArray[np.intp]:
        """The models' columns, new ones for new models."""
        with suppress(KeyError):  # mostly they are known
            return np.array([self._columns[no] for no in model_no.tolist()], dtype=np.intp)
        distinct, of_model = np.unique(model_no, return_inverse=True)
        wanted = dict.fromkeys(distinct.tolist(), 0)
        if 1 + len(self._columns | wanted) > self._sums.shape[-1]:
            self._grow(wanted)
        columns = [self._columns.setdefault(no, len(self._columns) + 1) for no in wanted]
        return np.array(columns, dtype=np.intp)[of_model]

    def _grow(self, wanted: dict[int, int]) -> None:
        """Make room for the wanted models; others without a round in the held hours lose their columns."""
        held = self._sums[Sum.ROUNDS].any(axis=(0, 1))
        kept = {no: column for no, column in self._columns.items() if held[column] or no in wanted}
        needed = 1 + len(kept | wanted)
        grown = np.zeros((*self._sums.shape[:-1], max(16, needed + needed // 4)))
        grown[..., : 1 + len(kept)] = self._sums[..., [GAME, *kept.values()]]
        self._sums = grown
        self._columns = {no: column for column, no in enumerate(kept, start=GAME + 1)}

    def _starts(self, setting: NDArray[np.intp], hour: NDArray[np.int64]) -> NDArray[np.intp]:
        """Where the models of each (setting, hour) start in a flattened sum."""
        starts: NDArray[np.intp] = (setting * SLOTS + hour % SLOTS) * self._sums.shape[-1]
        return starts

    def _accumulate(
        self,
        starts: NDArray[np.intp],
        of_round: NDArray[np.intp],
        columns: NDArray[np.intp],
        *,
        unit: NDArray[np.float64],
        gains: NDArray[np.float64],
        raw: NDArray[np.float64],
        benchmark: NDArray[np.bool_],
    ) -> None:
        """Add rounds (`starts`, `unit`: one number each) and their models (the rest: one number a row).

        `of_round`: the place of a row's round; `benchmark`: whether a row is the benchmark's.
        """
        if not self.info.capped:
            unit = np.ones_like(unit)
        benchmark_raw = np.full(len(starts), math.nan)
        benchmark_raw[of_round[benchmark]] = raw[benchmark]
        both = np.isfinite(raw) & np.isfinite(benchmark_raw[of_round])
        values = {
            Sum.ROUNDS: np.ones_like(raw),
            Sum.GAIN: gains,
            Sum.UNIT: unit[of_round],
            Sum.ANSWERED: np.isfinite(raw).astype(np.float64),
            Sum.RAW: np.where(both, raw, 0.0),
            Sum.BENCHMARK: np.where(both, benchmark_raw[of_round], 0.0),
        }
        # add.at: in a rebuild many of the rows belong to one sum.
        for kind, value in values.items():
            np.add.at(self._sums[kind].reshape(-1), starts[of_round] + columns, value)
        for kind, value in ((Sum.ROUNDS, np.ones_like(unit)), (Sum.UNIT, unit)):
            np.add.at(self._sums[kind].reshape(-1), starts + GAME, value)

    def _span(self, sums: NDArray[np.float64], newest_h: int, oldest_h: int) -> NDArray[np.float64]:
        """Sums over the hours `oldest_h` to `newest_h` ago, both included; [..., setting, model].

        Sums of rows add every model's hours in the same order, so equal models stay equal to the last bit (a
        matrix product would be as fast and not do so).
        """
        first, last = (self._newest_hour - oldest_h) % SLOTS, (self._newest_hour - newest_h) % SLOTS
        if first <= last:
            return np.asarray(sums[..., first : last + 1, :].sum(axis=-2))
        return np.asarray(sums[..., first:, :].sum(axis=-2) + sums[..., : last + 1, :].sum(axis=-2))

    def _blocks(self, window: Window) -> NDArray[np.float64]:
        """[ROUNDS and GAIN, setting, block, model]; the hour in progress belongs to the newest block."""
        count = block_count(window.hours, self._longest_horizon_s)
        sums = self._sums[: Sum.GAIN + 1]
        blocks = np.zeros((*sums.shape[:2], count, sums.shape[-1]))
        for block in range(count):
            newest_h = block * window.hours // count
            oldest_h = (block + 1) * window.hours // count
            blocks[:, :, block] = self._span(sums, newest_h + 1 if block else 0, oldest_h)
        return blocks

    def _factors(self, own: NDArray[np.float64], game: NDArray[np.float64]) -> NDArray[np.float64]:
        """What turns a model's sum of gains into its score: 100 * 8n/(7n + N) / sum(a); [setting, model]."""
        rounds: NDArray[np.float64] = own[Sum.ROUNDS]
        divisor = (7 * rounds + game[Sum.ROUNDS]) * own[Sum.UNIT]
        factors: NDArray[np.float64] = np.zeros(rounds.shape)
        np.divide(100 * 8 * rounds, divisor, out=factors, where=rounds > 0)
        return factors

    def _shares(self, game: NDArray[np.float64]) -> NDArray[np.float64]:
        """The settings' weights among those with a scored round, summing to 1; [setting, 1].

        A round of the game, not of the model: in a setting that it has not taken part in yet, a newcomer is
        in the middle, as the factor has it. Otherwise a few settings would do for a lucky lead.
        """
        weights = np.where(game[Sum.ROUNDS] > 0, self._weights[:, None], 0.0)
        total = float(weights.sum())
        return weights / total if total > 0 else weights

    def _skill(self, own: NDArray[np.float64]) -> NDArray[np.float64]:
        """1 - sum(raw) / sum(raw of the benchmark), where higher is better the other way round; [model]."""
        raw, benchmark = own[Sum.RAW].sum(axis=0), own[Sum.BENCHMARK].sum(axis=0)
        ratio = np.divide(raw, benchmark, out=np.full_like(raw, math.nan), where=benchmark > 0)
        return np.asarray(1 - ratio if self.info.lower_is_better else ratio - 1)
