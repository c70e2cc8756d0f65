"""The sources by name, and a host's own."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from condor_lite.config import Config, FeedConfig
from condor_lite.errors import ConfigError
from condor_lite.prices.binance import BinanceSource
from condor_lite.prices.coinbase import CoinbaseSource
from condor_lite.prices.crunchdao import CrunchdaoSource
from condor_lite.prices.kraken import KrakenSource
from condor_lite.prices.pyth import PythSource
from condor_lite.prices.replay import ReplaySource
from condor_lite.prices.source import Source
from condor_lite.prices.synthetic import SyntheticSource
from condor_lite.prices.web import WebSource

LIVE: dict[str, type[WebSource]] = {
    source.name: source
    for source in (CoinbaseSource, KrakenSource, BinanceSource, CrunchdaoSource, PythSource)
}

_ATTRIBUTES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "name": (lambda value: isinstance(value, str) and value != "", "a string"),
    "simulated": (lambda value: isinstance(value, bool), "True or False"),
    "latency_s": (lambda value: isinstance(value, int | float), "a number of seconds"),
    "page_points": (lambda value: isinstance(value, int) and value > 0, "a whole number above 0"),
    "reach_s": (lambda value: value is None or isinstance(value, int), "whole seconds, or None"),
    "skew_s": (lambda value: value is None or isinstance(value, int | float), "seconds, or None"),
}
"""What a host's own source has: whether a value will do, and which one does."""


def make_sources(config: Config) -> list[Source]:
    """The sources that `feed.source` names, in its order. Raises ConfigError where one can't be used."""
    feed = config.feed
    if feed.source == ("synthetic",):
        return [SyntheticSource(feed.seed)]
    if feed.source == ("replay",):
        if feed.path is None:
            raise ConfigError(['feed.path: must name the folder of <ASSET>.csv when feed.source = "replay"'])
        source = ReplaySource.load(feed.path, config.game.assets, feed.tick_s, feed.history_s)
        if config.game.start_s is not None:
            source.check_start(config.game.start_s)
        return [source]
    return [live_source(name, feed) for name in feed.source]


def live_source(name: str, feed: FeedConfig) -> Source:
    """The live source `name`: one of `LIVE`, or `"package.module:factory"`, called with `feed`.

    Raises ConfigError where it can't be made, with what to do.
    """
    return own_source(name, feed) if ":" in name else LIVE[name](feed)


def own_source(name: str, feed: FeedConfig) -> Source:
    """A host's own source, made by `factory(feed)` and checked to be one."""
    where = f'feed.source = "{name}"'
    module_name, _, factory_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == module_name.partition(".")[0]:
            right = f"put {error.name}.py beside the config, or install it"
            raise ConfigError([f"{where}: there is no module {error.name}; {right}"]) from error
        raise ConfigError([f"{where}: {module_name} can't be imported: {_said(error)}"]) from error
    factory = getattr(module, factory_name, None)
    if not callable(factory):
        what = "has nothing of this name" if factory is None else f"has {factory_name}, but can't call it"
        raise ConfigError([f"{where}: {module_name} {what}; write a function {factory_name}(feed)"])
    try:
        source = factory(feed)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError([f"{where}: {factory_name}(feed) failed: {_said(error)}"]) from error
    if problems := _problems(source):
        kind = type(source).__name__
        raise ConfigError(
            [f"{where}: what {factory_name}(feed) returns ({kind}) {wrong}" for wrong in problems]
        )
    return source  # type: ignore[no-any-return]


def _problems(source: Any) -> list[str]:
    if not inspect.iscoroutinefunction(getattr(source, "fetch", None)):
        return ["needs `async def fetch(self, asset, after_s, until_s, step_s)`"]
    return [
        *(
            f"needs `{name}`, {what}"
            for name, (is_right, what) in _ATTRIBUTES.items()
            if not is_right(getattr(source, name, ...))
        ),
        *(
            f"needs a method `{name}`"
            for name in ("end_s", "aclose")
            if not callable(getattr(source, name, None))
        ),
    ]


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
