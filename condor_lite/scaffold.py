"""`init`: the files of a new challenge, which runs as it is."""

from __future__ import annotations

from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path, PurePath

from condor_lite.errors import StartError


def init(directory: Path) -> list[Path]:
    """Write a new challenge into `directory`, which is made where it is missing; returns its files.

    Raises StartError, before anything is written, where one of the files exists; or if one can't be written.
    """
    if directory.exists() and not directory.is_dir():
        raise StartError(f"{directory} is a file; choose another folder")
    templates = dict(_files(resources.files("condor_lite") / "templates", PurePath()))
    if existing := [str(directory / name) for name in templates if (directory / name).exists()]:
        raise StartError(f"already there: {', '.join(existing)}; nothing was written, choose another folder")
    written = []
    for name, template in templates.items():
        path = directory / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("xb") as file:
                file.write(template.read_bytes())
        except OSError as error:
            raise StartError(f"{path} can't be written ({error.strerror}); choose another folder") from error
        written.append(path)
    return written


def _files(folder: Traversable, at: PurePath) -> list[tuple[PurePath, Traversable]]:
    found = []
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.is_dir():
            found += _files(entry, at / entry.name) if entry.name != "__pycache__" else []
        elif not entry.name.endswith(".pyc"):
            found.append((at / entry.name, entry))
    return found
