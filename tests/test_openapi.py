"""The API is as it is described: schemathesis asks for everything, in ways right and wrong, and looks at the
answers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import fields
from typing import Any

import httpx
import jsonschema
import orjson
import pytest
import schemathesis
from anyio.from_thread import start_blocking_portal
from hypothesis import HealthCheck, settings

from condor_lite.report.api import ENDPOINTS
from condor_lite.report.connections import MOST_HEAD_BYTES
from condor_lite.report.openapi import Endpoint, document
from condor_lite.report.params import read_moment
from condor_lite.report.replies import JSON
from tests.served import BTC_ROUND, play, serve

TITLE = "Tiny & small"
EXAMPLES = 20
DOCUMENT = document(ENDPOINTS, TITLE)
FILL = {"model_id": "1", "round_id": BTC_ROUND}

asked: Counter[int] = Counter()
schema = schemathesis.openapi.from_dict(DOCUMENT).exclude(path="/events")  # has no end: tests/test_events.py


@schema.hook
def filter_query(context: Any, query: dict[str, Any] | None) -> bool:
    """A schema can't say that a range must not end before it starts."""
    try:
        return not query or read_moment(query["start"]) <= read_moment(query["end"])
    except (KeyError, AttributeError, ValueError):
        return True


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where a small game is served, from another thread."""

    @asynccontextmanager
    async def played() -> AsyncIterator[str]:
        async with serve(tmp_path_factory.mktemp("game")) as game:
            await play(game)
            yield game.server.url

    with start_blocking_portal() as portal, portal.wrap_async_context_manager(played()) as served:
        yield served


@schema.parametrize()
@settings(
    max_examples=EXAMPLES,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
def test_schemathesis_finds_nothing(case: schemathesis.Case, url: str) -> None:
    response = case.call(base_url=url, timeout=60)
    if response.status_code == 431:  # no schema bounds the whole of an address
        assert len(response.request.url or "") > MOST_HEAD_BYTES - 1000
    else:
        case.validate_response(response)
    asked[response.status_code] += 1


def test_it_was_asked_in_many_ways() -> None:
    expected = EXAMPLES * sum(not endpoint.events for endpoint in ENDPOINTS)
    if asked.total() < expected:
        pytest.skip("only after all of the endpoints")
    assert set(asked) >= {200, 304, 400, 404, 405}
    assert asked[200] > expected / 2
    assert not any(status >= 500 for status in asked)


@pytest.mark.parametrize(
    "endpoint",
    [endpoint for endpoint in ENDPOINTS if endpoint.media_types == (JSON,)],
    ids=lambda endpoint: endpoint.url,
)
def test_a_real_answer_is_as_described(endpoint: Endpoint, url: str) -> None:
    answer = httpx.get(url + endpoint.url.format(**FILL), timeout=60).raise_for_status()
    operation = DOCUMENT["paths"][endpoint.url]["get"]
    described = operation["responses"]["200"]

    assert answer.json() != []
    validate(answer.json(), described["content"]["application/json"]["schema"])
    assert {name.lower() for name in described["headers"]} - set(answer.headers) <= {"x-next-before"}
    for parameter in operation["parameters"]:
        if "enum" in (values := parameter.get("schema", {})):
            for value in values["enum"]:
                each = httpx.get(
                    url + endpoint.url, params={parameter["name"]: value}, timeout=60
                ).raise_for_status()
                validate(each.json(), described["content"]["application/json"]["schema"])


def test_a_wrong_answer_would_be_noticed(url: str) -> None:
    described = DOCUMENT["paths"]["/statistics"]["get"]["responses"]["200"]["content"]["application/json"]
    body = httpx.get(f"{url}/statistics", timeout=60).json()
    for wrong in (
        body | {"more": 1},
        {name: value for name, value in body.items() if name != "game"},
        body | {"total_models": None},
        body | {"assets": "BTC"},
    ):
        with pytest.raises(jsonschema.ValidationError):
            validate(wrong, described["schema"])


def test_the_document_is_served_and_names_every_endpoint_and_parameter(url: str) -> None:
    served = httpx.get(f"{url}/openapi.json", timeout=60).json()

    assert served == orjson.loads(orjson.dumps(DOCUMENT))
    assert list(served["paths"]) == [endpoint.url for endpoint in ENDPOINTS]
    for endpoint in ENDPOINTS:
        operation = served["paths"][endpoint.url]["get"]
        named = [parameter["name"] for parameter in operation["parameters"] if "name" in parameter]
        taken = [entry.metadata["kind"].name or entry.name for entry in fields(endpoint.params)]
        assert named == [name for name in taken if name != "Accept"]
        assert operation["summary"]
        assert set(re.findall(r"{(\w+)}", endpoint.url)) <= set(named)
    limit = next(p for p in served["paths"]["/rounds"]["get"]["parameters"] if p.get("name") == "limit")
    assert limit["schema"] == {"type": "integer", "minimum": 1, "maximum": 1000, "default": 100}


def validate(body: object, described: dict[str, Any]) -> None:
    root = described | {"components": DOCUMENT["components"]}
    jsonschema.Draft202012Validator(root, format_checker=jsonschema.FormatChecker()).validate(body)
