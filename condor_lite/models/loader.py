"""From a folder of code to an instance of the participant's class. Runs in the model's own process."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
import pkgutil
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

log = logging.getLogger("condor_lite.host")


class BadImplementationError(Exception):
    """The folder holds no model that can be used; the message says why, for the participant."""


def load(folder: Path, base_class: str, args: list[Any], kwargs: dict[str, Any]) -> object:
    """The model in `folder`: what `create_model()` of its `main.py` returns, or else its class, instantiated.

    The class is the first concrete one, by name, that inherits from `base_class` ("package.module.Class")
    and is not part of that class's own package: in `main.py`, or else in the folder's other modules. This is
    the rule of the public model runner, but that `main.py` comes first and abstract classes are passed over.

    Raises BadImplementationError; what the model's constructor raises passes through.
    """
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    main = _import_main(folder)
    create_model = getattr(main, "create_model", None)
    if callable(create_model):
        model: object = create_model(*args, **kwargs)
        if model is None:
            raise BadImplementationError("create_model() in main.py returned None, not a model")
        return model
    base = _base_class(base_class)
    abstract = _candidates(main, base, concrete=False)
    for module in (main, *_other_modules(folder)):
        found = _candidates(module, base, concrete=True)
        if len(found) > 1:
            others = ", ".join(candidate.__name__ for candidate in found[1:])
            log.warning(
                "%s.py has several models; %s is taken, not %s", module.__name__, found[0].__name__, others
            )
        if found:
            log.info("the model is %s in %s.py", found[0].__name__, module.__name__)
            return found[0](*args, **kwargs)
        abstract += _candidates(module, base, concrete=False)
    if abstract:
        lacking = ", ".join(sorted(abstract[0].__abstractmethods__))
        raise BadImplementationError(f"{abstract[0].__name__} does not define {lacking}")
    raise BadImplementationError(f"no class in main.py inherits from {base_class}")


def describe(error: BaseException, folder: Path) -> str:
    """One line for a participant: "main.py line 3: NameError: name 'x' is not defined"."""
    what = _last_line(error)
    if isinstance(error, SyntaxError) and error.filename:
        return f"{_relative(error.filename, folder)} line {error.lineno}: {what}"
    places = [frame for frame in traceback.extract_tb(error.__traceback__) if _inside(frame.filename, folder)]
    return f"{_relative(places[-1].filename, folder)} line {places[-1].lineno}: {what}" if places else what


def own_traceback(error: BaseException, folder: Path) -> str:
    """The traceback from the participant's first line on, without the host's frames above it."""
    trace = error.__traceback__
    while trace and not _inside(trace.tb_frame.f_code.co_filename, folder):
        trace = trace.tb_next
    return "".join(traceback.format_exception(type(error), error, trace)).rstrip()


def _import_main(folder: Path) -> ModuleType:
    # By its path: a module of the name `main` may well exist elsewhere.
    spec = importlib.util.spec_from_file_location("main", folder / "main.py")
    if spec is None or spec.loader is None:
        raise BadImplementationError("main.py can't be imported")
    main = importlib.util.module_from_spec(spec)
    sys.modules["main"] = main
    try:
        spec.loader.exec_module(main)
    except BaseException as error:
        # Also SystemExit: a model that ends itself while being imported is a broken one.
        del sys.modules["main"]
        log.error("main.py can't be imported\n%s", own_traceback(error, folder))
        raise BadImplementationError(describe(error, folder)) from error
    return main


def _other_modules(folder: Path) -> list[ModuleType]:
    modules = []
    for info in pkgutil.walk_packages([str(folder)], onerror=lambda name: None):
        if info.name == "main":
            continue
        try:
            modules.append(importlib.import_module(info.name))
        except Exception as error:
            log.warning("%s can't be imported\n%s", info.name, own_traceback(error, folder))
    return modules


def _base_class(name: str) -> type:
    module_name, _, class_name = name.rpartition(".")
    try:
        base = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise BadImplementationError(
            f"the game's base class {name!r} can't be imported: {_last_line(error)}"
        ) from error
    if not isinstance(base, type):
        raise BadImplementationError(f"the game's base class {name!r} is not a class")
    return base


def _candidates(module: ModuleType, base: type, *, concrete: bool) -> list[Any]:
    package = base.__module__.partition(".")[0]
    return [
        member
        for _, member in inspect.getmembers(module, inspect.isclass)
        if issubclass(member, base)
        and member.__module__.partition(".")[0] != package
        and inspect.isabstract(member) is not concrete
    ]


def _last_line(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return f"it called sys.exit({error.code if error.code is not None else ''})"
    return traceback.format_exception_only(error)[-1].strip()


def _inside(filename: str, folder: Path) -> bool:
    return Path(filename).is_relative_to(folder)


def _relative(filename: str, folder: Path) -> str:
    return Path(filename).relative_to(folder).as_posix() if _inside(filename, folder) else Path(filename).name
