from condor_lite.tracker import TrackerBase


class Elsewhere(TrackerBase):
    def predict(self, asset, horizon, step):
        return "elsewhere"
