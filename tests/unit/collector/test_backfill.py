"""What a page of history proves about a hole."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collector.aggregates import UnorderedPageError
from collector.backfill import read_page
from sluice.queue import Hole
from sluice.records import Trade

PAGE = 10


def trade(trade_id: int, first_id: int | None = None) -> Trade:
    return Trade(
        exchange="binance",
        symbol="BTCUSDT",
        trade_id=trade_id,
        first_id=trade_id if first_id is None else first_id,
        price="1.5",
        quantity="2",
        side="buy",
        ts_event=trade_id,
        ts_recv=trade_id,
    )


def trades(*ids: int) -> list[Trade]:
    return [trade(number) for number in ids]


def test_a_page_that_fills_the_hole_leaves_nothing() -> None:
    page = read_page(Hole(5, 7, 0), trades(5, 6, 7, 8, 9), PAGE)
    assert page.trades == trades(5, 6, 7)
    assert page.missing == []
    assert not page.is_last


def test_an_id_passed_over_is_missing_and_one_beyond_the_hole_is_not_looked_at() -> None:
    page = read_page(Hole(5, 9, 0), trades(6, 9, 12, 20), PAGE)
    assert page.trades == trades(6, 9)
    assert page.missing == [(5, 5), (7, 8)]


def test_a_whole_hole_that_is_passed_over_is_missing() -> None:
    page = read_page(Hole(5, 7, 0), trades(8), PAGE)
    assert page.missing == [(5, 7)]
    assert not page.is_last


@pytest.mark.parametrize("found", [[], [5, 6]])
def test_a_short_page_proves_nothing_of_what_comes_after_it(found: list[int]) -> None:
    page = read_page(Hole(5, 8, 0), trades(*found), PAGE)
    assert page.missing == []
    assert page.is_last


def test_a_full_page_that_ends_within_the_hole_asks_for_more() -> None:
    page = read_page(Hole(1, 50, 0), trades(*range(1, 11)), PAGE)
    assert len(page.trades) == PAGE
    assert not page.is_last


@pytest.mark.parametrize("ids", [[4], [5, 5], [5, 7, 6]])
def test_a_page_that_does_not_ascend_from_the_id_asked_for_proves_nothing(ids: list[int]) -> None:
    with pytest.raises(UnorderedPageError):
        read_page(Hole(5, 9, 0), trades(*ids), PAGE)


@given(st.sets(st.integers(1, 60)), st.integers(1, 40), st.integers(0, 20))
@settings(derandomize=True, deadline=None)
def test_every_id_of_a_hole_is_given_missing_or_still_to_be_asked_for(
    served: set[int], first: int, length: int
) -> None:
    hole = Hole(first, first + length, 0)
    answer = sorted(number for number in served if number >= first)[:PAGE]
    page = read_page(hole, trades(*answer), PAGE)
    given_ids = {entry.trade_id for entry in page.trades}
    missing = {number for low, high in page.missing for number in range(low, high + 1)}
    within = set(range(hole.first, hole.last + 1))
    assert given_ids == set(answer) & within
    assert missing == {n for n in within - served if any(n < number for number in answer)}
