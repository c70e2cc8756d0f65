"""No formula at all: the returns that were seen, as probability mass on points.

Past returns are divided by the volatility of their time and multiplied by today's ("filtered historical
simulation"), then thinned to quantiles, each a point of equal probability.
"""

import numpy as np

from condor_lite.tracker import TrackerBase

DAYS = 7
POINTS = 24
REFIT_EVERY = 300  # seconds of price time
MEMORY = 40  # returns that the volatility of a time is the average of
TYPICAL = 1e-4  # volatility per square root of a second, before there are prices enough
SMALLEST = 1e-6


class Empirical(TrackerBase):
    def __init__(self):
        self.densities = {}  # (asset, step) -> (time of the fit, density)

    def predict(self, asset, horizon, step):
        newest = self.prices.last(asset)
        time = newest[0] if newest else 0
        known = self.densities.get((asset, step))
        if known is None or time - known[0] >= REFIT_EVERY:
            known = (time, discrete(np.array(self.prices.returns(asset, step, DAYS)), step))
            self.densities[asset, step] = known
        return self.flat(known[1], horizon, step)


def discrete(returns, step):
    """Points of equal probability: the middle quantiles of the rescaled returns, symmetric around 0."""
    levels = (np.arange(POINTS) + 0.5) / POINTS
    if len(returns) < MEMORY:
        spread = 3.0 * max(TYPICAL * np.sqrt(step), SMALLEST)
        values = (2 * levels - 1) * spread
    else:
        squares = np.concatenate(([0.0], np.cumsum(returns**2)))
        scales = np.sqrt((squares[MEMORY:] - squares[:-MEMORY]) / MEMORY) + SMALLEST
        moves = returns[MEMORY:] / scales[:-1]  # each by the volatility known before it
        moves = np.concatenate((moves, -moves)) if len(moves) >= MEMORY else returns / scales[-1]
        values = np.quantile(moves, levels) * scales[-1]
    return {"type": "discrete", "values": values.tolist(), "weights": [1.0 / POINTS] * POINTS}
