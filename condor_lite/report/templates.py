"""HTML from the templates. Everything that is put into one is escaped."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from condor_lite.report.live import Live

HTML = "text/html; charset=utf-8"

_templates = Environment(
    loader=PackageLoader("condor_lite.report"),
    autoescape=select_autoescape(default=True),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render(live: Live, template: str, **values: object) -> bytes:
    """A page. `base.html` itself uses `game`, `synthetic` and `replayed`, which are here."""
    source = live.config.feed.source
    text = _templates.get_template(template).render(
        game=live.config.game.name,
        synthetic=source == ("synthetic",),
        replayed=source == ("replay",),
        **values,
    )
    return text.encode()
