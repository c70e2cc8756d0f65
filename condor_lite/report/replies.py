"""Bodies, packed once: JSON, its ETag, its gzip; and what a request gets: the body, or a 304."""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from itertools import islice
from typing import Any

import orjson
from starlette.types import Scope, Send

JSON = "application/json"
_ZIP_FROM_BYTES = 2048
_ZIP_LEVEL = 4  # a third of level 9's time for a tenth more bytes
_READ = {b"accept-encoding", b"if-none-match"}
_PIECE_BYTES = 256 * 1024
_ROWS_AT_ONCE = 500  # orjson keeps the interpreter to itself while it writes: about a millisecond


@dataclass(frozen=True, slots=True)
class Reply:
    """A body ready to be sent. `head`: the headers that it has for every client."""

    body: bytes
    zipped: bytes | None
    etag: bytes
    status: int
    head: tuple[tuple[bytes, bytes], ...]


def encode_rows(rows: Iterable[object]) -> bytes:
    """A JSON array, made in portions: other threads get their turn in between, and few rows live at once."""
    rows = iter(rows)
    portions = iter(lambda: orjson.dumps(list(islice(rows, _ROWS_AT_ONCE)))[1:-1], b"")
    return b"[" + b",".join(portions) + b"]"


def pack(
    value: Any,
    max_age_s: int = 0,
    *,
    status: int = 200,
    media_type: str = JSON,
    headers: Mapping[str, str] | None = None,
) -> Reply:
    """`value`: anything JSON can hold, dataclasses included, or bytes that are the body already.

    `max_age_s`: how long it holds; 0: it is not to be kept.
    """
    body = value if isinstance(value, bytes) else orjson.dumps(value)
    zipped = None
    if len(body) >= _ZIP_FROM_BYTES:
        zipped = gzip.compress(body, compresslevel=_ZIP_LEVEL, mtime=0)
    # Weak: the same tag stands for the body and for its gzip, of which the shorter one is soon read.
    etag = f'W/"{blake2b(zipped or body, digest_size=12).hexdigest()}"'
    head = {
        "content-type": media_type,
        "cache-control": f"public, max-age={max_age_s}" if max_age_s else "no-store",
        **({"etag": etag} if status == 200 else {}),
        **(headers or {}),
    }
    encoded = tuple((name.encode(), text.encode()) for name, text in head.items())
    return Reply(body, zipped, etag.encode(), status, encoded)


async def respond(scope: Scope, send: Send, reply: Reply, vary: bytes = b"Accept-Encoding") -> None:
    """Answer this request: with the body as the client accepts it, or 304 where it has it already.

    In pieces, each sent when the client has taken those before: what all share is not copied for each.
    """
    sent = {name: value for name, value in scope["headers"] if name in _READ}
    status, body, headers = reply.status, reply.body, [*reply.head, (b"vary", vary)]
    if status == 200 and b"if-none-match" in sent and _has_it(sent[b"if-none-match"], reply.etag):
        status, body = 304, b""
    else:
        if reply.zipped is not None and _accepts_gzip(sent.get(b"accept-encoding", b"")):
            body = reply.zipped
            headers.append((b"content-encoding", b"gzip"))
        headers.append((b"content-length", b"%d" % len(body)))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    for start in range(0, len(body) - _PIECE_BYTES, _PIECE_BYTES):
        piece = body[start : start + _PIECE_BYTES]
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": body[-(len(body) % _PIECE_BYTES or _PIECE_BYTES) :]})


def _has_it(if_none_match: bytes, etag: bytes) -> bool:
    tags = [tag.strip().removeprefix(b"W/") for tag in if_none_match.split(b",")]
    return b"*" in tags or etag.removeprefix(b"W/") in tags


@lru_cache(maxsize=256)
def _accepts_gzip(accept_encoding: bytes) -> bool:
    for offer in accept_encoding.lower().split(b","):
        coding, _, weight = offer.replace(b" ", b"").partition(b";")
        if coding in (b"gzip", b"*"):
            return weight not in (b"q=0", b"q=0.0", b"q=0.00", b"q=0.000")
    return False
