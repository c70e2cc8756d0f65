"""The command line. Without a verb it runs the game; everything else only reads, or writes new files."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from condor_lite import __version__, stopping
from condor_lite.errors import CondorError, ConfigError

if TYPE_CHECKING:
    from condor_lite.config import Config

EXIT_BAD_START = 2


def parser() -> argparse.ArgumentParser:
    """All verbs and their options."""
    top = argparse.ArgumentParser(
        prog="condor-lite",
        description="Host a live forecasting challenge in one process, on one SQLite file. Without a verb: "
        "run the game in ./config.toml, or a demo where there is none.",
        epilog="Every key of the configuration can be overridden by the environment: "
        "CONDOR_LITE__REPORT__PORT=9000 sets report.port.",
    )
    top.add_argument("--version", action="version", version=f"condor-lite {__version__}")
    top.add_argument("--config", type=Path, metavar="FILE", help="the configuration (default: ./config.toml)")
    verbs = top.add_subparsers(dest="verb", metavar="VERB")
    verbs.add_parser("run", help="run the game (the default)")
    verbs.add_parser(
        "check", help="check the configuration and the environment, reporting every problem at once"
    )
    init = verbs.add_parser(
        "init", help="write a new challenge: a config, a model, a README for participants"
    )
    init.add_argument("directory", type=Path, metavar="DIR")
    score = verbs.add_parser(
        "score", help="explain a round's scores, or one model's score segment by segment"
    )
    score.add_argument("round_id", metavar="ROUND_ID", help="such as BTC-3600-60-1700000000")
    score.add_argument("model_id", metavar="MODEL_ID", nargs="?")
    return top


def main(argv: list[str]) -> int:
    """Run one command line; returns the exit code: 0, or 2 for what the user can mend."""
    arguments = parser().parse_args(argv)
    try:
        if arguments.verb in (None, "run"):
            return _run(arguments)
        stopping.restore()
        return {"check": _check, "init": _init, "score": _score}[arguments.verb](arguments)
    except ConfigError as error:
        _complain("the configuration can't be used:", *(f"  {problem}" for problem in error.problems))
    except CondorError as error:
        _complain(str(error))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return EXIT_BAD_START


def _complain(*lines: str) -> None:
    print("condor-lite: " + "\n".join(lines), file=sys.stderr)


def _config(arguments: argparse.Namespace) -> Config:
    from condor_lite import config as configuration

    path = arguments.config or configuration.find(Path.cwd())
    # A host's own rule or feed lies beside the config; last on the path, so that it can't hide a library.
    sys.path.append(str((path or Path.cwd() / "demo").absolute().parent))
    return configuration.load(path, os.environ)


def _run(arguments: argparse.Namespace) -> int:
    from condor_lite import logs
    from condor_lite.check import obstacles

    config = _config(arguments)
    if problems := obstacles(config):
        _complain("the game can't start:", *(f"  {problem}" for problem in problems))
        return EXIT_BAD_START
    if stopping.asked():
        return 0
    import asyncio

    from condor_lite import supervisor

    writer = logs.configure(config.log)
    try:
        asyncio.run(supervisor.run(config))
    finally:
        writer.close(wait_s=2.0)
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from condor_lite.check import check

    config = _config(arguments)
    if problems := check(config):
        _complain("problems:", *(f"  {problem}" for problem in problems))
        return EXIT_BAD_START
    asked = f"{len(config.game.settings)} settings on {', '.join(config.game.assets)}"
    print(f"all good: {config.game.name}, {asked}")
    return 0


def _init(arguments: argparse.Namespace) -> int:
    from condor_lite.scaffold import init

    written = init(arguments.directory)
    for path in written:
        print(f"wrote {path}")
    print(f"\nNow: cd {arguments.directory} && python -m condor_lite")
    return 0


def _score(arguments: argparse.Namespace) -> int:
    from contextlib import closing

    from condor_lite import explain, sums
    from condor_lite.storage.database import open_read_only

    config = _config(arguments)
    with closing(open_read_only(config.storage.path)) as connection:
        if arguments.model_id is None:
            lines = sums.round_lines(explain.explain_round(connection, arguments.round_id))
        else:
            lines = sums.answer_lines(
                explain.explain(connection, config, arguments.round_id, arguments.model_id)
            )
        for line in lines:
            print(line)
    return 0
