"""How sure a score and a rank are, from block sums (SCORING.md, "Uncertainty").

Rounds overlap and errors persist, so single rounds are no sample. Sums over blocks at least as long as the
longest horizon nearly are: the method of batch means (Law, Simulation Modeling and Analysis, section 9.5.3).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr

MOST_BLOCKS = 14
FEWEST_BLOCKS = 5


def block_count(window_h: int, longest_horizon_s: int) -> int:
    """Into how many blocks a window of whole hours is cut, 0 where the horizon does not fit.

    The blocks are equal and made of whole hours, as the sums are hourly: 14 of 12 h in the anchor window, 12
    of 6 h and 12 of 2 h in the shorter ones, fewer where the longest horizon is longer than that.
    """
    fitting = [
        count
        for count in range(1, MOST_BLOCKS + 1)
        if window_h % count == 0 and window_h // count * 3600 >= longest_horizon_s
    ]
    return max(fitting, default=0)


def standard_error(sums: NDArray[np.float64], taken: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The standard error of each model's total over its blocks.

    `sums`: float64[blocks, models]; `taken`: bool[blocks, models], the blocks that the model took part in.
    The total of k blocks is k times their mean, and so is its error. NaN under 5 blocks. Returns
    float64[models].
    """
    count, _, error = _mean_and_error(sums, taken)
    return count * error


def probability_better(differences: NDArray[np.float64], taken: NDArray[np.bool_]) -> NDArray[np.float64]:
    """P(A is better than B) for each pair: Student t, blocks - 1 degrees of freedom, paired differences.

    `differences`: float64[blocks, pairs], block sums of A's gain less B's; `taken`: the blocks that both took
    part in. 0.5 where the two never differed. NaN under 5 blocks. Returns float64[pairs].
    """
    count, mean, error = _mean_and_error(differences, taken)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(mean == 0, 0.0, mean / error)
    enough = count >= FEWEST_BLOCKS
    return np.where(enough, stdtr(np.where(enough, count - 1, 1), np.where(enough, t, 0.0)), np.nan)


def _mean_and_error(
    sums: NDArray[np.float64], taken: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """The number of blocks taken, their mean and its standard error, a column each; NaN under 5 blocks."""
    count = taken.sum(axis=0).astype(np.float64)
    enough = count >= FEWEST_BLOCKS
    divisor = np.where(enough, count, np.nan)
    mean = np.where(taken, sums, 0.0).sum(axis=0) / divisor
    squares = np.where(taken, sums - mean, 0.0) ** 2
    return count, mean, np.sqrt(squares.sum(axis=0) / (divisor - 1) / divisor)
