from condor_lite.tracker import TrackerBase


class Second(TrackerBase):
    def predict(self, asset, horizon, step):
        return "second"


class First(TrackerBase):
    def predict(self, asset, horizon, step):
        return "first"
