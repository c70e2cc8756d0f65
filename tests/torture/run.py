"""Fault after fault, with the books checked after each."""

from __future__ import annotations

import random
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import psutil

from tests.torture.faults import Fault, Impossible, Spell
from tests.torture.worlds import World

BACK_WITHIN_S = 120.0


@dataclass
class Record:
    """How the game stood one kind of fault."""

    recoveries_s: list[float] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    impossible: str | None = None


@dataclass
class Torture:
    """`suffer` a fault, as often as is wanted; `table()` tells how it went."""

    moments: random.Random
    records: dict[str, Record] = field(default_factory=lambda: defaultdict(Record))

    def wait(self, world: World, newest_s: int) -> float | None:
        """How long it took (wall) until a later round was answered and all was well, None: too long."""
        since_s = time.monotonic()
        while time.monotonic() - since_s < BACK_WITHIN_S:
            if world.run.process.poll() is not None:
                return None
            if world.playing(newest_s):
                return time.monotonic() - since_s
            time.sleep(0.02)
        return None

    def suffer(self, world: World, fault: Fault, span_s: float) -> None:
        name = f"{(fault.__doc__ or '').strip()}"
        record = self.records[name]
        time.sleep(self.moments.uniform(0.0, 1.0))  # the moment is what is tested
        world.books.note()
        try:
            violations = fault(world, Spell(span_s, self.moments))
        except Impossible as reason:
            record.impossible = str(reason)
            return
        except (AssertionError, psutil.Error) as error:  # something outlived the program, or is not there
            violations = [str(error)]
        recovery_s = self.wait(world, world.newest_round_s())
        if recovery_s is None:
            violations.append(f"not well again: {world.problems()}\n{world.run.console.read_text()[-3000:]}")
            if world.run.process.poll() is not None:
                world.start()
        else:
            record.recoveries_s.append(recovery_s)
            violations += world.books.check(world.published)
        record.violations += violations
        told = "not well again" if recovery_s is None else f"well again after {recovery_s:.1f} s"
        print(f"{time.strftime('%H:%M:%S')} {type(world).__name__}: {name}: {told}", flush=True)
        for violation in violations:
            print(f"  VIOLATION {violation}", flush=True)

    @property
    def violations(self) -> list[str]:
        return [f"{name}: {what}" for name, record in self.records.items() for what in record.violations]

    def table(self) -> str:
        return "\n".join(
            ["| fault | times | recovery, median | longest | violations |", "| --- " * 5 + "|", *self._rows()]
        )

    def _rows(self) -> Iterable[str]:
        for name, record in self.records.items():
            if record.recoveries_s:
                median_s, longest_s = statistics.median(record.recoveries_s), max(record.recoveries_s)
                told = f"{median_s:.1f} s | {longest_s:.1f} s | {len(record.violations)}"
            elif record.impossible:
                told = f"not possible here: {record.impossible} | | "
            else:
                told = f"| | {len(record.violations)}"
            yield f"| {name} | {len(record.recoveries_s)} | {told} |"
