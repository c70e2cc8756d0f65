"""What the event stream says: an event for each happening that a page shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from condor_lite.game.entities import ModelInfo, Round, RoundStatus
from condor_lite.news import (
    LeaderboardMade,
    ModelJoined,
    ModelLeft,
    PricesCame,
    RoundClosed,
    RoundSettled,
    RoundsNotHeld,
    RoundsOpened,
    ServiceRestarted,
)
from condor_lite.report.answers import Moment, moment
from condor_lite.report.live import Live
from condor_lite.report.stream import RESET, Stream

_MANY = 100  # rounds not held: after a long pause there may be thousands, which no page needs one by one


@dataclass(frozen=True, slots=True)
class NewPrice:
    asset: str
    price: float
    ts: Moment
    source: str


@dataclass(frozen=True, slots=True)
class PricesEvent:
    """`assets`: only those that have a new price."""

    now: Moment
    assets: list[NewPrice]


@dataclass(frozen=True, slots=True)
class RoundEvent:
    """`round_closed` is for void, missed and skipped rounds, too, and `round_scored` for one that turns out
    to be void.
    """

    round_id: str
    asset: str
    horizon: int
    step: int
    scheduled_at: Moment
    status: RoundStatus
    reason: str | None
    answered: int
    failed: int
    timed_out: int
    absent: int


@dataclass(frozen=True, slots=True)
class LeaderboardEvent:
    """There is a new one."""

    as_of: Moment


@dataclass(frozen=True, slots=True)
class ModelEvent:
    model_id: str
    model_name: str
    cruncher_name: str
    deployment_id: str


@dataclass(frozen=True, slots=True)
class ServiceEvent:
    """`error`: why it had failed."""

    service: str
    error: str


@dataclass(frozen=True, slots=True)
class ResetEvent:
    """Events are lost: whoever shows the game reads all of it anew."""


EVENTS: Mapping[str, type] = {
    "prices": PricesEvent,
    "round_opened": RoundEvent,
    "round_closed": RoundEvent,
    "round_scored": RoundEvent,
    "leaderboard": LeaderboardEvent,
    "model_joined": ModelEvent,
    "model_left": ModelEvent,
    "service_restarted": ServiceEvent,
    RESET: ResetEvent,
}


def announce(live: Live, stream: Stream) -> None:
    """Publish in `stream` what happens in the game from now on."""

    def prices(came: PricesCame) -> None:
        news = [
            NewPrice(state.asset, state.price, moment(state.newest_ts_s), state.source)
            for state in live.feeds()
            if state.asset in came.assets and state.price is not None and state.newest_ts_s is not None
        ]
        stream.publish("prices", PricesEvent(moment(int(live.clock.now())), news))

    def opened(happening: RoundsOpened) -> None:
        for round_ in happening.rounds:
            stream.publish("round_opened", _round(round_))

    def not_held(happening: RoundsNotHeld) -> None:
        if len(happening.rounds) > _MANY:
            stream.reset()
        else:
            for round_ in happening.rounds:
                stream.publish("round_closed", _round(round_))

    def restarted(happening: ServiceRestarted) -> None:
        stream.publish("service_restarted", ServiceEvent(happening.service, happening.error))

    listen = live.news.listen
    listen(PricesCame, prices)
    listen(RoundsOpened, opened)
    listen(RoundsNotHeld, not_held)
    listen(RoundClosed, lambda it: stream.publish("round_closed", _round(it.round)))
    listen(RoundSettled, lambda it: stream.publish("round_scored", _round(it.round)))
    listen(LeaderboardMade, lambda it: stream.publish("leaderboard", LeaderboardEvent(moment(it.as_of_s))))
    listen(ModelJoined, lambda it: stream.publish("model_joined", _model(it.info)))
    listen(ModelLeft, lambda it: stream.publish("model_left", _model(it.info)))
    listen(ServiceRestarted, restarted)


def _round(round_: Round) -> RoundEvent:
    return RoundEvent(
        round_id=round_.round_id,
        asset=round_.asset,
        horizon=round_.horizon_s,
        step=round_.step_s,
        scheduled_at=moment(round_.scheduled_at_s),
        status=round_.status,
        reason=round_.reason,
        answered=round_.answered,
        failed=round_.failed,
        timed_out=round_.timed_out,
        absent=round_.absent,
    )


def _model(info: ModelInfo) -> ModelEvent:
    return ModelEvent(info.model_id, info.model_name, info.cruncher_name, info.deployment_id)
