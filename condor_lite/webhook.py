"""Messages to the host's own address: signed, in their order, tried again until they are taken.

A message waits in memory. Nothing of the game waits for one: what can't be delivered stays behind, and where
too many do, the oldest go.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import time
from collections import deque
from dataclasses import dataclass
from urllib.parse import urlsplit

import httpx
import structlog

from condor_lite import __version__
from condor_lite.config import WebhookConfig

log = structlog.get_logger()

_MOST_WAITING = 100
_TIMEOUT_S = 10.0  # for all of one try
_PAUSE_FIRST_S = 1.0
_PAUSE_MOST_S = 300.0
_GIVEN_UP_AFTER_S = 86400.0


@dataclass(frozen=True, slots=True)
class _Waiting:
    event: str
    body: bytes
    since_s: float


class Webhook:
    """Delivers to one address. `put` is quick and never fails; `run` does the work."""

    def __init__(self, config: WebhookConfig) -> None:
        self._config = config
        self._host = urlsplit(config.url).hostname  # the rest of an address may be a secret
        self._waiting: deque[_Waiting] = deque()
        self._came = asyncio.Event()

    @property
    def waiting(self) -> int:
        """How many messages are not delivered yet."""
        return len(self._waiting)

    def put(self, event: str, body: bytes) -> None:
        """Have this JSON delivered."""
        if len(self._waiting) >= _MOST_WAITING:
            dropped = self._waiting.popleft()
            log.error("webhook_dropped", dropped=dropped.event, why=f"{_MOST_WAITING} messages wait already")
        self._waiting.append(_Waiting(event, body, time.monotonic()))
        self._came.set()

    async def run(self) -> None:
        """Deliver, the oldest first, until cancelled."""
        async with await asyncio.to_thread(_client) as client:  # reading the certificates takes a moment
            try:
                while True:
                    await self._deliver_all(client)
                    await self._came.wait()
                    self._came.clear()
            finally:
                if self._waiting:
                    log.warning("webhook_not_delivered", messages=len(self._waiting), host=self._host)

    async def _deliver_all(self, client: httpx.AsyncClient) -> None:
        pause_s = _PAUSE_FIRST_S
        while self._waiting:
            message = self._waiting[0]
            failure = await self._try(client, message.body)
            if failure is None:
                pause_s = _PAUSE_FIRST_S
            elif time.monotonic() - message.since_s > _GIVEN_UP_AFTER_S:
                log.error("webhook_dropped", dropped=message.event, why=f"not taken for a day: {failure}")
            else:
                log.warning(
                    "webhook_failed", about=message.event, host=self._host, error=failure, retry_in_s=pause_s
                )
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _PAUSE_MOST_S)
                continue
            if self._waiting and self._waiting[0] is message:  # not dropped meanwhile
                self._waiting.popleft()

    async def _try(self, client: httpx.AsyncClient, body: bytes) -> str | None:
        """Deliver once; why that failed, or None. The answer's body is not read."""
        timestamp = str(int(time.time()))
        headers = {
            "content-type": "application/json",
            "condor-lite-timestamp": timestamp,
            "condor-lite-signature": f"sha256={sign(self._config.secret, timestamp, body)}",
        }
        try:
            async with (
                asyncio.timeout(_TIMEOUT_S),
                client.stream("POST", self._config.url, content=body, headers=headers) as answer,
            ):
                return None if answer.is_success else f"HTTP {answer.status_code}"
        except (TimeoutError, httpx.TimeoutException):  # whichever of the two notices first
            return f"no answer within {_TIMEOUT_S:.0f} s"
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            return f"{type(error).__name__}: {error}".rstrip(": ").replace(self._config.url, "the address")


def sign(secret: str, timestamp: str, body: bytes) -> str:
    """HMAC-SHA256 of the timestamp, a dot and the body, in hexadecimal digits."""
    return hmac.new(secret.encode(), timestamp.encode() + b"." + body, hashlib.sha256).hexdigest()


def _client() -> httpx.AsyncClient:
    return httpx.AsyncClient(timeout=_TIMEOUT_S, headers={"user-agent": f"condor-lite/{__version__}"})
