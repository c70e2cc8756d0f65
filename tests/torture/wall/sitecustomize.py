"""The wall's clock as the game sees it, moved by the seconds that a file holds (8 bytes, a double).

In effect in every Python that has this folder in PYTHONPATH and TORTURE_WALL, the file's path, in its
environment. It stands in for somebody who sets the machine's clock: monotonic clocks go on as they were. Only
callers in condor_lite see it moved: gRPC's Python half hands deadlines to its C half, which would not.
"""

import mmap
import os
import struct
import sys
import time
from pathlib import Path

if path := os.environ.get("TORTURE_WALL"):
    with Path(path).open("rb") as _file:
        _shift = mmap.mmap(_file.fileno(), 8, prot=mmap.PROT_READ)
    _real = time.time

    def _moved() -> float:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        shift_s = struct.unpack("d", _shift[:8])[0] if caller.startswith("condor_lite") else 0.0
        return _real() + float(shift_s)

    time.time = _moved
