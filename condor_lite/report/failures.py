"""Errors: JSON for programs, a page for people. What a caller sent is never repeated in one."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus

import orjson
from starlette.responses import Response

from condor_lite.report.answers import Failure
from condor_lite.report.live import Live
from condor_lite.report.pages.common import HTML, render
from condor_lite.report.replies import JSON


def prefers_html(accept: str) -> bool:
    """Whether a client would rather have a page, as browsers do. One that takes anything gets JSON."""
    weights: dict[str, float] = {}
    for offer in accept.lower().split(","):
        kind, _, more = offer.replace(" ", "").partition(";")
        weight = more.rpartition("q=")[2] if "q=" in more else "1"
        try:
            weights[kind] = float(weight)
        except ValueError:
            continue
    html = weights.get("text/html", 0.0)
    return html > 0 and html >= weights.get("application/json", 0.0)


def failure(
    live: Live,
    accept: str,
    status: int,
    error: str,
    detail: str,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """An error as this client reads it."""
    more = {"cache-control": "no-store", "vary": "Accept", **(headers or {})}
    if prefers_html(accept):
        title = HTTPStatus(status).phrase
        page = render(live, "error.html", status=status, title=title, error=error, detail=detail)
        return Response(page, status, more, HTML)
    return Response(orjson.dumps(Failure(error, detail)), status, more, JSON)
