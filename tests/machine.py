"""A machine whose clock anybody may set, beside a steady one that goes on."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from condor_lite import clock
from condor_lite.prices import web


class Machine:
    """`at_s` is what its clock says, `true_s` what time it is (epoch seconds)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at_s: float) -> None:
        self.at_s = self.true_s = at_s
        self._steady_s = 50.0
        seen = SimpleNamespace(time=lambda: self.at_s, monotonic=lambda: self._steady_s)
        monkeypatch.setattr(clock, "time", seen)
        monkeypatch.setattr(web, "time", seen)

    def passes(self, for_s: float) -> None:
        self.sleeps(for_s)
        self._steady_s += for_s

    def sleeps(self, for_s: float) -> None:
        """It is suspended: not even the steady clock goes on."""
        self.at_s += for_s
        self.true_s += for_s
