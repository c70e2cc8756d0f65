"""`config.toml` -> frozen dataclasses, validated whole before anything starts.

Every field of a section carries its documented default and meaning in its metadata; the README's table and the
check for unknown keys are made from these. Durations are seconds (`_s`), paths are absolute after loading.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from condor_lite.game.entities import Setting


@dataclass(frozen=True, slots=True)
class GameConfig:
    settings: tuple[Setting, ...]
    name: str = "condor-lite"
    crunch_id: str = "condorgame"
    base_class: str = "condor_lite.tracker.TrackerBase"
    benchmarks: tuple[str, ...] = ()
    max_models_per_player: int = 0
    shutdown_grace_s: float = 5.0
    speed: float = 1.0
    start_s: int | None = None

    @property
    def assets(self) -> tuple[str, ...]:
        """Every asset asked for, in the order of their first mention."""
        return tuple(dict.fromkeys(setting.asset for setting in self.settings))


@dataclass(frozen=True, slots=True)
class FeedConfig:
    source: str = "synthetic"
    tick_s: int = 60
    history_s: int = 30 * 86400
    max_staleness_s: int = 180
    path: Path | None = None
    seed: int = 0
    api_key: str = ""
    base_url: str = ""
    symbols: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class OrchestratorConfig:
    mode: str = "local"
    host: str = "127.0.0.1"
    port: int = 9091
    models: Path = Path("models")
    credentials: Path | None = None
    gateway_key: Path | None = None


@dataclass(frozen=True, slots=True)
class PredictConfig:
    timeout_s: float = 50.0
    max_consecutive_failures: int = 10
    max_consecutive_timeouts: int = 10
    max_segment_bytes: int = 2048


@dataclass(frozen=True, slots=True)
class ScoringConfig:
    rule: str = "crps"
    target: str = "log_return"
    max_components: int = 16
    time_limit_s: float = 2.0
    log_halfwidth: float = 0.5
    settle_delay_s: int = 60
    void_after_s: int = 7200
    interval_s: float = 10.0
    workers: int = 1
    snapshot_interval_s: int = 900


@dataclass(frozen=True, slots=True)
class StorageConfig:
    path: Path = Path("data/condor.db")
    keep_payloads_s: int = 8 * 86400
    keep_predictions_s: int = 30 * 86400
    keep_prices_s: int = 35 * 86400
    keep_snapshots_s: int = 30 * 86400


@dataclass(frozen=True, slots=True)
class ReportConfig:
    host: str = "127.0.0.1"
    port: int = 8000
    cors_origins: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LogConfig:
    level: str = "info"
    format: str = "console"


@dataclass(frozen=True, slots=True)
class Config:
    game: GameConfig
    feed: FeedConfig
    orchestrator: OrchestratorConfig
    predict: PredictConfig
    scoring: ScoringConfig
    storage: StorageConfig
    report: ReportConfig
    log: LogConfig
