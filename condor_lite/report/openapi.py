"""The API described as OpenAPI 3.1, from the very types that read the requests and make the answers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from http import HTTPStatus
from inspect import cleandoc
from typing import Any

import msgspec

from condor_lite import __version__
from condor_lite.report.answers import Failure
from condor_lite.report.context import Context
from condor_lite.report.params import Kind
from condor_lite.report.replies import JSON, Reply
from condor_lite.report.stream import EVENT_STREAM, Subscription

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """`answer`: the type of the body of a 200, str where it is text; `events`: where that is a stream of
    events, their data's types by name; `params`: the dataclass of its parameters; `failures`: the
    types of those errors that say more than others do. The handler's docstring is its summary.
    """

    path: str
    handler: Callable[[Context, Any], Awaitable[Reply | Subscription]]
    params: type
    answer: Any
    family: str
    failures: Mapping[int, type] = field(default_factory=dict)
    media_types: Sequence[str] = (JSON,)
    events: Mapping[str, type] = field(default_factory=dict)

    @property
    def url(self) -> str:
        """The path as others write it: without the routing's `:path`."""
        return self.path.replace(":path", "")


FAMILIES = {
    "hub": "What the CrunchDAO hub and its coordinator web app read.",
    "game": "The game's own endpoints.",
    "operations": "Whether it runs, and what.",
}

_ABOUT = (
    "Read-only. Lists are bare arrays, absent numbers are null. Times are ISO 8601 with Z, except in charted "
    "columns, which have no zone; inside of arrays they are epoch seconds. A time that is sent may have no "
    "zone, too, and is UTC then. HEAD works wherever GET does. Unknown parameters are ignored; one that is "
    "sent empty counts as left out, except for projectIds, where it names no model."
)
REASONS = {
    400: "A parameter that can't be used; `detail` says what would be right.",
    404: "There is nothing there; `detail` says why.",
    413: "A request has no body.",
    429: "Too many requests at once on one connection.",
    431: "The address or the headers are too large.",
    500: "A fault of the program.",
    503: "The database is too slow or can't be read, or there are too many clients: try again later.",
}
_ANSWER_HEADERS: Json = {
    "ETag": {"description": "names these bytes", "schema": {"type": "string"}},
    "Cache-Control": {"description": "how long the answer holds", "schema": {"type": "string"}},
}
_UNCHANGED = "It is as the client has it."
_NEXT_PAGE: Json = {
    "X-Next-Before": {
        "description": "where there is more: what to send as `before` for the next page",
        "schema": {"type": "string"},
    }
}


def document(endpoints: Sequence[Endpoint], title: str, base_path: str = "") -> Json:
    """The whole document. `base_path`: what all addresses begin with."""
    types = [endpoint.answer for endpoint in endpoints]
    types += [kind for endpoint in endpoints for kind in endpoint.failures.values()]
    types += [kind for endpoint in endpoints for kind in endpoint.events.values()]
    types.append(Failure)
    made, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    schemas = dict(zip(types, made, strict=True))
    for schema in components.values():
        if "description" in schema:
            schema["description"] = cleandoc(schema["description"])
        if "properties" in schema:  # an object always has all of its fields, and no others
            schema["required"] = list(schema["properties"])
            schema["additionalProperties"] = False
            for about in schema["properties"].values():
                about.pop("default", None)
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": __version__, "description": _ABOUT},
        "servers": [{"url": base_path or "/"}],
        "tags": [{"name": name, "description": about} for name, about in FAMILIES.items()],
        "paths": {endpoint.url: {"get": _operation(endpoint, schemas)} for endpoint in endpoints},
        "components": {
            "schemas": components,
            "responses": {
                _name(status): _failure(reason, schemas[Failure]) for status, reason in REASONS.items()
            },
            "parameters": {
                "IfNoneMatch": {
                    "name": "If-None-Match",
                    "in": "header",
                    "description": "an ETag: the answer is 304 while it would be the same",
                    "schema": {"type": "string"},
                }
            },
        },
    }


def _operation(endpoint: Endpoint, schemas: Mapping[Any, Json]) -> Json:
    named = [_parameter(entry) for entry in fields(endpoint.params)]
    parameters = [parameter for parameter in named if parameter["name"] != "Accept"]  # the media types say it
    sent_in = {parameter["in"] for parameter in parameters}
    impossible = {status for status, place in ((400, "query"), (404, "path")) if place not in sent_in}
    paged = any(parameter["name"] == "before" for parameter in parameters)
    headers = {**_ANSWER_HEADERS, **(_NEXT_PAGE if paged else {})}
    content = {kind: {"schema": schemas[endpoint.answer]} for kind in endpoint.media_types}
    if endpoint.events:  # it has no end, and so no tag; OpenAPI 3.1 has no words for what is in it
        headers = {}
        content[EVENT_STREAM]["x-events"] = {name: schemas[kind] for name, kind in endpoint.events.items()}
    if_none_match = [] if endpoint.events else [{"$ref": "#/components/parameters/IfNoneMatch"}]
    summary, _, more = (endpoint.handler.__doc__ or "").partition("\n\n")
    return {
        "operationId": f"{endpoint.family}_{endpoint.handler.__name__}",
        "tags": [endpoint.family],
        "summary": summary.strip(),
        **({"description": cleandoc(more)} if more.strip() else {}),
        "parameters": parameters + if_none_match,
        "responses": {
            "200": {
                "description": "The answer.",
                "headers": headers,
                "content": content,
            },
            **({} if endpoint.events else {"304": {"description": _UNCHANGED, "headers": headers}}),
            **{
                str(status): {"$ref": f"#/components/responses/{_name(status)}"}
                for status in REASONS
                if status not in impossible
            },
            **{
                str(status): _failure(REASONS[status], schemas[kind])
                for status, kind in endpoint.failures.items()
            },
        },
    }


def _parameter(entry: Field[Any]) -> Json:
    kind: Kind = entry.metadata["kind"]
    schema = dict(kind.schema)
    if entry.default is not MISSING and entry.default is not None:
        schema["default"] = entry.default
    return {
        "name": kind.name or entry.name,
        "in": kind.place,
        "required": entry.default is MISSING,
        **({"allowEmptyValue": True} if kind.place == "query" and not kind.may_be_empty else {}),
        **({"description": kind.doc} if kind.doc else {}),
        "schema": schema,
        # An array is one value, joined by commas.
        **({"style": "form", "explode": False} if schema["type"] == "array" else {}),
    }


def _failure(reason: str, schema: Json) -> Json:
    return {
        "description": reason,
        "content": {
            JSON: {"schema": schema},
            "text/html": {"schema": {"type": "string", "description": "for a client that prefers it"}},
        },
    }


def _name(status: int) -> str:
    return HTTPStatus(status).phrase.replace(" ", "")
