"""The command line. Without a verb it runs the game.

Everything else only reads or writes new files; what changes a running game asks it to, over its socket.
"""

from __future__ import annotations

import argparse
import errno
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
    check = verbs.add_parser(
        "check", help="check the configuration and the environment, reporting every problem at once"
    )
    check.add_argument(
        "--online",
        action="store_true",
        help="also ask each source in feed.source for a recent price of each asset; show it with its age",
    )
    init = verbs.add_parser(
        "init", help="write a new challenge: a config, a model, a README for participants"
    )
    init.add_argument("directory", type=Path, metavar="DIR", help="a new folder, or one without these files")
    score = verbs.add_parser(
        "score", help="explain a round's scores, or one model's score segment by segment"
    )
    score.add_argument("round_id", metavar="ROUND_ID", help="such as BTC-3600-60-1700000000")
    score.add_argument("model_id", metavar="MODEL_ID", nargs="?")
    score.add_argument(
        "--scorer-version",
        type=int,
        metavar="N",
        help="the scores that this scorer gave, for a round that was scored again; default: those that count",
    )
    _add_rescore(verbs)
    models = verbs.add_parser(
        "models",
        help="every model: its state, how it fared in the last 24 h; pause, resume or restart one",
        description="Show every model of the game: its state and since when, its deployment, how it fared in "
        "the rounds of the last 24 h, its median answer time and its last error.",
    )
    models.add_argument("--json", action="store_true", help="for scripts: one JSON object")
    actions = models.add_subparsers(dest="action", metavar="ACTION")
    for action, what in (
        (
            "pause",
            "neither feed nor ask a model from now on, until it is resumed, even if the game is restarted. A "
            "paused model is absent in rounds, and counts like one that is not connected",
        ),
        ("resume", "undo a pause: the model gets the prices that it missed, and is asked again"),
        (
            "restart",
            "start a model's process anew, also one that was given up; behind a remote orchestrator: connect "
            "to it and set it up anew",
        ),
    ):
        of_one = actions.add_parser(action, help=what, description=what[0].upper() + what[1:] + ".")
        of_one.add_argument("model_id", metavar="ID")
    kinds = _add_export(verbs)
    _add_backup(verbs)
    unit = verbs.add_parser(
        "systemd",
        help="print a systemd unit that runs this game as a service, hardened",
        description="Print a systemd unit with the paths of this configuration, for "
        "/etc/systemd/system/condor-lite.service.",
    )
    unit.add_argument("--user", metavar="NAME", help="who runs the game (default: you, and never root)")
    for verb in (*verbs.choices.values(), *actions.choices.values(), *kinds.choices.values()):
        # Understood after the verb, too.
        verb.add_argument("--config", type=Path, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return top


def _add_rescore(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    rescore = verbs.add_parser(
        "rescore",
        help="score what is stored again, with fixed or other rules, also while the game runs",
        description="Score the stored rounds again, under a new scorer version. A running game does it "
        "behind its live rounds; without one it is done here. Until all of it is done nothing changes; then "
        "the leaderboard switches at once. The old scores stay readable.",
        epilog="Without --rule the config's rules are used: after scoring.rule was changed there and the "
        "game started anew, or after an upgrade that scores differently. With --rule the game keeps that "
        "rule when it is started again, until the config's scoring rules are changed or it is scored again "
        "without --rule; the config should then say the same. Rounds whose answers are not stored any more "
        "(storage.keep_payloads) keep their old scores; they go on counting in the windows if those are by "
        "the same rules, and otherwise not: /leaderboard says how many, and which versions it mixes.",
    )
    rescore.add_argument(
        "--since",
        metavar="TIME",
        help='only rounds that were resolved since: "2026-11-21T08:00:00Z", or "3d" ago (default: as far '
        "back as answers are stored, and at least the longest window)",
    )
    rescore.add_argument("--rule", help='crps, log, likelihood or "package.module:function"')
    rescore.add_argument(
        "--target",
        choices=("log_return", "price_change"),
        help="only what scoring.target says is possible: answers to the one can't be read as the other",
    )
    instead = rescore.add_mutually_exclusive_group()
    instead.add_argument(
        "--resume",
        action="store_true",
        help="go on with the rescore that was interrupted, or show the one that is under way",
    )
    instead.add_argument(
        "--forget", action="store_true", help="end a rescore without a switch, and delete what it has written"
    )


def _add_backup(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    backup = verbs.add_parser(
        "backup",
        help="copy the game's database into a file, also while the game runs",
        description="Copy the game's database into FILE, whether or not the game is running: as it is at one "
        "moment, without unused space, checked, and on disk before it takes its name. The game is not held "
        "up; its write-ahead log grows meanwhile by what it writes. Every few hours by itself: section "
        "[backup] of the configuration.",
    )
    backup.add_argument("file", type=Path, metavar="FILE", help="a new file, in a folder made where needed")
    backup.add_argument("--overwrite", action="store_true", help="replace a file that is there already")
    restore = verbs.add_parser(
        "restore",
        help="put a backup in the place of the database, while the game does not run",
        description="Put the backup FILE in the place of the game's database, after a check of the copy, in "
        "one step. The database that was there is kept beside it, under a name that is told. The game, once "
        "started, goes on from the backup: rounds since are recorded as missed, and none is held twice.",
    )
    restore.add_argument("file", type=Path, metavar="FILE", help="what backup wrote; it stays as it is")


def _add_export(
    verbs: argparse._SubParsersAction[argparse.ArgumentParser],
) -> argparse._SubParsersAction[argparse.ArgumentParser]:
    export = verbs.add_parser(
        "export",
        help="write what is stored into files, also while the game runs",
        description="Write what is stored into files, whether or not the game is running. A file gets its "
        "name when it is whole; one that is there already is left alone, and nothing is written.",
    )
    kinds = export.add_subparsers(dest="kind", metavar="KIND", required=True)
    prices = kinds.add_parser(
        "prices",
        help='the stored prices, as feed.source = "replay" plays them',
        description="Write <ASSET>.csv with the columns timestamp (epoch seconds) and close, every digit of "
        'it, for each asset. With feed.source = "replay", feed.path = DIR, and game.start where the game '
        "to be played again started, they are played as they were recorded.",
    )
    prices.add_argument("directory", type=Path, metavar="DIR", help="a folder, made where there is none")
    for kind, what in (
        ("leaderboard", "the leaderboards that were kept, a row a model and time"),
        ("scores", "the scores that count, a row a round and model, also of absent ones"),
        ("predictions", "who was asked in each round and what came of it, with --payloads the densities"),
    ):
        of_kind = kinds.add_parser(kind, help=what, description=what[0].upper() + what[1:] + ".")
        of_kind.add_argument("file", type=Path, metavar="FILE", help="a new file")
        of_kind.add_argument(
            "--model", action="append", default=[], metavar="ID", help="only of this model; may be repeated"
        )
    kinds.choices["predictions"].add_argument(
        "--payloads", action="store_true", help="also the densities, as sent and as far as they are kept"
    )
    for kind, of_kind in kinds.choices.items():
        if kind != "leaderboard":
            of_kind.add_argument(
                "--asset", action="append", default=[], help="only of this asset; may be repeated"
            )
        of_kind.add_argument("--since", metavar="TIME", help="(default: as far back as rows are stored)")
        of_kind.add_argument("--until", metavar="TIME", help="(default: to the newest)")
        of_kind.add_argument(
            "--format",
            choices=("csv", "jsonl", "parquet"),
            default="csv",
            help="CSV, JSON lines, or Parquet, which needs the extra condor-lite[parquet] (default: csv)",
        )
        of_kind.add_argument("--overwrite", action="store_true", help="replace what is there already")
        of_kind.epilog = "TIME is an ISO time, or how long before the game's newest round. Both are included."
    return kinds


def main(argv: list[str]) -> int:
    """Run one command line; returns the exit code: 0, or 2 for what the user can mend."""
    arguments = parser().parse_args(argv)
    try:
        if arguments.verb in (None, "run"):
            return _run(arguments)
        stopping.restore()
        code = _VERBS[arguments.verb](arguments)
        sys.stdout.flush()
        return code
    except ConfigError as error:
        _complain("the configuration can't be used:", *(f"  {problem}" for problem in error.problems))
    except CondorError as error:
        _complain(str(error))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `| head`
        _say_no_more()
        return 0
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _say_no_more()
        _complain(f"{error.strerror}: make room, or have the output go elsewhere")
    return EXIT_BAD_START


def _say_no_more() -> None:
    """What is still in the buffer would fail once more at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _complain(*lines: str) -> None:
    print("condor-lite: " + "\n".join(lines), file=sys.stderr)


def _config_path(arguments: argparse.Namespace) -> Path | None:
    from condor_lite import config as configuration

    given: Path | None = arguments.config
    return given or configuration.find(Path.cwd())


def _config(arguments: argparse.Namespace) -> Config:
    from condor_lite import config as configuration

    path = _config_path(arguments)
    # A host's own rule or feed lies beside the config; last on the path, so that it can't hide a library.
    sys.path.append(str((path or Path.cwd() / "demo").absolute().parent))
    return configuration.load(path, os.environ)


def _run(arguments: argparse.Namespace) -> int:
    from functools import partial

    from condor_lite import config as configuration
    from condor_lite import logs
    from condor_lite.check import allow_open_files, obstacles

    config = _config(arguments)
    load = partial(configuration.load, _config_path(arguments), os.environ)
    if problems := obstacles(config):
        _complain("the game can't start:", *(f"  {problem}" for problem in problems))
        return EXIT_BAD_START
    if stopping.asked():
        return 0
    allow_open_files()
    import asyncio

    from condor_lite import supervisor
    from condor_lite.reload import Reloader

    writer = logs.configure(config.log)

    async def play() -> int:
        code = 0 if await supervisor.run(config, Reloader(config, load, writer.set_up)) else 1
        stopping.over(code)
        return code

    try:
        return asyncio.run(play())
    finally:
        writer.close(wait_s=2.0)


def _check(arguments: argparse.Namespace) -> int:
    from condor_lite.check import check

    config = _config(arguments)
    problems = check(config)
    if arguments.online:
        problems = list(dict.fromkeys([*problems, *_online(config)]))
    if problems:
        _complain("problems:", *(f"  {problem}" for problem in problems))
        return EXIT_BAD_START
    count = len(config.game.settings)
    asked = f"{count} {'setting' if count == 1 else 'settings'} on {', '.join(config.game.assets)}"
    print(f"all good: {config.game.name}, {asked}")
    return 0


def _online(config: Config) -> list[str]:
    import asyncio
    import time

    from condor_lite.prices import online
    from condor_lite.prices.sources import make_sources

    try:
        sources = make_sources(config)
    except ConfigError:
        return []  # `check` has told
    feed = config.feed
    looks, notes = asyncio.run(
        online.look(sources, config.game.assets, feed.tick_s, feed.max_staleness_s, time.time)
    )
    print("\n".join(online.lines(looks)))
    return [*online.problems(looks), *notes]


def _init(arguments: argparse.Namespace) -> int:
    from condor_lite.scaffold import init

    written = init(arguments.directory)
    for path in written:
        print(f"wrote {path}")
    print(f"\nNow: cd {arguments.directory} && python -m condor_lite")
    return 0


def _score(arguments: argparse.Namespace) -> int:
    from condor_lite import explain, sums
    from condor_lite.storage.database import reading

    config = _config(arguments)
    with reading(config.storage.path) as connection:
        if arguments.model_id is None:
            lines = sums.round_lines(
                explain.explain_round(connection, arguments.round_id, arguments.scorer_version)
            )
        else:
            lines = sums.answer_lines(
                explain.explain(
                    connection, config, arguments.round_id, arguments.model_id, arguments.scorer_version
                )
            )
        for line in lines:
            print(line)
    return 0


def _rescore(arguments: argparse.Namespace) -> int:
    from dataclasses import replace

    from condor_lite import logs, progress

    config = _config(arguments)
    options = {name: getattr(arguments, name) for name in ("since", "rule", "target")}
    if arguments.resume or arguments.forget:
        if any(value is not None for value in options.values()):
            _complain("--resume and --forget go without --since, --rule and --target")
            return EXIT_BAD_START
        options = {}
    command = "rescore_resume" if arguments.resume else "rescore_forget" if arguments.forget else "rescore"
    writer = logs.configure(replace(config.log, level="error"), sys.stderr)
    try:
        return 0 if progress.rescore(config, command, options) else 1
    finally:
        writer.close(wait_s=2.0)


def _models(arguments: argparse.Namespace) -> int:
    import msgspec
    import orjson

    from condor_lite import control, roster, table
    from condor_lite.storage.database import reading

    config = _config(arguments)
    database = config.storage.path
    if arguments.action is not None:
        print(control.call(database, arguments.action, model_id=arguments.model_id))
        return 0
    try:
        listing = msgspec.convert(control.call(database, "models"), roster.Listing)
    except control.NoGame:
        with reading(database) as connection:
            listing = roster.stored(connection, config.game.name)
    if arguments.json:
        print(orjson.dumps(listing, option=orjson.OPT_INDENT_2).decode())
    else:
        for line in table.lines(listing):
            print(line)
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from condor_lite import export
    from condor_lite.storage.database import reading
    from condor_lite.storage.exports import Wanted

    config = _config(arguments)
    console = export.Console(sys.stderr)
    with reading(config.storage.path) as connection:
        try:
            since_s, until_s = export.read_range(connection, arguments.since, arguments.until)
            written = export.export(
                connection,
                arguments.kind,
                arguments.directory if arguments.kind == "prices" else arguments.file,
                Wanted(
                    since_s,
                    until_s,
                    tuple(getattr(arguments, "asset", ())),
                    tuple(getattr(arguments, "model", ())),
                    getattr(arguments, "payloads", False),
                ),
                format_=arguments.format,
                overwrite=arguments.overwrite,
                tell=console.show,
            )
        finally:
            console.end()
    for line in export.lines(written):
        print(line)
    return 0


def _backup(arguments: argparse.Namespace) -> int:
    import time

    from condor_lite.export import Console
    from condor_lite.storage.backup import back_up

    database = _config(arguments).storage.path
    console = Console(sys.stderr, "MB", 10**6)
    started_s = time.monotonic()
    try:
        size_bytes = back_up(database, arguments.file, overwrite=arguments.overwrite, tell=console.show)
    finally:
        console.end()
    took_s = time.monotonic() - started_s
    print(f"wrote {arguments.file}: {size_bytes / 1e6:.1f} MB in {took_s:.1f} s, checked")
    return 0


def _restore(arguments: argparse.Namespace) -> int:
    from condor_lite.export import Console
    from condor_lite.storage.backup import restore

    database = _config(arguments).storage.path
    console = Console(sys.stderr, "MB", 10**6)
    try:
        restored = restore(arguments.file, database, tell=console.show)
    finally:
        console.end()
    print(f"restored {database}: {restored.size_bytes / 1e6:.1f} MB, checked")
    if restored.former is not None:
        print(f"the database that was there is now {restored.former}; delete it when you do not need it")
    print("Now start the game.")
    return 0


def _systemd(arguments: argparse.Namespace) -> int:
    import getpass

    from condor_lite import unit

    user = arguments.user or ("condor-lite" if os.getuid() == 0 else getpass.getuser())
    print(unit.text(_config(arguments), _config_path(arguments), user), end="")
    return 0


_VERBS = {
    "check": _check,
    "init": _init,
    "score": _score,
    "rescore": _rescore,
    "models": _models,
    "export": _export,
    "backup": _backup,
    "restore": _restore,
    "systemd": _systemd,
}
