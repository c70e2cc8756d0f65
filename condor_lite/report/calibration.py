"""Whether a model's forecasts mean what they say, for its page: from stored sums, never from its answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from sqlite3 import Row

import numpy as np
import numpy.typing as npt

from condor_lite.game.calibration import (
    FEWEST_TIMES,
    WIDTH,
    Estimate,
    block_of_hour,
    summarise,
)
from condor_lite.game.entities import Leaderboard, Setting, Window
from condor_lite.game.uncertainty import block_count
from condor_lite.game.windows import HOUR_S, window_start_s
from condor_lite.report.answers import CalibrationEstimate, ModelCalibration
from condor_lite.report.context import Context
from condor_lite.storage import calibration


async def calibrations(
    context: Context, leaderboard: Leaderboard | None, model_no: int
) -> tuple[ModelCalibration, Mapping[str, ModelCalibration]]:
    """Over all settings of the current config and by setting, in the leaderboard's anchor window."""
    if leaderboard is None:
        return _report(0, np.zeros((0, WIDTH))), {}
    settings = context.live.config.game.settings
    rows = await calibration.of_model(
        context.readers,
        leaderboard.scorer_version,
        model_no,
        settings,
        window_start_s(Window.ANCHOR, leaderboard.created_at_s),
    )
    return await context.in_thread(_calibrations, rows, settings, leaderboard.created_at_s)


def _calibrations(
    rows: Sequence[Row], settings: Sequence[Setting], now_s: int
) -> tuple[ModelCalibration, Mapping[str, ModelCalibration]]:
    count = block_count(Window.ANCHOR.hours, max(setting.horizon_s for setting in settings))
    blocks: dict[str, npt.NDArray[np.float64]] = {}
    times: dict[str, int] = {}
    for row, sums in zip(rows, calibration.sums_of(rows), strict=True):
        key = Setting(row["asset"], row["horizon_s"], row["step_s"]).key
        # Without blocks (the horizon is longer than the window) there is no error, but a value.
        own = blocks.setdefault(key, np.zeros((max(count, 1), WIDTH)))
        own[block_of_hour((now_s - row["hour_s"]) // HOUR_S, len(own))] += sums
        times[key] = times.get(key, 0) + row["times"]
    total = np.sum(list(blocks.values()), axis=0) if blocks else np.zeros((0, WIDTH))
    return (
        _report(max(times.values(), default=0), total),
        {key: _report(times[key], blocks[key]) for key in blocks},
    )


def _report(times: int, blocks: npt.NDArray[np.float64]) -> ModelCalibration:
    found = summarise(blocks) if times >= FEWEST_TIMES else None
    if found is None:
        return ModelCalibration(times, FEWEST_TIMES)
    return ModelCalibration(
        segment_times=times,
        segment_times_needed=FEWEST_TIMES,
        pit_histogram=[_estimate(share) for share in found.histogram],
        coverage_50=_estimate(found.coverage_50),
        coverage_90=_estimate(found.coverage_90),
        bias=_estimate(found.bias),
        sharpness_bp=_estimate(found.sharpness_bp) if found.sharpness_bp else None,
    )


def _estimate(estimate: Estimate) -> CalibrationEstimate:
    return CalibrationEstimate(estimate.value, estimate.standard_error)
