"""Rereading the config while the game runs (SIGHUP): what can change does, and the log says what cannot."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import structlog

from condor_lite.config import SECTIONS, Config, LogConfig, keys, prices_needed_s
from condor_lite.errors import ConfigError

log = structlog.get_logger()

CHANGEABLE = (
    "predict.max_consecutive_failures",
    "predict.max_consecutive_timeouts",
    "scoring.interval",
    "scoring.snapshot_interval",
    "storage.keep_payloads",
    "storage.keep_predictions",
    "storage.keep_prices",
    "storage.keep_snapshots",
    "log.level",
    "log.format",
)
"""The keys that every part reads where it uses them; all others are taken at the start."""

_TOGETHER = ("storage.keep_payloads", "storage.keep_prices")


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
            try:
                await self.reread()
            except Exception as error:  # whatever it was, the next time is to be heard
                log.exception("config_not_reread", problems=[f"{type(error).__name__}: {error}"])

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
    """Give `config` the values of `new` that may change while the game runs.

    What is kept of payloads and prices changes only as far as answers can still be scored with what else
    holds until the restart.
    """
    names = {(key.section, key.field): key.name for key in keys()}
    changed = {
        names.get((section, field.name), f"{section}.{field.name}"): (section, field.name)
        for section in SECTIONS
        for field in fields(getattr(config, section))
        if getattr(getattr(new, section), field.name) != getattr(getattr(config, section), field.name)
    }
    applied = [name for name in changed if name in CHANGEABLE]
    merged = _merged(config, new, [changed[name] for name in applied])
    if merged.storage.keep_prices_s < max(merged.feed.history_s, prices_needed_s(merged)):
        applied = [name for name in applied if name not in _TOGETHER]
        merged = _merged(config, new, [changed[name] for name in applied])
    for section in SECTIONS:
        setattr(config, section, getattr(merged, section))
    return Changes(tuple(applied), tuple(name for name in changed if name not in applied))


def _merged(config: Config, new: Config, places: Iterable[tuple[str, str]]) -> Config:
    """`config` with the values of `new` in these fields of these sections."""
    values: dict[str, dict[str, Any]] = {}
    for section, field in places:
        values.setdefault(section, {})[field] = getattr(getattr(new, section), field)
    return replace(
        config, **{section: replace(getattr(config, section), **these) for section, these in values.items()}
    )
