"""A normal distribution whose volatility follows the market: recent moves weigh more than old ones."""

from math import exp, log, sqrt

from condor_lite.tracker import TrackerBase

FAST, SLOW = 1800.0, 21600.0  # seconds after which a move's weight has fallen to 1/e
TYPICAL = 1e-8  # variance per second, before there are two prices
LONGEST_GAP = 600  # seconds; the return over a longer gap says little about the volatility now
SMALLEST_SCALE = 1e-6


class EwmaNormal(TrackerBase):
    """The mean of two exponentially weighted variances, one that reacts fast and one that remembers."""

    def __init__(self):
        self.newest = {}  # asset -> (time, price)
        self.variances = {}  # asset -> (fast, slow), per second

    def tick(self, data):
        for asset, points in data.items():
            for time, price in points:
                self.learn(asset, time, price)

    def learn(self, asset, time, price):
        before = self.newest.get(asset)
        if before is None or time > before[0]:
            self.newest[asset] = (time, price)
        if before is None or not 0 < (gap := time - before[0]) <= LONGEST_GAP:
            return
        variance = log(price / before[1]) ** 2 / gap
        fast, slow = self.variances.get(asset, (variance or TYPICAL, variance or TYPICAL))
        fast += (1 - exp(-gap / FAST)) * (variance - fast)
        slow += (1 - exp(-gap / SLOW)) * (variance - slow)
        self.variances[asset] = (fast, slow)

    def predict(self, asset, horizon, step):
        fast, slow = self.variances.get(asset, (TYPICAL, TYPICAL))
        scale = max(sqrt((fast + slow) / 2 * step), SMALLEST_SCALE)
        density = {"type": "builtin", "name": "norm", "params": {"loc": 0.0, "scale": scale}}
        return self.flat(density, horizon, step)
