"""SCORING.md, "Windows" and "Skill": hourly sums against the formula over all rounds."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from condor_lite.game.entities import (
    Model,
    ModelInfo,
    ModelScore,
    RoundScores,
    RuleInfo,
    Setting,
    Standing,
    Window,
)
from condor_lite.game.rounds import score_round
from condor_lite.game.uncertainty import block_count
from condor_lite.game.windows import WindowRows, WindowSums, window_start_s

HOUR_S = 3600
NOW_S = 500_000 * HOUR_S + 1800
CRPS = RuleInfo("crps", lower_is_better=True, capped=True)
LOG = RuleInfo("log", lower_is_better=True, capped=False)
LIKELIHOOD = RuleInfo("likelihood", lower_is_better=False, capped=False)
BTC = Setting("BTC", 3600, 60, interval_s=720)
ETH = Setting("ETH", 3600, 60, interval_s=720, weight=3.0)


def model(model_no: int, *, benchmark: bool = False) -> Model:
    info = ModelInfo(f"m{model_no:03}", "name", f"c{model_no}", "player", "d1", benchmark=benchmark)
    return Model(model_no, info, joined_at_s=0, last_seen_at_s=NOW_S)


@dataclass(frozen=True)
class Played:
    """A scored round, as the database would hold it."""

    setting: Setting
    resolvable_at_s: int
    scores: RoundScores


def played(
    setting: Setting, hours_ago: float, raw: dict[int, float | None], no_move=10.0, info=CRPS, benchmarks=()
):
    scores = score_round(raw, set(benchmarks), no_move, info)
    assert isinstance(scores, RoundScores)
    return Played(setting, NOW_S - int(hours_ago * HOUR_S), scores)


def summed(rounds: list[Played], asked=(BTC,), info=CRPS, benchmark: int | None = None) -> WindowSums:
    sums = WindowSums(asked, info, scorer_version=3, benchmark=benchmark)
    for one in rounds:
        sums.add(one.setting.key, one.resolvable_at_s, one.scores)
    return sums


def rows(rounds: list[Played]) -> WindowRows:
    flat = [(no, one, *entry) for no, one in enumerate(rounds) for entry in one.scores.models.items()]
    return WindowRows(
        asset=[one.setting.asset for _, one, _, _ in flat],
        horizon_s=[one.setting.horizon_s for _, one, _, _ in flat],
        step_s=[one.setting.step_s for _, one, _, _ in flat],
        resolvable_at_s=[one.resolvable_at_s for _, one, _, _ in flat],
        round_no=[no for no, _, _, _ in flat],
        no_move=[one.scores.no_move for _, one, _, _ in flat],
        median=[one.scores.median for _, one, _, _ in flat],
        model_no=[model_no for _, _, model_no, _ in flat],
        raw=[score.raw for _, _, _, score in flat],
        counted=[score.counted for _, _, _, score in flat],
    )


def standings(sums: WindowSums, models=(1, 2, 3), now_s: float = NOW_S, benchmarks=()) -> dict[int, Standing]:
    known = [model(no, benchmark=no in benchmarks) for no in models]
    board = sums.leaderboard(now_s, known)
    return {standing.model.model_no: standing for standing in board.standings}


def by_definition(rounds: list[Played], model_no: int, window: Window, info: RuleInfo) -> float | None:
    """The formula of SCORING.md for one setting, over all rounds."""
    held = [one for one in rounds if one.resolvable_at_s >= window_start_s(window, NOW_S)]
    own = [(one.scores, one.scores.models[model_no]) for one in held if model_no in one.scores.models]
    if not own:
        return None
    sign = 1 if info.lower_is_better else -1
    gains = math.fsum(sign * (scores.median - score.counted) for scores, score in own)
    divisor = math.fsum(scores.no_move if info.capped else 1.0 for scores, _ in own)
    return 100 * 8 * len(own) / (7 * len(own) + len(held)) * gains / divisor


def same(one: float | None, other: float | None) -> bool:
    if one is None or other is None:
        return one is other
    return one == pytest.approx(other, rel=1e-9, abs=1e-9)


HISTORIES = st.lists(
    st.tuples(
        st.sampled_from([BTC, ETH]),
        st.floats(0, 220),
        st.dictionaries(st.integers(1, 5), st.none() | st.floats(0.1, 100), min_size=1),
        st.floats(0.1, 50),
    ),
    max_size=25,
)


# Windows


def test_a_window_starts_on_the_full_hour():
    assert window_start_s(Window.RECENT, NOW_S) == NOW_S - 1800 - 24 * HOUR_S
    assert window_start_s(Window.STEADY, NOW_S + 1799.9) == NOW_S - 1800 - 72 * HOUR_S
    assert window_start_s(Window.ANCHOR, NOW_S + 1800) == NOW_S + 1800 - 168 * HOUR_S


@pytest.mark.parametrize("window", Window)
def test_a_round_is_in_a_window_from_the_second_at_which_that_starts(window):
    start_s = window_start_s(window, NOW_S)
    scores = played(BTC, 0, {1: 4.0, 2: 6.0, 3: 5.0}).scores
    inside = standings(summed([Played(BTC, start_s, scores)]))[1].overall
    outside = standings(summed([Played(BTC, start_s - 1, scores)]))[1].overall
    assert inside.of(window) == pytest.approx(10.0)
    assert outside.of(window) is None


def test_the_windows_are_a_day_three_days_and_a_week():
    rounds = [
        played(BTC, hours, {1: 9.0 - gain, 2: 9.0, 3: 9.0}) for hours, gain in ((5, 1), (50, 3), (150, 8))
    ]
    overall = standings(summed(rounds))[1].overall
    assert (overall.recent, overall.steady, overall.anchor) == pytest.approx((10.0, 20.0, 40.0))


def test_sums_are_divided_not_averages_averaged():
    quiet = played(BTC, 1, {1: 4.0, 2: 5.0, 3: 5.0}, no_move=5.0)
    wild = played(BTC, 2, {1: 60.0, 2: 50.0, 3: 50.0}, no_move=95.0)
    assert standings(summed([quiet, wild]))[1].overall.recent == pytest.approx(100 * (1 - 10) / 100)


@pytest.mark.parametrize("info", [LOG, LIKELIHOOD])
def test_other_rules_divide_by_the_number_of_rounds(info):
    rounds = [played(BTC, hours, {1: 1.0, 2: 2.0, 3: 4.0}, info=info, no_move=7.0) for hours in (1, 2, 3)]
    sign = 1 if info.lower_is_better else -1
    overall = standings(summed(rounds, info=info))
    assert overall[1].overall.anchor == pytest.approx(sign * 100)
    assert overall[3].overall.anchor == pytest.approx(sign * -200)


def test_a_late_joiner_starts_near_zero_and_grows_into_its_place():
    def latecomer(own: int, of: int) -> float:
        rounds = [played(BTC, 20, {2: 5.0, 3: 5.0, 4: 5.0}) for _ in range(of - own)]
        rounds += [played(BTC, 2, {1: 4.0, 2: 5.0, 3: 5.0, 4: 5.0}) for _ in range(own)]
        return standings(summed(rounds), models=(1, 2, 3, 4))[1].overall.anchor

    shrunk = [latecomer(own, 100) for own in (1, 3, 12, 50, 100)]
    assert shrunk == pytest.approx([10 * 8 * n / (7 * n + 100) for n in (1, 3, 12, 50, 100)])
    assert shrunk[0] < 1
    assert shrunk[-1] == pytest.approx(10.0)


def test_rounds_before_the_first_are_not_missed_and_those_after_are():
    rounds = [
        played(BTC, 3, {2: 5.0, 3: 5.0}),
        played(BTC, 2, {1: 4.0, 2: 5.0, 3: 5.0}),
        played(BTC, 1, {1: None, 2: 5.0, 3: 5.0}),
    ]
    late = standings(summed(rounds))[1]
    assert (late.rounds, late.answered) == (2, 1)
    assert late.overall.anchor == pytest.approx(100 * 16 / 17 * 1 / 20)


def test_a_gone_model_misses_nothing():
    rounds = [played(BTC, 100, {1: 4.0, 2: 5.0, 3: 5.0}), played(BTC, 1, {2: 5.0, 3: 5.0})]
    assert standings(summed(rounds))[1].rounds == 1


def test_overall_is_the_weighted_mean_over_the_settings():
    rounds = [played(BTC, 1, {1: 4.0, 2: 5.0, 3: 5.0}), played(ETH, 1, {1: 7.0, 2: 5.0, 3: 5.0})]
    first = standings(summed(rounds, asked=(BTC, ETH)))[1]
    assert first.by_setting["BTC-3600-60"].anchor == pytest.approx(10.0)
    assert first.by_setting["ETH-3600-60"].anchor == pytest.approx(-20.0)
    assert first.overall.anchor == pytest.approx((1 * 10 + 3 * -20) / 4)


def test_a_setting_without_a_scored_round_in_the_window_does_not_weigh():
    rounds = [played(BTC, 1, {1: 4.0, 2: 5.0, 3: 5.0}), played(ETH, 100, {1: 7.0, 2: 5.0, 3: 5.0})]
    overall = standings(summed(rounds, asked=(BTC, ETH)))[1].overall
    assert overall.recent == pytest.approx(10.0)
    assert overall.anchor == pytest.approx(-12.5)


def test_in_a_setting_that_it_has_not_joined_yet_a_newcomer_is_in_the_middle():
    rounds = [played(BTC, 1, {1: 4.0, 2: 5.0, 3: 5.0}), played(ETH, 9, {2: 5.0, 3: 5.0})]
    newcomer = standings(summed(rounds, asked=(BTC, ETH)))[1]
    assert newcomer.overall.anchor == pytest.approx((1 * 10 + 3 * 0) / 4)
    assert set(newcomer.by_setting) == {"BTC-3600-60"}


def test_rounds_of_other_settings_count_for_nothing():
    sums = summed([played(ETH, 1, {1: 4.0, 2: 5.0})], asked=(BTC,))
    sums.load(rows([played(ETH, 1, {1: 4.0, 2: 5.0})]))
    assert standings(sums)[1].overall.anchor is None


def test_rounds_leave_as_the_windows_move_on():
    sums = summed([played(BTC, 1, {1: 4.0, 2: 5.0, 3: 5.0})])
    later = [standings(sums, now_s=NOW_S + hours * HOUR_S)[1].overall for hours in (23, 24, 71, 72, 167, 168)]
    assert [scores.recent is None for scores in later] == [False] + [True] * 5
    assert [scores.steady is None for scores in later] == [False] * 3 + [True] * 3
    assert [scores.anchor is None for scores in later] == [False] * 5 + [True]


def test_a_round_too_old_for_any_window_counts_for_nothing():
    sums = summed([played(BTC, 0, {1: 4.0, 2: 5.0, 3: 6.0}), played(BTC, 169, {1: 9.0, 2: 5.0, 3: 5.0})])
    assert standings(sums)[1].rounds == 1


def test_an_empty_game_has_a_leaderboard():
    assert standings(summed([]))[1].overall.anchor is None
    assert summed([]).leaderboard(NOW_S, []).standings == ()
    assert WindowSums((), CRPS, scorer_version=1).leaderboard(NOW_S + 0.7, []).created_at_s == NOW_S


# Incremental, rebuilt and by definition


@settings(max_examples=60)
@given(HISTORIES, st.sampled_from([CRPS, LOG, LIKELIHOOD]), st.randoms(use_true_random=False))
def test_incremental_rebuilt_and_defined_scores_agree(history, info, random):
    rounds = [
        played(setting, ago, raw, no_move, info=info)
        for setting, ago, raw, no_move in history
        if any(value is not None for value in raw.values())
    ]
    rounds.sort(key=lambda one: one.resolvable_at_s)
    asked = (BTC, ETH)
    incremental = summed(rounds, asked, info, benchmark=2)
    rebuilt = WindowSums(asked, info, scorer_version=3, benchmark=2)
    shuffled = random.sample(rounds, len(rounds))
    cut = random.randint(0, len(rounds))
    for part in (shuffled[:cut], shuffled[cut:]):
        rebuilt.load(rows(part))
    one, other = (standings(sums, models=range(1, 6)) for sums in (incremental, rebuilt))
    for no in range(1, 6):
        for window in Window:
            for left, right in [
                (one[no].overall, other[no].overall),
                (one[no].skill, other[no].skill),
                (one[no].standard_error, other[no].standard_error),
            ]:
                assert same(left.of(window), right.of(window))
            for setting in asked:
                defined = by_definition([r for r in rounds if r.setting == setting], no, window, info)
                for got in (one[no], other[no]):
                    scores = got.by_setting.get(setting.key)
                    value = scores.of(window) if scores else None
                    assert same(value, defined)
        assert (one[no].rounds, one[no].answered) == (other[no].rounds, other[no].answered)


def test_stored_arrays_load_as_well_as_lists():
    rounds = [played(BTC, 1, {1: 4.0, 2: None, 3: 6.0})]
    plain = rows(rounds)
    arrays = WindowRows(
        asset=np.array(plain.asset, dtype=object),
        horizon_s=np.array(plain.horizon_s, dtype=np.int32),
        step_s=np.array(plain.step_s, dtype=np.int32),
        resolvable_at_s=np.array(plain.resolvable_at_s),
        round_no=np.array(plain.round_no),
        no_move=np.array(plain.no_move),
        median=np.array(plain.median),
        model_no=np.array(plain.model_no, dtype=np.int32),
        raw=np.array(plain.raw, dtype=float),
        counted=np.array(plain.counted),
    )
    for given_rows in (plain, arrays):
        sums = WindowSums((BTC,), CRPS, scorer_version=3)
        sums.load(given_rows)
        assert standings(sums) == standings(summed(rounds))


def test_memory_is_bounded_by_the_models_of_a_week():
    sums = WindowSums((BTC,), CRPS, scorer_version=1)
    for week in range(30):
        at_s = NOW_S + week * 8 * 86400
        scores = played(BTC, 0, {week * 100 + no: 5.0 for no in range(100)}).scores
        sums.add(BTC.key, at_s, scores)
    assert sum(array.nbytes for array in vars(sums).values() if isinstance(array, np.ndarray)) < 3e6


def test_models_that_lost_their_place_leave_no_trace_in_anothers_sums():
    sums = summed([played(BTC, 0, {no: 5.0 + no for no in range(1, 21)})])
    later = NOW_S + 100 * HOUR_S
    sums.add(BTC.key, later, played(BTC, 0, {no: 5.0 + no for no in range(20, 60)}).scores)
    sums.add(BTC.key, later + 100 * HOUR_S, played(BTC, 0, {no: 5.0 + no for no in range(50, 120)}).scores)
    board = standings(sums, models=range(1, 120), now_s=later + 100 * HOUR_S)
    for no in range(1, 120):
        assert board[no].rounds == (1 if 20 <= no < 50 else 2 if 50 <= no < 60 else 1 if no >= 60 else 0)


# Skill


def test_skill_is_the_gain_on_the_benchmark_over_the_rounds_that_both_answered():
    rounds = [
        played(BTC, 1, {1: 4.0, 2: 5.0, 9: 5.0}, benchmarks=(9,)),
        played(BTC, 2, {1: 9.0, 2: None, 9: 11.0}, benchmarks=(9,)),
        played(BTC, 3, {1: 1.0, 2: 100.0, 9: None}, benchmarks=(9,)),
    ]
    board = standings(summed(rounds, benchmark=9), models=(1, 2, 9), benchmarks=(9,))
    assert board[1].skill.anchor == pytest.approx(1 - 13 / 16)
    assert board[2].skill.anchor == pytest.approx(0.0)
    assert board[9].skill.anchor == 0.0


def test_skill_is_positive_for_the_better_one_where_higher_is_better():
    rounds = [played(BTC, 1, {1: 6.0, 9: 5.0}, info=LIKELIHOOD)]
    assert standings(summed(rounds, info=LIKELIHOOD, benchmark=9), (1,))[1].skill.recent == pytest.approx(0.2)


def test_without_a_benchmark_there_is_no_skill():
    assert standings(summed([played(BTC, 1, {1: 4.0, 2: 5.0})]), (1,))[1].skill.anchor is None


# Uncertainty


def persistent_rounds(hours: int) -> list[Played]:
    rng = np.random.default_rng(11)
    return [
        played(
            setting,
            hour + 0.2,
            {no: float(value) for no, value in enumerate(rng.gamma(20, 0.5, 3), start=1)},
            no_move=float(rng.gamma(10, 1)),
        )
        for hour in range(hours - 1, -1, -1)
        for setting in (BTC, ETH)
    ]


def test_the_standard_error_of_a_window_is_that_of_its_block_sums():
    rounds = persistent_rounds(168)
    first = standings(summed(rounds, asked=(BTC, ETH)))[1]
    count = block_count(168, 3600)
    blocks = np.zeros(count)
    for setting, share in ((BTC, 0.25), (ETH, 0.75)):
        own = [one for one in rounds if one.setting == setting]
        moved = sum(one.scores.no_move for one in own)
        for one in own:
            hours_ago = NOW_S // HOUR_S - one.resolvable_at_s // HOUR_S
            block = max(hours_ago - 1, 0) * count // 168
            blocks[block] += share * 100 * (one.scores.median - one.scores.models[1].counted) / moved
    assert blocks.sum() == pytest.approx(first.overall.anchor)
    expected = count * blocks.std(ddof=1) / math.sqrt(count)
    assert first.standard_error.anchor == pytest.approx(expected, rel=1e-9)
    assert first.standard_error.recent is not None


def test_a_young_game_or_a_long_horizon_claims_nothing():
    young = standings(summed(persistent_rounds(48), asked=(BTC, ETH)))[1]
    assert young.standard_error.anchor is None
    assert young.p_better_than_next is None
    day = Setting("BTC", 86400, 300)
    rounds = [Played(day, one.resolvable_at_s, one.scores) for one in persistent_rounds(168)]
    errors = standings(summed(rounds, asked=(day,)))[1].standard_error
    assert errors.recent is None
    assert errors.steady is None
    assert errors.anchor is not None


def test_p_better_than_next_compares_neighbours_and_skips_benchmarks():
    rounds = [
        played(BTC, hour, {1: 4.0 + hour % 5 / 10, 2: 6.0, 3: 5.9 + hour % 7 / 20, 9: 5.0}, benchmarks=(9,))
        for hour in range(167, -1, -1)
    ]
    board = standings(summed(rounds), models=(1, 2, 3, 9), benchmarks=(9,))
    assert [board[no].rank for no in (1, 2, 3, 9)] == [1, 2, 3, None]
    assert board[1].p_better_than_next > 0.999
    assert 0.5 < board[2].p_better_than_next < 1
    assert board[3].p_better_than_next is None
    assert board[9].p_better_than_next is None


def test_a_late_joiner_is_compared_over_the_blocks_that_both_took_part_in():
    rng = np.random.default_rng(3)
    late = {hour: float(rng.normal(5.1, 0.5)) for hour in range(101)}
    early = [played(BTC, hour, {1: 5.0, 3: 9.0}) for hour in range(160, 100, -1)]
    both = [played(BTC, hour, {1: 5.0, 2: late[hour], 3: 9.0}) for hour in range(100, -1, -1)]
    board = standings(summed(early + both))
    assert [board[no].rank for no in (1, 2, 3)] == [1, 2, 3]
    # Blocks of 12 h, and the hour in progress; the one in which it joined is left out.
    blocks = [sum(late[hour] - 5.0 for hour in range(12 * b + 1, 12 * b + 13)) for b in range(8)]
    blocks[0] += late[0] - 5.0
    expected = stats.t.cdf(stats.ttest_1samp(blocks, 0).statistic, 7)
    assert board[1].p_better_than_next == pytest.approx(expected, rel=1e-9)


def test_the_leaderboard_names_its_scorer_version():
    score = RoundScores(5.0, 10.0, {1: ModelScore(4.0, 4.0, 10.0)})
    sums = WindowSums((BTC,), CRPS, scorer_version=7)
    sums.add(BTC.key, NOW_S, score)
    board = sums.leaderboard(NOW_S, [model(1)])
    assert (board.scorer_version, board.standings[0].overall.recent) == (7, pytest.approx(10.0))
