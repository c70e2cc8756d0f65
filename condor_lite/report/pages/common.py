"""What all pages share: the templates and what these may call, and the frame around each page.

A page's module has a handler that gathers values on the event loop and lets `show` render them in a thread.
In a template, an element with an `id` and `data-live="leaderboard round_scored ..."` is fetched anew when one
of these events comes; `static/live.js` and `table.js` say what else pages can ask of the browser. Addresses
begin with `{{ root }}`, which is `report.base_path`.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode

import orjson
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup, escape

from condor_lite import __version__
from condor_lite.report import bundle
from condor_lite.report.answers import moment
from condor_lite.report.context import Context
from condor_lite.report.files import address
from condor_lite.report.live import Live, Problem
from condor_lite.report.replies import Reply, pack

HTML = "text/html; charset=utf-8"
FOR_S = 2
"""How long a page is remembered, and how long it holds (wall)."""

NONE = "–"  # noqa: RUF001 - as a reader knows it
_NAV = (
    ("/", "Leaderboard"),
    ("/rounds", "Rounds"),
    ("/prices", "Prices"),
    ("/status", "Status"),
    ("/about", "About"),
    ("/docs", "API"),
)


@dataclass(frozen=True, slots=True)
class Page:
    """For people. At an endpoint's own path it is what a client gets that prefers HTML, as browsers do."""

    path: str
    handler: Callable[[Context, Any], Awaitable[Reply]]
    params: type


async def show(
    context: Context,
    template: str,
    *,
    at: str = "",
    max_age_s: int = FOR_S,
    since: str | None = None,
    **values: object,
) -> Reply:
    """A page, rendered in a thread. `at`: the address in the navigation that it belongs to; `since`: the
    newest event when its values were read, None: just now; the browser asks for those that came after it.
    """
    live = context.live
    since = since or context.stream.newest
    problems = list(live.problems())

    def work() -> Reply:
        html = render(live, template, at=at, since=since, problems=problems, **values)
        return pack(html, max_age_s, media_type=HTML)

    return await context.in_thread(work)


def compile_templates() -> None:
    """Before the game runs: it keeps the interpreter to itself for up to 0.1 s a template, in any thread."""
    for name in _templates.list_templates():
        _templates.get_template(name)


def render(
    live: Live,
    template: str,
    *,
    at: str = "",
    since: str = "",
    problems: Sequence[Problem] = (),
    **values: object,
) -> bytes:
    """The page's HTML. Everything that is put into a template is escaped."""
    source = live.config.feed.source
    text = _templates.get_template(template).render(
        game=live.config.game.name,
        root=live.config.report.base_path,
        synthetic=source == ("synthetic",),
        replayed=source == ("replay",),
        program=__version__,
        nav=_NAV,
        at=at,
        since=since,
        problems=problems,
        now_s=live.clock.now(),
        speed=live.clock.speed,
        **values,
    )
    return text.encode()


def stamp(at_s: float) -> str:
    """`2026-11-21 15:44:32 UTC`."""
    return f"{moment(int(at_s))[:19].replace('T', ' ')} UTC"


def time_of_day(at_s: float) -> str:
    """`15:44:32`, UTC."""
    return moment(int(at_s))[11:19]


def span(length_s: float) -> str:
    """A length of time in words, as `static/live.js` says it: `40 s`, `12 min`, `3 h`, `2 d`."""
    length_s = max(length_s, 0.0)
    for unit, unit_s, below_s in (("s", 1, 120), ("min", 60, 7200), ("h", 3600, 172_800)):
        if length_s < below_s:
            return f"{length_s / unit_s:.0f} {unit}"
    return f"{length_s / 86400:.0f} d"


def duration(length_s: int) -> str:
    """An exact length of time: `90 s`, `5 min`, `24 h`, `7 d`."""
    for unit_s, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if length_s % unit_s == 0 and length_s > (86400 if unit == "d" else 0):
            return f"{length_s // unit_s} {unit}"
    return f"{length_s} s"


def price(value: float | None) -> str:
    """With six significant digits, at least two decimals, and thousands kept apart."""
    return NONE if value is None else f"{value:,.{max(2, 6 - len(str(int(abs(value)))))}f}"


def signed(value: float | None, decimals: int = 2) -> str:
    """`+1.23`, with a true minus sign; what rounds to zero has none."""
    if value is None:
        return NONE
    text = f"{value:+.{decimals}f}"
    return text.replace("-", "−") if float(text) else text[1:]  # noqa: RUF001


def tone(value: float | None, decimals: int = 2) -> str:
    """`plus`, `minus` or `even`, as it is `signed`; empty where there is nothing."""
    if value is None:
        return ""
    rounded = round(value, decimals)
    return "plus" if rounded > 0 else "minus" if rounded < 0 else "even"


def percent(share: float | None, decimals: int = 0) -> str:
    return NONE if share is None else f"{100 * share:.{decimals}f} %"


def answer_time(exec_time_us: float | None) -> str:
    """`850 µs`, `12 ms`, `1.3 s`."""
    if exec_time_us is None:
        return NONE
    if exec_time_us < 1000:
        return f"{exec_time_us:.0f} µs"
    ms = exec_time_us / 1000
    return f"{ms:.{1 if ms < 10 else 0}f} ms" if ms < 1000 else f"{ms / 1000:.1f} s"


def size(count: float) -> str:
    """Bytes: `12 KB`, `3.4 MB`."""
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.{0 if unit == 'B' or count >= 10 else 1}f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def part(text: str) -> str:
    """One part of an address's path, slashes included."""
    return quote(text, safe="")


def query(**values: object) -> str:
    """`?window=recent&sort=model`, without what is None or empty; a list's name once for each."""
    text = urlencode({name: value for name, value in values.items() if value not in (None, "")}, doseq=True)
    return f"?{text}" if text else "?"


def as_json(value: object) -> Markup:
    """For a script element of data: nothing in it can end the element."""
    text = orjson.dumps(value).decode()
    for char in "<>&":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return Markup(text)  # noqa: S704 - escaped for where it stands


def ticked(text: str) -> Markup:
    """A docstring's text, with what it has in backticks as code."""
    return Markup(re.sub("`(.+?)`", r"<code>\1</code>", str(escape(text))))  # noqa: S704 - escaped


_templates = Environment(
    loader=PackageLoader("condor_lite.report"),
    autoescape=select_autoescape(default=True),
    undefined=StrictUndefined,
    auto_reload=False,  # a game that runs while the program is upgraded keeps the templates of its own code
    trim_blocks=True,
    lstrip_blocks=True,
)
_templates.filters.update(
    answer_time=answer_time,
    as_json=as_json,
    duration=duration,
    moment=lambda at_s: moment(int(at_s)),
    part=part,
    percent=percent,
    price=price,
    signed=signed,
    size=size,
    span=span,
    stamp=stamp,
    ticked=ticked,
    tone=tone,
    time_of_day=time_of_day,
)
_templates.globals.update(plotly=bundle.ADDRESS, query=query, static=address)
