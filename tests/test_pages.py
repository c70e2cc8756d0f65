"""The pages as a browser without scripts gets them, over a real port."""

from __future__ import annotations

import csv
import re
import types
from collections.abc import AsyncIterator
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import orjson
import pytest

from condor_lite import supervisor
from condor_lite.game.density import Limits, decode
from condor_lite.report import files
from condor_lite.report.answers import moment
from condor_lite.report.api import PAGES
from condor_lite.report.files import FOREVER
from condor_lite.report.pages import about, common, status
from condor_lite.report.pages.leaderboard import Sort
from condor_lite.storage import repositories, scores

from .served import ALPHA, EVIL, NOW_S, START_S, Game, load, play, serve

pytestmark = pytest.mark.anyio

HTML = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
VOID = {"area", "base", "br", "col", "hr", "img", "input", "link", "meta", "source", "path", "circle"}


@pytest.fixture
async def game(tmp_path: Path) -> AsyncIterator[Game]:
    async with serve(tmp_path) as served:
        await play(served)
        yield served


@pytest.fixture
async def fresh(tmp_path: Path) -> AsyncIterator[Game]:
    async with serve(tmp_path) as served:
        yield served


class Outline(HTMLParser):
    """Checks that tags are closed in order, and collects what a page is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


async def page(game: Game, path: str, status: int = 200) -> str:
    answer = await game.client.get(path, headers=HTML)
    assert answer.status_code == status
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    return answer.text


def outline(text: str) -> Outline:
    parsed = Outline()
    parsed.feed(text)
    parsed.close()
    assert not parsed.open
    return parsed


def plain(text: str) -> str:
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]+>", " ", text)))


def names(text: str) -> list[str]:
    body = text.split('<tbody id="lines"')[1].split("</tbody>")[0]
    return [unescape(name) for name in re.findall(r'<a href="/models/[^>]*>([^<]*)</a>', body)]


NONE = common.NONE

# The frame

OWN = [shown.path for shown in PAGES if "{" not in shown.path]


@pytest.mark.parametrize("path", [*OWN, "/nothing"])
async def test_every_page_is_whole_and_has_its_landmarks(game: Game, path: str) -> None:
    parsed = outline(await page(game, path, 404 if path == "/nothing" else 200))

    assert parsed.all("html")[0]["lang"] == "en"
    assert parsed.all("html")[0]["data-now"] == moment(NOW_S)
    for landmark in ("header", "main", "footer", "h1", "title"):
        assert len(parsed.all(landmark)) == 1
    assert parsed.all("a")[0] == {"class": "skip", "href": "#main"}
    assert parsed.all("main")[0]["id"] == "main"
    ids = [attrs["id"] for _, attrs in parsed.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert all("id" in attrs for _, attrs in parsed.tags if "data-live" in attrs)
    here = [attrs["href"] for attrs in parsed.all("a") if attrs.get("aria-current") == "page"]
    assert here[:1] == ([path] if path != "/nothing" else [])


@pytest.mark.parametrize("path", [*OWN, "/nothing"])
async def test_nothing_in_a_page_needs_another_host_or_breaks_the_policy(game: Game, path: str) -> None:
    parsed = outline(await page(game, path, 404 if path == "/nothing" else 200))

    for _, attrs in parsed.tags:
        for name in ("href", "src", "action"):
            assert not re.match(r"(https?:)?//", attrs.get(name) or "")
        assert not any(name.startswith("on") for name in attrs)
    for script in parsed.all("script"):
        assert "src" in script or script["type"] == "application/json"


async def test_a_page_that_is_not_there_is_not_asked_for_again(game: Game) -> None:
    assert "data-live" not in await page(game, "/nothing", 404)


async def test_static_files_hold_for_ever_at_their_versioned_address(game: Game) -> None:
    parsed = outline(await page(game, "/"))

    found = [attrs.get("href") or attrs.get("src") for tag, attrs in parsed.tags if tag in ("link", "script")]
    assert len(found) >= 4
    for address in found:
        assert address is not None
        assert re.fullmatch(r"/static/[\w.-]+\?v=[0-9a-f]{12}", address)
        versioned = await game.client.get(address)
        assert versioned.headers["cache-control"] == FOREVER
        old = await game.client.get(address[:-1] + "x")
        assert old.headers["cache-control"] == "public, max-age=60"
        assert old.content == versioned.content
        again = await game.client.get(address, headers={"If-None-Match": versioned.headers["etag"]})
        assert again.status_code == 304
    await game.error("/static/nothing.js", 404)
    await game.error("/static/..%2fapi.py", 404)


async def test_what_is_wrong_is_on_every_page_and_what_to_do_on_one(game: Game) -> None:
    assert "all is well" in await page(game, "/status")
    assert 'class="problems"' not in await page(game, "/about")

    folder = game.config.storage.path.parent / "other"
    folder.mkdir()
    async with serve(folder) as ill:
        ill.problems.append("the orchestrator is <b>not</b> connected")
        for path in ("/", "/about", "/docs"):
            text = await page(ill, path)
            assert "The orchestrator is &lt;b&gt;not&lt;/b&gt; connected" in text
            assert 'href="/status"' in text.split('class="problems"')[1]
        assert "connected. wait" in plain(await page(ill, "/status"))


# The leaderboard


async def test_a_model_has_its_rank_scores_and_marks_in_its_row(game: Game) -> None:
    rows = re.findall(r"<tr.*?</tr>", (await page(game, "/")).split('<tbody id="lines"')[1], flags=re.DOTALL)

    by_name = {names(f'<tbody id="lines">{row}')[0]: plain(row) for row in rows}
    assert set(by_name) == {"alpha", EVIL, "plain", "newcomer"}
    assert re.search(r"^ ?1 .*\bconnected\b alpha alice", by_name["alpha"].replace(f" {NONE} ", " "))
    assert "100 %" in by_name["alpha"]
    assert "900 µs" in by_name["alpha"]
    assert "benchmark" in by_name["plain"]
    assert by_name["plain"].lstrip().startswith(NONE)
    assert "failing" in by_name[EVIL]
    assert "not connected" in by_name[EVIL]
    assert "new" in by_name["newcomer"].replace("newcomer", "").split()
    assert "failing" not in by_name["alpha"]


async def test_the_row_says_why_a_model_fails(game: Game) -> None:
    text = await page(game, "/")

    assert re.search(r'title="(segment 1: scale must be &gt; 0|timeout)">failing<', text)


async def test_ranks_are_compared_with_those_of_a_day_ago_and_scores_drawn(game: Game) -> None:
    known = {model.info.model_id: model for model in await game.db.read(repositories.load_models)}
    version = await game.db.read(
        lambda conn: conn.execute("SELECT max(scorer_version) FROM scorer").fetchone()
    )

    def yesterday(conn: object) -> None:
        for place, model_id in enumerate(("b/2", "1"), 1):
            conn.execute(  # type: ignore[attr-defined]
                "INSERT INTO leaderboard VALUES (?, ?, ?, ?, ?, ?, ?)",
                (NOW_S - 90_000, known[model_id].model_no, version[0], place, *[3.0 - place] * 3),
            )

    await game.db.write(yesterday)
    text = await page(game, "/")

    assert "up 1" in plain(text)
    assert "down 1" in plain(text)
    assert f"Ranks gained since {moment(NOW_S - 90_000)[:10]}" in text
    lines = re.findall(
        r'<svg class="spark".*?aria-label="(.*?)".*?<path d="(M[^"]*)"/><circle', text, re.DOTALL
    )
    assert any(path.count("L") == 1 for _, path in lines)  # the two newest are one point
    assert any(label.startswith("from +1.0 to ") for label, _ in lines)


@pytest.mark.parametrize("sort", list(Sort))
async def test_the_server_sorts_for_who_has_no_scripts(game: Game, sort: Sort) -> None:
    up = names(await page(game, f"/?sort={sort}&order=asc"))
    down = names(await page(game, f"/?sort={sort}&order=desc"))

    assert sorted(up) == sorted(down) == sorted(["alpha", EVIL, "plain", "newcomer"])
    if sort is Sort.MODEL:
        assert up == sorted(up) == down[::-1]
    elif sort is Sort.ANCHOR:  # the newcomer has no score: last in either order
        assert up[-1] == down[-1] == "newcomer"
        assert up[:-1] == down[-2::-1]
    text = await page(game, f"/?sort={sort}&order=desc")
    (header,) = [attrs for attrs in outline(text).all("th") if attrs.get("data-sort") == sort]
    assert header["aria-sort"] == "descending"


async def test_the_server_searches_for_who_has_no_scripts(game: Game) -> None:
    assert names(await page(game, "/?q=ALICE")) == ["alpha", "newcomer"]
    assert names(await page(game, "/?q=%3Cscript")) == [EVIL]
    text = await page(game, '/?q=">%00<i>')
    assert names(text) == []
    assert "No model has a name like this" in text
    assert "<i>" not in text
    await game.error("/?q=" + "x" * 300, 400)


async def test_wrong_parameters_are_explained_in_the_frame(game: Game) -> None:
    for query in ("window=x", "sort=x", "order=x"):
        text = await page(game, f"/?{query}", 400)
        assert "must be one of" in text
        assert 'aria-label="Pages"' in text


async def test_the_state_of_the_game_is_one_look(game: Game) -> None:
    text = plain((await page(game, "/")).split('id="state"')[1].split("</section>")[0])

    assert re.search(r"BTC 101\.500 5 s ago", text)
    assert f"ETH {NONE} no price yet" in text
    assert re.search(r"Next 1 min round \w+ in \d+ s", text)
    assert re.search(r"Next 2 min round BTC in \d+ s", text)
    assert re.search(r"Last result BTC 2 min of [\d:]+ : 2 of 3 answered, best (alpha|plain)", text)


async def test_without_a_model_no_scores_are_counted_down_to(fresh: Game) -> None:
    text = plain(await page(fresh, "/"))
    assert "No model has joined yet: they show here as soon as they connect" in text
    assert "First scores come about 90 s later" in text
    assert "First scores in" not in text


async def test_before_the_first_scores_it_says_when_they_come(fresh: Game) -> None:
    await fresh.db.write(repositories.upsert_model, ALPHA, START_S)
    await fresh.client.get("/reports/models")
    counted = re.search(r'First scores <time datetime="([^"]+)"', await page(fresh, "/?window=recent"))
    assert counted is not None
    # until the next round, its horizon, the delay until it is settled, and a score cycle
    assert counted[1] == moment(NOW_S + 10 + 60 + 10 + 10)


async def test_the_csv_has_the_rows_of_the_api(game: Game) -> None:
    answer = await game.client.get("/leaderboard.csv")
    rows = list(csv.DictReader(answer.text.splitlines()))
    expected = await game.get("/reports/leaderboard")

    assert answer.headers["content-type"] == "text/csv; charset=utf-8"
    assert 'filename="leaderboard.csv"' in answer.headers["content-disposition"]
    assert list(rows[0]) == list(expected[0])
    assert [row["model_id"] for row in rows] == [row["model_id"] for row in expected]
    assert [float(row["score_anchor"] or 0) for row in rows] == [row["score_anchor"] or 0 for row in expected]


async def test_a_name_is_no_formula_in_a_spreadsheet(fresh: Game) -> None:
    evil = '=HYPERLINK("http://evil","x")'
    await fresh.db.write(repositories.upsert_model, replace(ALPHA, model_name=evil), START_S)

    rows = list(csv.DictReader((await fresh.client.get("/leaderboard.csv")).text.splitlines()))

    assert rows[0]["model_name"] == f"'{evil}"
    assert rows[0]["model_id"] == "1"


# Status


async def test_the_status_page_shows_every_part(game: Game) -> None:
    text = plain(await page(game, "/status"))

    for part in ("predict running 61 s", "Worst in a minute 10.0 ms", "Connected 2 of 4"):
        assert part in text
    assert re.search(r"condor\.db [\d.]+ [KM]B", text)
    assert re.search(r"BTC fresh 101\.500 5 s ago synthetic 10 complete", text)
    assert f"ETH stale {NONE}" in text
    assert str(game.config.storage.path.parent) not in text


def test_every_service_is_described() -> None:
    source = Path(supervisor.__file__).read_text()
    assert set(re.findall(r'Service\("(\w+)"', source)) <= set(status._SERVICES)


# About

BASES = (
    "condor_lite.tracker.TrackerBase",
    "crunch_synth.tracker.TrackerBase",
)


@pytest.mark.parametrize("target", ["log_return", "price_change"])
@pytest.mark.parametrize("base", BASES)
def test_the_model_on_the_page_works_in_the_game(tmp_path: Path, base: str, target: str) -> None:
    config = load(tmp_path, f'[scoring]\ntarget = "{target}"\n')
    object.__setattr__(config.game, "base_class", base)
    source = about.model(config)
    module = types.ModuleType("mine")
    exec(source, module.__dict__)
    model = module.MyModel()

    assert source.count("\n") <= 22
    for extent in (0, 40):
        if extent:
            prices = [[START_S + 10 * k, 100.0 + k % 7] for k in range(extent)]
            model.tick(dict.fromkeys(config.game.assets, prices))
        elif base == BASES[1] or target == "price_change":
            continue  # asked before any price, it fails and says so
        for setting in config.game.settings:
            answer = model.predict(setting.asset, setting.horizon_s, setting.step_s)
            decode(orjson.dumps(answer), setting, Limits(16, 2048))


async def test_the_rules_are_those_of_the_config(game: Game) -> None:
    text = plain(await page(game, "/about"))

    assert "BTC, ETH 1 min 10 s 6 20 s 10 s 3" in text
    assert "BTC 2 min 1 min 2 1 min 50 s 1" in text
    assert "continuous ranked probability score" in text
    assert "models/my_model/main.py" in text


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ('[scoring]\nrule = "log"\n', "logarithm of the probability"),
        ('[scoring]\nrule = "likelihood"\n', "not proper"),
        ('[scoring]\nrule = "mine.rules:brier"\n', "mine.rules:brier"),
        ('[scoring]\ntarget = "price_change"\n', "change of the price, in quote currency,"),
        ('[orchestrator]\nmode = "remote"\n', "deploy it to the crunch condorgame"),
    ],
)
async def test_other_rules_are_told_otherwise(tmp_path: Path, extra: str, says: str) -> None:
    async with serve(tmp_path, extra) as other:
        assert says in plain(await page(other, "/about"))


async def test_after_a_rescore_by_another_rule_pages_tell_that_one(tmp_path: Path) -> None:
    async with serve(tmp_path) as other:
        await other.db.write(scores.current_scorer, "log", "log_return", "f", START_S)
        assert "logarithm of the probability" in plain(await page(other, "/about"))
        assert "Rule log" in plain(await page(other, "/status"))
        assert "would have scored" not in plain(await page(other, "/"))


# Words


@pytest.mark.parametrize(
    ("length_s", "said", "exact"),
    [
        (0, "0 s", "0 s"),
        (40, "40 s", "40 s"),
        (90, "90 s", "90 s"),
        (119.4, "119 s", None),
        (60, "60 s", "1 min"),
        (720, "12 min", "12 min"),
        (3600, "60 min", "1 h"),
        (86400, "24 h", "24 h"),
        (604800, "7 d", "7 d"),
    ],
)
def test_lengths_of_time_are_said_shortly(length_s: float, said: str, exact: str | None) -> None:
    assert common.span(length_s) == said
    if exact is not None:
        assert common.duration(int(length_s)) == exact


def test_an_upgrade_gives_no_new_address_to_what_the_running_game_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forget() -> None:
        files._read.cache_clear()
        files._tag.cache_clear()
        files.address.cache_clear()

    (tmp_path / "x.js").write_text("old")
    monkeypatch.setattr(files, "_ROOT", tmp_path)
    forget()
    try:
        files.Files()
        (tmp_path / "x.js").write_text("new")
        running = files.address("x.js")
        forget()
        assert files.address("x.js") != running
    finally:
        forget()


def test_an_upgrade_leaves_the_running_game_its_templates(monkeypatch: pytest.MonkeyPatch) -> None:
    template = common._templates.get_template("about.html")
    monkeypatch.setattr(template, "_uptodate", lambda: False)
    assert common._templates.get_template("about.html") is template


def test_numbers_are_written_for_people() -> None:
    assert common.price(98414.2) == "98,414.20"
    assert common.price(0.00012) == "0.00012"
    assert common.price(None) == NONE
    assert common.signed(-1.234) == "\u22121.23"
    assert [common.signed(value, 1) for value in (-0.04, 0.0, 0.05, 0.06)] == ["0.0", "0.0", "+0.1", "+0.1"]
    assert [common.tone(value) for value in (None, -0.004, -0.006, 1.0)] == ["", "even", "minus", "plus"]
    assert common.answer_time(850) == "850 µs"
    assert common.answer_time(12_345) == "12 ms"
    assert common.answer_time(1_300_000) == "1.3 s"
    assert common.size(963_000) == "963 KB"
    assert common.part("b/2?<") == "b%2F2%3F%3C"
