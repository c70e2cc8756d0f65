"""Pages as a browser asks for them, and what is in them."""

from __future__ import annotations

import re
from html import unescape
from typing import Any
from urllib.parse import urljoin

import orjson

from tests.served import EVIL, Game

BROWSER = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}


async def page(game: Game, path: str, expect: int = 200, **params: Any) -> str:
    """The page's HTML; nothing that anybody sent may be live in it, and no script may be inline."""
    answer = await game.client.get(path, params=params or None, headers=BROWSER)
    assert answer.status_code == expect, answer.text
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert EVIL not in answer.text
    for script in re.findall(r"<script[^>]*>", answer.text):
        assert "src=" in script or script == '<script type="application/json">'
    assert not re.search(r"\son\w+=", answer.text)
    return answer.text


def text(html: str) -> str:
    """What is read, in one line; without scripts."""
    html = re.sub(r"<(script|style|noscript).*?</\1>", " ", html, flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", html)).split())


def blocks(html: str) -> list[Any]:
    """The data that charts are drawn from."""
    found = re.findall(r'"application/json">(.*?)</script>', html, flags=re.DOTALL)
    return [orjson.loads(one) for one in found]


async def links_lead_somewhere(game: Game, html: str, at: str) -> None:
    """Every address in the page's own part is there."""
    html = html[html.index("<main") : html.index("</main>")]
    for link in sorted(set(re.findall(r'(?:href|src)="([^"#]*)"', html))):
        answer = await game.client.get(urljoin(at, unescape(link)), headers=BROWSER)
        assert answer.status_code == 200, link
