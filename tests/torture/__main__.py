"""`python -m tests.torture --minutes 30 --seed 7`: faults at random, and a table of how the game stood them.

Two games at once: a replayed one with local models, a live one with remote models. As root they have a small
disk of their own to fill up; otherwise those faults are left out, and the table says so.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.prices import BESIDE
from tests.torture.faults import FAULTS
from tests.torture.run import Torture
from tests.torture.worlds import Live, Replayed, World


def tortured(world: World, seed: int, minutes: float, most_s: float) -> Torture:
    """Every fault in any order, again and again, for `minutes`; each for up to `most_s`."""
    torture = Torture(random.Random(seed))
    until_s = time.monotonic() + 60 * minutes
    torture.wait(world, 0)
    while time.monotonic() < until_s:
        faults = list(FAULTS[type(world)])
        torture.moments.shuffle(faults)
        for fault in faults:
            if time.monotonic() < until_s:
                torture.suffer(world, fault, torture.moments.choice([0.1, 0.2, 1.0]) * most_s)
    return torture


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--span", type=float, default=60.0, help="how long a fault lasts at most, in seconds")
    given = parser.parse_args()
    print(f"seed {given.seed}", flush=True)
    recorded = BESIDE if BESIDE.is_dir() else None
    with (
        tempfile.TemporaryDirectory(prefix="torture-") as folder,
        Replayed(Path(folder) / "replayed", 1.5 * given.minutes + 15, recorded) as replayed,
        Live(Path(folder) / "live") as live,
        ThreadPoolExecutor(2) as both,
    ):
        started = [
            both.submit(tortured, world, given.seed, given.minutes, given.span) for world in (replayed, live)
        ]
        tortures = [one.result() for one in started]
    for torture in tortures:
        print(torture.table())
    return 1 if any(torture.violations for torture in tortures) else 0


if __name__ == "__main__":
    raise SystemExit(main())
