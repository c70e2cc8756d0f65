"""What is stored of a game, that it is stored once, and that it is forgotten in time."""

from __future__ import annotations

import json
import random
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from condor_lite.config import StorageConfig
from condor_lite.game.entities import (
    Answer,
    AnswerStatus,
    Leaderboard,
    ModelInfo,
    ModelScore,
    Round,
    RoundScores,
    RoundStatus,
    Standing,
    Window,
    WindowScores,
)
from condor_lite.storage import repositories, scores
from condor_lite.storage.compression import compress, decompress
from condor_lite.storage.connection import connect_writer, migrate

NOON_S = 1_700_000_000
SUCCESS, FAILED, TIMEOUT = AnswerStatus.SUCCESS, AnswerStatus.FAILED, AnswerStatus.TIMEOUT


@pytest.fixture
def conn(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    conn = connect_writer(tmp_path / "condor.db", 1.0)
    conn.execute("PRAGMA synchronous = OFF")  # outside a transaction, every statement would wait for the disk
    yield conn
    assert conn.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert conn.execute("PRAGMA foreign_key_check").fetchall() == []
    conn.close()


def info(name: str, **more: object) -> ModelInfo:
    return replace(ModelInfo(name, f"{name}'s name", "7", "ann", "d1"), **more)


def join(conn: sqlite3.Connection, *names: str) -> list[int]:
    return [repositories.upsert_model(conn, info(name), NOON_S).model_no for name in names]


def hold(
    conn: sqlite3.Connection, at_s: int, *answers: tuple[int, AnswerStatus], absent: tuple[int, ...] = ()
) -> Round:
    """A closed round of one minute with these answers."""
    (round_no,) = repositories.open_rounds(conn, [question(at_s)])
    assert round_no is not None
    repositories.add_answers(conn, [answer(round_no, *who) for who in answers])
    return repositories.close_round(conn, round_no, RoundStatus.CLOSED, None, absent)


def question(at_s: int, asset: str = "BTC", **more: object) -> Round:
    return replace(Round(asset, 60, 10, at_s, performed_at_ms=at_s * 1000 + 3), **more)


def answer(round_no: int, model_no: int, status: AnswerStatus = SUCCESS, **more: object) -> Answer:
    payload = b'[{"type": "norm"}]' if status is SUCCESS else None
    detail = None if status is SUCCESS else f"it {status.lower()}"
    return replace(Answer(round_no, model_no, status, NOON_S * 1000, 1500, detail, payload), **more)


def dump(conn: sqlite3.Connection) -> list[str]:
    return list(conn.iterdump())


# The clock


def test_the_clock_is_the_later_of_what_was_saved_and_the_newest_round(conn: sqlite3.Connection) -> None:
    assert repositories.load_clock(conn) is None
    repositories.save_clock(conn, 100.25)
    assert repositories.load_clock(conn) == 100.25
    repositories.save_clock(conn, 99.5)
    assert repositories.load_clock(conn) == 99.5
    repositories.open_rounds(conn, [question(120)])
    assert repositories.load_clock(conn) == 120


# Prices


def test_a_stored_price_stands(conn: sqlite3.Connection) -> None:
    assert repositories.newest_price_s(conn, "BTC") is None
    assert repositories.add_prices(conn, "BTC", [(60, 2.0), (120, 3.0)], "coinbase", 1) == 2
    assert repositories.add_prices(conn, "BTC", [(120, 9.0), (180, 4.0)], "kraken", 2) == 1
    repositories.add_prices(conn, "ETH", [(np.int64(240), np.float64(1.5))], "kraken", 2)
    ts_s, price = repositories.load_prices(conn, "BTC", 60, 180)
    assert (ts_s.dtype, price.dtype) == (np.int64, np.float64)
    assert (ts_s.tolist(), price.tolist()) == ([60, 120, 180], [2.0, 3.0, 4.0])
    assert repositories.load_prices(conn, "BTC", 60.5, 179.9)[0].tolist() == [120]
    assert repositories.load_prices(conn, "XAU", 0, 1e12)[1].tolist() == []
    assert repositories.newest_price_s(conn, "BTC") == 180
    assert repositories.newest_price_s(conn, "ETH") == 240


def test_points_say_where_they_came_from(conn: sqlite3.Connection) -> None:
    repositories.add_prices(conn, "BTC", [(60, 2.0), (120, 3.0)], "coinbase", 1)
    repositories.add_prices(conn, "BTC", [(180, 4.0)], "kraken", 2)
    series, names = repositories.load_series(conn, "BTC", 0, 1e12)
    assert series.source is not None
    assert (series.ts_s.tolist(), series.price.tolist()) == ([60, 120, 180], [2.0, 3.0, 4.0])
    assert [names[number] for number in series.source.tolist()] == ["coinbase", "coinbase", "kraken"]
    series, names = repositories.load_series(conn, "BTC", 61, 179)
    assert (series.ts_s.tolist(), names) == ([120], ("coinbase",))


def test_only_the_source_that_gave_a_point_revises_it(conn: sqlite3.Connection) -> None:
    repositories.add_prices(conn, "BTC", [(60, 2.0), (120, 3.0)], "coinbase", 1)
    revised = [(60, 2.0), (120, 3.5), (180, 9.0)]
    assert repositories.revise_prices(conn, "BTC", revised, "kraken") == []
    assert repositories.revise_prices(conn, "BTC", revised, "coinbase") == [(120, 3.5)]
    assert repositories.load_prices(conn, "BTC", 0, 1e12)[1].tolist() == [2.0, 3.5]


@pytest.mark.parametrize("price", [0.0, -1.0, float("inf"), float("nan")])
def test_what_is_no_price_is_refused(conn: sqlite3.Connection, price: float) -> None:
    with pytest.raises(sqlite3.IntegrityError):
        repositories.add_prices(conn, "BTC", [(60, price)], "synthetic", 1)


# Models


def test_a_model_keeps_its_number_and_its_deployments_are_known(conn: sqlite3.Connection) -> None:
    ann = repositories.upsert_model(conn, info("ann", code_hash="c0"), NOON_S + 0.9)
    assert (ann.joined_at_s, ann.last_seen_at_s, ann.first_round_at_s) == (NOON_S, NOON_S, None)
    bob = repositories.upsert_model(conn, info("bob", benchmark=True), NOON_S + 5)
    news = info("ann", model_name="new name", deployment_id="d2", code_hash="c1")
    again = repositories.upsert_model(conn, news, NOON_S + 60)
    assert again == replace(ann, info=news, last_seen_at_s=NOON_S + 60)
    repositories.upsert_model(conn, news, NOON_S + 30)
    repositories.touch_models(conn, [bob.model_no], NOON_S + 90.5)
    repositories.touch_models(conn, [bob.model_no], NOON_S + 80)
    assert repositories.load_models(conn) == [again, replace(bob, last_seen_at_s=NOON_S + 90)]
    assert conn.execute("SELECT * FROM deployment ORDER BY first_seen_at_s, model_no").fetchall() == [
        (ann.model_no, "d1", "c0", NOON_S),
        (bob.model_no, "d1", None, NOON_S + 5),
        (ann.model_no, "d2", "c1", NOON_S + 60),
    ]


def test_text_that_is_no_text_is_stored_readably(conn: sqlite3.Connection) -> None:
    model = repositories.upsert_model(conn, info("ann", model_name="a\ud800\0<b>ü"), NOON_S)
    assert model.info.model_name == "a?\0<b>ü"
    assert repositories.load_models(conn) == [model]
    (round_no,) = repositories.open_rounds(conn, [question(NOON_S)])
    assert round_no is not None
    repositories.add_answers(conn, [answer(round_no, model.model_no, FAILED, detail="\udfff!")])
    assert conn.execute("SELECT detail FROM prediction").fetchone() == ("?!",)


# Rounds and answers


def test_a_round_is_stored_once(conn: sqlite3.Connection) -> None:
    assert repositories.next_round_no(conn) == 1
    first, second = repositories.open_rounds(conn, [question(120), question(180, round_no=7)])
    assert (first, second) == (1, 7)
    assert repositories.open_rounds(
        conn, [question(180, round_no=7), question(120), question(120, "ETH")]
    ) == [
        None,
        None,
        8,
    ]
    missed = question(240, status=RoundStatus.MISSED, reason="not running", performed_at_ms=None)
    repositories.record_rounds(conn, [missed, question(120, status=RoundStatus.MISSED)])
    stored = repositories.select_rounds(conn, "asset = 'BTC' ORDER BY scheduled_at_s", ())
    assert stored == [question(120, round_no=1), question(180, round_no=7), replace(missed, round_no=9)]
    assert repositories.newest_round_s(conn) == {"BTC-60-10": 240, "ETH-60-10": 120}
    with pytest.raises(sqlite3.IntegrityError):
        repositories.open_rounds(conn, [question(300, round_no=7)])


def test_a_closed_round_accounts_for_every_model(conn: sqlite3.Connection) -> None:
    a, b, c, d, e = join(conn, *"abcde")
    (round_no,) = repositories.open_rounds(conn, [question(NOON_S)])
    assert round_no is not None
    assert repositories.add_answers(conn, [answer(round_no, a), answer(round_no, b, FAILED)]) == 2
    assert repositories.add_answers(conn, [answer(round_no, c, TIMEOUT)]) == 1
    closed = repositories.close_round(conn, round_no, RoundStatus.CLOSED, None, [e, d, a])
    assert closed == question(
        NOON_S, status=RoundStatus.CLOSED, answered=1, failed=1, timed_out=1, absent=2, round_no=round_no
    )
    before = dump(conn)
    assert repositories.close_round(conn, round_no, RoundStatus.VOID, "again", []) == closed
    assert dump(conn) == before
    assert conn.execute("SELECT absent_models FROM round").fetchone() == (f"[{d},{e}]",)


def test_rounds_that_a_crash_left_open_are_void(conn: sqlite3.Connection) -> None:
    (a,) = join(conn, "a")
    hold(conn, NOON_S, (a, SUCCESS))
    opened = repositories.open_rounds(conn, [question(NOON_S + 60), question(NOON_S + 60, "ETH")])
    repositories.add_answers(conn, [answer(no, a) for no in opened if no is not None])
    assert repositories.void_interrupted(conn, "the game stopped") == [
        f"BTC-60-10-{NOON_S + 60}",
        f"ETH-60-10-{NOON_S + 60}",
    ]
    assert repositories.void_interrupted(conn, "the game stopped") == []
    void = repositories.select_rounds(conn, "status = 'void' AND asset = 'ETH'", ())
    assert [(round_.reason, round_.answered) for round_ in void] == [("the game stopped", 1)]
    assert len(repositories.rounds_to_validate(conn, 0, 10)) == 1


def test_a_models_first_answer_in_a_round_stands(conn: sqlite3.Connection) -> None:
    a, b = join(conn, "a", "b")
    (round_no,) = repositories.open_rounds(conn, [question(NOON_S)])
    assert round_no is not None
    assert repositories.add_answers(conn, [answer(round_no, a), answer(round_no, b, TIMEOUT)]) == 2
    before = dump(conn)
    assert repositories.add_answers(conn, [answer(round_no, a, payload=b"[]"), answer(round_no, b)]) == 0
    assert dump(conn) == before
    assert repositories.payloads(conn, round_no) == {a: compress(b'[{"type": "norm"}]')}


@settings(max_examples=40)
@given(
    sent=st.lists(
        st.tuples(
            st.integers(1, 2), st.integers(1, 4), st.sampled_from([SUCCESS, FAILED, TIMEOUT]), st.binary()
        ),
        max_size=12,
    ),
    cuts=st.lists(st.integers(0, 12), max_size=3),
)
def test_answers_may_come_twice_and_in_any_groups(
    sent: list[tuple[int, int, AnswerStatus, bytes]], cuts: list[int]
) -> None:
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as conn:
        migrate(conn, Path(":memory:"))
        join(conn, *"abcd")
        repositories.open_rounds(conn, [question(NOON_S), question(NOON_S + 60)])
        answers = [
            answer(no, model_no, status, payload=body if status is SUCCESS else None)
            for no, model_no, status, body in sent
        ]
        edges = [0, *sorted(cuts), len(answers)]
        for start, end in pairwise(edges):
            repositories.add_answers(conn, answers[start:end])
            repositories.add_answers(conn, answers[start:end])
        first: dict[tuple[int, int], Answer] = {}
        for one in answers:
            first.setdefault((one.round_no, one.model_no), one)
        stored = conn.execute("SELECT round_no, model_no, status FROM prediction").fetchall()
        assert {(no, model_no): status for no, model_no, status in stored} == {
            key: one.status for key, one in first.items()
        }
        for no in (1, 2):
            assert repositories.payloads(conn, no) == {
                model_no: compress(one.payload or b"")
                for (of, model_no), one in first.items()
                if of == no and one.status is SUCCESS
            }


def test_the_first_round_is_the_earliest_a_model_was_asked_in(conn: sqlite3.Connection) -> None:
    a, b = join(conn, "a", "b")
    hold(conn, NOON_S + 60, (a, TIMEOUT))
    hold(conn, NOON_S, (a, SUCCESS), (b, FAILED))
    hold(conn, NOON_S + 120, (a, SUCCESS), (b, SUCCESS))
    assert [model.first_round_at_s for model in repositories.load_models(conn)] == [NOON_S, NOON_S]


def test_answers_without_a_round_or_of_no_status_of_an_answer_are_refused(conn: sqlite3.Connection) -> None:
    (a,) = join(conn, "a")
    with pytest.raises(sqlite3.IntegrityError):
        repositories.add_answers(conn, [answer(99, a)])
    (round_no,) = repositories.open_rounds(conn, [question(NOON_S)])
    assert round_no is not None
    with pytest.raises(sqlite3.IntegrityError):
        repositories.add_answers(conn, [answer(round_no, a, AnswerStatus.ABSENT)])


def test_a_payload_is_stored_in_a_sixth_of_what_was_sent(conn: sqlite3.Connection) -> None:
    (a,) = join(conn, "a")
    (round_no,) = repositories.open_rounds(conn, [question(NOON_S)])
    assert round_no is not None
    rng = random.Random(1)

    def normal() -> dict[str, object]:
        params = {"loc": rng.gauss(0, 1e-5), "scale": rng.uniform(5e-4, 2e-3)}
        return {"type": "builtin", "name": "norm", "params": params}

    segments = [
        {
            "step": 60 * place,
            "prediction": {
                "type": "mixture",
                "components": [{"density": normal(), "weight": rng.random()} for _ in range(3)],
            },
        }
        for place in range(1, 61)
    ]
    sent = json.dumps(segments).encode()
    repositories.add_answers(conn, [answer(round_no, a, payload=sent)])
    (stored,) = conn.execute("SELECT body FROM payload").fetchone()
    assert decompress(stored) == sent
    assert len(stored) <= len(sent) / 6


# Validation


def test_an_invalid_answer_fails_with_its_reason(conn: sqlite3.Connection) -> None:
    a, b, c = join(conn, "a", "b", "c")
    held = hold(conn, NOON_S, (a, SUCCESS), (b, SUCCESS), (c, TIMEOUT))
    assert held.round_no is not None
    assert repositories.rounds_to_validate(conn, held.resolvable_at_s - 1, 10) == [held]
    assert repositories.rounds_to_validate(conn, held.resolvable_at_s, 10) == []
    assert repositories.not_validated(conn, [held.round_no, 99]) == {held.round_no}
    for _ in range(2):
        repositories.save_validation(conn, held.round_no, {b: "segment 3: scale must be > 0", c: "no"})
    assert repositories.rounds_to_validate(conn, 0, 10) == []
    assert repositories.not_validated(conn, [held.round_no, 99]) == set()
    assert scores.rounds_to_settle(conn, 1e12, 10) == [replace(held, answered=1, failed=1)]
    assert repositories.payloads(conn, held.round_no).keys() == {a}
    rows = conn.execute("SELECT model_no, status, detail FROM prediction ORDER BY model_no").fetchall()
    assert rows == [
        (a, "SUCCESS", None),
        (b, "FAILED", "invalid: segment 3: scale must be > 0"),
        (c, "TIMEOUT", "it timeout"),
    ]
    repositories.save_validation(conn, held.round_no, {a: "it took longer than 2 s to score"})
    assert repositories.payloads(conn, held.round_no) == {}
    assert scores.rounds_to_settle(conn, 1e12, 10) == [replace(held, answered=0, failed=2)]


# Settling and scores


def test_rounds_settle_oldest_first_up_to_the_limit(conn: sqlite3.Connection) -> None:
    (a,) = join(conn, "a")
    for at_s in (NOON_S + 120, NOON_S, NOON_S + 60):
        held = hold(conn, at_s, (a, SUCCESS))
        assert held.round_no is not None
        repositories.save_validation(conn, held.round_no, {})

    def due(until_s: float, limit: int) -> list[int]:
        return [round_.scheduled_at_s - NOON_S for round_ in scores.rounds_to_settle(conn, until_s, limit)]

    assert due(NOON_S + 59.9, 10) == []
    assert due(NOON_S + 120, 10) == [0, 60]
    assert due(NOON_S + 1000, 2) == [0, 60]


def test_a_round_counts_for_those_asked_and_those_absent_after_their_first_round(
    conn: sqlite3.Connection,
) -> None:
    a, b, c, d = join(conn, *"abcd")
    hold(conn, NOON_S, (c, SUCCESS))
    held = hold(conn, NOON_S + 60, (a, SUCCESS), (b, TIMEOUT), absent=(c, d))
    hold(conn, NOON_S + 120, (d, SUCCESS))
    assert held.round_no is not None
    assert scores.counted_models(conn, held.round_no) == {a: True, b: False, c: False}


def scored(*raw: float | None) -> RoundScores:
    """Scores of the models 1, 2, ..."""
    return RoundScores(
        median=2.0,
        no_move=4.0,
        models={
            model_no: ModelScore(value, 3.0 if value is None else value, 1.0)
            for model_no, value in enumerate(raw, start=1)
        },
    )


def ready(conn: sqlite3.Connection, at_s: int, *answers: tuple[int, AnswerStatus]) -> int:
    held = hold(conn, at_s, *answers)
    assert held.round_no is not None
    repositories.save_validation(conn, held.round_no, {})
    return held.round_no


def test_a_round_is_scored_once_a_version(conn: sqlite3.Connection) -> None:
    a, b = join(conn, "a", "b")
    round_no = ready(conn, NOON_S, (a, SUCCESS), (b, TIMEOUT))
    version = scores.current_scorer(conn, "crps", "log_return", "f1", NOON_S)
    assert scores.save_round_scores(conn, round_no, version, scored(1.5, None), 6, 5) is True
    assert scores.rounds_to_settle(conn, 1e12, 10) == []
    before = dump(conn)
    assert scores.save_round_scores(conn, round_no, version, scored(9.0, 9.0), 6, 7) is False
    scores.void_round(conn, round_no, "too late")
    assert dump(conn) == before
    newer = scores.current_scorer(conn, "log", "log_return", "f2", NOON_S)
    assert scores.save_round_scores(conn, round_no, newer, scored(0.5, 0.25), 6, 9) is True
    rows = conn.execute("SELECT scorer_version, model_no, raw, counted, score FROM score").fetchall()
    assert rows == [
        (version, a, 1.5, 1.5, 1.0),
        (version, b, None, 3.0, 1.0),
        (newer, a, 0.5, 0.5, 1.0),
        (newer, b, 0.25, 0.25, 1.0),
    ]


@pytest.mark.parametrize("raw", [float("inf"), float("nan")])
def test_a_score_that_is_no_number_leaves_the_round_unscored(conn: sqlite3.Connection, raw: float) -> None:
    (a,) = join(conn, "a")
    round_no = ready(conn, NOON_S, (a, SUCCESS))
    version = scores.current_scorer(conn, "crps", "log_return", "f1", NOON_S)
    conn.execute("BEGIN")
    with pytest.raises(sqlite3.IntegrityError):
        scores.save_round_scores(conn, round_no, version, scored(raw), 6, 5)
    conn.execute("ROLLBACK")
    assert len(scores.rounds_to_settle(conn, 1e12, 10)) == 1


def test_a_void_round_takes_no_scores(conn: sqlite3.Connection) -> None:
    (a,) = join(conn, "a")
    round_no = ready(conn, NOON_S, (a, SUCCESS))
    scores.void_round(conn, round_no, "the price did not move")
    version = scores.current_scorer(conn, "crps", "log_return", "f1", NOON_S)
    assert scores.save_round_scores(conn, round_no, version, scored(1.0), 6, 5) is False
    (void,) = repositories.select_rounds(conn, "round_no = ?", (round_no,))
    assert (void.status, void.reason) == (RoundStatus.VOID, "the price did not move")
    assert conn.execute("SELECT count(*) FROM score").fetchone() == (0,)


def test_other_rules_are_another_scorer(conn: sqlite3.Connection) -> None:
    def version(rule: str, target: str, fingerprint: str) -> int:
        return scores.current_scorer(conn, rule, target, fingerprint, NOON_S)

    assert version("crps", "log_return", "f") == version("crps", "log_return", "f") == 1
    assert version("log", "log_return", "f") == 2
    assert version("log", "price_change", "f") == 3
    assert version("log", "price_change", "g") == 4
    assert version("crps", "log_return", "f") == 5  # not the first again: its scores are of another time


def test_the_window_rows_are_the_scores_of_one_version(conn: sqlite3.Connection) -> None:
    a, b = join(conn, "a", "b")
    old = scores.current_scorer(conn, "crps", "log_return", "f1", NOON_S)
    rounds = [ready(conn, NOON_S + 60 * place, (a, SUCCESS), (b, TIMEOUT)) for place in (2, 0, 1)]
    for round_no in rounds:
        scores.save_round_scores(conn, round_no, old, scored(1.5, None), 6, 5)
    new = scores.current_scorer(conn, "crps", "log_return", "f2", NOON_S)
    scores.save_round_scores(conn, rounds[0], new, scored(1.0), 6, 5)

    rows = scores.load_window_rows(conn, old, NOON_S + 120, 2**40)
    for column, expected in (
        (rows.round_no, [rounds[2], rounds[2], rounds[0], rounds[0]]),
        (rows.model_no, [a, b, a, b]),
        (rows.asset, ["BTC"] * 4),
        (rows.horizon_s, [60] * 4),
        (rows.step_s, [10] * 4),
        (rows.resolvable_at_s, [NOON_S + 120, NOON_S + 120, NOON_S + 180, NOON_S + 180]),
        (rows.median, [2.0] * 4),
        (rows.no_move, [4.0] * 4),
        (rows.raw, [1.5, np.nan, 1.5, np.nan]),
        (rows.counted, [1.5, 3.0, 1.5, 3.0]),
    ):
        np.testing.assert_array_equal(column, expected)
    assert np.size(scores.load_window_rows(conn, new, 0, 2**40).raw) == 1
    assert np.size(scores.load_window_rows(conn, new + 1, 0, 2**40).raw) == 0


# The leaderboard


def test_a_leaderboard_is_stored_with_its_settings_when_asked(conn: sqlite3.Connection) -> None:
    join(conn, "a", "b")
    models = repositories.load_models(conn)
    version = scores.current_scorer(conn, "crps", "log_return", "f1", NOON_S)
    standings = tuple(
        Standing(
            model=model,
            rank=rank,
            ranks=dict.fromkeys(Window, rank),
            overall=WindowScores(1.0, None, 3.0),
            by_setting={"BTC-USD-60-10": WindowScores(0.5, 0.25, None)},
            rounds=1,
            answered=1,
            skill=WindowScores(),
            standard_error=WindowScores(),
            p_better_than_next=None,
        )
        for model, rank in zip(models, (1, None), strict=True)
    )
    board = Leaderboard(NOON_S, version, standings)
    for _ in range(2):
        scores.save_leaderboard(conn, board, with_settings=True)
    scores.save_leaderboard(conn, replace(board, created_at_s=NOON_S + 10), with_settings=False)
    columns = "created_at_s, model_no, scorer_version, rank, score_recent, score_steady, score_anchor"
    assert conn.execute(f"SELECT {columns} FROM leaderboard ORDER BY 1, 2").fetchall() == [
        (at_s, model_no, version, rank, 1.0, None, 3.0)
        for at_s in (NOON_S, NOON_S + 10)
        for model_no, rank in ((1, 1), (2, None))
    ]
    columns = "created_at_s, model_no, asset, horizon_s, step_s, score_recent, score_steady, score_anchor"
    assert conn.execute(f"SELECT {columns} FROM snapshot ORDER BY 1, 2").fetchall() == [
        (NOON_S, model_no, "BTC-USD", 60, 10, 0.5, 0.25, None) for model_no in (1, 2)
    ]


# Forgetting


DAY_S = 86400
KEEP = StorageConfig(
    keep_payloads_s=1000, keep_predictions_s=8 * DAY_S, keep_prices_s=4000, keep_snapshots_s=2000
)


def prune_all(conn: sqlite3.Connection, now_s: float, limit: int = 1000) -> int:
    steps = 1
    while scores.prune(conn, now_s, KEEP, limit):
        steps += 1
        assert steps < 1000
    return steps


def played(conn: sqlite3.Connection) -> None:
    """Forty minutes: two models, a scored round and a price every minute, a leaderboard every ten."""
    join(conn, "a", "b")
    version = scores.current_scorer(conn, "crps", "log_return", "f1", NOON_S)
    for minute in range(40):
        at_s = NOON_S + 60 * minute
        round_no = ready(conn, at_s, (1, SUCCESS), (2, SUCCESS))
        scores.save_round_scores(conn, round_no, version, scored(1.0, 2.0), 6, 5)
        for asset in ("BTC", "ETH"):
            repositories.add_prices(conn, asset, [(at_s, 1.0)], "synthetic", 5)
        if minute % 10 == 0:
            conn.execute("INSERT INTO leaderboard VALUES (?, 1, ?, 1, 0, 0, 0)", (at_s, version))
            conn.execute("INSERT INTO snapshot VALUES (?, 1, ?, 'BTC', 60, 10, 0, 0, 0)", (at_s, version))


def count(conn: sqlite3.Connection, *tables: str) -> list[int]:
    return [conn.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in tables]


@pytest.mark.parametrize("limit", [1, 7, 1000])
def test_what_is_old_is_forgotten_in_steps(conn: sqlite3.Connection, limit: int) -> None:
    played(conn)
    everything = (
        "payload",
        "prediction",
        "score",
        "round_score",
        "round",
        "price",
        "leaderboard",
        "snapshot",
    )
    assert prune_all(conn, NOON_S + 1000, limit) == 1
    assert count(conn, *everything) == [80, 80, 80, 40, 40, 80, 4, 4]
    # resolvable 60 s after its time: 6 rounds are older than 1000 s at 1400 s after noon
    steps = prune_all(conn, NOON_S + 1400, limit)
    assert steps == {1: 7, 7: 2, 1000: 1}[limit]
    assert count(conn, *everything) == [68, 80, 80, 40, 40, 80, 4, 4]
    prune_all(conn, NOON_S + 3400, limit)
    assert count(conn, *everything) == [2, 80, 80, 40, 40, 80, 1, 1]
    prune_all(conn, NOON_S + 4120, limit)
    assert count(conn, *everything) == [0, 80, 80, 40, 40, 76, 0, 0]
    prune_all(conn, NOON_S + 8 * DAY_S + 400, limit)
    assert count(conn, *everything) == [0, 68, 68, 34, 34, 0, 0, 0]
    prune_all(conn, NOON_S + 10**6, limit)
    assert count(conn, *everything) == [0] * 8
    assert count(conn, "model", "scorer", "deployment") == [2, 1, 0]


@pytest.mark.parametrize("limit", [1, 1000])
def test_deployments_that_were_replaced_long_ago_are_forgotten(conn: sqlite3.Connection, limit: int) -> None:
    for day, name, deployment in (
        (0, "here", "d1"),
        (1, "here", "d2"),
        (2, "here", "d3"),
        (5, "here", "d4"),
        (6, "here", "d1"),  # back to the first
        (0, "gone", "d1"),
        (1, "gone", "d2"),
    ):
        repositories.upsert_model(conn, info(name, deployment_id=deployment), NOON_S + day * DAY_S)
    repositories.touch_models(conn, [1], NOON_S + 30 * DAY_S)

    def kept() -> list[tuple[str, str]]:
        return conn.execute(
            "SELECT model_id, d.deployment_id FROM deployment d JOIN model USING (model_no) ORDER BY 1, 2"
        ).fetchall()

    assert len(kept()) == 6
    prune_all(conn, NOON_S + 8 * DAY_S, limit)
    assert len(kept()) == 6
    prune_all(conn, NOON_S + 12 * DAY_S, limit)  # what ran on day 4 and later: d1, d3 and d4
    assert kept() == [("here", "d1"), ("here", "d3"), ("here", "d4")]
    prune_all(conn, NOON_S + 20 * DAY_S, limit)
    assert kept() == [("here", "d1"), ("here", "d4")]


def test_what_counts_in_a_window_is_kept_whatever_the_host_wants(conn: sqlite3.Connection) -> None:
    played(conn)
    keep = replace(KEEP, keep_predictions_s=60)
    for now_s, rounds in ((NOON_S + 7 * DAY_S, 40), (NOON_S + 7 * DAY_S + 2 * 3600, 0)):
        while scores.prune(conn, now_s, keep):
            pass
        assert count(conn, "round", "round_score", "score") == [rounds, rounds, 2 * rounds]


def test_a_round_that_waits_to_be_scored_is_kept(conn: sqlite3.Connection) -> None:
    (a,) = join(conn, "a")
    held = hold(conn, NOON_S, (a, SUCCESS))
    repositories.open_rounds(conn, [question(NOON_S + 60)])
    prune_all(conn, NOON_S + 10**6)
    assert count(conn, "round", "payload", "prediction") == [2, 1, 1]
    assert held.round_no is not None
    scores.void_round(conn, held.round_no, "no price came")
    prune_all(conn, NOON_S + 10**6)
    assert count(conn, "round", "payload", "prediction") == [1, 0, 0]


def test_a_prediction_without_its_payload_is_small(conn: sqlite3.Connection) -> None:
    names = [f"{number:036}" for number in range(50)]
    model_nos = join(conn, *names)
    version = scores.current_scorer(conn, "crps", "log_return", "f1", NOON_S)

    def held_bytes() -> int:
        pages, free, size = (
            conn.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("page_count", "freelist_count", "page_size")
        )
        return (pages - free) * size

    before = held_bytes()
    rng = random.Random(1)
    for minute in range(40):
        round_no = ready(conn, NOON_S + 60 * minute, *((no, SUCCESS) for no in model_nos))
        scores.save_round_scores(conn, round_no, version, scored(*(rng.random() for _ in model_nos)), 6, 5)
    keep = replace(KEEP, keep_payloads_s=0, keep_predictions_s=10**9)
    while scores.prune(conn, NOON_S + 10**6, keep):
        pass
    assert count(conn, "payload", "prediction") == [0, 2000]
    assert (held_bytes() - before) / 2000 <= 250


# Cost


def test_no_query_of_the_loops_reads_a_whole_table(conn: sqlite3.Connection) -> None:
    played(conn)
    statements: set[str] = set()
    conn.set_trace_callback(statements.add)
    held = hold(conn, NOON_S + 10**5, (1, SUCCESS), (2, TIMEOUT))
    assert held.round_no is not None
    repositories.rounds_to_validate(conn, 0, 10)
    repositories.not_validated(conn, [held.round_no])
    repositories.payloads(conn, held.round_no)
    repositories.save_validation(conn, held.round_no, {1: "no"})
    scores.rounds_to_settle(conn, 1e12, 10)
    scores.counted_models(conn, held.round_no)
    scores.save_round_scores(conn, held.round_no, 1, scored(1.0, 2.0), 6, 5)
    scores.load_window_rows(conn, 1, NOON_S + 3600, 2**40)
    repositories.void_interrupted(conn, "stopped")
    repositories.load_clock(conn)
    repositories.load_prices(conn, "BTC", 0, 1)
    repositories.newest_price_s(conn, "BTC")
    scores.prune(conn, NOON_S + 5000, KEEP, 1)
    while scores.prune(conn, NOON_S + 5000, KEEP):
        pass
    conn.set_trace_callback(None)
    plans = {
        (step[3], statement)
        for statement in statements
        if re.match("SELECT|UPDATE|DELETE", statement)
        for step in conn.execute(f"EXPLAIN QUERY PLAN {statement}")
    }
    assert len(plans) > 20
    assert not [
        plan
        for plan in plans
        if re.match(r"SCAN (round|prediction|payload|score|price|snapshot|leader)", plan[0])
    ]
