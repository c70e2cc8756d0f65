"""A Laplace distribution with a daily rhythm: some hours of the day are livelier than others.

Its scale is the mean absolute return of the last hours, times how lively the hour of each segment usually is.
"""

import numpy as np

from condor_lite.tracker import TrackerBase

DAYS = 14
REFIT_EVERY = 900  # seconds of price time
RECENT = 4 * 3600
BELIEF = 30  # returns that an hour must have had before its own rhythm counts as much as the day's
TYPICAL = 1e-4  # volatility per square root of a second, before there are prices enough
SMALLEST_SCALE = 1e-6


class DiurnalLaplace(TrackerBase):
    def __init__(self):
        self.fits = {}  # (asset, step) -> (time of the fit, level, liveliness of the 24 hours)

    def predict(self, asset, horizon, step):
        newest = self.prices.last(asset)
        now = newest[0] if newest else 0
        known = self.fits.get((asset, step))
        if known is None or now - known[0] >= REFIT_EVERY:
            known = (now, *self.fit(asset, step))
            self.fits[asset, step] = known
        _, level, rhythm = known
        answer = []
        for end in range(step, horizon + 1, step):
            hour = int((now + end - step / 2) // 3600 % 24)
            params = {"loc": 0.0, "scale": max(level * rhythm[hour], SMALLEST_SCALE)}
            answer.append({"step": end, "type": "builtin", "name": "laplace", "params": params})
        return answer

    def fit(self, asset, step):
        """The mean absolute return of a usual hour as of now, and each hour's factor on it."""
        times, prices = map(np.asarray, self.prices.series(asset, DAYS))
        if len(times) < 30:
            return TYPICAL * step**0.5, [1.0] * 24
        gaps = np.diff(times)
        sizes = np.abs(np.diff(np.log(prices))) * np.sqrt(60 / gaps)  # as if over a minute
        hours = (times[1:] // 3600) % 24
        usual = sizes.mean() + 1e-12
        counts = np.bincount(hours, minlength=24)
        rhythm = (np.bincount(hours, sizes, minlength=24) + BELIEF * usual) / (counts + BELIEF) / usual
        calmed = sizes / rhythm[hours]
        recent = calmed[times[1:] > times[-1] - RECENT]
        level = 0.7 * recent.mean() + 0.3 * calmed.mean()
        moves = self.prices.returns(asset, max(step, 60), DAYS)
        # A price that swings back moves less in an hour than sixty minutes would have it.
        wander = np.mean(np.abs(moves)) / (usual * (max(step, 60) / 60) ** 0.5) if len(moves) >= 30 else 1.0
        return float(level * wander * (step / 60) ** 0.5), rhythm.tolist()
