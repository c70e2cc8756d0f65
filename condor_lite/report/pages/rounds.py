"""The rounds, newest first, filtered by links and a form."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

from condor_lite.game.entities import RoundStatus
from condor_lite.report import params
from condor_lite.report.context import Context
from condor_lite.report.game import RoundsParams, find_rounds, round_id
from condor_lite.report.pages.common import FOR_S, query, show
from condor_lite.report.replies import Reply

_LINES = 50


@dataclass(frozen=True, slots=True)
class RoundsPageParams(RoundsParams):
    limit: int = field(default=_LINES, metadata=params.whole(1, 500))


async def page(context: Context, sent: RoundsPageParams) -> Reply:
    """One page of the rounds."""
    return await context.remembered(("rounds", sent), FOR_S, partial(_page, context, sent))


async def _page(context: Context, sent: RoundsPageParams) -> Reply:
    found, before = await find_rounds(context, sent)
    filters = {
        "asset": sent.asset,
        "horizon": sent.horizon,
        "status": sent.status.value if sent.status else None,
        "limit": sent.limit if sent.limit != _LINES else None,
    }
    game = context.live.config.game
    return await show(
        context,
        "rounds.html",
        at="/rounds",
        rounds=[(round_id(row), row) for row in found],
        sent=sent,
        is_filtered=any(filters.values()),
        older=query(**filters, before=before) if before else None,
        newest=query(**filters),
        assets=game.assets,
        horizons=sorted({setting.horizon_s for setting in game.settings}),
        statuses=list(RoundStatus),
    )
