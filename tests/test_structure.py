"""The house is read top to bottom: imports only point up the list."""

from __future__ import annotations

import ast
from pathlib import Path

import condor_lite

ROOT = Path(condor_lite.__file__).parent

# From top to bottom; a package stands for all of its modules, whose order among each other is free.
HOUSE = [
    *("__init__", "errors", "stopping", "watchdog", "aside", "clock", "tracker", "game"),
    *("config_values", "config_document", "config_settings", "config_sections", "config", "reload", "logs"),
    *(
        "pacer",
        "news",
        "storage",
        "prices",
        "models",
        "lanes",
        "predict",
        "worker",
        "pool",
        "board",
        "troubles",
        "scorer",
        "score",
        "rescore",
        "upkeep",
        "backup",
    ),
    *("explain", "sums", "roster", "table", "control", "progress", "formats", "export", "report"),
    *("check", "scaffold", "unit", "webhook", "alarms", "supervisor", "cli", "__main__"),
]

IMPURE = {"asyncio", "anyio", "time", "os", "pathlib", "sqlite3", "socket", "random", "httpx", "structlog"}


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def part(name: str) -> str:
    """The row of the house that `condor_lite.x.y` belongs to."""
    pieces = name.split(".")
    return pieces[1] if len(pieces) > 1 and pieces[1] in HOUSE else "__init__"


def test_every_module_has_its_place_in_the_house() -> None:
    modules = {path.stem for path in ROOT.glob("*.py")}
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert modules | packages == set(HOUSE)


def test_imports_only_point_up() -> None:
    wrong = []
    for path in ROOT.rglob("*.py"):
        relative = path.relative_to(ROOT)
        if "examples" in relative.parts or "templates" in relative.parts:
            continue
        own = relative.parts[0].removesuffix(".py")
        wrong += [
            f"{relative} imports {name}"
            for name in imported(path)
            if name.startswith("condor_lite.") and HOUSE.index(part(name)) > HOUSE.index(own)
        ]
    assert not wrong


def test_the_game_is_pure() -> None:
    wrong = [
        f"{path.name} imports {name}"
        for path in (ROOT / "game").glob("*.py")
        for name in imported(path)
        if name.split(".")[0] in IMPURE
    ]
    assert not wrong
