"""`[[game.settings]]` -> what is asked of which asset, how far ahead, in which steps, how often."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from condor_lite.config_document import Document, nearest, one_of, plain
from condor_lite.config_values import (
    Key,
    Kind,
    WrongValueError,
    duration,
    number,
    read_duration,
    shown,
    shown_duration,
    strings,
)
from condor_lite.game.entities import Setting
from condor_lite.game.schedule import bit_reversal_offset_s

MOST_SEGMENTS = 50_000

# A name is a part of round ids, file names and URLs, so it must not hold what separates their parts.
_ASSET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._]{0,31}")
_EXAMPLE = 'a block needs assets = ["BTC"], horizon = "1h", step = "1m", interval = "12m"'


def _read_steps(value: Any, _: Path) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    if not values:
        raise WrongValueError('must be a duration or a list of durations, such as "1m" or ["1m", "5m"]')
    steps = tuple(read_duration(item) for item in values)
    if len(set(steps)) < len(steps):
        raise WrongValueError("must name each step only once")
    return steps


_ASSETS = strings(
    'must be a list of asset names, such as ["BTC", "ETH"], each of at most 32 letters, digits, "." and "_"',
    lambda name: _ASSET.fullmatch(name) is not None,
    at_least=1,
)


def _block_key(name: str, kind: Kind, meaning: str, default: str = "required") -> Key:
    return Key("game.settings", name, name, default, meaning, kind)


BLOCK_KEYS: tuple[Key, ...] = (
    _block_key("assets", _ASSETS, "the assets that this block asks for, in their order on the grid"),
    _block_key("horizon", duration(), "how far ahead a forecast reaches; a multiple of `step`"),
    _block_key(
        "step",
        Kind("duration or list of durations", _read_steps),
        "length of a forecast's segments, a multiple of `feed.tick`; of a list, each is a setting of its "
        "own, asked at the same time. (asset, horizon, step) may be asked only once",
    ),
    _block_key("interval", duration(), "how often each asset is asked for; a multiple of `feed.tick`"),
    _block_key("weight", number(1e6), "of each of the block's settings in the overall score", "1.0"),
)


def read_settings(document: Document, tick_s: int | None) -> tuple[Setting, ...]:
    """The settings in the file's order; those with a problem are left out, and the document is told.

    `tick_s` is None where the tick itself is wrong.
    """
    game = document.tables.get("game", {})
    blocks = game.get("settings") if isinstance(game, dict) else None
    if isinstance(blocks, dict):
        document.reject("game.settings", "[game.settings]: write [[game.settings]], in double brackets")
        return ()
    if not isinstance(blocks, list) or not blocks or not all(isinstance(block, dict) for block in blocks):
        document.reject("game.settings", f"asks nothing: add a [[game.settings]] block; {_EXAMPLE}")
        return ()
    settings: dict[str, tuple[int, Setting]] = {}
    for place, block in enumerate(blocks, start=1):
        problems: list[str] = []
        values = _read_values(block, document.base, problems)
        problems += _mismatches(block, values, tick_s)
        if not problems and tick_s is not None:
            for setting in _expand(values, tick_s):
                first, _ = settings.setdefault(setting.key, (place, setting))
                if first != place:
                    problems.append(
                        f"{setting.asset} over {shown_duration(setting.horizon_s)} in steps of "
                        f"{shown_duration(setting.step_s)} is already asked in block {first}: once is enough"
                    )
        for problem in problems:
            document.reject("game.settings", f"[[game.settings]] block {place}: {problem}")
    return tuple(setting for _, setting in settings.values())


def _read_values(block: dict[str, Any], base: Path, problems: list[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key in BLOCK_KEYS:
        if key.key in block:
            try:
                values[key.key] = key.kind.read(block[key.key], base)
            except WrongValueError as wrong:
                problems.append(f"{key.key} = {shown(block[key.key])}: {wrong}")
        elif key.default == "required":
            problems.append(f"{key.key} is missing; {_EXAMPLE}")
    own = [key.key for key in BLOCK_KEYS]
    problems.extend(
        f"{plain(name)}: unknown key{nearest(name, own) or one_of(own)}"
        for name in sorted(block.keys() - set(own))
    )
    return values


def _mismatches(block: dict[str, Any], values: dict[str, Any], tick_s: int | None) -> Iterator[str]:
    """Durations that don't fit each other."""
    horizon_s, interval_s = values.get("horizon"), values.get("interval")
    for step_s in values.get("step", ()):
        step = f'step = "{shown_duration(step_s)}"'
        if tick_s and step_s % tick_s:
            yield f"{step}: {_whole_ticks(step_s, tick_s)}"
        if horizon_s and horizon_s % step_s:
            yield f"horizon = {shown(block['horizon'])}: must be a multiple of the {step}"
        elif horizon_s and horizon_s // step_s > MOST_SEGMENTS:
            yield f"{step}: makes {horizon_s // step_s} segments, must make at most {MOST_SEGMENTS}"
    if tick_s and horizon_s and any(step_s % tick_s for step_s in values.get("step", ())):
        common_s = math.lcm(*(_up(step_s, tick_s) for step_s in values["step"]))
        if horizon_s % common_s:
            right = f'must be a multiple of such steps, as "{shown_duration(_up(horizon_s, common_s))}" is'
            yield f"horizon = {shown(block['horizon'])}: {right}"
    if tick_s and interval_s and interval_s % tick_s:
        yield f"interval = {shown(block['interval'])}: {_whole_ticks(interval_s, tick_s)}"


def _whole_ticks(given_s: int, tick_s: int) -> str:
    tick, nearest = shown_duration(tick_s), shown_duration(_up(given_s, tick_s))
    return f'must be a multiple of feed.tick, "{tick}", such as "{nearest}"'


def _up(given_s: int, unit_s: int) -> int:
    return -(-given_s // unit_s) * unit_s


def _expand(values: dict[str, Any], tick_s: int) -> Iterator[Setting]:
    for place, asset in enumerate(values["assets"]):
        offset_s = bit_reversal_offset_s(place, values["interval"], tick_s)
        for step_s in values["step"]:
            weight = values.get("weight", 1.0)
            yield Setting(asset, values["horizon"], step_s, values["interval"], offset_s, weight)
