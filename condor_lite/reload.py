"""Rereading the config while the game runs (SIGHUP): what can change does, and the log says what cannot."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import structlog

from condor_lite.config import SECTIONS, Config, LogConfig, keys
from condor_lite.errors import ConfigError

log = structlog.get_logger()

CHANGEABLE = (
    "predict.max_consecutive_failures",
    "predict.max_consecutive_timeouts",
    "scoring.interval",
    "scoring.snapshot_interval",
    "storage.keep_payloads",
    "storage.keep_predictions",
    "storage.keep_snapshots",
    "log.level",
    "log.format",
)
"""The keys that every part reads where it uses them; all others are taken at the start."""


@dataclass(frozen=True, slots=True)
class Changes:
    """Names of keys, as the documentation writes them."""

    applied: tuple[str, ...]
    need_restart: tuple[str, ...]


class Reloader:
    """Rereads a running game's config with `load`; a changed section `[log]` is handed to `set_up_log`."""

    def __init__(
        self, config: Config, load: Callable[[], Config], set_up_log: Callable[[LogConfig], None]
    ) -> None:
        self._config = config
        self._load = load
        self._set_up_log = set_up_log
        self._asked = asyncio.Event()

    def ask(self) -> None:
        self._asked.set()

    async def run(self) -> None:
        """Reread whenever asked to, until cancelled."""
        while True:
            await self._asked.wait()
            self._asked.clear()
            await self.reread()

    async def reread(self) -> Changes | None:
        """Apply what can change, and tell; None, and nothing is changed, where the config can't be used."""
        try:
            new = await asyncio.to_thread(self._load)
        except ConfigError as error:
            log.error("config_not_reread", problems=list(error.problems), changed="nothing")
            return None
        changes = apply(self._config, new)
        if any(key.startswith("log.") for key in changes.applied):
            self._set_up_log(self._config.log)
        log.warning("config_reread", applied=list(changes.applied), need_restart=list(changes.need_restart))
        return changes


def apply(config: Config, new: Config) -> Changes:
    """Give `config` the values of `new` that may change while the game runs."""
    names = {(key.section, key.field): key.name for key in keys()}
    applied: list[str] = []
    need_restart: list[str] = []
    for section in SECTIONS:
        old_values, new_values = getattr(config, section), getattr(new, section)
        changed = {}
        for field in fields(old_values):
            value = getattr(new_values, field.name)
            if value == getattr(old_values, field.name):
                continue
            key = names.get((section, field.name), f"{section}.{field.name}")
            if key in CHANGEABLE:
                changed[field.name] = value
                applied.append(key)
            else:
                need_restart.append(key)
        setattr(config, section, replace(old_values, **changed))
    return Changes(tuple(applied), tuple(need_restart))
