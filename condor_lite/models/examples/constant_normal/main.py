"""The benchmark: a normal distribution whose volatility is the average over all prices seen so far."""

from math import log, sqrt

from condor_lite.tracker import TrackerBase

TYPICAL = 1e-4  # volatility per square root of a second, before there are two prices
SMALLEST_SCALE = 1e-6


class ConstantNormal(TrackerBase):
    """Sums squared returns and seconds as prices come in, so that an answer costs nothing."""

    def __init__(self):
        self.newest = {}  # asset -> (time, price)
        self.squares = {}  # asset -> sum of squared log returns
        self.seconds = {}  # asset -> the time they took

    def tick(self, data):
        for asset, points in data.items():
            squares, seconds = self.squares.get(asset, 0.0), self.seconds.get(asset, 0)
            time, price = self.newest.get(asset, points[0] if points else (0, 0))
            for later, new_price in points:
                if later > time:
                    squares += log(new_price / price) ** 2
                    seconds += later - time
                    time, price = later, new_price
            if points:
                self.newest[asset] = (time, price)
                self.squares[asset], self.seconds[asset] = squares, seconds

    def predict(self, asset, horizon, step):
        seconds = self.seconds.get(asset, 0)
        volatility = sqrt(self.squares[asset] / seconds) if seconds else TYPICAL
        scale = max(volatility * sqrt(step), SMALLEST_SCALE)
        density = {"type": "builtin", "name": "norm", "params": {"loc": 0.0, "scale": scale}}
        return self.flat(density, horizon, step)
