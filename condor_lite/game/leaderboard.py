"""Window scores -> standings: who has which rank, in which order (SCORING.md, "Ranks")."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from condor_lite.game.entities import Brief, Leaderboard, Model, Standing, Window, WindowScores
from condor_lite.game.uncertainty import probability_better

GONE_AFTER_S = 7 * 86400
_NOTHING = WindowScores()


@dataclass(frozen=True, slots=True, eq=False)
class WindowTable:
    """Every window's numbers of every model. Axes: window (in `Window`'s order), setting, block, model.

    NaN stands for "nothing to compute it from".
    """

    setting_keys: tuple[str, ...]
    columns: Mapping[int, int]  # model_no -> place on the model axis
    overall: NDArray[np.float64]  # [window, model]
    by_setting: NDArray[np.float64]  # [window, setting, model]
    standard_error: NDArray[np.float64]  # [window, model]
    skill: NDArray[np.float64]  # [window, model]
    rounds: NDArray[np.float64]  # [model], of the anchor window
    answered: NDArray[np.float64]  # [model], of the anchor window
    block_rounds: NDArray[np.float64]  # [setting, block, model], of the anchor window
    block_gains: NDArray[np.float64]  # [setting, block, model], of the anchor window
    gain_weights: NDArray[np.float64]  # [setting], what makes gains of different settings add up


def is_gone(model: Model, now_s: float) -> bool:
    """Not connected for 7 days: takes no rank, and from then on misses nothing."""
    return now_s - model.last_seen_at_s >= GONE_AFTER_S


def reference_benchmark(models: Iterable[Model], now_s: float) -> int | None:
    """The `model_no` that skill is measured against: the first benchmark by `model_id` that is not gone."""
    benchmarks = [model for model in models if model.info.benchmark and not is_gone(model, now_s)]
    return min(benchmarks, key=lambda model: model.info.model_id).model_no if benchmarks else None


def rank(
    table: WindowTable,
    models: Sequence[Model],
    now_s: float,
    *,
    scorer_version: int,
    max_per_player: int = 0,
    calibration: Mapping[int, Brief] | None = None,
) -> Leaderboard:
    """The leaderboard of `models`. `max_per_player`: how many of a player's models are ranked, 0: all.
    `calibration`: by `model_no`, of those that show any.
    """
    calibration = calibration or {}
    overall = _by_model(table.overall, table.columns)
    skill = _by_model(table.skill, table.columns)
    errors = _by_model(table.standard_error, table.columns)
    settings = _by_setting(table)

    def scores(model: Model) -> WindowScores:
        return overall.get(model.model_no, _NOTHING)

    def place(model: Model) -> tuple[int, float, float, float, int, str]:
        own = scores(model)
        group = 2 if is_gone(model, now_s) else 1 if own.anchor is None else 0
        tie = (model.joined_at_s, model.info.model_id)
        return (group, _descending(own.anchor), _descending(own.steady), _descending(own.recent), *tie)

    ordered = sorted(models, key=place)
    ranked = _ranked([model for model in ordered if place(model)[0] == 0], max_per_player)
    ranks = _competition_ranks(ranked, [place(model)[1:4] for model in ranked])
    window_ranks = {window: _window_ranks(ranked, window, overall) for window in Window}
    better = _p_better_than_next(table, ranked)

    standings = []
    for model in ordered:
        no = model.model_no
        column = table.columns.get(no)
        standings.append(
            Standing(
                model=model,
                rank=ranks.get(no),
                ranks={window: window_ranks[window].get(no) for window in Window},
                overall=scores(model),
                by_setting=settings.get(no, {}),
                rounds=0 if column is None else int(table.rounds[column]),
                answered=0 if column is None else int(table.answered[column]),
                skill=skill.get(no, _NOTHING),
                standard_error=errors.get(no, _NOTHING),
                p_better_than_next=better.get(no),
                calibration=calibration.get(no),
            )
        )
    return Leaderboard(math.floor(now_s), scorer_version, tuple(standings))


def _ranked(ordered: Sequence[Model], max_per_player: int) -> list[Model]:
    """Those of the models, given best first, that take a rank: no benchmarks, a player's best so many."""
    ranked = []
    taken: Counter[str] = Counter()
    for model in ordered:
        player = model.info.cruncher_id
        if model.info.benchmark or (max_per_player and taken[player] == max_per_player):
            continue
        taken[player] += 1
        ranked.append(model)
    return ranked


def _window_ranks(
    ranked: Sequence[Model], window: Window, overall: Mapping[int, WindowScores]
) -> dict[int, int]:
    """The ranks of those that take one, by one window alone."""
    values = {model.model_no: _descending(overall[model.model_no].of(window)) for model in ranked}
    present = sorted(
        (model for model in ranked if values[model.model_no] < math.inf), key=lambda m: values[m.model_no]
    )
    return _competition_ranks(present, [values[model.model_no] for model in present])


def _competition_ranks(ordered: Sequence[Model], values: Sequence[object]) -> dict[int, int]:
    """1, 2, 2, 4: equal values share the rank."""
    ranks: dict[int, int] = {}
    rank_now = 0
    for place, model in enumerate(ordered):
        if place == 0 or values[place] != values[place - 1]:
            rank_now = place + 1
        ranks[model.model_no] = rank_now
    return ranks


def _p_better_than_next(table: WindowTable, ranked: Sequence[Model]) -> dict[int, float | None]:
    """P(better than the next one), from the blocks and settings where both had the same rounds."""
    columns = np.array([table.columns[model.model_no] for model in ranked], dtype=np.intp)
    first, second = columns[:-1], columns[1:]
    rounds = table.block_rounds[..., first]
    weights = table.gain_weights[:, None, None]
    paired = (rounds > 0) & (rounds == table.block_rounds[..., second]) & (weights > 0)
    gains = (table.block_gains[..., first] - table.block_gains[..., second]) * weights
    differences = np.where(paired, gains, 0.0).sum(axis=0)
    better = probability_better(differences, paired.any(axis=0))
    return {
        model.model_no: None if math.isnan(value) else value
        for model, value in zip(ranked, better.tolist(), strict=False)
    }


def _by_model(values: NDArray[np.float64], columns: Mapping[int, int]) -> dict[int, WindowScores]:
    """[window, model] -> the windows' scores by `model_no`."""
    rows = values.T.tolist()
    return {model_no: _window_scores(rows[column]) for model_no, column in columns.items()}


class _BySetting(Mapping[str, WindowScores]):
    """A model's scores by setting, without settings that hold no scored round of it.

    Made when they are asked for: of a thousand models and a few settings, almost none are, and that many
    objects would cost as much as all the rest.
    """

    __slots__ = ("_keys", "_rows")

    def __init__(self, keys: tuple[str, ...], rows: NDArray[np.float64]) -> None:
        """`rows`: [setting, window]."""
        self._keys = keys
        self._rows = rows

    def __getitem__(self, key: str) -> WindowScores:
        if key not in self._keys:
            raise KeyError(key)
        values = self._rows[self._keys.index(key)].tolist()
        if math.isnan(values[-1]):
            raise KeyError(key)
        return _window_scores(values)

    def __iter__(self) -> Iterator[str]:
        anchors = self._rows[:, -1].tolist()
        return (key for key, anchor in zip(self._keys, anchors, strict=True) if not math.isnan(anchor))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _by_setting(table: WindowTable) -> dict[int, Mapping[str, WindowScores]]:
    """By `model_no`."""
    rows = np.ascontiguousarray(table.by_setting.transpose(2, 1, 0))
    return {
        model_no: _BySetting(table.setting_keys, rows[column]) for model_no, column in table.columns.items()
    }


def _window_scores(values: Sequence[float]) -> WindowScores:
    recent, steady, anchor = (None if math.isnan(value) else value for value in values)
    return WindowScores(recent, steady, anchor)


def _descending(value: float | None) -> float:
    """A sort key: higher values first, absent ones last."""
    return math.inf if value is None else -value
