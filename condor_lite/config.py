"""`config.toml` and the environment -> a `Config`, validated whole before anything starts.

The sections and their keys are in `config_sections`; here they are put together, and against each other.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from condor_lite.config_document import Document
from condor_lite.config_sections import (
    LIVE_SOURCES,
    LIVE_TICK_S,
    SECTIONS,
    BackupConfig,
    Config,
    FeedConfig,
    GameConfig,
    LogConfig,
    OrchestratorConfig,
    PredictConfig,
    ReportConfig,
    ScoringConfig,
    StorageConfig,
    WebhookConfig,
    keys,
    table,
)
from condor_lite.config_settings import read_settings
from condor_lite.config_values import Key, is_file, is_folder, shown_duration
from condor_lite.errors import ConfigError

__all__ = [
    "DEMO",
    "FILE_NAME",
    "SECTIONS",
    "BackupConfig",
    "Config",
    "FeedConfig",
    "GameConfig",
    "Key",
    "LogConfig",
    "OrchestratorConfig",
    "PredictConfig",
    "ReportConfig",
    "ScoringConfig",
    "StorageConfig",
    "WebhookConfig",
    "find",
    "keys",
    "load",
    "table",
]

FILE_NAME = "config.toml"
DEMO = Path(__file__).with_name("demo.toml")

_FEWEST_TICKS = 3  # of history: less does not let a model measure anything
_MOST_TICKS_A_SECOND = 50  # on the wall: more can't be told apart from the rounds that follow them
_CREDENTIALS = ("ca.crt", "tls.crt", "tls.key")


def find(cwd: Path) -> Path | None:
    """The config file that a game started in this folder uses, None for the packaged demo.

    Whatever has the name counts, also a folder or a dangling link: it gets its error, never a silent demo.
    """
    candidate = cwd / FILE_NAME
    return candidate if os.path.lexists(candidate) else None


def load(path: Path | None, environ: Mapping[str, str]) -> Config:
    """Read and check a config file, or with None the packaged demo, under the overrides in `environ`.

    Paths become absolute, from the file's folder (the demo's from the current one). Raises ConfigError with
    every problem found.
    """
    if path is None:
        document = Document.read(DEMO, "the demo config", Path.cwd(), keys())
    else:
        document = Document.read(path, str(path), path.absolute().parent, keys())
    document.override(environ)
    document.reject_unknown()
    given = {name: document.section(name) for name in SECTIONS}

    feed = FeedConfig(**given["feed"])
    if not document.is_given("feed.max_staleness"):
        feed = replace(feed, max_staleness_s=3 * feed.tick_s)
    if not document.is_given("feed.failover_after"):
        feed = replace(feed, failover_after_s=max(feed.failover_after_s, 5 * feed.tick_s))
    scoring = ScoringConfig(
        **{"workers": max(1, _available_cpus() - 1), "settle_delay_s": feed.tick_s} | given["scoring"]
    )
    orchestrator = OrchestratorConfig(**given["orchestrator"])
    storage = StorageConfig(**given["storage"])
    backup = BackupConfig(**given["backup"])
    settings = read_settings(document, _tick_s(document, feed))
    config = Config(
        game=GameConfig(settings, **given["game"]),
        feed=feed,
        orchestrator=replace(orchestrator, models=document.base / orchestrator.models),
        predict=PredictConfig(**given["predict"]),
        scoring=scoring,
        storage=replace(storage, path=document.base / storage.path),
        backup=replace(backup, path=document.base / backup.path),
        webhook=WebhookConfig(**given["webhook"]),
        report=ReportConfig(**given["report"]),
        log=LogConfig(**given["log"]),
    )
    _check_feed(document, config)
    _check_orchestrator(document, config)
    _check_storage(document, config)
    webhook = config.webhook
    if webhook.url and not webhook.secret and document.is_sound("webhook.secret"):
        right = "must be set, as the receiver knows it: messages to webhook.url are signed with it"
        document.complain("webhook.secret", right)
    if document.problems:
        raise ConfigError(document.problems)
    return config


def _tick_s(document: Document, feed: FeedConfig) -> int | None:
    """The tick that the settings must fit: the given one, or where that is too fine for the source, its."""
    if not document.is_sound("feed.tick"):
        return None
    live = [name for name in feed.source if name in LIVE_SOURCES] if document.is_sound("feed.source") else []
    if live and feed.tick_s % LIVE_TICK_S:
        tick_s = -(-feed.tick_s // LIVE_TICK_S) * LIVE_TICK_S
        right = f'{live[0]} gives one price a minute: must be a multiple of "{shown_duration(LIVE_TICK_S)}"'
        document.complain("feed.tick", right)
        return tick_s
    return feed.tick_s


def _check_feed(document: Document, config: Config) -> None:
    game, feed = config.game, config.feed
    if document.is_sound("feed.source"):
        if not feed.simulated and game.speed != 1:
            right = 'must be 1 unless feed.source is "synthetic" or "replay": live prices come in real time'
            document.complain("game.speed", right)
        if feed.source == ("replay",):
            _check_recording(document, config)
        elif game.start_s is not None:
            document.complain("game.start", 'is for feed.source = "replay" only: leave it out')
    if document.is_sound("feed.tick", "game.speed") and game.speed > feed.tick_s * _MOST_TICKS_A_SECOND:
        right = f"must be at most {feed.tick_s * _MOST_TICKS_A_SECOND}: a tick then takes 20 ms"
        document.complain("game.speed", right)
    if document.is_sound("feed.tick", "feed.history") and feed.history_s < _FEWEST_TICKS * feed.tick_s:
        right = f'must be at least {_FEWEST_TICKS} ticks of "{shown_duration(feed.tick_s)}"'
        document.complain("feed.history", right)
    if document.is_sound("feed.tick", "feed.max_staleness") and feed.max_staleness_s < feed.tick_s:
        document.complain("feed.max_staleness", f'must be at least a tick, "{shown_duration(feed.tick_s)}"')
    if document.is_sound("feed.tick", "feed.failover_after") and feed.failover_after_s < 2 * feed.tick_s:
        right = f'must be at least 2 ticks of "{shown_duration(feed.tick_s)}": one is a quiet market'
        document.complain("feed.failover_after", right)
    own = {key: names for key, names in feed.symbols.items() if isinstance(names, dict)}
    if document.is_sound("feed.source") and (strangers := sorted(own.keys() - set(feed.source))):
        document.complain("feed.symbols", f"{', '.join(strangers)} is not in feed.source")
    named = set(feed.symbols).union(*own.values()) - set(own)
    extra = sorted(named - set(game.assets))
    if extra and document.is_sound("game.settings"):
        right = f"no setting asks for {', '.join(extra)}, only for {', '.join(game.assets)}"
        document.complain("feed.symbols", right)


def _check_recording(document: Document, config: Config) -> None:
    folder = config.feed.path
    if folder is None:
        if document.is_sound("feed.path"):
            document.complain("feed.path", 'must name the folder of <ASSET>.csv when feed.source = "replay"')
    elif not is_folder(folder):
        document.complain("feed.path", f"must be a folder that can be read; {folder} is none")
    elif missing := [asset for asset in config.game.assets if not is_file(folder / f"{asset}.csv")]:
        names = ", ".join(f"{asset}.csv" for asset in missing)
        document.complain("feed.path", f"must hold a file for each asset; {folder} has no {names}")


def _check_orchestrator(document: Document, config: Config) -> None:
    orchestrator, report = config.orchestrator, config.report
    if not document.is_sound("orchestrator.mode"):
        return
    if orchestrator.mode == "local":
        if document.is_sound("orchestrator.host") and not _is_loopback(orchestrator.host):
            right = 'must be a loopback address such as "127.0.0.1": local models are for this machine only'
            document.complain("orchestrator.host", right)
        ports_sound = document.is_sound("orchestrator.port", "report.port")
        if ports_sound and orchestrator.port == report.port != 0:
            document.complain("report.port", "must differ from orchestrator.port")
    else:
        if document.is_sound("orchestrator.port") and orchestrator.port == 0:
            document.complain("orchestrator.port", "must be the port of the remote orchestrator")
        _check_credentials(document, orchestrator.credentials, orchestrator.gateway_key)


def _check_credentials(document: Document, folder: Path | None, gateway_key: Path | None) -> None:
    if folder and gateway_key:
        right = "excludes orchestrator.credentials: leave one of the two out"
        document.complain("orchestrator.gateway_key", right)
    elif folder and (missing := [name for name in _CREDENTIALS if not is_file(folder / name)]):
        right = f"must be a folder with {', '.join(_CREDENTIALS)}; {folder} has no {', '.join(missing)}"
        document.complain("orchestrator.credentials", right)
    elif gateway_key and not is_file(gateway_key):
        right = "must be the path of a file that holds the key (not the key itself); there is no such file"
        document.complain("orchestrator.gateway_key", right)


def _check_storage(document: Document, config: Config) -> None:
    feed, storage = config.feed, config.storage
    if is_folder(storage.path):
        document.complain("storage.path", "is a folder: must be a file, such as data/condor.db")
    if not document.is_sound("storage.keep_prices", "feed.history", "scoring.void_after"):
        return
    round_s = prices_needed_s(config)
    if storage.keep_prices_s < feed.history_s:
        right = f'must be at least feed.history, "{shown_duration(feed.history_s)}"'
        document.complain("storage.keep_prices", right)
    elif document.is_sound("storage.keep_payloads") and storage.keep_prices_s < round_s:
        right = (
            "must be at least storage.keep_payloads, the longest horizon and scoring.void_after together, "
            f'"{shown_duration(round_s)}": without its prices an answer can\'t be scored again'
        )
        document.complain("storage.keep_prices", right)


def prices_needed_s(config: Config) -> int:
    """How long prices must be kept so that every stored answer can be scored again."""
    longest_s = max((setting.horizon_s for setting in config.game.settings), default=0)
    return config.storage.keep_payloads_s + longest_s + config.scoring.void_after_s


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name.lower() == "localhost"


def _available_cpus() -> int:
    # A container's share of the CPUs is in the affinity, not in the count.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
