"""A fuzzer over raw payloads, guided by coverage: whatever comes in ends in a score or a reason.

By hand, with atheris (`pip install atheris`): `python -m benchmarks fuzz`, with as many payloads as
`FUZZ_RUNS` says. Without atheris it says so and does nothing.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from pathlib import Path

import numpy as np

from condor_lite.errors import InvalidAnswer
from condor_lite.game.density import Limits, decode
from condor_lite.game.entities import Setting
from condor_lite.game.scoring import Realised, Rules, score

RUNS = int(os.environ.get("FUZZ_RUNS", "100000"))
SETTING = Setting("BTC", 600, 300)
LIMITS = Limits(max_components=16, max_segment_bytes=2048)
OUTCOME = Realised(np.arange(3), np.ones(3), np.array([1e-3, 0.0]), 2, 1e4, 5.0)

_NORM = {"type": "builtin", "name": "norm", "params": {"loc": 0.0, "scale": 0.001}}
_T = {"type": "scipy", "name": "t", "params": {"df": 3, "scale": 0.001}}
_MIXED = {"type": "mixture", "components": [{"density": _T, "weight": 1}, {"density": {"0": 1}, "weight": 2}]}
SEEDS = (
    [_NORM, _NORM],
    [{"step": 300, "prediction": _NORM}, {"step": 600, "prediction": _MIXED}],
    [{"type": "statistics", "name": "normal", "params": {"mu": 0, "sigma": 1}}, {"-0.1": 0.5, "0.1": 0.5}],
    [
        {"type": "discrete", "values": [0, 1], "weights": [1, 1]},
        {"type": "scipy", "name": "beta", "params": {}},
    ],
)


def look_into(payload: bytes) -> None:
    """Raises AssertionError where an answer is neither rejected with a reason nor scored."""
    try:
        densities = decode(payload, SETTING, LIMITS)
    except InvalidAnswer as error:
        assert 0 < len(str(error)) < 300  # noqa: PT017
        return
    (result,) = score([(densities, OUTCOME)], Rules())
    assert math.isfinite(result.raw)
    assert result.raw >= 0


def main() -> None:
    """Fuzz in a process of its own: atheris ends the one that it runs in."""
    try:
        import atheris  # noqa: F401
    except ImportError:
        print("  atheris is not installed: nothing done")
        return
    pid = os.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.fuzz"])
    _, status = os.waitpid(pid, 0)
    print(f"  {RUNS} payloads: " + ("nothing found" if status == 0 else "FOUND SOMETHING, see above"))


def _fuzz() -> None:
    import atheris

    atheris.instrument_all()
    with tempfile.TemporaryDirectory() as folder:
        for number, seed in enumerate(SEEDS):
            (Path(folder) / str(number)).write_bytes(json.dumps(seed).encode())
        atheris.Setup([sys.argv[0], f"-runs={RUNS}", "-max_len=4096", folder], look_into)
        atheris.Fuzz()


if __name__ == "__main__":
    _fuzz()
