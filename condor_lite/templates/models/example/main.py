"""An example: prices will move as much as they did lately. Copy this folder and do better."""

from condor_lite.tracker import TrackerBase

DAYS = 1  # how much of the past counts
UNKNOWN = 1e-4  # a move's typical size per square root of a second, until there are enough prices to tell


class Example(TrackerBase):
    def predict(self, asset, horizon, step):
        moves = self.prices.returns(asset, step, days=DAYS)
        scale = UNKNOWN * step**0.5
        if len(moves) >= 20:
            scale = (sum(move * move for move in moves) / len(moves)) ** 0.5
        scale = max(scale, 1e-6)  # a price that never moved is no promise that it never will
        density = {"type": "builtin", "name": "norm", "params": {"loc": 0.0, "scale": scale}}
        return self.flat(density, horizon, step)
