"""The routes: every endpoint once, with its handler, parameters and answer; and what holds for all."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import structlog
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from condor_lite.errors import QueryTimeout, StorageError
from condor_lite.report import answers, game, hub, ops, pages, params
from condor_lite.report.context import Context, NotFound
from condor_lite.report.live import Live
from condor_lite.report.params import BadParameter, NoParams
from condor_lite.report.replies import Reply, failure, respond
from condor_lite.storage.database import Readers

log = structlog.get_logger()

P = TypeVar("P")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """`answer`: the type of the body of a 200, `params`: the dataclass of its parameters."""

    path: str
    handler: Callable[[Context, Any], Awaitable[Reply]]
    params: type
    answer: Any
    failures: tuple[int, ...] = ()


ENDPOINTS: tuple[Endpoint, ...] = (
    Endpoint("/reports/models", hub.models, NoParams, list[answers.ModelRow]),
    Endpoint("/reports/leaderboard", hub.leaderboard, NoParams, list[answers.LeaderboardRow]),
    Endpoint("/reports/models/global", hub.snapshots, hub.SnapshotParams, list[answers.SnapshotRow], (400,)),
    Endpoint(
        "/reports/models/params",
        hub.setting_snapshots,
        hub.SnapshotParams,
        list[answers.SettingSnapshotRow],
        (400,),
    ),
    Endpoint(
        "/reports/predictions", hub.predictions, hub.PredictionsParams, list[answers.PredictionRow], (400,)
    ),
    Endpoint("/reports/schema", hub.schema, NoParams, answers.ReportSchema),
    Endpoint("/reports/feeds", hub.feeds, NoParams, list[answers.FeedRow]),
    Endpoint("/reports/feeds/tail", hub.feed_tail, hub.TailParams, list[answers.FeedPointRow], (400,)),
    Endpoint("/leaderboard", game.leaderboard, game.LeaderboardParams, answers.WindowLeaderboard, (400,)),
    Endpoint(
        "/model/{model_id:path}/metrics", game.model_metrics, game.ModelParams, answers.ModelMetrics, (404,)
    ),
    Endpoint("/statistics", game.statistics, NoParams, answers.Statistics),
    Endpoint("/rounds", game.rounds, game.RoundsParams, list[answers.RoundRow], (400,)),
    Endpoint(
        "/rounds/{round_id}/predictions/{model_id:path}",
        game.prediction_detail,
        game.PredictionParams,
        answers.PredictionDetail,
        (404,),
    ),
    Endpoint("/rounds/{round_id}", game.round_detail, game.RoundParams, answers.RoundDetail, (404,)),
    Endpoint("/healthz", ops.healthz, NoParams, answers.Health),
    Endpoint("/readyz", ops.readyz, NoParams, answers.Readiness, (503,)),
    Endpoint("/version", ops.version, NoParams, answers.Version),
)

_SECURITY_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
}
_METHODS = ("GET", "HEAD")


def create_app(live: Live, readers: Readers) -> Starlette:
    """The whole report: the API and the pages. It reads; nothing that it is asked changes anything."""
    context = Context(live, readers)
    routes: list[Route | Mount] = [
        Route(endpoint.path, _serve(context, endpoint.handler, endpoint.params)) for endpoint in ENDPOINTS
    ]
    routes.append(Route("/", _serve(context, pages.leaderboard, game.LeaderboardParams)))
    routes.append(Mount("/static", StaticFiles(packages=[("condor_lite.report", "static")])))
    middleware = [Middleware(SecurityHeaders)]
    if origins := live.config.report.cors_origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=origins,
                allow_methods=_METHODS,
                allow_headers=["If-None-Match"],
                expose_headers=["ETag", "X-Next-Before"],
            )
        )
    return Starlette(routes=routes, middleware=middleware, exception_handlers={HTTPException: _http_failure})


class SecurityHeaders:
    """Puts what a browser must not do into every response."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_SECURITY_HEADERS)
            await send(message)

        await self._app(scope, receive, send_with_headers if scope["type"] == "http" else send)


def _serve(
    context: Context, handler: Callable[[Context, P], Awaitable[Reply]], kind: type[P]
) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        try:
            sent = params.read(kind, request.query_params.getlist, request.path_params)
            return respond(request, await handler(context, sent))
        except BadParameter as error:
            return failure(400, "bad parameter", str(error))
        except NotFound as error:
            return failure(404, "not found", str(error))
        except StorageError as error:
            what = "too slow" if isinstance(error, QueryTimeout) else "the database can't be read"
            return failure(503, what, str(error), {"retry-after": "5"})
        except Exception:
            # Caught here, so that a client never sees a trace and the server's own log stays quiet.
            log.exception("request_failed", path=handler.__name__)
            return failure(
                500, "internal error", "this is a fault of the program; the host's log has the details"
            )

    return endpoint


_EXPLAINED = {
    404: ("not found", "there is nothing at this address; the leaderboard is at /leaderboard"),
    405: ("method not allowed", "nothing here is changed over HTTP: use GET or HEAD"),
}


async def _http_failure(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what, detail = _EXPLAINED.get(error.status_code, (error.detail.lower(), error.detail))
    return failure(error.status_code, what, detail, error.headers)
