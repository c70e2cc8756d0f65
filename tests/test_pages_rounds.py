"""The pages of the rounds: what was forecast, what happened, and why a round has no scores."""

from __future__ import annotations

import math
import re
from functools import partial
from html import unescape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import anyio
import pytest

from condor_lite.pool import PoolError
from condor_lite.report import context as contexts
from condor_lite.report.pages import round as round_page
from condor_lite.report.recount import Recount
from tests.pages import blocks, links_lead_somewhere, page, text
from tests.program import LIMIT_S
from tests.served import BTC_ROUND, CLOSED_ROUND, EVIL, OPEN_ROUND, START_S, VOID_ROUND, play, serve


@pytest.mark.anyio
async def test_a_scored_round_shows_fans_around_what_happened(tmp_path: Path) -> None:
    async with serve(tmp_path) as game:
        await play(game)
        html = await page(game, f"/rounds/{BTC_ROUND}")
        (drawing,) = blocks(html)
        assert drawing["start"] == START_S
        assert {fan["name"] for fan in drawing["fans"]} == {"alpha", "plain"}
        by_time = dict(zip(drawing["t"], drawing["p"], strict=True))
        alpha = next(fan for fan in drawing["fans"] if fan["name"] == "alpha")
        assert alpha["t"] == list(range(START_S, START_S + 61, 10))
        assert all(q[0] == pytest.approx(by_time[START_S]) for q in alpha["q"])
        low, high = alpha["q"][0][-1], alpha["q"][4][-1]
        sd = math.log(high / low) / 2 / 1.645
        assert sd == pytest.approx(0.0004 * math.sqrt(6), rel=0.1)
        assert {START_S, START_S + 60} <= set(by_time), "the ends of segments are drawn"
        assert drawing["range"][0] < min(drawing["p"]) < max(drawing["p"]) < drawing["range"][1]
        shown = text(html)
        assert "segment 1: scale must be > 0" in shown
        assert "Model Score In the picture" in shown, "a phone shows the score without scrolling"
        assert EVIL in shown, "escaped, it is a name as any other"
        await links_lead_somewhere(game, html, f"/rounds/{BTC_ROUND}")


@pytest.mark.anyio
async def test_models_are_put_into_the_picture_and_out(tmp_path: Path) -> None:
    async with serve(tmp_path) as game:
        await play(game)
        html = await page(game, f"/rounds/{BTC_ROUND}", model="bench")
        (drawing,) = blocks(html)
        assert [fan["name"] for fan in drawing["fans"]] == ["plain"]
        (add,) = re.findall(r'href="([^"]*)" aria-label="add alpha"', html)
        (drawing,) = blocks(await page(game, unescape(add)))
        assert {fan["name"] for fan in drawing["fans"]} == {"alpha", "plain"}
        html = await page(game, f"/rounds/{BTC_ROUND}", model="b/2,nobody")
        assert blocks(html)[0]["fans"] == []
        assert "no fan: it has no valid answer" in text(html)
        assert not re.search(r"\S\(no fan", text(html))


@pytest.mark.anyio
async def test_a_pruned_answer_is_missed_in_words(tmp_path: Path) -> None:
    async with serve(tmp_path) as game:
        await play(game)
        await game.db.write(lambda conn: conn.execute("DELETE FROM payload") and None)
        html = await page(game, f"/rounds/{BTC_ROUND}")
        assert blocks(html)[0]["fans"] == []
        assert "its answer is not stored any more: answers are kept for" in text(html)


@pytest.mark.anyio
@pytest.mark.parametrize("round_id", [OPEN_ROUND, CLOSED_ROUND])
async def test_forecasts_are_secret_until_the_round_is_scored(tmp_path: Path, round_id: str) -> None:
    async with serve(tmp_path) as game:
        await play(game)
        for params in ({}, {"model": "1"}):
            html = await page(game, f"/rounds/{round_id}", **params)
            (drawing,) = blocks(html)
            assert drawing["fans"] == []
            assert drawing["t"], "prices are no secret"
            assert "secret until the round is scored" in text(html)
            assert "explained" not in text(html)


@pytest.mark.anyio
async def test_a_round_without_scores_says_why(tmp_path: Path) -> None:
    async with serve(tmp_path) as game:
        await play(game)
        assert "the prices never came" in text(await page(game, f"/rounds/{VOID_ROUND}"))
        missed = text(await page(game, f"/rounds/ETH-60-10-{START_S + 40}"))
        assert "the game was not running" in missed


@pytest.mark.anyio
@pytest.mark.parametrize("round_id", ["nonsense", "BTC-60-10-1", EVIL, "a/b"])
async def test_an_unknown_round_is_a_page_too(tmp_path: Path, round_id: str) -> None:
    async with serve(tmp_path) as game:
        await page(game, f"/rounds/{quote(round_id, safe='')}", 404)


@pytest.mark.anyio
async def test_rounds_are_listed_filtered_and_paged(tmp_path: Path) -> None:
    async with serve(tmp_path) as game:
        await play(game)

        def listed(html: str) -> list[str]:
            return re.findall(r'href="/rounds/([A-Z]+-\d+-\d+-\d+)"', html)

        html = await page(game, "/rounds")
        everything = listed(html)
        assert len(everything) == 8
        await links_lead_somewhere(game, html, "/rounds")
        assert listed(await page(game, "/rounds", asset="", horizon="", status="")) == everything
        filters: list[dict[str, Any]] = [{"asset": "ETH"}, {"horizon": 120}, {"status": "void"}]
        assert [len(listed(await page(game, "/rounds", **one))) for one in filters] == [2, 1, 1]
        seen: list[str] = []
        at = "/rounds?limit=3"
        while at:
            html = await page(game, at)
            seen += listed(html)
            found = re.search(r'href="([^"]*)" rel="next"', html)
            at = unescape(found[1]) if found else ""
        assert seen == everything
        assert "No such round" in text(await page(game, "/rounds", asset=EVIL))
        await page(game, "/rounds", 400, status="nonsense")


@pytest.mark.anyio
async def test_the_same_address_answers_programs_in_json(tmp_path: Path) -> None:
    async with serve(tmp_path) as game:
        await play(game)
        for path in ("/rounds", f"/rounds/{BTC_ROUND}"):
            assert await game.get(path)
            answer = await game.client.get(path, headers={"accept": "text/html"})
            assert "Accept" in answer.headers["vary"]


@pytest.mark.anyio
async def test_an_empty_game_says_what_will_come(tmp_path: Path) -> None:
    async with serve(tmp_path) as game:
        assert "No round yet" in text(await page(game, "/rounds"))


@pytest.mark.anyio
async def test_of_many_models_some_are_shown_and_the_others_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(round_page, "_MOST_SHOWN", 2)
    async with serve(tmp_path) as game:
        await play(game)
        address = f"/rounds/{BTC_ROUND}"

        def rows(html: str) -> list[str]:
            scores = html[html.index('id="round-scores"') :]
            return [unescape(name) for name in re.findall(r'<th scope="row"><a [^>]*>([^<]*)</a>', scores)]

        html = await page(game, address)
        assert len(rows(html)) == 2
        assert "2 of 3 models are shown" in text(html)
        (anchor,) = re.findall(r"/docs#(\w+)", html)
        assert f'id="{anchor}"' in await page(game, "/docs")
        assert rows(await page(game, address, q="PLAIN")) == ["plain"]
        html = await page(game, address, q="b/2", model="bench")
        assert rows(html) == [EVIL]
        assert [fan["name"] for fan in blocks(html)[0]["fans"]] == ["plain"]
        assert '<input type="hidden" name="model" value="bench">' in html
        html = await page(game, address, q='"><script>')
        assert rows(html) == []
        assert "No model has a name like this" in text(html)


@pytest.mark.anyio
async def test_where_too_many_fans_are_asked_for_the_page_comes_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, free = anyio.Event(), anyio.Event()

    async def slow(*args: object) -> str:
        begun.set()
        with anyio.move_on_after(60):
            await free.wait()
        return "it came late"

    monkeypatch.setattr(contexts, "_TURN_WITHIN_S", 0.1)
    monkeypatch.setattr(Recount, "fan", slow)
    async with serve(tmp_path) as game, anyio.create_task_group() as tasks:
        await play(game)
        tasks.start_soon(partial(page, game, f"/rounds/{BTC_ROUND}", model="1"))
        with anyio.fail_after(LIMIT_S):
            await begun.wait()
        html = await page(game, f"/rounds/{BTC_ROUND}", model="bench")
        free.set()
        assert "no fan: too many are asked for just now" in text(html)


@pytest.mark.anyio
async def test_an_answer_that_takes_long_to_draw_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contexts, "Recount", lambda time_limit_s: Recount(1e-4))
    async with serve(tmp_path) as game:
        await play(game)
        html = await page(game, f"/rounds/{BTC_ROUND}", model="1")
        assert blocks(html)[0]["fans"] == []
        assert "no fan: its answer can't be drawn: takes longer than 0.0001 s" in text(html)


@pytest.mark.anyio
async def test_a_page_comes_without_fans_where_no_process_lives_to_draw_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def die(*args: object) -> str:
        raise PoolError("they end")

    monkeypatch.setattr(round_page, "FOR_S", 0.0)
    async with serve(tmp_path) as game:
        await play(game)
        with monkeypatch.context() as broken:
            broken.setattr(Recount, "fan", die)
            html = await page(game, f"/rounds/{BTC_ROUND}", model="1")
            assert "no fan: its answer can't be drawn: they end" in text(html)
        html = await page(game, f"/rounds/{BTC_ROUND}", model="1")
        assert [fan["name"] for fan in blocks(html)[0]["fans"]] == ["alpha"], "tried again"
