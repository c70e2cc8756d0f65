"""`condor-lite rescore` on the console: asks the running game, or does it here where none runs."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Iterator
from typing import TextIO

import msgspec

from condor_lite import control
from condor_lite.clock import GameClock
from condor_lite.config import Config
from condor_lite.rescore import Progress, Rescorer
from condor_lite.score import ScoreLoop
from condor_lite.storage import repositories
from condor_lite.storage.database import Database, open_read_only

_EVERY_S = 0.5
_WITHIN_S = 600.0  # forgetting is answered when it is done
_LINE_EVERY_S = 5.0  # where the console is a file

Arguments = dict[str, str | None]


class Console:
    """One line that is written over, or on anything but a terminal a new one every few seconds."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._next_s = 0.0
        self._width = 0

    def show(self, progress: Progress) -> None:
        if not progress.rounds:
            return  # they are still being counted
        if self._out.isatty():
            text = line(progress)
            self._out.write("\r" + text.ljust(self._width))
            self._width = len(text)
            self._out.flush()
        elif time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + _LINE_EVERY_S
            self._out.write(line(progress) + "\n")
            self._out.flush()

    def end(self, progress: Progress) -> None:
        self._next_s = 0.0
        self.show(progress)
        if self._width:
            self._out.write("\n")
        for text in ending(progress):
            self._out.write(text + "\n")


def line(progress: Progress) -> str:
    """Percentage, rounds, rate and what is left of the time."""
    share = progress.done / progress.rounds if progress.rounds else 0.0
    parts = [
        f"{share:5.1%}",
        f"{progress.done} of {progress.rounds} rounds",
        f"{progress.rate:.0f} answers/s",
    ]
    if progress.eta_s is not None:
        parts.append(f"{_duration(progress.eta_s)} left")
    return "  ".join(parts)


def ending(progress: Progress) -> Iterator[str]:
    """What came of it, and what the host must know."""
    if progress.state == "done":
        yield (
            f"done: scorer version {progress.scorer_version} ({progress.rule}) counts from now on; "
            f"{progress.scored} rounds were scored again"
        )
        if progress.carried:
            yield (
                f"  {progress.carried} rounds could not be and keep the scores they had, by the same rules: "
                "the leaderboard mixes versions until they have left its windows, and says so"
            )
        for reason, count in progress.left_out.items():
            yield f"  {count} rounds keep their old scores and do not count in the windows: {reason}"
    elif progress.state == "failed":
        yield "failed; the leaderboard is as it was"
    else:
        yield f"{progress.state}; the leaderboard is as it was"
    if progress.remark:
        yield progress.remark


def rescore(config: Config, command: str, arguments: Arguments) -> bool:
    """Carry out `command` of the control socket and show how it goes; whether it came to its end.

    Raises CondorError where that is refused.
    """
    console = Console(sys.stdout)
    try:
        told = control.call(config.storage.path, command, within_s=_WITHIN_S, **arguments)
    except control.NoGame:
        if not config.storage.path.is_file():
            open_read_only(config.storage.path).close()  # says what is missing
        answer = asyncio.run(_in_foreground(config, command, arguments, console))
    else:
        answer = told if isinstance(told, str) else _follow(config, _progress(told), console)
    if isinstance(answer, str):
        sys.stdout.write(f"{answer}\n")
        return True
    console.end(answer)
    return answer.state == "done"


def _follow(config: Config, progress: Progress, console: Console) -> Progress:
    """Show a running game's rescore until it ends. It goes on without this."""
    try:
        while progress.state == "running":
            console.show(progress)
            time.sleep(_EVERY_S)
            progress = _progress(control.call(config.storage.path, "rescore_progress"))
    except KeyboardInterrupt:
        sys.stdout.write("\nthe game goes on with it: rescore --resume shows it, --forget ends it\n")
        raise
    except control.NoGame:
        raise control.ControlError("the game has ended; its rescore goes on with rescore --resume") from None
    return progress


async def _in_foreground(
    config: Config, command: str, arguments: Arguments, console: Console
) -> Progress | str:
    async with Database(config.storage.path) as db:
        clock = GameClock(await db.read(repositories.load_clock) or 0.0)
        rescorer = Rescorer(config, clock, db, ScoreLoop(config, clock, db, lambda leaderboard: None))
        answer = await rescorer.commands[command](**arguments)
        if isinstance(answer, str):
            return answer
        working = asyncio.create_task(rescorer.run())
        try:
            while (progress := await rescorer.progress()).state == "running":
                console.show(progress)
                await asyncio.wait({working}, timeout=_EVERY_S)
        except asyncio.CancelledError:
            sys.stdout.write("\ninterrupted: rescore --resume goes on, --forget deletes what it has done\n")
            raise
        finally:
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)
    return progress


def _progress(told: object) -> Progress:
    return msgspec.convert(told, Progress)


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"
