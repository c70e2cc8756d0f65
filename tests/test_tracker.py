"""What participants subclass: the price store, and the contract of TrackerBase."""

import ast
import math
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import condor_lite
from condor_lite.tracker import PriceStore, TrackerBase

DAY_S = 86400


class Flat(TrackerBase):
    def predict(self, asset, horizon, step):
        return self.flat({"type": "builtin", "name": "norm", "params": {}}, horizon, step)


def test_a_subclass_needs_predict_only():
    with pytest.raises(TypeError, match="predict"):
        TrackerBase()
    assert [d["step"] for d in Flat().predict("BTC", 60, 20)] == [20, 40, 60]


def test_prices_are_kept_without_a_call_to_the_base_constructor():
    class Own(Flat):
        def __init__(self):
            self.own = True

    model = Own()
    model.tick({"BTC": [[60, 1.0], [120, 2.0]], "ETH": []})
    assert model.prices.assets == ["BTC"]
    assert model.prices.last("BTC") == (120, 2.0)
    assert model.prices.last("ETH") is None
    assert model.prices.returns("ETH", 60) == []


def test_only_the_last_days_are_kept():
    store = PriceStore(days=1)
    store.add({"BTC": [[t, 1.0] for t in range(0, 3 * DAY_S, 3600)]})
    times_s, prices = store.series("BTC")
    assert times_s[-1] - times_s[0] == DAY_S
    assert len(times_s) == len(prices) == 25
    assert len(store.series("BTC", days=0.5)[0]) == 13


def test_what_it_hands_out_may_be_changed_and_added_to():
    store = PriceStore()
    store.add({"BTC": [[60, 1.0]]})
    view = memoryview(store.series("BTC")[1])  # as numpy.asarray holds it
    store.add({"BTC": [[120, 2.0]]})
    assert list(view) == [1.0]


def test_returns_over_a_gap_are_scaled_to_the_step():
    store = PriceStore()
    e = math.e
    store.add({"BTC": [[0, 1.0], [60, e], [300, e**3], [330, e**3], [360, e**2]]})
    assert store.returns("BTC", 60) == pytest.approx([1.0, 2.0 * math.sqrt(60 / 240), -1.0])
    assert store.returns("BTC", 10)[0] == pytest.approx(math.sqrt(10 / 60))


@settings(max_examples=50)
@given(st.lists(st.lists(st.tuples(st.integers(0, 500), st.floats(0.5, 2.0)), max_size=8), max_size=8))
def test_any_order_of_points_gives_the_sorted_series(ticks):
    store, expected = PriceStore(), {}
    for points in ticks:
        store.add({"BTC": points})
        expected.update(points)
    times_s, prices = store.series("BTC")
    assert dict(zip(times_s, prices, strict=True)) == expected
    assert list(times_s) == sorted(expected)


def test_it_imports_nothing_beyond_the_standard_library():
    code = "import sys; import condor_lite.tracker; print({m.partition('.')[0] for m in sys.modules})"
    root = Path(condor_lite.__file__).parents[1]
    out = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True, cwd=root
    )
    foreign = set(ast.literal_eval(out.stdout)) - sys.stdlib_module_names
    assert foreign <= {"condor_lite", "__main__"}
