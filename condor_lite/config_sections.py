"""The sections of `config.toml` as frozen dataclasses, each field with its kind, default and meaning.

The README's table, the reading and the check for unknown keys are made from these. Durations are seconds
(`_s`); paths are absolute once loaded.
"""

# ruff: noqa: RUF009  (`documented` only makes a field; the linter does not know)
from __future__ import annotations

import re
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from condor_lite.config_settings import BLOCK_KEYS
from condor_lite.config_values import (
    Documented,
    Key,
    Kind,
    WrongValueError,
    boolean,
    choice,
    documented,
    duration,
    either,
    host,
    integer,
    is_web_address,
    moment,
    number,
    path,
    shown,
    shown_duration,
    shown_size,
    size,
    strings,
    text,
)
from condor_lite.game.entities import Setting

SIMULATED_SOURCES = ("synthetic", "replay")
LIVE_SOURCES = ("coinbase", "kraken", "binance", "crunchdao", "pyth")
LIVE_TICK_S = 60  # they give one price a minute
RULES = ("crps", "log", "likelihood")

_DOTTED = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*"
_FUNCTION = rf"{_DOTTED}:[A-Za-z_]\w*"
_LONGEST_HISTORY_S = 366 * 86400


def _named_or_function(*names: str, what: str) -> Kind:
    quoted = [f'"{name}"' for name in (*names, f"package.module:{what}")]
    return text("|".join([*names, _FUNCTION]), f"must be {either(quoted)}")


@dataclass(frozen=True, slots=True)
class GameConfig:
    settings: tuple[Setting, ...]
    name: str = documented(
        text(r".*\S.*", "must be a string that is not empty", longest=100),
        "shown on the dashboard",
        default="condor-lite",
    )
    crunch_id: str = documented(
        text(
            r"(?!\.{1,2}$)[A-Za-z0-9._~-]+",
            'must be made of letters, digits, "-", "_", "." and "~": it is a part of the orchestrator\'s URL',
            longest=200,
        ),
        "the game's id at the orchestrator",
        default="condorgame",
    )
    base_class: str = documented(
        text(
            r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+",
            'must be a class with its module, such as "condor_lite.tracker.TrackerBase"',
        ),
        "what models subclass; `crunch_synth.tracker.TrackerBase` and `condorgame.tracker.TrackerBase` "
        "work too",
        default="condor_lite.tracker.TrackerBase",
    )
    benchmarks: tuple[str, ...] = documented(
        strings('must be a list of model ids as strings, such as ["12", "40"]'),
        "model ids that are benchmarks (remote mode; a local model says so in its `model.toml`)",
        default=(),
    )
    max_models_per_player: int = documented(
        integer(0, 1_000_000), "only a player's best so many models are ranked; 0: no limit", default=0
    )
    shutdown_grace_s: float = documented(
        duration(0, 3600),
        "how long a round in flight may finish at shutdown (Docker waits 10 s)",
        default=5.0,
    )
    speed: float = documented(
        number(1e6),
        "the game's clock runs this many times faster than the wall's; only with a `synthetic` or `replay` "
        "feed. Prices, schedule, horizons and windows run on the game's clock; network time-outs and "
        "back-offs on the wall's",
        default=1.0,
    )
    start_s: int | None = documented(
        moment(),
        "`replay` only: ISO time inside the recording at which the game starts",
        shown="after `feed.history` of the recording, or, where it is shorter than that, a third into it",
    )

    @property
    def assets(self) -> tuple[str, ...]:
        """Every asset asked for, in the order of their first mention."""
        return tuple(dict.fromkeys(setting.asset for setting in self.settings))


@dataclass(frozen=True, slots=True)
class FeedConfig:
    source: tuple[str, ...] = documented(
        Kind("string or list of strings", lambda value, base: _read_sources(value, base)),
        "where prices come from: `synthetic`, `replay`, `coinbase`, `kraken`, `binance`, `crunchdao`, "
        '`pyth`, or `"module:factory"`; of a list of live ones, `["coinbase", "kraken"]`, the next takes '
        "over where one fails",
        default=("synthetic",),
        shown='"synthetic"',
    )
    failover_after_s: int = documented(
        duration(),
        "an asset whose source has given no new price for this long goes to the next one in `feed.source`, "
        "and back when the first delivers again",
        default=300,
        shown="5m, or 5 ticks where that is longer",
    )
    tick_s: int = documented(
        duration(1, 86400), "resolution of the prices, and how often new ones are asked for", default=60
    )
    history_s: int = documented(
        duration(1, _LONGEST_HISTORY_S),
        "sent to a newcomer, at the tick's resolution but never finer than one minute",
        default=30 * 86400,
    )
    max_staleness_s: int = documented(
        duration(),
        "with a newest price older than this an asset is stale: its rounds are skipped",
        default=180,
        shown="3 ticks",
    )
    path: Path | None = documented(path(optional=True), "`replay`: folder of `<ASSET>.csv`")
    seed: int = documented(
        integer(0, 2**63 - 1), "`synthetic`: the same seed gives the same prices", default=0
    )
    api_key: str = documented(text(), "`pyth`", default="", secret=True)
    base_url: str = documented(
        Kind("URL", lambda value, _: _read_base_url(value), textual=True),
        "redirects any HTTP feed (a proxy, a test server)",
        default="",
    )
    symbols: dict[str, str | dict[str, str]] = documented(
        Kind("table of strings", lambda value, _: _read_symbols(value)),
        'section `[feed.symbols]`: an asset\'s name at the source, `BTC = "BTC-USD"`; where there are '
        "several sources, `[feed.symbols.kraken]` says what one of them calls it",
        default_factory=dict,
        shown="per source",
    )

    @property
    def simulated(self) -> bool:
        """Whether the prices are not those of a market now."""
        return self.source[0] in SIMULATED_SOURCES

    def symbols_at(self, source: str) -> dict[str, str]:
        """What the assets are called at `source`, as far as the config says."""
        own = self.symbols.get(source, {})
        of_all = {asset: symbol for asset, symbol in self.symbols.items() if isinstance(symbol, str)}
        return of_all | own if isinstance(own, dict) else of_all


@dataclass(frozen=True, slots=True)
class OrchestratorConfig:
    mode: str = documented(
        choice("local", "remote"),
        "`local`: the embedded one, with the models in `orchestrator.models`; `remote`: an existing one",
        default="local",
    )
    host: str = documented(
        host(), "where it is (`remote`) or listens (`local`; on loopback only)", default="127.0.0.1"
    )
    port: int = documented(
        integer(0, 65535), "its port; `local` takes any free one where this is 0", default=9091
    )
    models: Path = documented(
        path(),
        "`local`: a folder with one folder a model (`main.py`, optional `model.toml`: `name`, `cruncher_id`, "
        "`cruncher_name`, `benchmark`); where it is missing or empty, the bundled benchmark models run",
        default=Path("models"),
    )
    sandbox: bool = documented(
        boolean(),
        "`local`: run each model in a sandbox of its own (needs `bubblewrap`), without network and with "
        "nothing to see but Python and its own folder; otherwise models are code that you trust",
        default=False,
    )
    model_memory_bytes: int = documented(
        size(2**26, 2**42), "`local`: private memory of each process of a model", default=2**31
    )
    model_processes: int = documented(
        integer(32, 100_000),
        "`local`: processes and threads of a model in the sandbox; outside of it a limit 64 times as high "
        "binds all models together, and none where the game is run by root",
        default=64,
    )
    model_cpu_s: int = documented(
        duration(), "`local`: processor time of a process from one call to the next", default=600
    )
    model_disk_bytes: int = documented(
        size(2**21, 2**42),
        "`local`: the largest file that a model may write; in the sandbox, what its /tmp and /dev/shm may "
        "hold, each, in memory",
        default=2**28,
    )
    credentials: Path | None = documented(
        path(optional=True), "`remote`: folder with `ca.crt`, `tls.crt` and `tls.key`"
    )
    gateway_key: Path | None = documented(
        path(optional=True), "`remote`: file with the gateway's private key", secret=True
    )


@dataclass(frozen=True, slots=True)
class PredictConfig:
    timeout_s: float = documented(
        duration(1, 86400),
        "longest wait for an answer; a round's deadline is `min(timeout, step, interval)` after its time",
        default=50.0,
    )
    max_consecutive_failures: int = documented(
        integer(1, 1_000_000), "then the model is reported and disconnected", default=10
    )
    max_consecutive_timeouts: int = documented(
        integer(1, 1_000_000), "then the model is reported and disconnected", default=10
    )
    max_segment_bytes: int = documented(
        integer(64, 32_768),
        "an answer may have this many bytes a segment, plus 16 KiB; a larger one is a failure",
        default=2048,
    )


@dataclass(frozen=True, slots=True)
class ScoringConfig:
    rule: str = documented(
        _named_or_function(*RULES, what="function"),
        '`crps`, `log`, `likelihood` (not proper: a spike wins) or `"package.module:function"`',
        default="crps",
    )
    target: str = documented(
        choice("log_return", "price_change"),
        "what a density describes: `log_return`, or `price_change` in quote currency (`crunch_synth`)",
        default="log_return",
    )
    max_components: int = documented(integer(1, 10_000), "leaves of a density's mixtures", default=16)
    time_limit_s: float = documented(
        duration(1, 3600),
        "of a processor, to score one prediction; of the clock by a rule of your own",
        default=2.0,
    )
    log_halfwidth: float = documented(number(10_000), 'basis points, for `rule = "log"`', default=0.5)
    settle_delay_s: int = documented(
        duration(0, 30 * 86400),
        "a round is scored this long after its horizon at the earliest: prices may change until then",
        default=60,
        shown="1 tick",
    )
    void_after_s: int = documented(
        duration(1, 30 * 86400),
        "a round whose last price has not come this long after its horizon counts for nobody",
        default=7200,
    )
    interval_s: float = documented(
        duration(1, 86400), "at least this long between two score cycles", default=10.0
    )
    workers: int = documented(
        integer(1, 1024), "processes in the pool", default=1, shown="CPUs - 1 (at least 1)"
    )
    snapshot_interval_s: int = documented(
        duration(), "how often the scores are kept for the charts", default=900
    )


@dataclass(frozen=True, slots=True)
class StorageConfig:
    path: Path = documented(path(), "the one file", default=Path("data/condor.db"))
    keep_payloads_s: int = documented(
        duration(),
        "after scoring; pruned in small steps. What costs disk: about 5 MB a model and day in the Condor "
        "game; rescoring and the full explanation of a score reach as far back",
        default=8 * 86400,
    )
    keep_predictions_s: int = documented(
        duration(),
        "predictions and their scores, after scoring; never shorter than the windows reach back (7 days)",
        default=30 * 86400,
    )
    keep_prices_s: int = documented(
        duration(),
        "not shorter than `feed.history`, nor than `storage.keep_payloads`, the longest horizon and "
        "`scoring.void_after` together",
        default=35 * 86400,
    )
    keep_snapshots_s: int = documented(duration(), "the charts' reach", default=30 * 86400)


@dataclass(frozen=True, slots=True)
class BackupConfig:
    every_s: int = documented(
        duration(0),
        '`"6h"`: make a backup so often while the game runs, in a process of its own; 0: never. On the '
        "wall's time",
        default=0,
        shown="0",
    )
    keep: int = documented(
        integer(1, 100_000), "so many of them stay, and the oldest goes when a new one is there", default=8
    )
    path: Path = documented(
        path(), "the folder where they go, better one on another disk", default=Path("backups")
    )


@dataclass(frozen=True, slots=True)
class WebhookConfig:
    url: str = documented(
        Kind("URL", lambda value, _: _read_webhook(value), textual=True),
        "where the game sends a message when a trouble begins or is over, by POST; empty: nowhere",
        default="",
        secret=True,
    )
    secret: str = documented(
        text(r"|.{16,}", "must have at least 16 characters", name="string"),
        "what the messages are signed with; needed where there is a `webhook.url`. Best as "
        "`CONDOR_LITE__WEBHOOK__SECRET` in the environment",
        default="",
        secret=True,
    )
    after_s: int = documented(
        duration(0, 86400),
        "a feed has been stale, or no round been held though one was due, for so long before it is told; and "
        "any trouble away for so long before it is over. On the wall's time",
        default=120,
    )
    min_free_bytes: int = documented(
        size(0, 2**50),
        "with less free space in the database's folder, or in that of the backups, the disk is nearly full",
        default=2**30,
    )


@dataclass(frozen=True, slots=True)
class ReportConfig:
    host: str = documented(host(), "where the API and the dashboard listen", default="127.0.0.1")
    port: int = documented(integer(0, 65535), "0 = any free one, printed at start", default=8000)
    cors_origins: tuple[str, ...] = documented(
        strings(
            'must be a list of origins, such as ["https://example.org"], or ["*"]',
            lambda origin: origin == "*" or is_web_address(origin, origin=True),
        ),
        "web pages from these origins may read the API",
        default=(),
    )
    base_path: str = documented(
        Kind("path of a URL", lambda value, _: _read_base_path(value), textual=True),
        'where a reverse proxy shows it, such as `"/game"`: all links begin with this; `""`: at the top',
        default="",
    )


@dataclass(frozen=True, slots=True)
class LogConfig:
    level: str = documented(
        choice("debug", "info", "warning", "error"), "`debug`, `info`, `warning` or `error`", default="info"
    )
    format: str = documented(choice("console", "json"), "`console` or `json`", default="console")


@dataclass(slots=True)
class Config:
    """All sections. `reload` replaces some while the game runs, so a part reads a value where it uses it."""

    game: GameConfig
    feed: FeedConfig
    orchestrator: OrchestratorConfig
    predict: PredictConfig
    scoring: ScoringConfig
    storage: StorageConfig
    backup: BackupConfig
    webhook: WebhookConfig
    report: ReportConfig
    log: LogConfig


SECTIONS: dict[str, type[Any]] = {
    "game": GameConfig,
    "feed": FeedConfig,
    "orchestrator": OrchestratorConfig,
    "predict": PredictConfig,
    "scoring": ScoringConfig,
    "storage": StorageConfig,
    "backup": BackupConfig,
    "webhook": WebhookConfig,
    "report": ReportConfig,
    "log": LogConfig,
}


def keys() -> tuple[Key, ...]:
    """Every key, in the order of the documentation."""
    found: list[Key] = []
    for section, record in SECTIONS.items():
        found.extend(
            _key(section, entry.name, entry.default, entry.metadata["documented"])
            for entry in fields(record)
            if "documented" in entry.metadata
        )
        found.extend(BLOCK_KEYS if section == "game" else ())
    return tuple(found)


def table() -> str:
    """The README's table of all keys, in markdown."""
    rows = ["| key | default | meaning |", "| --- | --- | --- |"]
    for key in keys():
        in_words = " " in key.default or key.default == "required"
        default = key.default if in_words else f"`{key.default}`"
        rows.append(f"| `{key.name}` | {default} | {key.meaning} |")
    return "\n".join(rows) + "\n"


def _key(section: str, name: str, default: Any, about: Documented) -> Key:
    written = about.default
    if written is None:
        if about.kind.name == "duration":
            default = shown_duration(default)
        elif about.kind.name == "size":
            default = shown_size(default)
        elif default is None:
            default = ""
        written = shown(list(default) if isinstance(default, tuple) else default)
    key = name.removesuffix("_bytes" if about.kind.name == "size" else "_s")
    return Key(section, key, name, written, about.meaning, about.kind, about.secret)


_SOURCE = _named_or_function(*SIMULATED_SOURCES, *LIVE_SOURCES, what="factory")
_SEVERAL_SOURCES = strings(
    'must be one source, or a list of sources such as ["coinbase", "kraken"]', at_least=1
)


def _read_sources(value: Any, base: Path) -> tuple[str, ...]:
    names: tuple[str, ...] = _SEVERAL_SOURCES.read(value if isinstance(value, list) else [value], base)
    for name in names:
        try:
            _SOURCE.read(name, base)
        except WrongValueError as error:
            near = get_close_matches(name.lower(), SIMULATED_SOURCES + LIVE_SOURCES, n=1)
            raise WrongValueError(f"{error}{f'; did you mean {near[0]}?' if near else ''}") from None
        if name in SIMULATED_SOURCES and len(names) > 1:
            raise WrongValueError(f'must be live sources in a list; "{name}" stands alone')
    return names


def _read_symbols(value: Any) -> dict[str, str | dict[str, str]]:
    def is_name(item: Any) -> bool:
        return isinstance(item, str) and item != ""

    if not isinstance(value, dict) or not all(
        is_name(item)
        or (key in LIVE_SOURCES and isinstance(item, dict) and all(is_name(name) for name in item.values()))
        for key, item in value.items()
    ):
        raise WrongValueError(
            'must be a section of strings, such as BTC = "BTC-USD", with sections for single sources in it, '
            "such as [feed.symbols.kraken]"
        )
    return dict(value)


_WRITTEN = re.compile(r"[!-\"$-~]{1,2000}")


OWN_PATHS = frozenset(
    {
        *("about", "docs", "events", "healthz", "leaderboard", "leaderboard.csv"),
        *("metrics", "model", "models", "openapi.json", "prices", "readyz"),
        *("reports", "rounds", "static", "statistics", "status", "version"),
    }
)
"""What addresses of the report begin with."""


def _read_base_path(value: Any) -> str:
    path = value.rstrip("/") if isinstance(value, str) else None
    if path is None or not re.fullmatch(r"(/(?!\.{1,2}(/|$))[A-Za-z0-9._~-]+){0,10}", path):
        raise WrongValueError('must be a path such as "/game", of letters, digits, "-", "_", "." and "~"')
    if path and (first := path.split("/")[1]) in OWN_PATHS:
        raise WrongValueError(f'must not begin with "/{first}", which is an address of the report itself')
    return path


def _read_webhook(value: Any) -> str:
    """Unlike other addresses it may have a query: many receivers know their senders by one."""
    if value == "":
        return ""
    if isinstance(value, str) and _WRITTEN.fullmatch(value) and is_web_address(value.partition("?")[0]):
        return value
    raise WrongValueError('must be an http(s) address, such as "https://example.org/hooks/condor"')


def _read_base_url(value: Any) -> str:
    if value == "" or (isinstance(value, str) and is_web_address(value)):
        return str(value).rstrip("/")
    raise WrongValueError('must be an http(s) address without a query, such as "http://127.0.0.1:8080"')
