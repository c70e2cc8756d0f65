"""A model's sandbox, made by bubblewrap: what it sees of the machine, and whether it can be made here.

Its own process table, no network, and a read-only file system of system libraries, Python, and the model's
folder; /tmp and /dev/shm are in memory, of bounded size. The game reaches the model through a Unix socket in
that /tmp, by way of /proc/<pid>/root. No folder is shared and no network socket passed in: a descriptor of
one could be connected anew, to anything on this machine.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

_SYSTEM = ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
_ETC = ("ld.so.cache", "ld.so.conf", "ld.so.conf.d", "localtime", "alternatives", "nsswitch.conf")
_PACKAGE = Path(__file__).resolve().parents[1]
_PROBE_S = 20.0


def command(folder: Path, hidden: Iterable[Path], disk_bytes: int) -> list[str]:
    """The beginning of a command line; the program to run in the sandbox and its arguments come after it.

    `folder` is what it may read beside Python and its packages, of which `hidden` folders are taken out.
    """
    shown = [Path("/usr"), *_python()]
    words = ["bwrap", "--die-with-parent", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"]
    if os.geteuid() == 0:  # limits.py gives the model a user id of its own, which is all this is for
        words += ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        words += ["--unshare-user"]
    words += ["--hostname", "model", "--proc", "/proc", "--dev", "/dev"]
    for memory in ("/dev/shm", "/tmp"):  # noqa: S108
        words += ["--perms", "1777", "--size", str(disk_bytes), "--tmpfs", memory]
    for path in map(Path, _SYSTEM):
        if path.is_symlink():
            words += ["--symlink", str(path.readlink()), str(path)]
        elif path.is_dir():
            words += ["--ro-bind", str(path), str(path)]
    words += ["--dir", "/etc"]
    for name in _ETC:
        words += ["--ro-bind-try", f"/etc/{name}", f"/etc/{name}"]
    for path in shown:
        words += _bind(path)
    covered = [path for path in hidden if path.is_dir() and any(path.is_relative_to(part) for part in shown)]
    for path in covered:
        words += ["--tmpfs", str(path)]
    words += [*_bind(folder), "--chdir", str(folder)]
    for path in covered:
        words += ["--remount-ro", str(path)]
    return [*words, "--remount-ro", "/dev", "--remount-ro", "/", "--"]


def problem(disk_bytes: int) -> str | None:
    """Why no sandbox can be made here and what to do, None where it can: tries it, which takes 0.1 s."""
    if shutil.which("bwrap") is None:
        return "bubblewrap is not installed; install it (`apt install bubblewrap`), or set it to false"
    drop = "import os; os.setuid(40000) if os.getuid() == 0 else None; import json"
    trial = [*command(_PACKAGE, (), disk_bytes), sys.executable, "-I", "-S", "-c", drop]
    try:
        done = subprocess.run(trial, capture_output=True, timeout=_PROBE_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        said = str(error)
    else:
        if done.returncode == 0:
            return None
        said = done.stderr.decode("utf-8", "replace").strip() or f"exit code {done.returncode}"
    return (
        f"bubblewrap can't make a sandbox here ({said.splitlines()[0]}); it needs version 0.7 and user "
        "namespaces (the README says how a kernel or a container allows them); or set it to false"
    )


def socket_path(mark: str) -> str:
    """Where a model listens, inside. The mark is random: no rival can put a link to it in its own place."""
    return f"/tmp/{mark}"  # noqa: S108


def first_inside(pid: int) -> int:
    """The process whose end is the sandbox's, of the bwrap that has this pid. Raises OSError, IndexError."""
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def _bind(path: Path) -> list[str]:
    """Show a folder. The ones above it are made by name: by themselves they would be open to root only."""
    above = [word for parent in reversed(path.parents[:-1]) for word in ("--dir", str(parent))]
    return [*above, "--ro-bind", str(path), str(path)]


def _python() -> list[Path]:
    """Where this interpreter and its packages are, and this package."""
    found = [sys.prefix, sys.base_prefix, str(Path(sys.executable).resolve().parents[1])]
    found += [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    distinct: list[Path] = []
    for path in [*map(Path, found), _PACKAGE]:
        if path.is_dir() and not any(path.is_relative_to(part) for part in (Path("/usr"), *distinct)):
            distinct.append(path)
    return distinct
