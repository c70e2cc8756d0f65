"""E|X - z| of Student t variables, read off a table, against the closed form."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from condor_lite.game.t_distance import t_distances

PLACES = np.concatenate([np.linspace(0, 12, 601), np.geomspace(1e-6, 1e12, 400), np.linspace(70, 90, 81)])


def closed_form(z: np.ndarray, df: float) -> np.ndarray:
    of = stats.t(df)
    return np.asarray(z * (1 - 2 * of.sf(z)) + 2 * (df + z * z) / (df - 1) * of.pdf(z))


@given(df=st.floats(2, 12) | st.floats(2, 1e9))
@settings(max_examples=150)
def test_the_table_says_what_the_closed_form_says(df: float) -> None:
    found = t_distances(PLACES[None], np.array([df]))[0]
    np.testing.assert_allclose(found, closed_form(PLACES, df), rtol=2e-9)


@pytest.mark.parametrize("df", [2.0, 3.5, 40.0])
def test_the_closed_form_is_the_integral(df: float) -> None:
    for z in (0.0, 0.7, 30.0):
        pieces = [
            integrate.quad(lambda y, z=z: abs(y - z) * stats.t.pdf(y, df), *span, epsabs=0, limit=500)[0]
            for span in ((-np.inf, -50), (-50, 0), (0, z), (z, z + 50), (z + 50, np.inf))
        ]
        assert t_distances(np.array([[z]]), np.array([df]))[0, 0] == pytest.approx(sum(pieces), rel=1e-7)


def test_a_value_depends_on_nothing_else_in_the_batch() -> None:
    rng = np.random.default_rng(0)
    df = rng.choice([2.0, 3.5, 7.1, 60.0], 50)
    z = 10 ** rng.uniform(-2, 4, (50, 49))
    together = t_distances(z, df)
    for row in range(50):
        assert (t_distances(z[row : row + 1], df[row : row + 1])[0] == together[row]).all()
