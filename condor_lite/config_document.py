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

from condor_lite.config_values import Key, WrongValueError, either, shown
from condor_lite.errors import ConfigError

PREFIX = "CONDOR_LITE__"


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
        text = ""
        try:
            text = path.read_bytes().decode("utf-8-sig")
            tables = tomllib.loads(text)
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
        except tomllib.TOMLDecodeError as error:
            place = f"at line {max(1, len(text.splitlines()))}, the end of the file"
            message = str(error).replace("at end of document", place)
            raise ConfigError([f"{where}: not valid TOML: {message}"]) from None
        except ValueError:
            raise ConfigError([f"{where}: not valid TOML: an integer of more than 4,000 digits"]) from None
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

    def reject(self, name: str, problem: str) -> None:
        """Note a problem of something in the file that is no single key; `name` is not sound from then on."""
        self._unsound.add(name)
        self.problems.append(f"{self.where}: {problem}")

    def reject_unknown(self) -> None:
        """Note every section and key that nobody knows, with the nearest that is known."""
        for section, table in self.tables.items():
            if section not in self._sections:
                if isinstance(table, (dict, list)):
                    unknown = f"[{plain(section)}]: unknown section{self._nearest_section(section)}"
                else:
                    near = self._nearest_elsewhere(section) or "; write it below its [section]"
                    unknown = f"{plain(section)}: a key outside of any section{near}"
                self.problems.append(f"{self.where}: {unknown}")
            elif isinstance(table, dict):
                own = [key.key for key in self._keys.values() if key.section == section]
                own += ["settings"] if section == "game" else []
                for name in sorted(table.keys() - set(own)):
                    near = self._nearest_key(section, name, own)
                    self.problems.append(f"{self.where}: {section}.{plain(name)}: unknown key{near}")

    def _nearest_variable(self, variable: str) -> str:
        variables = [PREFIX + name.upper().replace(".", "__") for name in self._keys]
        near = nearest(variable, variables) if variable.count("__") > 1 else ""
        return near or f"; write {PREFIX}SECTION__KEY, such as {PREFIX}REPORT__PORT"

    def _nearest_section(self, name: str) -> str:
        if near := difflib.get_close_matches(name, self._sections, n=1):
            return f"; did you mean [{near[0]}]?"
        return self._nearest_elsewhere(name) or one_of([f"[{known}]" for known in self._sections])

    def _nearest_key(self, section: str, name: str, own: Sequence[str]) -> str:
        if near := difflib.get_close_matches(name, own, n=1):
            return f"; did you mean {section}.{near[0]}?"
        return self._nearest_elsewhere(name) or f"{one_of(own)} in [{section}]"

    def _nearest_elsewhere(self, name: str) -> str:
        """The keys of this name in whatever section."""
        elsewhere = [key.name for key in self._keys.values() if key.key == name]
        return f"; did you mean {either(elsewhere)}?" if elsewhere else ""


def nearest(name: str, known: Iterable[str]) -> str:
    """What to add to "unknown key" where a known one is near; else nothing."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def one_of(known: Sequence[str]) -> str:
    """What to add to "unknown key" where none is near."""
    return f"; known are {', '.join(known)}"


def plain(name: str) -> str:
    """A key as it is in the file, quoted where it could be taken for something else."""
    return name if re.fullmatch(r"[A-Za-z0-9_-]{1,60}", name) else shown(name)


def _value(written: str, *, textual: bool) -> Any:
    """A variable's text as a TOML value, or as the string it is."""
    try:
        document = tomllib.loads(f"value = {written}")
    except (ValueError, RecursionError):
        return written
    value = document["value"]
    return value if document.keys() == {"value"} and (isinstance(value, str) or not textual) else written
