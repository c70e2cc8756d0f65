from condor_lite.tracker import TrackerBase


class Unfinished(TrackerBase):
    def tick(self, data):
        pass
