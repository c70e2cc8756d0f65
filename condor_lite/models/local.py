"""One local model over time: started, watched, restarted, replaced by new code, given up, tried again."""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

import anyio
import structlog

from condor_lite.models.folder import ModelFolder
from condor_lite.models.process import LaunchError, LaunchSettings, ModelProcess, launch, note

log = structlog.get_logger(__name__)

_starts = itertools.count(1)


class LocalState(StrEnum):
    STARTING = "starting"
    RUNNING = "running"
    RESTARTING = "restarting"  # it died or did not start; the next attempt comes within a minute
    GIVEN_UP = "given up"  # no attempt before its code changes or a long time has passed
    REPORTED = "reported"  # the game asked for it to be stopped; tried again like one given up
    REJECTED = "rejected"  # its folder is not a model's


@dataclass(frozen=True, slots=True)
class LocalModelState:
    """What a host sees of a local model. `since` is epoch seconds on the wall."""

    model_id: str
    name: str
    state: LocalState
    since: float
    reason: str | None
    restarts: int
    deployment_id: str | None


@dataclass(frozen=True, slots=True)
class Patience:
    """How long things may take and how often they are tried. Seconds on the wall."""

    scan_s: float = 2.0
    forget_s: float = 3600.0
    setup_timeout_s: float = 20.0
    stop_grace_s: float = 2.0
    backoff_s: float = 1.0
    max_backoff_s: float = 60.0
    failures: int = 5
    healthy_s: float = 300.0
    quarantine_s: float = 3600.0
    max_quarantine_s: float = 86400.0

    def backoff(self, failures: int) -> float:
        """The pause after so many failures in a row."""
        return float(min(self.max_backoff_s, self.backoff_s * 2 ** (failures - 1)))

    def quarantine(self, times: int) -> float:
        """The pause after having been given up or reported so many times with the same code."""
        return float(min(self.max_quarantine_s, self.quarantine_s * 2 ** (times - 1)))


class LocalModel:
    """Keeps one model's process running. `announce` is told at once of each deployment that comes or goes."""

    def __init__(
        self,
        source: ModelFolder,
        settings: LaunchSettings,
        patience: Patience,
        announce: Callable[[list[dict[str, Any]]], None],
    ) -> None:
        self.source = source
        self._settings = settings
        self._patience = patience
        self._announce = announce
        self._process: ModelProcess | None = None
        self._died: tuple[ModelProcess, str] | None = None
        self._report: str | None = None
        self._restart = False
        self._tried: tuple[str, str | None] | None = None
        self._started_s = 0.0
        self._starts = 0
        self._failures = 0
        self._quarantines = 0
        self._retry_at_s = math.inf
        self._wake = anyio.Event()
        self._state = LocalState.STARTING
        self._since = time.time()
        self._reason: str | None = None
        self._retired = False

    @property
    def state(self) -> LocalModelState:
        return LocalModelState(
            model_id=self.source.model_id,
            name=self.source.name,
            state=self._state,
            since=self._since,
            reason=self._reason,
            restarts=max(0, self._starts - 1),
            deployment_id=self.deployment_id,
        )

    @property
    def deployment_id(self) -> str | None:
        """The running deployment's."""
        return self._process.deployment_id if self._process else None

    @property
    def entry(self) -> dict[str, Any] | None:
        """The running deployment as the orchestrator's messages describe it."""
        return self._entry(self._process, "RUNNING") if self._process else None

    def update(self, source: ModelFolder) -> None:
        """Take over what the folder says now; changed code is started beside the old, which then ends."""
        if source == self.source:
            return
        self.source = source
        self._wake.set()
        if self._process and source.problem is None and source.code_hash == self._process.source.code_hash:
            self._announce([self._entry(self._process, "RUNNING")])  # only its description changed

    def report(self, reason: str) -> None:
        """The game says that the running deployment is useless: stop it."""
        if self._process and self._report is None:
            self._report = reason
            self._wake.set()

    def retire(self) -> None:
        """The game ends: a process that ends now, however it does, is neither missed nor replaced."""
        self._retired = True

    def restart(self) -> None:
        """Start a new process now, given up or not; one that runs ends when the new one is up."""
        self._restart = True
        self._wake.set()

    async def run(self) -> None:
        """Until cancelled; no process is left behind then."""
        async with anyio.create_task_group() as tasks:
            try:
                while True:
                    await self._attempt(tasks)
                    await self._wait_for_next_attempt()
            finally:
                await self._clear_away()
                if self._process:
                    await self._stop(self._process)
                tasks.cancel_scope.cancel()

    async def _attempt(self, tasks: anyio.abc.TaskGroup) -> None:
        source, self._tried, self._restart = self.source, self._version, False
        self._retry_at_s = math.inf
        if source.problem is not None:
            self._refuse(LocalState.REJECTED, source.problem)
            return
        if not self._process:
            self._set(LocalState.STARTING, self._reason)
        now = datetime.now(UTC)
        stamp = f"{now:%Y%m%d_%H%M%S}_{now.microsecond // 1000:03}"
        deployment_id = f"{source.model_id}_{stamp}_{next(_starts)}"
        try:
            process = await launch(source, deployment_id, self._settings)
        except LaunchError as error:
            self._failed(str(error), final=error.final)
            return
        await self._clear_away()
        old, self._process, self._report = self._process, process, None
        self._started_s = anyio.current_time()
        self._starts += 1
        self._set(LocalState.RUNNING, None)
        entries = [self._entry(process, "RUNNING")]
        self._announce([*entries, self._entry(old, "STOPPED")] if old else entries)
        log.debug("model_running", model_id=source.model_id, deployment_id=deployment_id, port=process.port)
        tasks.start_soon(self._watch, process, name=f"model {source.model_id}")
        if old:
            await old.stop()

    async def _watch(self, process: ModelProcess) -> None:
        how = await process.wait()
        if process is self._process and not self._retired:  # otherwise its end was wanted
            self._process = None
            self._died = (process, how)
            self._set(LocalState.RESTARTING, how)
            self._announce([self._entry(process, "STOPPED")])
            self._wake.set()

    async def _wait_for_next_attempt(self) -> None:
        while True:
            with anyio.move_on_after(self._retry_at_s - anyio.current_time()):
                await self._wake.wait()
            self._wake = anyio.Event()
            if self._died:
                how = self._died[1]
                await self._clear_away()
                self._failed(how, final=False, lived_s=anyio.current_time() - self._started_s)
            if self._report is not None and self._process:
                reason, self._report = self._report, None
                await self._stop(self._process)
                self._quarantine(LocalState.REPORTED, reason, anyio.current_time() - self._started_s)
            if self._restart or self._version != self._tried:
                self._failures = self._quarantines = 0
                return
            if anyio.current_time() >= self._retry_at_s:
                return

    async def _clear_away(self) -> None:
        """End what a process that died had started itself."""
        if self._died:
            (process, _), self._died = self._died, None
            await process.stop()

    async def _stop(self, process: ModelProcess) -> None:
        self._process = None
        self._announce([self._entry(process, "STOPPED")])
        await process.stop()

    def _failed(self, reason: str, *, final: bool, lived_s: float = 0.0) -> None:
        if lived_s >= self._patience.healthy_s:
            self._failures = 0
        self._failures += 1
        if final or self._failures >= self._patience.failures:
            self._quarantine(LocalState.GIVEN_UP, reason, lived_s)
            return
        delay_s = self._patience.backoff(self._failures)
        self._retry_at_s = anyio.current_time() + delay_s
        self._refuse(LocalState.RESTARTING, reason, retry_s=delay_s)

    def _quarantine(self, state: LocalState, reason: str, lived_s: float) -> None:
        if lived_s >= self._patience.max_quarantine_s:
            self._quarantines = 0
        self._failures = 0
        self._quarantines += 1
        delay_s = self._patience.quarantine(self._quarantines)
        self._retry_at_s = anyio.current_time() + delay_s
        self._refuse(state, reason, retry_s=delay_s)

    def _refuse(self, state: LocalState, reason: str, **fields: Any) -> None:
        model_id = self.source.model_id
        if self._process:  # the deployment before goes on
            self._set(LocalState.RUNNING, f"its new code does not run: {reason}")
        else:
            self._set(state, reason)
        shown = self._state.value
        log.warning("model_not_running", model_id=model_id, state=shown, reason=self._reason, **fields)
        asyncio.get_running_loop().run_in_executor(None, note, self._settings, self.source, reason)

    @property
    def _version(self) -> tuple[str, str | None]:
        return self.source.code_hash, self.source.problem

    def _set(self, state: LocalState, reason: str | None) -> None:
        self._state, self._since, self._reason = state, time.time(), reason

    def _entry(self, process: ModelProcess, state: str) -> dict[str, Any]:
        source = self.source if self.source.problem is None else process.source
        return {
            "deployment_id": process.deployment_id,
            "model_id": source.model_id,
            "infos": {
                "model_name": source.name,
                "cruncher_id": source.cruncher_id,
                "cruncher_name": source.cruncher_name,
                "cruncher_wallet_pubkey": source.cruncher_id,
                "cruncher_hotkey": None,
                "code_hash": process.source.code_hash,
                "benchmark": source.benchmark,
            },
            "state": state,
            "ip": process.ip,
            "port": process.port,
        }
