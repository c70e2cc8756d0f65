"""The ranking rule finds the better model, whoever takes part (`benchmarks/ranking.py` plays more weeks)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.ranking import CLOSE, ENTRANTS, REGULARS, Forecaster, find, order, rank, simulate

SEEDS = range(4)


def test_the_better_model_leads_in_the_end():
    field = (
        Forecaster("honest", noise=0.02),
        Forecaster("too wide", width=1.25, noise=0.05),
        Forecaster("too narrow", width=0.75, noise=0.05),
        Forecaster("shifted", shift=0.3),
    )
    for seed in SEEDS:
        assert order(rank(simulate(seed, field)), field)[0] == "honest"


@pytest.mark.parametrize("entrants", [label for label in ENTRANTS if label != "nobody else"])
def test_no_entrant_changes_the_order_of_the_others(entrants):
    field = CLOSE + ENTRANTS[entrants]
    for seed in SEEDS:
        assert order(rank(simulate(seed, field)), CLOSE) == order(rank(simulate(seed, CLOSE)), CLOSE)


def test_what_one_believes_is_the_best_report():
    field = [Forecaster(f"width {width}", width=width) for width in (0.7, 0.85, 1.0, 1.2, 1.5)]
    field += [Forecaster(f"shift {shift}", shift=shift) for shift in (-0.2, 0.2)]
    scores: dict[str, list[float]] = {one.name: [] for one in field}
    for seed in SEEDS:
        for standing in rank(simulate(seed, field)).standings:
            scores[standing.model.info.model_id].append(standing.overall.anchor)
    means = {name: np.mean(values) for name, values in scores.items()}
    assert max(means, key=means.get) == "width 1.0"
    assert means["width 0.7"] < means["width 0.85"]
    assert means["width 1.5"] < means["width 1.2"]


def test_a_good_newcomer_cannot_lead_by_luck_and_is_near_its_place_after_a_day():
    regulars = (Forecaster("good"), *(Forecaster(f"poor {n}", width=1.3 + n / 10) for n in range(1, 8)))
    newcomer = Forecaster("newcomer", width=1.05, joined_h=144)
    for seed in SEEDS:
        week = simulate(seed, (*regulars, newcomer))
        first = find(rank(week, 145), "newcomer")
        assert first.rank > 1
        assert abs(first.overall.anchor) < 1
        assert find(rank(week), "newcomer").rank <= 3


def test_an_outage_of_six_hours_costs_but_does_not_ruin():
    absent = (replace(REGULARS[0], out_h=(80, 86)), *REGULARS[1:])
    for seed in SEEDS:
        present, out = (find(rank(simulate(seed, field)), "honest") for field in (REGULARS, absent))
        assert 0 < present.overall.anchor - out.overall.anchor < 2
        assert out.rank <= 4
