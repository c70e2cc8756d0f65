"""The prices in memory, and the arithmetic of the grid."""

from __future__ import annotations

import threading

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from condor_lite.prices.book import PriceBook
from condor_lite.prices.grid import QUIET_S, Span, history_step_s, missing, on_grid

DAY_S = 86400


def test_a_new_book_has_nothing() -> None:
    book = PriceBook(DAY_S, 60)
    assert book.newest_s("BTC") is None
    assert book.last("BTC") is None
    assert book.count("BTC") == 0
    assert book.since({"BTC": 0}, 10**10) == {}
    assert book.history(10**10) == {}
    assert len(book.series("BTC")[0]) == 0


def test_the_first_price_of_a_time_stands() -> None:
    book = PriceBook(DAY_S, 60)
    assert book.add("BTC", [(60, 1.0), (120, 2.0)]) == [(60, 1.0), (120, 2.0)]
    assert book.add("BTC", [(180, 3.0), (120, 9.0)]) == [(180, 3.0)]
    assert book.add("BTC", [(120, 9.0)]) == []
    assert book.since({}, 10**10) == {"BTC": [(60, 1.0), (120, 2.0), (180, 3.0)]}


def test_since_gives_each_asset_what_lies_between_its_watermark_and_the_end() -> None:
    book = PriceBook(DAY_S, 60)
    book.add("BTC", [(60, 1.0), (120, 2.0), (180, 3.0)])
    book.add("ETH", [(60, 4.0)])
    assert book.since({"BTC": 60, "ETH": 60}, 120) == {"BTC": [(120, 2.0)]}
    assert book.since({"BTC": 180}, 240) == {"ETH": [(60, 4.0)]}


def test_history_is_never_finer_than_a_minute_and_ends_with_the_newest_point() -> None:
    book = PriceBook(600, 5)
    book.add("BTC", [(ts_s, float(ts_s)) for ts_s in range(5, 2000, 5)])
    times_s = book.history(1505)["BTC"][0].tolist()
    assert times_s == [*range(960, 1501, 60), 1505]
    assert book.since({"BTC": times_s[-1]}, 1515) == {"BTC": [(1510, 1510.0), (1515, 1515.0)]}


def test_memory_is_bounded_and_old_points_are_kept_at_the_resolution_of_the_history() -> None:
    book = PriceBook(30 * DAY_S, 5, keep_s=DAY_S)
    for first_s in range(0, 45 * DAY_S, DAY_S):
        book.add("BTC", [(ts_s, 1.0) for ts_s in range(first_s + 5, first_s + DAY_S + 1, 5)])
    newest_s = 45 * DAY_S
    ts_s, _ = book.series("BTC")
    assert len(ts_s) < 2 * (DAY_S // 5 + 31 * 1440)
    assert len(book.history(newest_s)["BTC"][0]) == 30 * 1440
    assert len(book.since({"BTC": newest_s - DAY_S}, newest_s)["BTC"]) == DAY_S // 5


def test_what_was_read_stays_as_it_was() -> None:
    book = PriceBook(DAY_S, 60)
    book.add("BTC", [(60, 1.0), (180, 3.0)])
    ts_s, price = book.series("BTC")
    book.add("BTC", [(120, 2.0)])
    book.add("BTC", [(240 + 60 * index, 4.0) for index in range(5000)])
    assert ts_s.tolist() == [60, 180]
    assert price.tolist() == [1.0, 3.0]
    assert not price.flags.writeable


@given(
    st.lists(
        st.lists(st.tuples(st.integers(1, 50), st.floats(0.5, 2.0)), max_size=20),
        max_size=6,
    )
)
@settings(max_examples=60)
def test_the_book_is_a_sorted_dictionary_that_never_changes_its_mind(
    batches: list[list[tuple[int, float]]],
) -> None:
    book, expected = PriceBook(DAY_S, 1), dict[int, float]()
    for batch in batches:
        new = {ts_s: price for ts_s, price in dict(batch).items() if ts_s not in expected}
        assert book.add("A", batch) == sorted(new.items())
        expected |= new
    ts_s, price = book.series("A")
    assert list(zip(ts_s.tolist(), price.tolist(), strict=True)) == sorted(expected.items())


# The grid


def test_quiet_ticks_are_filled_only_once_a_later_point_proves_that_the_source_was_up() -> None:
    span = Span(60, 300, 60)
    assert on_grid([], span, (60, 1.0)) == []
    assert on_grid([(120, 2.0)], span, (60, 1.0)) == [(120, 2.0)]
    assert on_grid([(240, 2.0)], span, (60, 1.0)) == [(120, 1.0), (180, 1.0), (240, 2.0)]


def test_a_silence_too_long_for_a_quiet_market_stays_a_gap() -> None:
    back_s = 60 + QUIET_S + 60
    assert on_grid([(back_s, 2.0)], Span(60, back_s, 60), (60, 1.0)) == [(back_s, 2.0)]
    assert len(on_grid([(back_s - 60, 2.0)], Span(60, back_s, 60), (60, 1.0))) == QUIET_S // 60


def test_points_off_the_grid_count_from_the_next_tick_on() -> None:
    points = [(125, 3.0), (61, 1.0), (119, 2.0), (119, 2.5)]
    assert on_grid(points, Span(60, 180, 60)) == [(120, 2.5)]
    assert on_grid([*points, (180, 4.0)], Span(60, 180, 60)) == [(120, 2.5), (180, 4.0)]


def test_what_is_outside_of_the_range_is_left_out() -> None:
    assert on_grid([(60, 1.0), (120, 2.0), (180, 3.0)], Span(60, 120, 60)) == [(120, 2.0)]


@given(
    st.dictionaries(st.integers(1, 5000), st.floats(0.5, 2.0), max_size=40),
    st.sampled_from([1, 7, 60, 300]),
    st.integers(0, 5000),
)
@settings(max_examples=80)
def test_a_point_on_the_grid_is_the_last_known_price(
    points: dict[int, float], step_s: int, after_s: int
) -> None:
    for at_s, price in on_grid(list(points.items()), Span(after_s, 5000, step_s)):
        known_s = max(ts_s for ts_s in points if ts_s <= at_s)
        assert at_s % step_s == 0
        assert after_s < at_s <= max(points)
        assert price == points[known_s]


def lacking(held_s: list[int], now_s: int, tick_s: int = 5, history_s: int = DAY_S) -> list[Span]:
    """Oldest first."""
    times_s = np.array(held_s, np.int64)
    spans = missing(times_s, now_s, tick_s=tick_s, history_s=history_s, fine_s=3600, keep_s=35 * DAY_S)
    return spans[::-1]


def tail(newest_s: int | None, now_s: int, tick_s: int = 5, history_s: int = DAY_S) -> list[Span]:
    if newest_s is None:
        return lacking([], now_s, tick_s, history_s)
    first_s = min(now_s - history_s, newest_s)
    return lacking([*range(first_s // 60 * 60, newest_s, 60), newest_s], now_s, tick_s, history_s)


def test_a_first_history_is_coarse_but_for_the_last_hour() -> None:
    now_s = 100 * DAY_S
    assert tail(None, now_s + 35) == [
        Span(now_s - DAY_S, now_s - 3600, 60),
        Span(now_s - 3600, now_s + 35, 5),
    ]
    assert tail(None, now_s, tick_s=60) == [Span(now_s - DAY_S, now_s, 60)]
    assert tail(None, now_s, history_s=600) == [Span(now_s - 600, now_s, 5)]


def test_a_gap_is_fine_where_rounds_from_before_it_end() -> None:
    now_s = 100 * DAY_S
    assert tail(now_s - 3 * DAY_S + 5, now_s) == [
        Span(now_s - 3 * DAY_S + 5, now_s - 3 * DAY_S + 3600, 5),
        Span(now_s - 3 * DAY_S + 3600, now_s - 3600, 60),
        Span(now_s - 3600, now_s, 5),
    ]
    assert tail(now_s - 600, now_s) == [Span(now_s - 600, now_s, 5)]
    assert tail(now_s - 3 * DAY_S, now_s, tick_s=60) == [Span(now_s - 3 * DAY_S, now_s, 60)]
    assert tail(now_s, now_s) == []


def test_a_gap_longer_than_prices_are_kept_is_not_filled() -> None:
    now_s = 100 * DAY_S
    assert tail(now_s - 36 * DAY_S, now_s) == tail(None, now_s)


def test_a_longer_history_than_the_stored_one_is_completed_in_front() -> None:
    now_s = 100 * DAY_S
    held_s = list(range(99 * DAY_S, now_s + 1, 60))
    assert lacking(held_s, now_s, tick_s=60) == []
    assert lacking(held_s, now_s, tick_s=60, history_s=3 * DAY_S) == [Span(97 * DAY_S, 99 * DAY_S - 60, 60)]


def test_holes_are_found_as_far_as_the_history_reaches() -> None:
    now_s = 100 * DAY_S
    held_s = [
        *range(now_s - 2 * DAY_S, now_s - DAY_S - 7200, 60),
        *range(now_s - DAY_S - 3600, now_s - 7200 + 1, 60),
        *range(now_s - 600, now_s - 60 + 1, 60),
    ]
    assert lacking(held_s, now_s, tick_s=60) == [
        Span(now_s - 7200, now_s - 660, 60),
        Span(now_s - 60, now_s, 60),
    ]


def test_the_history_step_is_a_multiple_of_the_tick() -> None:
    assert [history_step_s(tick_s) for tick_s in (1, 5, 45, 60, 90, 3600)] == [60, 60, 90, 60, 90, 3600]


def test_reading_while_another_thread_adds_gives_whole_points() -> None:
    book = PriceBook(DAY_S, 1)
    stop = threading.Event()
    wrong: list[str] = []

    def read() -> None:
        while not stop.is_set():
            ts_s, price = book.series("A")
            if not np.array_equal(ts_s, price):
                wrong.append("torn")

    reader = threading.Thread(target=read)
    reader.start()
    for first in range(0, 40_000, 100):
        book.add("A", [(ts_s, float(ts_s)) for ts_s in range(first + 1, first + 101)])
    stop.set()
    reader.join()
    assert not wrong
