"""The page of a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import pytest

from condor_lite.game.entities import ModelInfo
from condor_lite.report.answers import CalibrationEstimate, ModelCalibration
from condor_lite.report.pages.model import _verdicts
from condor_lite.storage import repositories
from tests.pages import blocks, links_lead_somewhere, page, text
from tests.served import ALPHA, EVIL, NOW_S, START_S, play, serve


@pytest.mark.anyio
async def test_a_model_s_page_has_its_scores_settings_and_rounds(tmp_path: Path) -> None:
    async with serve(tmp_path) as game:
        leaderboard = await play(game)
        html = await page(game, "/models/1")
        scores, times = blocks(html)
        (standing,) = (one for one in leaderboard.standings if one.model.info.model_id == "1")
        assert scores["t"] == [NOW_S - 900, NOW_S]
        assert scores["anchor"] == pytest.approx([standing.overall.anchor] * 2, abs=1e-4)
        assert times["status"] == ["SUCCESS"] * 7
        assert times["ms"] == [0.9] * 7
        shown = text(html)
        assert "By alice" in shown
        assert "connected" in shown
        assert "Its last error" not in shown
        assert "shown once 400 different moves are scored" in shown
        for setting in ("1 min / 10 s", "2 min / 1 min"):
            assert setting in shown
        await links_lead_somewhere(game, html, "/models/1")


@pytest.mark.anyio
async def test_sums_that_mix_versions_say_so(tmp_path: Path) -> None:
    async with serve(tmp_path) as game:
        whole = await play(game)
        mixed = replace(whole, scorer_version=3, mixed_versions=(1, 2), uncounted=4)
        assert "other scorers" not in text(await page(game, "/models/b%2F2"))
        for path in ("/", "/models/1"):
            game.live.leaderboard = mixed
            shown = text(await page(game, path))
            assert "could not score again count with the scores of version 1, 2." in shown
            assert "4 scored rounds of the last 7 days count for nothing" in shown


@pytest.mark.anyio
async def test_hostile_names_and_ids_are_text(tmp_path: Path) -> None:
    async with serve(tmp_path) as game:
        await play(game)
        for path in ("/models/b/2", "/models/b%2F2"):
            html = await page(game, path)
            shown = text(html)
            assert EVIL in shown
            assert "segment 1: scale must be > 0" in shown, "the last error in words"
            assert "not connected" in shown
            await links_lead_somewhere(game, html, path)
        evil = ModelInfo('"><img src=x>' + EVIL, "</script>" + EVIL, EVIL, "'\"><b>", "]]>-->" + EVIL)
        await game.db.write(repositories.upsert_model, evil, NOW_S)
        game.live.leaderboard = None  # so that it is looked up anew
        html = await page(game, f"/models/{quote(evil.model_id, safe='')}")
        assert "<img src=x>" not in html
        assert "<b>" not in html[: html.index("</h1>")]
        assert "It has not been asked yet." in text(html)


@pytest.mark.anyio
async def test_a_deployment_of_new_code_is_marked(tmp_path: Path) -> None:
    async with serve(tmp_path) as game:
        await play(game)
        new = replace(ALPHA, deployment_id="</script>v2", code_hash="2")
        restarted = replace(new, deployment_id="v2 again")
        await game.db.write(repositories.upsert_model, new, NOW_S - 100)
        await game.db.write(repositories.upsert_model, restarted, NOW_S - 50)
        html = await page(game, "/models/1")
        assert blocks(html)[0]["deployments"] == [{"t": NOW_S - 100, "label": "</script>v2"}]


@pytest.mark.anyio
async def test_windows_are_switched_by_links_and_errors_are_pages(tmp_path: Path) -> None:
    async with serve(tmp_path) as game:
        await play(game)
        await page(game, "/models/1", window="recent")
        await page(game, "/models/1", 400, window="nonsense")
        await page(game, "/models/nobody", 404)
        await page(game, f"/models/{quote(EVIL)}", 404)


@pytest.mark.anyio
async def test_an_empty_game_has_no_model(tmp_path: Path) -> None:
    async with serve(tmp_path) as game:
        await page(game, "/models/1", 404)
        await game.db.write(repositories.upsert_model, ALPHA, START_S)
    async with serve(tmp_path) as game:
        shown = text(await page(game, "/models/1"))
        assert "none yet" in shown
        assert "It has not been asked yet." in shown


def calibration(inner: float, outer: float, bias: float = 0.0) -> ModelCalibration:
    made = (CalibrationEstimate(value, 0.01) for value in (inner, outer, bias))
    return ModelCalibration(500, 400, [], *made)


def test_calibration_is_put_into_words() -> None:
    assert _verdicts(calibration(0.5, 0.91)) == []
    assert "too narrow" in _verdicts(calibration(0.45, 0.85))[0]
    assert "too wide" in _verdicts(calibration(0.55, 0.9))[0]
    assert "wrong shape" in _verdicts(calibration(0.55, 0.85))[0]
    assert "prices come out higher" in _verdicts(calibration(0.5, 0.9, 0.03))[0]
    assert _verdicts(ModelCalibration(3, 400)) == []
