"""The routes: every endpoint once, with its handler, parameters and answer; and what holds for all."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import structlog
from starlette.applications import Starlette
from starlette.datastructures import Headers, QueryParams
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from condor_lite.errors import QueryTimeout, StorageError
from condor_lite.report import answers, bundle, explanation, game, hub, ops, params
from condor_lite.report.connections import network
from condor_lite.report.context import Context, NotFound
from condor_lite.report.events import EVENTS
from condor_lite.report.failures import failure, prefers_html
from condor_lite.report.files import Files
from condor_lite.report.live import Live
from condor_lite.report.metrics import OPENMETRICS, TEXT
from condor_lite.report.openapi import REASONS, Endpoint, document
from condor_lite.report.pages import about, leaderboard, model, prices, round, rounds, status  # noqa: A004
from condor_lite.report.pages.common import FOR_S, Page, compile_templates, show
from condor_lite.report.params import BadParameter, NoParams
from condor_lite.report.replies import Reply, pack, respond
from condor_lite.report.stream import EVENT_STREAM, Subscription, TooManyReaders
from condor_lite.storage.database import Readers

log = structlog.get_logger()


async def openapi(context: Context, sent: NoParams) -> Reply:
    """This description of the API, as OpenAPI 3.1."""
    return await context.remembered("openapi", math.inf, partial(_describe, context))


async def docs(context: Context, sent: NoParams) -> Reply:
    """The same as a page."""
    return await context.remembered("docs", FOR_S, partial(_show, context))


ENDPOINTS: tuple[Endpoint, ...] = (
    Endpoint("/reports/models", hub.models, NoParams, list[answers.ModelRow], "hub"),
    Endpoint("/reports/leaderboard", hub.leaderboard, NoParams, list[answers.LeaderboardRow], "hub"),
    Endpoint("/reports/models/global", hub.snapshots, hub.SnapshotParams, list[answers.SnapshotRow], "hub"),
    Endpoint(
        "/reports/models/params",
        hub.setting_snapshots,
        hub.SnapshotParams,
        list[answers.SettingSnapshotRow],
        "hub",
    ),
    Endpoint(
        "/reports/predictions", hub.predictions, hub.PredictionsParams, list[answers.PredictionRow], "hub"
    ),
    Endpoint("/reports/schema", hub.schema, NoParams, answers.ReportSchema, "hub"),
    Endpoint("/reports/feeds", hub.feeds, NoParams, list[answers.FeedRow], "hub"),
    Endpoint("/reports/feeds/tail", hub.feed_tail, hub.TailParams, list[answers.FeedPointRow], "hub"),
    Endpoint("/leaderboard", game.leaderboard, game.LeaderboardParams, answers.WindowLeaderboard, "game"),
    Endpoint("/leaderboard.csv", game.leaderboard_csv, NoParams, str, "game", media_types=("text/csv",)),
    Endpoint(
        "/model/{model_id:path}/metrics", game.model_metrics, game.ModelParams, answers.ModelMetrics, "game"
    ),
    Endpoint("/statistics", game.statistics, NoParams, answers.Statistics, "game"),
    Endpoint("/rounds", game.rounds, game.RoundsParams, list[answers.RoundRow], "game"),
    Endpoint(
        "/rounds/{round_id}/predictions/{model_id:path}",
        explanation.prediction_detail,
        explanation.PredictionParams,
        answers.PredictionDetail,
        "game",
    ),
    Endpoint("/rounds/{round_id}", game.round_detail, game.RoundParams, answers.RoundDetail, "game"),
    Endpoint(
        "/events", ops.events, ops.EventsParams, str, "game", media_types=(EVENT_STREAM,), events=EVENTS
    ),
    Endpoint("/healthz", ops.healthz, NoParams, answers.Health, "operations"),
    Endpoint("/readyz", ops.readyz, NoParams, answers.Readiness, "operations", {503: answers.NotReady}),
    Endpoint("/metrics", ops.metrics, ops.MetricsParams, str, "operations", media_types=(TEXT, OPENMETRICS)),
    Endpoint("/version", ops.version, NoParams, answers.Version, "operations"),
    Endpoint("/openapi.json", openapi, NoParams, dict[str, Any], "operations"),
)


PAGES: tuple[Page, ...] = (
    Page("/", leaderboard.page, leaderboard.LeaderboardPageParams),
    Page("/models/{model_id:path}", model.page, model.ModelPageParams),
    Page("/rounds", rounds.page, rounds.RoundsPageParams),
    Page("/rounds/{round_id}", round.page, round.RoundPageParams),
    Page("/prices", prices.page, prices.PricesPageParams),
    Page("/status", status.page, NoParams),
    Page("/about", about.page, NoParams),
    Page("/docs", docs, NoParams),
)

_DESCRIBED_FOR_S = 60
_METHODS = ("GET", "HEAD")
_EXPLAINED = {
    404: ("not found", "there is nothing at this address; the leaderboard is at /leaderboard"),
    405: ("method not allowed", "nothing here is changed over HTTP: use GET or HEAD"),
}
_FAULT = ("internal error", "this is a fault of the program; the host's log has the details")


def create_app(live: Live, readers: Readers) -> Starlette:
    """The whole report: the API and the pages. It reads; nothing that it is asked changes anything."""
    compile_templates()
    context = Context(live, readers)

    async def http_failure(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        what, detail = _EXPLAINED.get(error.status_code, (error.detail.lower(), error.detail))
        return failure(live, _accept(request.scope), error.status_code, what, detail, error.headers)

    async def fault(request: Request, error: Exception) -> Response:
        return failure(live, _accept(request.scope), 500, *_FAULT)

    endpoints = {endpoint.path: endpoint for endpoint in ENDPOINTS}
    by_path = {page.path: page for page in PAGES}
    routes = [
        Route(path, _Answers(context, endpoints.get(path), by_path.get(path)), methods=_METHODS)
        for path in dict.fromkeys((*endpoints, *by_path))
    ]
    routes.append(Route(bundle.ADDRESS, bundle.Bundle(context), methods=_METHODS))
    routes.append(Route("/static/{name}", Files(), methods=_METHODS))
    middleware = [Middleware(_Cors, live)] if live.config.report.cors_origins else []
    if live.config.report.base_path:
        middleware.append(Middleware(_Under, live.config.report.base_path))
    app = Starlette(
        routes=routes,
        middleware=middleware,
        exception_handlers={HTTPException: http_failure, Exception: fault},
    )
    app.state.stream = context.stream
    app.router.redirect_slashes = False  # it would repeat the Host that a client sent
    return app


class _Cors(CORSMiddleware):
    def __init__(self, app: ASGIApp, live: Live) -> None:
        super().__init__(
            app,
            allow_origins=live.config.report.cors_origins,
            allow_methods=_METHODS,
            allow_headers=["If-None-Match", "Last-Event-ID"],
            expose_headers=["ETag", "X-Next-Before"],
        )
        self._live = live

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        if response.status_code == 200:
            return response
        detail = "only GET and HEAD from the origins in report.cors_origins may read this from other sites"
        return failure(self._live, "", 400, "not allowed", detail)


class _Under:
    """Takes the base path off an address, where a proxy has left it there."""

    def __init__(self, app: ASGIApp, base_path: str) -> None:
        self._app = app
        self._base_path = base_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if path == self._base_path or path.startswith(f"{self._base_path}/"):
            scope = {**scope, "path": path.removeprefix(self._base_path) or "/"}
        await self._app(scope, receive, send)


async def _describe(context: Context) -> Reply:
    title, root = context.live.config.game.name, context.live.config.report.base_path
    return await context.in_thread(lambda: pack(document(ENDPOINTS, title, root), _DESCRIBED_FOR_S))


async def _show(context: Context) -> Reply:
    title, root = context.live.config.game.name, context.live.config.report.base_path
    describe = partial(context.in_thread, document, ENDPOINTS, title, root)
    api = await context.remembered("api", math.inf, describe)
    return await show(context, "docs.html", at="/docs", api=api, errors=REASONS.items())


class _Answers:
    """What answers at a path. Errors are caught here, so that a client never sees a trace.

    A class, since Starlette wraps functions in layers that take as long as a ready-made answer.
    """

    def __init__(self, context: Context, endpoint: Endpoint | None, page: Page | None) -> None:
        self._context = context
        self._endpoint = endpoint
        self._page = page
        offers = (len(endpoint.media_types) if endpoint else 0) + (1 if page else 0)
        self._vary = b"Accept, Accept-Encoding" if offers > 1 else b"Accept-Encoding"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked = self._asked(scope)
        headers = None
        try:
            sent: Any = NoParams()
            if asked.params is not NoParams:
                query, headed = QueryParams(scope["query_string"]), Headers(scope=scope)
                sent = params.read(asked.params, query.getlist, scope["path_params"], headed.getlist)
            reply = await asked.handler(self._context, sent)
            if isinstance(reply, Subscription):
                client = scope["client"]
                events = self._context.stream.open(reply, client and network(client[0]))
        except BadParameter as error:
            status, what, detail = 400, "bad parameter", str(error)
        except NotFound as error:
            status, what, detail = 404, "not found", str(error)
        except TooManyReaders as error:
            status, what, detail, headers = 503, "too many clients", str(error), {"retry-after": "30"}
        except StorageError as error:
            status, detail, headers = 503, str(error), {"retry-after": "5"}
            what = "too slow" if isinstance(error, QueryTimeout) else "the database can't be read"
        except Exception:
            log.exception("request_failed", path=asked.path)
            status, what, detail = 500, *_FAULT
        else:
            if isinstance(reply, Subscription):
                await events(scope, receive, send)
            else:
                with self._context.sending.one(reply, scope):
                    await respond(scope, send, reply, self._vary)
            return
        response = failure(self._context.live, _accept(scope), status, what, detail, headers)
        await response(scope, receive, send)

    def _asked(self, scope: Scope) -> Endpoint | Page:
        if self._page is None or (self._endpoint is not None and not prefers_html(_accept(scope))):
            assert self._endpoint is not None
            return self._endpoint
        return self._page


def _accept(scope: Scope) -> str:
    return Headers(scope=scope).get("accept", "")
