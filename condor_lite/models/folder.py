"""A folder of models: which are there, what they say of themselves, and whether their code changed."""

from __future__ import annotations

import hashlib
import os
import stat
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

EXAMPLES = Path(__file__).parent / "examples"

_IGNORED_FOLDERS = {"__pycache__", "resources"}  # a model may keep its own files in `resources`
_IGNORED_SUFFIXES = {".pyc", ".log", ".tmp", ".swp"}
_MAX_TEXT = 200
_KEYS = ("name", "cruncher_id", "cruncher_name", "benchmark")

Signature = tuple[tuple[str, int, int, int], ...]


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """One model as its folder describes it. `problem` says why it can't run, None where it can.

    `code_hash` covers every file but `model.toml`, so that a new name is not taken for new code.
    """

    path: Path
    model_id: str
    name: str
    cruncher_id: str
    cruncher_name: str
    benchmark: bool = False
    code_hash: str = ""
    problem: str | None = None


def read_model(path: Path) -> ModelFolder:
    """Read one model folder. Never raises: what is wrong is in `problem`."""
    model_id = path.name
    plain = ModelFolder(path, model_id, model_id, model_id, model_id)
    try:
        plain = ModelFolder(path, model_id, model_id, model_id, model_id, code_hash=code_hash(path))
        if problem := _bad_id(model_id):
            raise ValueError(f"the folder's name is the model's id, and {problem}; rename the folder")
        if not (path / "main.py").is_file():
            raise ValueError("there is no main.py in its folder; put the model's class there")
        return _described(plain)
    except OSError as error:
        problem = f"{error.filename or path} can't be read: {error.strerror or error}"
    except ValueError as error:
        problem = str(error)
    return ModelFolder(
        path, model_id, model_id, model_id, model_id, code_hash=plain.code_hash, problem=problem
    )


def code_hash(path: Path) -> str:
    """A short hash over the names and contents of a model's files. Raises OSError."""
    digest = hashlib.sha256()
    for file in _files(path):
        name = file.relative_to(path).as_posix()
        if name == "model.toml":
            continue
        content = file.read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode("utf-8", "surrogateescape"))
        digest.update(content)
    return digest.hexdigest()[:16]


def list_models(folder: Path) -> list[Path]:
    """The model folders in `folder`, sorted; none where it does not exist. Raises OSError if unreadable."""
    try:
        entries = sorted(folder.iterdir())
    except FileNotFoundError:
        return []
    return [entry for entry in entries if not entry.name.startswith((".", "__")) and _holds_model(entry)]


def scan(folder: Path) -> list[ModelFolder]:
    """The models in `folder`, or the bundled ones where it is missing or empty. Raises OSError."""
    return [read_model(path) for path in list_models(folder) or list_models(EXAMPLES)]


class FolderWatch:
    """Scans again and again, cheaply: files are read only where a size or a time changed.

    A change counts once two scans in a row saw the same, so that half a copy is not started. The bundled
    models stand in only until the host's own appear; a folder that loses its last one afterwards runs none.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._own = False
        self._first = True
        self._seen: dict[Path, Signature] = {}
        self._accepted: dict[Path, tuple[Signature, ModelFolder]] = {}

    def scan(self) -> list[ModelFolder]:
        """What runs or should run now. Raises OSError if the folder can't be read."""
        paths = list_models(self._folder)
        if not paths and self._own and not self._folder.exists():
            return self._models()  # being replaced, or unmounted: not a reason to stop anything
        self._own = self._own or bool(paths)
        if not self._own:
            paths = list_models(EXAMPLES)
        now = {path: _signature(path) for path in paths}
        for path, signature in now.items():
            known = self._accepted.get(path)
            if known and known[0] == signature:
                continue
            if self._first or self._seen.get(path) == signature:
                self._accepted[path] = (signature, read_model(path))
        for path in self._accepted.keys() - now.keys() - self._seen.keys():
            del self._accepted[path]
        self._seen, self._first = now, False
        return self._models()

    def _models(self) -> list[ModelFolder]:
        return [model for _, model in self._accepted.values()]


def _described(plain: ModelFolder) -> ModelFolder:
    try:
        text = (plain.path / "model.toml").read_text("utf-8")
    except FileNotFoundError:
        return plain
    except UnicodeDecodeError:
        raise ValueError("model.toml is not UTF-8") from None
    try:
        said = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"model.toml: {error}") from None
    if unknown := sorted(said.keys() - set(_KEYS)):
        raise ValueError(f"model.toml: {unknown[0]!r} is not known; it may have {', '.join(_KEYS)}")
    for key in _KEYS[:3]:
        if key in said and (problem := _bad_text(said[key])):
            raise ValueError(f"model.toml: {key} = {said[key]!r:.80}: {problem}")
    benchmark = said.get("benchmark", False)
    if not isinstance(benchmark, bool):
        raise ValueError(f"model.toml: benchmark = {benchmark!r:.80}: must be true or false")
    cruncher_id = said.get("cruncher_id", plain.model_id)
    return ModelFolder(
        path=plain.path,
        model_id=plain.model_id,
        name=said.get("name", plain.model_id),
        cruncher_id=cruncher_id,
        cruncher_name=said.get("cruncher_name", cruncher_id),
        benchmark=benchmark,
        code_hash=plain.code_hash,
    )


def _bad_id(model_id: str) -> str | None:
    if "," in model_id or "::" in model_id:
        return f"{model_id!r} has a ',' or '::' in it"
    if not model_id.isprintable() or model_id != model_id.strip():
        return f"{model_id!r} has characters in it that can't be printed"
    return None


def _bad_text(value: object) -> str | None:
    if not isinstance(value, str):
        return "must be a string"
    if not value.strip() or not value.isprintable():
        return "must be printable text, not empty"
    return f"must be at most {_MAX_TEXT} characters long" if len(value) > _MAX_TEXT else None


def _holds_model(path: Path) -> bool:
    if not path.is_dir():
        return False
    try:
        return any(entry.suffix == ".py" or entry.name == "model.toml" for entry in path.iterdir())
    except OSError:
        return True  # so that its problem is shown


def _files(path: Path) -> Iterator[Path]:
    for root, folders, names in os.walk(path):
        folders[:] = sorted(
            name for name in folders if name not in _IGNORED_FOLDERS and not name.startswith(".")
        )
        for name in sorted(names):
            file = Path(root, name)
            if name.startswith(".") or name.endswith("~") or file.suffix in _IGNORED_SUFFIXES:
                continue
            if file.is_file():
                yield file


def _signature(path: Path) -> Signature:
    found = []
    for file in _files(path):
        try:
            status = file.stat()
        except OSError:
            continue
        if stat.S_ISREG(status.st_mode):
            found.append((str(file), status.st_size, status.st_mtime_ns, status.st_ino))
    return tuple(found)
