"""SCORING.md, "Ranks": who has which rank, in which order."""

from __future__ import annotations

import pytest

from condor_lite.game.entities import (
    Leaderboard,
    Model,
    ModelInfo,
    ModelScore,
    RoundScores,
    RuleInfo,
    Setting,
    Window,
)
from condor_lite.game.leaderboard import reference_benchmark
from condor_lite.game.windows import WindowSums

HOUR_S = 3600
NOW_S = 500_000 * HOUR_S
BTC = Setting("BTC", 3600, 60, interval_s=720)
AGO_H = (5, 50, 150)


def model(name: str, *, joined_at_s: int = 0, seen_ago_s: int = 0, player: str = "", benchmark: bool = False):
    info = ModelInfo(name, name.upper(), player or name, "player", "d1", benchmark=benchmark)
    return Model(sum(map(ord, name)), info, joined_at_s, NOW_S - seen_ago_s)


def board(
    gains: dict[Model, tuple[float, float, float]], newcomers: tuple[Model, ...] = (), max_per_player: int = 0
) -> Leaderboard:
    """The leaderboard after rounds 5, 50 and 150 h ago, in which models gained so many bp on the median."""
    sums = WindowSums((BTC,), RuleInfo("crps", True, True), scorer_version=1)
    for place, hours in enumerate(AGO_H):
        scores = {one.model_no: ModelScore(9.0, 9.0 - own[place], 0.0) for one, own in gains.items()}
        sums.add(BTC.key, NOW_S - hours * HOUR_S, RoundScores(9.0, 10.0, scores))
    return sums.leaderboard(NOW_S, [*newcomers, *gains], max_per_player)


def table(leaderboard: Leaderboard) -> list[tuple[str, int | None]]:
    return [(standing.model.info.model_id, standing.rank) for standing in leaderboard.standings]


A, B, C, D = (model(name) for name in "abcd")


def test_higher_is_better():
    assert table(board({A: (0, 0, 1), B: (0, 0, 3), C: (0, 0, -2)})) == [("b", 1), ("a", 2), ("c", 3)]


def test_ranks_are_by_anchor_then_steady_then_recent():
    gains = {A: (1, 1, 6), B: (1, 5, 2), C: (3, 3, 2), D: (5, 0, 0)}
    leaderboard = board(gains)
    assert table(leaderboard) == [("c", 1), ("b", 2), ("a", 3), ("d", 4)]
    anchors = [round(standing.overall.anchor, 9) for standing in leaderboard.standings]
    assert anchors[:3] == [anchors[0]] * 3


def test_equal_values_share_the_rank_and_the_next_is_skipped():
    gains = {A: (0, 0, 1), B: (0, 0, 2), C: (0, 0, 1), D: (0, 0, 0)}
    assert table(board(gains)) == [("b", 1), ("a", 2), ("c", 2), ("d", 4)]


def test_inside_a_tie_the_earliest_comes_first_then_the_model_id():
    old, new = model("z", joined_at_s=5), model("y", joined_at_s=6)
    gains = {new: (0, 0, 1), B: (0, 0, 0), old: (0, 0, 1), A: (0, 0, 0)}
    assert table(board(gains)) == [("z", 1), ("y", 1), ("a", 3), ("b", 3)]


def test_a_difference_in_the_last_digits_decides():
    assert table(board({A: (0, 0, 1), B: (0, 0, 1 + 1e-9)})) == [("b", 1), ("a", 2)]


def test_models_without_a_scored_round_come_last_without_a_rank():
    leaderboard = board({A: (0, 0, -5), B: (0, 0, 0)}, newcomers=(D, C))
    assert table(leaderboard) == [("b", 1), ("a", 2), ("c", None), ("d", None)]
    assert leaderboard.standings[-1].ranks == dict.fromkeys(Window)
    assert leaderboard.standings[-1].overall.anchor is None
    assert leaderboard.standings[-1].rounds == 0


@pytest.mark.parametrize(("seen_ago_s", "rank"), [(7 * 86400 - 1, 1), (7 * 86400, None)])
def test_a_model_not_connected_for_seven_days_comes_last_without_a_rank(seen_ago_s, rank):
    away = model("x", seen_ago_s=seen_ago_s)
    leaderboard = board({away: (0, 0, 9), A: (0, 0, 0)}, newcomers=(C,))
    assert dict(table(leaderboard))["x"] == rank
    if rank is None:
        assert table(leaderboard) == [("a", 1), ("c", None), ("x", None)]


def test_benchmarks_are_shown_in_their_place_but_take_no_rank():
    benchmark = model("m", benchmark=True)
    gains = {A: (0, 0, 3), benchmark: (0, 0, 2), B: (0, 0, 1)}
    assert table(board(gains)) == [("a", 1), ("m", None), ("b", 2)]


def test_only_a_players_best_so_many_models_are_ranked():
    clones = [model(name, player="p") for name in ("k", "l", "n")]
    gains = {clones[0]: (0, 0, 3), clones[1]: (0, 0, 5), A: (0, 0, 4), clones[2]: (0, 0, 2), B: (0, 0, 1)}
    assert table(board(gains, max_per_player=1)) == [("l", 1), ("a", 2), ("k", None), ("n", None), ("b", 3)]
    assert [rank for _, rank in table(board(gains, max_per_player=2))] == [1, 2, 3, None, 4]
    assert [rank for _, rank in table(board(gains))] == [1, 2, 3, 4, 5]


def test_a_players_gone_model_and_benchmark_take_up_no_place():
    gone = model("k", player="p", seen_ago_s=8 * 86400)
    benchmark = model("l", player="p", benchmark=True)
    gains = {gone: (0, 0, 9), benchmark: (0, 0, 8), model("n", player="p"): (0, 0, 7)}
    assert dict(table(board(gains, max_per_player=1))) == {"l": None, "n": 1, "k": None}


def test_each_window_has_its_own_ranks_with_ties():
    leaderboard = board({A: (5, 0, 0), B: (0, 6, 0), C: (0, 0, 12), D: (0, 0, -9)})
    ranks = {standing.model.info.model_id: standing.ranks for standing in leaderboard.standings}
    assert {name: own[Window.RECENT] for name, own in ranks.items()} == {"a": 1, "b": 2, "c": 2, "d": 2}
    assert {name: own[Window.STEADY] for name, own in ranks.items()} == {"b": 1, "a": 2, "c": 3, "d": 3}
    assert {name: own[Window.ANCHOR] for name, own in ranks.items()} == {"c": 1, "b": 2, "a": 3, "d": 4}


def test_a_model_without_a_round_in_a_window_has_no_rank_there():
    sums = WindowSums((BTC,), RuleInfo("crps", True, True), scorer_version=1)
    for hours, models in ((5, [A]), (150, [A, B])):
        scores = {one.model_no: ModelScore(9.0, 9.0, 0.0) for one in models}
        sums.add(BTC.key, NOW_S - hours * HOUR_S, RoundScores(9.0, 10.0, scores))
    ranks = {standing.model: standing.ranks for standing in sums.leaderboard(NOW_S, [A, B]).standings}
    assert ranks[B] == {Window.RECENT: None, Window.STEADY: None, Window.ANCHOR: 1}


def test_clones_share_their_rank_to_the_last_bit():
    clones = [model(chr(0x4E00 + number)) for number in range(40)]
    gains = dict.fromkeys(clones, (0.1, 0.7, 1 / 3))
    assert {rank for _, rank in table(board(gains))} == {1}


def test_the_benchmark_for_skill_is_the_first_by_model_id_that_is_not_gone():
    gone = model("k", benchmark=True, seen_ago_s=8 * 86400)
    first, second = model("l", benchmark=True), model("n", benchmark=True)
    assert reference_benchmark([A, second, first, gone], NOW_S) == first.model_no
    assert reference_benchmark([A, gone], NOW_S) is None
