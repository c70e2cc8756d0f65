"""`systemd`: the unit that runs this game as a service, with the paths and limits of its config."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from condor_lite.config import Config

_STOP_EXTRA_S = 15  # beside the grace: storing, ending the models, closing the database
_FAMILIES = "RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX"


def text(config: Config, path: Path | None, user: str) -> str:
    """The unit's text. `path`: the config file, None for the demo in the current folder."""
    folder = (path or Path("config.toml")).absolute().parent
    backups = [config.backup.path] if config.backup.every_s else []
    written = [str(one) for one in dict.fromkeys([config.storage.path.parent, *backups])]
    chosen = ["--config", str(path.absolute())] if path is not None else []
    command = " ".join(_quoted(part) for part in (sys.executable, "-m", "condor_lite", *chosen)).replace(
        "$", "$$"
    )
    folders = " ".join(map(_quoted, written))
    # A namespace of a model's own needs a /proc that nothing is mounted over, and netlink for its loopback.
    namespaces = (
        (
            "# orchestrator.sandbox is on: its namespaces, and mounting /proc in them, must be allowed.",
            f"{_FAMILIES} AF_NETLINK",
        )
        if config.orchestrator.sandbox and config.orchestrator.mode == "local"
        else (
            "RestrictNamespaces=yes",
            "ProtectKernelTunables=yes",
            "ProtectKernelLogs=yes",
            "ProtectHostname=yes",
            _FAMILIES,
        )
    )
    lines = (
        "# Made by: condor-lite systemd. Before the first start, as root:",
        f"#   useradd --system {user}   (where there is no such user yet)",
        f"#   install -d -m 700 -o {user} {shlex.join(written)}",
        "[Unit]",
        f"Description=condor_lite: {_plain(config.game.name)}",
        "Wants=network-online.target",
        "After=network-online.target",
        "",
        "[Service]",
        "Type=exec",
        f"User={user}",
        f"WorkingDirectory={_plain(str(folder))}",
        f"EnvironmentFile=-{_plain(str(folder / 'condor-lite.env'))}",
        f"ExecStart={command}",
        "ExecReload=/bin/kill -HUP $MAINPID",
        "# SIGTERM to the game alone, which ends its models; what is left after that is killed.",
        "KillMode=mixed",
        f"TimeoutStopSec={round(config.game.shutdown_grace_s) + _STOP_EXTRA_S}",
        "Restart=on-failure",
        "RestartSec=5",
        "# 2: a config, a port or a folder that somebody has to mend.",
        "RestartPreventExitStatus=2",
        "",
        "# A model that takes too much memory is killed alone, not the game with it.",
        "MemoryMax=75%",
        "OOMPolicy=continue",
        "TasksMax=8192",
        "LimitNOFILE=16384",
        "LimitCORE=0",
        "UMask=0077",
        "",
        "NoNewPrivileges=yes",
        "CapabilityBoundingSet=",
        "ProtectSystem=strict",
        "ProtectHome=read-only",
        f"ReadWritePaths={folders}",
        "PrivateTmp=yes",
        "PrivateDevices=yes",
        "ProtectClock=yes",
        "ProtectControlGroups=yes",
        "ProtectKernelModules=yes",
        "LockPersonality=yes",
        "RestrictRealtime=yes",
        "RestrictSUIDSGID=yes",
        "SystemCallArchitectures=native",
        *namespaces,
        "",
        "[Install]",
        "WantedBy=multi-user.target",
    )
    return "\n".join(lines) + "\n"


def _plain(value: str) -> str:
    """As systemd reads it in a value that is no command: a percent sign stands for itself when doubled."""
    return value.replace("%", "%%")


def _quoted(part: str) -> str:
    """The same for one word of several."""
    escaped = _plain(part).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"' if set(escaped) & set(" \t'\"\\;") else escaped
