from condor_lite.tracker import TrackerBase


class Raises(TrackerBase):
    def __init__(self):
        self.table = {}
        self.table["missing"]

    def predict(self, asset, horizon, step):
        return []
