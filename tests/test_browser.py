"""The pages in a real browser: Chromium, on a game of a program that runs 60 times faster than time."""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, Protocol

import axe_playwright_python
import pytest
from anyio.from_thread import start_blocking_portal
from playwright.sync_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    Page,
    Request,
    Response,
    Route,
    expect,
    sync_playwright,
)

import condor_lite
from condor_lite.game.entities import Round, RoundStatus
from condor_lite.news import LeaderboardMade, RoundClosed
from condor_lite.storage import repositories
from tests.prices import record, wild_walk
from tests.program import Program, program
from tests.served import ALPHA, EVIL, NOW_S, OPEN_ROUND, Game, play, serve

pytestmark = pytest.mark.timeout(1200)  # the game of all of them comes into being in the first one's time

START_S = 1_700_000_400
LIMIT_MS = 100_000  # what comes by itself comes within seconds; this is for a machine with much to do

CONFIG = """
[game]
name = "Browser"
speed = 60
start = "2023-11-14T22:20:00Z"

[[game.settings]]
assets = ["BTC", "ETH"]
horizon = "5m"
step = "1m"
interval = "2m"

[[game.settings]]
assets = ["BTC"]
horizon = "1h"
step = "10m"
interval = "20m"

[predict]
max_consecutive_timeouts = 1000000

[feed]
source = "replay"
path = "prices"
history = "30m"

[scoring]
interval = "1s"
snapshot_interval = "10s"
workers = 1

[orchestrator]
port = 0
"""

# What a page is called here, and whether there is a chart on it.
PAGES = {
    "leaderboard": False,
    "model": True,
    "evil model": True,
    "rounds": False,
    "scored round": True,
    "void round": True,
    "closed round": True,
    "prices": True,
    "status": False,
    "about": False,
    "docs": False,
    "no such page": False,
    "no such round": False,
}

AXE = (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text()


class Host(Protocol):
    @property
    def origin(self) -> str: ...


@dataclass(frozen=True)
class Still:
    """A game that stands still, so that what is open in it stays open."""

    origin: str


class Site:
    """The game's pages, of which some only come into being as it is played."""

    def __init__(self, run: Program) -> None:
        self.run = run

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.run.port}"

    def round_id(self, status: str, horizon_s: int = 300) -> str:
        """The newest of these; only ETH has void ones."""
        asset = "ETH" if status == "void" else "BTC"

        def found() -> list[str]:
            rounds = self.run.get(f"/rounds?status={status}")
            return [row["round_id"] for row in rounds if (row["asset"], row["horizon"]) == (asset, horizon_s)]

        return str(self.run.until(found)[0])

    def path(self, name: str) -> str:
        known: dict[str, Callable[[], str]] = {
            "leaderboard": lambda: "/",
            "model": lambda: "/models/student_t",
            "evil model": lambda: "/models/evil",
            "scored round": lambda: f"/rounds/{self.round_id('scored')}",
            "void round": lambda: f"/rounds/{self.round_id('void')}",
            "closed round": lambda: f"/rounds/{self.round_id('closed', 3600)}",
            "no such page": lambda: "/nowhere",
            "no such round": lambda: "/rounds/nothing",
        }
        return known[name]() if name in known else f"/{name}"


def chromium() -> str:
    """Where it is; without it the tests are skipped, except in CI, which must have it."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    if os.environ.get("CI"):
        pytest.fail("no chromium: .ci/run installs it, so see why it could not")
    pytest.skip("needs chromium (Debian: apt install chromium)")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = chromium()
    with sync_playwright() as playwright:
        expect.set_options(timeout=LIMIT_MS)
        browser = playwright.chromium.launch(executable_path=path, timeout=LIMIT_MS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    (folder / "config.toml").write_text(CONFIG)
    examples = Path(condor_lite.__file__).parent / "models" / "examples"
    for name in ("constant_normal", "student_t", "empirical"):
        shutil.copytree(examples / name, folder / "models" / name)
    evil = folder / "models" / "evil"
    evil.mkdir()
    shutil.copy(examples / "student_t" / "main.py", evil)
    (evil / "model.toml").write_text(
        f'name = "{EVIL}"\ncruncher_id = "mallory"\ncruncher_name = "<img src=x onerror=alert(2)>"\n'
    )
    write_recording(folder / "prices")
    return folder


def write_recording(folder: Path) -> None:
    """50 hours, of which the game starts in the second. ETH is silent at times, so that rounds are void."""
    for seed, (asset, level, width) in enumerate((("BTC", 30_000, 4e-4), ("ETH", 1700, 1e-3))):
        prices = [
            (START_S + 60 * (minute - 60), price)
            for minute, price in enumerate(wild_walk(seed, 3000, level, width))
            if asset != "ETH" or minute % 40 not in range(24, 30)
        ]
        record(folder, asset, prices)


@pytest.fixture(scope="module")
def site(folder: Path, browser: Browser) -> Iterator[Site]:
    """A game in which something has happened."""
    with ExitStack() as stack:
        site = Site(stack.enter_context(program(folder)))
        site.round_id("void")
        site.round_id("scored")
        site.run.until(lambda: {row["model_name"] for row in scored(site)} == set(EVERYONE))
        yield site
        if site.run.process.poll() is None:
            site.run.end()


def scored(site: Site) -> list[dict[str, Any]]:
    return [row for row in site.run.get("/leaderboard")["models"] if row["score"] is not None]


@contextmanager
def visit(browser: Browser, site: Host, path: str, **how: Any) -> Iterator[Page]:
    """A page in a browser of its own, which must have nothing to complain about."""
    troubles: list[str] = []
    context = patient(browser, site, **{"viewport": {"width": 1280, "height": 900}, **how})
    page = context.new_page()

    def said(message: ConsoleMessage) -> None:
        missing = message.text.startswith("Failed to load resource")  # an answer's status: below
        if message.type in ("error", "warning") and not missing:
            troubles.append(f"console: {message.text}")

    def asked(request: Request) -> None:
        if not request.url.startswith((f"{site.origin}/", "data:", "blob:")):
            troubles.append(f"asked elsewhere: {request.url}")

    def answered(response: Response) -> None:
        if response.status >= 400 and not response.request.is_navigation_request():
            troubles.append(f"{response.status}: {response.url}")

    page.on("console", said)
    page.on("pageerror", lambda error: troubles.append(f"error: {error}"))
    page.on("request", asked)
    page.on("response", answered)
    page.on("dialog", lambda dialog: troubles.append(f"dialog: {dialog.message}") or dialog.dismiss())
    try:
        page.goto(path)
        yield page
        assert not troubles
    finally:
        context.close()


def patient(browser: Browser, site: Host, **how: Any) -> BrowserContext:
    context = browser.new_context(base_url=site.origin, **how)
    context.set_default_timeout(LIMIT_MS)
    return context


def live(page: Page) -> None:
    expect(page.locator("#connection")).to_have_text("live")


def fits(page: Page) -> None:
    """The page itself never scrolls sideways; wide tables do in a frame of their own."""
    becomes(page, "document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def becomes(page: Page, expression: str) -> Any:
    """Wait until this is something; what it is. The page's policy keeps the driver's own way, eval, out."""
    deadline_s = time.monotonic() + LIMIT_MS / 1000
    while not (value := page.evaluate(expression)):
        assert time.monotonic() < deadline_s, expression
        page.wait_for_timeout(50)
    return value


def lightness(colour: str) -> float:
    """Of "rgb(r, g, b)", 0 to 1."""
    return sum(float(part) for part in colour[4:-1].split(",")) / (3 * 255)


@pytest.mark.parametrize("name", PAGES)
def test_a_page_has_all_it_needs_from_its_host_and_fits_a_phone(
    browser: Browser, site: Site, name: str
) -> None:
    with visit(browser, site, site.path(name)) as page:
        live(page)
        expect(page.locator("h1")).to_have_count(1)
        assert page.title().endswith("· Browser")
        fits(page)
        for chart in page.locator("[data-chart]").all():
            expect(chart.locator("svg.main-svg .xtick text").first).to_be_attached()
        assert bool(page.locator("[data-chart]").count()) == PAGES[name]
        page.set_viewport_size({"width": 375, "height": 700})
        fits(page)


@pytest.mark.parametrize("name", [name for name in PAGES if name not in ("evil model", "no such round")])
def test_axe_finds_nothing_serious_in_light_and_dark(browser: Browser, site: Site, name: str) -> None:
    with visit(browser, site, site.path(name), color_scheme="light") as page:
        live(page)
        for detail in page.locator("details").all():
            detail.evaluate("details => { details.open = true }")
        nothing_is_serious(page)


def nothing_is_serious(page: Page) -> None:
    page.evaluate(AXE)
    for scheme, rules in (("light", {}), ("dark", {"runOnly": ["color-contrast", "link-in-text-block"]})):
        page.emulate_media(color_scheme=scheme)
        found = page.evaluate("(rules) => axe.run({resultTypes: ['violations'], ...rules})", rules)
        serious = [
            (violation["id"], [node["html"] for node in violation["nodes"]][:3])
            for violation in found["violations"]
            if violation["impact"] in ("serious", "critical")
        ]
        assert not serious, scheme
        assert found["passes"]


def test_dark_is_dark_and_the_charts_follow(browser: Browser, site: Site) -> None:
    with visit(browser, site, site.path("scored round"), color_scheme="light") as page:
        look = "(element) => [getComputedStyle(element).backgroundColor, getComputedStyle(element).color]"
        label = "document.querySelector('.xtick text')"  # gone for a moment whenever the chart is drawn anew
        fill = f"({label} && getComputedStyle({label}).fill)"
        before = becomes(page, fill)
        ground, ink = page.locator("body").evaluate(look)
        assert lightness(ground) > 0.9
        assert lightness(ink) < 0.2
        page.emulate_media(color_scheme="dark")
        ground, ink = page.locator("body").evaluate(look)
        assert lightness(ground) < 0.15
        assert lightness(ink) > 0.8
        after = becomes(page, f"{fill} !== '{before}' && {fill}")
        assert lightness(after) > lightness(before)


def test_on_paper_a_page_is_light_and_has_nothing_to_click(browser: Browser, site: Site) -> None:
    with visit(browser, site, "/", color_scheme="dark") as page:
        live(page)
        page.emulate_media(media="print")
        ink = page.locator("#lines th a").first.evaluate("(element) => getComputedStyle(element).color")
        assert lightness(ink) < 0.2
        expect(page.locator("#lines")).to_be_visible()
        for part in ("nav", "form", ".button", "#connection"):
            expect(page.locator(part).first).to_be_hidden()


def test_prices_and_the_leaderboard_change_while_one_looks(browser: Browser, site: Site) -> None:
    with visit(browser, site, "/") as page:
        page.evaluate("window.stayed = true")
        for selector in ('[data-price-of="BTC"]', "#lines", "#as-of", "#state .rounds", "footer time"):
            changes(page, selector)
        assert page.evaluate("window.stayed")


def changes(page: Page, selector: str) -> None:
    element = page.locator(selector).first
    expect(element).not_to_have_text(element.inner_text(), use_inner_text=True)


def test_a_new_round_and_a_new_price_appear_by_themselves(browser: Browser, site: Site) -> None:
    with visit(browser, site, "/rounds") as page:
        newest = page.locator("#rounds tbody a").first
        shown = newest.get_attribute("href")
        assert shown is not None
        expect(newest).not_to_have_attribute("href", shown)
        expect(page.locator(f'#rounds a[href="{shown}"]')).to_have_count(1)
    with visit(browser, site, "/prices") as page:
        newest_point = "document.querySelector('[data-chart]').data?.[0].x.at(-1)"
        drawn = becomes(page, newest_point)
        becomes(page, f"{newest_point} > '{drawn}'")


def test_a_round_is_scored_before_ones_eyes(browser: Browser, site: Site) -> None:
    with visit(browser, site, f"/rounds/{site.round_id('closed')}") as page:
        expect(page.locator("#round-scores")).to_contain_text("explained")
        expect(page.locator("#round-head .status")).to_have_text("scored")
        expect(page.locator("#round-legend a").first).to_be_visible()
        expect(page.locator("[data-chart] .scatterlayer .trace").nth(3)).to_be_attached()


def test_an_open_round_tells_who_has_answered_and_closes_before_ones_eyes(
    browser: Browser, tmp_path: Path
) -> None:
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(serve(tmp_path)) as game:
        portal.call(play, game)
        with visit(browser, Still(game.server.url), f"/rounds/{OPEN_ROUND}") as page:
            live(page)
            expect(page.locator("#round-head .status")).to_have_text("open")
            expect(page.locator("#round-head")).to_contain_text("They are answering now")
            expect(page.locator("#round-scores tbody tr")).to_have_text(
                [re.compile("SUCCESS"), re.compile("TIMEOUT")]
            )
            expect(page.locator("#round-scores")).not_to_contain_text("explained")
            expect(page.locator("[data-chart] .scatterlayer .trace")).to_have_count(1)
            fits(page)
            page.set_viewport_size({"width": 375, "height": 700})
            fits(page)
            nothing_is_serious(page)

            portal.call(close, game)
            expect(page.locator("#round-head .status")).to_have_text("closed")
            expect(page.locator("#round-head")).to_contain_text("1 answered")


def test_a_models_first_scores_are_drawn_before_ones_eyes(browser: Browser, tmp_path: Path) -> None:
    async def join(game: Game) -> None:
        await game.db.write(repositories.upsert_model, ALPHA, START_S)

    async def begin(game: Game) -> None:
        await play(game)
        game.live.news.tell(LeaderboardMade(NOW_S))
        await close(game)

    with start_blocking_portal() as portal, portal.wrap_async_context_manager(serve(tmp_path)) as game:
        portal.call(join, game)
        with visit(browser, Still(game.server.url), f"/models/{ALPHA.model_id}") as page:
            live(page)
            expect(page.locator("#score-card")).to_contain_text("Its line begins with the first leaderboard")
            expect(page.locator("#times-card")).to_contain_text("It has not been asked yet")
            expect(page.locator("[data-chart]")).to_have_count(0)
            portal.call(begin, game)
            for card in ("#score-card", "#times-card"):
                expect(page.locator(f"{card} [data-chart] .scatterlayer .trace").first).to_be_attached()
            expect(page.locator("#score-card[data-live]")).to_have_count(0)


async def close(game: Game) -> None:
    """The open round."""

    def write(conn: sqlite3.Connection) -> Round:
        (open_one,) = repositories.select_rounds(conn, "status = 'open'", ())
        assert open_one.round_no is not None
        repositories.close_round(conn, open_one.round_no, RoundStatus.CLOSED, None, [])
        return replace(open_one, status=RoundStatus.CLOSED)

    game.live.news.tell(RoundClosed(await game.db.write(write)))


def names(page: Page) -> list[str]:
    """The models in the order they are shown, the hidden ones left out."""
    return page.locator("#lines th a:visible").all_inner_texts()


HARMLESS = ["Constant normal", "Empirical", "Student t"]
EVERYONE = sorted([*HARMLESS, EVIL])


def test_the_leaderboard_is_sorted_by_click_and_by_enter(browser: Browser, site: Site) -> None:
    with visit(browser, site, "/") as page:
        live(page)
        assert sorted(names(page)) == EVERYONE
        header = page.locator('th[data-sort="model"]')
        header.locator("a").click()
        expect(header).to_have_attribute("aria-sort", "ascending")
        upwards = names(page)
        assert [name for name in upwards if name != EVIL] == HARMLESS
        header.locator("a").focus()
        page.keyboard.press("Enter")
        expect(header).to_have_attribute("aria-sort", "descending")
        assert names(page) == upwards[::-1]
        assert "sort=model" in page.url
        changes(page, "#as-of")
        assert names(page) == upwards[::-1], "a new leaderboard keeps the order"
        page.reload()
        assert names(page) == upwards[::-1], "and so does the address"


@pytest.mark.parametrize("let", [Route.continue_, Route.abort])
def test_parts_that_come_late_or_not_at_all_are_asked_for_again(
    browser: Browser, tmp_path: Path, let: Callable[[Route], None]
) -> None:
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(serve(tmp_path)) as game:
        leaderboard = portal.call(play, game)
        with visit(browser, Still(game.server.url), "/") as page:
            live(page)
            as_of, at_first = page.locator("#as-of"), names(page)
            before = as_of.inner_text()
            held: list[Route] = []
            page.route(f"{game.server.url}/", lambda route: held.append(route), times=1)
            newer = replace(leaderboard, created_at_s=NOW_S + 60)
            portal.call(game.live.publish, newer)
            portal.call(game.live.news.tell, LeaderboardMade(NOW_S + 60))
            deadline_s = time.monotonic() + LIMIT_MS / 1000
            while not held:
                assert time.monotonic() < deadline_s
                page.wait_for_timeout(50)
            header = page.locator('th[data-sort="model"]')
            header.locator("a").click()
            expect(header).to_have_attribute("aria-sort", "ascending")
            upwards = names(page)
            assert upwards != at_first
            let(held[0])
            expect(as_of).not_to_have_text(before, use_inner_text=True)
            assert names(page) == upwards, "in the order that was chosen meanwhile"


def test_the_leaderboard_is_searched_while_one_types(browser: Browser, site: Site) -> None:
    with visit(browser, site, "/") as page:
        live(page)
        page.get_by_role("searchbox").press_sequentially("STUD")
        expect(page.locator("#lines tr:visible")).to_have_count(1)
        assert names(page) == ["Student t"]
        expect(page.locator("form [role=status]")).to_have_text("1 found")
        changes(page, "#as-of")
        assert names(page) == ["Student t"], "a new leaderboard stays searched"
        page.get_by_role("searchbox").fill("")
        expect(page.locator("#lines tr:visible")).to_have_count(len(EVERYONE))


def answered_by(site: Site, model_id: str) -> str | None:
    """A scored round with an answer of this model: on a busy machine it may be late at times."""
    for row in site.run.get("/rounds?status=scored"):
        answers = site.run.get(f"/rounds/{row['round_id']}")["predictions"]
        if any(one["model_id"] == model_id and one["raw_score"] is not None for one in answers):
            return str(row["round_id"])
    return None


def test_a_models_name_is_only_text(browser: Browser, site: Site) -> None:
    with visit(browser, site, "/models/evil") as page:
        expect(page.locator("h1")).to_have_text(EVIL)
        live(page)
    path = f"/rounds/{site.run.until(lambda: answered_by(site, 'evil'))}?model=evil"
    with visit(browser, site, path) as page:
        expect(page.locator("#round-legend")).to_contain_text(EVIL)
        chart, label = (page.locator(f"[data-chart] {part}").first for part in (".nsewdrag", ".hoverlayer"))
        deadline_s, step = time.monotonic() + LIMIT_MS / 1000, 0
        while EVIL not in (label.text_content() or ""):  # plotly passes over movements while it draws
            assert time.monotonic() < deadline_s, label.text_content()
            room = chart.bounding_box()
            assert room is not None
            step += 1
            page.mouse.move(room["x"] + (0.75 + step % 100 / 1000) * room["width"], room["y"] + 100)
            page.wait_for_timeout(100)


def test_times_are_the_readers_with_utc_on_hover(browser: Browser, site: Site) -> None:
    with visit(browser, site, site.path("scored round"), timezone_id="Asia/Tokyo", locale="en-GB") as page:
        shown = page.locator("#round-head time").first
        expect(page.locator("[data-chart] .xtick text").first).to_be_attached()
        at = datetime.fromisoformat(shown.get_attribute("datetime") or "")
        there = at.astimezone(timezone(timedelta(hours=9)))
        assert shown.inner_text() == there.strftime("%-d %b %Y, %H:%M:%S")
        assert shown.get_attribute("title") == at.strftime("%Y-%m-%d %H:%M:%S UTC")
        ticks = page.locator("[data-chart] .xtick text").all_text_contents()
        assert {tick[:2] for tick in ticks} <= {f"{(there.hour + k) % 24:02}" for k in (-1, 0, 1)}


def test_a_chart_goes_on_where_the_readers_clocks_are_set_back(browser: Browser, site: Site) -> None:
    with visit(browser, site, "/prices", timezone_id="Europe/Berlin") as page:
        chart = '[data-chart="prices"][data-asset="BTC"]'
        page.locator(f"{chart} .scatterlayer").wait_for(state="attached")
        for at in ("00:30", "00:50", "01:10"):  # 2:30, 2:50, and 2:10 again
            news = {"assets": [{"asset": "BTC", "ts": f"2026-10-25T{at}:00Z", "price": 100.0}]}
            page.evaluate(
                "news => document.dispatchEvent(new CustomEvent('condor:prices', { detail: news }))", news
            )
        shown = page.evaluate("chart => document.querySelector(chart).data[0].x", chart)
        assert shown[-3:] == [f"2026-10-25 {at}:00" for at in ("01:30", "01:50", "02:10")]


def test_the_keyboard_gets_everywhere(browser: Browser, site: Site) -> None:
    with visit(browser, site, "/") as page:
        focused = "document.activeElement.textContent.trim()"
        page.keyboard.press("Tab")
        assert page.evaluate(focused) == "Skip to the content"
        assert page.locator(".skip").bounding_box()["x"] >= 0  # type: ignore[index]
        order = []
        for _ in range(8):
            page.keyboard.press("Tab")
            order.append(page.evaluate(focused))
            assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
        assert order[:7] == ["Browser", "Leaderboard", "Rounds", "Prices", "Status", "About", "API"]
        page.locator(".skip").focus()
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "main"
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.closest('main') !== null")


def test_the_tables_work_without_javascript(browser: Browser, site: Site) -> None:
    with visit(browser, site, "/", java_script_enabled=False) as page:
        assert sorted(names(page)) == EVERYONE
        header = page.locator('th[data-sort="model"] a')
        with page.expect_navigation():
            header.click()
        upwards = names(page)
        assert [name for name in upwards if name != EVIL] == HARMLESS
        with page.expect_navigation():
            header.click()
        assert names(page) == upwards[::-1]
        with page.expect_navigation():
            page.get_by_role("link", name="Recent").first.click()
        assert page.locator('[aria-label="Window"] [aria-current]').inner_text().startswith("Recent")
        page.get_by_role("searchbox").fill("stud")
        with page.expect_navigation():
            page.get_by_role("searchbox").press("Enter")
        assert names(page) == ["Student t"]
        page.goto("/rounds")
        page.locator('select[name="status"]').select_option("void")
        with page.expect_navigation():
            page.get_by_role("button", name="Show").click()
        assert set(page.locator("#rounds tbody .status").all_inner_texts()) == {"void"}
        page.goto(site.path("scored round"))
        expect(page.locator("noscript").first).to_be_attached()
        page.get_by_text("The picture in numbers").click()
        expect(page.locator("#round-data table")).to_be_visible()


def test_a_lost_connection_is_shown_and_heals(browser: Browser, site: Site, folder: Path) -> None:
    context = patient(browser, site)
    page = context.new_page()
    page.goto("/rounds")
    live(page)
    page.evaluate("window.stayed = true")
    site.run.end()
    expect(page.locator("#connection")).to_have_text("reconnecting …")
    before = page.locator("#rounds tbody a").first.get_attribute("href")
    assert before is not None
    with program(folder, CONDOR_LITE__REPORT__PORT=str(site.run.port)):
        live(page)
        expect(page.locator("#rounds tbody a").first).not_to_have_attribute("href", before)
    assert page.evaluate("window.stayed")
    context.close()
