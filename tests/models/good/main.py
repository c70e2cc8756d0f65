"""Answers well, and says in which process."""

import os

from condor_lite.tracker import TrackerBase


class Good(TrackerBase):
    def predict(self, asset, horizon, step):
        density = {"type": "builtin", "name": "norm", "params": {"loc": 0.0, "scale": 0.001}}
        return self.flat(density, horizon, step)

    def pid(self):
        return os.getpid()

    def points(self, asset):
        return len(self.prices.series(asset)[0])
