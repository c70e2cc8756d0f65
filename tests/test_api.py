"""The report over a real port, on a real database file with one small game in it."""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
import socket
import sqlite3
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from html import unescape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import anyio
import anyio.lowlevel
import httpx
import msgspec
import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from condor_lite.errors import QueryTimeout, StartError
from condor_lite.explain import NotExplained, explain, explain_round, parse_round_id
from condor_lite.game.entities import (
    RoundStatus,
)
from condor_lite.report import explanation, server
from condor_lite.report.answers import horizon_label, moment, naive_moment
from condor_lite.report.api import ENDPOINTS, create_app
from condor_lite.report.connections import SECURITY_HEADERS
from condor_lite.report.context import Context
from condor_lite.report.failures import prefers_html
from condor_lite.report.params import read_moment
from condor_lite.report.replies import JSON, encode_rows
from condor_lite.storage import database, repositories
from condor_lite.storage.compression import compress
from condor_lite.storage.database import open_read_only
from tests.program import LIMIT_S, free_port
from tests.rules import GUILTY
from tests.served import (
    ALPHA,
    BTC_ROUND,
    CLOSED_ROUND,
    EVIL,
    NEW,
    NOW_S,
    OPEN_ROUND,
    START_S,
    VOID_ROUND,
    Game,
    day,
    normals,
    play,
    serve,
)

pytestmark = pytest.mark.anyio

JSON_ENDPOINTS = [endpoint for endpoint in ENDPOINTS if endpoint.media_types == (JSON,)]

NO_LEADERBOARD = {
    "window": "anchor",
    "count": 0,
    "models": [],
    "scorer_version": None,
    "mixed_versions": [],
    "uncounted_rounds": 0,
}


@pytest.fixture(scope="module")
async def game(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Game]:
    async with serve(tmp_path_factory.mktemp("game")) as served:
        await play(served)
        yield served


@pytest.fixture
async def fresh(tmp_path: Path) -> AsyncIterator[Game]:
    async with serve(tmp_path) as served:
        yield served


# Family 1: as the coordinator web app asks.


async def test_the_hub_reads_the_models(game: Game) -> None:
    rows = await game.get("/reports/models")

    assert {
        "model_id": "b/2",
        "model_name": EVIL,
        "cruncher_name": "bob",
        "cruncher_id": "p-bob",
        "deployment_id": "2_a",
    } in rows
    assert [row["model_id"] for row in rows][-1] == "new"
    assert all(isinstance(value, str) for row in rows for value in row.values())


async def test_the_hub_leaderboard_is_in_rank_order_with_flat_rows(game: Game) -> None:
    rows = await game.get("/reports/leaderboard")

    standings = game.live.leaderboard.standings if game.live.leaderboard else ()
    assert [row["model_id"] for row in rows] == [s.model.info.model_id for s in standings] + ["new"]
    by_id = {row["model_id"]: row for row in rows}
    assert by_id["1"]["rank"] == 1
    assert by_id["bench"]["rank"] is None
    assert by_id["1"]["score_anchor"] == standings[[r["model_id"] for r in rows].index("1")].overall.anchor
    assert by_id["1"]["username"] == by_id["1"]["cruncher_name"] == "alice"
    assert by_id["1"]["status"] == "RUNNING"
    assert by_id["b/2"]["status"] == "STOPPED"
    assert by_id["new"]["score_anchor"] is None
    assert by_id["1"]["created_at"] == moment(NOW_S)
    assert not any(isinstance(value, list | dict) for row in rows for value in row.values())


async def test_snapshots_are_charted_oldest_first_with_naive_times(game: Game) -> None:
    rows = await game.get("/reports/models/global", projectIds="1,b/2", start=day(-30), end=day(1))

    assert len(rows) == 4
    scores_of = {"model_id", "score_recent", "score_steady", "score_anchor"}
    assert set(rows[0]) == {*scores_of, "performed_at", "scorer_version"}
    assert [row["performed_at"] for row in rows] == sorted(row["performed_at"] for row in rows)
    assert rows[0]["performed_at"] == "2023-11-14T23:01:40"
    assert {row["model_id"] for row in rows} == {"1", "b/2"}


async def test_setting_snapshots_name_their_setting(game: Game) -> None:
    rows = await game.get("/reports/models/params", projectIds="1")

    assert {row["param"] for row in rows} == {"BTC-60-10", "ETH-60-10", "BTC-120-60"}
    row = next(row for row in rows if row["param"] == "BTC-120-60")
    assert (row["asset"], row["horizon"], row["step"]) == ("BTC", 120, 60)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", row["performed_at"])


@pytest.mark.parametrize("path", ["/reports/models/global", "/reports/models/params", "/reports/predictions"])
async def test_project_ids_may_be_joined_repeated_unknown_or_left_out(game: Game, path: str) -> None:
    joined = await game.client.get(f"{path}?projectIds=1%2Cb%2F2%2Cnobody&limit=500&utm_source=x")
    repeated = await game.client.get(f"{path}?projectIds=1&projectIds=b/2&limit=500")
    everybody = await game.get(path)

    assert joined.status_code == 200
    assert joined.json() == repeated.json()
    assert {row["model_id"] for row in joined.json()} == {"1", "b/2"}
    assert {row["model_id"] for row in everybody} == {"1", "b/2", "bench"}
    assert await game.get(path, projectIds="") == []
    assert await game.get(path, projectIds="nobody") == []


async def test_predictions_carry_scores_and_the_reasons_of_failures(game: Game) -> None:
    rows = await game.get("/reports/predictions", projectIds="b/2,1", start=day(-1), end=day(1))

    first = {row["model_id"]: row for row in rows if row["round_id"] == BTC_ROUND}
    assert [row["performed_at"] for row in rows] == sorted(row["performed_at"] for row in rows)
    assert set(first["1"]) == {
        *("model_id", "param", "asset", "horizon", "step", "score_value", "score_failed"),
        *(
            "score_failed_reason",
            "scored_at",
            "performed_at",
            "status",
            "raw_score",
            "exec_time_us",
            "round_id",
            "scorer_version",
        ),
    }
    assert first["1"]["score_failed"] is False
    assert first["1"]["score_value"] == 0.0  # the only one with a valid answer is the median
    assert first["1"]["raw_score"] > 0
    assert first["1"]["performed_at"] == naive_moment(START_S + 1).isoformat()
    assert first["1"]["scored_at"] == naive_moment(START_S + 70).isoformat()
    assert first["b/2"]["score_failed"] is True
    assert first["b/2"]["score_failed_reason"] == "invalid: segment 1: scale must be > 0"
    assert first["b/2"]["score_value"] < 0
    assert first["b/2"]["raw_score"] is None
    void = next(row for row in rows if row["round_id"] == VOID_ROUND and row["model_id"] == "1")
    assert void["score_failed_reason"] == "the round is void: the prices never came"
    pending = next(row for row in rows if row["round_id"] == OPEN_ROUND and row["model_id"] == "1")
    assert (pending["score_value"], pending["score_failed"], pending["scored_at"]) == (None, False, None)
    late = next(row for row in rows if row["round_id"] == OPEN_ROUND and row["model_id"] == "b/2")
    assert (late["status"], late["score_failed"]) == ("TIMEOUT", True)


@pytest.mark.parametrize("ids", ["1", "1,b/2,bench", None])
async def test_pages_of_predictions_are_complete_and_keep_the_newest(game: Game, ids: str | None) -> None:
    chosen = {} if ids is None else {"projectIds": ids}
    whole = await game.get("/reports/predictions", **chosen)
    pages: list[list[dict[str, Any]]] = []
    before: dict[str, str] = {}
    while True:
        answer = await game.client.get("/reports/predictions", params={**chosen, **before, "limit": 2})
        pages.insert(0, answer.json())
        if "x-next-before" not in answer.headers:
            break
        before = {"before": answer.headers["x-next-before"]}

    assert all(0 < len(page) <= 2 for page in pages)
    found = [(row["round_id"], row["model_id"]) for page in pages for row in page]
    assert len(set(found)) == len(found)
    assert set(found) == {(row["round_id"], row["model_id"]) for row in whole}
    assert pages[-1][-1]["round_id"] == OPEN_ROUND
    older = await game.get("/reports/predictions", **chosen, before=moment(START_S + 20))
    assert {row["round_id"] for row in older} == {BTC_ROUND}


async def test_the_range_of_time_is_kept_in_every_notation(game: Game) -> None:
    start = moment(START_S + 20)  # 23:00:20Z
    spellings = [start, start.removesuffix("Z"), "2023-11-15T01:00:20+02:00", "2023-11-14 23:00:20"]
    answers = [
        await game.get("/reports/predictions", projectIds="1", start=text, end=moment(START_S + 20))
        for text in spellings
    ]
    plus_as_space = await game.client.get(
        f"/reports/predictions?projectIds=1&start=2023-11-15T01:00:20+02:00&end={start}"
    )

    assert {row["round_id"] for row in answers[0]} == {
        f"BTC-60-10-{START_S + 20}",
        f"ETH-60-10-{START_S + 20}",
    }
    assert all(answer == answers[0] for answer in answers)
    assert plus_as_space.json() == answers[0]


async def test_an_asset_without_a_stored_price_is_among_the_feeds(tmp_path: Path) -> None:
    async with serve(tmp_path) as game:
        rows = await game.get("/reports/feeds")
    assert [(row["source"], row["subject"], row["record_count"]) for row in rows] == [
        ("synthetic", "BTC", 0),
        ("synthetic", "ETH", 0),
    ]
    assert [row["watermark_ts"] for row in rows] == [moment(NOW_S - 5), None]
    assert {row[name] for row in rows for name in ("oldest_ts", "newest_ts", "watermark_updated_at")} == {
        None
    }


async def test_feeds_are_described_and_their_tails_read(game: Game) -> None:
    rows = {row["subject"]: row for row in await game.get("/reports/feeds")}
    tail = await game.get("/reports/feeds/tail", source="synthetic", subject="BTC", limit=3)
    all_assets = await game.get("/reports/feeds/tail", limit=3)

    assert rows["BTC"]["source"] == "synthetic"
    assert rows["BTC"]["granularity"] == "10s"
    assert rows["BTC"]["record_count"] == 120
    assert rows["BTC"]["oldest_ts"] == moment(START_S - 100)
    assert rows["BTC"]["newest_ts"] == moment(START_S + 1090)
    assert rows["BTC"]["watermark_ts"] == moment(NOW_S - 5)
    assert [row["ts_event"] for row in tail] == [moment(START_S + 1090 - 10 * k) for k in range(3)]
    assert tail[0]["values"].keys() == {"price"}
    assert tail[0]["meta"] == {}
    assert [row["ts_event"] for row in all_assets] == [moment(START_S + s) for s in (1090, 1090, 1080)]
    assert await game.get("/reports/feeds/tail", subject="DOGE") == []
    assert await game.get("/reports/feeds/tail", kind="candle") == []
    assert await game.get("/reports/feeds/tail", source="coinbase") == []


# Family 2


@pytest.mark.parametrize("window", ["recent", "steady", "anchor"])
async def test_the_leaderboard_is_sorted_and_ranked_by_its_window(game: Game, window: str) -> None:
    body = await game.get("/leaderboard", window=window)

    assert body["window"] == window
    assert body["count"] == len(body["models"]) == 4
    known = [model["score"] for model in body["models"] if model["score"] is not None]
    assert known == sorted(known, reverse=True)
    assert body["models"][-1]["model_id"] == "new"
    assert [model["rank"] for model in body["models"] if model["rank"]] == [1, 2]
    alpha = next(model for model in body["models"] if model["model_id"] == "1")
    assert alpha["prediction_count"] == 4
    assert set(alpha) == {"rank", "model_id", "model_name", "cruncher_name", "score", "prediction_count"}
    short = await game.get("/leaderboard", window=window, limit=1)
    assert short["models"] == body["models"][:1]
    assert short["count"] == 1


async def test_the_leaderboard_is_the_anchor_windows_by_default(game: Game) -> None:
    assert await game.get("/leaderboard") == await game.get("/leaderboard", window="anchor", limit=1000)


async def test_a_models_metrics(game: Game) -> None:
    body = await game.get("/model/b%2F2/metrics")
    alpha = await game.get("/model/1/metrics")

    assert body["model_id"] == "b/2"
    assert body["model_name"] == EVIL
    assert set(body["overall_scores"]) == {"recent_24h", "steady_72h", "anchor_7d"}
    assert set(body["by_horizon"]) == {"1m", "2m"}
    one_minute = [body["by_setting"][key]["anchor_7d"] for key in ("BTC-60-10", "ETH-60-10")]
    assert body["by_horizon"]["1m"]["anchor_7d"] == pytest.approx(sum(one_minute) / 2)
    assert body["recent_predictions"][0]["round_id"] == OPEN_ROUND
    assert body["recent_predictions"][-1]["detail"] == "invalid: segment 1: scale must be > 0"
    assert body["deployments"] == [
        {"deployment_id": "2_a", "first_seen_at": moment(START_S - 60), "code_changed": True}
    ]
    assert set(body["standard_error"]) == set(body["overall_scores"])
    assert body["calibration"]["segment_times"] < body["calibration"]["segment_times_needed"] == 400
    assert body["calibration"]["coverage_90"] is None
    assert set(body["calibration_by_setting"]) <= set(body["by_setting"])
    row = (await game.get("/reports/leaderboard"))[0]
    assert {"standard_error_anchor", "p_better_than_next", "coverage_90", "bias"} <= set(row)
    assert row["coverage_90"] is None
    assert alpha["skill"]["anchor_7d"] is not None
    assert (body["status"], alpha["status"]) == ("STOPPED", "RUNNING")
    assert "/reports/models" in await game.error("/model/nobody/metrics", 404)


async def test_statistics_count_what_succeeded(game: Game) -> None:
    body = await game.get("/statistics")

    assert body["total_models"] == 4
    assert body["active_models"] == 2
    assert body["total_predictions"] == body["predictions_last_24h"] == 4 * 2 + 2 * 3 + 1
    assert (body["total_rounds"], body["scored_rounds"]) == (8, 4)


async def test_rounds_are_listed_newest_first_and_filtered(game: Game) -> None:
    rows = await game.get("/rounds")
    times = [row["scheduled_at"] for row in rows]

    assert len(rows) == 8
    assert times == sorted(times, reverse=True)
    assert set(rows[0]) == {
        *("round_id", "asset", "horizon", "step", "scheduled_at", "performed_at", "resolvable_at", "status"),
        *("reason", "answered", "failed", "timed_out", "absent"),
    }
    first = rows[-1]
    assert first["round_id"] == BTC_ROUND
    assert first["performed_at"] == "2023-11-14T23:00:01.250Z"
    assert first["resolvable_at"] == moment(START_S + 60)
    assert (first["answered"], first["failed"], first["timed_out"], first["absent"]) == (2, 1, 0, 0)
    assert {row["asset"] for row in await game.get("/rounds", asset="ETH")} == {"ETH"}
    assert [row["horizon"] for row in await game.get("/rounds", horizon=120)] == [120]
    assert await game.get("/rounds", asset="DOGE") == []
    for status in RoundStatus:
        listed = (await game.client.get("/rounds", params={"status": status.value})).json()
        assert listed == [row for row in rows if row["status"] == status]
    (missed,) = (row for row in rows if row["status"] == "missed")
    assert (missed["reason"], missed["performed_at"]) == ("the game was not running", None)
    assert await game.get("/rounds", before=moment(START_S + 20)) == [first]


async def test_pages_of_rounds_are_complete(game: Game) -> None:
    found: list[str] = []
    before: dict[str, str] = {}
    while True:
        answer = await game.client.get("/rounds", params={"limit": 1, **before})
        found += [row["round_id"] for row in answer.json()]
        if "x-next-before" not in answer.headers:
            break
        before = {"before": answer.headers["x-next-before"]}

    assert found == [row["round_id"] for row in await game.get("/rounds")]


async def test_a_round_says_why_each_model_got_its_score(game: Game) -> None:
    body = await game.get(f"/rounds/{BTC_ROUND}")
    closed = await game.get(f"/rounds/{CLOSED_ROUND}")

    by_id = {row["model_id"]: row for row in body["predictions"]}
    assert set(by_id) == {"1", "b/2", "bench"}
    assert set(by_id["1"]) == {
        *("model_id", "model_name", "status", "detail", "exec_time_us", "received_at", "raw_score", "score")
    }
    assert by_id["b/2"]["detail"] == "invalid: segment 1: scale must be > 0"
    assert by_id["1"]["received_at"] == "2023-11-14T23:00:01.300Z"
    assert (body["median"], body["resolved_segments"]) == (by_id["1"]["raw_score"], 6)
    shown = [row["score"] for row in body["predictions"]]
    assert shown == sorted(shown, reverse=True)
    absent = next(row for row in closed["predictions"] if row["model_id"] == "new")
    assert (absent["status"], absent["exec_time_us"], absent["score"]) == ("ABSENT", None, None)
    assert "BTC-3600-60" in await game.error("/rounds/nonsense", 404)
    await game.error(f"/rounds/BTC-60-10-{START_S + 7}", 404)


async def test_a_score_is_explained_by_everything_it_is_made_of(game: Game) -> None:
    body = await game.get(f"/rounds/{BTC_ROUND}/predictions/1")

    assert body["densities"] == orjson.loads(normals(6, 0.0004))
    assert [at_s for at_s, _ in body["prices"]] == [START_S + 10 * k for k in range(7)]
    moves = [
        math.log(after / before)
        for (_, before), (_, after) in zip(body["prices"], body["prices"][1:], strict=False)
    ]
    assert body["increments"] == pytest.approx(moves)
    assert body["unresolved"] == [None] * 6
    assert sum(body["segment_scores"]) / 6 == pytest.approx(body["raw_score"], rel=1e-12)
    assert body["no_move"] == pytest.approx(1e4 * sum(map(abs, moves)) / 6)
    assert body["score"] == pytest.approx(100 * (body["median"] - body["raw_score"]) / body["no_move"])
    assert body["reason"] is None


async def test_a_rejected_answer_is_explained_too(game: Game) -> None:
    body = await game.get(f"/rounds/{BTC_ROUND}/predictions/b%2F2")

    assert body["reason"] == "invalid: segment 1: scale must be > 0"
    assert body["densities"][0]["params"] == {"scale": -1}
    assert body["segment_scores"] is None
    assert body["raw_score"] is None
    assert body["score"] < 0


@pytest.mark.parametrize(
    ("harm", "says"),
    [("loops", "takes longer than 1 s to score"), ("dies", "ended the process that scored it")],
)
async def test_an_answer_that_can_t_be_scored_again_holds_nobody_up(
    tmp_path: Path, harm: str, says: str
) -> None:
    harmful = orjson.dumps([{"type": "builtin", "name": "norm", "params": {"loc": GUILTY, "scale": 1}}] * 6)

    def change(conn: sqlite3.Connection, payload: bytes, rule: str) -> None:
        conn.execute("UPDATE payload SET body = ?", (compress(payload),))
        conn.execute("UPDATE scorer SET rule = ?, rules = NULL", (rule,))

    async with serve(tmp_path, '[scoring]\ntime_limit = "1s"') as game:
        await play(game)
        await game.db.write(change, harmful, f"tests.rules:{harm}")
        body = await game.get(f"/rounds/{BTC_ROUND}/predictions/1")
        await game.db.write(change, normals(6, 0.0004), "crps")
        healed = await game.get(f"/rounds/{BTC_ROUND}/predictions/1")

    assert healed["reason"] is None
    assert says in body["reason"]
    assert body["densities"] == orjson.loads(harmful)
    assert body["segment_scores"] is None
    assert body["raw_score"] > 0


@pytest.mark.parametrize(
    ("path", "says"),
    [
        (f"/rounds/{OPEN_ROUND}/predictions/1", "not scored yet"),
        (f"/rounds/{CLOSED_ROUND}/predictions/1", "not scored yet"),
        (f"/rounds/{VOID_ROUND}/predictions/1", "the prices never came"),
        (f"/rounds/{BTC_ROUND}/predictions/nobody", "no model with this id"),
        (f"/rounds/{BTC_ROUND}/predictions/new", "neither asked"),
        ("/rounds/nonsense/predictions/1", "looks like"),
        ("/rounds/BTC-60-10-1/predictions/1", "no such round"),
    ],
)
async def test_what_a_model_answered_is_secret_until_the_round_is_scored(
    game: Game, path: str, says: str
) -> None:
    assert says in await game.error(path, 404)


async def test_an_explanation_says_what_was_pruned(tmp_path: Path) -> None:
    async with serve(tmp_path) as game:
        await play(game)
        await game.db.write(lambda conn: conn.execute("DELETE FROM payload") and None)
        without_payload = await game.get(f"/rounds/{BTC_ROUND}/predictions/1")
        await game.db.write(lambda conn: conn.execute("DELETE FROM price") and None)
        without_prices = await game.get(f"/rounds/{BTC_ROUND}/predictions/1")

    assert "not stored any more" in without_payload["reason"]
    assert without_payload["densities"] is None
    assert without_payload["raw_score"] > 0
    assert all(price is not None for _, price in without_payload["prices"])
    assert without_prices["increments"] == [None] * 6
    assert without_prices["unresolved"] == ["there is no fresh price at both its ends"] * 6


async def test_commands_explain_scores_as_the_api_does(game: Game) -> None:
    conn = open_read_only(game.config.storage.path)
    try:
        held = explain_round(conn, BTC_ROUND)
        found = explain(conn, game.config, BTC_ROUND, "1")
        with pytest.raises(NotExplained, match="not scored yet"):
            explain(conn, game.config, OPEN_ROUND, "1")
    finally:
        conn.close()

    shown = [answer.score for answer in held.answers]
    assert {answer.model_id for answer in held.answers} == {"1", "b/2", "bench"}
    assert shown == sorted(shown, key=lambda score: -(score or 0))
    assert found.answer.raw == pytest.approx(np.mean(found.segment_scores or []))
    assert found.densities == normals(6, 0.0004)


# Family 3


async def test_readiness_names_what_is_wrong(fresh: Game) -> None:
    assert await fresh.get("/healthz") == {"status": "ok"}
    assert await fresh.get("/readyz") == {"status": "ready", "problems": []}
    fresh.problems.append("BTC has no fresh price")

    body = await fresh.get("/readyz", 503)

    assert body["problems"] == ["BTC has no fresh price"]
    assert body["error"] == "not ready"
    assert (await fresh.get("/version"))["name"] == "condor-lite"


async def test_before_anything_happened_every_answer_is_valid(fresh: Game) -> None:
    for path in ("/reports/models", "/reports/leaderboard", "/reports/models/global", "/rounds"):
        assert await fresh.get(path) == []
    for path in ("/reports/models/params", "/reports/predictions", "/reports/feeds/tail"):
        assert await fresh.get(path) == []
    assert await fresh.get("/leaderboard") == NO_LEADERBOARD
    assert (await fresh.get("/statistics"))["total_predictions"] == 0
    page = await fresh.client.get("/")
    assert "No model has joined yet" in page.text


async def test_models_are_known_before_the_first_leaderboard_and_when_they_join(fresh: Game) -> None:
    await fresh.db.write(repositories.upsert_model, ALPHA, START_S)
    (row,) = await fresh.get("/reports/leaderboard")
    assert (row["model_id"], row["rank"], row["score_anchor"]) == ("1", None, None)
    assert row["created_at"] == moment(START_S - 100.5)

    await fresh.db.write(repositories.upsert_model, NEW, START_S)
    fresh.connected.add("new")

    async with asyncio.timeout(LIMIT_S):  # who is connected is looked at now and then
        while len(rows := await fresh.get("/reports/models")) < 2:
            pass
    assert [row["model_id"] for row in rows] == ["1", "new"]


# What holds for every answer


async def test_a_new_leaderboard_changes_the_body_and_its_tag(fresh: Game) -> None:
    leaderboard = await play(fresh)
    paths = [
        "/reports/leaderboard",
        "/reports/models",
        "/leaderboard?window=recent",
        "/reports/models/global",
    ]
    for path in paths:
        first = await fresh.client.get(path)
        again = await fresh.client.get(path, headers={"If-None-Match": f'"x", {first.headers["etag"]}'})
        assert first.status_code == 200
        assert re.fullmatch(r"public, max-age=\d+", first.headers["cache-control"])
        assert again.status_code == 304
        assert again.content == b""
        assert again.headers["etag"] == first.headers["etag"]

    before = await fresh.client.get("/reports/leaderboard")
    fresh.live.publish(replace(leaderboard, created_at_s=NOW_S + 60))
    after = await fresh.client.get("/reports/leaderboard", headers={"If-None-Match": before.headers["etag"]})

    assert after.status_code == 200
    assert after.json()[0]["created_at"] == moment(NOW_S + 60)


async def test_large_bodies_are_zipped_for_those_who_take_it(game: Game) -> None:
    path = "/reports/predictions"
    plain = await game.client.get(path, headers={"Accept-Encoding": "identity"})
    refused = await game.client.get(path, headers={"Accept-Encoding": "gzip;q=0, br"})
    zipped = await game.client.get(path, headers={"Accept-Encoding": "br, gzip"})

    assert "content-encoding" not in plain.headers
    assert "content-encoding" not in refused.headers
    assert zipped.headers["content-encoding"] == "gzip"
    assert zipped.headers["vary"] == "Accept-Encoding"
    assert int(zipped.headers["content-length"]) < len(plain.content) / 2
    assert zipped.content == plain.content == refused.content


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("/leaderboard?window=weekly", "recent, steady, anchor"),
        ("/leaderboard?limit=0", "from 1 to"),
        ("/leaderboard?limit=100000", "from 1 to"),
        ("/leaderboard?limit=ten", "whole number"),
        ("/leaderboard?limit=1e3", "whole number"),
        ("/rounds?status=done", "open, closed, scored, void, missed, skipped"),
        ("/rounds?horizon=1h", "seconds"),
        ("/rounds?before=yesterday", "ISO 8601"),
        (f"/rounds?limit={'9' * 5000}", "whole number"),
        ("/reports/predictions?start=2026-13-01", "ISO 8601"),
        ("/reports/predictions?end=NaN", "ISO 8601"),
        ("/reports/predictions?start=2026-02-01&end=2026-01-01", "start must not be after end"),
        ("/reports/predictions?limit=-1", "from 1 to"),
        ("/reports/models/global?projectIds=" + ",".join(map(str, range(1001))), "at most 1000"),
        ("/reports/feeds/tail?limit=%00", "whole number"),
    ],
)
async def test_a_bad_parameter_is_told_what_would_be_right(game: Game, path: str, says: str) -> None:
    assert says in await game.error(path, 400)


@pytest.mark.parametrize(
    "path",
    [
        "/rounds?asset=&status=&horizon=&before=",
        "/rounds?asset=%00&before=0001-01-01T00:00:00",
        "/rounds?asset=%ff%fe",
        "/rounds?before=9999-12-31T23:59:59-11:00",
        "/reports/predictions?start=0001-01-01&end=9999-12-31",
        "/reports/predictions?before=999999999999_999999999999999999_999999999999999999",
        "/reports/models/global?start=2026-01-01",
        "/reports/models/global?projectIds=%ed%a0%80",
        "/leaderboard?window=&whatever=1&limit=1&limit=2",
    ],
)
async def test_odd_but_possible_parameters_are_answered(game: Game, path: str) -> None:
    await game.get(path)


async def test_errors_are_json_and_repeat_nothing(game: Game) -> None:
    for path in (f"/{quote(EVIL)}", f"/rounds/{quote(EVIL, '')}", f"/model/{quote(EVIL, '')}/metrics"):
        assert EVIL not in await game.error(path, 404)
    await game.error("/static/../api.py", 404)
    await game.error("/static/nothing.css", 404)
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
        answer = await game.client.request(method, "/leaderboard")
        assert answer.status_code == 405
        assert set(answer.json()) == {"error", "detail"}
        assert "GET" in answer.headers["allow"]


BROWSER = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8"}


async def test_an_error_is_a_page_for_a_browser(game: Game) -> None:
    for path, status in (
        (f"/{quote(EVIL)}", 404),
        ("/rounds/nonsense", 404),
        ("/leaderboard?window=x", 400),
        ("/?window=x", 400),
    ):
        page = await game.client.get(path, headers=BROWSER)
        plain = await game.client.get(path, headers={"Accept": "application/json, text/html;q=0.9"})
        assert page.status_code == plain.status_code == status
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert page.headers["vary"] == "Accept"
        assert plain.json()["error"] in page.text
        assert plain.json()["detail"][1:] in unescape(page.text)
        assert "<script>" not in page.text
    posted = await game.client.post("/", headers=BROWSER)
    assert posted.status_code == 405
    assert sorted(posted.headers["allow"].split(", ")) == ["GET", "HEAD"]
    assert "<h1>Method Not Allowed</h1>" in posted.text


@pytest.mark.parametrize(
    ("accept", "html"),
    [
        (BROWSER["Accept"], True),
        ("text/html", True),
        ("text/html;q=0.9, application/json;q=0.8", True),
        ("", False),
        ("*/*", False),
        ("application/json", False),
        ("application/json, text/html;q=0.5", False),
        ("text/html;q=0, */*", False),
        ("text/html;q=many", False),
    ],
)
def test_who_prefers_a_page_is_told_by_its_accept_header(accept: str, html: bool) -> None:
    assert prefers_html(accept) is html


@pytest.mark.parametrize("path", ["/leaderboard", "/reports/models", "/healthz", "/", f"/rounds/{BTC_ROUND}"])
async def test_head_is_get_without_a_body(game: Game, path: str) -> None:
    get, head = await game.client.get(path), await game.client.head(path)

    assert head.status_code == 200
    assert head.content == b""
    assert head.headers["content-type"] == get.headers["content-type"]
    assert int(head.headers["content-length"]) > 0


async def test_browsers_are_told_what_not_to_do(game: Game) -> None:
    for path in ("/", "/leaderboard", "/nothing", "/static/style.css"):
        headers = (await game.client.get(path)).headers
        assert headers.items() >= SECURITY_HEADERS.items()
    policy = SECURITY_HEADERS["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; ")
    assert "frame-ancestors 'none'" in policy
    assert policy.count("unsafe") == 1


async def test_other_sites_may_read_only_if_configured(tmp_path: Path, game: Game) -> None:
    origin = {"Origin": "https://hub.example"}
    assert (
        "access-control-allow-origin" not in (await game.client.get("/leaderboard", headers=origin)).headers
    )
    async with serve(tmp_path, '[report]\ncors_origins = ["https://hub.example"]\n') as open_game:
        allowed = await open_game.client.get("/leaderboard", headers=origin)
        stranger = await open_game.client.get("/leaderboard", headers={"Origin": "https://evil.example"})
        preflight = await open_game.client.options(
            "/leaderboard", headers={**origin, "Access-Control-Request-Method": "GET"}
        )
        refused = await open_game.client.options(
            "/leaderboard", headers={"Origin": "https://evil.example", "Access-Control-Request-Method": "PUT"}
        )

    assert allowed.headers["access-control-allow-origin"] == "https://hub.example"
    assert "access-control-allow-origin" not in stranger.headers

    assert preflight.status_code == 200
    assert (refused.status_code, refused.json()["error"]) == (400, "not allowed")
    assert "access-control-allow-origin" not in refused.headers


async def test_every_endpoint_is_cached_headed_zipped_and_shared_alike(tmp_path: Path) -> None:
    fill = {"model_id": "1", "round_id": BTC_ROUND}
    origin = {"Origin": "https://hub.example"}
    async with serve(tmp_path, '[report]\ncors_origins = ["https://hub.example"]\n') as game:
        await play(game)
        for endpoint in JSON_ENDPOINTS:
            path = endpoint.url.format(**fill)
            plain = await game.client.get(path, headers={**origin, "Accept-Encoding": "identity"})
            zipped = await game.client.get(path, headers=origin)
            head = await game.client.head(path, headers={**origin, "Accept-Encoding": "identity"})
            known = {**origin, "If-None-Match": zipped.headers["etag"]}
            same = await game.client.get(path, headers=known)

            assert plain.status_code == zipped.status_code == head.status_code == 200
            assert plain.content == zipped.content
            assert ("content-encoding" in zipped.headers) == (len(plain.content) >= 2048)
            assert {**head.headers, "date": ""} == {**plain.headers, "date": ""}
            assert head.content == same.content == b""
            assert zipped.headers["etag"] == plain.headers["etag"]
            assert same.status_code == 304
            for answer in (plain, zipped, head, same):
                assert answer.headers["access-control-allow-origin"] == "https://hub.example"
                assert "ETag" in answer.headers["access-control-expose-headers"]
                assert "Origin" in answer.headers["vary"]
                assert "Accept-Encoding" in answer.headers["vary"]
                assert re.fullmatch(r"no-store|public, max-age=\d+", answer.headers["cache-control"])
        missing = await game.client.get("/rounds/none", headers=origin)
        assert missing.headers["access-control-allow-origin"] == "https://hub.example"


async def test_a_slow_or_failing_database_is_a_503_and_a_bug_a_500(tmp_path: Path) -> None:
    class Readers:
        error: Exception = QueryTimeout(2.0)

        async def fetch(self, sql: str, params: object = ()) -> list[Any]:
            raise self.error

    readers = Readers()
    async with serve(tmp_path, readers=readers) as game:
        assert "longer than 2 s" in await game.error("/rounds", 503)
        assert "longer than 2 s" in (await game.get("/readyz", 503))["detail"]
        assert await game.get("/leaderboard") == NO_LEADERBOARD
        await game.get("/healthz")
        readers.error = RuntimeError("secret detail")
        detail = await game.error("/rounds", 500)

    assert "secret" not in detail


async def test_answers_are_what_their_types_say(game: Game) -> None:
    fill = {"model_id:path": "1", "model_id": "1", "round_id": BTC_ROUND}
    for endpoint in JSON_ENDPOINTS:
        path = re.sub(r"{([^}]+)}", lambda match: fill[match[1]], endpoint.path)
        answer = await game.client.get(path)
        assert answer.status_code == 200, path
        msgspec.convert(answer.json(), endpoint.answer, strict=True)
    msgspec.json.schema_components([endpoint.answer for endpoint in JSON_ENDPOINTS])


# The page


async def test_the_page_shows_the_leaderboard_and_escapes_names(game: Game) -> None:
    page = await game.client.get("/", params={"window": "steady"})

    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "<script>" not in page.text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page.text
    assert "Tiny &amp; small" in page.text
    assert "synthetic prices" in page.text
    assert 'href="/models/b%2F2"' in page.text
    assert 'href="/?window=steady" aria-current="page"' in page.text
    for asset in re.findall(r'(?:href|src)="(/static/[^"]+)"', page.text):
        assert (await game.client.get(asset)).status_code == 200
    for link in re.findall(r'href="(/rounds/[^"]+)"', page.text):
        assert (await game.client.get(link)).status_code == 200, link


async def test_the_docs_show_every_path_parameter_and_answer_without_the_internet(game: Game) -> None:
    page = await game.client.get("/docs")
    described = await game.get("/openapi.json")

    assert page.headers["content-type"] == "text/html; charset=utf-8"
    shown = unescape(re.sub(r"<[^>]+>", "", page.text))
    for path, methods in described["paths"].items():
        assert path in shown
        assert methods["get"]["summary"] in shown
        for parameter in methods["get"]["parameters"]:
            assert parameter.get("name", "") in shown
    for name, schema in described["components"]["schemas"].items():
        assert f'id="{name}"' in page.text
        assert all(field in shown for field in schema.get("properties", {}))
    targets = set(re.findall(r'id="([^"]+)"', page.text))
    assert set(re.findall(r'href="#([^"]+)"', page.text)) <= targets
    assert not re.search(r'(?:href|src)="(?:https?:)?//', page.text)
    assert "<script>" not in page.text
    assert " style=" not in page.text


# The server


async def test_a_port_in_use_and_an_address_elsewhere_are_explained() -> None:
    with server.bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert taken.proto == socket.IPPROTO_TCP  # asyncio turns Nagle's delay off only then
        with pytest.raises(StartError, match=f"report.port {port} is in use"):
            server.bind("127.0.0.1", port)
    with pytest.raises(StartError, match=r"report\.host"):
        server.bind("192.0.2.1", 0)
    with pytest.raises(StartError, match=r"report\.host"):
        server.bind("no such host", 0)


@pytest.mark.parametrize("end", ["stop", "cancel"])
async def test_the_server_ends_with_its_port_free_and_can_run_again(tmp_path: Path, end: str) -> None:
    async with serve(tmp_path) as game:
        sock = server.bind("127.0.0.1", free_port())  # one that nobody is given in between
        other = server.Server(create_app(game.live, game.db.reports), sock)
        for _ in range(2):
            async with anyio.create_task_group() as tasks:
                await tasks.start(other.run)
                async with httpx.AsyncClient(base_url=other.url, timeout=60) as client:
                    assert (await client.get("/healthz")).status_code == 200
                    # Ended while a connection is kept alive.
                    other.stop() if end == "stop" else tasks.cancel_scope.cancel()
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", other.port))


async def test_many_readers_at_once_get_the_same_leaderboard(game: Game) -> None:
    bodies = await asyncio.gather(*(game.get("/reports/leaderboard") for _ in range(50)))

    assert all(body == bodies[0] for body in bodies)


# Notations


@given(st.integers(-(10**9), 4 * 10**9))
def test_times_are_read_as_they_are_written(at_s: int) -> None:
    assert read_moment(moment(at_s)) == at_s
    assert read_moment(naive_moment(at_s).isoformat()) == at_s
    assert datetime.fromisoformat(moment(at_s)) == datetime.fromtimestamp(at_s, UTC)


@given(st.text(max_size=40))
def test_any_text_is_a_time_or_a_value_error(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert math.isfinite(read_moment(text))


@given(st.lists(st.integers(), max_size=2000))
def test_long_lists_are_encoded_in_portions_as_in_one(values: list[int]) -> None:
    values = [value % 2**53 for value in values]
    assert encode_rows(values) == orjson.dumps(values)


def test_round_ids_are_taken_apart() -> None:
    key = parse_round_id("BTC-USD-3600-60-1700000000")
    assert key is not None
    assert (key.asset, key.horizon_s, key.step_s, key.scheduled_at_s) == ("BTC-USD", 3600, 60, 1700000000)
    assert [parse_round_id(bad) for bad in ("", "BTC", "-1-1-1", "BTC-1-1--1", "BTC-1-1-²")] == [None] * 5


def test_horizons_have_short_names() -> None:
    assert [horizon_label(s) for s in (3600, 86400, 300, 60, 90)] == ["1h", "24h", "5m", "1m", "90s"]


@pytest.mark.anyio
async def test_what_is_remembered_is_bounded_and_made_by_one_request(tmp_path: Path) -> None:
    async with serve(tmp_path) as game:
        context = Context(game.live, game.db.reports)
        made: list[int] = []

        async def make(value: int) -> int:
            made.append(value)
            await anyio.lowlevel.checkpoint()
            return value

        async with anyio.create_task_group() as tasks:
            for _ in range(5):
                tasks.start_soon(context.remembered, 0, 60.0, partial(make, 0))
        assert made == [0]
        for value in range(1000):
            assert await context.remembered(value, 60.0, partial(make, value)) == value
        assert await context.remembered(999, 60.0, partial(make, -1)) == 999
        assert await context.remembered(0, 60.0, partial(make, -1)) == -1
        assert len(context._remembered) <= 256
        assert not context._remembering


async def test_an_explanation_has_a_time_limit(game: Game, monkeypatch: pytest.MonkeyPatch) -> None:
    path = f"/rounds/{BTC_ROUND}/predictions/1"
    await game.get(path)
    monkeypatch.setattr(explanation, "QUERY_LIMIT_S", -1.0)
    monkeypatch.setattr(database, "_STEPS_BETWEEN_CHECKS", 1)
    assert "was given up" in await game.error(path, 503)
