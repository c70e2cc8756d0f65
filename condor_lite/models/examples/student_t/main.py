"""A Student t distribution: fat tails, fitted by maximum likelihood to the last days' returns.

Its scale is that of the fit, moved towards the volatility of the last hours.
"""

from math import lgamma, log, pi

import numpy as np

from condor_lite.tracker import TrackerBase

DAYS = 3
REFIT_EVERY = 900  # seconds of price time
RECENT = 3 * 3600
TYPICAL = 1e-4  # volatility per square root of a second, before there are prices enough
SMALLEST_SCALE = 1e-6
DEGREES = (2.5, 3.0, 4.0, 6.0, 10.0, 30.0)


class StudentT(TrackerBase):
    def __init__(self):
        self.fits = {}  # (asset, step) -> (time of the fit, df, scale)

    def predict(self, asset, horizon, step):
        df, scale = self.fit(asset, step)
        density = {"type": "builtin", "name": "t", "params": {"df": df, "loc": 0.0, "scale": scale}}
        return self.flat(density, horizon, step)

    def fit(self, asset, step):
        newest = self.prices.last(asset)
        time = newest[0] if newest else 0
        known = self.fits.get((asset, step))
        if known is None or time - known[0] >= REFIT_EVERY:
            known = (time, *fit_t(np.array(self.prices.returns(asset, step, DAYS)), step))
            self.fits[asset, step] = known
        return known[1:]


def fit_t(returns, step):
    """(df, scale) of the most likely t distribution around 0; the scale leans towards the newest returns."""
    if len(returns) < 10:
        return 4.0, max(TYPICAL * np.sqrt(step), SMALLEST_SCALE)
    squares = np.maximum(returns**2, SMALLEST_SCALE**2)  # a price that stands still is not a scale of 0
    best = (-np.inf, 4.0, 1.0)
    for df in DEGREES:
        variance = np.median(squares)
        for _ in range(15):  # expectation maximisation: far returns weigh less
            weights = (df + 1) / (df + squares / variance)
            variance = np.mean(weights * squares)
        constant = lgamma((df + 1) / 2) - lgamma(df / 2) - log(pi * df) / 2
        likelihood = np.mean(
            constant - np.log(variance) / 2 - (df + 1) / 2 * np.log1p(squares / variance / df)
        )
        best = max(best, (likelihood, df, variance))
    _, df, variance = best
    recent = squares[-max(10, RECENT // step) :]
    weights = (df + 1) / (df + recent / variance)
    variance = 0.4 * variance + 0.6 * np.mean(weights * recent)
    return df, max(float(np.sqrt(variance)), SMALLEST_SCALE)
