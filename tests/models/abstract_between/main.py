"""An abstract class stands between the game's and the model."""

from abc import abstractmethod

from condor_lite.tracker import TrackerBase


class AFamily(TrackerBase):
    @abstractmethod
    def scale(self): ...

    def predict(self, asset, horizon, step):
        return [{"type": "builtin", "name": "norm", "params": {"scale": self.scale()}}] * (horizon // step)


class Member(AFamily):
    def scale(self):
        return 0.002
