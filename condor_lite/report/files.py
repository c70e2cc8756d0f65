"""The static files: read and packed once, at addresses that change with what is in them."""

from __future__ import annotations

from functools import cache
from hashlib import blake2b
from importlib import resources

from starlette.datastructures import QueryParams
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from condor_lite.report.replies import Reply, pack, respond

FOREVER = "public, max-age=31536000, immutable"

_BRIEFLY_S = 60
_TYPES = {
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
_ROOT = resources.files("condor_lite.report") / "static"


@cache
def address(name: str) -> str:
    """Where a page finds the file `name`: an address that no other content ever has."""
    return f"/static/{name}?v={_tag(name)}"


class Files:
    """Answers at `/static/{name}`. At the versioned address a file holds for ever."""

    def __init__(self) -> None:
        found = [file.name for file in _ROOT.iterdir() if file.name.rpartition(".")[2] in _TYPES]
        self._briefly = {name: _pack(name) for name in found}
        self._forever = {name: _pack(name, FOREVER) for name in found}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        name = scope["path_params"]["name"]
        if name not in self._briefly:
            raise HTTPException(404)
        versioned = QueryParams(scope["query_string"]).get("v") == _tag(name)
        await respond(scope, send, (self._forever if versioned else self._briefly)[name])


@cache
def _read(name: str) -> bytes:
    """Once: an upgrade beside a running game must not give old content a new address."""
    return (_ROOT / name).read_bytes()


@cache
def _tag(name: str) -> str:
    return blake2b(_read(name), digest_size=6).hexdigest()


def _pack(name: str, cache_control: str | None = None) -> Reply:
    headers = {"cache-control": cache_control} if cache_control else None
    media_type = _TYPES[name.rpartition(".")[2]]
    return pack(_read(name), _BRIEFLY_S, media_type=media_type, headers=headers)
