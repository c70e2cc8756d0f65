"""The predict loop against real gRPC servers, on stepped time."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import anyio
import pytest
from model_runner_client.grpc.generated.dynamic_subclass_pb2 import CallRequest, CallResponse, SetupRequest

from benchmarks import predict as measured
from condor_lite.game.entities import RoundStatus
from condor_lite.lanes import NO_TIME_LEFT
from condor_lite.pacer import Throttle
from tests import fleet
from tests.fleet import ModelServer
from tests.fleet.model import Behaviour, Wire
from tests.fleet.process import FleetProcess
from tests.program import LIMIT_S
from tests.stage import CONFIG, START_S, staged, until, within

pytestmark = pytest.mark.anyio


async def test_rounds_fall_on_the_grid_and_every_answer_is_stored(tmp_path: Path) -> None:
    async with staged(tmp_path) as stage:
        await stage.join(ModelServer("a"), ModelServer("b"))
        await stage.play(95)
        rounds = await stage.rows(
            "SELECT asset, scheduled_at_s, status, answered FROM round ORDER BY round_no"
        )
        held = {(asset, at_s - START_S): (status, answered) for asset, at_s, status, answered in rounds}
        # BTC at 0, 20, ..., ETH half an interval later; the last are still open or were open at the start
        for at_s in (20, 40, 60, 80):
            assert held["BTC", at_s] == ("closed", 2)
        for at_s in (10, 30, 50, 70):
            assert held["ETH", at_s] == ("closed", 2)
        stored = await stage.rows("SELECT count(*) FROM payload")
        assert stored[0][0] == sum(answered for _, answered in held.values())


async def test_a_tick_brings_all_points_up_to_the_round_and_none_later(tmp_path: Path) -> None:
    model = ModelServer("a")
    async with staged(tmp_path) as stage:
        await stage.join(model)
        await stage.play(60)
        seen: dict[str, list[int]] = {"BTC": [], "ETH": []}
        for tick in model.ticks:
            for asset, points in tick.items():
                seen[asset] += [int(ts_s) for ts_s, _ in points]
        for asset, times in seen.items():
            assert times == sorted(set(times)), f"{asset}: points came twice or out of order"
        assert max(seen["BTC"]) >= START_S + 60 - 5
        history = model.ticks[0]["BTC"]
        assert int(history[-1][0]) <= START_S, "the history goes no further than the round that is open"
        assert len(history) >= 59, "an hour at one-minute resolution"


async def test_a_model_that_gets_ready_while_a_round_is_open_is_asked_in_it(tmp_path: Path) -> None:
    late = ModelServer("late")
    async with staged(tmp_path, within("9s")) as stage:
        await stage.join(ModelServer("a"))
        await stage.play(21)  # BTC's round of :20 is open, and asked
        await stage.join(late)
        await until(lambda: late.predicts)
        await stage.play(10)
        assert (await stage.answers())["late", START_S + 20][0] == "SUCCESS"


async def test_a_hanging_model_times_out_and_delays_no_other(tmp_path: Path) -> None:
    hanging = ModelServer("hanging", fleet.hangs)
    good = [ModelServer(f"good{number}") for number in range(3)]
    async with staged(tmp_path, within("4s"), START_S + 15) as stage:
        await stage.join(hanging, *good)
        await stage.play(10)
        answers = await stage.answers()
        assert answers["hanging", START_S + 20][0] == "TIMEOUT"
        assert all(answers[model.model_id, START_S + 20][0] == "SUCCESS" for model in good)


async def test_a_model_that_is_withdrawn_in_the_middle_of_a_call_takes_no_other_with_it(
    tmp_path: Path,
) -> None:
    hanging, good = ModelServer("hanging", fleet.hangs), ModelServer("good")
    async with staged(tmp_path, within("10s")) as stage:
        await stage.join(hanging, good)
        playing = asyncio.create_task(stage.play(20))
        await until(lambda: hanging.predicts)
        await stage.orchestrator.announce(hanging, state="STOPPED")
        await until(lambda: "hanging" not in stage.predict.fleet.running)
        await playing
        await stage.play(30)
        assert stage.ready("good")
        told = (await stage.answers()).items()
        assert "SUCCESS" in {status for (model_id, _), (status, _) in told}
        left = [reason for (model_id, _), reason in told if model_id == "hanging"]
        assert left == [("TIMEOUT", "disconnected before it answered")]


async def test_a_failing_model_is_told_why_and_given_up_at_the_limit(tmp_path: Path) -> None:
    async with staged(tmp_path) as stage:
        await stage.join(ModelServer("bad", fleet.raises), ModelServer("good"))
        await stage.play(60)
        status, detail = (await stage.answers())["bad", START_S + 10]
        assert status == "FAILED"
        assert detail == "the model raised: division by zero"
        await until(lambda: stage.orchestrator.reports and "bad" not in stage.predict.fleet.running)
        assert stage.orchestrator.reports[0]["failure_code"] == "MULTIPLE_FAILED"
        assert "good" in stage.predict.fleet.running


async def test_an_absent_model_is_counted_without_a_row(tmp_path: Path) -> None:
    gone = ModelServer("gone")
    async with staged(tmp_path) as stage:
        await stage.join(gone, ModelServer("stays"))
        await stage.play(30)
        await stage.orchestrator.announce(gone, state="STOPPED")
        await until(lambda: not stage.ready("gone"))
        await stage.play(40)
        rows = await stage.rows(
            "SELECT answered, absent, absent_models FROM round WHERE scheduled_at_s = ? AND asset = 'BTC'",
            START_S + 60,
        )
        assert rows == [(1, 1, "[1]")] or rows == [(1, 1, "[2]")]
        assert ("gone", START_S + 60) not in await stage.answers()


async def test_a_round_without_models_is_void(tmp_path: Path) -> None:
    async with staged(tmp_path) as stage:
        await stage.play(30)
        rows = await stage.rows("SELECT DISTINCT status, reason FROM round WHERE status != 'open'")
        assert rows == [("void", "no model was connected")]


async def test_when_most_models_time_out_together_the_round_is_void_and_no_counter_moves(
    tmp_path: Path,
) -> None:
    async with staged(tmp_path, within("1s")) as stage:
        await stage.join(*(ModelServer(f"m{number}", fleet.hangs) for number in range(3)))
        await stage.play(25)
        void = [closed for closed in stage.closed if closed.status is RoundStatus.VOID]
        assert void
        assert all("host was at fault" in (closed.reason or "") for closed in void)
        assert all(not known.consecutive_timeouts for known in stage.predict.participants.values())


async def test_models_that_stay_silent_together_are_given_up_and_void_no_more_rounds(tmp_path: Path) -> None:
    async with staged(tmp_path, within("4s")) as stage:
        good = ModelServer("good")
        await stage.join(good, ModelServer("h1", fleet.hangs), ModelServer("h2", fleet.hangs))
        await stage.play(100)
        await until(lambda: {report["model_id"] for report in stage.orchestrator.reports} == {"h1", "h2"})
        await until(lambda: list(stage.predict.fleet.running) == ["good"])
        assert stage.closed[-1].status is RoundStatus.CLOSED
        assert all(
            known.suspected == set() or not known.trusted for known in stage.predict.participants.values()
        )


@pytest.mark.parametrize("failing", [fleet.raises, fleet.BEHAVIOURS["grpc_deadline"]])
async def test_one_good_answer_clears_the_counters(
    failing: Behaviour, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def moody(model: ModelServer, request: CallRequest) -> Wire:
        bad = request.methodName == "predict" and len(model.predicts) % 3
        return await (failing if bad else fleet.answers_well)(model, request)

    entered: list[bool] = []
    enter = Throttle.enter

    async def noted(self: Throttle, *, last: bool = False) -> int:
        entered.append(last)
        return await enter(self, last=last)

    monkeypatch.setattr(Throttle, "enter", noted)
    model = ModelServer("moody", moody)
    async with staged(tmp_path, within("10s")) as stage:
        await stage.join(model, *(ModelServer(f"good-{number}") for number in range(2)))
        known, failed = stage.predict.participants["moody"], []
        while len(model.predicts) < 9 and not stage.orchestrator.reports:
            await stage.play(10)
            failed.append(known.failing)
        assert not stage.orchestrator.reports
        assert stage.ready("moody")
        assert {True, False} == set(failed) == set(entered), "who failed is called after the others"


async def test_who_enters_last_waits_for_the_others_but_not_for_ever() -> None:
    throttle, order = Throttle(1, 60.0, 8), []

    async def call(name: str) -> None:
        number = await throttle.enter(last=name == "last")
        order.append(name)
        throttle.leave(number)

    async with anyio.create_task_group() as tasks:
        for name in ("last", "last", *("first",) * 100):
            tasks.start_soon(call, name)
    assert order[:63] == ["first"] * 63
    assert [number for number, name in enumerate(order, 1) if name == "last"] == [64, 102]


async def test_a_model_that_is_stuck_on_one_call_is_given_up(tmp_path: Path) -> None:
    stuck = ModelServer("stuck", fleet.BEHAVIOURS["deaf"])
    async with staged(tmp_path, within("4s")) as stage:
        await stage.join(stuck, ModelServer("good"))
        await stage.play(60)
        await until(lambda: stage.orchestrator.reports)
        assert stage.orchestrator.reports[0]["failure_code"] == "MULTIPLE_TIMEOUT"
        answers = await stage.answers()
        assert {status for (model_id, _), (status, _) in answers.items() if model_id == "good"} == {"SUCCESS"}


async def test_a_model_that_is_busy_from_one_round_to_the_next_is_told_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        measured, "CONFIG", measured.CONFIG.replace('timeout = "{interval}"', 'timeout = "50s"')
    )
    busy = "SELECT count(*) FROM prediction WHERE detail LIKE 'busy with an earlier call%'"
    async with (
        FleetProcess(4, {"deaf": 1}) as models,
        measured.playing(models.port) as game,
        asyncio.timeout(LIMIT_S),
    ):
        while not await game.db.read(lambda conn: conn.execute(busy).fetchone()[0]):
            await game.next_rounds(1)


async def test_who_was_not_asked_in_time_as_the_host_was_slow_is_told_so_and_not_counted(
    tmp_path: Path,
) -> None:
    class Crowded(Throttle):
        async def enter(self, *, last: bool = False) -> int:
            await asyncio.sleep(1.5)
            return await super().enter(last=last)

    async with staged(tmp_path, within("1s")) as stage:
        await stage.join(ModelServer("unlucky"), ModelServer("good"), ModelServer("better"))
        unlucky = stage.predict.participants["unlucky"]
        assert unlucky.lane is not None
        unlucky.lane._floor = replace(unlucky.lane._floor, throttle=Crowded(1, 1.0, 1))
        await stage.play(60)
        told = await stage.rows(
            "SELECT detail FROM prediction JOIN model USING (model_no)"
            " WHERE model_id = 'unlucky' AND status = 'TIMEOUT'"
        )
        assert len(told) > 3
        assert set(told) == {(NO_TIME_LEFT,)}
        assert not unlucky.consecutive_timeouts
        assert not stage.orchestrator.reports


async def test_an_instance_that_was_set_up_before_by_the_orchestrator_gets_the_history(
    tmp_path: Path,
) -> None:
    old, new = ModelServer("a", instance=True), ModelServer("a", deployment=2, instance=True)
    async with staged(tmp_path) as stage:
        await stage.join(old)
        assert len(old.ticks[0]["BTC"]) >= 59
        await stage.play(15)
        await new.start()
        stage.models.append(new)
        await stage.orchestrator.announce(new)
        await until(lambda: new.ticks)
        assert len(new.ticks[0]["BTC"]) >= 59


async def test_a_new_deployment_starts_with_a_clean_slate(tmp_path: Path) -> None:
    bad, mended = ModelServer("a", fleet.raises), ModelServer("a", deployment=2)
    async with staged(tmp_path) as stage:
        await stage.join(bad, ModelServer("b"))
        await stage.play(15)
        assert stage.predict.participants["a"].consecutive_failures == 2
        await mended.start()
        stage.models.append(mended)
        await stage.orchestrator.announce(mended)
        await until(lambda: mended.ticks)
        assert stage.predict.participants["a"].consecutive_failures == 0


async def test_a_model_that_never_lasts_is_set_up_ever_more_rarely_and_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never_lasts(model: ModelServer, request: CallRequest) -> CallResponse:
        model.instance = False
        return fleet.refusal("FAILED_PRECONDITION", "Setup has not been called yet")

    monkeypatch.setattr("condor_lite.models.fleet._SETUP_PAUSE_S", 0.01)
    model = ModelServer("a", never_lasts)
    async with staged(tmp_path) as stage:
        await model.start()
        stage.models.append(model)
        await stage.orchestrator.announce(model)
        await until(lambda: stage.orchestrator.reports)
        assert stage.orchestrator.reports[0]["failure_code"] == "MULTIPLE_FAILED"
        assert model.setups < 10


async def test_a_model_that_only_takes_its_history_is_not_given_it_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def forgets(model: ModelServer, request: CallRequest) -> Wire:
        if request.methodName == "tick":
            return await fleet.answers_well(model, request)
        model.instance = False
        return fleet.refusal("FAILED_PRECONDITION", "Setup has not been called yet")

    monkeypatch.setattr("condor_lite.models.fleet._SETUP_PAUSE_S", 0.01)
    model = ModelServer("a", forgets)
    config = CONFIG.replace("max_consecutive_failures = 3", "max_consecutive_failures = 1000")
    async with staged(tmp_path, config) as stage, asyncio.timeout(LIMIT_S):
        await model.start()
        stage.models.append(model)
        await stage.orchestrator.announce(model)  # given up soon, it may never be seen ready
        while not stage.orchestrator.reports:
            await stage.play(5)
            await asyncio.sleep(0.005)
            assert model.setups < 10
        assert "without a good answer in any round" in stage.orchestrator.reports[0]["failure_reason"]


async def test_the_same_announcement_twice_is_one_connection(tmp_path: Path) -> None:
    model = ModelServer("a")
    async with staged(tmp_path) as stage:
        await model.start()
        stage.models.append(model)
        await stage.orchestrator.announce(model)
        await stage.orchestrator.announce(model)
        await until(lambda: stage.ready("a"))
        await stage.play(20)
        assert model.setups == 1
        await stage.orchestrator.announce(model, state="STOPPED")
        await until(lambda: not stage.predict.fleet.running)
        assert stage.predict.participants["a"].lane is None


async def test_a_malformed_init_removes_nobody(tmp_path: Path) -> None:
    async with staged(tmp_path) as stage:
        await stage.join(ModelServer("a"))
        for message in (
            '{"event": "init", "data": {}}',
            '{"event": "init"}',
            "[]",
            "null",
            "\x00",
            '{"event": 5}',
        ):
            await stage.orchestrator.send(message)
        unclear = {**stage.orchestrator.entries["a"], "port": "many"}
        await stage.orchestrator.send(json.dumps({"event": "init", "data": [unclear, 5]}))
        await stage.orchestrator.send(json.dumps({"event": "update", "data": [stage.models[0].entry()]}))
        await stage.play(20)
        assert stage.ready("a")


async def test_a_model_that_restarted_without_setup_is_set_up_again_with_its_history(tmp_path: Path) -> None:
    model = ModelServer("a")
    async with staged(tmp_path) as stage:
        await stage.join(model, ModelServer("b"))
        await stage.play(15)
        model.instance = False
        setups, ticks = model.setups, len(model.ticks)
        await stage.play(10)
        await until(lambda: model.setups > setups and stage.ready("a"))
        assert len(max(model.ticks[ticks:], key=lambda tick: len(tick.get("BTC", [])))["BTC"]) >= 59
        await stage.play(30)
        assert (await stage.answers())["a", START_S + 40][0] == "SUCCESS"


async def test_a_redeployment_is_a_fresh_model_under_the_same_id(tmp_path: Path) -> None:
    old, new = ModelServer("a"), ModelServer("a", deployment=2)
    async with staged(tmp_path) as stage:
        await stage.join(old)
        await stage.play(15)
        await new.start()
        stage.models.append(new)
        await stage.orchestrator.announce(new)
        await stage.orchestrator.announce(old, state="STOPPED")
        await until(lambda: new.ticks and stage.ready("a"))
        await stage.play(30)
        assert new.predicts
        deployments = await stage.rows("SELECT deployment_id FROM deployment ORDER BY first_seen_at_s")
        assert deployments == [("a_1",), ("a_2",)]


async def test_finishing_closes_the_rounds_in_flight_and_stores_them(tmp_path: Path) -> None:
    async with staged(tmp_path) as stage:
        await stage.join(ModelServer("a"))
        await stage.play(20.5)
        await stage.predict.finish(grace_s=5)
        await stage.journal.flushed()
        rows = await stage.rows("SELECT status, answered FROM round WHERE scheduled_at_s = ?", START_S + 20)
        assert rows == [("closed", 1)]


@pytest.mark.parametrize("behaviour", ["not_protobuf", "broken_utf8_status"])
async def test_a_reply_that_is_no_message_is_a_failure_that_says_so(behaviour: str, tmp_path: Path) -> None:
    async with staged(tmp_path) as stage:
        await stage.join(fleet.server("bad", behaviour), ModelServer("good"))
        await stage.play(25)
        answers = await stage.answers()
        assert answers["bad", START_S + 20] == (
            "FAILED",
            "the model's server sent bytes that are no reply of the protocol",
        )
        assert answers["good", START_S + 20] == ("SUCCESS", None)


async def test_a_setup_reply_that_is_no_message_is_reported_as_such(tmp_path: Path) -> None:
    async def garbles(model: ModelServer, request: SetupRequest) -> bytes:
        return b"\xff\xff\xff\xff not a message"

    async with staged(tmp_path) as stage:
        garbled = ModelServer("garbled", setup=garbles)
        await garbled.start()
        stage.models.append(garbled)
        await stage.orchestrator.announce(garbled)
        await stage.join(ModelServer("good"))
        await until(lambda: stage.orchestrator.reports)
        report = stage.orchestrator.reports[0]
        assert (report["model_id"], report["failure_code"]) == ("garbled", "MULTIPLE_FAILED")
        assert "Setup failed: the model's server sent bytes" in report["failure_reason"]
        assert stage.ready("good")


async def test_a_round_that_finds_all_models_paused_says_so(tmp_path: Path) -> None:
    async with staged(tmp_path) as stage:
        await stage.join(ModelServer("a"), ModelServer("b"))
        for model_id in ("a", "b"):
            stage.predict.pause(model_id)
        await stage.play(30)
        assert {closed.reason for closed in stage.closed[1:]} == {"every connected model is paused"}
