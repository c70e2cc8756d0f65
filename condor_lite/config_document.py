"""From a TOML file and the environment to typed values, with every problem collected on the way.

Nothing here knows the sections: they come in as `Key`s.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

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
from condor_lite.errors import ConfigError
from condor_lite.game.entities import Setting
from condor_lite.game.schedule import bit_reversal_offset_s

PREFIX = "CONDOR_LITE__"
MOST_SEGMENTS = 50_000

# A name is a part of round ids, file names and URLs, so it must not hold what separates their parts.
_ASSET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._]{0,31}")
_SETTINGS_EXAMPLE = 'a block needs assets = ["BTC"], horizon = "1h", step = "1m", interval = "12m"'


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


class Document:
    """A config file's tables with the environment's overrides in place, and the problems found so far."""

    def __init__(self, tables: dict[str, Any], where: str, base: Path, keys: Sequence[Key]) -> None:
        self.problems: list[str] = []
        self.where = where
        self.base = base
        self.tables = tables
        self._keys = {key.name: key for key in keys if key.section != "game.settings"}
        self._sections = tuple(dict.fromkeys(key.section for key in self._keys.values()))
        self._overridden: dict[str, str] = {}  # name of a key -> the variable that set it
        self._unsound: set[str] = set()

    @classmethod
    def read(cls, path: Path, where: str, base: Path, keys: Sequence[Key]) -> Document:
        """Raise ConfigError where the file can't be read as TOML at all."""
        try:
            tables = tomllib.loads(path.read_bytes().decode("utf-8-sig"))
        except FileNotFoundError:
            raise ConfigError(
                [f"{where}: no such file; `condor-lite init DIR` writes one to begin with"]
            ) from None
        except IsADirectoryError:
            raise ConfigError([f"{where}: is a folder; name the config file in it"]) from None
        except OSError as error:
            raise ConfigError([f"{where}: can't be read: {error.strerror or error}"]) from None
        except UnicodeDecodeError as error:
            line = error.object.count(b"\n", 0, error.start) + 1
            raise ConfigError([f"{where}: not UTF-8 (line {line}); save the file as UTF-8"]) from None
        except (
            ValueError
        ) as error:  # TOMLDecodeError says line and column; an integer of 5,000 digits does not
            raise ConfigError([f"{where}: not valid TOML: {error}"]) from None
        except RecursionError:
            raise ConfigError([f"{where}: not valid TOML: brackets nested too deeply"]) from None
        return cls(tables, where, base, keys)

    def override(self, environ: Mapping[str, str]) -> None:
        """Put `CONDOR_LITE__SECTION__KEY` in the place of `section.key`."""
        for variable in sorted(name for name in environ if name.startswith(PREFIX)):
            section, *names = variable.removeprefix(PREFIX).split("__")
            path = [section.lower(), *(name.lower() for name in names[:1]), *names[1:]]
            key = self._keys.get(".".join(path[:2]))
            nested = key is not None and key.kind.name == "table of strings" and len(path) == 3 and path[2]
            if path[:2] == ["game", "settings"]:
                self.problems.append(
                    f"{variable}: [[game.settings]] can't be set from the environment, only in the file"
                )
            elif key is None or not (len(path) == 2 or nested):
                self.problems.append(f"{variable}: unknown key{self._nearest_variable(variable)}")
            else:
                table = self.tables.setdefault(path[0], {})
                if nested and isinstance(table, dict):
                    table = table.setdefault(path[1], {})
                if isinstance(table, dict):  # anything else is reported when the section is read
                    table[path[-1]] = _value(environ[variable], textual=bool(nested) or key.kind.textual)
                self._overridden[key.name] = variable

    def section(self, name: str) -> dict[str, Any]:
        """The section's values by the names of their fields, without those not given and those wrong."""
        table = self.tables.get(name, {})
        if not isinstance(table, dict):
            self.problems.append(f"{self.where}: {name}: must be a section: write [{name}] above its keys")
            self._unsound.update(key.name for key in self._keys.values() if key.section == name)
            return {}
        values = {}
        for key in (key for key in self._keys.values() if key.section == name):
            if key.key not in table:
                continue
            try:
                values[key.field] = key.kind.read(table[key.key], self.base)
            except WrongValueError as wrong:
                self.complain(key.name, str(wrong))
        return values

    def is_given(self, name: str) -> bool:
        section, key = name.split(".")
        table = self.tables.get(section)
        return isinstance(table, dict) and key in table

    def is_sound(self, *names: str) -> bool:
        """Whether these keys had no problem so far, so that it makes sense to compare them."""
        return self._unsound.isdisjoint(names)

    def complain(self, name: str, right: str) -> None:
        """Note a problem of `section.key`: where it was set, its value as written, what would be right."""
        key = self._keys[name]
        value = f"{key.default} (the default)"
        if self.is_given(name):
            value = shown(self.tables[key.section][key.key], secret=key.secret)
        self._unsound.add(name)
        self.problems.append(f"{self._overridden.get(name, self.where)}: {name} = {value}: {right}")

    def reject_unknown(self) -> None:
        """Note every section and key that nobody knows, with the nearest that is known."""
        for section, table in self.tables.items():
            if section not in self._sections:
                what = "section" if isinstance(table, (dict, list)) else "key outside of any section"
                self.problems.append(
                    f"{self.where}: {section}: unknown {what}{self._nearest_section(section)}"
                )
            elif isinstance(table, dict):
                own = [key.key for key in self._keys.values() if key.section == section]
                own += ["settings"] if section == "game" else []
                for name in sorted(table.keys() - set(own)):
                    near = self._nearest_key(section, name, own)
                    self.problems.append(f"{self.where}: {section}.{name}: unknown key{near}")

    def settings(self, tick_s: int | None) -> tuple[Setting, ...]:
        """What `[[game.settings]]` asks, in the file's order; `tick_s` is None where the tick is wrong."""
        game = self.tables.get("game", {})
        blocks = game.get("settings") if isinstance(game, dict) else None
        if isinstance(blocks, dict):
            self.problems.append(
                f"{self.where}: [game.settings]: write [[game.settings]], with double brackets"
            )
            return ()
        if not isinstance(blocks, list) or not blocks or not all(isinstance(block, dict) for block in blocks):
            self.problems.append(
                f"{self.where}: asks nothing: add a [[game.settings]] block; {_SETTINGS_EXAMPLE}"
            )
            return ()
        settings: list[Setting] = []
        asked_in: dict[str, int] = {}
        for number_, block in enumerate(blocks, start=1):
            for setting in self._block(number_, block, tick_s):
                first = asked_in.setdefault(setting.key, number_)
                if first != number_:
                    self.problems.append(
                        f"{self.where}: [[game.settings]] block {number_}: {setting.asset} over "
                        f"{shown_duration(setting.horizon_s)} in steps of {shown_duration(setting.step_s)} "
                        f"is already asked in block {first}; leave it out of one of them"
                    )
                else:
                    settings.append(setting)
        return tuple(settings)

    def _block(self, number_: int, block: dict[str, Any], tick_s: int | None) -> Iterable[Setting]:
        here = f"{self.where}: [[game.settings]] block {number_}"
        before = len(self.problems)
        values: dict[str, Any] = {"weight": 1.0}
        for key in BLOCK_KEYS:
            if key.key in block:
                try:
                    values[key.key] = key.kind.read(block[key.key], self.base)
                except WrongValueError as wrong:
                    self.problems.append(f"{here}: {key.key} = {shown(block[key.key])}: {wrong}")
            elif key.default == "required":
                self.problems.append(f"{here}: {key.key} is missing; {_SETTINGS_EXAMPLE}")
        own = [key.key for key in BLOCK_KEYS]
        for name in sorted(block.keys() - set(own)):
            self.problems.append(f"{here}: {name}: unknown key{_nearest(name, own) or _one_of(own)}")

        horizon_s, interval_s = values.get("horizon"), values.get("interval")
        for step_s in values.get("step", ()):
            step = f'{here}: step = "{shown_duration(step_s)}"'
            if tick_s and step_s % tick_s:
                self.problems.append(f'{step}: must be a multiple of feed.tick ("{shown_duration(tick_s)}")')
            if horizon_s and horizon_s % step_s:
                self.problems.append(
                    f'{step}: the horizon ("{shown_duration(horizon_s)}") must be a multiple of it'
                )
            elif horizon_s and horizon_s // step_s > MOST_SEGMENTS:
                self.problems.append(
                    f"{step}: makes {horizon_s // step_s} segments; at most {MOST_SEGMENTS} are allowed"
                )
        if tick_s and interval_s and interval_s % tick_s:
            right = f'must be a multiple of feed.tick ("{shown_duration(tick_s)}")'
            self.problems.append(f"{here}: interval = {shown(block['interval'])}: {right}")
        if len(self.problems) > before or tick_s is None:
            return
        for place, asset in enumerate(values["assets"]):
            offset_s = bit_reversal_offset_s(place, values["interval"], tick_s)
            for step_s in values["step"]:
                yield Setting(
                    asset, values["horizon"], step_s, values["interval"], offset_s, values["weight"]
                )

    def _nearest_variable(self, variable: str) -> str:
        variables = {PREFIX + name.upper().replace(".", "__"): name for name in self._keys}
        return (
            _nearest(variable, variables)
            or f"; a variable is named {PREFIX}SECTION__KEY, as {PREFIX}REPORT__PORT"
        )

    def _nearest_section(self, name: str) -> str:
        holding = next((key.name for key in self._keys.values() if key.key == name), None)
        if holding:
            return f"; did you mean {holding}?"
        return _nearest(name, self._sections) or _one_of(self._sections)

    def _nearest_key(self, section: str, name: str, own: Sequence[str]) -> str:
        if near := difflib.get_close_matches(name, own, n=1):
            return f"; did you mean {section}.{near[0]}?"
        elsewhere = next((key.name for key in self._keys.values() if key.key == name), None)
        return f"; did you mean {elsewhere}?" if elsewhere else f"{_one_of(own)} in [{section}]"


def _value(written: str, *, textual: bool) -> Any:
    """A variable's text as a TOML value, or as the string it is."""
    try:
        document = tomllib.loads(f"value = {written}")
    except (ValueError, RecursionError):
        return written
    value = document["value"]
    return value if document.keys() == {"value"} and (isinstance(value, str) or not textual) else written


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _one_of(known: Sequence[str]) -> str:
    return f"; known are {', '.join(known)}"
