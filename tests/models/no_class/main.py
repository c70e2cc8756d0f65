from condor_lite.tracker import TrackerBase

BASE = TrackerBase
