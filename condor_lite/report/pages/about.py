"""The rules of this game in plain language, from its config: what is asked, how it is scored, how to join."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from condor_lite.config import Config
from condor_lite.game.entities import Setting, Window
from condor_lite.game.schedule import deadline_s, next_due
from condor_lite.report.context import Context
from condor_lite.report.pages.common import FOR_S, show
from condor_lite.report.params import NoParams
from condor_lite.report.replies import Reply
from condor_lite.storage import queries

_OWN_BASE = "condor_lite.tracker.TrackerBase"

_MODEL = """\
from {module} import {name}


class MyModel({name}):
    def predict(self, asset, horizon, step):
        moves = self.prices.returns(asset, step, days=1)
        scale = (sum(move * move for move in moves) / max(1, len(moves))) ** 0.5{to_price}
        density = {{"type": "builtin", "name": "norm", "params": {{"loc": 0.0, "scale": max(scale, 1e-6)}}}}
        return self.flat(density, horizon, step)
"""
_TO_PRICE = " * self.prices.last(asset)[1]"

# For a base class that is not ours: it keeps the prices itself.
_MODEL_ELSEWHERE = """\
from math import log
from {module} import {name}


class MyModel({name}):
    seen = {{}}

    def tick(self, data):
        for asset, points in data.items():
            self.seen[asset] = [*self.seen.get(asset, []), *points][-1000:]

    def predict(self, asset, horizon, step):
        points = self.seen[asset]
        moves = [log(b[1] / a[1]) ** 2 / (b[0] - a[0]) for a, b in zip(points, points[1:]) if b[0] > a[0]]
        scale = (sum(moves) / max(1, len(moves)) * step) ** 0.5{to_price}
        params = {{"loc": 0.0, "scale": max(scale, 1e-6)}}
        return [
            {{"step": k * step, "type": "builtin", "name": "norm", "params": params}}
            for k in range(1, horizon // step + 1)
        ]
"""
_TO_PRICE_ELSEWHERE = " * points[-1][1]"


@dataclass(frozen=True, slots=True)
class Question:
    """Settings that differ in nothing but the asset. `deadline_s`: how long models have (wall)."""

    assets: Sequence[str]
    setting: Setting
    deadline_s: float
    next_s: int | None


async def page(context: Context, sent: NoParams) -> Reply:
    """The rules, and how to take part."""
    return await context.remembered("about", FOR_S, partial(_page, context))


async def _page(context: Context) -> Reply:
    live = context.live
    config = live.config
    return await show(
        context,
        "about.html",
        at="/about",
        questions=_questions(config, live.clock.now()),
        windows=list(Window),
        config=config,
        rule=await queries.current_rule(context.readers, config.scoring.rule),
        models=config.orchestrator.models.name,
        module=config.game.base_class.rpartition(".")[0],
        model=model(config),
        wait_s=config.scoring.settle_delay_s + config.scoring.interval_s * live.clock.speed,
    )


def model(config: Config) -> str:
    """The source of a model that works in this game."""
    module, _, name = config.game.base_class.rpartition(".")
    own = config.game.base_class == _OWN_BASE
    to_price = ""
    if config.scoring.target == "price_change":
        to_price = _TO_PRICE if own else _TO_PRICE_ELSEWHERE
    return (_MODEL if own else _MODEL_ELSEWHERE).format(module=module, name=name, to_price=to_price)


def _questions(config: Config, now_s: float) -> list[Question]:
    grouped: dict[tuple[int, int, int, float], list[Setting]] = {}
    for setting in config.game.settings:
        key = (setting.horizon_s, setting.step_s, setting.interval_s, setting.weight)
        grouped.setdefault(key, []).append(setting)
    timeout_s = config.predict.timeout_s * config.game.speed
    return [
        Question(
            assets=[setting.asset for setting in settings],
            setting=settings[0],
            deadline_s=deadline_s(0, settings[0], timeout_s) / config.game.speed,
            next_s=next_due(settings, now_s) if settings[0].interval_s else None,
        )
        for settings in grouped.values()
    ]
